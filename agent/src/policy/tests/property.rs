//! `decide` against a model that is written from the specification alone, naively, over random policies and requests.
//!
//! The model works on the objects as written: it shares no code with the compiler, and knows which values are bad only
//! because they come from a list of bad ones.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use proptest::{prelude::*, sample::select};

use super::{ROOT, cluster, workload};
use crate::{
    cluster::{
        PolicyGap, Workload,
        kinds::{
            AuthorizationPolicy, AuthorizationPolicySpec, Condition, From, MutualTls, Operation, PeerAuthentication,
            PeerAuthenticationSpec, Rule, Source, To, WorkloadSelector,
        },
    },
    identity::SpiffeId,
    policy::{
        Explanation, Request, Role, Rulebook, decide,
        explain::{explain, misses},
        rulebook::Compiled,
    },
};

const PRINCIPALS: [&str; 6] = [
    "cluster.local/ns/shop/sa/web",
    "cluster.local/ns/shop/*",
    "*/sa/db",
    "*",
    "cluster.local/ns/bank/sa/db",
    "other/*",
];
const NAMESPACES: [&str; 5] = ["shop", "bank", "sh*", "*nk", "*"];
const ACCOUNTS: [&str; 4] = ["web", "db", "shop/web", "bank/db"];
const PORTS: [&str; 3] = ["80", "8080", "9090"];
/// Blocks, and which of [`ADDRESSES`] they hold.
const BLOCKS: [(&str, [bool; 4]); 5] = [
    ("10.0.0.1", [true, false, true, false]),
    ("10.0.0.0/16", [true, true, true, false]),
    ("10.0.1.0/24", [false, true, false, false]),
    ("::ffff:10.0.0.0/120", [true, false, true, false]),
    ("fd00::/16", [false, false, false, true]),
];
const ADDRESSES: [&str; 4] = ["10.0.0.1", "10.0.1.1", "::ffff:10.0.0.1", "fd00::1"];
/// Values that no field understands.
const BAD: [&str; 4] = ["", "a*b", "spiffe://x", "*x*"];

// --- The model.

/// Whether plaintext is refused, then whether the policies deny, then whether some may be missing; in the words of the
/// specification. `gaps` are namespaces with unread files.
fn model(
    policies: &[AuthorizationPolicy],
    peers: &[PeerAuthentication],
    gaps: &[Option<&str>],
    request: &Request,
) -> &'static str {
    let pod = &request.destination;
    if request.principal.is_none() && strict(peers, pod, request.destination_port) {
        return "mtls_required";
    }
    let mine: Vec<_> = policies
        .iter()
        .filter(|policy| in_scope(policy.metadata.namespace.as_deref().unwrap(), policy.spec.selector.as_ref(), pod))
        .collect();
    let action = |policy: &AuthorizationPolicy| policy.spec.action.clone().unwrap_or("ALLOW".into());
    if mine.iter().any(|policy| !understood(&policy.spec)) {
        return "policy_unenforceable";
    }
    if mine.iter().any(|policy| action(policy) == "DENY" && matches(policy, request)) {
        return "policy_denied";
    }
    let allows: Vec<_> = mine.iter().filter(|policy| action(policy) == "ALLOW").collect();
    if !allows.is_empty() && !allows.iter().any(|policy| matches(policy, request)) {
        return "policy_not_allowed";
    }
    if gaps.iter().any(|gap| gap.is_none_or(|namespace| namespace == ROOT || namespace == &*pod.namespace)) {
        return "policies_incomplete";
    }
    "allowed"
}

fn in_scope(namespace: &str, selector: Option<&WorkloadSelector>, pod: &Workload) -> bool {
    let labels = selector.and_then(|selector| selector.match_labels.clone()).unwrap_or_default();
    (namespace == ROOT || namespace == &*pod.namespace)
        && labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
}

