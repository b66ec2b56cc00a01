//! The metrics of tunnels: encrypted bytes, TCP's health, and what the pools of tunnels do.
//!
//! Beside [`super::traffic`], which counts the same bytes plain. A tunnel's bytes are added as differences to what was
//! added before, under one lock, so nothing counts twice whatever the order of scrape and close.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus::{
    HistogramOpts, HistogramVec, Registry, exponential_buckets,
    proto::{LabelPair, Metric, MetricFamily, MetricType},
};

use super::{
    families::{as_f64, counter, family, gauge, label},
    metrics::direction_name,
};
use crate::{
    capture::TcpHealth,
    tunnel::{Direction, PoolCounts, PoolEnd, Wire},
};

const DIRECTIONS: [Direction; 2] = [Direction::Inbound, Direction::Outbound];

#[derive(Debug)]
pub(super) struct Tunnels {
    table: Mutex<Table>,
    rtt: HistogramVec,
}

#[derive(Debug, Default)]
struct Table {
    live: HashMap<u64, Live>,
    /// In the order of [`DIRECTIONS`].
    totals: [Totals; 2],
}

#[derive(Debug)]
struct Live {
    wire: Arc<Wire>,
    /// Bytes that are in the totals already.
    reported: (u64, u64),
    health: TcpHealth,
}

#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    sent: u64,
    received: u64,
    segments: u64,
    retransmitted: u64,
}

fn place(direction: Direction) -> usize {
    usize::from(direction == Direction::Outbound)
}

impl Tunnels {
    /// # Errors
    /// Never in practice: only when two metrics had the same name.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        // From 50 µs, which is two pods of one host, to 1.6 s, which is a satellite.
        let buckets = exponential_buckets(50e-6, 2.0, 16)?;
        let options = HistogramOpts::new(
            "heddle_tunnel_tcp_rtt_seconds",
            "Smoothed round-trip time of tunnels' TCP connections, sampled once a second while they carry something.",
        );
        let rtt = HistogramVec::new(options.buckets(buckets), &["direction"])?;
        registry.register(Box::new(rtt.clone()))?;
        Ok(Self { table: Mutex::default(), rtt })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn opened(&self, wire: &Arc<Wire>) {
        let live = Live { wire: Arc::clone(wire), reported: (0, 0), health: TcpHealth::default() };
        self.table().live.insert(wire.id, live);
    }

    pub fn health(&self, wire: &Wire, health: Option<TcpHealth>) {
        let Some(health) = health else { return };
        if health.rtt > 0 {
            let seconds = f64::from(health.rtt) / 1e6;
            self.rtt.with_label_values(&[direction_name(wire.direction)]).observe(seconds);
        }
        self.table().note(wire.id, health);
    }

    pub fn closed(&self, wire: &Wire, health: Option<TcpHealth>) {
        self.health(wire, health);
        let mut table = self.table();
        table.fold(wire.id);
        table.live.remove(&wire.id);
    }

    /// The families of tunnels and pools.
    pub fn families(&self, pool: &PoolCounts) -> impl Iterator<Item = MetricFamily> {
        let mut table = self.table();
        let ids: Vec<u64> = table.live.keys().copied().collect();
        ids.into_iter().for_each(|id| table.fold(id));
        let totals = table.totals;
        let mut now = [(0_u64, 0_u64); 2];
        for live in table.live.values() {
            if let Some((open, lost)) = now.get_mut(place(live.wire.direction)) {
                *open += 1;
                *lost += u64::from(live.health.lost);
            }
        }
        drop(table);
        tunnel_families(totals, now).chain(pool_families(pool))
    }
}

impl Table {
    fn fold(&mut self, id: u64) {
        let Some(live) = self.live.get_mut(&id) else { return };
        let (sent, received) = live.wire.bytes();
        if let Some(totals) = self.totals.get_mut(place(live.wire.direction)) {
            totals.sent += sent.saturating_sub(live.reported.0);
            totals.received += received.saturating_sub(live.reported.1);
        }
        live.reported = (sent, received);
    }

