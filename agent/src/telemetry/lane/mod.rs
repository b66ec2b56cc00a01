//! The kernel lane's connections, told as those are that the agent carries: the same metrics, labels and log lines, with
//! `connection_security_policy="kernel_attested"`.
//!
//! Beside the journey: the agent sees none of their bytes. The kernel keeps a table of those that go on and writes a record at
//! each one's end; [`Lane`] is given both and tells each connection twice, as its source and as its destination would. It
//! never touches a connection, and nothing waits for it. So a connection that was too short for any look is told of a moment
//! ([`limits::LANE_RECORDS_LOOK`]) after its end.
//!
//! An agent that starts counts from there on: of a connection that goes on already it counts as opened, and the bytes
//! from then on; the log's line at its end tells of the whole connection. A connection that ended while no agent ran is
//! told whole by the next one, as far as the ring of records held it. Without a tunnel nothing carries a trace, so these
//! connections have no spans.

mod ending;
mod health;
mod ledger;
mod names;
mod pair;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use heddle_common::{Attestation, Ended, MAX_ATTESTED, Tuple};
use nix::time::{ClockId, clock_gettime};

pub(super) use health::Health;

use self::{
    ledger::{Batch, Known, Ledger, Told},
    pair::{Ends, Pair, flows, request},
};
use super::{
    Telemetry,
    access_log::{Block, Particulars, Printed, Record},
    traffic::Tally,
};
use crate::{
    cluster::{Snapshot, Workload},
    identity::TrustDomain,
    life::limits,
    policy::{self, Denial, Request, Rulebook},
    tunnel::{End, Flow},
};

/// What names and decisions come from.
#[derive(Debug, Clone)]
pub struct Around {
    pub snapshot: Arc<Snapshot>,
    pub rules: Arc<Rulebook>,
    pub trust_domain: TrustDomain,
}

/// What is known of the kernel lane.
#[derive(Debug)]
pub(super) struct State {
    ledger: Mutex<Ledger>,
    around: ArcSwapOption<Around>,
    /// Connections that policy closes, by cookie of the source's socket.
    revoked: Mutex<HashMap<u64, (Denial, Instant)>>,
    space: Mutex<Space>,
    /// When this agent began: nanoseconds of CLOCK_MONOTONIC.
    began: u64,
}

impl Default for State {
    fn default() -> Self {
        let (ledger, around, revoked, space) = Default::default();
        Self { ledger, around, revoked, space, began: monotonic() }
    }
}

/// The kernel's table of the lane's connections.
pub type LaneTable = Vec<(Tuple, Attestation)>;

/// One direction of a connection that goes on.
#[derive(Debug, Clone)]
pub struct LaneConnection {
    /// Cookie of the source's socket, for both directions.
    pub id: u64,
    pub flow: Flow,
    /// What policy would be asked, on the destination's side.
    pub request: Option<Request>,
    /// From client to app and from app to client.
    pub bytes: (u64, u64),
    pub lasted: Duration,
    /// Smoothed, as this side sees it; zero while unknown.
    pub rtt: Duration,
    /// Segments that this side sent again.
    pub retransmissions: u32,
}

/// Telemetry as the kernel lane uses it.
#[derive(Debug, Clone, Copy)]
pub struct Lane<'a>(&'a Telemetry);

impl Telemetry {
    /// The kernel lane's part.
    #[must_use]
    pub fn lane(&self) -> Lane<'_> {
        Lane(self)
    }
}