fn understood(spec: &AuthorizationPolicySpec) -> bool {
    let good = |list: &Option<Vec<String>>| {
        list.as_ref().is_none_or(|list| !list.is_empty() && list.iter().all(|value| !BAD.contains(&value.as_str())))
    };
    let filled = |len: Option<usize>| len != Some(0);
    let source = |source: &Source| {
        let by_account = source.service_accounts.is_some() || source.not_service_accounts.is_some();
        let lists = [
            &source.principals,
            &source.not_principals,
            &source.namespaces,
            &source.not_namespaces,
            &source.service_accounts,
            &source.not_service_accounts,
            &source.ip_blocks,
            &source.not_ip_blocks,
        ];
        let by_name = lists[..4].iter().any(|list| list.is_some());
        lists.into_iter().all(good) && !(by_account && by_name)
    };
    ["ALLOW", "DENY"].contains(&spec.action.as_deref().unwrap_or("ALLOW"))
        && spec.rules.iter().flatten().all(|rule| {
            filled(rule.from.as_ref().map(Vec::len))
                && filled(rule.to.as_ref().map(Vec::len))
                && filled(rule.when.as_ref().map(Vec::len))
                && rule.from.iter().flatten().filter_map(|from| from.source.as_ref()).all(source)
                && rule.to.iter().flatten().filter_map(|to| to.operation.as_ref()).all(|operation| {
                    operation.methods.is_none() && good(&operation.ports) && good(&operation.not_ports)
                })
                && rule.when.iter().flatten().all(|when| {
                    when.key != "request.headers[x]"
                        && (when.values.is_some() || when.not_values.is_some())
                        && good(&when.values)
                        && good(&when.not_values)
                })
        })
}

fn matches(policy: &AuthorizationPolicy, request: &Request) -> bool {
    let id = request.principal.as_ref();
    let text = |pattern: &str, text: Option<&str>| match (text, pattern) {
        (None, _) => false,
        (Some(_), "*") => true,
        (Some(text), pattern) if pattern.ends_with('*') => text.starts_with(pattern.trim_end_matches('*')),
        (Some(text), pattern) if pattern.starts_with('*') => text.ends_with(pattern.trim_start_matches('*')),
        (Some(text), pattern) => text == pattern,
    };
    let principal = |value: &str| text(value, id.map(|id| id.as_str().trim_start_matches("spiffe://")));
    let namespace = |value: &str| text(value, id.map(SpiffeId::namespace));
    let own = policy.metadata.namespace.as_deref().unwrap();
    let account = |value: &str| {
        let full = if value.contains('/') { value.to_owned() } else { format!("{own}/{value}") };
        id.is_some_and(|id| full == format!("{}/{}", id.namespace(), id.service_account()))
    };
    let block = |value: &str, address: IpAddr| {
        let at = ADDRESSES.iter().position(|known| known.parse() == Ok(address)).unwrap();
        BLOCKS.iter().any(|(block, holds)| *block == value && holds[at])
    };
    let source_ip = |value: &str| block(value, request.source_ip);
    let destination_ip = |value: &str| block(value, request.destination_ip);
    let port = |value: &str| value == request.destination_port.to_string();

    type List<'a> = &'a Option<Vec<String>>;
    fn both(any: List, none: List, one: impl Fn(&str) -> bool) -> bool {
        any.as_ref().is_none_or(|any| any.iter().any(|value| one(value)))
            && none.as_ref().is_none_or(|none| !none.iter().any(|value| one(value)))
    }
    let source = |source: &Source| {
        *source != Source::default()
            && both(&source.principals, &source.not_principals, principal)
            && both(&source.namespaces, &source.not_namespaces, namespace)
            && both(&source.service_accounts, &source.not_service_accounts, account)
            && both(&source.ip_blocks, &source.not_ip_blocks, source_ip)
    };
    let operation = |operation: &Operation| {
        *operation != Operation::default() && both(&operation.ports, &operation.not_ports, port)
    };
    let when = |when: &Condition| match when.key.as_str() {
        "source.ip" => both(&when.values, &when.not_values, source_ip),
        "source.namespace" => both(&when.values, &when.not_values, namespace),
        "source.principal" => both(&when.values, &when.not_values, principal),
        "destination.ip" => both(&when.values, &when.not_values, destination_ip),
        "destination.port" => both(&when.values, &when.not_values, port),
        key => panic!("{key}"),
    };
    policy.spec.rules.iter().flatten().any(|rule| {
        rule.from.as_ref().is_none_or(|from| from.iter().any(|from| from.source.as_ref().is_some_and(source)))
            && rule.to.as_ref().is_none_or(|to| to.iter().any(|to| to.operation.as_ref().is_some_and(operation)))
            && rule.when.iter().flatten().all(when)
    })
}

