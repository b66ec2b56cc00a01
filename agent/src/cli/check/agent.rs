//! `heddle check` of the agent: what is wrong with this node's identities, or soon will be. What counts as what is one pure function.

use std::collections::BTreeMap;

use super::{
    super::{ask::Ask, table::span},
    Finding, Severity,
};
use crate::life::{
    admin::{CertificateLine, IssuerLine, Trust},
    limits,
};

/// What the agent's own answers show.
///
/// # Errors
/// When it can't be asked.
pub(super) fn check(ask: &Ask) -> anyhow::Result<Vec<Finding>> {
    let certificates: Vec<CertificateLine> = ask.get("/certificates")?;
    let trust: Trust = ask.get("/trust")?;
    let mut found = findings(&certificates, &trust);
    if found.is_empty() {
        let detail = format!("{} certificates, {} roots, all in order", certificates.len(), trust.roots.len());
        found.push(Finding::pass("identities", "certificates and roots", detail));
    }
    Ok(found)
}

/// Everything that is wrong, errors first.
pub(in crate::cli) fn findings(certificates: &[CertificateLine], trust: &Trust) -> Vec<Finding> {
    let mut found: Vec<Finding> =
        certificates.iter().filter_map(|certificate| of_certificate(certificate, trust)).collect();
    if trust.roots.is_empty() {
        found.push(Finding {
            severity: Severity::Error,
            reason: "no_roots".to_owned(),
            what: "trust bundle".to_owned(),
            detail: "no root is trusted, so every peer is refused".to_owned(),
            fix: "give the file of --ca-root".to_owned(),
        });
    }
    // An intermediate is in many chains, a root in the bundle and in chains: one finding each.
    let in_chains = certificates.iter().flat_map(|certificate| &certificate.chain);
    let issuers: BTreeMap<_, _> =
        in_chains.chain(&trust.roots).map(|issuer| ((&issuer.serial, &issuer.subject), issuer)).collect();
    found.extend(issuers.into_values().filter_map(of_issuer));
    found.extend(trust.problems.iter().map(|problem| Finding {
        severity: Severity::Error,
        reason: problem.reason.clone(),
        what: problem.what.clone(),
        detail: problem.error.clone(),
        fix: String::new(),
    }));
    found.sort();
    found
}

fn of_certificate(certificate: &CertificateLine, trust: &Trust) -> Option<Finding> {
    let left = certificate.seconds_left.unwrap_or_default();
    let error = match &*certificate.last_error {
        "" => "the CA has not answered yet",
        error => error,
    };
    let next = certificate.next_try_seconds.and_then(|wait| u64::try_from(wait).ok()).unwrap_or_default();
    let root = certificate.chain.iter().find(|issuer| issuer.kind == "root");
    let trusted = |root: &IssuerLine| {
        trust.roots.iter().any(|known| known.serial == root.serial && known.subject == root.subject)
    };
    let (severity, reason, detail) = match &*certificate.state {
        "missing" if certificate.last_error.is_empty() => {
            (Severity::Warning, "certificate_missing", "its first certificate is being fetched".to_owned())
        }
        "missing" => (Severity::Error, "certificate_missing", format!("{error}; next try in {}", span(next))),
        "expired" => {
            let ago = span(left.unsigned_abs());
            (Severity::Error, "certificate_expired", format!("since {ago}: {error}; next try in {}", span(next)))
        }
        _ if root.is_some_and(|root| !trusted(root)) => {
            let subject = root.map(|root| root.subject.as_str()).unwrap_or_default();
            (Severity::Error, "certificate_untrusted", format!("its root {subject} is not in the trust bundle"))
        }
        "not_renewed" => {
            let left = span(left.unsigned_abs());
            (
                Severity::Warning,
                "certificate_not_renewed",
                format!("valid for {left}: {error}; next try in {}", span(next)),
            )
        }
        _ => return None,
    };
    let fix = match reason {
        "certificate_untrusted" => "put the root back, or wait until the certificate is renewed",
        _ => "see that the CA runs, can be reached and accepts this node's token",
    };
    Some(Finding {
        severity,
        reason: reason.to_owned(),
        what: certificate.identity.clone(),
        detail,
        fix: fix.to_owned(),
    })
}

fn of_issuer(issuer: &IssuerLine) -> Option<Finding> {
    let soon = i64::try_from(limits::ISSUER_WARNING.as_secs()).unwrap_or(i64::MAX);
    let left = issuer.seconds_left;
    let (severity, reason, detail) = if left <= 0 {
        (Severity::Error, "expired", format!("ended {}", issuer.not_after))
    } else if left < soon {
        (Severity::Warning, "ends_soon", format!("ends {}, in {} days", issuer.not_after, left / 86_400))
    } else {
        return None;
    };
    let fix = match &*issuer.kind {
        "root" => "rotate to a new root",
        _ => "have the root's owner issue a new intermediate, and give it to the CA",
    };
    Some(Finding {
        severity,
        reason: format!("{}_{reason}", issuer.kind),
        what: format!("{} ({})", issuer.subject, issuer.serial),
        detail,
        fix: fix.to_owned(),
    })
}
