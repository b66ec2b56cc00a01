//! Two pods of one agent: in one crossing where nothing asks for more, and with the same records as a tunnel between nodes.

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use heddle_common::choice;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use super::{
    budgets::neighbour,
    carry::{DENY_A, cluster, deny, echo, exchange, pattern, ping},
    world::{PORT, Told, World},
};
use crate::{
    cluster::{SameNode, Snapshot, Workload},
    life::limits,
    policy::Rulebook,
    tunnel::{Direction, End, Quiet, Security, reconsider},
};

const A: &str = "spiffe://cluster.local/ns/default/sa/a";
const B: &str = "spiffe://cluster.local/ns/default/sa/b";
const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: default}
spec: {mtls: {mode: STRICT}}
";

/// Both pods of one agent, and both served.
async fn together() -> World {
    let world = World::together();
    let served = async {
        while world.b.registry.neighbours().account(&world.b.record.uid).is_none() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), served).await.expect("b is not served");
    world
}

/// The two sides of the only connection: the client's and the server's.
async fn both(world: &World) -> [Told; 2] {
    let mut told = world.a.told(2).await;
    assert_eq!(told.len(), 2, "{told:?}");
    told.sort_by_key(|told| told.flow.direction == Direction::Inbound);
    let told: [Told; 2] = told.try_into().unwrap();
    assert_eq!([&told[0], &told[1]].map(|told| told.flow.direction), [Direction::Outbound, Direction::Inbound]);
    told
}

fn reason(told: &Told) -> &'static str {
    match &told.end {
        End::Complete => "complete",
        End::Failed { reason, .. } => reason,
        End::Denied(denial) => denial.reason(),
    }
}