impl Lane<'_> {
    /// Takes what names and decisions come from now, and the pods that are enrolled on this node: workload id and uid. To be
    /// called before records are told, and cheap where nothing changed.
    pub fn learn(&self, around: Around, residents: &[(u64, Arc<str>)]) {
        self.0.learn(&around.snapshot);
        let mut ledger = self.ledger();
        ledger.names.learn(residents, &around.snapshot, Instant::now());
        let around = Arc::new(around);
        ledger.learn(Arc::clone(&around));
        self.0.lane.around.store(Some(around));
    }

    /// Tells of connections that have ended, without waiting for anything but a scrape; which waits for it in turn, so that
    /// [`limits::LANE_RECORDS`] are enough for a call.
    pub fn ended(&self, records: &[Ended]) {
        let mut batch = Batch::for_ends(records.len());
        let mut ledger = self.ledger();
        let mut revoked = self.revoked_all();
        for record in records {
            let denial = if revoked.is_empty() { None } else { revoked.remove(&record.attestation.id) };
            ledger.ended(record, denial.map(|(denial, _)| denial), &self.0.metrics.traffic, &mut batch);
        }
        drop(revoked);
        self.tell(&batch);
    }

    /// Looks at the connections that go on; `table` reads the kernel's table of them, or can't.
    pub fn look(&self, table: impl FnOnce() -> Option<LaneTable>) {
        let mut batch = Batch::default();
        let mut ledger = self.ledger();
        // Under the lock: see [`ledger`].
        let Some(table) = table() else { return };
        ledger.look(&table, self.0.lane.began, &self.0.metrics.traffic, &mut batch);
        self.tell(&batch);
    }

    /// The same, and finds those whose end nobody recorded. For the reader of the records alone, when it has taken every one
    /// there was, and not more often than [`limits::LANE_LOOK`].
    pub fn settle(&self, table: impl FnOnce() -> Option<LaneTable>) {
        let now = Instant::now();
        let mut batch = Batch::default();
        let mut ledger = self.ledger();
        let Some(table) = table() else { return };
        ledger.look(&table, self.0.lane.began, &self.0.metrics.traffic, &mut batch);
        ledger.settle(monotonic(), &mut batch);
        ledger.names.forget(limits::LANE_REMEMBERED, now);
        self.tell(&batch);
        drop(ledger);
        let mut revoked = self.revoked_all();
        revoked.retain(|_, (_, since)| now.saturating_duration_since(*since) < limits::LANE_REMEMBERED);
    }

    /// The connections that went on at the last look, each once per direction.
    #[must_use]
    pub fn connections(&self) -> Vec<LaneConnection> {
        let now = monotonic();
        let ledger = self.ledger();
        ledger.live().flat_map(|known| connections(known, now)).collect()
    }

    /// Policy closes this connection (cookie of the source's socket): to be told before it is done.
    pub fn revoked(&self, id: u64, denial: Denial) {
        let mut revoked = self.revoked_all();
        // More than there can be connections: those that end without a reason are told as reset.
        if revoked.len() < MAX_ATTESTED as usize {
            revoked.insert(id, (denial, Instant::now()));
        }
    }

    /// The kernel denied so many connections of this pair.
    pub fn denied(&self, source: &Arc<Workload>, destination: &Arc<Workload>, port: u16, denial: &Denial, count: u64) {
        let Some(around) = self.0.lane.around.load_full().filter(|_| count > 0) else { return };
        let target = SocketAddr::new(address(destination, |_| true), port);
        // Which of its ports the client used is not known any more.
        let client = SocketAddr::new(address(source, |own| own.is_ipv4() == target.is_ipv4()), 0);
        let (source, destination) = (Some(Arc::clone(source)), Some(Arc::clone(destination)));
        let flows = flows(&Ends { client, asked: target, target, source, destination }, &around);
        let end = End::Denied(denial.clone());
        let mut tally = Tally::default();
        tally.fail("DENY", count);
        let (metrics, now) = (&self.0.metrics, Instant::now());
        for flow in &flows {
            metrics.traffic.tally(&metrics.traffic.labels(flow), (flow.direction, flow.security), &tally, now);
        }
        metrics.denied(denial, count);
        let [_, inbound] = &flows;
        if let Some(request) = request(inbound) {
            for rehearsal in policy::rehearse(&around.rules, &request) {
                self.0.rehearse(inbound, &rehearsal, count);
            }
        }
        let record =
            Record { time: SystemTime::now(), cluster: &self.0.cluster, flow: inbound, end: &end, carried: None };
        let suppressed = if self.0.log.write_for(&record, count) { count - 1 } else { count };
        metrics.suppressed.inc_by(suppressed);
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.lane.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn revoked_all(&self) -> MutexGuard<'_, HashMap<u64, (Denial, Instant)>> {
        self.0.lane.revoked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, batch: &Batch) {
        let (metrics, now) = (&self.0.metrics, Instant::now());
        for (pair, tally) in batch.tallies() {
            for (flow, labels) in pair.flows.iter().zip(&pair.labels) {
                metrics.traffic.tally(labels, (flow.direction, flow.security), tally, now);
            }
        }
        metrics.lane.add(batch);
        for (pair, source) in &batch.opened {
            self.asked(pair);
            pair.flows.iter().for_each(|flow| super::told_opened(flow, *source));
        }
        let clock = Clock::now();
        let mut space = self.0.lane.space.lock().unwrap_or_else(PoisonError::into_inner);
        for told in &batch.ended {
            if told.established {
                if let ending::Ending::Denied(denial) = &told.ending {
                    metrics.denied(denial, 1);
                }
            } else {
                self.asked(&told.pair);
            }
            self.log(told, &clock, &mut space);
        }
        self.0.log.queue(&mut space.lines);
    }

    /// It asked to come in.
    fn asked(&self, pair: &Pair) {
        let [_, inbound] = &pair.flows;
        for rehearsal in &pair.rehearsals {
            self.0.rehearse(inbound, rehearsal, 1);
        }
    }

    /// Appends both of its lines.
    fn log(&self, told: &Told, clock: &Clock, Space { printed, lines }: &mut Space) {
        let Telemetry { log, cluster, metrics, .. } = self.0;
        let lasted = Duration::from_nanos(told.closed.saturating_sub(told.opened));
        let (time, bytes) = (clock.wall(told.closed), told.bytes);
        let plain = told.ending.plain().filter(|_| told.established);
        if plain.is_some() {
            printed.print(&Particulars { time, port: told.source.port(), bytes, lasted });
        }
        for (reporter, flow) in told.pair.flows.iter().enumerate() {
            let outline = plain.and_then(|ending| {
                let make = || {
                    let (end, carried) = (told.ending.end(), Some((bytes, lasted)));
                    log.outline(&Record { time, cluster, flow, end: &end, carried })
                };
                told.pair.outline(reporter, ending, make)
            });
            if let Some(outline) = outline {
                outline.fill(printed, &mut lines.text);
                lines.lines += 1;
                continue;
            }
            let (flow, end) = (Flow { source: told.source, ..flow.clone() }, told.ending.end());
            let carried = told.established.then_some((bytes, lasted));
            if !log.append(&Record { time, cluster, flow: &flow, end: &end, carried }, 1, lines) {
                metrics.suppressed.inc();
            }
        }
    }
}

