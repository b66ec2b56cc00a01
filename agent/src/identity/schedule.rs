//! When to ask the CA for which certificate. Pure: time goes in, identities to fetch come out.
//!
//! At most [`limits::FETCHES`] run at a time: first what a connection waits for, then first certificates, then renewals.
//! A refusal backs off that identity. A CA that can't be reached is probed by one identity at a time, and when it is back
//! the others are spread over some seconds, so that a node is neither late nor a herd.

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
    /// A certificate that lasts until then.
    Held { until: SystemTime },
    /// No answer from the CA.
    Unreachable,
    /// The CA, or our check of its answer, refused this identity.
    Refused,
}

#[derive(Debug)]
struct Slot {
    class: Class,
    /// Not before this.
    earliest: Instant,
    /// Not before this either.
    renew_at: Option<SystemTime>,
    refusals: u32,
    running: Option<Ticket>,
}

impl Slot {
    fn due(&self, now: Now) -> bool {
        self.running.is_none() && self.earliest <= now.monotonic && self.renew_at.is_none_or(|at| at <= now.wall)
    }

    fn wait(&self, now: Now) -> Duration {
        let renewal = self.renew_at.and_then(|at| at.duration_since(now.wall).ok()).unwrap_or_default();
        self.earliest.saturating_duration_since(now.monotonic).max(renewal)
    }
}

/// The CA can't be reached: one probe at a time, not before `probe_at`.
#[derive(Debug)]
struct Outage {
    tries: u32,
    probe_at: Instant,
    probe: Option<Ticket>,
}

#[derive(Debug)]
pub(super) struct Schedule {
    slots: HashMap<SpiffeId, Slot>,
    running: HashSet<Ticket>,
    outage: Option<Outage>,
    tickets: u64,
    random: fastrand::Rng,
}

impl Schedule {
    pub fn new(random: fastrand::Rng) -> Self {
        Self { slots: HashMap::new(), running: HashSet::new(), outage: None, tickets: 0, random }
    }

    /// Exactly these identities are kept from now on.
    pub fn keep(&mut self, identities: &HashSet<SpiffeId>, now: Now) {
        self.slots.retain(|identity, _| identities.contains(identity));
        for identity in identities {
            self.slots.entry(identity.clone()).or_insert(Slot {
                class: Class::WarmUp,
                earliest: now.monotonic,
                renew_at: None,
                refusals: 0,
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

    /// This identity's certificate is of no more use to its peers: renew it at the next turn.
    pub fn renew(&mut self, identity: &SpiffeId) {
        if let Some(slot) = self.slots.get_mut(identity) {
            slot.renew_at = None;
        }
    }

    /// Identities whose fetch starts now.
    pub fn start(&mut self, now: Now) -> Vec<(SpiffeId, Ticket)> {
        let room = match &self.outage {
            None => limits::FETCHES.saturating_sub(self.running.len()),
            Some(outage) => usize::from(outage.probe.is_none() && outage.probe_at <= now.monotonic),
        };
        if room == 0 {
            return Vec::new();
        }
        let mut due: Vec<_> = self.slots.iter_mut().filter(|(_, slot)| slot.due(now)).collect();
        due.sort_by_key(|(_, slot)| (slot.class, slot.earliest));
        let mut started = Vec::new();
        for (identity, slot) in due.into_iter().take(room) {
            self.tickets += 1;
            let ticket = Ticket(self.tickets);
            slot.running = Some(ticket);
            self.running.insert(ticket);
            started.push((identity.clone(), ticket));
        }
        if let (Some(outage), Some((_, ticket))) = (&mut self.outage, started.first()) {
            outage.probe = Some(*ticket);
        }
        started
    }

    pub fn finished(&mut self, identity: &SpiffeId, ticket: Ticket, outcome: Outcome, now: Now) {
        self.running.remove(&ticket);
        match outcome {
            Outcome::Unreachable => self.unreachable(ticket, now),
            Outcome::Held { .. } | Outcome::Refused => self.reachable(now),
        }
        let Some(slot) = self.slots.get_mut(identity).filter(|slot| slot.running == Some(ticket)) else {
            return;
        };
        slot.running = None;
        match outcome {
            Outcome::Held { until } => {
                slot.class = Class::Renewal;
                slot.refusals = 0;
                slot.earliest = now.monotonic + limits::RENEWAL_PAUSE;
                slot.renew_at = Some(renewal(now.wall, until, &mut self.random));
            }
            Outcome::Refused => {
                let pause = backoff(slot.refusals, limits::FETCH_BACKOFF_MAX, &mut self.random);
                slot.refusals = slot.refusals.saturating_add(1);
                slot.earliest = now.monotonic + pause;
            }
            // The next probe is another identity's.
            Outcome::Unreachable => slot.earliest = now.monotonic,
        }
    }

    /// How long nothing is to do unless something finishes or changes.
    pub fn idle(&self, now: Now) -> Option<Duration> {
        let next = self.slots.values().filter(|slot| slot.running.is_none()).map(|slot| slot.wait(now)).min()?;
        match &self.outage {
            None if self.running.len() >= limits::FETCHES => None,
            None => Some(next),
            Some(outage) if outage.probe.is_some() => None,
            Some(outage) => Some(next.max(outage.probe_at.saturating_duration_since(now.monotonic))),
        }
    }

    fn unreachable(&mut self, ticket: Ticket, now: Now) {
        let outage = self.outage.get_or_insert(Outage { tries: 0, probe_at: now.monotonic, probe: Some(ticket) });
        // Others that were under way when the outage began say nothing new.
        if outage.probe == Some(ticket) {
            outage.probe = None;
            outage.probe_at = now.monotonic + backoff(outage.tries, limits::CA_PROBE_MAX, &mut self.random);
            outage.tries = outage.tries.saturating_add(1);
        }
    }

    fn reachable(&mut self, now: Now) {
        if self.outage.take().is_none() {
            return;
        }
        let waiting: Vec<_> =
            self.slots.values_mut().filter(|slot| slot.class != Class::Needed && slot.due(now)).collect();
        let count = u32::try_from(waiting.len()).unwrap_or(u32::MAX);
        let spread = limits::RECOVERY_STEP.saturating_mul(count).min(limits::RECOVERY_SPREAD_MAX);
        for slot in waiting {
            slot.earliest = now.monotonic + spread.mul_f64(self.random.f64());
        }
    }
}

/// Half of what is left of the certificate, a tenth of that earlier or later. Counted from now, because `not_before` is
/// backdated by as much as the CA likes.
fn renewal(now: SystemTime, until: SystemTime, random: &mut fastrand::Rng) -> SystemTime {
    let half = until.duration_since(now).unwrap_or_default() / 2;
    now + half.mul_f64(0.9 + 0.2 * random.f64())
}

/// Doubled each time from [`limits::FETCH_BACKOFF_MIN`] up to `longest`, a fifth shorter or longer.
fn backoff(failures: u32, longest: Duration, random: &mut fastrand::Rng) -> Duration {
    let doubled = limits::FETCH_BACKOFF_MIN.saturating_mul(2_u32.saturating_pow(failures));
    doubled.min(longest).mul_f64(0.8 + 0.4 * random.f64())
}
