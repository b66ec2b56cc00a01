//! When to ask the CA for which certificate. Pure: time goes in, identities to fetch come out.
//!
//! At most [`limits::FETCHES`] run at a time: first what a connection waits for, then first certificates, then renewals, of
//! which the one that expires first. A refusal backs off that identity. A CA that can't be reached is probed by one identity
//! after the other, and when it is back the others follow in that order over some seconds, so that a node is neither late nor a herd.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant, SystemTime},
};

use super::SpiffeId;
use crate::life::limits;

/// Both clocks at one moment: certificates live by the wall clock, pauses by the monotonic one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub monotonic: Instant,
    pub wall: SystemTime,
}

impl Now {
    pub fn read() -> Self {
        Self { monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

/// Why an identity is fetched, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// A connection waits for it.
    Needed,
    /// It has no certificate yet.
    WarmUp,
    Renewal,
}

/// One fetch; a finished one whose identity left the set meanwhile matches nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ticket(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// A certificate that lasts until then, and as long as that in all by its own dates.
    Held { until: SystemTime, lifetime: Duration },
    /// No answer from the CA.
    Unreachable,
    /// The CA refused this identity.
    Refused,
    /// The CA gave what we can't use: it will give no other at once, unless what we trust changes.
    Unusable,
    /// Nobody waits for it any more.
    Abandoned,
}

/// When a certificate is renewed: by whichever clock says so first. A wall clock that is set back must not keep a certificate
/// beyond its end, and the monotonic one stands still while the machine sleeps.
#[derive(Clone, Copy, Debug)]
struct Renewal {
    wall: SystemTime,
    monotonic: Instant,
}

impl Renewal {
    fn wait(self, now: Now) -> Duration {
        let wall = self.wall.duration_since(now.wall).unwrap_or_default();
        wall.min(self.monotonic.saturating_duration_since(now.monotonic))
    }
}

#[derive(Debug)]
struct Slot {
    class: Class,
    /// Not before this.
    earliest: Instant,
    /// Not before this either.
    renewal: Option<Renewal>,
    /// When the certificate that it has ends.
    until: Option<SystemTime>,
    refusals: u32,
    /// The last answer was of no use.
    unusable: bool,
    running: Option<Ticket>,
}

impl Slot {
    fn due(&self, now: Now) -> bool {
        self.running.is_none() && self.wait(now).is_zero()
    }

    fn wait(&self, now: Now) -> Duration {
        let renewal = self.renewal.map(|renewal| renewal.wait(now)).unwrap_or_default();
        self.earliest.saturating_duration_since(now.monotonic).max(renewal)
    }

    /// What is smaller goes first. A certificate that has ended is as good as none.
    fn urgency(&self, now: Now) -> (Class, SystemTime, Instant) {
        let ended = self.until.is_none_or(|until| until <= now.wall);
        let class = if ended { self.class.min(Class::WarmUp) } else { self.class };
        (class, self.until.unwrap_or(SystemTime::UNIX_EPOCH), self.earliest)
    }
}

/// The CA can't be reached: a probe now and then, not before `probe_at`, which counts from the beginning of the last one. So a
/// probe that waits for an answer in vain makes the next one no later.
#[derive(Debug)]
struct Outage {
    tries: u32,
    probe_at: Instant,
    probes: HashSet<Ticket>,
}

impl Outage {
    fn pause(&mut self, now: Now, random: &mut fastrand::Rng) {
        self.probe_at = now.monotonic + backoff(self.tries, limits::FETCH_BACKOFF_MIN, limits::CA_PROBE_MAX, random);
        self.tries = self.tries.saturating_add(1);
    }
}

#[derive(Debug)]
pub(super) struct Schedule {
    slots: HashMap<SpiffeId, Slot>,
    running: HashSet<Ticket>,
    outage: Option<Outage>,
    tickets: u64,
    /// Tickets given until the CA last answered: that one of these gets no answer is old news.
    reached: u64,
    random: fastrand::Rng,
}

impl Schedule {
    pub fn new(random: fastrand::Rng) -> Self {
        Self { slots: HashMap::new(), running: HashSet::new(), outage: None, tickets: 0, reached: 0, random }
    }

