//! Families of trust: problems of the bundle and of revocation lists, what lists are in force, and what they ended.

use std::{collections::BTreeMap, time::UNIX_EPOCH};

use prometheus::proto::{MetricFamily, MetricType};

use super::families::{as_f64, counter, family, gauge, label};
use crate::identity::{CrlFault, RootsError, TrustReport};

/// `ended`: sessions and connections of revoked peers.
pub(super) fn families(trust: &TrustReport, ended: (u64, u64)) -> impl Iterator<Item = MetricFamily> + use<> {
    let bundle = trust.bundle.as_ref().map(|problem| problem.error.reason());
    let crl = trust.crl.as_ref();
    let fault = crl.and_then(|crl| crl.problem.as_ref()).map(|problem| problem.fault.reason());
    // A row for each reason, zeros included, so that an alert has something to compare.
    let problems = |reasons: &[&str], now: Option<&str>| {
        let row = |reason: &&str| gauge(vec![label("reason", reason)], f64::from(u8::from(now == Some(*reason))));
        reasons.iter().map(row).collect::<Vec<_>>()
    };
    // One issuer may have several lists.
    let mut issuers = BTreeMap::new();
    for list in crl.into_iter().flat_map(|crl| &crl.lists) {
        let (revoked, next) = issuers.entry(list.issuer.as_str()).or_insert((0_u64, list.next_update));
        *revoked += list.revoked as u64;
        *next = list.next_update.min(*next);
    }
    let revoked = issuers.iter().map(|(issuer, (revoked, _))| gauge(vec![label("issuer", issuer)], as_f64(*revoked)));
    let due = issuers.iter().map(|(issuer, (_, next))| {
        let since = next.duration_since(UNIX_EPOCH).unwrap_or_default();
        gauge(vec![label("issuer", issuer)], since.as_secs_f64())
    });
    // What `heddle ca rotate` asks before a root goes.
    let mut alone = BTreeMap::new();
    for list in crl.into_iter().flat_map(|crl| &crl.lists) {
        if let [root] = list.roots.as_slice() {
            *alone.entry(root.as_str()).or_insert(0_u64) += 1;
        }
    }
    let alone = alone.iter().map(|(root, count)| gauge(vec![label("root_serial", root)], as_f64(*count)));
    let ended = [("sessions", ended.0), ("connections", ended.1)];
    let ended = ended.map(|(what, count)| counter(vec![label("what", what)], count)).to_vec();
    [
        family(
            "heddle_trust_bundle_problems",
            "1 for the reason why the trust bundle's file is not taken as it is now; the last good one stays in force.",
            MetricType::GAUGE,
            problems(&RootsError::REASONS, bundle),
        ),
        family(
            "heddle_crl_problems",
            "1 for the reason why the revocation lists can't be used as they are now.",
            MetricType::GAUGE,
            if crl.is_some() { problems(&CrlFault::REASONS, fault) } else { Vec::new() },
        ),
        family(
            "heddle_crl_next_update_timestamp_seconds",
            "When a revocation list in force has to be replaced, in seconds since the epoch.",
            MetricType::GAUGE,
            due.collect(),
        ),
        family(
            "heddle_crl_revoked_certificates",
            "Certificates that the lists in force revoke.",
            MetricType::GAUGE,
            revoked.collect(),
        ),
        family(
            "heddle_crl_lists_of_one_root",
            "Lists in force that only this root vouches for: without it they could not be used.",
            MetricType::GAUGE,
            alone.collect(),
        ),
        family(
            "heddle_revoked_ended_total",
            "TLS sessions and connections that were ended because their peer's certificate was revoked.",
            MetricType::COUNTER,
            if crl.is_some() { ended } else { Vec::new() },
        ),
    ]
    .into_iter()
    .flatten()
}
