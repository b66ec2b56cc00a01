//! Metric families of the budgets: what is used, what there is, what was refused. Made at scrape time.

use std::sync::Arc;

use prometheus::proto::{MetricFamily, MetricType};

use super::{
    families::{as_f64, counter, family, gauge, label},
    pods::PodReport,
};
use crate::life::budget::{PodPressure, Pressure, Share};

pub(super) fn families(pressure: &Pressure, pods: &[PodReport]) -> impl Iterator<Item = MetricFamily> {
    let both = |part: fn(&Share) -> u64| {
        [("descriptors", &pressure.descriptors), ("buffer_bytes", &pressure.bytes)]
            .map(|(resource, share)| gauge(vec![label("resource", resource)], as_f64(part(share))))
            .to_vec()
    };
    let refused = pressure.refused.iter().map(|(reason, count)| counter(vec![label("reason", reason)], *count));
    // A pod that has left, and whose connections still end, has no name any more.
    let named = pressure.pods.iter().filter_map(|part| Some((part, name(pods, &part.uid)?)));
    let of_pods = named.flat_map(|(part, pod)| {
        used(part).map(|(resource, value)| {
            let labels = vec![label("namespace", &pod.namespace), label("pod", &pod.name), label("resource", resource)];
            gauge(labels, as_f64(value))
        })
    });
    [
        family(
            "heddle_budget_used",
            "What pods' traffic uses, by resource.",
            MetricType::GAUGE,
            both(|share| share.used),
        ),
        family(
            "heddle_budget_available",
            "What there is for pods' traffic, used or not, by resource.",
            MetricType::GAUGE,
            both(|share| share.total),
        ),
        family(
            "heddle_budget_refused_total",
            "Connections refused or reset for want of budget, by reason.",
            MetricType::COUNTER,
            refused.collect(),
        ),
        family("heddle_pod_budget_used", "What a pod uses of the budgets.", MetricType::GAUGE, of_pods.collect()),
    ]
    .into_iter()
    .flatten()
}

fn name<'a>(pods: &'a [PodReport], uid: &Arc<str>) -> Option<&'a PodReport> {
    pods.iter().find(|pod| pod.uid == *uid)
}

fn used(part: &PodPressure) -> [(&'static str, u64); 4] {
    [
        ("connections", part.connections as u64),
        ("half_open", part.half_open as u64),
        ("descriptors", part.descriptors),
        ("buffer_bytes", part.bytes),
    ]
}