    /// Exactly these identities are kept from now on.
    pub fn keep(&mut self, identities: &HashSet<SpiffeId>, now: Now) {
        self.slots.retain(|identity, _| identities.contains(identity));
        for identity in identities {
            self.slots.entry(identity.clone()).or_insert(Slot {
                class: Class::WarmUp,
                earliest: now.monotonic,
                renewal: None,
                until: None,
                refusals: 0,
                unusable: false,
                running: None,
            });
        }
    }

    /// A connection waits for this identity. Its backoff, if any, still holds.
    pub fn need(&mut self, identity: &SpiffeId) {
        if let Some(slot) = self.slots.get_mut(identity) {
            slot.class = Class::Needed;
        }
    }

    /// Certificates of these identities are of no more use to their peers: they are renewed now, one after the other.
    pub fn renew(&mut self, identities: &HashSet<SpiffeId>, now: Now) {
        let slots = self.slots.iter_mut().filter(|(identity, _)| identities.contains(identity));
        let slots: Vec<_> = slots.map(|(_, slot)| slot).filter(|slot| slot.refusals == 0).collect();
        spread(slots, now, &mut self.random);
    }

    /// What we trust changed: answers that were of no use may be now.
    pub fn trust_changed(&mut self, now: Now) {
        for slot in self.slots.values_mut().filter(|slot| slot.unusable) {
            slot.unusable = false;
            slot.refusals = 0;
            slot.earliest = now.monotonic;
        }
    }

    /// Whether this fetch is still waited for.
    pub fn wants(&self, identity: &SpiffeId, ticket: Ticket) -> bool {
        self.slots.get(identity).is_some_and(|slot| slot.running == Some(ticket))
    }

    /// Fetches under way.
    pub fn under_way(&self) -> usize {
        self.running.len()
    }

    /// When this identity is tried next, if nothing changes until then: now where its fetch is under way.
    pub fn next_try(&self, identity: &SpiffeId, now: Now) -> Option<SystemTime> {
        let slot = self.slots.get(identity)?;
        let wait = match (&self.outage, slot.running) {
            (_, Some(_)) => Duration::ZERO,
            (None, None) => slot.wait(now),
            (Some(outage), None) => slot.wait(now).max(outage.probe_at.saturating_duration_since(now.monotonic)),
        };
        now.wall.checked_add(wait)
    }

    /// Identities whose fetch starts now.
    pub fn start(&mut self, now: Now) -> Vec<(SpiffeId, Ticket)> {
        let room = match &self.outage {
            None => limits::FETCHES.saturating_sub(self.running.len()),
            Some(outage) => usize::from(outage.probes.len() < limits::CA_PROBES && outage.probe_at <= now.monotonic),
        };
        if room == 0 {
            return Vec::new();
        }
        let mut due: Vec<_> = self.slots.iter_mut().filter(|(_, slot)| slot.due(now)).collect();
        match self.outage {
            None => due.sort_by_key(|(_, slot)| slot.urgency(now)),
            // Each is a probe in its turn: one that never gets an answer must not stand for all.
            Some(_) => due.sort_by_key(|(_, slot)| slot.earliest),
        }
        let mut started = Vec::new();
        for (identity, slot) in due.into_iter().take(room) {
            self.tickets += 1;
            let ticket = Ticket(self.tickets);
            slot.running = Some(ticket);
            self.running.insert(ticket);
            started.push((identity.clone(), ticket));
        }
        if let (Some(outage), Some((_, ticket))) = (&mut self.outage, started.first()) {
            outage.probes.insert(*ticket);
            outage.pause(now, &mut self.random);
        }
        started
    }