fn strict(peers: &[PeerAuthentication], pod: &Workload, port: u16) -> bool {
    let selects = |peer: &PeerAuthentication| peer.spec.selector.as_ref().is_some_and(|s| s.match_labels.is_some());
    let mode = |tls: &MutualTls| tls.mode.clone().unwrap_or("UNSET".into());
    let known = |tls: &MutualTls| ["UNSET", "STRICT", "PERMISSIVE", "DISABLE"].contains(&mode(tls).as_str());
    let mine: Vec<_> = peers
        .iter()
        .filter(|peer| in_scope(peer.metadata.namespace.as_deref().unwrap(), peer.spec.selector.as_ref(), pod))
        .filter(|peer| !(peer.metadata.namespace.as_deref() == Some(ROOT) && selects(peer)))
        .collect();
    let ports = |peer: &PeerAuthentication| peer.spec.port_level_mtls.clone().unwrap_or_default();
    let faulty = |peer: &PeerAuthentication| {
        !peer.spec.mtls.iter().all(known)
            || !ports(peer).values().all(known)
            || (!selects(peer) && !ports(peer).is_empty())
    };
    if mine.iter().any(|peer| faulty(peer)) {
        return true;
    }
    let in_root = |peer: &PeerAuthentication| peer.metadata.namespace.as_deref() == Some(ROOT);
    let workload = mine.iter().find(|peer| selects(peer));
    let namespace = mine.iter().find(|peer| !selects(peer) && !in_root(peer));
    let mesh = mine.iter().find(|peer| !selects(peer) && in_root(peer));
    let mut asked = vec![workload.and_then(|peer| ports(peer).get(&port.to_string()).map(mode))];
    asked.extend([workload, namespace, mesh].map(|level| level.and_then(|peer| peer.spec.mtls.as_ref().map(mode))));
    asked.into_iter().flatten().find(|mode| mode != "UNSET").is_some_and(|mode| mode == "STRICT")
}

// --- Random objects.

/// Absent, or up to three values; now and then empty or with a bad value.
fn list(values: &'static [&'static str]) -> impl Strategy<Value = Option<Vec<String>>> {
    let value = prop_oneof![60 => select(values), 1 => select(BAD.as_slice())].prop_map(str::to_owned);
    prop_oneof![
        60 => Just(None),
        30 => prop::collection::vec(value, 1..3).prop_map(Some),
        1 => Just(Some(Vec::new())),
    ]
}

fn blocks() -> impl Strategy<Value = Option<Vec<String>>> {
    const NAMES: [&str; 5] = [BLOCKS[0].0, BLOCKS[1].0, BLOCKS[2].0, BLOCKS[3].0, BLOCKS[4].0];
    list(&NAMES)
}

prop_compose! {
    fn source()(
        by_account in any::<bool>(),
        principals in list(&PRINCIPALS), not_principals in list(&PRINCIPALS),
        namespaces in list(&NAMESPACES), not_namespaces in list(&NAMESPACES),
        service_accounts in list(&ACCOUNTS), not_service_accounts in list(&ACCOUNTS),
        ip_blocks in blocks(), not_ip_blocks in blocks(),
        mixed in prop::bool::weighted(0.03),
    ) -> Source {
        let names = |list: Option<Vec<String>>| list.filter(|_| !by_account || mixed);
        let accounts = |list: Option<Vec<String>>| list.filter(|_| by_account || mixed);
        Source {
            principals: names(principals), not_principals: names(not_principals),
            namespaces: names(namespaces), not_namespaces: names(not_namespaces),
            service_accounts: accounts(service_accounts), not_service_accounts: accounts(not_service_accounts),
            ip_blocks, not_ip_blocks,
            ..Source::default()
        }
    }
}

