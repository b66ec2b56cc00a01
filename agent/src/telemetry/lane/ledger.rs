//! Which connections of the kernel lane are known, and what of each is counted already. In memory only; it decides what is
//! to be told, others tell it.
//!
//! It is told of connections in two ways: by the kernel's table of those that go on, now and then, and by the record of
//! each one's end. An entry leaves the table before its record can be read, and the table is read while no record is
//! taken; so nothing that has ended is taken for something that goes on.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use foldhash::fast::RandomState;
use heddle_common::{Attestation, Ended, Tuple, attested_by};

use super::{
    Around,
    ending::{Ending, accepted, established},
    names::Names,
    pair::{Key, Pair, client},
};
use crate::{
    life::limits,
    policy::Denial,
    telemetry::traffic::{Tally, Traffic},
};

/// Cookie of the source's socket and when it connected: a socket may connect again after it was refused.
type Name = (u64, u64);

/// Of numbers that the kernel gives out, looked up some times for each connection.
type Table<K, V> = HashMap<K, V, RandomState>;

#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub names: Names,
    pairs: Table<Key, Arc<Pair>>,
    /// What the pairs were made by.
    around: Option<Arc<Around>>,
    live: Table<Name, Known>,
    looks: u64,
}

/// A connection that goes on and is counted as opened.
#[derive(Debug)]
pub(super) struct Known {
    pub pair: Arc<Pair>,
    pub source: SocketAddr,
    /// As it was last seen.
    pub seen: Attestation,
    workloads: (u64, u64),
    /// What is counted already: bytes from client to app and from app to client, and retransmissions of either side.
    counted: ((u64, u64), (u32, u32)),
    /// The last look that saw it, and at how many in a row it was missing.
    look: u64,
    missing: u32,
}

/// What is to be told.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// By address of the pair.
    tallies: Table<usize, (Arc<Pair>, Tally)>,
    /// Connections that opened, each once.
    pub opened: Vec<(Arc<Pair>, SocketAddr)>,
    pub ended: Vec<Told>,
    /// Round-trip times as source and destination see them, in microseconds; 0 where there is none.
    pub rtts: Vec<(u32, u32)>,
    pub retransmissions: (u64, u64),
    pub unreported: u64,
}

/// A connection that has ended.
#[derive(Debug)]
pub(super) struct Told {
    pub pair: Arc<Pair>,
    pub source: SocketAddr,
    pub ending: Ending,
    /// Whether it carried anything: else it failed.
    pub established: bool,
    /// Of the whole connection.
    pub bytes: (u64, u64),
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub opened: u64,
    pub closed: u64,
}

impl Batch {
    /// With room for what the records of so many ends tell.
    pub fn for_ends(count: usize) -> Self {
        let (opened, ended, rtts) = (Vec::with_capacity(count), Vec::with_capacity(count), Vec::with_capacity(count));
        Self { opened, ended, rtts, ..Self::default() }
    }

    pub fn tallies(&self) -> impl Iterator<Item = &(Arc<Pair>, Tally)> {
        self.tallies.values()
    }

    fn tally(&mut self, pair: &Arc<Pair>) -> &mut Tally {
        let place = Arc::as_ptr(pair).addr();
        &mut self.tallies.entry(place).or_insert_with(|| (Arc::clone(pair), Tally::default())).1
    }

    fn open(&mut self, pair: &Arc<Pair>, source: SocketAddr) {
        self.tally(pair).opened += 1;
        self.opened.push((Arc::clone(pair), source));
    }

    fn end(&mut self, told: Told) {
        let flags = told.ending.flags();
        let tally = self.tally(&told.pair);
        if told.established {
            tally.close(flags)
        } else {
            tally.fail(flags, 1)
        }
        self.ended.push(told);
    }
}

impl Known {
    fn new(pair: Arc<Pair>, tuple: &Tuple, seen: Attestation) -> Self {
        Self {
            pair,
            source: client(tuple),
            workloads: (seen.source, seen.destination),
            seen,
            counted: ((0, 0), (0, 0)),
            look: 0,
            missing: 0,
        }
    }

    /// Adds what it did since it was last counted. Whether it carried something.
    fn count(&mut self, now: &Attestation, batch: &mut Batch) -> bool {
        self.seen = *now;
        let ((sent, received), (of_source, of_destination)) = self.counted;
        let more = (now.sent.saturating_sub(sent), now.received.saturating_sub(received));
        batch.retransmissions.0 += u64::from(now.source_retransmissions.saturating_sub(of_source));
        batch.retransmissions.1 += u64::from(now.destination_retransmissions.saturating_sub(of_destination));
        self.counted = (
            (now.sent.max(sent), now.received.max(received)),
            (now.source_retransmissions.max(of_source), now.destination_retransmissions.max(of_destination)),
        );
        if more == (0, 0) {
            return false;
        }
        let tally = batch.tally(&self.pair);
        tally.bytes = (tally.bytes.0 + more.0, tally.bytes.1 + more.1);
        true
    }

