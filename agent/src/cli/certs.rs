//! `heddle certs`: the certificates that this node's agent holds.

use std::process::ExitCode;

use super::{
    ask::{Ask, json, print},
    table::{span, table},
};
use crate::life::admin::CertificateLine;

pub(super) fn run(ask: &Ask) -> anyhow::Result<ExitCode> {
    let certificates: Vec<CertificateLine> = ask.get("/certificates")?;
    print(&if ask.json { json(&certificates)? } else { text(&certificates) })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn text(certificates: &[CertificateLine]) -> String {
    let rows: Vec<_> = certificates
        .iter()
        .map(|certificate| {
            let left = match certificate.seconds_left {
                None => String::new(),
                Some(left) if left < 0 => format!("expired {} ago", span(left.unsigned_abs())),
                Some(left) => span(left.unsigned_abs()),
            };
            vec![
                certificate.identity.clone(),
                certificate.state.replace('_', " "),
                certificate.serial.clone(),
                certificate.not_before.clone(),
                certificate.not_after.clone(),
                left,
                certificate.last_error.clone(),
            ]
        })
        .collect();
    let held = certificates.iter().filter(|certificate| certificate.seconds_left.is_some_and(|left| left > 0)).count();
    let total = format!("{held} of {} certificates valid\n", certificates.len());
    let header = ["IDENTITY", "STATE", "SERIAL", "NOT BEFORE", "NOT AFTER", "LEFT", "LAST ERROR"];
    if rows.is_empty() { total } else { table(&header, &rows) + "\n" + &total }
}
