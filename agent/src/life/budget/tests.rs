use std::net::Ipv4Addr;

use super::*;

fn at(host: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, host).into()
}

fn budget(descriptors: u64, memory: u64) -> Budget {
    Budget::new(Machine { descriptors, memory })
}

fn refused(budget: &Budget, reason: &str) -> u64 {
    budget.pressure().refused.iter().find(|(name, _)| *name == reason).unwrap().1
}

#[test]
fn reasons_are_counted_under_their_own_names() {
    let budget = budget(1_024, 1 << 30);
    let account = budget.enrol("a".into());
    for (times, refusal) in Refusal::ALL.into_iter().enumerate() {
        for _ in 0..=times {
            account.refused(refusal);
        }
    }
    for (times, refusal) in Refusal::ALL.into_iter().enumerate() {
        assert_eq!(refused(&budget, refusal.reason()), times as u64 + 1);
    }
}

#[test]
fn a_pod_that_takes_all_leaves_every_other_its_64_connections() {
    let budget = budget(1_024, 1 << 30);
    let accounts: Vec<Account> = ["a", "b", "c"].map(|uid| budget.enrol(uid.into())).into();
    let mut held = Vec::new();
    let refusal = loop {
        match accounts[0].admit(2) {
            Ok(one) => held.push(one),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!(refusal, Refusal::Node);
    assert!(held.len() > 200, "{} connections of a pod alone", held.len());
    let mut others = Vec::new();
    for account in &accounts[1..] {
        for _ in 0..limits::CONNECTIONS_RESERVED {
            others.push(account.admit(limits::DESCRIPTORS_PER_CONNECTION).unwrap());
        }
    }
    let pressure = budget.pressure();
    assert!(pressure.descriptors.used <= 1_024 * 9 / 10, "{pressure:?}");
    assert_eq!(pressure.descriptors.used, 2 * (held.len() + others.len()) as u64);
    drop(held);
    assert!(accounts[1].admit(2).is_ok(), "free at once");
    drop((others, accounts));
    assert_eq!((budget.pressure().descriptors.used, budget.pressure().pods.len()), (0, 0));
}

#[test]
fn a_pod_holds_its_cap_of_connections_and_no_more() {
    let budget = budget(1 << 20, 1 << 30);
    let account = budget.enrol("a".into());
    let held: Vec<Held> = (0..limits::CONNECTIONS_PER_POD).map(|_| account.admit(2).unwrap()).collect();
    assert_eq!(account.admit(1).unwrap_err(), Refusal::Pod);
    assert_eq!(refused(&budget, "pod_budget"), 1);
    drop(held);
    assert!(account.admit(1).is_ok());
}

#[test]
fn silent_connections_go_for_new_ones_and_never_use_up_the_pod() {
    let budget = budget(1_024, 1 << 30);
    let (victim, other) = (budget.enrol("victim".into()), budget.enrol("other".into()));
    let mut silent: Vec<Arriving> = (0..5_000).map(|_| victim.arrive(at(9)).unwrap()).collect();
    let pressure = budget.pressure();
    assert!(pressure.pods[0].half_open < 500, "{pressure:?}");
    assert!(pressure.descriptors.used < 500);
    let evicted = silent.iter().filter(|one| one.slot.evicted.load(Ordering::Relaxed)).count();
    assert_eq!(evicted, 5_000 - pressure.pods[0].half_open);
    // An honest one comes in, and stays while the hog goes on.
    let honest = victim.arrive(at(1)).unwrap();
    silent.extend((0..5_000).map(|_| victim.arrive(at(9)).unwrap()));
    let established = honest.establish().unwrap();
    // The pod's connections, and other pods', are not touched by those that are half open.
    assert!(victim.admit(2).is_ok());
    let reserved: Vec<Held> = (0..limits::CONNECTIONS_RESERVED).map(|_| other.admit(2).unwrap()).collect();
    drop((silent, established, reserved));
    let pressure = budget.pressure();
    assert_eq!((pressure.descriptors.used, pressure.pods[0].half_open, pressure.pods[0].connections), (0, 0, 0));
}

#[tokio::test]
async fn one_that_has_to_go_is_woken_and_can_not_establish() {
    let budget = budget(1_024, 1 << 30);
    let account = budget.enrol("a".into());
    let first = account.arrive(at(1)).unwrap();
    let rest: Vec<Arriving> = (0..1_000).map(|_| account.arrive(at(1)).unwrap()).collect();
    tokio::time::timeout(Duration::from_secs(1), first.evicted()).await.unwrap();
    assert_eq!(first.establish().unwrap_err(), Refusal::HalfOpen);
    drop(rest);
    assert_eq!(budget.pressure().descriptors.used, 0);
}

#[test]
fn a_real_limit_holds_five_thousand_silent_sockets() {
    let budget = budget(20_000, 1 << 34);
    let pods: Vec<Account> = (0..8).map(|pod| budget.enrol(pod.to_string().into())).collect();
    let silent: Vec<Arriving> = (0..5_000).map(|_| pods[0].arrive(at(9)).unwrap()).collect();
    assert_eq!(budget.pressure().pods[0].half_open, silent.len());
}

#[test]
fn buffers_are_shared_fairly_when_they_are_used_up() {
    const MIB: usize = 1 << 20;
    let budget = budget(1_024, 1 << 34);
    let account = budget.enrol("a".into());
    // The pod's own cap, in connections that hold all they may.
    let mut full: Vec<Buffers> = (0..64).map(|_| account.buffers()).collect();
    for buffers in &mut full {
        for bytes in (0..=MIB).step_by(100_000) {
            buffers.hold(bytes).unwrap();
        }
        buffers.hold(MIB).unwrap();
    }
    assert_eq!(budget.pressure().bytes.used, limits::BUFFERS_PER_POD);
    // One more gets an equal part of it, and no more than that.
    let mut late = account.buffers();
    late.hold(MIB / 2).unwrap();
    assert_eq!(late.hold(2 * MIB).unwrap_err(), Refusal::Buffer);
    assert_eq!(full[0].hold(2 * MIB).unwrap_err(), Refusal::Buffer);
    assert_eq!(refused(&budget, "buffer_budget"), 2);
    // Another pod has its own.
    let other = budget.enrol("b".into());
    let mut buffers = other.buffers();
    buffers.hold(MIB).unwrap();
    drop((full, late, buffers));
    assert_eq!(budget.pressure().bytes.used, 0);
}

#[test]
fn a_small_memory_keeps_every_pods_reserved_part() {
    // 128 MiB of memory: 32 MiB for buffers.
    let budget = budget(20_000, 128 << 20);
    let (hog, other) = (budget.enrol("hog".into()), budget.enrol("other".into()));
    let mut all: Vec<Buffers> = (0..9_000).map(|_| hog.buffers()).collect();
    for bytes in [100_000, 300_000, 1 << 20] {
        for buffers in &mut all {
            let _refused = buffers.hold(bytes);
        }
    }
    let used = budget.pressure().bytes.used;
    // What is there is never more than counted twice: an equal part of nothing is one step.
    assert!(used < 2 * (9_000 * limits::BUFFER_STEP), "{used}");
    let mut buffers = other.buffers();
    buffers.hold(usize::try_from(limits::BUFFERS_RESERVED).unwrap()).unwrap();
}

#[test]
fn dials_wait_their_turn() {
    let budget = budget(1_024, 1 << 30);
    let account = budget.enrol("a".into());
    let at_once = (0..10_000).take_while(|_| account.dial().is_zero()).count();
    assert!((400..500).contains(&at_once), "{at_once}");
    let wait = account.dial();
    assert!(wait <= Duration::from_millis(5), "{wait:?}");
}