    fn end(self, ending: Ending, closed: u64, batch: &mut Batch) {
        let Self { pair, source, seen, .. } = self;
        let bytes = (seen.sent, seen.received);
        batch.end(Told { pair, source, ending, established: true, bytes, opened: seen.opened, closed });
    }
}

impl Ledger {
    /// Takes what names and decisions come from now. Connections that are known keep what they were told with.
    pub fn learn(&mut self, around: Arc<Around>) {
        let same = |before: &Arc<Around>| {
            Arc::ptr_eq(&before.snapshot, &around.snapshot) && Arc::ptr_eq(&before.rules, &around.rules)
        };
        if !self.around.as_ref().is_some_and(same) {
            self.pairs.clear();
        }
        self.around = Some(around);
    }

    /// Takes the record of an end; `denial` where policy closed it.
    pub fn ended(&mut self, record: &Ended, denial: Option<Denial>, traffic: &Traffic, batch: &mut Batch) {
        let Some(around) = self.around.clone() else { return };
        let Ended { tuple, attestation, closed } = record;
        let ending = denial.map_or_else(|| Ending::of(attestation), Ending::Denied);
        batch.rtts.push((attestation.source_rtt_us, attestation.destination_rtt_us));
        if let Some(mut known) = self.live.remove(&(attestation.id, attestation.opened)) {
            known.count(attestation, batch);
            return known.end(ending, *closed, batch);
        }
        let mut known = Known::new(self.pair(tuple, attestation, &around, traffic), tuple, *attestation);
        if established(attestation) {
            batch.open(&known.pair, known.source);
            known.count(attestation, batch);
            return known.end(ending, *closed, batch);
        }
        let Known { pair, source, seen, .. } = known;
        batch.retransmissions.0 += u64::from(seen.source_retransmissions);
        let opened = seen.opened;
        batch.end(Told { pair, source, ending, established: false, bytes: (0, 0), opened, closed: *closed });
    }

    /// Takes the kernel's table. `began` is when this agent began (CLOCK_MONOTONIC): what an earlier connection carried until
    /// it is first seen is not this agent's to count.
    ///
    /// Connections whose pods nobody knows yet are left for the next look, or for the record of their end.
    pub fn look(&mut self, table: &[(Tuple, Attestation)], began: u64, traffic: &Traffic, batch: &mut Batch) {
        let Some(around) = self.around.clone() else { return };
        self.looks += 1;
        for (tuple, attestation) in table {
            if attestation.by != attested_by::KERNEL || !accepted(attestation) {
                continue;
            }
            let name = (attestation.id, attestation.opened);
            if let Some(known) = self.live.get_mut(&name) {
                (known.look, known.missing) = (self.looks, 0);
                if known.count(attestation, batch) {
                    batch.rtts.push((attestation.source_rtt_us, attestation.destination_rtt_us));
                }
                continue;
            }
            if self.names.get(attestation.source).is_none() || self.names.get(attestation.destination).is_none() {
                continue;
            }
            let mut known = Known::new(self.pair(tuple, attestation, &around, traffic), tuple, *attestation);
            known.look = self.looks;
            if attestation.opened < began {
                let retransmissions = (attestation.source_retransmissions, attestation.destination_retransmissions);
                known.counted = ((attestation.sent, attestation.received), retransmissions);
            }
            batch.open(&known.pair, known.source);
            known.count(attestation, batch);
            self.live.insert(name, known);
        }
    }

    /// Ends, after a look before which every record was taken, the connections that have left the table without one. `now` is of
    /// CLOCK_MONOTONIC.
    pub fn settle(&mut self, now: u64, batch: &mut Batch) {
        let (names, look) = (&self.names, self.looks);
        let is_gone = |known: &mut Known| {
            known.missing = if known.look == look { 0 } else { known.missing + 1 };
            known.missing >= limits::LANE_MISSING
        };
        for (_, known) in self.live.extract_if(|_, known| is_gone(known)) {
            let (source, destination) = known.workloads;
            let left = !names.is_resident(source) || !names.is_resident(destination);
            batch.unreported += u64::from(!left);
            known.end(if left { Ending::PodLeft } else { Ending::Unreported }, now, batch);
        }
    }

    /// The connections that go on.
    pub fn live(&self) -> impl Iterator<Item = &Known> {
        self.live.values()
    }

    fn pair(&mut self, tuple: &Tuple, attestation: &Attestation, around: &Around, traffic: &Traffic) -> Arc<Pair> {
        let key = Key::of(tuple, attestation);
        if let Some(pair) = self.pairs.get(&key) {
            return Arc::clone(pair);
        }
        let pair = Arc::new(Pair::new(&key, &self.names, around, traffic));
        // What nobody knows now may be known in a moment.
        if pair.flows.iter().all(|flow| flow.source_workload.is_some() && flow.destination_workload.is_some()) {
            if self.pairs.len() >= limits::LANE_ALIKE {
                self.pairs.clear();
            }
            self.pairs.insert(key, Arc::clone(&pair));
        }
        pair
    }
}
