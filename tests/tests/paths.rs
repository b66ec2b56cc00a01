//! Does every kind of connection arrive, with the right addresses at both ends?

use std::net::SocketAddr;

use heddle_lab::{Lab, Pod, Result, needs_root, reports::Connected};

/// A client, a server on the other node and one beside the client.
struct Stage {
    lab: Lab,
    client: Pod,
    far: Pod,
    near: Pod,
}

fn stage(servers: &[&str]) -> Result<Stage> {
    let lab = Lab::two_nodes()?;
    let far = lab.pod("shop", "far").on(2).serves(servers).start()?;
    let near = lab.pod("shop", "near").on(1).serves(servers).start()?;
    let client = lab.pod("shop", "client").on(1).start()?;
    Ok(Stage { lab, client, far, near })
}

/// The app saw the client's address, and the client saw what it had connected to.
fn check(seen: &Connected, client: impl Into<std::net::IpAddr>, server: SocketAddr, asked: SocketAddr) -> Result {
    let who = seen.who()?;
    assert_eq!(who.peer.ip().to_canonical(), client.into(), "the client's address at the app");
    assert_eq!(
        (who.local.ip().to_canonical(), who.local.port()),
        (server.ip(), server.port()),
        "the app's own address"
    );
    let peer = seen.peer.map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()));
    assert_eq!(peer, Some(asked), "getpeername() of the client");
    Ok(())
}

/// Connections that node 2 took in under mutual TLS.
fn tunnelled(lab: &Lab) -> Result<f64> {
    lab.agent(2)?.opened(&[("reporter", "destination"), ("connection_security_policy", "mutual_tls")])
}

#[test]
fn the_app_sees_its_clients_address_through_the_tunnel() -> Result {
    needs_root!();
    let Stage { lab, client, far, .. } = stage(&["who:7000"])?;
    check(&client.connect(far.at(7000)).run()?, client.v4(), far.at(7000), far.at(7000))?;
    check(&client.connect(far.at6(7000)).run()?, client.v6(), far.at6(7000), far.at6(7000))?;
    assert_eq!(tunnelled(&lab)?, 2.0);
    let line = lab
        .agent(2)?
        .wait_access("the tunnelled connection", |line| line.get("dst.hbone_addr") == far.at(7000).to_string())?;
    assert_eq!(line.get("src.identity"), client.identity());
    Ok(())
}

#[test]
fn the_app_sees_its_clients_address_on_the_same_node() -> Result {
    needs_root!();
    let Stage { lab: _lab, client, near, .. } = stage(&["who:7000"])?;
    check(&client.connect(near.at(7000)).run()?, client.v4(), near.at(7000), near.at(7000))?;
    check(&client.connect(near.at6(7000)).run()?, client.v6(), near.at6(7000), near.at6(7000))
}

#[test]
fn the_app_sees_the_address_of_a_plaintext_client() -> Result {
    needs_root!();
    let Stage { lab, far, near, .. } = stage(&["who:7000"])?;
    let outsider = lab.pod("shop", "outsider").outside_the_mesh().start()?;
    for server in [&far, &near] {
        check(&outsider.connect(server.at(7000)).run()?, outsider.v4(), server.at(7000), server.at(7000))?;
        check(&outsider.connect(server.at6(7000)).run()?, outsider.v6(), server.at6(7000), server.at6(7000))?;
    }
    let plain = [("reporter", "destination"), ("connection_security_policy", "none")];
    assert_eq!((lab.agent(1)?.opened(&plain)?, lab.agent(2)?.opened(&plain)?), (2.0, 2.0));
    Ok(())
}

#[test]
fn service_addresses_that_nothing_routes_are_reached() -> Result {
    needs_root!();
    let Stage { lab, client, far, .. } = stage(&["who:7000"])?;
    let service = lab.service("shop", "web", (80, 7000), &[&far])?;
    heddle_lab::until(std::time::Duration::from_secs(10), "the Service to be known", || {
        client.connect(service.at()).run().ok().filter(|seen| seen.error.is_none())
    })?;
    check(&client.connect(service.at()).run()?, client.v4(), far.at(7000), service.at())?;
    check(&client.connect(service.at6()).run()?, client.v6(), far.at6(7000), service.at6())
}

#[test]
fn v4_mapped_sockets_are_carried() -> Result {
    needs_root!();
    let Stage { lab, client, far, near } = stage(&["who:7000"])?;
    for server in [&far, &near] {
        let seen = client.connect(server.at(7000)).v4_mapped().run()?;
        assert!(seen.peer.is_some_and(|peer| peer.is_ipv6()), "{seen:?}");
        check(&seen, client.v4(), server.at(7000), server.at(7000))?;
    }
    assert_eq!(tunnelled(&lab)?, 1.0);
    Ok(())
}

