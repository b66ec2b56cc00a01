//! What an operator sees of certificates and of what is trusted: the JSON of `heddle certs` and `heddle check`.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::{
    identity::{CertificateStatus, IssuerStatus, RootStatus, TrustReport},
    telemetry::seconds_until,
};

/// One of `GET /certificates`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateLine {
    pub identity: String,
    /// `valid`, `not_renewed` (valid, and the last try to renew it failed), `expired`, or `missing`.
    pub state: String,
    /// Lower-case hex; empty while there is none.
    pub serial: String,
    /// RFC 3339, empty while there is none.
    pub not_before: String,
    pub not_after: String,
    /// Until it is used no more, which is when the first certificate of its chain ends; negative when that has passed.
    pub seconds_left: Option<i64>,
    /// Certificates above it, its issuer first, the root last.
    pub chain: Vec<IssuerLine>,
    /// When it came from the CA (RFC 3339); empty while there is none.
    pub received: String,
    /// The last failure to fetch or renew it, its stable name, and when that was (RFC 3339); empty when the last try worked.
    pub last_error: String,
    pub last_reason: String,
    pub failed: String,
    /// When it is fetched or renewed next, if nothing changes until then (RFC 3339), and in how many seconds.
    pub next_try: String,
    pub next_try_seconds: Option<i64>,
}

/// A certificate that signs others: an intermediate or a root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerLine {
    /// `intermediate` or `root`.
    pub kind: String,
    /// RFC 4514.
    pub subject: String,
    /// Lower-case hex.
    pub serial: String,
    /// RFC 3339.
    pub not_after: String,
    /// Negative when it has expired.
    pub seconds_left: i64,
}

/// `GET /trust`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// Roots that peers are verified with.
    pub roots: Vec<IssuerLine>,
    pub problems: Vec<TrustProblemLine>,
}

/// Something of what is trusted that is not in force as it was given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustProblemLine {
    /// `trust bundle` or `revocation lists`.
    pub what: String,
    /// Stable.
    pub reason: String,
    pub error: String,
}

fn text(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

impl CertificateLine {
    pub(in crate::life) fn new(status: &CertificateStatus, now: SystemTime) -> Self {
        let time = |time: Option<SystemTime>| time.map(text).unwrap_or_default();
        let seconds_left = status.usable_until.map(|end| seconds_until(end, now));
        let state = match seconds_left {
            None => "missing",
            Some(left) if left <= 0 => "expired",
            Some(_) if !status.last_error.is_empty() => "not_renewed",
            Some(_) => "valid",
        };
        let intermediates = status.intermediates.iter().map(|issuer| IssuerLine::new("intermediate", issuer, now));
        let root = status.root.iter().map(|root| IssuerLine::new("root", root, now));
        Self {
            identity: status.identity.to_string(),
            state: state.to_owned(),
            serial: status.serial.clone(),
            not_before: time(status.not_before),
            not_after: time(status.not_after),
            seconds_left,
            chain: intermediates.chain(root).collect(),
            received: time(status.received),
            last_error: status.last_error.clone(),
            last_reason: status.last_reason.to_owned(),
            failed: time(status.failed),
            next_try: time(status.next_try),
            next_try_seconds: status.next_try.map(|next| seconds_until(next, now)),
        }
    }
}

impl IssuerLine {
    fn new(kind: &str, issuer: &IssuerStatus, now: SystemTime) -> Self {
        Self {
            kind: kind.to_owned(),
            subject: issuer.subject.clone(),
            serial: issuer.serial.clone(),
            not_after: text(issuer.not_after),
            seconds_left: seconds_until(issuer.not_after, now),
        }
    }
}

impl Trust {
    pub(in crate::life) fn new(roots: &[RootStatus], report: &TrustReport, now: SystemTime) -> Self {
        let root = |root: &RootStatus| IssuerLine {
            kind: "root".to_owned(),
            subject: root.subject.clone(),
            serial: root.serial.clone(),
            not_after: text(root.not_after),
            seconds_left: seconds_until(root.not_after, now),
        };
        let problem = |what: &str, reason: &str, error: String| TrustProblemLine {
            what: what.to_owned(),
            reason: reason.to_owned(),
            error,
        };
        let bundle =
            report.bundle.as_ref().map(|bundle| problem("trust bundle", bundle.error.reason(), bundle.to_string()));
        let crl = report.crl.as_ref().and_then(|crl| crl.problem.as_ref());
        let crl = crl.map(|crl| problem("revocation lists", crl.fault.reason(), crl.to_string()));
        Self { roots: roots.iter().map(root).collect(), problems: bundle.into_iter().chain(crl).collect() }
    }
}
