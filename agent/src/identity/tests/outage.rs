//! O1 and I4 with simulated time: a node's schedule against a CA that answers, is gone, or has another clock.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant, SystemTime},
};

use crate::{
    identity::{
        SpiffeId,
        schedule::{Now, Outcome, Schedule, Ticket},
    },
    life::limits,
};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

/// What the CA is at a moment.
#[derive(Clone, Copy)]
enum Ca {
    Answers,
    /// Connections are refused at once.
    Refuses,
    /// Nothing comes back: a call ends at its deadline.
    Silent,
}

/// One call, as it was seen from outside (time since the start).
struct Call {
    identity: SpiffeId,
    began: Duration,
    worked: bool,
}

/// A node and its CA. The CA's clock is the time since the start; the node's wall clock may differ by a step.
struct World {
    schedule: Schedule,
    origin: Instant,
    epoch: SystemTime,
    at: Duration,
    /// How far the node's wall clock is ahead (seconds, may be negative).
    ahead: i64,
    lifetime: Duration,
    ca: Box<dyn Fn(Duration) -> Ca>,
    under_way: BTreeMap<(Duration, u64), (SpiffeId, Ticket, Duration)>,
    calls: Vec<Call>,
    most_under_way: usize,
    /// When each identity's certificate ends, by the CA's clock, and the shortest rest of life that any had when it was replaced.
    held: HashMap<SpiffeId, Duration>,
    ran_out: usize,
}

impl World {
    const LATENCY: Duration = Duration::from_millis(40);

    fn new(identities: usize, lifetime: Duration, seed: u64, ca: impl Fn(Duration) -> Ca + 'static) -> Self {
        let mut world = Self {
            schedule: Schedule::new(fastrand::Rng::with_seed(seed)),
            origin: Instant::now(),
            epoch: SystemTime::UNIX_EPOCH + 400_000 * HOUR,
            at: Duration::ZERO,
            ahead: 0,
            lifetime,
            ca: Box::new(ca),
            under_way: BTreeMap::new(),
            calls: Vec::new(),
            most_under_way: 0,
            held: HashMap::new(),
            ran_out: 0,
        };
        let ids: HashSet<SpiffeId> =
            (0..identities).map(|n| format!("spiffe://mesh.test/ns/a/sa/s{n}").parse().unwrap()).collect();
        world.schedule.keep(&ids, world.now());
        world
    }

    fn wall(&self, at: Duration) -> SystemTime {
        let step = Duration::from_secs(self.ahead.unsigned_abs());
        if self.ahead < 0 { self.epoch + at - step } else { self.epoch + at + step }
    }

    fn now(&self) -> Now {
        Now { monotonic: self.origin + self.at, wall: self.wall(self.at) }
    }

    /// Lets time pass until `end`.
    fn run(&mut self, end: Duration) {
        while self.at < end {
            for (identity, ticket) in self.schedule.start(self.now()) {
                let takes = match (self.ca)(self.at) {
                    Ca::Answers => Self::LATENCY,
                    Ca::Refuses => Duration::from_millis(1),
                    Ca::Silent => limits::FETCH,
                };
                let number = self.calls.len() as u64;
                self.under_way.insert((self.at + takes, number), (identity.clone(), ticket, self.at));
                self.calls.push(Call { identity, began: self.at, worked: false });
            }
            self.most_under_way = self.most_under_way.max(self.under_way.len());
            let next = self.under_way.keys().next().map(|(when, _)| *when);
            // As the loop round the schedule: what is idle is looked at again at least this often.
            let idle = self.schedule.idle(self.now()).unwrap_or(limits::BUNDLE_POLL).min(limits::BUNDLE_POLL);
            let wake = self.at + idle.max(Duration::from_micros(1));
            self.at = next.map_or(wake, |next| next.min(wake)).min(end);
            while let Some(((when, number), (identity, ticket, began))) =
                self.under_way.first_key_value().filter(|((when, _), _)| *when <= self.at).map(|(k, v)| (*k, v.clone()))
            {
                self.under_way.remove(&(when, number));
                let outcome = self.answer(&identity, began, usize::try_from(number).unwrap());
                self.schedule.finished(&identity, ticket, outcome, self.now());
            }
            // As the loop round the schedule: calls that nobody waits for any more are given up.
            let given_up = |_: &(Duration, u64), (identity, ticket, _): &mut (SpiffeId, Ticket, Duration)| {
                !self.schedule.wants(identity, *ticket)
            };
            let given_up: Vec<_> = self.under_way.extract_if(.., given_up).collect();
            for (_, (identity, ticket, _)) in given_up {
                self.schedule.finished(&identity, ticket, Outcome::Abandoned, self.now());
            }
        }
    }