prop_compose! {
    fn operation()(ports in list(&PORTS), not_ports in list(&PORTS), http in prop::bool::weighted(0.02)) -> Operation {
        Operation { ports, not_ports, methods: http.then(|| vec!["GET".into()]), ..Operation::default() }
    }
}

fn condition() -> impl Strategy<Value = Condition> {
    let of =
        |key: &'static str, values: BoxedStrategy<Option<Vec<String>>>, not: BoxedStrategy<Option<Vec<String>>>| {
            (values, not).prop_map(move |(values, not_values)| Condition { key: key.into(), values, not_values })
        };
    prop_oneof![
        10 => of("source.ip", blocks().boxed(), blocks().boxed()),
        10 => of("source.namespace", list(&NAMESPACES).boxed(), list(&NAMESPACES).boxed()),
        10 => of("source.principal", list(&PRINCIPALS).boxed(), list(&PRINCIPALS).boxed()),
        10 => of("destination.ip", blocks().boxed(), blocks().boxed()),
        10 => of("destination.port", list(&PORTS).boxed(), list(&PORTS).boxed()),
        1 => of("request.headers[x]", list(&PORTS).boxed(), list(&PORTS).boxed()),
    ]
    // Most conditions are whole ones.
    .prop_map(|condition| match condition {
        Condition { key, values: None, not_values: None } if key == "destination.port" => {
            Condition { key, values: Some(vec!["80".into()]), not_values: None }
        }
        other => other,
    })
}

