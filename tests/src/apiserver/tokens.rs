//! Service accounts' tokens, and what a TokenReview says of them.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// A service account's token, bound to a pod.
#[derive(Debug, Clone)]
pub struct Token {
    pub namespace: String,
    pub account: String,
    pub pod: String,
    pub pod_uid: String,
    /// As newer API servers tell it; empty where it does not.
    pub node: String,
    pub audiences: Vec<String>,
    /// Seconds from now; negative for one that has expired.
    pub expires: i64,
    /// What its text says of its expiry and audience is not so: only the API server knows.
    pub lies: bool,
}

impl Token {
    /// A good one of an agent's pod.
    #[must_use]
    pub fn of(namespace: &str, account: &str, pod: &str, pod_uid: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            account: account.to_owned(),
            pod: pod.to_owned(),
            pod_uid: pod_uid.to_owned(),
            node: String::new(),
            audiences: vec!["istio-ca".to_owned()],
            expires: 3_600,
            lies: false,
        }
    }

    /// Its text; a number makes it another one.
    #[must_use]
    pub fn text(&self, number: usize) -> String {
        let audiences = if self.lies { vec!["istio-ca".to_owned()] } else { self.audiences.clone() };
        let expires = unix(SystemTime::now()) + if self.lies { 3_600 } else { self.expires };
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let head = part(&json!({"alg": "RS256", "kid": "stand-in"}));
        let claims = part(&json!({
            "aud": audiences,
            "exp": expires,
            "iss": "https://kubernetes.default.svc",
            "sub": format!("system:serviceaccount:{}:{}", self.namespace, self.account),
            "kubernetes.io": {"namespace": self.namespace, "pod": {"name": self.pod, "uid": self.pod_uid}},
        }));
        format!("{head}.{claims}.{}", URL_SAFE_NO_PAD.encode(format!("signature {number}")))
    }
}

fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// What a TokenReview of `token` for these audiences says (`status`).
#[must_use]
pub fn review(tokens: &BTreeMap<String, Token>, text: &str, audiences: &[String]) -> Value {
    let Some(token) = tokens.get(text) else {
        return json!({"user": {}, "error": "[invalid bearer token, Token has been invalidated]"});
    };
    if token.expires <= 0 {
        return json!({"user": {}, "error": "[invalid bearer token, service account token has expired]"});
    }
    let both: Vec<&String> = audiences.iter().filter(|audience| token.audiences.contains(audience)).collect();
    if both.is_empty() {
        let error = format!(
            "[invalid bearer token, token audiences {:?} is invalid for the target audiences {audiences:?}]",
            token.audiences
        );
        return json!({"user": {}, "error": error});
    }
    let mut extra = json!({
        "authentication.kubernetes.io/pod-name": [token.pod],
        "authentication.kubernetes.io/pod-uid": [token.pod_uid],
    });
    if !token.node.is_empty() {
        extra["authentication.kubernetes.io/node-name"] = json!([token.node]);
    }
    json!({
        "authenticated": true,
        "audiences": both,
        "user": {
            "username": format!("system:serviceaccount:{}:{}", token.namespace, token.account),
            "uid": "00000000-0000-0000-0000-000000000000",
            "groups": [
                "system:serviceaccounts",
                format!("system:serviceaccounts:{}", token.namespace),
                "system:authenticated",
            ],
            "extra": extra,
        },
    })
}