fn connections(known: &Known, now: u64) -> [LaneConnection; 2] {
    let Known { pair, source, seen, .. } = known;
    let [outbound, inbound] = &pair.flows;
    let one = |flow: &Flow, rtt: u32, retransmissions, request| LaneConnection {
        id: seen.id,
        flow: Flow { source: *source, ..flow.clone() },
        request,
        bytes: (seen.sent, seen.received),
        lasted: Duration::from_nanos(now.saturating_sub(seen.opened)),
        rtt: Duration::from_micros(rtt.into()),
        retransmissions,
    };
    [
        one(outbound, seen.source_rtt_us, seen.source_retransmissions, None),
        one(inbound, seen.destination_rtt_us, seen.destination_retransmissions, pair.request.clone()),
    ]
}

/// An address of a pod that fits, else any.
fn address(pod: &Workload, fits: impl Fn(&IpAddr) -> bool) -> IpAddr {
    let found = pod.addresses.iter().find(|own| fits(own)).or(pod.addresses.first());
    found.copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// Nanoseconds of CLOCK_MONOTONIC, as the kernel's records have it.
fn monotonic() -> u64 {
    // Linux has this clock always; without it ages are zero.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Memory in which lines are made: thousands a second find what the last ones left.
#[derive(Debug, Default)]
struct Space {
    printed: Printed,
    lines: Block,
}

/// Both clocks at one moment.
struct Clock {
    monotonic: u64,
    wall: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self { monotonic: monotonic(), wall: SystemTime::now() }
    }

    /// The time of day at a moment that has passed.
    fn wall(&self, then: u64) -> SystemTime {
        let ago = Duration::from_nanos(self.monotonic.saturating_sub(then));
        self.wall.checked_sub(ago).unwrap_or(self.wall)
    }
}
