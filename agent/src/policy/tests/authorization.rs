//! AuthorizationPolicy, sentence by sentence.

use std::sync::Arc;

use super::{ROOT, authorization, cluster, request, rules, verdict, workload};
use crate::{
    cluster::{InvalidPolicy, PolicyGap, PolicyKind, Snapshot},
    policy::{Action, Denial, Effect, Rehearsal, Request, Rulebook, decide, rehearse},
};

/// Whether one policy in `shop` with this spec matches the request: an ALLOW that matches allows, a DENY that does denies.
/// Both must agree.
fn matches(rule: &str, request: &Request) -> bool {
    let spec = |action: &str| format!("{{action: {action}, rules: [{rule}]}}");
    let allow = verdict(&rules(&[authorization("shop/p", &spec("ALLOW"))]), request);
    let deny = verdict(&rules(&[authorization("shop/p", &spec("DENY"))]), request);
    match (allow.as_str(), deny.as_str()) {
        ("allowed shop/p", "policy_denied shop/p") => true,
        ("policy_not_allowed", "allowed") => false,
        other => panic!("{rule}: {other:?}"),
    }
}

fn plaintext() -> Request {
    Request { principal: None, ..request() }
}

#[test]
fn without_any_policy_everything_is_allowed() {
    assert_eq!(verdict(&rules(&[]), &request()), "allowed");
    assert_eq!(verdict(&rules(&[]), &plaintext()), "allowed");
}

#[test]
fn workload_that_no_rulebook_knows_is_denied() {
    let stranger = Request { destination: workload("shop", "stranger"), ..request() };
    assert_eq!(verdict(&rules(&[]), &stranger), "workload_unknown");
    assert_eq!(verdict(&Rulebook::default(), &request()), "workload_unknown");
}

#[test]
fn deny_comes_before_allow_and_allow_policies_close_the_door() {
    let allow = authorization("shop/allow", "{rules: [{}]}");
    let other = authorization("shop/other", "{rules: [{from: [{source: {namespaces: [bank]}}]}]}");
    let deny = authorization("shop/deny", "{action: DENY, rules: [{to: [{operation: {ports: ['8080']}}]}]}");
    assert_eq!(verdict(&rules(&[allow.clone(), deny.clone()]), &request()), "policy_denied shop/deny");
    assert_eq!(verdict(&rules(&[allow.clone(), other.clone()]), &request()), "allowed shop/allow");
    assert_eq!(verdict(&rules(&[other]), &request()), "policy_not_allowed");
    let elsewhere = Request { destination_port: 9090, ..request() };
    assert_eq!(verdict(&rules(&[deny]), &elsewhere), "allowed");
}

#[test]
fn empty_cases_mean_what_istio_means_by_them() {
    let table = [
        ("{}", "policy_not_allowed"),
        ("{rules: []}", "policy_not_allowed"),
        ("{rules: [{}]}", "allowed shop/p"),
        ("{action: DENY}", "allowed"),
        ("{action: DENY, rules: []}", "allowed"),
        ("{action: DENY, rules: [{}]}", "policy_denied shop/p"),
        // A match without fields does not match.
        ("{rules: [{from: [{source: {}}]}]}", "policy_not_allowed"),
        ("{rules: [{from: [{}]}]}", "policy_not_allowed"),
        ("{rules: [{to: [{operation: {}}]}]}", "policy_not_allowed"),
        ("{action: DENY, rules: [{from: [{source: {}}]}]}", "allowed"),
        ("{action: DENY, rules: [{to: [{}]}]}", "allowed"),
        ("{rules: [{from: [{source: {}}, {source: {namespaces: [shop]}}]}]}", "allowed shop/p"),
    ];
    for (spec, expected) in table {
        assert_eq!(verdict(&rules(&[authorization("shop/p", spec)]), &request()), expected, "{spec}");
    }
}

#[test]
fn empty_list_is_not_an_absent_one() {
    for rule in [
        "{from: []}",
        "{to: []}",
        "{when: []}",
        "{from: [{source: {principals: []}}]}",
        "{from: [{source: {namespaces: [shop], notPrincipals: []}}]}",
        "{to: [{operation: {ports: []}}]}",
        "{when: [{key: source.ip, values: []}]}",
    ] {
        for action in ["ALLOW", "DENY"] {
            let spec = format!("{{action: {action}, rules: [{rule}]}}");
            let rules = rules(&[authorization("shop/p", &spec)]);
            assert_eq!(verdict(&rules, &request()), "policy_unenforceable shop/p", "{spec}");
        }
    }
}

