//! Connections of the pod's own: captured where they mean the mesh, with their original destination, and nothing else.

use std::{collections::HashSet, io, net::SocketAddr};

use tokio::io::AsyncReadExt;

use super::world::{
    FROM_AGENT, FROM_APP, OUT4, OUT6, POD4, POD6, SERVICE4, SERVICE6, World, app, can_run, next, serve,
};
use crate::capture::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_pod_is_proven_captured_on_both_families() {
    if !can_run("an_attached_pod_is_proven_captured_on_both_families") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let attached = handle.attach(world.spec()).await.unwrap();
    let again = handle.attach(world.spec()).await.unwrap();
    assert_eq!(again.token, attached.token, "idempotent");
    drop(again);
    assert_eq!(handle.status()[0].state, PodState::Attached);
    let (_accepted, _task) = serve(attached);
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
    let status = handle.status();
    assert_eq!(status[0].state, PodState::Captured);
    assert_eq!((status[0].counts.marked, status[0].counts.captured), (2, 4), "{:?}", status[0].counts);
    assert!(!world.cgroup.join("heddle-probe").exists(), "the probe's cgroup goes");
    assert!(matches!(handle.prove("nobody").await, PodState::Uncaptured { reason: "not_attached", .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn outbound_to_mesh_destinations_is_captured_with_its_original_destination_and_nothing_else_is() {
    if !can_run("outbound_to_mesh_destinations_is_captured_with_its_original_destination_and_nothing_else_is") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (mut accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    handle.set_destinations(HashSet::from([SERVICE4, SERVICE6])).await.unwrap();
    for (service, own) in [(SERVICE4, POD4), (SERVICE6, POD6)] {
        let to = SocketAddr::new(service, 443);
        assert_eq!(&world.pod_connects(to).await.unwrap(), FROM_AGENT);
        let (original, client) = next(&mut accepted).await;
        assert_eq!((original, client.ip()), (to, own));
    }
    // v4-mapped: an IPv6 socket that speaks to an IPv4 service.
    let mapped: SocketAddr = "[::ffff:10.96.0.10]:443".parse().unwrap();
    assert_eq!(&world.pod_connects(mapped).await.unwrap(), FROM_AGENT);
    assert_eq!(next(&mut accepted).await.0, SocketAddr::new(SERVICE4, 443));

    let outside = app(&world.out(), SocketAddr::new(OUT4, 8_080));
    assert_eq!(&world.pod_connects(SocketAddr::new(OUT4, 8_080)).await.unwrap(), FROM_APP);
    assert_eq!(outside.recv().unwrap().ip(), POD4);
    // The agent's own connections from the pod are never captured, also to a mesh destination.
    handle.set_destinations(HashSet::from([OUT4, OUT6])).await.unwrap();
    let outside6 = app(&world.out(), SocketAddr::new(OUT6, 8_080));
    for (own, to, seen) in [(POD4, OUT4, &outside), (POD6, OUT6, &outside6)] {
        let mut stream = handle.dial("default/web.1", own, SocketAddr::new(to, 8_080)).await.unwrap();
        let mut greeting = [0; 16];
        stream.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, FROM_APP);
        assert!(stream.nodelay().unwrap());
        assert_eq!(seen.recv().unwrap().ip(), own);
    }
    let refused = handle.dial("default/web.1", POD4, SocketAddr::new(OUT4, 9)).await.unwrap_err();
    assert_eq!(refused.io().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(
        handle.dial("default/web.1", OUT4, SocketAddr::new(OUT4, 9)).await.unwrap_err().reason(),
        "not_own_address"
    );
}
