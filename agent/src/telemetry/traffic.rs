//! The `istio_tcp_*` counters: a table of label sets with a cap, fed at open and close and, while a connection lasts, from
//! its live byte counts.
//!
//! Each connection's bytes are added as differences to what was added before, under one lock, so nothing counts twice
//! whatever the order of scrape and close.
//!
//! **Direction.** Istio defines `istio_tcp_sent_bytes_total` as the bytes of the response and
//! `istio_tcp_received_bytes_total` as those of the request, whoever reports; dashboards rely on it. So here *sent* is app to client and *received* is
//! client to app, for both reporters. Beside what the source itself sends that looks flipped for `reporter="source"`
//! (istio/istio#32399); the access log tells each side's own view instead.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use prometheus::{
    TextEncoder,
    proto::{LabelPair, MetricType},
};

use super::{
    families::{counter, family, label},
    labels::{FLAGS_AT, Labels, Localities, NAMES, WITHOUT_LOCALITY},
};
use crate::{
    life::limits,
    tunnel::{Connection, Direction, Flow, Security},
};

/// `response_flags` of a connection that is well.
pub(super) const NO_FLAGS: &str = "-";

/// Live connections that are folded under one hold of the lock: a scrape must not keep the data plane waiting.
const FOLD_CHUNK: usize = 512;

/// Rows that are made into text at a time.
const TEXT_CHUNK: usize = 256;

/// The counters of all label sets.
#[derive(Debug)]
pub(super) struct Traffic {
    cluster: Arc<str>,
    /// Most exposed lines, all five metrics together, overflow apart.
    capacity: usize,
    /// Where nodes are; `None` leaves the labels of it out.
    localities: Option<ArcSwap<Localities>>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    sets: HashMap<Arc<Labels>, Counts>,
    live: HashMap<u64, Live>,
    /// Open connections that others follow, see [`Tally`].
    followed: Open,
    carried: Carried,
    /// Events that counted under overflow.
    overflowed: u64,
    /// Exposed lines of all sets but the overflow ones.
    lines: usize,
}