#[test]
fn mptcp_sockets_are_carried_at_either_end() -> Result {
    needs_root!();
    let Stage { lab, client, far, near } = stage(&["who:7000", "who+mptcp:7001"])?;
    for server in [&far, &near] {
        for port in [7000, 7001] {
            check(&client.connect(server.at(port)).mptcp().run()?, client.v4(), server.at(port), server.at(port))?;
            check(&client.connect(server.at6(port)).mptcp().run()?, client.v6(), server.at6(port), server.at6(port))?;
        }
        check(&client.connect(server.at(7001)).run()?, client.v4(), server.at(7001), server.at(7001))?;
    }
    assert_eq!(tunnelled(&lab)?, 5.0);
    Ok(())
}

#[test]
fn fast_open_loses_no_byte_at_either_end() -> Result {
    needs_root!();
    let Stage { lab, client, far, near } = stage(&["echo:7000", "echo+fastopen:7001"])?;
    for server in [&far, &near] {
        // The first asks for a cookie, the second has one.
        for port in [7000, 7000, 7001, 7001] {
            let seen =
                client.connect(server.at(port)).fastopen().say("in the first packet").with("--expect", 19).run()?;
            assert_eq!((seen.error, seen.received.as_str()), (None, "in the first packet"));
        }
    }
    assert_eq!(tunnelled(&lab)?, 4.0);
    Ok(())
}

#[test]
fn a_socket_bound_before_connect_is_carried() -> Result {
    needs_root!();
    let Stage { lab, client, far, near } = stage(&["who:7000"])?;
    for (port, server) in [(20_001, &far), (20_002, &near), (50_003, &far), (50_004, &near)] {
        let seen = client.connect(server.at(7000)).bind_port(port).run()?;
        check(&seen, client.v4(), server.at(7000), server.at(7000))?;
        assert_eq!(seen.local, Some(client.at(port)));
    }
    assert_eq!(tunnelled(&lab)?, 2.0);
    Ok(())
}

#[test]
fn a_socket_bound_to_its_device_does_not_leave_in_plain_text() -> Result {
    needs_root!();
    let Stage { lab, client, far, .. } = stage(&["echo:7000"])?;
    let recording = lab.record()?;
    let seen = client.connect(far.at(7000)).bind_device("eth0").say("bound to eth0").with("--expect", 13).run()?;
    let traffic = recording.finish()?;
    // Bound to a device, a connection can't take the way over lo: it is carried or it fails, but never passes around.
    assert!(seen.was_refused() || seen.error.is_none() || seen.error.as_deref() == Some("timeout"), "{seen:?}");
    let plain = lab.agent(2)?.opened(&[("reporter", "destination"), ("connection_security_policy", "none")])?;
    assert_eq!((traffic.holding(b"bound to eth0").count(), plain), (0, 0.0), "{seen:?}");
    Ok(())
}

#[test]
fn a_mark_that_the_app_sets_exempts_nothing() -> Result {
    needs_root!();
    let Stage { lab, client, far, near } = stage(&["who:7000"])?;
    for mark in [1, 0x539, 0xffff_ffff] {
        for server in [&far, &near] {
            check(&client.connect(server.at(7000)).mark(mark).run()?, client.v4(), server.at(7000), server.at(7000))?;
        }
    }
    assert_eq!(tunnelled(&lab)?, 3.0);
    Ok(())
}

#[test]
fn a_pod_that_talks_to_itself_is_left_alone() -> Result {
    needs_root!();
    let Stage { lab, far, .. } = stage(&["who:7000"])?;
    for to in [far.at(7000), far.at6(7000), ([127, 0, 0, 1], 7000).into()] {
        let seen = far.connect(to).run()?;
        assert_eq!(seen.who()?.peer.port(), seen.local.map_or(0, |local| local.port()), "no proxy between");
    }
    assert_eq!(lab.agent(2)?.opened(&[])?, 0.0);
    Ok(())
}

#[test]
fn traffic_to_what_is_not_in_the_mesh_is_untouched() -> Result {
    needs_root!();
    let Stage { lab, client, .. } = stage(&["who:7000"])?;
    let outsider = lab.pod("shop", "outsider").on(2).serves(&["who:7000"]).outside_the_mesh().start()?;
    for to in [outsider.at(7000), outsider.at6(7000)] {
        let seen = client.connect(to).run()?;
        assert_eq!(seen.who()?.peer.port(), seen.local.map_or(0, |local| local.port()), "no proxy between");
    }
    assert_eq!(lab.agent(1)?.opened(&[])?, 0.0);
    Ok(())
}

#[test]
fn a_closed_port_is_refused_through_the_tunnel() -> Result {
    needs_root!();
    let Stage { lab: _lab, client, far, near } = stage(&["who:7000"])?;
    for server in [&far, &near] {
        let seen = client.connect(server.at(7999)).run()?;
        assert!(seen.was_refused() || (seen.error.is_none() && seen.received.is_empty()), "{seen:?}");
        assert!(seen.total_us < 2_000_000, "{seen:?}");
    }
    Ok(())
}