#[test]
fn scope_follows_namespace_root_namespace_and_selector() {
    let table = [
        ("shop/p", "{action: DENY, rules: [{}]}", ["shop/web", "shop/db"].as_slice()),
        ("shop/p", "{selector: {matchLabels: {app: db}}, action: DENY, rules: [{}]}", &["shop/db"]),
        ("shop/p", "{selector: {matchLabels: {}}, action: DENY, rules: [{}]}", &["shop/web", "shop/db"]),
        ("shop/p", "{selector: {matchLabels: {app: db, tier: x}}, action: DENY, rules: [{}]}", &[]),
        ("istio-system/p", "{action: DENY, rules: [{}]}", &["shop/web", "shop/db", "bank/web", "istio-system/web"]),
        (
            "istio-system/p",
            "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{}]}",
            &["shop/web", "bank/web", "istio-system/web"],
        ),
        ("nowhere/p", "{action: DENY, rules: [{}]}", &[]),
    ];
    for (name, spec, denied) in table {
        let rules = rules(&[authorization(name, spec)]);
        for pod in ["shop/web", "shop/db", "bank/web", "istio-system/web"] {
            let (namespace, app) = pod.split_once('/').unwrap();
            let request = Request { destination: workload(namespace, app), ..request() };
            assert_eq!(decide(&rules, &request).is_err(), denied.contains(&pod), "{name} {spec} at {pod}");
        }
    }
}

#[test]
fn labels_of_the_snapshot_count_and_not_those_the_connection_came_with() {
    let deny = authorization("shop/p", "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{}]}");
    let mut old = (*workload("shop", "web")).clone();
    old.labels.insert("app".into(), "db".into());
    let request = Request { destination: Arc::new(old), ..request() };
    assert_eq!(verdict(&rules(&[deny]), &request), "policy_denied shop/p");
}

#[test]
fn rules_or_parts_and_entries_or_fields_and_values_or() {
    let rule = |rule: &str| matches(rule, &request());
    // Parts AND.
    assert!(rule("{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['8080']}}]}"));
    assert!(!rule("{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['9090']}}]}"));
    assert!(!rule("{from: [{source: {namespaces: [bank]}}], to: [{operation: {ports: ['8080']}}]}"));
    assert!(!rule("{to: [{operation: {ports: ['8080']}}], when: [{key: source.namespace, values: [bank]}]}"));
    // Entries OR.
    assert!(rule("{from: [{source: {namespaces: [bank]}}, {source: {namespaces: [shop]}}]}"));
    assert!(rule("{to: [{operation: {ports: ['1']}}, {operation: {ports: ['8080']}}]}"));
    // Fields of an entry AND.
    assert!(rule("{from: [{source: {namespaces: [shop], ipBlocks: [10.0.1.0/24]}}]}"));
    assert!(!rule("{from: [{source: {namespaces: [shop], ipBlocks: [10.0.2.0/24]}}]}"));
    // Values OR.
    assert!(rule("{from: [{source: {namespaces: [bank, shop]}}]}"));
    // Each `when` is a clause of its own.
    assert!(rule("{when: [{key: source.namespace, values: [shop]}, {key: destination.port, values: ['8080']}]}"));
    assert!(!rule("{when: [{key: source.namespace, values: [shop]}, {key: destination.port, values: ['1']}]}"));
    // Rules OR.
    let two = authorization(
        "shop/p",
        "{rules: [{from: [{source: {namespaces: [bank]}}]}, {from: [{source: {namespaces: [shop]}}]}]}",
    );
    assert_eq!(verdict(&rules(&[two]), &request()), "allowed shop/p");
}

#[test]
fn positive_and_negative_values_must_both_hold() {
    let rule = |rule: &str| matches(rule, &request());
    assert!(rule("{to: [{operation: {ports: ['8080', '9090'], notPorts: ['9090']}}]}"));
    assert!(!rule("{to: [{operation: {ports: ['8080'], notPorts: ['8080']}}]}"));
    assert!(rule("{to: [{operation: {notPorts: ['1', '2']}}]}"));
    assert!(!rule("{to: [{operation: {notPorts: ['1', '8080']}}]}"));
    assert!(!rule("{when: [{key: source.ip, values: [10.0.1.1], notValues: [10.0.0.0/8]}]}"));
}

