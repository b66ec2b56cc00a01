//! What is not, or no more, captured: blocked until it is proven, refused with a reason, gone without a trace.

use std::{collections::HashSet, fs, io, net::SocketAddr, path::Path};

use super::world::{FROM_APP, OUT4, OUT6, POD4, POD6, World, app, can_run, connect_in, greeting, ip, serve};
use crate::{capture::*, cluster::Place};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_proven_is_blocked_and_the_next_proof_unblocks_it() {
    if !can_run("what_is_not_proven_is_blocked_and_the_next_proof_unblocks_it") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let handle = world.start().await;
    let attached = handle.attach(world.spec()).await.unwrap();
    let PodState::Uncaptured { reason, detail } = handle.prove("default/web.1").await else {
        panic!("nobody answers, and yet it is proven");
    };
    assert_eq!(reason, "inbound_probe", "{detail}");
    let refused = connect_in(&world.out(), None, SocketAddr::new(POD4, 8_080)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let (_accepted, _task) = serve(attached);
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);

    // Somebody removes a rule: no answer finds its way back, and it shows.
    ip(&format!("-n {} rule del pref {}", world.pod_ns(), heddle_common::RULE_PREFERENCE));
    let PodState::Uncaptured { reason, .. } = handle.prove("default/web.1").await else { panic!("the rule is gone") };
    assert!(reason.ends_with("probe"), "{reason}");
    drop(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);

    // Somebody removes the routes to `lo`: what is marked goes nowhere, least of all out plainly.
    let outside = app(&world.out(), SocketAddr::new(OUT4, 8_080));
    let outside6 = app(&world.out(), SocketAddr::new(OUT6, 8_080));
    handle.set_destinations(HashSet::from([OUT4, OUT6])).await.unwrap();
    for (family, to) in [("-4", OUT4), ("-6", OUT6)] {
        let table = heddle_common::ROUTE_TABLE;
        ip(&format!("{family} -n {} route del local default dev lo table {table}", world.pod_ns()));
        let said = world.pod_connects(SocketAddr::new(to, 8_080)).await.unwrap_err();
        assert!(said.contains("unreachable") || said.contains("No route"), "{said}");
    }
    assert_eq!(outside.try_iter().count() + outside6.try_iter().count(), 0);
    drop(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);

    // Somebody removes a link.
    fs::remove_file(pin::Pins::open(&world.bpffs).unwrap().pod("default/web.1").join("connect6")).unwrap();
    let PodState::Uncaptured { reason, detail } = handle.prove("default/web.1").await else { panic!("a link is gone") };
    assert_eq!(reason, "link", "{detail}");
    drop(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
}

#[tokio::test(flavor = "multi_thread")]
async fn withdrawal_leaves_nothing_and_reaping_finds_what_an_earlier_agent_left() {
    if !can_run("withdrawal_leaves_nothing_and_reaping_finds_what_an_earlier_agent_left") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let handle = world.start().await;
    let clean = |when: &str| {
        assert_eq!(world.rules_and_routes(), "", "{when}");
        assert_eq!(world.off(), 3, "{when}");
        let left = pin::Pins::open(&world.bpffs).unwrap().pods().unwrap();
        assert!(left.is_empty(), "{when}: {left:?}");
        for pod in [POD4, POD6] {
            let mut stream = connect_in(&world.out(), None, SocketAddr::new(pod, 8_080)).unwrap();
            assert_eq!(&greeting(&mut stream).unwrap(), FROM_APP, "{when}");
        }
    };
    let (_accepted, task) = serve(handle.attach(world.spec()).await.unwrap());
    assert_eq!(world.off(), 0);
    handle.withdraw("default/web.1").await.unwrap();
    clean("withdrawn");
    assert!(handle.status().is_empty());
    assert_eq!(handle.withdraw("default/web.1").await.unwrap_err().reason(), "not_attached");
    task.abort();
    let _ended = task.await;

    drop(handle.attach(world.spec()).await.unwrap());
    drop(handle);
    let next = world.start().await;
    fs::create_dir_all(world.bpffs.join("v9999/pods")).unwrap();
    let kept = next.reap(&HashSet::from(["default/web.1".into()])).await.unwrap();
    assert!(kept.is_empty() && world.ids().len() == load::PROGRAMS.len(), "{kept:?}");
    assert!(!world.bpffs.join("v9999").exists(), "another version goes");
    assert_eq!(next.reap(&HashSet::new()).await.unwrap(), ["default/web.1"]);
    clean("reaped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_can_not_be_captured_is_refused_with_a_reason() {
    if !can_run("a_pod_that_can_not_be_captured_is_refused_with_a_reason") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let place =
        |netns: &str, cgroup: &Path| Place { netns: netns.into(), cgroup: cgroup.to_owned(), ..Place::default() };
    let ns = format!("/var/run/netns/{}", world.pod_ns());
    let cases = [
        (PodSpec { addresses: vec![], ..world.spec() }, "spec"),
        (PodSpec { addresses: vec!["127.0.0.1".parse().unwrap()], ..world.spec() }, "spec"),
        (PodSpec { place: place("/proc/self/ns/net", &world.cgroup), ..world.spec() }, "netns"),
        (PodSpec { place: place("/proc/self/ns/mnt", &world.cgroup), ..world.spec() }, "netns"),
        (PodSpec { place: place("/nowhere", &world.cgroup), ..world.spec() }, "netns"),
        (PodSpec { place: place(&ns, Path::new("/tmp")), ..world.spec() }, "cgroup"),
    ];
    for (spec, reason) in cases {
        let error = handle.attach(spec).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains("default/web.1"), "{error}");
        let state = &handle.status()[0].state;
        assert!(matches!(state, PodState::Uncaptured { reason: found, .. } if *found == reason), "{state:?}");
    }
    assert_eq!(world.rules_and_routes(), "");
    drop(handle.attach(world.spec()).await.unwrap());
}
