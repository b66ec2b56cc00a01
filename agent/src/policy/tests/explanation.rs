//! What `heddle policy explain` says, case by case. That it can't disagree with `decide` is in `property`.

use super::{authorization, cluster, peer_authentication, request, workload};
use crate::policy::{Explanation, Request, Role, Rulebook, explain};

fn explained(policies: &[(&str, &str)], peers: &[(&str, &str)], request: &Request) -> Explanation {
    let policies: Vec<_> = policies.iter().map(|(name, spec)| authorization(name, spec)).collect();
    let peers: Vec<_> = peers.iter().map(|(name, spec)| peer_authentication(name, spec)).collect();
    explain(&Rulebook::compile(&cluster(&policies, &peers)), request)
}

#[test]
fn every_policy_that_may_be_for_the_pod_is_named_in_the_order_in_which_it_is_asked() {
    let policies = [
        ("shop/other-pod", "{selector: {matchLabels: {app: db}}, rules: [{}]}"),
        ("shop/allow", "{rules: [{from: [{source: {namespaces: [shop]}}]}]}"),
        ("istio-system/mesh", "{action: DENY, rules: [{to: [{operation: {ports: ['9090']}}]}]}"),
        ("bank/elsewhere", "{action: DENY, rules: [{}]}"),
    ];
    let found = explained(&policies, &[], &request());
    assert!(found.allowed && found.reason.is_empty());
    assert_eq!((found.policy.as_str(), found.detail.as_str()), ("shop/allow", "allowed by: shop/allow"));
    let considered: Vec<_> =
        found.policies.iter().map(|one| (one.policy.as_str(), one.action.as_str(), one.role, one.matched)).collect();
    let expected = [
        ("istio-system/mesh", "DENY", Role::Decides, false),
        ("shop/allow", "ALLOW", Role::Decides, true),
        ("shop/other-pod", "ALLOW", Role::NotSelected, false),
    ];
    assert_eq!(considered, expected);
    let miss = &found.policies[0].misses[0];
    assert_eq!(miss.field, "spec.rules[0].to[0].operation.ports");
    assert_eq!(miss.why, "wants 9090, and this is 8080");
    assert_eq!(found.policies[2].misses[0].why, "is db, and the pod has web");
}

#[test]
fn the_part_that_fails_is_named_with_what_was_wanted_and_what_is() {
    let plain = Request { principal: None, ..request() };
    let table = [
        ("{}", &request(), "spec.rules", "has no rule, so it matches nothing"),
        (
            "{rules: [{from: [{source: {principals: [cluster.local/ns/a/sa/b, '*/sa/x']}}]}]}",
            &request(),
            "spec.rules[0].from[0].source.principals",
            "wants cluster.local/ns/a/sa/b or */sa/x, and this is cluster.local/ns/shop/sa/client",
        ),
        (
            "{rules: [{from: [{source: {notNamespaces: ['sh*']}}]}]}",
            &request(),
            "spec.rules[0].from[0].source.notNamespaces",
            "excludes shop by sh*",
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: [web]}}]}]}",
            &plain,
            "spec.rules[0].from[0].source.serviceAccounts",
            "wants shop/web, and this is a client without identity",
        ),
        (
            "{rules: [{from: [{source: {ipBlocks: [10.9.0.0/16]}}]}]}",
            &request(),
            "spec.rules[0].from[0].source.ipBlocks",
            "wants 10.9.0.0/16, and this is 10.0.1.1",
        ),
        (
            "{rules: [{when: [{key: destination.port, notValues: ['8080']}]}]}",
            &request(),
            "spec.rules[0].when[0].notValues",
            "excludes 8080 by 8080",
        ),
        (
            "{rules: [{from: [{source: {}}]}]}",
            &request(),
            "spec.rules[0].from[0].source",
            "names nothing, so it matches nothing",
        ),
    ];
    for (spec, request, field, why) in table {
        let found = explained(&[("shop/p", spec)], &[], request);
        assert_eq!(found.reason, "policy_not_allowed", "{spec}");
        let misses = &found.policies[0].misses;
        assert_eq!(misses.iter().map(|miss| (&*miss.field, &*miss.why)).collect::<Vec<_>>(), [(field, why)], "{spec}");
    }
    let two = "{rules: [{from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}]}]}";
    let miss = &explained(&[("shop/p", two)], &[], &request()).policies[0].misses[0];
    assert_eq!(miss.field, "spec.rules[0].from");
    assert!(miss.why.contains("from[0].source.namespaces wants a") && miss.why.contains("from[1]"), "{miss:?}");
}

#[test]
fn strictness_names_its_policy_also_where_it_leaves_the_port_open() {
    let plain = Request { principal: None, ..request() };
    let strict = explained(&[], &[("shop/n", "{mtls: {mode: STRICT}}")], &plain);
    assert_eq!((strict.reason.as_str(), strict.plaintext.policy.as_str()), ("mtls_required", "shop/n"));
    assert!(strict.plaintext.refused && !strict.allowed);
    let open = explained(&[], &[("shop/n", "{mtls: {mode: PERMISSIVE}}")], &plain);
    assert!(open.allowed && !open.plaintext.refused);
    assert_eq!(open.plaintext.policy, "shop/n");
    assert_eq!(explained(&[], &[], &plain).plaintext.policy, "");
}

#[test]
fn problems_of_the_namespace_and_of_the_mesh_are_told_and_others_are_not() {
    let bad = "{rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let found = explained(&[("shop/p", bad), ("istio-system/q", bad), ("bank/r", bad)], &[], &request());
    assert_eq!((found.reason.as_str(), found.policies[0].role), ("policy_unenforceable", Role::Unenforceable));
    assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
    assert!(found.problems[0].starts_with("AuthorizationPolicy shop/p: spec.rules[0].to[0].operation.methods: "));
    assert!(found.problems[0].ends_with(" (denies)"));
}

#[test]
fn of_a_workload_that_nobody_knows_only_that_is_said() {
    let stranger = Request { destination: workload("shop", "stranger"), ..request() };
    let found = explained(&[("shop/p", "{}")], &[], &stranger);
    assert_eq!((found.reason.as_str(), found.policies.len()), ("workload_unknown", 0));
}

#[test]
fn the_json_of_an_explanation_is_stable() {
    let found = explained(&[("shop/p", "{}")], &[], &request());
    let expected = serde_json::json!({
        "allowed": false, "reason": "policy_not_allowed", "policy": "",
        "detail": "allow policies exist, but none allowed",
        "plaintext": {"refused": false, "policy": ""},
        "policies": [{
            "policy": "shop/p", "action": "ALLOW", "role": "decides", "matched": false,
            "misses": [{"field": "spec.rules", "why": "has no rule, so it matches nothing"}],
        }],
        "gaps": [], "problems": [],
    });
    assert_eq!(serde_json::to_value(&found).unwrap(), expected);
}
