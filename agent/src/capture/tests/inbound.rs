//! Connections to the pod: captured on every port, and delivered to the app as the client's own.

use std::{
    collections::HashSet,
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::world::{
    FROM_AGENT, FROM_APP, OUT4, OUT6, POD4, POD6, SOON, World, app, beside, can_run, connect_in, greeting, next, serve,
};
use crate::capture::*;

#[tokio::test(flavor = "multi_thread")]
async fn inbound_is_captured_on_every_port_also_where_the_app_listens() {
    if !can_run("inbound_is_captured_on_every_port_also_where_the_app_listens") {
        return;
    }
    let world = World::new();
    let listening = app(&world.pod(), SocketAddr::new(POD4, 8_080));
    let mut early = connect_in(&world.out(), None, SocketAddr::new(POD4, 8_080)).unwrap();
    assert_eq!(&greeting(&mut early).unwrap(), FROM_APP);
    let handle = world.start().await;
    let (mut accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    for (pod, client, port) in [(POD4, OUT4, 8_080), (POD4, OUT4, 15_008), (POD6, OUT6, 9)] {
        let to = SocketAddr::new(pod, port);
        let out = world.out();
        let mut stream = beside(move || connect_in(&out, None, to)).await.unwrap();
        let (original, peer) = next(&mut accepted).await;
        assert_eq!((original, peer), (to, stream.local_addr().unwrap()));
        assert_eq!(peer.ip(), client);
        assert_eq!(&beside(move || greeting(&mut stream)).await.unwrap(), FROM_AGENT);
    }
    let direct = connect_in(&world.out(), None, SocketAddr::new(POD4, heddle_common::LISTENER_PORT));
    assert_eq!(
        direct.unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused,
        "nobody addresses the listener's own port"
    );
    // A connection from before enrolment goes on, and the app saw no other.
    early.write_all(b"still").unwrap();
    let mut echo = [0; 5];
    early.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"still");
    assert_eq!(listening.try_iter().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_reaches_the_app_from_the_clients_address() {
    if !can_run("delivery_reaches_the_app_from_the_clients_address") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (_accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    let far4: IpAddr = "198.51.100.7".parse().unwrap();
    let far6: IpAddr = "2001:db8:1::7".parse().unwrap();
    let any4 = app(&world.pod(), "0.0.0.0:8080".parse().unwrap());
    let any6 = app(&world.pod(), "[::]:8081".parse().unwrap());
    let cases = [
        (OUT4, POD4, 8_080, OUT4, &any4),
        (far4, POD4, 8_080, far4, &any4),
        ("::ffff:198.51.100.8".parse().unwrap(), POD4, 8_080, "198.51.100.8".parse().unwrap(), &any4),
        (OUT6, POD6, 8_081, OUT6, &any6),
        (far6, POD6, 8_081, far6, &any6),
        (POD4, POD4, 8_080, POD4, &any4),
        (POD6, POD6, 8_081, POD6, &any6),
    ];
    for (client, pod, port, expected, seen) in cases {
        let Delivery { mut stream } =
            timeout(SOON, handle.deliver("default/web.1", client, SocketAddr::new(pod, port))).await.unwrap().unwrap();
        let mut answer = [0; 21];
        stream.write_all(b"hello").await.unwrap();
        timeout(SOON, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer[16..], b"hello");
        let peer = seen.recv_timeout(SOON).unwrap();
        assert_eq!(peer.ip().to_canonical(), expected);
        assert!(client == pod || peer.port() < 32_768, "{peer}");
        assert!(stream.nodelay().unwrap());
    }
    assert_eq!(handle.node().maps.all_attested().unwrap().len(), 0, "nothing stays attested");
    for (client, pod) in [(far4, POD4), (far6, POD6)] {
        let delivery = handle.deliver("default/web.1", client, SocketAddr::new(pod, 9));
        let refused = timeout(Duration::from_secs(1), delivery).await.expect("told at once").unwrap_err();
        assert_eq!(refused.reason(), "connect");
        assert_eq!(refused.io().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    }
    let mixed = handle.deliver("default/web.1", far6, SocketAddr::new(POD4, 8_080)).await.unwrap_err();
    assert_eq!(mixed.reason(), "address_family");
    assert_eq!(handle.node().maps.all_attested().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_deliveries_of_one_client_to_one_port_use_ports_in_time_wait_again() {
    if !can_run("thousands_of_deliveries_of_one_client_to_one_port_use_ports_in_time_wait_again") {
        return;
    }
    let world = World::new();
    // 4,177 ports for deliveries, so that 2 x 3,000 go round.
    world.pod().within(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "5200 60999")).unwrap();
    let handle = world.start().await;
    let (_accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    let seen = app(&world.pod(), "[::]:8080".parse().unwrap());
    for (client, pod) in [(OUT4, POD4), (OUT6, POD6)] {
        let started = Instant::now();
        for round in 0..2 {
            for turn in 0..3_000 {
                let Delivery { mut stream } = handle
                    .deliver("default/web.1", client, SocketAddr::new(pod, 8_080))
                    .await
                    .unwrap_or_else(|error| panic!("{client} round {round} turn {turn}: {error}"));
                let mut answer = [0; 16];
                stream.read_exact(&mut answer).await.unwrap();
                assert_eq!(&answer, FROM_APP);
                // The agent closes first: TIME_WAIT stays on its side.
                stream.shutdown().await.unwrap();
                assert_eq!(stream.read(&mut answer).await.unwrap(), 0);
            }
            tokio::time::sleep(Duration::from_millis(1_200)).await;
        }
        let ports: HashSet<u16> = seen.try_iter().map(|peer| peer.port()).collect();
        println!("{client}: 6,000 deliveries over {} ports in {:?}", ports.len(), started.elapsed());
        assert!(ports.len() < 6_000 && ports.iter().all(|port| (1_024..5_200).contains(port)));
    }
    assert_eq!(handle.node().maps.all_attested().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_keeps_off_the_ports_of_connections_that_the_agent_holds() {
    if !can_run("delivery_keeps_off_the_ports_of_connections_that_the_agent_holds") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (mut accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    let seen = app(&world.pod(), "0.0.0.0:8080".parse().unwrap());
    let app_at = SocketAddr::new(POD4, 8_080);
    // Ports that delivery comes to in its turn.
    let mut held = Vec::new();
    for port in (2_000..2_400).step_by(4) {
        let out = world.out();
        let stream = beside(move || connect_in(&out, Some(SocketAddr::new(OUT4, port)), app_at)).await.unwrap();
        let (_, client) = next(&mut accepted).await;
        held.push((stream, handle.occupy("default/web.1", client, app_at)));
    }
    world.pod().within(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "32768 60999")).unwrap();
    let occupancy = &handle.node().pod("default/web.1").unwrap().occupancy;
    let rotation = ports::Rotation::new(2_000..=2_399);
    for _ in 0..400 {
        let port = rotation.pick(OUT4, 8_080, occupancy).unwrap();
        assert!(!(2_000..2_400).step_by(4).any(|taken| taken == port), "{port}");
    }
    for _ in 0..200 {
        let delivery = handle.deliver("default/web.1", OUT4, app_at);
        timeout(SOON, delivery).await.unwrap().unwrap();
    }
    for _ in 0..200 {
        assert_eq!(seen.recv_timeout(SOON).unwrap().ip(), OUT4);
    }
    for (stream, _) in &mut held {
        assert_eq!(&greeting(stream).unwrap(), FROM_AGENT);
    }
}