#[derive(Debug)]
struct Counts {
    overflow: bool,
    opened: u64,
    sent: u64,
    received: u64,
    closed: Vec<(&'static str, u64)>,
    failed: Vec<(&'static str, u64)>,
    live: usize,
    touched: Instant,
}

#[derive(Debug)]
struct Live {
    labels: Arc<Labels>,
    direction: Direction,
    security: Security,
    /// What is already in the counters of `sent` and `received` of the [`Connection`].
    reported: (u64, u64),
}

/// What connections of one label set did, of which someone else knows each: the kernel lane's.
///
/// Each must have been told as opened before, or in the same tally as, its bytes and its end.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Tally {
    pub opened: u64,
    /// From client to app and from app to client.
    pub bytes: (u64, u64),
    /// By response flags.
    pub closed: Vec<(&'static str, u64)>,
    pub failed: Vec<(&'static str, u64)>,
}

impl Tally {
    pub fn close(&mut self, flags: &'static str) {
        bump(&mut self.closed, flags, 1);
    }

    pub fn fail(&mut self, flags: &'static str, count: u64) {
        bump(&mut self.failed, flags, count);
    }
}

/// How many connections are open.
pub(super) type Open = HashMap<(Direction, Security), usize>;

/// Bytes towards the server and towards the client, of all connections there were.
pub(super) type Carried = HashMap<(Direction, Security), (u64, u64)>;

impl Traffic {
    pub fn new(cluster: Arc<str>, capacity: usize) -> Self {
        Self { cluster, capacity, localities: None, table: Mutex::default() }
    }

    /// Adds the labels of regions and zones, from what [`Traffic::learn`] is told.
    pub fn add_localities(&mut self) {
        self.localities = Some(ArcSwap::default());
    }

    pub fn learn(&self, localities: &Arc<Localities>) {
        if let Some(known) = &self.localities {
            known.store(Arc::clone(localities));
        }
    }

    /// What connections like this one are counted under.
    pub fn labels(&self, flow: &Flow) -> Arc<Labels> {
        let localities = self.localities.as_ref().map(ArcSwap::load);
        Arc::new(Labels::of(flow, &self.cluster, localities.as_ref().map(|known| &***known)))
    }

    /// A panic elsewhere leaves only numbers behind, so a poisoned lock is no reason to stop counting.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn opened(&self, connection: &Connection, now: Instant) {
        let flow = &connection.flow;
        let labels = self.labels(flow);
        let mut table = self.table();
        let labels = table.admit(labels, of(flow), self.capacity, (1, now), Counts::cost_of_open);
        if let Some(counts) = table.sets.get_mut(&labels) {
            counts.opened += 1;
            counts.live += 1;
        }
        let live = Live { labels, direction: flow.direction, security: flow.security, reported: (0, 0) };
        table.live.insert(connection.id, live);
    }

    pub fn closed(&self, connection: &Connection, flags: &'static str, now: Instant) {
        let mut table = self.table();
        // Without an `opened` there is nothing to balance.
        let Some(mut live) = table.live.remove(&connection.id) else { return };
        table.add(&mut live, connection.bytes(), now);
        if let Some(counts) = table.sets.get_mut(&live.labels) {
            counts.live = counts.live.saturating_sub(1);
        }
        let labels = table
            .admit(live.labels, of(&connection.flow), self.capacity, (1, now), |counts| counts.cost_of_close(flags));
        if let Some(counts) = table.sets.get_mut(&labels) {
            bump(&mut counts.closed, flags, 1);
        }
    }

    pub fn failed(&self, flow: &Flow, flags: &'static str, now: Instant) {
        let labels = self.labels(flow);
        let mut table = self.table();
        let labels = table.admit(labels, of(flow), self.capacity, (1, now), |counts| cost(&counts.failed, flags));
        if let Some(counts) = table.sets.get_mut(&labels) {
            bump(&mut counts.failed, flags, 1);
        }
    }

    /// Adds what many connections with the same labels did.
    pub fn tally(&self, labels: &Arc<Labels>, of: (Direction, Security), tally: &Tally, now: Instant) {
        let mut table = self.table();
        if tally.opened > 0 {
            let labels = table.admit(Arc::clone(labels), of, self.capacity, (tally.opened, now), Counts::cost_of_open);
            *table.followed.entry(of).or_default() += count(tally.opened);
            if let Some(counts) = table.sets.get_mut(&labels) {
                counts.opened += tally.opened;
                counts.live += count(tally.opened);
            }
        }
        if tally.bytes != (0, 0) || !tally.closed.is_empty() {
            table.carry(labels, of, tally, self.capacity, now);
        }
        for (flags, events) in &tally.failed {
            let place = Arc::clone(labels);
            let labels = table.admit(place, of, self.capacity, (*events, now), |counts| cost(&counts.failed, flags));
            if let Some(counts) = table.sets.get_mut(&labels) {
                bump(&mut counts.failed, flags, *events);
            }
        }
    }

    /// Adds what live connections carried since the last time.
    pub fn fold(&self, live: &[Arc<Connection>], now: Instant) {
        for chunk in live.chunks(FOLD_CHUNK) {
            let mut table = self.table();
            for connection in chunk {
                // Gone from the table means closed in the meantime: its final bytes are counted.
                let Some(mut entry) = table.live.remove(&connection.id) else { continue };
                table.add(&mut entry, connection.bytes(), now);
                table.live.insert(connection.id, entry);
            }
        }
    }

    /// Forgets label sets that no connection uses, that nothing touched for `idle`, and of which a named workload is
    /// not among `present` (`namespace`, `workload`).
    pub fn expire(&self, present: &HashSet<(Arc<str>, Arc<str>)>, idle: Duration, now: Instant) {
        let known: HashSet<(&str, &str)> =
            present.iter().map(|(namespace, workload)| (&**namespace, &**workload)).collect();
        let mut table = self.table();
        let mut freed = 0;
        table.sets.retain(|labels, counts| {
            let gone = labels.workloads().any(|workload| !known.contains(&workload));
            let keep = counts.overflow || counts.live > 0 || !gone || now.duration_since(counts.touched) < idle;
            if !keep {
                freed += counts.lines();
            }
            keep
        });
        table.lines = table.lines.saturating_sub(freed);
    }

    pub fn open(&self) -> Open {
        let table = self.table();
        let mut open = table.followed.clone();
        for live in table.live.values() {
            *open.entry((live.direction, live.security)).or_default() += 1;
        }
        open
    }

    pub fn carried(&self) -> Carried {
        self.table().carried.clone()
    }

    pub fn overflowed(&self) -> u64 {
        self.table().overflowed
    }

    /// Appends the five families. The lock is held for copying numbers only, not for making text; and text is made of a few
    /// rows at a time, as a row with its labels takes a hundred times the memory of what it was made from.
    pub fn write(&self, text: &mut String) -> Result<(), prometheus::Error> {
        let sets: Vec<(Arc<Labels>, _)> =
            self.table().sets.iter().map(|(labels, counts)| (Arc::clone(labels), counts.exposed())).collect();
        let names = if self.localities.is_some() { NAMES.len() } else { WITHOUT_LOCALITY };
        for (metric, (name, help)) in FAMILIES.into_iter().enumerate() {
            let lines = sets.iter().flat_map(|(labels, lines)| lines.iter().map(move |line| (labels, line)));
            let rows = lines.filter(|(_, line)| line.0 == metric);
            let mut rows = rows.map(|(labels, (_, flags, value))| counter(pairs(labels, flags, names), *value));
            let mut announced = false;
            while let Some(family) = family(name, help, MetricType::COUNTER, rows.by_ref().take(TEXT_CHUNK).collect()) {
                let encoded = TextEncoder::new().encode_to_string(&[family])?;
                // The encoder announces the family each time, in two lines.
                let body = encoded.splitn(3, '\n').nth(2).filter(|_| announced).unwrap_or(&encoded);
                text.push_str(body);
                announced = true;
            }
        }
        Ok(())
    }
}

const FAMILIES: [(&str, &str); 5] = [
    ("istio_tcp_connections_opened_total", "TCP connections that started to carry bytes."),
    ("istio_tcp_connections_closed_total", "TCP connections that carried bytes and ended; response_flags tells how."),
    ("istio_tcp_connections_failed_total", "TCP connections that ended before they carried a byte."),
    (
        "istio_tcp_sent_bytes_total",
        "Bytes of the response, from the app towards the client, for either reporter; counted while a connection lasts.",
    ),
    (
        "istio_tcp_received_bytes_total",
        "Bytes of the request, from the client towards the app, for either reporter; counted while a connection lasts.",
    ),
];

impl Table {
    /// The labels to count so many events under: `wanted` while there is room for the lines that they add, else overflow.
    /// The set exists afterwards.
    fn admit(
        &mut self,
        wanted: Arc<Labels>,
        (direction, security): (Direction, Security),
        capacity: usize,
        (events, now): (u64, Instant),
        cost: impl Fn(&Counts) -> usize,
    ) -> Arc<Labels> {
        let adds = match self.sets.get_mut(&wanted) {
            Some(counts) => {
                counts.touched = now;
                if counts.overflow { 0 } else { cost(counts) }
            }
            None => cost(&Counts::new(false, now)),
        };
        if self.lines + adds <= capacity {
            self.lines += adds;
            self.sets.entry(Arc::clone(&wanted)).or_insert_with(|| Counts::new(false, now));
            return wanted;
        }
        self.overflowed += events;
        let labels = Arc::new(Labels::overflow(direction, security));
        self.sets.entry(Arc::clone(&labels)).or_insert_with(|| Counts::new(true, now)).touched = now;
        labels
    }

    /// Bytes and ends of a tally, under the labels where its connections were opened.
    fn carry(&mut self, wanted: &Arc<Labels>, of: (Direction, Security), tally: &Tally, capacity: usize, now: Instant) {
        let place = match self.sets.get(wanted) {
            Some(counts) if counts.opened > 0 => Arc::clone(wanted),
            _ => Arc::new(Labels::overflow(of.0, of.1)),
        };
        let closed = count(tally.closed.iter().map(|(_, events)| events).sum());
        if let Some(open) = self.followed.get_mut(&of) {
            *open = open.saturating_sub(closed);
        }
        let counts = self.sets.entry(Arc::clone(&place)).or_insert_with(|| Counts::new(true, now));
        counts.received += tally.bytes.0;
        counts.sent += tally.bytes.1;
        counts.live = counts.live.saturating_sub(closed);
        counts.touched = now;
        let carried = self.carried.entry(of).or_default();
        *carried = (carried.0 + tally.bytes.0, carried.1 + tally.bytes.1);
        for (flags, events) in &tally.closed {
            let labels =
                self.admit(Arc::clone(&place), of, capacity, (*events, now), |counts| counts.cost_of_close(flags));
            if let Some(counts) = self.sets.get_mut(&labels) {
                bump(&mut counts.closed, flags, *events);
            }
        }
    }

    fn add(&mut self, live: &mut Live, bytes: (u64, u64), now: Instant) {
        let Some(counts) = self.sets.get_mut(&live.labels) else { return };
        let (to_app, to_client) = (bytes.0.saturating_sub(live.reported.0), bytes.1.saturating_sub(live.reported.1));
        counts.received += to_app;
        counts.sent += to_client;
        counts.touched = now;
        let carried = self.carried.entry((live.direction, live.security)).or_default();
        *carried = (carried.0 + to_app, carried.1 + to_client);
        live.reported = (live.reported.0 + to_app, live.reported.1 + to_client);
    }
}

impl Counts {
    fn new(overflow: bool, now: Instant) -> Self {
        Self { overflow, opened: 0, sent: 0, received: 0, closed: vec![], failed: vec![], live: 0, touched: now }
    }

    /// Opened, sent, received and the usual way to close are there from the first connection on.
    fn cost_of_open(&self) -> usize {
        if self.opened == 0 { 4 } else { 0 }
    }

    fn cost_of_close(&self, flags: &'static str) -> usize {
        if self.opened > 0 && flags == NO_FLAGS { 0 } else { cost(&self.closed, flags) }
    }

    fn lines(&self) -> usize {
        self.exposed().len()
    }

    /// `(index into FAMILIES, response_flags, value)`.
    fn exposed(&self) -> Vec<(usize, &'static str, u64)> {
        let mut lines = Vec::with_capacity(4 + self.failed.len());
        if self.opened > 0 {
            lines.extend([(0, NO_FLAGS, self.opened), (3, NO_FLAGS, self.sent), (4, NO_FLAGS, self.received)]);
            if cost(&self.closed, NO_FLAGS) == 1 {
                lines.push((1, NO_FLAGS, 0));
            }
        }
        lines.extend(self.closed.iter().map(|(flags, value)| (1, *flags, *value)));
        lines.extend(self.failed.iter().map(|(flags, value)| (2, *flags, *value)));
        lines
    }
}

/// Lines that an event with these flags adds.
fn cost(counts: &[(&'static str, u64)], flags: &'static str) -> usize {
    usize::from(!counts.iter().any(|(known, _)| *known == flags))
}

fn bump(counts: &mut Vec<(&'static str, u64)>, flags: &'static str, by: u64) {
    match counts.iter_mut().find(|(known, _)| *known == flags) {
        Some((_, count)) => *count += by,
        None => counts.push((flags, by)),
    }
}

fn of(flow: &Flow) -> (Direction, Security) {
    (flow.direction, flow.security)
}

fn count(connections: u64) -> usize {
    usize::try_from(connections).unwrap_or(usize::MAX)
}

fn pairs(labels: &Labels, flags: &str, names: usize) -> Vec<LabelPair> {
    let mut pairs: Vec<LabelPair> =
        NAMES.iter().zip(&labels.values).take(names).map(|(name, value)| label(name, value)).collect();
    pairs.insert(FLAGS_AT, label("response_flags", flags));
    pairs
}

impl Default for Traffic {
    fn default() -> Self {
        Self::new("".into(), limits::METRIC_SERIES)
    }
}