async fn is_reset(tcp: &mut TcpStream) {
    let read = timeout(Duration::from_secs(10), tcp.read(&mut [0])).await.expect("nothing happens to it");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// A connection of `a`'s app to `b`'s that is refused: maybe before connecting has returned.
async fn refused(world: &World) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((world.a.address, 0).into()).unwrap();
    match socket.connect((world.b.address, PORT).into()).await {
        Ok(mut tcp) => is_reset(&mut tcp).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

fn missed(world: &World) -> Vec<(String, String, u16)> {
    let told = world.lane.0.lock().unwrap();
    told.iter().map(|(source, destination, port)| (source.to_string(), destination.to_string(), *port)).collect()
}

fn a_to_b() -> (String, String, u16) {
    ("uid-a".into(), "uid-b".into(), PORT)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_one_node_are_carried_in_one_crossing_and_told_of_by_both_sides() {
    const LENGTH: usize = 8 << 20;
    let world = together().await;
    let app = world.app().await;
    let (up, down) = (pattern(1, LENGTH), pattern(2, LENGTH / 2));
    let server = tokio::spawn({
        let down = down.clone();
        async move { exchange(app.accept().await.unwrap().0, down).await }
    });
    assert!(exchange(world.client().await, up.clone()).await == down);
    assert!(server.await.unwrap() == up);
    let [near, far] = both(&world).await;
    for told in [&near, &far] {
        assert!(told.opened && matches!(told.end, End::Complete), "{told:?}");
        assert_eq!(told.bytes, (LENGTH as u64, LENGTH as u64 / 2));
        let flow = &told.flow;
        assert_eq!((flow.security, flow.hbone_target), (Security::KernelAttested, None));
        assert_eq!(flow.source_principal.as_ref().unwrap().as_str(), A);
        assert_eq!(flow.destination_principal.as_ref().unwrap().as_str(), B);
        assert_eq!(flow.source_workload.as_ref().unwrap().uid, world.a.record.uid);
        assert_eq!(flow.destination_workload.as_ref().unwrap().uid, world.b.record.uid);
        assert_eq!((flow.source.ip(), flow.destination), (world.a.address, (world.b.address, PORT).into()));
        assert!(flow.session.is_none());
    }
    let (offered, answered) = (near.flow.trace.unwrap(), far.flow.trace.unwrap());
    assert_eq!((answered.trace_id, answered.parent), (offered.trace_id, Some(offered.span_id)));
    assert!(world.a.observer.handshakes.lock().unwrap().is_empty(), "no TLS");
    assert_eq!((world.a.registry.count(), world.a.pod.pool.total()), (0, 0));
    assert_eq!(missed(&world), [a_to_b()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn denied_in_one_crossing_never_reaches_the_app_and_both_sides_say_so() {
    let world = together().await;
    let app = world.app().await;
    deny(&world, DENY_A);
    refused(&world).await;
    let [near, far] = both(&world).await;
    assert_eq!((reason(&near), reason(&far)), ("denied_by_peer", "policy_denied"));
    assert!(matches!(near.end, End::Failed { response_flags: "DENY", .. }), "{:?}", near.end);
    assert!(!near.opened && !far.opened);
    assert_eq!([near.flow.security, far.flow.security], [Security::KernelAttested; 2]);
    assert!(timeout(Duration::from_millis(200), app.accept()).await.is_err());
    assert_eq!(missed(&world), [a_to_b()], "the kernel can deny the next one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_asks_for_mutual_tls_gets_it_whichever_side_it_is() {
    for asks in ["uid-a", "uid-b"] {
        let world = together().await;
        echo(world.app().await);
        let mut snapshot = cluster(&world);
        let changed = |workload: &Arc<Workload>| match &*workload.uid == asks {
            true => Arc::new(Workload { same_node: SameNode::Mtls, ..Workload::clone(workload) }),
            false => workload.clone(),
        };
        snapshot.workloads.values_mut().for_each(|workload| *workload = changed(workload));
        snapshot.by_address.values_mut().for_each(|workload| *workload = changed(workload));
        world.snapshots.send(Arc::new(snapshot)).unwrap();
        let mut client = world.client().await;
        ping(&mut client).await.unwrap();
        drop(client);
        for told in both(&world).await {
            assert_eq!((told.flow.security, told.flow.session.is_some()), (Security::MutualTls, true), "{asks}");
        }
        assert_eq!(world.a.observer.handshakes.lock().unwrap().len(), 2, "{asks}: both ends of one");
        assert_eq!(missed(&world), [], "{asks}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_policy_closes_what_was_carried_in_one_crossing() {
    let world = together().await;
    echo(world.app().await);
    let mut client = world.client().await;
    ping(&mut client).await.unwrap();
    assert_eq!(world.a.registry.count(), 2);
    assert_eq!(reconsider(&world.a.registry, &world.rules.load()), 0);
    ping(&mut client).await.unwrap();
    deny(&world, DENY_A);
    assert_eq!(reconsider(&world.a.registry, &world.rules.load()), 1);
    is_reset(&mut client).await;
    let [near, far] = both(&world).await;
    assert_eq!((reason(&near), reason(&far)), ("peer_reset", "policy_denied"));
    assert!(near.opened && far.opened && near.bytes == (8, 8) && far.bytes == (8, 8));
    assert_eq!(world.a.registry.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_one_side_ends_both_and_each_says_it_its_way() {
    let world = together().await;
    let app = world.app().await;
    for (client_resets, expected) in [(true, ["client_reset"; 2]), (false, ["peer_reset", "app_reset"])] {
        world.a.observer.told.lock().unwrap().clear();
        let mut client = world.client().await;
        let (mut server, _) = app.accept().await.unwrap();
        client.write_all(b"1").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        let (resets, mut other) = if client_resets { (client, server) } else { (server, client) };
        resets.set_zero_linger().unwrap();
        drop(resets);
        is_reset(&mut other).await;
        let [near, far] = both(&world).await;
        assert_eq!([reason(&near), reason(&far)], expected);
    }
    // By the agent: on one side, and for want of any byte.
    for (idle, expected) in [(false, ["peer_reset", "cancelled"]), (true, ["idle", "idle"])] {
        world.a.observer.told.lock().unwrap().clear();
        let mut client = world.client().await;
        let _server = app.accept().await.unwrap();
        while world.a.registry.count() < 2 {
            sleep(Duration::from_millis(1)).await;
        }
        if idle {
            let now = std::time::Instant::now();
            assert_eq!(Quiet::default().close(&world.a.registry, Duration::ZERO, now), 2);
        } else {
            let live = world.a.registry.live();
            live.iter().find(|one| one.flow.direction == Direction::Inbound).unwrap().cancel.cancel();
        }
        is_reset(&mut client).await;
        let [near, far] = both(&world).await;
        assert_eq!([reason(&near), reason(&far)], expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_pods_are_charged_and_a_server_at_its_cap_refuses() {
    let world = together().await;
    echo(world.app().await);
    let used = || {
        let mut pods = world.a.pod.shared.budget.pressure().pods;
        pods.sort_by(|one, other| one.uid.cmp(&other.uid));
        pods.iter().map(|pod| (pod.connections, pod.descriptors)).collect::<Vec<_>>()
    };
    assert_eq!(used(), [(0, 0), (0, 0)]);
    let mut client = world.client().await;
    ping(&mut client).await.unwrap();
    assert_eq!(used(), [(1, 1), (1, 1)], "a socket each");
    drop(client);
    both(&world).await;
    let idle = async {
        while used() != [(0, 0), (0, 0)] {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), idle).await.expect("what was taken is not given back");
    world.a.observer.told.lock().unwrap().clear();
    let full: Vec<_> = (0..limits::CONNECTIONS_PER_POD).map(|_| world.b.pod.account.admit(0).unwrap()).collect();
    refused(&world).await;
    let [near, far] = both(&world).await;
    assert_eq!((reason(&near), reason(&far)), ("app_unreachable", "pod_budget"));
    drop(full);
    ping(&mut world.client().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_chose_of_a_service_is_what_is_reached() {
    let world = together().await;
    echo(world.app().await);
    // The Service's other endpoint, which is not in the mesh, says what no echo says.
    let other = TcpListener::bind((neighbour(&world, 3), PORT)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = other.accept().await.unwrap();
            tcp.write_all(b"other").await.unwrap();
        }
    });
    let reached = async |chosen: u16| {
        world.a.pod.edge.chosen.store(chosen, std::sync::atomic::Ordering::Relaxed);
        let mut client = world.client_to(world.vip).await;
        client.write_all(b"hello").await.unwrap();
        let mut said = [0; 5];
        timeout(Duration::from_secs(10), client.read_exact(&mut said)).await.unwrap().unwrap();
        said == *b"other"
    };
    for _ in 0..20 {
        assert!(!reached(choice::FIRST_LOCAL).await, "the endpoint on the node was chosen");
        assert!(reached(choice::REST).await, "another was chosen");
    }
    let mut any = [0; 2];
    for _ in 0..60 {
        any[usize::from(reached(choice::NONE).await)] += 1;
    }
    assert!(any.iter().all(|count| *count > 5), "{any:?}");
}

/// A connection of `a`'s address to a port of `b` that is not the tunnel's. The kernel vouches for it as the connection of `of`.
async fn untunnelled(world: &World, of: Option<&str>) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((world.a.address, 0).into()).unwrap();
    if let Some(uid) = of {
        let port = socket.local_addr().unwrap().port();
        world.b.pod.edge.attested.lock().unwrap().insert(port, uid.into());
    }
    socket.connect((world.b.address, PORT + 1).into()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_vouches_for_is_authenticated_and_nothing_else_is() {
    let world = together().await;
    let at = |port: u16| SocketAddr::from((world.b.address, port));
    world.b.serve(at(PORT + 1));
    echo(TcpListener::bind(at(PORT + 1 + 10_000)).await.unwrap());
    let strict = || Snapshot {
        peer_authentications: vec![Arc::new(serde_saphyr::from_str(STRICT).unwrap())],
        ..cluster(&world)
    };
    world.rules.store(Arc::new(Rulebook::compile(&strict())));
    let last = async |of: Option<&str>| {
        world.a.observer.told.lock().unwrap().clear();
        // A refusal may come before connecting has returned.
        let answered = match untunnelled(&world, of).await {
            Ok(mut client) => ping(&mut client).await.is_ok(),
            Err(_) => false,
        };
        let told = world.b.told(1).await.remove(0);
        assert_eq!(answered, matches!(told.end, End::Complete), "{told:?}");
        told
    };
    let attested = last(Some("uid-a")).await;
    assert_eq!((reason(&attested), attested.flow.security), ("complete", Security::KernelAttested));
    assert_eq!(attested.flow.source_principal.as_ref().unwrap().as_str(), A);
    assert_eq!(attested.flow.destination_principal.as_ref().unwrap().as_str(), B);
    assert_eq!(attested.flow.source_workload.as_ref().unwrap().uid, world.a.record.uid);
    assert_eq!(missed(&world), [("uid-a".into(), "uid-b".into(), PORT + 1)]);
    // Its address alone says nothing; nor does a pod that nobody knows, or the server itself.
    for of in [None, Some("uid-gone"), Some("uid-b")] {
        let plain = last(of).await;
        assert_eq!((reason(&plain), plain.flow.security), ("mtls_required", Security::None), "{of:?}");
        assert!(plain.flow.source_principal.is_none());
    }
    // The identity is what policy is asked about.
    deny(&world, DENY_A);
    assert_eq!(reason(&last(Some("uid-a")).await), "policy_denied");
    assert_eq!(reason(&last(None).await), "complete");
    // Where a pod asks for mutual TLS, this is not it; of an address that is no enrolled pod's of this node nobody is asked.
    world.rules.store(Arc::new(Rulebook::compile(&strict())));
    let asked = || world.b.pod.edge.asked.load(std::sync::atomic::Ordering::Relaxed);
    let before = asked();
    type Change = fn(&mut Workload);
    let changes: [(&str, Change); 3] = [
        ("mtls", |pod| pod.same_node = SameNode::Mtls),
        ("elsewhere", |pod| pod.node = "node-2".into()),
        ("outside", |pod| pod.enrolled = false),
    ];
    for (what, change) in changes {
        let mut snapshot = strict();
        let mut record = Workload::clone(&world.a.record);
        change(&mut record);
        let record = Arc::new(record);
        snapshot.workloads.insert(record.uid.clone(), record.clone());
        snapshot.by_address.insert(world.a.address, record);
        world.snapshots.send(Arc::new(snapshot)).unwrap();
        assert_eq!(reason(&last(Some("uid-a")).await), "mtls_required", "{what}");
    }
    assert_eq!(asked(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proof_of_one_crossing_names_both_pods_the_decision_and_the_programs() {
    let world = together().await;
    echo(world.app().await);
    let proven = async || {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((world.a.address, 0).into()).unwrap();
        let port = socket.local_addr().unwrap().port();
        let mut expected = world.a.registry.proofs().expect(&world.a.record.uid, port);
        let _reset_or_open = socket.connect((world.b.address, PORT).into()).await;
        timeout(Duration::from_secs(10), expected.seen()).await.expect("nobody tells of it").unwrap()
    };
    let seen = proven().await;
    assert_eq!((seen.flow.security, seen.answer.status), (Security::KernelAttested, None));
    assert!(seen.failure.is_none() && seen.connection.is_some() && seen.answer.session.is_none());
    let witness = seen.answer.witness.unwrap();
    assert_eq!((&*witness.decision, witness.delivered, &*witness.pod), ("allowed", true, "default/b"));
    assert_eq!((&*witness.client_identity, &*witness.server_identity, &*witness.tls), (A, B, ""));
    assert_eq!(witness.programs[0].name, "of uid-b");
    deny(&world, DENY_A);
    let seen = proven().await;
    assert_eq!(seen.failure.unwrap().reason, "denied_by_peer");
    let witness = seen.answer.witness.unwrap();
    assert_eq!((&*witness.decision, witness.delivered, &*witness.policy), ("denied", false, "default/no-a"));
    assert!(seen.connection.is_none());
}
