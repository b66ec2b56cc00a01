//! What a token says of itself, and what the API server says of it. Pure.
//!
//! A token's own claims are nobody's word until the API server has checked its signature: they only ever refuse, which spares
//! it the question, and shorten how long its answer is kept.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use super::refusal::Refusal;

/// What a TokenReview comes to (`authentication.k8s.io/v1`, `status`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Review {
    pub authenticated: bool,
    pub error: String,
    pub audiences: Vec<String>,
    pub username: String,
    pub groups: Vec<String>,
    pub pod_names: Vec<String>,
    pub pod_uids: Vec<String>,
    pub node_names: Vec<String>,
}

/// The status of a TokenReview, of which nothing else is read: its spec has the token in it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    status: Status,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    authenticated: Option<bool>,
    error: Option<String>,
    audiences: Option<Vec<String>>,
    user: User,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct User {
    username: Option<String>,
    groups: Option<Vec<String>>,
    extra: Option<std::collections::BTreeMap<String, Vec<String>>>,
}

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

impl Review {
    /// Reads the API server's answer. Its text is never told: it holds the token.
    pub fn read(answer: &str) -> Result<Self, Refusal> {
        let Answer { status } = serde_json::from_str(answer)
            .map_err(|_| Refusal::ApiUnavailable("its answer to a TokenReview can't be read".to_owned()))?;
        let mut extra = status.user.extra.unwrap_or_default();
        let mut take = |key| extra.remove(key).unwrap_or_default();
        Ok(Self {
            authenticated: status.authenticated.unwrap_or(false),
            error: status.error.unwrap_or_default(),
            audiences: status.audiences.unwrap_or_default(),
            username: status.user.username.unwrap_or_default(),
            groups: status.user.groups.unwrap_or_default(),
            pod_names: take(POD_NAME),
            pod_uids: take(POD_UID),
            node_names: take(NODE_NAME),
        })
    }
}

/// What a service account's token says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claims {
    pub expires: SystemTime,
}

#[derive(Debug, Deserialize)]
struct Payload {
    #[serde(default)]
    aud: OneOrMany,
    exp: u64,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

/// Reads the claims of a JSON Web Token (RFC 7519, compact form), and refuses what can't be for us.
pub(super) fn claims(token: &[u8], audience: &str, now: SystemTime) -> Result<Claims, Refusal> {
    let malformed = Refusal::TokenMalformed;
    let text = std::str::from_utf8(token).map_err(|_| malformed("it is no text"))?;
    let mut parts = text.split('.');
    let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(malformed("it has not three parts"));
    };
    let payload = base64url(payload).ok_or(malformed("its second part is no base64"))?;
    let payload: Payload =
        serde_json::from_slice(&payload).map_err(|_| malformed("it does not say for whom it is and how long"))?;
    let expires = UNIX_EPOCH.checked_add(Duration::from_secs(payload.exp)).ok_or(malformed("its expiry is no time"))?;
    if expires <= now {
        return Err(Refusal::TokenExpired);
    }
    let audiences = match payload.aud {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    };
    if !audiences.iter().any(|one| one == audience) {
        return Err(Refusal::TokenAudience { presented: audiences, expected: audience.to_owned() });
    }
    Ok(Claims { expires })
}

fn base64url(text: &str) -> Option<Vec<u8>> {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    URL_SAFE_NO_PAD.decode(text).ok()
}
