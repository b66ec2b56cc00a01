//! Fuzzing of what is typed, and of what the admin socket is asked: see [`crate::fuzzing`].

use std::sync::LazyLock;

use axum::extract::Query;

use super::config::{duration, lifetime, listen, trust_domain};
use crate::{
    cluster::{self, Snapshot},
    identity::{SpiffeId, TrustDomain},
    policy::{Question, Rulebook, answer},
};

/// Durations, addresses and names of flags: what is accepted means what it prints, and what is refused says what to write.
pub fn flags(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match duration("--drain-grace", text) {
        Ok(meant) => {
            let printed = humantime::format_duration(meant).to_string();
            assert_eq!(duration("--drain-grace", &printed).as_ref(), Ok(&meant), "{text}");
            assert_eq!(lifetime("--certificate-lifetime", text).is_ok(), meant.as_secs() >= 2, "{text}");
        }
        Err(error) => assert!(error.to_string().contains("--drain-grace") && !error.fix.is_empty()),
    }
    if let Ok(address) = listen("--metrics-listen", text) {
        assert_eq!(listen("--metrics-listen", &address.to_string()), Ok(address));
    }
    if let Ok(domain) = trust_domain(text) {
        assert_eq!(domain.as_str(), text);
    }
}

const CLUSTER: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web}
spec: {containers: [], serviceAccountName: web}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]}
";

/// Whatever the query is, its answer is about a pod that is there and a source that could be.
pub fn admin_query(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(uri) = format!("/policy/explain?{text}").parse() else { return };
    let Ok(Query(question)) = Query::<Question>::try_from_uri(&uri) else { return };
    let Ok(domain) = "cluster.local".parse::<TrustDomain>() else { return };
    static READ: LazyLock<(Snapshot, Rulebook)> = LazyLock::new(|| {
        let snapshot = cluster::fuzzing::snapshot(CLUSTER);
        let rules = Rulebook::compile(&snapshot);
        (snapshot, rules)
    });
    let (snapshot, rules) = &*READ;
    match answer(&question, snapshot, rules, &domain) {
        Ok(explained) => {
            assert_eq!(explained.to, "shop/web");
            assert!(explained.port != 0);
            assert!(explained.from.is_empty() || explained.from.parse::<SpiffeId>().is_ok(), "{}", explained.from);
            let allowed = explained.from == "spiffe://cluster.local/ns/shop/sa/web";
            assert_eq!(explained.explanation.allowed, allowed, "{}", explained.from);
        }
        Err(error) => assert!(!error.reason().is_empty()),
    }
}