fn some<T: std::fmt::Debug + Clone + 'static>(
    entry: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Option<Vec<T>>> {
    prop_oneof![
        30 => Just(None),
        40 => prop::collection::vec(entry, 1..3).prop_map(Some),
        1 => Just(Some(Vec::new())),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let from = prop::option::weighted(0.95, source()).prop_map(|source| From { source });
    let to = prop::option::weighted(0.95, operation()).prop_map(|operation| To { operation });
    let when = prop_oneof![3 => Just(None), 1 => some(condition())];
    (some(from), some(to), when).prop_map(|(from, to, when)| Rule { from, to, when })
}

fn selector() -> impl Strategy<Value = Option<WorkloadSelector>> {
    let app = |app: &str| BTreeMap::from([("app".to_owned(), app.to_owned())]);
    let labelled =
        select(vec!["web", "db"]).prop_map(move |name| Some(WorkloadSelector { match_labels: Some(app(name)) }));
    prop_oneof![3 => Just(None), 2 => labelled]
}

pub fn authorization() -> impl Strategy<Value = AuthorizationPolicy> {
    let action = prop_oneof![
        10 => Just(None),
        20 => Just(Some("ALLOW".to_owned())),
        20 => Just(Some("DENY".to_owned())),
        1 => Just(Some("AUDIT".to_owned())),
    ];
    (select(vec!["shop", "bank", ROOT]), selector(), action, prop::option::of(prop::collection::vec(rule(), 0..3)))
        .prop_map(|(namespace, selector, action, rules)| {
            let mut policy = AuthorizationPolicy::new(
                "p",
                AuthorizationPolicySpec { selector, action, rules, ..AuthorizationPolicySpec::default() },
            );
            policy.metadata.namespace = Some(namespace.into());
            policy
        })
}

pub fn peer_authentication() -> impl Strategy<Value = PeerAuthentication> {
    let mode = || {
        let named =
            select(vec!["STRICT", "PERMISSIVE", "DISABLE", "UNSET", "STRICT", "PERMISSIVE", "DISABLE", "UNSET", "BAD"]);
        prop::option::of(named).prop_map(|mode| MutualTls { mode: mode.map(str::to_owned) })
    };
    let ports = prop::option::weighted(
        0.3,
        prop::collection::btree_map(select(vec!["80".to_owned(), "8080".into()]), mode(), 0..2),
    );
    (select(vec!["shop", "bank", ROOT]), selector(), prop::option::of(mode()), ports).prop_map(
        |(namespace, selector, mtls, port_level_mtls)| {
            let mut policy = PeerAuthentication::new("p", PeerAuthenticationSpec { selector, mtls, port_level_mtls });
            policy.metadata.namespace = Some(namespace.into());
            policy
        },
    )
}

prop_compose! {
    fn request()(
        id in prop::option::weighted(0.7, (select(vec!["cluster.local", "other"]), select(vec!["shop", "bank"]), select(vec!["web", "db"]))),
        source in select(ADDRESSES.as_slice()), destination in select(ADDRESSES.as_slice()),
        pod in (select(vec!["shop", "bank"]), select(vec!["web", "db"])),
        port in select(vec![80, 8080, 9090]),
    ) -> Request {
        // The test cluster has no bank/db.
        let app = if pod.0 == "bank" { "web" } else { pod.1 };
        Request {
            principal: id.map(|(domain, namespace, account)| format!("spiffe://{domain}/ns/{namespace}/sa/{account}").parse().unwrap()),
            source_ip: source.parse().unwrap(),
            destination: workload(pod.0, app),
            destination_ip: destination.parse().unwrap(),
            destination_port: port,
        }
    }
}

fn compile(policies: &[AuthorizationPolicy], peers: &[PeerAuthentication]) -> Rulebook {
    compile_with_gaps(policies, peers, &[])
}

fn compile_with_gaps(
    policies: &[AuthorizationPolicy],
    peers: &[PeerAuthentication],
    gaps: &[Option<&str>],
) -> Rulebook {
    let policies: Vec<_> = policies.iter().cloned().map(Arc::new).collect();
    let peers: Vec<_> = peers.iter().cloned().map(Arc::new).collect();
    let mut snapshot = cluster(&policies, &peers);
    let gap = |namespace: &Option<&str>| PolicyGap { source: "f".into(), namespace: namespace.map(Arc::from) };
    snapshot.policy_gaps = gaps.iter().map(gap).map(Arc::new).collect();
    Rulebook::compile(&snapshot)
}

/// Mostly none.
pub fn gaps() -> impl Strategy<Value = Vec<Option<&'static str>>> {
    let one = select(vec![Some("shop"), Some("bank"), Some(ROOT), None]);
    prop_oneof![6 => Just(Vec::new()), 1 => prop::collection::vec(one, 1..3)]
}

/// What the parts of an explanation come to, in the words of the specification.
fn conclusion(explained: &Explanation, plaintext: bool) -> &'static str {
    let with = |role, action: &'static str| {
        explained.policies.iter().filter(move |policy| policy.role == role && policy.action == action)
    };
    let allow = || with(Role::Decides, "ALLOW");
    match () {
        () if plaintext && explained.plaintext.refused => "mtls_required",
        () if with(Role::Unenforceable, "").next().is_some() => "policy_unenforceable",
        () if with(Role::Decides, "DENY").any(|policy| policy.matched) => "policy_denied",
        () if allow().next().is_some() && !allow().any(|policy| policy.matched) => "policy_not_allowed",
        () if !explained.gaps.is_empty() => "policies_incomplete",
        () => "allowed",
    }
}

