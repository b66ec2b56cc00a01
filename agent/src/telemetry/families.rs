//! Metric families made at scrape time, for values that live elsewhere (the kernel, the certificate store, tables).

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// A family; `None` without rows, which the text encoder refuses.
pub(super) fn family(name: &str, help: &str, kind: MetricType, rows: Vec<Metric>) -> Option<MetricFamily> {
    if rows.is_empty() {
        return None;
    }
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(rows);
    Some(family)
}

pub(super) fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus samples are f64; exact to 2^53")]
pub(super) fn as_f64(value: u64) -> f64 {
    value as f64
}

pub(super) fn counter(labels: Vec<LabelPair>, value: u64) -> Metric {
    counter_f64(labels, as_f64(value))
}

pub(super) fn counter_f64(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

pub(super) fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}
