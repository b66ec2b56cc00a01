//! Metrics of this node's certificates, of what signs them, and of the calls to the CA.

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::proto::{MetricFamily, MetricType};

use super::families::{as_f64, counter, family, gauge, label};
use crate::identity::{CertificateStatus, FetchCounts, RootStatus};

/// What identity knows at the moment of a scrape.
#[derive(Debug, Clone, Default)]
pub struct IdentityReport {
    pub certificates: Vec<CertificateStatus>,
    /// Roots that peers are verified with.
    pub roots: Vec<RootStatus>,
    pub fetches: FetchCounts,
}

/// Seconds since the epoch; 0 before it.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

pub(super) fn families(report: &IdentityReport) -> Vec<MetricFamily> {
    let identity = |status: &CertificateStatus| label("identity", status.identity.as_str());
    let expiry = report.certificates.iter().filter_map(|status| {
        let root = status.root.as_ref().map(|root| root.serial.as_str()).unwrap_or_default();
        let labels = vec![identity(status), label("serial", &status.serial), label("root_serial", root)];
        Some(gauge(labels, seconds(status.usable_until?)))
    });
    let received =
        report.certificates.iter().filter_map(|status| Some(gauge(vec![identity(status)], seconds(status.received?))));
    let failing = report.certificates.iter().filter(|status| !status.last_reason.is_empty());
    let failing = failing.map(|status| gauge(vec![identity(status), label("reason", status.last_reason)], 1.0));
    // A row for each intermediate in use, not for each certificate that it signed.
    let intermediates: BTreeMap<_, _> = report
        .certificates
        .iter()
        .flat_map(|status| &status.intermediates)
        .map(|issuer| ((&*issuer.subject, &*issuer.serial), issuer.not_after))
        .collect();
    let signs = |((subject, serial), end): ((&str, &str), SystemTime)| {
        gauge(vec![label("subject", subject), label("serial", serial)], seconds(end))
    };
    let roots: BTreeMap<_, _> =
        report.roots.iter().map(|root| ((&*root.subject, &*root.serial), root.not_after)).collect();
    let ended = report.fetches.ended.iter().map(|(result, count)| counter(vec![label("result", result)], *count));
    let under_way = vec![gauge(vec![], as_f64(report.fetches.under_way as u64))];
    [
        family(
            "heddle_certificate_expiry_timestamp_seconds",
            "When the certificate in use, or the first one of its chain, expires, in seconds since the epoch.",
            MetricType::GAUGE,
            expiry.collect(),
        ),
        family(
            "heddle_certificate_received_timestamp_seconds",
            "When the certificate in use came from the CA, in seconds since the epoch.",
            MetricType::GAUGE,
            received.collect(),
        ),
        family(
            "heddle_certificate_failing",
            "1 while the last try to fetch or renew the identity's certificate failed, with the reason.",
            MetricType::GAUGE,
            failing.collect(),
        ),
        family(
            "heddle_certificate_fetches_total",
            "Calls to the CA that ended, by result (ok or the reason).",
            MetricType::COUNTER,
            ended.collect(),
        ),
        family(
            "heddle_certificate_fetches_under_way",
            "Calls to the CA that wait for an answer.",
            MetricType::GAUGE,
            under_way,
        ),
        family(
            "heddle_trust_intermediate_expiry_timestamp_seconds",
            "When the intermediates that certificates in use chain through expire, in seconds since the epoch.",
            MetricType::GAUGE,
            intermediates.into_iter().map(signs).collect(),
        ),
        family(
            "heddle_trust_root_expiry_timestamp_seconds",
            "When the roots that peers are verified with expire, in seconds since the epoch.",
            MetricType::GAUGE,
            roots.into_iter().map(signs).collect(),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}
