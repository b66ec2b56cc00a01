//! Sessions of peers whose certificate counts no more.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{io::AsyncReadExt, time::timeout};

use super::{
    abuse::{raw, reasons},
    carry::{echo, ping},
    world::{Served, World},
};
use crate::tunnel::{Direction, End, PoolEnd, disown};

/// Asks whether peers of this side are revoked, and says so from when the switch is on.
fn watched(side: &Served) -> Arc<AtomicBool> {
    let switch = Arc::new(AtomicBool::new(false));
    let revoked = Arc::clone(&switch);
    side.registry.sessions().watch(Box::new(move |chain, _| {
        assert!(!chain.is_empty());
        revoked.load(Ordering::SeqCst)
    }));
    switch
}

/// Waits until no session is listed.
async fn all_gone(side: &Served) {
    for _ in 0..500 {
        if side.registry.sessions().count() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} sessions are still listed", side.registry.sessions().count());
}

const SOON: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_a_revoked_peer_end_with_or_without_connections() {
    let world = World::new();
    echo(world.app().await);
    let revoked = watched(&world.b);
    let (mut client, mut idle) = (world.client().await, raw(&world).await);
    ping(&mut client).await.unwrap();
    assert_eq!(disown(&world.b.registry), (0, 0), "nobody is revoked yet");
    ping(&mut client).await.unwrap();

    revoked.store(true, Ordering::SeqCst);
    assert_eq!(disown(&world.b.registry), (2, 1));
    assert_eq!(disown(&world.b.registry), (0, 0), "once");
    let ended = timeout(SOON, async { (ping(&mut client).await.is_err(), idle.read_to_end(&mut Vec::new()).await) });
    let (closed, _how) = ended.await.expect("what the peer has open goes on");
    assert!(closed);
    let told = world.b.told(1).await;
    assert!(told[0].opened && reasons(&told) == ["peer_revoked"], "{told:?}");
    all_gone(&world.b).await;
    assert_eq!(world.b.registry.sessions().ended(), (2, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooled_tunnel_to_a_revoked_peer_ends_and_new_ones_are_made_when_it_is_good_again() {
    let world = World::new();
    echo(world.app().await);
    let revoked = watched(&world.a);
    let mut client = world.client().await;
    ping(&mut client).await.unwrap();
    revoked.store(true, Ordering::SeqCst);
    assert_eq!(disown(&world.a.registry), (1, 1));
    assert!(timeout(SOON, ping(&mut client)).await.expect("it goes on").is_err());
    assert_eq!(reasons(&world.a.told(1).await), ["peer_revoked"]);
    all_gone(&world.a).await;
    assert_eq!(world.a.registry.pool().ended(PoolEnd::Revoked), 1);
    revoked.store(false, Ordering::SeqCst);
    ping(&mut world.client().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_revoked_when_it_begins_carries_nothing() {
    // As when lists change between a handshake's end and the session's being known.
    let world = World::new();
    echo(world.app().await);
    watched(&world.b).store(true, Ordering::SeqCst);
    let mut idle = raw(&world).await;
    let _how = timeout(SOON, idle.read_to_end(&mut Vec::new())).await.expect("the session goes on");
    let mut client = world.client().await;
    assert!(timeout(SOON, ping(&mut client)).await.expect("it waits").is_err());
    assert_eq!(*world.b.observer.opened.lock().unwrap(), 0, "nothing reached the app");
    let told = world.a.told(1).await;
    assert!(told.iter().all(|told| told.flow.direction == Direction::Outbound), "{told:?}");
    assert!(told.iter().all(|told| matches!(told.end, End::Failed { .. })), "{told:?}");
    all_gone(&world.b).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_asks_nothing_is_kept() {
    let world = World::new();
    echo(world.app().await);
    ping(&mut world.client().await).await.unwrap();
    assert_eq!((world.a.registry.sessions().count(), world.b.registry.sessions().count()), (0, 0));
    assert_eq!(disown(&world.b.registry), (0, 0));
}
