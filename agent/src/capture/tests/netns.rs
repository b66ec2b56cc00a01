//! The netns of a pod, as the kernel names it.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::time::sleep;

use super::world::*;
use crate::capture::{netns::Netns, own_routes, route};

#[test]
fn a_netns_has_one_cookie_and_no_other_has_it() {
    if !can_run("a_netns_has_one_cookie_and_no_other_has_it") {
        return;
    }
    let world = World::new();
    let cookie = world.pod().cookie().unwrap();
    assert_eq!(world.pod().cookie().unwrap(), cookie);
    assert_ne!(world.out().cookie().unwrap(), cookie);
    assert_ne!(cookie, 0);
}

/// A netns with one address, on its `lo`; gone with this value.
struct Bare(String);

impl Bare {
    fn new(number: usize) -> Self {
        let bare = Self(format!("hc-{}-bare-{number}", std::process::id()));
        ip(&format!("netns add {}", bare.0));
        ip(&format!("-n {} addr add {POD4}/32 dev lo", bare.0));
        ip(&format!("-n {} link set lo up", bare.0));
        bare
    }

    fn routes(&self) -> String {
        ip(&format!("-n {} route show table all", self.0))
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.0));
    }
}

/// Sends to the netns' own address as fast as it can while `work` runs. Gives how often there was no way, of how many times.
async fn while_sending(netns: &Netns, work: impl Future<Output = io::Result<()>>) -> (u64, u64) {
    let socket = netns.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
    let seen = Arc::new((AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0)));
    let sender = thread::spawn({
        let seen = Arc::clone(&seen);
        move || {
            let (stop, failed, sent) = &*seen;
            while !stop.load(Ordering::Relaxed) {
                // Each asks for its route anew, as the socket is not connected.
                failed.fetch_add(u64::from(socket.send_to(b"x", (POD4, 9)).is_err()), Ordering::Relaxed);
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let (stop, failed, sent) = &*seen;
    while sent.load(Ordering::Relaxed) < 1_000 {
        sleep(Duration::from_millis(1)).await;
    }
    work.await.unwrap();
    stop.store(true, Ordering::Relaxed);
    sender.join().unwrap();
    (failed.load(Ordering::Relaxed), sent.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rule_of_a_pod_that_runs_leaves_no_moment_without_its_own_addresses() {
    if !can_run("the_rule_of_a_pod_that_runs_leaves_no_moment_without_its_own_addresses") {
        return;
    }
    for number in 0..120 {
        let bare = Bare::new(number);
        let netns = World::netns(&bare.0);
        let before = bare.routes();
        let (failed, sent) = while_sending(&netns, route::put(&netns, &[POD4])).await;
        assert_eq!(failed, 0, "netns {number}: {sent} sent");
        let own = |text: &str| text.lines().filter(|line| !line.contains("0x6865") && !line.contains("26725")).count();
        let after = bare.routes();
        assert_eq!(own(&after), own(&before), "{before}became\n{after}");
    }
}

#[tokio::test]
async fn what_an_agent_left_that_died_between_the_routes_and_the_rule_goes_with_the_next() {
    if !can_run("what_an_agent_left_that_died_between_the_routes_and_the_rule_goes_with_the_next") {
        return;
    }
    let bare = Bare::new(1_000);
    let netns = World::netns(&bare.0);
    let copies =
        || bare.routes().lines().filter(|line| line.contains("proto 104") || line.contains("proto 0x68")).count();
    for finish in [true, false] {
        own_routes::lend(&route::Link::open(&netns).unwrap(), 1).await.unwrap();
        assert!(copies() > 0, "{}", bare.routes());
        if finish {
            route::put(&netns, &[POD4]).await.unwrap();
        } else {
            route::clear(&netns).await.unwrap();
        }
        assert_eq!(copies(), 0, "{}", bare.routes());
    }
}
