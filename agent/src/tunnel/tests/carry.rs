use std::{io::ErrorKind, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use rustls_pki_types::ServerName;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::world::{Authority, PORT, World};
use crate::{
    cluster::Snapshot,
    policy::Rulebook,
    tunnel::{Direction, End, PoolEnd, Security, reconsider},
};

const MIB: usize = 1 << 20;

pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

/// Answers every connection with what it sends.
pub fn echo(listener: TcpListener) {
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut reader, mut writer) = tcp.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
}

pub async fn ping(tcp: &mut TcpStream) -> std::io::Result<Duration> {
    let began = Instant::now();
    tcp.write_all(b"ping").await?;
    let mut answer = [0; 4];
    tcp.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"ping");
    Ok(began.elapsed())
}

/// The world's cluster, to be changed.
pub fn cluster(world: &World) -> Snapshot {
    let old = world.snapshots.borrow().clone();
    Snapshot {
        workloads: old.workloads.clone(),
        by_address: old.by_address.clone(),
        by_cluster_address: old.by_cluster_address.clone(),
        root_namespace: old.root_namespace.clone(),
        ..Snapshot::default()
    }
}

/// A world whose policies are written in YAML.
pub fn deny(world: &World, policy: &str) {
    let authorization_policies = vec![Arc::new(serde_saphyr::from_str(policy).unwrap())];
    world.rules.store(Arc::new(Rulebook::compile(&Snapshot { authorization_policies, ..cluster(world) })));
}

pub const DENY_A: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-a, namespace: default}
spec: {action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/a]}}]}]}
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_arrive_both_ways_at_once() {
    let world = World::new();
    let app = world.app().await;
    let (up, down) = (pattern(1, 64 * MIB), pattern(2, 64 * MIB));
    let sums = (Sha256::digest(&up), Sha256::digest(&down));
    let server = tokio::spawn(async move {
        let (tcp, _) = app.accept().await.unwrap();
        exchange(tcp, down).await
    });
    let seen_by_client = exchange(world.client().await, up).await;
    assert!(Sha256::digest(&seen_by_client) == sums.1);
    assert!(Sha256::digest(server.await.unwrap()) == sums.0);
    let bytes = (64 * MIB as u64, 64 * MIB as u64);
    for (served, direction) in [(&world.a, Direction::Outbound), (&world.b, Direction::Inbound)] {
        let told = served.told(1).await;
        assert_eq!(told.len(), 1);
        assert!(matches!(told[0].end, End::Complete), "{told:?}");
        assert!(told[0].opened);
        assert_eq!((told[0].bytes, told[0].flow.direction), (bytes, direction));
        assert_eq!(told[0].flow.security, Security::MutualTls);
        assert_eq!(told[0].flow.hbone_target, Some((world.b.address, PORT).into()));
        let principal = told[0].flow.source_principal.as_ref().unwrap().as_str();
        assert_eq!(principal, "spiffe://cluster.local/ns/default/sa/a");
        assert_eq!(served.registry.count(), 0);
    }
    let (a, b) = (&world.a.told(1).await[0].flow, &world.b.told(1).await[0].flow);
    let (offered, answered) = (a.trace.unwrap(), b.trace.unwrap());
    assert_eq!((answered.trace_id, answered.parent), (offered.trace_id, Some(offered.span_id)));
    assert_eq!(b.source_workload.as_ref().unwrap().uid, world.a.record.uid);
}

#[tokio::test]
async fn a_tunnels_wire_carries_the_apps_bytes_and_more_and_the_pool_counts_its_streams() {
    let world = World::new();
    echo(world.app().await);
    let bytes = pattern(7, MIB);
    for _ in 0..2 {
        assert_eq!(exchange(world.client().await, bytes.clone()).await, bytes);
    }
    world.a.told(2).await;
    let pool = world.a.registry.pool();
    assert_eq!((pool.opened(), pool.placed()), (1, (1, 1)));
    world.a.pod.pool.retain(|_| false);
    let deadline = Instant::now() + Duration::from_secs(10);
    while world.a.observer.wires.lock().unwrap().is_empty() || world.b.observer.wires.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the tunnel does not end");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((pool.open(), pool.live(), pool.ended(PoolEnd::Retired)), (0, 0, 1));
    let ended = |served: &super::world::Served| served.observer.wires.lock().unwrap()[0];
    let (((sent, received), health), ((answered, asked), _)) = (ended(&world.a), ended(&world.b));
    // Each direction carries 2 MiB, and TLS and HTTP/2 take less than 5 % of that on top.
    for carried in [sent, received, answered, asked] {
        assert!((2 * MIB as u64..2 * MIB as u64 * 105 / 100).contains(&carried), "{carried}");
    }
    let health = health.unwrap();
    assert!(health.rtt > 0 && health.segments > 0, "{health:?}");
}