    /// The kernel's counters wrap at 32 bits; between two looks they do so once at most.
    fn note(&mut self, id: u64, health: TcpHealth) {
        let Some(live) = self.live.get_mut(&id) else { return };
        if let Some(totals) = self.totals.get_mut(place(live.wire.direction)) {
            totals.segments += u64::from(health.segments.wrapping_sub(live.health.segments));
            totals.retransmitted += u64::from(health.retransmitted.wrapping_sub(live.health.retransmitted));
        }
        live.health = health;
    }
}

fn direction_label(direction: Direction) -> LabelPair {
    label("direction", direction_name(direction))
}

fn tunnel_families(totals: [Totals; 2], now: [(u64, u64); 2]) -> impl Iterator<Item = MetricFamily> {
    let each = move |value: fn(&Totals) -> u64| -> Vec<Metric> {
        let rows = DIRECTIONS.into_iter().zip(&totals);
        rows.map(|(direction, totals)| counter(vec![direction_label(direction)], value(totals))).collect()
    };
    let bytes = DIRECTIONS.into_iter().zip(&totals).flat_map(|(direction, totals)| {
        // Who is at the other end decides which way is which.
        let (to_server, to_client) = match direction {
            Direction::Outbound => (totals.sent, totals.received),
            Direction::Inbound => (totals.received, totals.sent),
        };
        [("server", to_server), ("client", to_client)]
            .map(|(towards, value)| counter(vec![direction_label(direction), label("towards", towards)], value))
    });
    let gauges = |value: fn((u64, u64)) -> u64| -> Vec<Metric> {
        let rows = DIRECTIONS.into_iter().zip(now);
        rows.map(|(direction, now)| gauge(vec![direction_label(direction)], as_f64(value(now)))).collect()
    };
    [
        family(
            "heddle_tunnel_bytes_total",
            "Encrypted bytes of tunnels' TCP connections: TLS records with handshakes and HTTP/2 frames.",
            MetricType::COUNTER,
            bytes.collect(),
        ),
        family("heddle_tunnels_open", "TCP connections of tunnels.", MetricType::GAUGE, gauges(|(open, _)| open)),
        family(
            "heddle_tunnel_tcp_lost_segments",
            "Segments that TCP takes for lost right now, all tunnels together.",
            MetricType::GAUGE,
            gauges(|(_, lost)| lost),
        ),
        family(
            "heddle_tunnel_tcp_segments_total",
            "Data segments that tunnels sent, sent again included.",
            MetricType::COUNTER,
            each(|totals| totals.segments),
        ),
        family(
            "heddle_tunnel_tcp_retransmissions_total",
            "Segments that tunnels sent again.",
            MetricType::COUNTER,
            each(|totals| totals.retransmitted),
        ),
    ]
    .into_iter()
    .flatten()
}

fn pool_families(pool: &PoolCounts) -> impl Iterator<Item = MetricFamily> {
    let ended = PoolEnd::ALL.map(|why| counter(vec![label("reason", why.as_str())], pool.ended(why)));
    let (first, reused) = pool.placed();
    let placed = [("new", first), ("reused", reused)].map(|(on, count)| counter(vec![label("connection", on)], count));
    [
        family(
            "heddle_pool_connections_open",
            "Tunnels that pods' pools hold.",
            MetricType::GAUGE,
            vec![gauge(vec![], as_f64(pool.open()))],
        ),
        family(
            "heddle_pool_connections_opened_total",
            "Tunnels that pools opened.",
            MetricType::COUNTER,
            vec![counter(vec![], pool.opened())],
        ),
        family(
            "heddle_pool_connections_closed_total",
            "Tunnels of pools that ended, by reason.",
            MetricType::COUNTER,
            ended.to_vec(),
        ),
        family(
            "heddle_pool_streams_open",
            "Streams on the pools' tunnels: one per connection of an app.",
            MetricType::GAUGE,
            vec![gauge(vec![], as_f64(pool.live()))],
        ),
        family(
            "heddle_pool_streams_total",
            "Streams begun on a tunnel that was new, or reused.",
            MetricType::COUNTER,
            placed.to_vec(),
        ),
    ]
    .into_iter()
    .flatten()
}