    fn answer(&mut self, identity: &SpiffeId, began: Duration, number: usize) -> Outcome {
        if !matches!((self.ca)(began), Ca::Answers) {
            return Outcome::Unreachable;
        }
        let end = self.at + self.lifetime;
        let (until, backdated) = (self.epoch + end, limits::CLOCK_SKEW.min(self.lifetime / 10));
        let now = self.now().wall;
        // As `answer::check` has it.
        if until <= now || self.epoch + self.at - backdated > now {
            return Outcome::Unusable;
        }
        if self.held.insert(identity.clone(), end).is_some_and(|before| before < self.at) {
            self.ran_out += 1;
        }
        self.calls[number].worked = true;
        Outcome::Held { until, lifetime: self.lifetime + backdated }
    }

    /// Calls that began in a time.
    fn between(&self, from: Duration, to: Duration) -> impl Iterator<Item = &Call> {
        self.calls.iter().filter(move |call| from <= call.began && call.began < to)
    }

    /// The most calls that one identity made within any `window`.
    fn most_within(&self, window: Duration) -> usize {
        let mut by: HashMap<&SpiffeId, Vec<Duration>> = HashMap::new();
        for call in &self.calls {
            by.entry(&call.identity).or_default().push(call.began);
        }
        let most = |times: &Vec<Duration>| {
            (0..times.len()).map(|from| times[from..].iter().filter(|time| **time < times[from] + window).count()).max()
        };
        by.values().filter_map(most).max().unwrap_or(0)
    }
}

/// A CA that is gone from `from` to `to`.
fn outage(from: Duration, to: Duration, how: Ca) -> impl Fn(Duration) -> Ca {
    move |at| if (from..to).contains(&at) { how } else { Ca::Answers }
}

#[test]
fn o1_an_outage_across_the_renewal_point_costs_no_certificate_and_ends_in_no_herd() {
    let (down, up) = (3 * MINUTE, 7 * MINUTE);
    for (seed, how) in [(1, Ca::Refuses), (2, Ca::Silent), (3, Ca::Refuses), (4, Ca::Silent)] {
        let mut world = World::new(500, 10 * MINUTE, seed, outage(down, up, how));
        world.run(30 * MINUTE);
        assert_eq!(world.ran_out, 0, "no certificate ended before its successor came");
        assert!(world.held.values().all(|end| *end > 30 * MINUTE), "every identity has a valid one");
        assert_eq!(world.most_under_way, limits::FETCHES);
        let first = world.between(up - limits::FETCH, 9 * MINUTE).find(|call| call.worked).unwrap().began;
        assert!(first - up <= 4 * SECOND, "the first renewal began {:?} after the return", first - up);
        let renewed: Vec<_> = world.between(up, up + 30 * SECOND).filter(|call| call.worked).collect();
        let (names, last) = (
            renewed.iter().map(|call| &call.identity).collect::<HashSet<_>>(),
            renewed.iter().map(|call| call.began).max().unwrap(),
        );
        assert_eq!((names.len(), renewed.len()), (500, 500), "each once");
        let spread = last - first;
        assert!(spread >= 10 * SECOND && spread <= 13 * SECOND, "{spread:?}");
        // No second of it has more than its share, jitter aside.
        for second in 0..12 {
            let from = first + second * SECOND;
            let count = world.between(from, from + SECOND).count();
            assert!(count <= 2 * 500 / 12, "{count} calls in second {second}");
        }
        // Meanwhile one probe at a time: a call every 2.4 s at the least, after the first few.
        let probes = world.between(down + 10 * SECOND, up).count();
        assert!(probes <= 240 * 10 / 24 + 5, "{probes} probes in 4 minutes");
    }
}

