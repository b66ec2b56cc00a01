//! PeerAuthentication, sentence by sentence.

use std::sync::Arc;

use super::{ROOT, authorization, cluster, peer_authentication, request, verdict, workload};
use crate::{
    cluster::{InvalidPolicy, PolicyKind},
    policy::{Effect, Request, Rulebook},
};

/// What a plaintext connection to `shop/web:port` comes to under these policies, oldest first.
fn plaintext(policies: &[(&str, &str)], port: u16) -> String {
    let policies: Vec<_> = policies.iter().map(|(name, spec)| peer_authentication(name, spec)).collect();
    let rules = Rulebook::compile(&cluster(&[], &policies));
    let with_identity = Request { destination_port: port, ..request() };
    assert_eq!(verdict(&rules, &with_identity), "allowed", "PeerAuthentication never refuses mutual TLS");
    verdict(&rules, &Request { principal: None, destination_port: port, ..request() })
}

const STRICT: &str = "{mtls: {mode: STRICT}}";
const PERMISSIVE: &str = "{mtls: {mode: PERMISSIVE}}";
const DISABLE: &str = "{mtls: {mode: DISABLE}}";
const UNSET: &str = "{mtls: {mode: UNSET}}";

fn web(rest: &str) -> String {
    format!("{{selector: {{matchLabels: {{app: web}}}}, {rest}}}")
}

#[test]
fn what_nobody_says_is_permissive() {
    for policies in [[].as_slice(), &[("istio-system/m", UNSET)], &[("istio-system/m", "{}"), ("shop/n", "{mtls: {}}")]]
    {
        assert_eq!(plaintext(policies, 8080), "allowed");
    }
}

#[test]
fn strict_refuses_plaintext_and_says_by_which_policy() {
    assert_eq!(plaintext(&[("istio-system/m", STRICT)], 8080), "mtls_required istio-system/m");
    assert_eq!(plaintext(&[("shop/n", STRICT)], 8080), "mtls_required shop/n");
    assert_eq!(plaintext(&[("shop/w", &web("mtls: {mode: STRICT}"))], 8080), "mtls_required shop/w");
    assert_eq!(plaintext(&[("bank/n", STRICT)], 8080), "allowed");
    assert_eq!(plaintext(&[("shop/w", "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}")], 8080), "allowed");
}

#[test]
fn workload_wins_over_namespace_and_namespace_over_mesh() {
    let workload_open = web("mtls: {mode: PERMISSIVE}");
    assert_eq!(plaintext(&[("istio-system/m", STRICT), ("shop/n", PERMISSIVE)], 1), "allowed");
    assert_eq!(plaintext(&[("istio-system/m", PERMISSIVE), ("shop/n", STRICT)], 1), "mtls_required shop/n");
    assert_eq!(plaintext(&[("istio-system/m", STRICT), ("shop/n", STRICT), ("shop/w", &workload_open)], 1), "allowed");
}

#[test]
fn unset_inherits_and_disable_is_like_permissive_at_every_level() {
    let unset = web("mtls: {mode: UNSET}");
    assert_eq!(
        plaintext(&[("istio-system/m", STRICT), ("shop/n", UNSET), ("shop/w", &unset)], 1),
        "mtls_required istio-system/m"
    );
    assert_eq!(plaintext(&[("istio-system/m", STRICT), ("shop/n", DISABLE), ("shop/w", &unset)], 1), "allowed");
    assert_eq!(plaintext(&[("istio-system/m", DISABLE)], 1), "allowed");
    assert_eq!(plaintext(&[("istio-system/m", STRICT), ("shop/w", &web("mtls: {mode: DISABLE}"))], 1), "allowed");
}

#[test]
fn oldest_of_a_level_wins_even_when_it_is_unset() {
    assert_eq!(plaintext(&[("shop/a", PERMISSIVE), ("shop/b", STRICT)], 1), "allowed");
    assert_eq!(plaintext(&[("shop/b", STRICT), ("shop/a", PERMISSIVE)], 1), "mtls_required shop/b");
    assert_eq!(plaintext(&[("shop/a", UNSET), ("shop/b", STRICT)], 1), "allowed");
    let (open, strict) = (web("mtls: {mode: PERMISSIVE}"), web("mtls: {mode: STRICT}"));
    assert_eq!(plaintext(&[("shop/a", &open), ("shop/b", &strict)], 1), "allowed");
}

