//! Does the lab itself tell the truth? The same clients and servers with no mesh between them.

use std::time::{Duration, Instant};

use heddle_lab::{Lab, Result, Who, leftovers, needs_root, reports::Event, sweep, until};

/// Bytes of a bulk transfer.
const MIB: u64 = 1 << 20;

#[test]
fn two_pods_reach_each_other_within_a_few_seconds() -> Result {
    needs_root!();
    let begun = Instant::now();
    let lab = Lab::without_mesh()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["who:7000"]).start()?;
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    for to in [server.at(7000), server.at6(7000)] {
        let seen = client.connect(to).run()?;
        let who: Who = serde_json::from_str(&seen.received)?;
        assert_eq!(
            (seen.error, seen.peer, Some(who.peer.port())),
            (None, Some(to), seen.local.map(|local| local.port()))
        );
        assert_eq!(who.name, "server");
    }
    Ok(())
}

#[test]
fn every_kind_of_client_socket_connects() -> Result {
    needs_root!();
    let lab = Lab::without_mesh()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo+fastopen:7000", "echo+mptcp:7001"]).start()?;
    let hello = || client.connect(server.at(7000)).say("hello").with("--expect", 5);
    let calls = [
        hello(),
        hello().v4_mapped(),
        hello().fastopen(),
        hello().bind_port(20_000),
        hello().bind_device("eth0"),
        hello().mark(7),
    ];
    for call in calls {
        let seen = call.run()?;
        assert_eq!((seen.error, seen.received.as_str()), (None, "hello"));
    }
    let seen = client.connect(server.at(7001)).mptcp().say("hello").with("--expect", 5).run()?;
    assert_eq!((seen.received.as_str(), seen.mptcp), ("hello", true));
    Ok(())
}

#[test]
fn a_closed_port_refuses_and_a_dead_address_times_out() -> Result {
    needs_root!();
    let lab = Lab::without_mesh()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").on(2).start()?;
    assert_eq!(client.connect(server.at(9)).run()?.error.as_deref(), Some("refused"));
    // Addresses of Services are routed by nobody: the default route leads to the node, which knows no way on.
    let service = lab.service("shop", "web", (80, 7000), &[&server])?;
    let error = client.connect(service.at()).with("--patience", 300).run()?.error;
    assert!(matches!(error.as_deref(), Some("unreachable" | "timeout")), "{error:?}");
    Ok(())
}

#[test]
fn bulk_and_many_connections_are_counted_right() -> Result {
    needs_root!();
    let lab = Lab::without_mesh()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000", "sink:7001", "farewell:7002"]).start()?;
    let moved = client.transfer(server.at(7000), 8 * MIB).run()?;
    assert_eq!((moved.error, moved.received, moved.sent_sha256), (None, 8 * MIB, moved.received_sha256));
    let (mut held, first) = client.hold(server.at(7000), 50).open()?;
    assert_eq!((first.alive, first.failed), (50, 0));
    let churned = client.churn(server.at(7000), 300, 20).run()?;
    assert_eq!((churned.ok, churned.failed), (300, 0));
    assert_eq!(held.check()?.alive, 50);
    held.close()?;
    let sent = client.throughput(server.at(7001), 1).run()?;
    assert!(sent.error.is_none() && sent.count > MIB, "{sent:?}");
    let sunk = until(Duration::from_secs(5), "the sink's report", || {
        server.events().into_iter().find_map(|event| match event {
            Event::Sunk { bytes, .. } => Some(bytes),
            _ => None,
        })
    })?;
    assert_eq!(sunk, sent.count);
    let asked = client.latency(server.at(7000), 100).run()?;
    assert_eq!((asked.count, asked.error), (100, None));
    let seen = client.connect(server.at(7002)).with("--say-after-end", "still here").run()?;
    assert_eq!(seen.received, "bye\n");
    until(Duration::from_secs(5), "the server's half of the farewell", || {
        server.events().contains(&Event::Farewell { received: 10, text: "still here".to_owned() }).then_some(())
    })
}

#[test]
fn the_recording_shows_plain_text_where_there_is_no_mesh() -> Result {
    needs_root!();
    let lab = Lab::without_mesh()?;
    let client = lab.pod("shop", "client").start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let recording = lab.record()?;
    client.connect(server.at(7000)).say("in plain sight").with("--expect", 14).run()?;
    let traffic = recording.finish()?;
    assert_eq!(traffic.holding(b"in plain sight").count(), 2, "there and back");
    assert!(traffic.streams.iter().all(|stream| stream.tls_application_records().is_none()));
    Ok(())
}

#[test]
fn a_dropped_lab_leaves_nothing() -> Result {
    needs_root!();
    let lab = Lab::without_mesh()?;
    let prefix = lab.prefix().to_owned();
    let server = lab.pod("shop", "server").serves(&["echo:7000"]).start()?;
    std::mem::forget(server);
    drop(lab);
    let left: Vec<String> = leftovers()?.into_iter().filter(|line| line.contains(&prefix)).collect();
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn what_a_killed_lab_left_is_swept() -> Result {
    needs_root!();
    let mut lab = Lab::without_mesh()?;
    let server = lab.pod("shop", "server").serves(&["echo:7000"]).start()?;
    let prefix = lab.prefix().to_owned();
    // As if the owner had died: another start time is another process.
    std::fs::write(lab.dir().join("owner"), format!("{} 1", std::process::id()))?;
    std::mem::forget(server);
    let seen = leftovers()?;
    for kind in ["netns", "cgroup", "folder", "mount", "process"] {
        assert!(seen.iter().any(|line| line.starts_with(kind) && line.contains(&prefix)), "no {kind} in {seen:?}");
    }
    sweep()?;
    assert!(leftovers()?.iter().all(|line| !line.contains(&prefix)));
    lab.forget();
    Ok(())
}
