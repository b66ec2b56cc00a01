//! What outlives an agent: programs that go on, that the next agent adopts, and that change without a gap.

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::world::{
    FROM_AGENT, FROM_APP, OUT4, OUT6, POD4, POD6, SERVICE4, SERVICE6, World, app, beside, can_run, connect_in,
    greeting, ip, next, serve,
};
use crate::{capture::*, cluster::Unattended};

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_adopts_what_runs_and_without_an_agent_connections_are_refused() {
    if !can_run("a_restarted_agent_adopts_what_runs_and_without_an_agent_connections_are_refused") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let to = SocketAddr::new(POD4, 8_080);
    let first = world.start().await;
    first.set_destinations(HashSet::from([SERVICE4])).await.unwrap();
    let (_accepted, task) = serve(first.attach(world.spec()).await.unwrap());
    assert_eq!(first.prove("default/web.1").await, PodState::Captured);
    let before = world.ids();
    first.unlisten("default/web.1").await.unwrap();
    task.abort();
    let _ended = task.await;
    drop(first);

    let refused = connect_in(&world.out(), None, to).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "fails closed");
    let said = world.pod_connects(SocketAddr::new(SERVICE4, 443)).await.unwrap_err();
    assert!(said.contains("Operation not permitted") || said.contains("refused"), "{said}");
    assert_eq!(world.ids(), before);

    let second = world.start().await;
    let (mut accepted, _task) = serve(second.attach(world.spec()).await.unwrap());
    assert_eq!(world.ids(), before, "adopted, not loaded again");
    assert_eq!(second.prove("default/web.1").await, PodState::Captured);
    assert_eq!(&world.pod_connects(SocketAddr::new(SERVICE4, 443)).await.unwrap(), FROM_AGENT);
    assert_eq!(next(&mut accepted).await.0, SocketAddr::new(SERVICE4, 443));
    let counts = second.status()[0].counts;
    assert!(counts.unattended_dropped >= 2 && counts.captured > 4, "counters go on: {counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_asks_for_it_is_left_alone_while_no_agent_is_there() {
    if !can_run("a_pod_that_asks_for_it_is_left_alone_while_no_agent_is_there") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let _outside = app(&world.out(), SocketAddr::new(OUT4, 8_080));
    let handle = world.start().await;
    handle.set_destinations(HashSet::from([OUT4])).await.unwrap();
    let open = PodSpec { when_unattended: Unattended::Open, ..world.spec() };
    drop(handle.attach(open).await.unwrap());
    handle.unlisten("default/web.1").await.unwrap();
    drop(handle);
    for pod in [POD4, POD6] {
        let mut stream = connect_in(&world.out(), None, SocketAddr::new(pod, 8_080)).unwrap();
        assert_eq!(&greeting(&mut stream).unwrap(), FROM_APP);
    }
    assert_eq!(&world.pod_connects(SocketAddr::new(OUT4, 8_080)).await.unwrap(), FROM_APP);
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_addresses_replace_the_programs_without_a_moment_in_which_the_app_is_reached() {
    if !can_run("changed_addresses_replace_the_programs_without_a_moment_in_which_the_app_is_reached") {
        return;
    }
    let world = World::new();
    let seen = app(&world.pod(), "[::]:8080".parse().unwrap());
    let handle = world.start().await;
    let only4 = PodSpec { addresses: vec![POD4], ..world.spec() };
    let (mut accepted, _task) = serve(handle.attach(only4).await.unwrap());
    let before = world.ids();
    let one_family = world.rules_and_routes();
    assert_eq!(one_family.matches("local default").count(), 1, "{one_family}");
    assert_eq!(one_family.matches("unreachable default").count(), 2, "{one_family}");

    let stop = Arc::new(AtomicBool::new(false));
    let knocking = {
        let (stop, out) = (Arc::clone(&stop), world.out());
        thread::spawn(move || {
            let mut answers = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut stream = connect_in(&out, None, SocketAddr::new(POD4, 8_080)).unwrap();
                assert_eq!(&greeting(&mut stream).unwrap(), FROM_AGENT);
                answers += 1;
            }
            answers
        })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(handle.attach(world.spec()).await.unwrap());
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.store(true, Ordering::Relaxed);
    let answers = beside(move || knocking.join().unwrap()).await;
    assert!(answers > 10, "{answers}");
    assert_eq!(seen.try_iter().count(), 0);

    assert!(world.ids().iter().zip(&before).all(|(now, then)| now != then), "made for the new addresses");
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
    let out = world.out();
    while accepted.try_recv().is_ok() {}
    let _stream = beside(move || connect_in(&out, None, SocketAddr::new(POD6, 8_080))).await.unwrap();
    assert_eq!(next(&mut accepted).await.0.ip(), POD6);
    let both = world.rules_and_routes();
    assert_eq!(both.matches("local default").count(), 2, "{both}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_sandbox_was_made_again_moves_with_its_slot() {
    if !can_run("a_pod_whose_sandbox_was_made_again_moves_with_its_slot") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (_old, task) = serve(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
    task.abort();
    let _ended = task.await;
    let ns = world.pod_ns();
    let former = world.pod().inode();
    ip(&format!("netns del {ns}"));
    ip(&format!("netns add {ns}"));
    ip(&format!("-n {ns} link set lo up"));
    ip(&format!("-n {ns} link add eth0 type veth peer name eth1"));
    ip(&format!("-n {ns} addr add {POD4}/24 dev eth0"));
    ip(&format!("-n {ns} addr add {POD6}/64 dev eth0 nodad"));
    ip(&format!("-n {ns} link set eth0 up"));
    ip(&format!("-n {ns} link set eth1 up"));
    assert_ne!(fs::metadata(format!("/var/run/netns/{ns}")).unwrap().ino(), former);
    let PodState::Uncaptured { reason, .. } = handle.prove("default/web.1").await else { panic!("it moved") };
    assert_eq!(reason, "netns");
    let (_accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernels_destinations_are_made_equal_also_after_a_restart() {
    if !can_run("the_kernels_destinations_are_made_equal_also_after_a_restart") {
        return;
    }
    let world = World::new();
    let held = |handle: &Handle| -> HashSet<heddle_common::Address> {
        handle.node().maps.destinations.lock().unwrap().keys().map(Result::unwrap).collect()
    };
    let with_probes = |addresses: &[IpAddr]| -> HashSet<heddle_common::Address> {
        addresses.iter().chain(&probe::DESTINATIONS).copied().map(maps::key).collect()
    };
    let handle = world.start().await;
    assert_eq!(held(&handle), with_probes(&[]));
    handle.set_destinations(HashSet::from([SERVICE4, OUT4])).await.unwrap();
    handle.set_destinations(HashSet::from([SERVICE4, SERVICE6])).await.unwrap();
    assert_eq!(held(&handle), with_probes(&[SERVICE4, SERVICE6]));
    drop(handle);
    let handle = world.start().await;
    assert_eq!(held(&handle), with_probes(&[SERVICE4, SERVICE6]), "kept until told otherwise");
    handle.set_destinations(HashSet::from([OUT6])).await.unwrap();
    assert_eq!(held(&handle), with_probes(&[OUT6]));

    let many: HashSet<IpAddr> = (0..100_000_u32).map(|last| IpAddr::from(Ipv4Addr::from(0x0b00_0000 + last))).collect();
    let started = Instant::now();
    handle.set_destinations(many).await.unwrap();
    println!("100,000 destinations in {:?}", started.elapsed());
    assert_eq!(held(&handle).len(), 100_002);
    handle.set_destinations(HashSet::new()).await.unwrap();
    assert_eq!(held(&handle), with_probes(&[]));
}
