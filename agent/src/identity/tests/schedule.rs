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

fn held(now: Now) -> Outcome {
    Outcome::Held { until: now.wall + HOUR, lifetime: HOUR }
}

#[test]
fn no_more_than_the_limit_is_fetched_at_a_time() {
    let (mut schedule, now) = schedule(20);
    let first = schedule.start(now);
    assert_eq!(first.len(), limits::FETCHES);
    assert!(schedule.start(now).is_empty());
    assert_eq!(schedule.idle(now), None);
    schedule.finished(&first[0].0, first[0].1, held(now), now);
    assert_eq!(schedule.start(now).len(), 1);
}

#[test]
fn a_waiting_connection_goes_before_warm_up_and_that_before_renewal() {
    let (mut schedule, now) = schedule(1);
    let (renewing, ticket) = schedule.start(now).remove(0);
    schedule.finished(&renewing, ticket, held(now), now);
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
            schedule.finished(&id, ticket, held(later), later);
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
        schedule.finished(&id, ticket, held(now), now);
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
    schedule.finished(&id, ticket, held(now), now);
    let jumped = Now { monotonic: now.monotonic + Duration::from_millis(10), wall: now.wall + 2 * HOUR };
    assert!(schedule.start(jumped).is_empty());
    let jumped = Now { monotonic: now.monotonic + limits::RENEWAL_PAUSE, ..jumped };
    let (id, ticket) = schedule.start(jumped).remove(0);
    // The CA's clock did not jump: its certificate is over already.
    schedule.finished(&id, ticket, held(now), jumped);
    assert!(schedule.start(jumped).is_empty());
    assert!(schedule.start(Now { monotonic: jumped.monotonic + limits::RENEWAL_PAUSE / 2, ..jumped }).is_empty());
}

#[test]
fn a_refused_identity_backs_off_and_holds_up_no_other() {
    let (mut schedule, now) = schedule(2);
    let started = schedule.start(now);
    schedule.finished(&started[1].0, started[1].1, held(now), now);
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
    schedule.finished(&id, ticket, held(at), at);
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
            schedule.finished(&id, ticket, held(at), at);
            fetched += 1;
        }
    }
    let spread = at.monotonic - returned.monotonic;
    assert!(spread >= Duration::from_secs(10) && spread <= limits::RECOVERY_SPREAD_MAX, "{spread:?}");
}

#[test]
fn a_forgotten_identity_is_not_fetched_again() {
    let (mut schedule, now) = schedule(1);
    let (id, ticket) = schedule.start(now).remove(0);
    schedule.keep(&HashSet::new(), now);
    schedule.finished(&id, ticket, held(now), now);
    assert!(schedule.start(after(now, 10 * HOUR)).is_empty());
    assert_eq!(schedule.idle(now), None);
}

#[test]
fn an_answer_of_no_use_is_asked_for_again_late_or_when_trust_changes() {
    let (mut schedule, now) = schedule(1);
    let (id, ticket) = schedule.start(now).remove(0);
    schedule.finished(&id, ticket, Outcome::Unusable, now);
    assert!(schedule.idle(now).unwrap() >= Duration::from_secs(10));
    assert!(schedule.start(after(now, Duration::from_secs(10))).is_empty());
    schedule.trust_changed(now);
    let (id, ticket) = schedule.start(now).remove(0);
    // A refusal is another matter: what the CA knows of pods changes by the second.
    schedule.finished(&id, ticket, Outcome::Refused, now);
    schedule.trust_changed(now);
    assert!(schedule.start(now).is_empty());
    assert_eq!(schedule.start(after(now, limits::FETCH_BACKOFF_MIN.mul_f64(1.2))).len(), 1);
}

#[test]
fn a_certificate_that_ended_is_as_urgent_as_a_first_one_and_renewals_go_by_their_end() {
    let (mut schedule, now) = schedule(3);
    let started = schedule.start(now);
    let mut names = Vec::new();
    for (minutes, (id, ticket)) in [30, 10, 20].into_iter().zip(started) {
        let until = now.wall + Duration::from_secs(60 * minutes);
        schedule.finished(&id, ticket, Outcome::Held { until, lifetime: HOUR }, now);
        names.push(id);
    }
    // All three are due; of one the certificate has ended, and there is a newcomer.
    let later = after(now, Duration::from_secs(60 * 17));
    let fresh: SpiffeId = "spiffe://mesh.test/ns/a/sa/fresh".parse().unwrap();
    schedule.keep(&names.iter().cloned().chain([fresh.clone()]).collect(), later);
    let order: Vec<_> = schedule.start(later).into_iter().map(|(id, _)| id).collect();
    assert_eq!(order, [fresh, names[1].clone(), names[2].clone(), names[0].clone()]);
}

#[test]
fn a_probe_that_was_given_up_holds_up_nobody() {
    let (mut schedule, now) = schedule(2);
    for (id, ticket) in schedule.start(now) {
        schedule.finished(&id, ticket, Outcome::Unreachable, now);
    }
    let at = after(now, schedule.idle(now).unwrap());
    let (gone, ticket) = schedule.start(at).remove(0);
    let left: HashSet<_> = ids(2).into_iter().filter(|id| *id != gone).collect();
    schedule.keep(&left, at);
    assert!(!schedule.wants(&gone, ticket));
    assert!(schedule.start(at).is_empty(), "one probe after the other");
    schedule.finished(&gone, ticket, Outcome::Abandoned, at);
    assert_eq!(schedule.start(at).len(), 1);
    assert_eq!(schedule.under_way(), 1);
}

#[test]
fn the_next_try_is_what_the_schedule_will_do() {
    let (mut schedule, now) = schedule(1);
    let id = ids(1).into_iter().next().unwrap();
    assert_eq!(schedule.next_try(&id, now), Some(now.wall));
    let ticket = schedule.start(now).remove(0).1;
    assert_eq!(schedule.next_try(&id, now), Some(now.wall), "it is under way");
    schedule.finished(&id, ticket, Outcome::Unreachable, now);
    let probe = schedule.next_try(&id, now).unwrap().duration_since(now.wall).unwrap();
    assert_eq!(Some(probe), schedule.idle(now));
    let ticket = schedule.start(after(now, probe)).remove(0).1;
    schedule.finished(&id, ticket, held(now), now);
    let renewal = schedule.next_try(&id, now).unwrap().duration_since(now.wall).unwrap();
    assert!(renewal >= HOUR.mul_f64(0.45) && renewal <= HOUR.mul_f64(0.55), "{renewal:?}");
    assert_eq!(schedule.next_try(&"spiffe://mesh.test/ns/a/sa/none".parse().unwrap(), now), None);
}

#[test]
fn a_call_that_began_before_the_ca_was_back_says_nothing_when_it_fails_late() {
    let (mut schedule, now) = schedule(20);
    let mut started = schedule.start(now);
    let (id, ticket) = started.remove(0);
    schedule.finished(&id, ticket, held(now), now);
    for (id, ticket) in started {
        schedule.finished(&id, ticket, Outcome::Unreachable, now);
    }
    let again = schedule.start(now);
    assert_eq!(again.len(), limits::FETCHES, "no outage, as it answered since");
    for (id, ticket) in again {
        schedule.finished(&id, ticket, Outcome::Unreachable, now);
    }
    assert!(schedule.start(now).is_empty(), "an outage");
}
