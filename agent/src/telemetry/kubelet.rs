//! Whether the kubelet's probes are let through: for the metrics and for `heddle status`.

use prometheus::proto::{MetricFamily, MetricType};

use super::{
    PodReport,
    families::{counter, family, gauge, label},
};

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeletReport {
    /// The cgroup whose connections to probe ports are vouched for; empty where there is none.
    pub cgroup: String,
    /// Why there is none, stable; else empty.
    pub reason: &'static str,
    /// The same for people.
    pub detail: String,
}

impl Default for KubeletReport {
    fn default() -> Self {
        let detail = "the agent has not looked for the kubelet yet".to_owned();
        Self { cgroup: String::new(), reason: "starting", detail }
    }
}

pub(super) fn families(kubelet: &KubeletReport, pods: &[PodReport]) -> impl Iterator<Item = MetricFamily> {
    let labels = if kubelet.reason.is_empty() { vec![] } else { vec![label("reason", kubelet.reason)] };
    let attested = gauge(labels, f64::from(u8::from(kubelet.reason.is_empty())));
    let probes = pods
        .iter()
        .map(|pod| counter(vec![label("namespace", &pod.namespace), label("pod", &pod.name)], pod.counts.probes));
    [
        family(
            "heddle_kubelet_attested",
            "1 while the kubelet's connections to probe ports are let through, else 0 with the reason.",
            MetricType::GAUGE,
            vec![attested],
        ),
        family(
            "heddle_probe_connections_total",
            "Connections of the kubelet that were let through to a probe port of the pod.",
            MetricType::COUNTER,
            probes.collect(),
        ),
    ]
    .into_iter()
    .flatten()
}