#[test]
fn strings_match_exactly_by_prefix_by_suffix_or_by_presence() {
    let table = [
        ("cluster.local/ns/shop/sa/client", true),
        ("cluster.local/ns/shop/sa/clien", false),
        ("cluster.local/ns/shop/*", true),
        ("cluster.local/ns/sh*", true),
        ("cluster.local/ns/bank/*", false),
        ("*/sa/client", true),
        ("*/sa/other", false),
        ("*", true),
        ("other.domain/ns/shop/sa/client", false),
        // Dots are dots.
        ("clusterxlocal/ns/shop/sa/client", false),
    ];
    for (text, expected) in table {
        assert_eq!(
            matches(&format!("{{from: [{{source: {{principals: ['{text}']}}}}]}}"), &request()),
            expected,
            "{text}"
        );
        assert_eq!(
            matches(&format!("{{from: [{{source: {{notPrincipals: ['{text}']}}}}]}}"), &request()),
            !expected,
            "not {text}"
        );
        assert_eq!(
            matches(&format!("{{when: [{{key: source.principal, values: ['{text}']}}]}}"), &request()),
            expected,
            "{text}"
        );
    }
    for (text, expected) in [("shop", true), ("sh*", true), ("*op", true), ("*", true), ("sho", false), ("bank", false)]
    {
        assert_eq!(
            matches(&format!("{{from: [{{source: {{namespaces: ['{text}']}}}}]}}"), &request()),
            expected,
            "{text}"
        );
        assert_eq!(
            matches(&format!("{{from: [{{source: {{notNamespaces: ['{text}']}}}}]}}"), &request()),
            !expected,
            "{text}"
        );
        assert_eq!(
            matches(&format!("{{when: [{{key: source.namespace, notValues: ['{text}']}}]}}"), &request()),
            !expected,
            "{text}"
        );
    }
}

#[test]
fn peer_without_identity_matches_no_name_and_satisfies_every_not() {
    for field in ["principals: ['*']", "namespaces: ['*']", "serviceAccounts: [client]"] {
        assert!(!matches(&format!("{{from: [{{source: {{{field}}}}}]}}"), &plaintext()), "{field}");
    }
    for field in ["notPrincipals: ['*']", "notNamespaces: ['*']", "notServiceAccounts: [client]"] {
        assert!(matches(&format!("{{from: [{{source: {{{field}}}}}]}}"), &plaintext()), "{field}");
    }
    assert!(!matches("{from: [{source: {notPrincipals: ['*']}}]}", &request()));
    assert!(matches("{from: [{source: {ipBlocks: [10.0.1.1]}}]}", &plaintext()));
}

#[test]
fn service_accounts_are_of_the_policys_namespace_unless_they_name_one() {
    let table = [("client", true), ("shop/client", true), ("bank/client", false), ("other", false)];
    for (text, expected) in table {
        assert_eq!(
            matches(&format!("{{from: [{{source: {{serviceAccounts: [{text}]}}}}]}}"), &request()),
            expected,
            "{text}"
        );
        assert_eq!(
            matches(&format!("{{from: [{{source: {{notServiceAccounts: [{text}]}}}}]}}"), &request()),
            !expected,
            "{text}"
        );
    }
    let other_domain = Request { principal: Some("spiffe://other/ns/shop/sa/client".parse().unwrap()), ..request() };
    assert!(matches("{from: [{source: {serviceAccounts: [client]}}]}", &other_domain));
    let root = authorization("istio-system/p", "{rules: [{from: [{source: {serviceAccounts: [client]}}]}]}");
    assert_eq!(verdict(&rules(&[root]), &request()), "policy_not_allowed");
}

#[test]
fn addresses_and_ports_are_those_of_the_pods() {
    let table = [
        ("{from: [{source: {ipBlocks: [10.0.1.1]}}]}", true),
        ("{from: [{source: {ipBlocks: [10.0.1.2/24]}}]}", true),
        ("{from: [{source: {ipBlocks: ['::ffff:10.0.1.0/120']}}]}", true),
        ("{from: [{source: {ipBlocks: ['fd00::/8']}}]}", false),
        ("{from: [{source: {notIpBlocks: [10.0.0.0/8]}}]}", false),
        ("{when: [{key: source.ip, values: [0.0.0.0/0]}]}", true),
        ("{when: [{key: destination.ip, values: [10.0.0.9]}]}", true),
        ("{when: [{key: destination.ip, notValues: [10.0.0.0/24]}]}", false),
        ("{when: [{key: destination.port, values: ['8080']}]}", true),
        ("{when: [{key: destination.port, notValues: ['8080']}]}", false),
        ("{to: [{operation: {ports: ['15008']}}]}", false),
    ];
    let mapped = Request { source_ip: "::ffff:10.0.1.1".parse().unwrap(), ..request() };
    for (rule, expected) in table {
        assert_eq!(matches(rule, &request()), expected, "{rule}");
        assert_eq!(matches(rule, &mapped), expected, "{rule}, source IPv4-mapped");
    }
}