#[test]
fn ports_are_the_workloads_and_by_pod_port() {
    let strict_port = web("portLevelMtls: {8080: {mode: STRICT}}");
    assert_eq!(plaintext(&[("shop/w", &strict_port)], 8080), "mtls_required shop/w");
    assert_eq!(plaintext(&[("shop/w", &strict_port)], 9090), "allowed");
    for open in ["PERMISSIVE", "DISABLE"] {
        let open_port = web(&format!("mtls: {{mode: STRICT}}, portLevelMtls: {{8080: {{mode: {open}}}}}"));
        assert_eq!(plaintext(&[("shop/w", &open_port)], 8080), "allowed");
        assert_eq!(plaintext(&[("shop/w", &open_port)], 9090), "mtls_required shop/w");
        // A workload that says nothing itself under a strict parent: both modes make the exception.
        let inherited = web(&format!("portLevelMtls: {{8080: {{mode: {open}}}}}"));
        assert_eq!(plaintext(&[("shop/n", STRICT), ("shop/w", &inherited)], 8080), "allowed");
        assert_eq!(plaintext(&[("shop/n", STRICT), ("shop/w", &inherited)], 9090), "mtls_required shop/n");
    }
    let unset_port = web("mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: UNSET}}");
    assert_eq!(plaintext(&[("shop/w", &unset_port)], 8080), "mtls_required shop/w");
    let unset_port = web("portLevelMtls: {8080: {}}");
    assert_eq!(plaintext(&[("istio-system/m", STRICT), ("shop/w", &unset_port)], 8080), "mtls_required istio-system/m");
}

#[test]
fn root_namespace_policy_with_selector_is_ignored_and_reported() {
    let policies = [peer_authentication("istio-system/m", &web("mtls: {mode: STRICT}"))];
    let rules = Rulebook::compile(&cluster(&[], &policies));
    for namespace in ["shop", ROOT] {
        let request = Request { principal: None, destination: workload(namespace, "web"), ..request() };
        assert_eq!(verdict(&rules, &request), "allowed");
    }
    assert_eq!((rules.problems()[0].effect, rules.problems()[0].field.as_str()), (Effect::Nothing, "spec.selector"));
}

#[test]
fn policy_that_is_not_understood_is_strict_where_it_holds_whatever_others_say() {
    let table = [
        ("{mtls: {mode: SRTICT}}", "spec.mtls.mode"),
        ("{mtls: {mode: strict}}", "spec.mtls.mode"),
        ("{mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}}}", "spec.portLevelMtls"),
        ("{selector: {matchLabels: {app: web}}, portLevelMtls: {http: {mode: STRICT}}}", "spec.portLevelMtls.http"),
        ("{selector: {matchLabels: {app: web}}, portLevelMtls: {'0': {mode: STRICT}}}", "spec.portLevelMtls.0"),
        ("{selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: on}}}", "spec.portLevelMtls.80.mode"),
        ("{selector: {matchLabels: {app: 'w*'}}, mtls: {mode: STRICT}}", "spec.selector.matchLabels.app"),
    ];
    for (spec, field) in table {
        assert_eq!(plaintext(&[("shop/open", PERMISSIVE), ("shop/p", spec)], 8080), "mtls_required shop/p", "{spec}");
        let rules = Rulebook::compile(&cluster(&[], &[peer_authentication("shop/p", spec)]));
        assert_eq!(rules.problems()[0].field, field, "{spec}");
        assert_eq!(rules.problems()[0].effect, Effect::RefusesPlaintext);
        let elsewhere = Request { principal: None, destination: workload("bank", "web"), ..request() };
        assert_eq!(verdict(&rules, &elsewhere), "allowed", "{spec}");
    }
    let mut snapshot = cluster(&[], &[]);
    snapshot.invalid_policies = vec![Arc::new(InvalidPolicy {
        kind: PolicyKind::PeerAuthentication,
        namespace: "shop".into(),
        name: "p".into(),
        selector: None,
        field: "spec.mtsl".into(),
        message: "unknown field".into(),
        decides: true,
    })];
    let rules = Rulebook::compile(&snapshot);
    assert_eq!(verdict(&rules, &Request { principal: None, ..request() }), "mtls_required shop/p");
    assert_eq!(verdict(&rules, &request()), "allowed");
}

#[test]
fn strict_is_asked_before_any_authorization_policy() {
    let allow = authorization("shop/allow", "{rules: [{}]}");
    let deny = authorization("shop/deny", "{action: DENY, rules: [{}]}");
    let snapshot = cluster(&[allow, deny], &[peer_authentication("shop/n", STRICT)]);
    let rules = Rulebook::compile(&snapshot);
    assert_eq!(verdict(&rules, &Request { principal: None, ..request() }), "mtls_required shop/n");
    assert_eq!(verdict(&rules, &request()), "policy_denied shop/deny");
}
