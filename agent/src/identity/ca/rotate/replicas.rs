//! What the CA's replicas say at their `/metrics`: from which certificate each of them issues.
//!
//! One that missed a change of the key goes on with the old one, and would issue certificates that nobody trusts any more.

use super::{ask::Answer, exposition::sample};
use crate::identity::{
    ca::root::{Root, describe},
    roots::span,
};

const ISSUER: &str = "heddle_ca_issuer_expiry_timestamp_seconds";

/// Serial number of the certificate that a replica issues from.
pub(super) type Seen = Answer<String>;

pub(super) fn said(text: &str) -> Result<String, String> {
    let issuer = text.lines().filter_map(sample).find(|sample| sample.name == ISSUER);
    let serial = issuer.and_then(|sample| sample.labels.get("serial").cloned());
    serial.ok_or_else(|| "does not say what it issues from".to_owned())
}

/// Replicas that are not known to issue from this, a line each.
pub(super) fn not_issuing_from(seen: &[Seen], root: &Root) -> Vec<String> {
    let Some(issuing) = root.chain.first() else { return vec!["it has no certificate".to_owned()] };
    let wanted = span(issuing).map(|(serial, ..)| serial).unwrap_or_default();
    seen.iter()
        .filter_map(|seen| match &seen.said {
            Ok(serial) if *serial == wanted => None,
            Ok(serial) => Some(format!(
                "replica {} of the CA issues from another certificate ({serial}) than {}; it reads its key again within seconds, \
                 or says in its log why not",
                seen.who,
                describe(issuing)
            )),
            Err(why) => Some(format!("replica {} of the CA {why}", seen.who)),
        })
        .collect()
}

impl Seen {
    /// For the status.
    pub fn line(&self) -> String {
        match &self.said {
            Ok(serial) => format!("issues from {serial}"),
            Err(why) => why.clone(),
        }
    }
}