/// Specs that L4 can't enforce, with the field at fault.
const UNENFORCEABLE: &[(&str, &str)] = &[
    ("{action: AUDIT, rules: [{}]}", "spec.action"),
    ("{action: CUSTOM, rules: [{}]}", "spec.action"),
    ("{action: allow, rules: [{}]}", "spec.action"),
    ("{action: '', rules: [{}]}", "spec.action"),
    ("{provider: {name: x}, rules: [{}]}", "spec.provider"),
    ("{targetRefs: [], rules: [{}]}", "spec.targetRefs"),
    ("{selector: {}, targetRefs: [{kind: Gateway, name: g}], rules: [{}]}", "spec.targetRefs"),
    ("{selector: {matchLabels: {app: 'we*'}}, rules: [{}]}", "spec.selector.matchLabels.app"),
    ("{rules: [{to: [{operation: {methods: [GET]}}]}]}", "spec.rules[0].to[0].operation.methods"),
    ("{rules: [{to: [{operation: {notMethods: [GET]}}]}]}", "spec.rules[0].to[0].operation.notMethods"),
    ("{rules: [{to: [{operation: {paths: [/x]}}]}]}", "spec.rules[0].to[0].operation.paths"),
    ("{rules: [{to: [{operation: {notPaths: [/x]}}]}]}", "spec.rules[0].to[0].operation.notPaths"),
    ("{rules: [{to: [{operation: {hosts: [x]}}]}]}", "spec.rules[0].to[0].operation.hosts"),
    ("{rules: [{to: [{operation: {notHosts: [x]}}]}]}", "spec.rules[0].to[0].operation.notHosts"),
    ("{rules: [{to: [{operation: {ports: ['8080'], methods: [GET]}}]}]}", "spec.rules[0].to[0].operation.methods"),
    ("{rules: [{to: [{operation: {ports: [abc]}}]}]}", "spec.rules[0].to[0].operation.ports[0]"),
    ("{rules: [{to: [{operation: {ports: ['0']}}]}]}", "spec.rules[0].to[0].operation.ports[0]"),
    ("{rules: [{to: [{operation: {ports: ['1', '65536']}}]}]}", "spec.rules[0].to[0].operation.ports[1]"),
    ("{rules: [{to: [{operation: {ports: ['+80']}}]}]}", "spec.rules[0].to[0].operation.ports[0]"),
    ("{rules: [{to: [{operation: {notPorts: ['80-90']}}]}]}", "spec.rules[0].to[0].operation.notPorts[0]"),
    ("{rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}", "spec.rules[0].from[0].source.requestPrincipals"),
    (
        "{rules: [{from: [{source: {notRequestPrincipals: ['*']}}]}]}",
        "spec.rules[0].from[0].source.notRequestPrincipals",
    ),
    ("{rules: [{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}]}", "spec.rules[0].from[0].source.remoteIpBlocks"),
    (
        "{rules: [{from: [{source: {notRemoteIpBlocks: [10.0.0.0/8]}}]}]}",
        "spec.rules[0].from[0].source.notRemoteIpBlocks",
    ),
    (
        "{rules: [{from: [{source: {namespaces: [shop], trustDomains: [x]}}]}]}",
        "spec.rules[0].from[0].source.trustDomains",
    ),
    ("{rules: [{from: [{source: {notTrustDomains: [x]}}]}]}", "spec.rules[0].from[0].source.notTrustDomains"),
    ("{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}", "spec.rules[0].from[0].source.ipBlocks[0]"),
    ("{rules: [{from: [{source: {notIpBlocks: [ten]}}]}]}", "spec.rules[0].from[0].source.notIpBlocks[0]"),
    (
        "{rules: [{from: [{source: {principals: ['spiffe://cluster.local/ns/a/sa/b']}}]}]}",
        "spec.rules[0].from[0].source.principals[0]",
    ),
    ("{rules: [{from: [{source: {notPrincipals: ['spiffe://*']}}]}]}", "spec.rules[0].from[0].source.notPrincipals[0]"),
    ("{rules: [{from: [{source: {principals: ['']}}]}]}", "spec.rules[0].from[0].source.principals[0]"),
    ("{rules: [{from: [{source: {principals: ['a/*/b']}}]}]}", "spec.rules[0].from[0].source.principals[0]"),
    ("{rules: [{from: [{source: {namespaces: ['*sh*']}}]}]}", "spec.rules[0].from[0].source.namespaces[0]"),
    ("{rules: [{from: [{source: {namespaces: ['**']}}]}]}", "spec.rules[0].from[0].source.namespaces[0]"),
    ("{rules: [{from: [{source: {notNamespaces: [Shop]}}]}]}", "spec.rules[0].from[0].source.notNamespaces[0]"),
    ("{rules: [{from: [{source: {namespaces: ['spiffe://x']}}]}]}", "spec.rules[0].from[0].source.namespaces[0]"),
    ("{rules: [{when: [{key: source.principal, values: ['cluster.local/NS/*']}]}]}", "spec.rules[0].when[0].values[0]"),
    ("{rules: [{from: [{source: {serviceAccounts: ['*']}}]}]}", "spec.rules[0].from[0].source.serviceAccounts[0]"),
    ("{rules: [{from: [{source: {serviceAccounts: ['a/b/c']}}]}]}", "spec.rules[0].from[0].source.serviceAccounts[0]"),
    ("{rules: [{from: [{source: {serviceAccounts: ['a/']}}]}]}", "spec.rules[0].from[0].source.serviceAccounts[0]"),
    (
        "{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}",
        "spec.rules[0].from[0].source.serviceAccounts",
    ),
    (
        "{rules: [{from: [{source: {notServiceAccounts: [a], notPrincipals: [b]}}]}]}",
        "spec.rules[0].from[0].source.serviceAccounts",
    ),
    (
        "{rules: [{from: [{source: {serviceAccounts: [a,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a]}}]}]}",
        "spec.rules[0].from[0].source.serviceAccounts",
    ),
    ("{rules: [{when: [{key: 'request.headers[x]', values: [y]}]}]}", "spec.rules[0].when[0].key"),
    ("{rules: [{when: [{key: source.serviceAccount, values: [shop/client]}]}]}", "spec.rules[0].when[0].key"),
    ("{rules: [{when: [{key: source.ip}]}]}", "spec.rules[0].when[0].values"),
    ("{rules: [{}, {when: [{key: destination.port, notValues: [http]}]}]}", "spec.rules[1].when[0].notValues[0]"),
];

