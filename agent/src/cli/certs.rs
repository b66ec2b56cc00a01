//! `heddle certs`: the certificates that this node's agent holds, and what signed them.

use std::{collections::BTreeMap, process::ExitCode};

use super::{
    ask::{Ask, json, print},
    table::{plain, span, table},
};
use crate::life::admin::{CertificateLine, IssuerLine};

pub(super) fn run(ask: &Ask) -> anyhow::Result<ExitCode> {
    let certificates: Vec<CertificateLine> = ask.get("/certificates")?;
    print(&if ask.json { json(&certificates)? } else { text(&certificates) })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn text(certificates: &[CertificateLine]) -> String {
    let rows: Vec<_> = certificates
        .iter()
        .map(|certificate| {
            let next = certificate.next_try_seconds.map(|wait| match u64::try_from(wait) {
                Ok(wait @ 1..) => format!("in {}", span(wait)),
                _ => "now".to_owned(),
            });
            vec![
                certificate.identity.clone(),
                certificate.state.replace('_', " "),
                certificate.serial.clone(),
                certificate.chain.first().map(|issuer| issuer.serial.clone()).unwrap_or_default(),
                certificate.not_after.clone(),
                certificate.seconds_left.map(left).unwrap_or_default(),
                certificate.received.clone(),
                next.unwrap_or_default(),
                certificate.last_error.clone(),
            ]
        })
        .collect();
    let held = certificates.iter().filter(|certificate| certificate.seconds_left.is_some_and(|left| left > 0)).count();
    let total = format!("{held} of {} certificates valid\n", certificates.len());
    if rows.is_empty() {
        return total;
    }
    let header = ["IDENTITY", "STATE", "SERIAL", "ISSUER", "NOT AFTER", "LEFT", "RECEIVED", "NEXT TRY", "LAST ERROR"];
    table(&header, &rows) + "\n" + &issuers(certificates) + &total
}

/// Each intermediate and root once, with how many certificates lead through it.
fn issuers(certificates: &[CertificateLine]) -> String {
    let mut used: BTreeMap<(&str, &str), (&IssuerLine, u64)> = BTreeMap::new();
    for issuer in certificates.iter().flat_map(|certificate| &certificate.chain) {
        used.entry((&issuer.serial, &issuer.subject)).or_insert((issuer, 0)).1 += 1;
    }
    let row = |(issuer, count): &(&IssuerLine, u64)| {
        vec![
            issuer.serial.clone(),
            issuer.kind.clone(),
            plain(&issuer.subject),
            issuer.not_after.clone(),
            left(issuer.seconds_left),
            count.to_string(),
        ]
    };
    let rows: Vec<_> = used.values().map(row).collect();
    let header = ["ISSUER", "KIND", "SUBJECT", "NOT AFTER", "LEFT", "CERTIFICATES"];
    if rows.is_empty() { String::new() } else { table(&header, &rows) + "\n" }
}

/// What is left of a lifetime (seconds).
fn left(seconds: i64) -> String {
    if seconds < 0 { format!("expired {} ago", span(seconds.unsigned_abs())) } else { span(seconds.unsigned_abs()) }
}