pub async fn exchange(tcp: TcpStream, data: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = tcp.into_split();
    let send = tokio::spawn(async move {
        writer.write_all(&data).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut seen = Vec::new();
    reader.read_to_end(&mut seen).await.unwrap();
    send.await.unwrap();
    seen
}

#[tokio::test]
async fn either_side_may_finish_first_and_still_hear_the_other() {
    let world = World::new();
    let app = world.app().await;
    for client_first in [true, false] {
        let mut client = world.client().await;
        let (mut server, _) = app.accept().await.unwrap();
        let (first, second) = if client_first { (&mut client, &mut server) } else { (&mut server, &mut client) };
        first.write_all(b"all of mine").await.unwrap();
        first.shutdown().await.unwrap();
        let mut seen = Vec::new();
        timeout(Duration::from_secs(5), second.read_to_end(&mut seen)).await.unwrap().unwrap();
        assert_eq!(seen, b"all of mine");
        sleep(Duration::from_millis(50)).await;
        second.write_all(b"and mine, later").await.unwrap();
        second.shutdown().await.unwrap();
        let mut seen = Vec::new();
        timeout(Duration::from_secs(5), first.read_to_end(&mut seen)).await.unwrap().unwrap();
        assert_eq!(seen, b"and mine, later");
    }
    assert!(world.a.told(2).await.iter().all(|told| matches!(told.end, End::Complete)));
    assert!(world.b.told(2).await.iter().all(|told| matches!(told.end, End::Complete)));
}

#[tokio::test]
async fn a_reset_of_either_side_resets_the_other() {
    let world = World::new();
    let app = world.app().await;
    // Each also after the other side has finished, when nobody awaits its bytes any more.
    for (client_resets, other_finished) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut client = world.client().await;
        let (mut server, _) = app.accept().await.unwrap();
        ping_pong(&mut client, &mut server).await;
        let (resets, mut other) = if client_resets { (client, server) } else { (server, client) };
        if other_finished {
            other.shutdown().await.unwrap();
            sleep(Duration::from_millis(50)).await;
        }
        resets.set_zero_linger().unwrap();
        drop(resets);
        let mut rest = Vec::new();
        let seen = timeout(Duration::from_secs(5), other.read_to_end(&mut rest)).await.unwrap();
        let seen = seen.expect_err("a reset, not an end");
        assert_eq!(seen.kind(), ErrorKind::ConnectionReset, "{client_resets} {other_finished}");
    }
    let ends = |told: Vec<super::world::Told>| -> Vec<&str> {
        let reason = |end: &End| match end {
            End::Failed { reason, .. } => *reason,
            _ => "complete",
        };
        told.iter().map(|told| reason(&told.end)).collect()
    };
    assert_eq!(ends(world.a.told(4).await), ["client_reset", "peer_reset", "client_reset", "peer_reset"]);
    assert_eq!(ends(world.b.told(4).await), ["client_reset", "app_reset", "client_reset", "app_reset"]);
}

async fn ping_pong(client: &mut TcpStream, server: &mut TcpStream) {
    let mut byte = [0];
    client.write_all(b"1").await.unwrap();
    server.read_exact(&mut byte).await.unwrap();
    server.write_all(b"2").await.unwrap();
    client.read_exact(&mut byte).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_connections_stall_no_other() {
    for stalled in [8, 64] {
        let world = World::new();
        let app = world.app().await;
        // Every connection that says "s" is never read again; the others are echoed.
        tokio::spawn(async move {
            let mut kept = Vec::new();
            loop {
                let (mut tcp, _) = app.accept().await.unwrap();
                let mut kind = [0];
                tcp.read_exact(&mut kind).await.unwrap();
                if kind == *b"s" {
                    kept.push(tcp);
                    continue;
                }
                tokio::spawn(async move {
                    let (mut reader, mut writer) = tcp.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        let mut before = Vec::new();
        for _ in 0..8 {
            let mut tcp = world.client().await;
            tcp.write_all(b"e").await.unwrap();
            ping(&mut tcp).await.unwrap();
            before.push(tcp);
        }
        let block = vec![0; 256 << 10];
        let mut stuck = Vec::new();
        for _ in 0..stalled {
            let mut tcp = world.client().await;
            tcp.write_all(b"s").await.unwrap();
            stuck.push(tokio::spawn({
                let block = block.clone();
                async move { while tcp.write_all(&block).await.is_ok() {} }
            }));
        }
        // Until nothing moves any more.
        let mut last = 0;
        loop {
            sleep(Duration::from_millis(300)).await;
            let sent: u64 = world.a.registry.live().iter().map(|connection| connection.bytes().0).sum();
            if sent == last {
                break;
            }
            last = sent;
        }
        assert!(last >= (stalled as u64) << 20, "{last} bytes in {stalled} stalled connections: each fills its window");
        for tcp in &mut before {
            timeout(Duration::from_secs(1), ping(tcp)).await.expect("an older connection stalls").unwrap();
        }
        for _ in 0..8 {
            let mut tcp = world.client().await;
            tcp.write_all(b"e").await.unwrap();
            timeout(Duration::from_secs(1), ping(&mut tcp)).await.expect("a new connection stalls").unwrap();
        }
        for task in stuck {
            assert!(!task.is_finished());
            task.abort();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_frames_to_a_stalled_app_do_not_end_the_shared_connection() {
    const FRAMES: usize = 300_000;
    let world = World::new();
    let app = world.app().await;
    // Inherited by what it accepts: the stalled app's socket is full soon.
    socket2::SockRef::from(&app).set_recv_buffer_size(4_096).unwrap();
    let (send, connection) = by_hand(&world).await;
    let open = async || {
        let request = Request::builder().method(Method::CONNECT).uri(format!("{}:{PORT}", world.b.address));
        let mut send = send.clone().ready().await.unwrap();
        let (response, stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
        let (response, accepted) = tokio::join!(response, app.accept());
        (stream, response.unwrap().into_body(), accepted.unwrap().0)
    };
    let (mut to_slow, _from_slow, mut slow) = open().await;
    let (mut to_other, mut from_other, mut other) = open().await;
    to_slow.send_data(vec![0; 512 << 10].into(), false).unwrap();
    sleep(Duration::from_millis(300)).await;
    for frame in 0..FRAMES {
        // In bursts well below the budget, as writes that become frames one by one come; all together far above it.
        if frame % 10_000 == 0 {
            sleep(Duration::from_millis(30)).await;
        }
        to_slow.send_data(Bytes::from_static(b"x"), false).unwrap();
    }
    to_slow.send_data(Bytes::new(), true).unwrap();
    // Sent after them on the same connection, so what arrives has passed them all.
    to_other.send_data(Bytes::from_static(b"ping"), false).unwrap();
    let mut seen = [0; 4];
    timeout(Duration::from_secs(20), other.read_exact(&mut seen)).await.unwrap().unwrap();
    other.write_all(b"pong").await.unwrap();
    assert_eq!(from_other.data().await.unwrap().unwrap(), "pong");
    assert!(!connection.is_finished());
    let mut all = Vec::new();
    timeout(Duration::from_secs(20), slow.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all.len(), (512 << 10) + FRAMES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_connections_shares_few_tunnels() {
    let world = World::new();
    echo(world.app().await);
    let clients = (0..200).map(|_| async {
        let mut tcp = world.client().await;
        ping(&mut tcp).await.unwrap();
        tcp
    });
    let mut open = futures::future::join_all(clients).await;
    let tunnels = world.a.pod.pool.total();
    assert!((2..=8).contains(&tunnels), "{tunnels} tunnels for 200 connections");
    assert_eq!((world.a.registry.count(), world.b.registry.count()), (200, 200));
    for tcp in &mut open {
        ping(tcp).await.unwrap();
    }
    let handshakes = world.b.observer.handshakes.lock().unwrap().len();
    assert_eq!(handshakes, tunnels);
    drop(open);
    world.a.told(200).await;
    world.b.told(200).await;
    assert_eq!((world.a.registry.count(), world.b.registry.count()), (0, 0));
}

#[tokio::test]
async fn a_service_is_retried_on_another_endpoint_when_one_is_not_there() {
    let world = World::new();
    echo(world.app().await);
    // One of the two endpoints refuses every connection.
    for _ in 0..20 {
        let mut tcp = world.client_to(world.vip).await;
        ping(&mut tcp).await.unwrap();
    }
    for told in world.b.told(20).await {
        assert_eq!(&*told.flow.destination_service.unwrap().name, "web");
    }
    for told in world.a.told(20).await {
        assert!(matches!(told.end, End::Complete), "{told:?}");
        assert_eq!(told.flow.destination, world.vip);
    }
}

#[tokio::test]
async fn a_denied_peer_never_reaches_the_app() {
    let world = World::new();
    let app = world.app().await;
    deny(&world, DENY_A);
    let mut client = world.client().await;
    let _ = client.write_all(b"secret").await;
    let error = client.read(&mut [0]).await.expect_err("a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(world.b.pod.edge.delivered_for.lock().unwrap().is_empty());
    assert!(timeout(Duration::from_millis(100), app.accept()).await.is_err());
    assert!(matches!(&world.b.told(1).await[0].end, End::Denied(denial) if denial.reason() == "policy_denied"));
    let told = world.a.told(1).await;
    let End::Failed { reason, response_flags, .. } = &told[0].end else { panic!("{told:?}") };
    assert_eq!((*reason, *response_flags, told[0].opened), ("denied_by_peer", "DENY", false));
}

#[tokio::test]
async fn a_policy_change_closes_what_it_no_longer_allows() {
    let world = World::new();
    let app = world.app().await;
    let mut client = world.client().await;
    let (mut server, _) = app.accept().await.unwrap();
    ping_pong(&mut client, &mut server).await;
    assert_eq!(reconsider(&world.b.registry, &world.rules.load()), 0);
    deny(&world, DENY_A);
    assert_eq!(reconsider(&world.b.registry, &world.rules.load()), 1);
    assert_eq!(reconsider(&world.b.registry, &world.rules.load()), 0, "each is closed once");
    for tcp in [&mut client, &mut server] {
        let seen = timeout(Duration::from_secs(5), tcp.read(&mut [0])).await.unwrap();
        assert_eq!(seen.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    }
    assert!(matches!(world.b.told(1).await[0].end, End::Denied(_)));
    world.a.told(1).await;
    assert_eq!((world.a.registry.count(), world.b.registry.count()), (0, 0));
}

#[tokio::test]
async fn cancelling_a_connection_closes_both_sides_at_once() {
    let world = World::new();
    let app = world.app().await;
    for side in [&world.a, &world.b] {
        let mut client = world.client().await;
        let (mut server, _) = app.accept().await.unwrap();
        ping_pong(&mut client, &mut server).await;
        side.registry.live()[0].cancel.cancel();
        for tcp in [&mut client, &mut server] {
            let seen = timeout(Duration::from_secs(5), tcp.read(&mut [0])).await.unwrap();
            assert_eq!(seen.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
        }
        let told = side.told(1).await;
        assert!(matches!(told.last().unwrap().end, End::Failed { reason: "cancelled", .. }), "{told:?}");
        world.a.told(if std::ptr::eq(side, &world.a) { 1 } else { 2 }).await;
    }
}

#[tokio::test]
async fn plaintext_is_delivered_with_the_clients_address_or_refused() {
    let world = World::new();
    echo(world.app().await);
    // The same address in the world's own listener is `a`'s, so another port is `b`'s plaintext.
    let other = TcpListener::bind((world.b.address, 10_000 + PORT + 1)).await.unwrap();
    echo(other);
    let plain = (world.b.address, PORT + 1).into();
    world.b.serve(plain);
    let mut client = world.client_to(plain).await;
    ping(&mut client).await.unwrap();
    drop(client);
    let told = world.b.told(1).await;
    assert!(matches!(told[0].end, End::Complete), "{told:?}");
    assert_eq!((told[0].bytes, told[0].flow.security), ((4, 4), Security::None));
    assert_eq!(*world.b.pod.edge.delivered_for.lock().unwrap(), [(world.a.address, plain)]);
    deny(
        &world,
        "{metadata: {name: none, namespace: default}, apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, spec: {}}",
    );
    let mut client = world.client_to(plain).await;
    let seen = timeout(Duration::from_secs(5), client.read(&mut [0])).await.unwrap();
    assert_eq!(seen.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    assert!(matches!(world.b.told(2).await[1].end, End::Denied(_)));
    assert_eq!(world.b.pod.edge.delivered_for.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn an_untrusted_peer_is_refused_on_both_sides() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let world = World::trusting(&ours, &theirs);
    let app = world.app().await;
    let mut client = world.client().await;
    let seen = timeout(Duration::from_secs(5), client.read(&mut [0])).await.unwrap();
    assert_eq!(seen.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    let told = world.a.told(1).await;
    let End::Failed { response_flags, .. } = &told[0].end else { panic!("{told:?}") };
    assert_eq!(*response_flags, "TLS_FAILURE");
    let told = world.b.told(1).await;
    let End::Failed { response_flags, .. } = &told[0].end else { panic!("{told:?}") };
    assert_eq!(*response_flags, "TLS_FAILURE");
    assert!(timeout(Duration::from_millis(50), app.accept()).await.is_err());
    assert!(world.a.observer.handshakes.lock().unwrap().iter().all(|(_, result)| result.is_err()));
}

#[tokio::test]
async fn an_unknown_destination_is_held_then_fails_closed() {
    let world = World::new();
    let unknown = std::net::SocketAddr::new("127.200.0.9".parse().unwrap(), PORT);
    world.a.serve(unknown);
    let began = Instant::now();
    let mut client = world.client_to(unknown).await;
    let error = client.read(&mut [0]).await.expect_err("a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(began.elapsed() >= crate::life::limits::HOLD);
    assert!(matches!(world.a.told(1).await[0].end, End::Failed { reason: "destination_unknown", .. }));
}

/// A peer that speaks HTTP/2 by hand.
pub async fn by_hand(world: &World) -> (h2::client::SendRequest<Bytes>, tokio::task::JoinHandle<bool>) {
    let tcp = world.client_to((world.b.address, 15_008).into()).await;
    let name = ServerName::from(world.b.address);
    let tls = TlsConnector::from(world.a.pod.edge.tls()).connect(name, tcp).await.unwrap();
    let (send, connection) = h2::client::handshake(tls).await.unwrap();
    (send, tokio::spawn(async move { connection.await.is_ok() }))
}

#[tokio::test]
async fn only_connect_to_the_pods_own_app_ports_is_answered() {
    let world = World::new();
    echo(world.app().await);
    let (send, _connection) = by_hand(&world).await;
    let own = world.b.address;
    let cases = [
        (Method::CONNECT, format!("{own}:{PORT}"), StatusCode::OK),
        (Method::CONNECT, format!("{own}:9"), StatusCode::SERVICE_UNAVAILABLE),
        (Method::CONNECT, format!("{own}:15008"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("{own}:15001"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("{own}:15006"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("{own}:0"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("127.0.0.1:{PORT}"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("169.254.169.254:{PORT}"), StatusCode::BAD_REQUEST),
        (Method::CONNECT, format!("localhost:{PORT}"), StatusCode::BAD_REQUEST),
        (Method::GET, format!("{own}:{PORT}"), StatusCode::BAD_REQUEST),
    ];
    for (method, authority, expected) in cases {
        let uri = match method {
            Method::CONNECT => authority.clone(),
            _ => format!("https://{authority}/"),
        };
        let request = Request::builder().method(&method).uri(uri).body(()).unwrap();
        let (response, _stream) = send.clone().ready().await.unwrap().send_request(request, false).unwrap();
        assert_eq!(response.await.unwrap().status(), expected, "{method} {authority}");
    }
    let delivered = world.b.pod.edge.delivered_for.lock().unwrap().clone();
    assert!(delivered.iter().all(|(client, app)| *client == world.a.address && app.ip() == own), "{delivered:?}");
    assert_eq!(delivered.len(), 2);
}

#[tokio::test]
async fn stopping_asks_peers_to_go_elsewhere_and_keeps_what_is_carried() {
    let world = World::new();
    let app = world.app().await;
    let mut client = world.client().await;
    let (mut server, _) = app.accept().await.unwrap();
    ping_pong(&mut client, &mut server).await;
    let (send, connection) = by_hand(&world).await;
    world.b.stop.cancel();
    // A connection that carries nothing is over; the one that carries goes on.
    assert!(timeout(Duration::from_secs(5), connection).await.unwrap().unwrap());
    drop(send);
    ping_pong(&mut client, &mut server).await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    server.shutdown().await.unwrap();
    assert!(matches!(world.b.told(1).await[0].end, End::Complete));
}

#[tokio::test]
async fn a_probe_gets_the_token_and_nothing_else_happens() {
    let world = World::new();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let mut tcp = socket.connect((world.b.address, 15_008).into()).await.unwrap();
    let mut seen = Vec::new();
    tcp.read_to_end(&mut seen).await.unwrap();
    assert_eq!(seen, [7; 16]);
    assert!(world.b.observer.told.lock().unwrap().is_empty());
}