#[test]
fn o1_a_nodes_usual_identities_are_all_renewed_within_five_seconds_of_the_return() {
    for seed in 0..64 {
        let up = 7 * MINUTE + Duration::from_millis(seed * 97);
        let how = if seed % 2 == 0 { Ca::Refuses } else { Ca::Silent };
        let mut world = World::new(30, 10 * MINUTE, seed, outage(3 * MINUTE, up, how));
        world.run(9 * MINUTE);
        let last = world.between(up, 9 * MINUTE).filter(|call| call.worked).map(|call| call.began).max().unwrap();
        assert!(last + World::LATENCY - up <= 5 * SECOND, "seed {seed}: {:?}", last - up);
        let names: HashSet<_> = world.between(up, up + 5 * SECOND).map(|call| &call.identity).collect();
        assert_eq!(names.len(), 30);
    }
}

#[test]
fn after_an_outage_the_certificate_that_ends_first_is_renewed_first() {
    let up = 9 * MINUTE + 20 * SECOND;
    let mut world = World::new(500, 10 * MINUTE, 5, outage(MINUTE, up, Ca::Refuses));
    // The first ones take seconds, eight at a time, so that their ends differ.
    world.run(MINUTE);
    let before = world.held.clone();
    world.run(10 * MINUTE);
    let order: Vec<_> =
        world.between(up, 10 * MINUTE).filter(|call| call.worked).map(|call| before[&call.identity]).collect();
    assert_eq!(order.len(), 500);
    assert_eq!(world.ran_out, 0);
    // The probe and what is under way beside each other apart, ends only grow.
    let late = order.windows(2).skip(1).filter(|pair| pair[1] + Duration::from_millis(200) < pair[0]).count();
    assert_eq!(late, 0);
    assert!(order[499] - order[1] > SECOND, "{:?}", order[499] - order[1]);
}

#[test]
fn i4_a_clock_that_steps_by_an_hour_makes_no_renewal_storm() {
    for lifetime in [10 * MINUTE, HOUR, 24 * HOUR] {
        for ahead in [3_600, -3_600] {
            for back in [20 * SECOND, 5 * MINUTE] {
                let mut world = World::new(500, lifetime, 9, |_| Ca::Answers);
                world.run(MINUTE);
                let steady = world.calls.len();
                assert_eq!(steady, 500);
                world.ahead = ahead;
                world.run(MINUTE + back);
                world.ahead = 0;
                world.run(MINUTE + back + 10 * MINUTE);
                let told = format!("lifetime {lifetime:?}, {ahead} s for {back:?}");
                assert!(world.most_within(10 * SECOND) <= 1, "{told}: {}", world.most_within(10 * SECOND));
                assert!(world.most_under_way <= limits::FETCHES);
                assert!(world.held.values().all(|end| *end > world.at), "{told}: every identity has a valid one again");
            }
        }
    }
}

#[test]
fn a_wall_clock_that_was_set_back_lets_no_certificate_run_out() {
    let mut world = World::new(20, HOUR, 3, |_| Ca::Answers);
    world.run(MINUTE);
    // By a minute, so that the CA's backdating still covers what it issues.
    world.ahead = -60;
    world.run(5 * HOUR);
    assert_eq!(world.ran_out, 0);
    // And by a whole lifetime, for two hours: what the CA issues is not valid yet here, but it is asked in time and without haste.
    let mut world = World::new(20, HOUR, 3, |_| Ca::Answers);
    world.run(MINUTE);
    world.ahead = -3_600;
    world.run(40 * MINUTE);
    let asked: HashSet<_> = world.between(20 * MINUTE, 40 * MINUTE).map(|call| &call.identity).collect();
    assert_eq!(asked.len(), 20, "the monotonic clock says that half of the life is over");
    assert!(world.most_within(10 * SECOND) <= 1);
}