fn reason(rules: &Rulebook, request: &Request) -> &'static str {
    decide(rules, request).map_or_else(|denial| denial.reason(), |_| "allowed")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_096, ..ProptestConfig::default() })]

    #[test]
    fn decide_agrees_with_the_model(
        policies in prop::collection::vec(authorization(), 0..5),
        peers in prop::collection::vec(peer_authentication(), 0..4),
        gaps in gaps(),
        requests in prop::collection::vec(request(), 32),
    ) {
        let rules = compile_with_gaps(&policies, &peers, &gaps);
        for request in &requests {
            prop_assert_eq!(reason(&rules, request), model(&policies, &peers, &gaps, request), "{:?}", request);
        }
    }

    #[test]
    fn an_explanation_says_what_decide_says_and_its_parts_come_to_the_same(
        policies in prop::collection::vec(authorization(), 0..5),
        peers in prop::collection::vec(peer_authentication(), 0..4),
        gaps in gaps(),
        requests in prop::collection::vec(request(), 4),
    ) {
        let rules = compile_with_gaps(&policies, &peers, &gaps);
        for request in &requests {
            let explained = explain(&rules, request);
            let answer = reason(&rules, request);
            prop_assert_eq!(if explained.allowed { "allowed" } else { &*explained.reason }, answer);
            prop_assert_eq!(conclusion(&explained, request.principal.is_none()), answer, "{:?}", explained);
            for policy in explained.policies.iter().filter(|policy| policy.role == Role::Decides) {
                prop_assert_eq!(policy.matched, policy.misses.is_empty(), "{:?}", policy);
            }
            for (_, compiled) in rules.policies(&request.destination.namespace) {
                if let Compiled::Enforced(policy) = compiled {
                    let rules = policy.rules.len().max(1);
                    let missed = misses(policy, request).len();
                    prop_assert_eq!(missed < rules, policy.matches(request), "{:?}: {:?}", policy, request);
                }
            }
        }
    }

    #[test]
    fn another_deny_or_peer_authentication_of_strict_never_allows_more(
        policies in prop::collection::vec(authorization(), 0..4),
        mut deny in authorization(),
        requests in prop::collection::vec(request(), 4),
    ) {
        deny.spec.action = Some("DENY".into());
        let before = compile(&policies, &[]);
        let alone = compile(std::slice::from_ref(&deny), &[]);
        let mut more = policies.clone();
        more.push(deny);
        let mut strict = PeerAuthentication::new("s", PeerAuthenticationSpec { mtls: Some(MutualTls { mode: Some("STRICT".into()) }), ..PeerAuthenticationSpec::default() });
        strict.metadata.namespace = Some(ROOT.into());
        let (after, stricter) = (compile(&more, &[]), compile(&policies, &[strict]));
        for request in &requests {
            let denied_before = decide(&before, request).is_err();
            prop_assert!(decide(&after, request).is_err() || !denied_before);
            prop_assert!(decide(&stricter, request).is_err() || !denied_before);
            // Deny overrides: what it denies alone, it denies in any company.
            prop_assert!(decide(&after, request).is_err() || decide(&alone, request).is_ok());
        }
    }

    #[test]
    fn the_order_of_policies_changes_no_answer(
        policies in prop::collection::vec(authorization(), 0..5),
        requests in prop::collection::vec(request(), 4),
    ) {
        let forward = compile(&policies, &[]);
        let backward = compile(&policies.into_iter().rev().collect::<Vec<_>>(), &[]);
        for request in &requests {
            prop_assert_eq!(reason(&forward, request), reason(&backward, request));
        }
    }
}

/// The properties above would hold of a `decide` that always says the same: the requests must meet every answer.
#[test]
fn random_policies_meet_every_answer() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let all = (
        prop::collection::vec(authorization(), 0..5),
        prop::collection::vec(peer_authentication(), 0..4),
        gaps(),
        request(),
    );
    let mut met: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..4_096 {
        let (policies, peers, gaps, request) = all.new_tree(&mut runner).unwrap().current();
        *met.entry(model(&policies, &peers, &gaps, &request)).or_default() += 1;
    }
    for answer in [
        "allowed",
        "mtls_required",
        "policy_denied",
        "policy_not_allowed",
        "policy_unenforceable",
        "policies_incomplete",
    ] {
        assert!(met.get(answer).is_some_and(|count| *count > 100), "{answer} is too rare: {met:?}");
    }
}