    pub fn finished(&mut self, identity: &SpiffeId, ticket: Ticket, outcome: Outcome, now: Now) {
        self.running.remove(&ticket);
        match outcome {
            Outcome::Unreachable => self.unreachable(ticket, now),
            Outcome::Held { .. } | Outcome::Refused | Outcome::Unusable => self.reachable(ticket, now),
            Outcome::Abandoned => self.release(ticket, now),
        }
        let Some(slot) = self.slots.get_mut(identity).filter(|slot| slot.running == Some(ticket)) else {
            return;
        };
        slot.running = None;
        slot.unusable = outcome == Outcome::Unusable;
        match outcome {
            Outcome::Held { until, lifetime } => {
                slot.class = Class::Renewal;
                slot.refusals = 0;
                let pause = (lifetime / 8).clamp(limits::RENEWAL_PAUSE_MIN, limits::RENEWAL_PAUSE);
                slot.earliest = now.monotonic + pause;
                slot.until = Some(until);
                slot.renewal = Some(renewal(now, until, &mut self.random));
            }
            Outcome::Refused | Outcome::Unusable => {
                let first = if slot.unusable { limits::FETCH_UNUSABLE_MIN } else { limits::FETCH_BACKOFF_MIN };
                let pause = backoff(slot.refusals, first, limits::FETCH_BACKOFF_MAX, &mut self.random);
                slot.refusals = slot.refusals.saturating_add(1);
                slot.earliest = now.monotonic + pause;
            }
            // The next probe is another identity's.
            Outcome::Unreachable | Outcome::Abandoned => slot.earliest = now.monotonic,
        }
    }

    /// How long nothing is to do unless something finishes or changes.
    pub fn idle(&self, now: Now) -> Option<Duration> {
        let next = self.slots.values().filter(|slot| slot.running.is_none()).map(|slot| slot.wait(now)).min()?;
        match &self.outage {
            None if self.running.len() >= limits::FETCHES => None,
            None => Some(next),
            Some(outage) if outage.probes.len() >= limits::CA_PROBES => None,
            Some(outage) => Some(next.max(outage.probe_at.saturating_duration_since(now.monotonic))),
        }
    }

    fn unreachable(&mut self, ticket: Ticket, now: Now) {
        match &mut self.outage {
            // Those that were under way when the outage began say nothing new.
            Some(outage) => drop(outage.probes.remove(&ticket)),
            None if ticket.0 <= self.reached => {}
            None => {
                let mut outage = Outage { tries: 0, probe_at: now.monotonic, probes: HashSet::new() };
                outage.pause(now, &mut self.random);
                self.outage = Some(outage);
            }
        }
    }

    /// A probe that was given up says nothing: another identity takes its place.
    fn release(&mut self, ticket: Ticket, now: Now) {
        if let Some(outage) = self.outage.as_mut().filter(|outage| outage.probes.contains(&ticket)) {
            outage.probes.remove(&ticket);
            outage.probe_at = now.monotonic;
        }
    }

    fn reachable(&mut self, ticket: Ticket, now: Now) {
        self.reached = self.tickets;
        let Some(outage) = self.outage.take() else { return };
        // Probes that still wait were sent into the silence: theirs are asked for again like all others.
        let silent =
            |slot: &&mut Slot| slot.running.is_some_and(|probe| probe != ticket && outage.probes.contains(&probe));
        self.slots.values_mut().filter(silent).for_each(|slot| slot.running = None);
        let waiting = self.slots.values_mut().filter(|slot| slot.class != Class::Needed && slot.due(now));
        spread(waiting.collect(), now, &mut self.random);
    }
}

/// Has these fetched from now on, the most urgent first, at a pace that is no herd.
fn spread(mut slots: Vec<&mut Slot>, now: Now, random: &mut fastrand::Rng) {
    slots.sort_by_key(|slot| slot.urgency(now));
    let count = u32::try_from(slots.len()).unwrap_or(u32::MAX).max(1);
    let step = limits::RECOVERY_STEP.min(limits::RECOVERY_SPREAD_MAX / count);
    for (rank, slot) in (0_u32..).zip(slots) {
        slot.renewal = None;
        slot.earliest = now.monotonic + step * rank + step.mul_f64(random.f64());
    }
}

/// Half of what is left of the certificate, a tenth of that earlier or later. Counted from now, because `not_before` is
/// backdated by as much as the CA likes.
fn renewal(now: Now, until: SystemTime, random: &mut fastrand::Rng) -> Renewal {
    let half = until.duration_since(now.wall).unwrap_or_default() / 2;
    let wait = half.mul_f64(0.9 + 0.2 * random.f64());
    Renewal { wall: now.wall + wait, monotonic: now.monotonic + wait }
}

/// Doubled each time from `first` up to `longest`, a fifth shorter or longer.
fn backoff(failures: u32, first: Duration, longest: Duration, random: &mut fastrand::Rng) -> Duration {
    let doubled = first.saturating_mul(2_u32.saturating_pow(failures));
    doubled.min(longest).mul_f64(0.8 + 0.4 * random.f64())
}
