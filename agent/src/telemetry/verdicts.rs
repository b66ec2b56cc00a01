//! Metric families of the kernel lane's decisions: what the kernel holds, and what had no room. Made at scrape time.

use prometheus::proto::{MetricFamily, MetricType};

use super::families::{as_f64, counter, family, gauge, label};

/// The lane's decisions at one moment, and what has happened since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VerdictCounts {
    /// Pairs of pods and ports that are remembered.
    pub pairs: u64,
    /// Verdicts that the kernel holds.
    pub allowed: u64,
    pub denied: u64,
    /// Pairs of pods between which nobody could show that packets go straight.
    pub unproven_paths: u64,
    /// Connections that came to the agent for want of a verdict, and those of them that were too many to be learnt from.
    pub misses: u64,
    pub unheard: u64,
    /// Verdicts that found the kernel's table full, that found no counter, and that went because newer pairs needed the room.
    pub full: u64,
    pub exhausted: u64,
    pub forgotten: u64,
    /// System calls that failed.
    pub failed: u64,
}

pub(super) fn families(counts: &VerdictCounts) -> impl Iterator<Item = MetricFamily> {
    let VerdictCounts { pairs, allowed, denied, unproven_paths, misses, unheard, full, exhausted, forgotten, failed } =
        *counts;
    let of = |action: &str, value| gauge(vec![label("action", action)], as_f64(value));
    let gauges = [
        ("heddle_lane_pairs", "Pairs of pods and ports that the kernel lane's decisions remember.", pairs),
        (
            "heddle_lane_paths_unproven",
            "Pairs of pods whose connections go through the agent, as packets could not be shown to go straight.",
            unproven_paths,
        ),
    ];
    let counters = [
        ("heddle_lane_misses_total", "Connections that came to the agent for want of a verdict.", misses),
        (
            "heddle_lane_misses_unlearnt_total",
            "Connections without a verdict that were too many at a time to be learnt from.",
            unheard,
        ),
        ("heddle_lane_table_full_total", "Verdicts that found no room in the kernel's table.", full),
        ("heddle_lane_counters_exhausted_total", "Denials that found no counter: the agent denies them.", exhausted),
        ("heddle_lane_forgotten_total", "Verdicts that went because newer pairs needed the room.", forgotten),
        ("heddle_lane_errors_total", "Verdicts that could not be written or removed.", failed),
    ];
    let verdicts = family(
        "heddle_lane_verdicts",
        "Verdicts that the kernel holds, by action.",
        MetricType::GAUGE,
        vec![of("allow", allowed), of("deny", denied)],
    );
    let gauges =
        gauges.map(|(name, help, value)| family(name, help, MetricType::GAUGE, vec![gauge(vec![], as_f64(value))]));
    let counters =
        counters.map(|(name, help, value)| family(name, help, MetricType::COUNTER, vec![counter(vec![], value)]));
    verdicts.into_iter().chain(gauges.into_iter().chain(counters).flatten())
}