#[test]
fn policy_that_l4_cant_enforce_denies_and_names_the_field() {
    for (spec, field) in UNENFORCEABLE.iter().copied() {
        let allow_all = authorization("shop/allow", "{rules: [{}]}");
        let rules = rules(&[allow_all, authorization("shop/p", spec)]);
        assert_eq!(verdict(&rules, &request()), "policy_unenforceable shop/p", "{spec}");
        let problems: Vec<_> = rules.problems().iter().map(|problem| problem.field.as_str()).collect();
        assert_eq!(problems, [field], "{spec}");
        assert_eq!(rules.problems()[0].effect, Effect::Denies, "{spec}");
        assert!(!rules.problems()[0].fix.is_empty());
        let other = Request { destination: workload("bank", "web"), ..request() };
        assert_eq!(verdict(&rules, &other), "allowed", "{spec} denies only what it selects");
    }
}

#[test]
fn entry_that_names_nothing_is_reported_though_nothing_is_wrong_with_it() {
    let rules = rules(&[authorization("shop/p", "{action: DENY, rules: [{from: [{source: {}}], to: [{}]}]}")]);
    assert_eq!(verdict(&rules, &request()), "allowed");
    let problems: Vec<_> = rules.problems().iter().map(|problem| (problem.field.as_str(), problem.effect)).collect();
    let expected =
        ["spec.rules[0].from[0].source", "spec.rules[0].to[0].operation"].map(|field| (field, Effect::Nothing));
    assert_eq!(problems, expected);
}

#[test]
fn exactly_sixteen_service_accounts_are_allowed() {
    assert!(matches("{from: [{source: {serviceAccounts: [client,a,a,a,a,a,a,a,a,a,a,a,a,a,a,a]}}]}", &request()));
}

