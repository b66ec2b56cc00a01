//! Metrics of the kernel lane's own: TCP's health, and what telemetry itself lost of it.

use std::sync::{Mutex, PoisonError};

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, exponential_buckets,
    proto::{MetricFamily, MetricType},
};

use super::ledger::Batch;
use crate::telemetry::{
    families::{counter, family},
    metrics::direction_name,
};

#[derive(Debug)]
pub(in crate::telemetry) struct Health {
    /// As the source's and the destination's socket see it.
    rtt: [Histogram; 2],
    retransmissions: [IntCounter; 2],
    unreported: IntCounter,
    lost: Mutex<Lost>,
}

/// Records that found no room. The kernel counts for each pod, and forgets with the pod.
#[derive(Debug, Default)]
struct Lost {
    total: u64,
    last: u64,
}

impl Health {
    /// # Errors
    /// Never in practice: only when two metrics had the same name.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let options = HistogramOpts::new(
            "heddle_lane_tcp_rtt_seconds",
            "Smoothed round-trip time of kernel-lane connections, now and then while they carry something, and at their end.",
        );
        // From 4 µs: no device is between two pods of one host.
        let rtt = HistogramVec::new(options.buckets(exponential_buckets(4e-6, 2.0, 16)?), &["direction"])?;
        let retransmissions = IntCounterVec::new(
            Opts::new("heddle_lane_tcp_retransmissions_total", "Segments that kernel-lane connections sent again."),
            &["direction"],
        )?;
        let unreported = IntCounter::new(
            "heddle_lane_connections_unreported_total",
            "Kernel-lane connections that are counted as closed without a record of their end.",
        )?;
        registry.register(Box::new(rtt.clone()))?;
        registry.register(Box::new(retransmissions.clone()))?;
        registry.register(Box::new(unreported.clone()))?;
        let directions = super::pair::REPORTERS.map(direction_name);
        Ok(Self {
            rtt: directions.map(|direction: &str| rtt.with_label_values(&[direction])),
            retransmissions: directions.map(|direction: &str| retransmissions.with_label_values(&[direction])),
            unreported,
            lost: Mutex::default(),
        })
    }

    pub(super) fn add(&self, batch: &Batch) {
        // Summed up apart and added once.
        let [source, destination] = self.rtt.each_ref().map(Histogram::local);
        for (of_source, of_destination) in &batch.rtts {
            for (rtt, microseconds) in [(&source, of_source), (&destination, of_destination)] {
                if *microseconds > 0 {
                    rtt.observe(f64::from(*microseconds) / 1e6);
                }
            }
        }
        source.flush();
        destination.flush();
        let [source, destination] = &self.retransmissions;
        source.inc_by(batch.retransmissions.0);
        destination.inc_by(batch.retransmissions.1);
        self.unreported.inc_by(batch.unreported);
    }

    /// The family of lost records; `now` is the kernel's count for the pods that are enrolled.
    pub fn lost(&self, now: u64) -> Option<MetricFamily> {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.total += now.saturating_sub(lost.last);
        lost.last = now;
        let help = "Records of ended kernel-lane connections that the kernel found no room for.";
        family("heddle_lane_events_lost_total", help, MetricType::COUNTER, vec![counter(vec![], lost.total)])
    }
}
