use std::{
    collections::HashSet,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    identity::{
        SpiffeId,
        schedule::{Now, Outcome, Schedule},
    },
    life::limits,
};

fn ids(count: usize) -> HashSet<SpiffeId> {
    (0..count).map(|n| format!("spiffe://mesh.test/ns/a/sa/s{n}").parse().unwrap()).collect()
}

fn schedule(count: usize) -> (Schedule, Now) {
    let now = Now { monotonic: Instant::now(), wall: SystemTime::now() };
    let mut schedule = Schedule::new(fastrand::Rng::with_seed(7));
    schedule.keep(&ids(count), now);
    (schedule, now)
}

fn after(now: Now, time: Duration) -> Now {
    Now { monotonic: now.monotonic + time, wall: now.wall + time }
}

const HOUR: Duration = Duration::from_secs(3_600);

#[test]
fn no_more_than_the_limit_is_fetched_at_a_time() {
    let (mut schedule, now) = schedule(20);
    let first = schedule.start(now);
    assert_eq!(first.len(), limits::FETCHES);
    assert!(schedule.start(now).is_empty());
    assert_eq!(schedule.idle(now), None);
    schedule.finished(&first[0].0, first[0].1, Outcome::Held { until: now.wall + HOUR }, now);
    assert_eq!(schedule.start(now).len(), 1);
}

#[test]
fn a_waiting_connection_goes_before_warm_up_and_that_before_renewal() {
    let (mut schedule, now) = schedule(1);
    let (renewing, ticket) = schedule.start(now).remove(0);
    schedule.finished(&renewing, ticket, Outcome::Held { until: now.wall + HOUR }, now);
    let mut all = ids(20);
    all.insert(renewing.clone());
    let later = after(now, HOUR);
    schedule.keep(&all, later);
    let needed: SpiffeId = "spiffe://mesh.test/ns/a/sa/s19".parse().unwrap();
    schedule.need(&needed);
    let mut order = Vec::new();
    loop {
        let started = schedule.start(later);
        if started.is_empty() {
            break;
        }
        for (id, ticket) in started {
            schedule.finished(&id, ticket, Outcome::Held { until: later.wall + HOUR }, later);
            order.push(id);
        }
    }
    assert_eq!(order.len(), 20);
    assert_eq!(order.first(), Some(&needed));
    assert_eq!(order.last(), Some(&renewing));
}

#[test]
fn renewal_comes_at_half_of_what_is_left_with_jitter() {
    let (mut schedule, now) = schedule(8);
    for (id, ticket) in schedule.start(now) {
        schedule.finished(&id, ticket, Outcome::Held { until: now.wall + HOUR }, now);
    }
    assert!(schedule.start(after(now, HOUR.mul_f64(0.449))).is_empty());
    let idle = schedule.idle(now).unwrap();
    assert!(idle >= HOUR.mul_f64(0.45) && idle <= HOUR.mul_f64(0.55), "{idle:?}");
    let at_half = schedule.start(after(now, HOUR / 2)).len();
    assert!(at_half > 0 && at_half < 8, "no jitter: {at_half} of 8 are due at half life");
}

#[test]
fn a_clock_that_jumps_makes_one_request_not_a_storm() {
    let (mut schedule, now) = schedule(1);
    let (id, ticket) = schedule.start(now).remove(0);
    schedule.finished(&id, ticket, Outcome::Held { until: now.wall + HOUR }, now);
    let jumped = Now { monotonic: now.monotonic + Duration::from_millis(10), wall: now.wall + 2 * HOUR };
    assert!(schedule.start(jumped).is_empty());
    let jumped = Now { monotonic: now.monotonic + limits::RENEWAL_PAUSE, ..jumped };
    let (id, ticket) = schedule.start(jumped).remove(0);
    // The CA's clock did not jump: its certificate is over already.
    schedule.finished(&id, ticket, Outcome::Held { until: now.wall + HOUR }, jumped);
    assert!(schedule.start(jumped).is_empty());
}

#[test]
fn a_refused_identity_backs_off_and_holds_up_no_other() {
    let (mut schedule, now) = schedule(2);
    let started = schedule.start(now);
    schedule.finished(&started[1].0, started[1].1, Outcome::Held { until: now.wall + HOUR }, now);
    let (id, mut ticket) = started[0].clone();
    let mut at = now;
    let mut pauses = Vec::new();
    for _ in 0..9 {
        schedule.finished(&id, ticket, Outcome::Refused, at);
        schedule.need(&id);
        let pause = schedule.idle(at).unwrap();
        assert!(schedule.start(after(at, pause - Duration::from_millis(1))).is_empty());
        at = after(at, pause);
        ticket = schedule.start(at).remove(0).1;
        pauses.push(pause);
    }
    assert!(pauses[0] >= limits::FETCH_BACKOFF_MIN.mul_f64(0.8) && pauses[0] <= limits::FETCH_BACKOFF_MIN.mul_f64(1.2));
    assert!(pauses[8] >= limits::FETCH_BACKOFF_MAX.mul_f64(0.8) && pauses[8] <= limits::FETCH_BACKOFF_MAX.mul_f64(1.2));
}

#[test]
fn a_ca_that_is_down_is_probed_by_one_and_its_return_is_no_herd() {
    let (mut schedule, now) = schedule(500);
    for (id, ticket) in schedule.start(now) {
        schedule.finished(&id, ticket, Outcome::Unreachable, now);
    }
    let mut at = now;
    for _ in 0..10 {
        let idle = schedule.idle(at).unwrap();
        assert!(idle <= limits::CA_PROBE_MAX.mul_f64(1.2), "{idle:?}");
        at = after(at, idle);
        let probes = schedule.start(at);
        assert_eq!(probes.len(), 1);
        schedule.finished(&probes[0].0, probes[0].1, Outcome::Unreachable, at);
    }
    at = after(at, schedule.idle(at).unwrap());
    let (id, ticket) = schedule.start(at).remove(0);
    schedule.finished(&id, ticket, Outcome::Held { until: at.wall + HOUR }, at);
    let returned = at;
    let mut fetched = 1;
    while fetched < 500 {
        let started = schedule.start(at);
        if started.is_empty() {
            at = after(at, schedule.idle(at).unwrap().max(Duration::from_micros(1)));
            continue;
        }
        assert!(started.len() <= limits::FETCHES);
        for (id, ticket) in started {
            schedule.finished(&id, ticket, Outcome::Held { until: at.wall + HOUR }, at);
            fetched += 1;
        }
    }
    let spread = at.monotonic - returned.monotonic;
    assert!(spread >= Duration::from_secs(9) && spread <= limits::RECOVERY_SPREAD_MAX, "{spread:?}");
}

#[test]
fn a_forgotten_identity_is_not_fetched_again() {
    let (mut schedule, now) = schedule(1);
    let (id, ticket) = schedule.start(now).remove(0);
    schedule.keep(&HashSet::new(), now);
    schedule.finished(&id, ticket, Outcome::Held { until: now.wall + HOUR }, now);
    assert!(schedule.start(after(now, 10 * HOUR)).is_empty());
    assert_eq!(schedule.idle(now), None);
}