#[test]
fn every_fault_of_a_policy_is_reported() {
    let spec = "{action: AUDIT, rules: [{to: [{operation: {methods: [GET], ports: [x]}}]}]}";
    let rules = rules(&[authorization("shop/p", spec)]);
    assert_eq!(rules.problems().len(), 3);
}

#[test]
fn unenforceable_policy_denies_only_the_workloads_that_it_selects() {
    let spec = "{selector: {matchLabels: {app: db}}, rules: [{to: [{operation: {methods: [GET]}}]}]}";
    let rules = rules(&[authorization("shop/p", spec)]);
    assert_eq!(verdict(&rules, &request()), "allowed");
    let db = Request { destination: workload("shop", "db"), ..request() };
    assert_eq!(verdict(&rules, &db), "policy_unenforceable shop/p");
}

#[test]
fn policy_with_target_refs_is_not_for_l4_but_is_reported() {
    for spec in [
        "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: g}], action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}",
        "{targetRef: {kind: Service, name: s}, rules: []}",
    ] {
        let rules = rules(&[authorization("shop/p", spec)]);
        assert_eq!(verdict(&rules, &request()), "allowed", "{spec}");
        assert_eq!(rules.problems()[0].effect, Effect::Nothing);
    }
}

#[test]
fn policy_that_could_not_be_read_denies_as_far_as_its_selector_is_known() {
    let invalid = |namespace: &str, selector: Option<&str>, decides| InvalidPolicy {
        kind: PolicyKind::AuthorizationPolicy,
        namespace: namespace.into(),
        name: "p".into(),
        selector: selector.map(|app| [("app".to_owned(), app.to_owned())].into()),
        field: "spec.x".into(),
        message: "unknown field".into(),
        decides,
    };
    let table = [
        (invalid("shop", None, true), ["shop/web", "shop/db"].as_slice()),
        (invalid("shop", Some("db"), true), &["shop/db"]),
        // No label has such a value: nobody knows what was meant.
        (invalid("shop", Some("d*"), true), &["shop/web", "shop/db"]),
        (invalid(ROOT, None, true), &["shop/web", "shop/db", "bank/web", "istio-system/web"]),
        (invalid("shop", None, false), &[]),
    ];
    for (policy, denied) in table {
        let mut snapshot = cluster(&[authorization("shop/allow", "{rules: [{}]}")], &[]);
        snapshot.invalid_policies = vec![Arc::new(policy.clone())];
        let rules = Rulebook::compile(&snapshot);
        assert_eq!(rules.problems().len(), 1);
        for pod in ["shop/web", "shop/db", "bank/web", "istio-system/web"] {
            let (namespace, app) = pod.split_once('/').unwrap();
            let request = Request { destination: workload(namespace, app), ..request() };
            let unenforceable = matches!(decide(&rules, &request), Err(Denial::Unenforceable { .. }));
            assert_eq!(unenforceable, denied.contains(&pod), "{policy:?} at {pod}");
        }
    }
}

#[test]
fn dry_run_policy_never_decides_but_tells_what_it_would_have_done() {
    let dry = |spec: &str, value: &str| {
        let mut policy = (*authorization("shop/p", spec)).clone();
        policy.metadata.annotations = Some([("istio.io/dry-run".to_owned(), value.to_owned())].into());
        Arc::new(policy)
    };
    let deny = rules(&[dry("{action: DENY, rules: [{}]}", "true")]);
    assert_eq!(verdict(&deny, &request()), "allowed");
    assert_eq!(rehearse(&deny, &request()), [Rehearsal { policy: "shop/p".into(), action: Action::Deny }]);
    let allow = rules(&[dry("{rules: [{from: [{source: {namespaces: [bank]}}]}]}", "true")]);
    assert_eq!(verdict(&allow, &request()), "allowed");
    assert_eq!(rehearse(&allow, &request()), []);
    let unenforceable = rules(&[dry("{action: AUDIT, rules: [{}]}", "true")]);
    assert_eq!(verdict(&unenforceable, &request()), "allowed");
    assert_eq!(unenforceable.problems()[0].effect, Effect::Nothing);
    assert_eq!(verdict(&rules(&[dry("{action: DENY, rules: [{}]}", "false")]), &request()), "policy_denied shop/p");
}

#[test]
fn where_policies_may_be_missing_nothing_is_allowed_and_what_is_denied_anyway_keeps_its_reason() {
    let gap = |namespace: Option<&str>| {
        Arc::new(PolicyGap { source: "/manifests/torn.yaml".into(), namespace: namespace.map(Arc::from) })
    };
    let table = [
        (Some("shop"), ["shop/web", "shop/db"].as_slice()),
        (Some("nowhere"), &[]),
        (Some(ROOT), &["shop/web", "shop/db", "bank/web", "istio-system/web"]),
        (None, &["shop/web", "shop/db", "bank/web", "istio-system/web"]),
    ];
    for (namespace, denied) in table {
        let mut snapshot = cluster(&[authorization("shop/allow", "{rules: [{}]}")], &[]);
        snapshot.policy_gaps = vec![gap(namespace)];
        let rules = Rulebook::compile(&snapshot);
        for pod in ["shop/web", "shop/db", "bank/web", "istio-system/web"] {
            let (namespace, app) = pod.split_once('/').unwrap();
            let request = Request { destination: workload(namespace, app), ..request() };
            let answer = decide(&rules, &request);
            let incomplete = matches!(&answer, Err(denial) if denial.reason() == "policies_incomplete");
            assert_eq!(incomplete, denied.contains(&pod), "{namespace:?} at {pod}: {answer:?}");
            assert!(incomplete || answer.is_ok());
        }
    }
    let mut snapshot = cluster(&[authorization("shop/p", "{action: DENY, rules: [{}]}")], &[]);
    snapshot.policy_gaps = vec![gap(None)];
    assert_eq!(verdict(&Rulebook::compile(&snapshot), &request()), "policy_denied shop/p");
    assert_eq!(Rulebook::compile(&snapshot).gaps().len(), 1);
}

#[test]
fn a_principal_of_one_of_our_trust_domains_means_the_identity_by_each_of_their_names() {
    let cluster = |names: &[&str], policy| Snapshot {
        trust_domains: names.iter().map(|name| Arc::from(*name)).collect(),
        ..cluster(&[policy], &[])
    };
    let matched = |names: &[&str], id: &str, field: &str, principal: &str| {
        let rule = match field {
            "when" => format!("{{when: [{{key: source.principal, values: ['{principal}']}}]}}"),
            field => format!("{{from: [{{source: {{{field}: ['{principal}']}}}}]}}"),
        };
        let request =
            Request { principal: Some(format!("spiffe://{id}/ns/shop/sa/client").parse().unwrap()), ..request() };
        let decided = |action: &str| {
            let policy = authorization("shop/p", &format!("{{action: {action}, rules: [{rule}]}}"));
            verdict(&Rulebook::compile(&cluster(names, policy)), &request)
        };
        match (decided("ALLOW").as_str(), decided("DENY").as_str()) {
            ("allowed shop/p", "policy_denied shop/p") => true,
            ("policy_not_allowed", "allowed") => false,
            other => panic!("{principal}: {other:?}"),
        }
    };
    let names: &[&str] = &["new.test", "old.test"];
    for id in names {
        for principal in [
            "new.test/ns/shop/sa/client",
            "old.test/ns/shop/sa/client",
            "old.test/ns/shop/*",
            "old.t*",
            "old.test*",
            "*d.test/ns/shop/sa/client",
            "*/sa/client",
            "*",
        ] {
            assert!(matched(names, id, "principals", principal), "{id} {principal}");
            assert!(matched(names, id, "when", principal), "{id} {principal}");
            assert!(!matched(names, id, "notPrincipals", principal), "{id} not {principal}");
        }
        for principal in [
            "other.test/ns/shop/sa/client",
            "old.test/ns/shop/sa/other",
            "old.test/ns/shop/sa/client-2",
            "cold.test/ns/shop/sa/client",
            "older.t*",
            "*cold.test/ns/shop/sa/client",
        ] {
            assert!(!matched(names, id, "principals", principal), "{id} {principal}");
            assert!(matched(names, id, "notPrincipals", principal), "{id} not {principal}");
        }
    }
    // Without an alias, and for a name that is none of ours, a text is what it says.
    assert!(!matched(&[], "new.test", "principals", "old.test/ns/shop/sa/client"));
    assert!(!matched(names, "other.test", "principals", "old.test/ns/shop/sa/client"));
    assert!(matched(names, "other.test", "principals", "other.test/ns/shop/sa/client"));
}
