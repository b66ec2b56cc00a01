//! Each verdict from what leads to it, and nothing proven that was not seen.

use std::{net::SocketAddr, sync::Arc};

use super::{
    ProofError,
    conclude::{Facts, Kernel, Lane, Report, Verdict, conclude},
    target,
};
use crate::{
    capture::PodState,
    cluster::{Endpoint, Service, ServicePort, Snapshot, Workload},
    policy::Denial,
    tunnel::{Answer, Direction, Failure, Flow, Program, Security, Seen, Session, Wire, Witness},
};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/a";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/b";

fn workload(name: &str, addresses: &[&str]) -> Arc<Workload> {
    Arc::new(Workload {
        uid: name.into(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        ..Workload::named("shop", name)
    })
}

fn address() -> SocketAddr {
    "10.0.0.2:80".parse().unwrap()
}

/// A captured pod whose process connected to a destination of the mesh, and of which nothing else is known.
fn facts(mesh: bool) -> Facts {
    let mut facts = Facts::new(&workload("a", &["10.0.0.1"]), "shop/b", address(), mesh);
    facts.capture = Some(PodState::Captured);
    facts.programs = vec![Program { name: "lookup".into(), program: 1, link: 2 }];
    facts.connected = Some(Ok(()));
    facts
}

fn flow() -> Flow {
    Flow {
        direction: Direction::Outbound,
        security: Security::MutualTls,
        source: "10.0.0.1:4000".parse().unwrap(),
        destination: address(),
        hbone_target: Some(address()),
        source_workload: Some(workload("a", &["10.0.0.1"])),
        source_principal: Some(CLIENT.parse().unwrap()),
        destination_workload: Some(workload("b", &["10.0.0.2"])),
        destination_principal: Some(SERVER.parse().unwrap()),
        destination_service: None,
        trace: None,
        session: None,
    }
}

fn session() -> Arc<Session> {
    let wire = Arc::new(Wire::new(Direction::Outbound));
    wire.sent(700);
    let (version, cipher) = ("TLSv1_3", "TLS13_AES_256_GCM_SHA384");
    Arc::new(Session { version, cipher, peer: None, own_serial: "0a".into(), peer_serial: "0b".into(), wire })
}

/// What an honest far side says of that session.
fn witness(decision: &str, reason: &str, delivered: bool) -> Witness {
    Witness {
        client_identity: CLIENT.into(),
        client_serial: "0a".into(),
        server_identity: SERVER.into(),
        server_serial: "0b".into(),
        tls: "TLSv1_3".into(),
        cipher: "TLS13_AES_256_GCM_SHA384".into(),
        decision: decision.into(),
        reason: reason.into(),
        detail: format!("because of {reason}"),
        delivered,
        ..Witness::default()
    }
}

/// The peer's answer came with this status and witness.
fn answered(status: u16, witness: Option<Witness>) -> Report {
    let mut facts = facts(true);
    facts.arrived = true;
    let answer = Answer { status: Some(status), witness, session: Some(session()) };
    facts.seen = Some(Seen { flow: flow(), answer, connection: None, failure: None });
    facts.note_bytes();
    conclude(facts)
}

fn failed(reason: &'static str, flags: &'static str) -> Report {
    let mut facts = facts(true);
    facts.arrived = true;
    let failure = Some(Failure { reason, flags, detail: "words".into() });
    facts.seen = Some(Seen { flow: flow(), answer: Answer::default(), connection: None, failure });
    conclude(facts)
}

#[test]
fn what_both_sides_saw_alike_is_proven_and_a_silent_far_side_is_no_objection() {
    for far in [Some(witness("allowed", "", true)), None] {
        let report = answered(200, far.clone());
        assert_eq!((report.verdict, report.verdict.status()), (Verdict::Proven, 0));
        assert_eq!(report.security, "mutual_tls");
        assert_eq!(
            (report.authenticated, report.encrypted, report.allowed, report.delivered),
            (true, true, Some(true), true)
        );
        assert_eq!(report.far, far);
        let near = report.near.unwrap();
        assert_eq!((&*near.client_identity, &*near.server_identity), (CLIENT, SERVER));
        assert_eq!((&*near.client_serial, &*near.server_serial), ("0a", "0b"));
        assert_eq!(report.bytes.tunnel_sent, 700);
    }
}

#[test]
fn a_refusal_is_told_apart_by_who_refused() {
    let denied = answered(401, Some(witness("denied", "policy_denied", false)));
    assert_eq!((denied.verdict, denied.encrypted, denied.allowed), (Verdict::Denied, true, Some(false)));
    assert!(denied.summary.contains("because of policy_denied"), "{}", denied.summary);
    let silent = answered(401, None);
    assert_eq!((silent.verdict, silent.allowed), (Verdict::Denied, Some(false)));
    let app = answered(503, Some(witness("allowed", "app_refused", false)));
    assert_eq!((app.verdict, app.allowed, app.delivered), (Verdict::AppRefused, Some(true), false));
    let nobody_knows = answered(503, None);
    assert_eq!((nobody_knows.verdict, nobody_knows.verdict.status()), (Verdict::Unknown, 2));
    assert!(nobody_knows.encrypted && nobody_knows.allowed.is_none());
    assert_eq!(answered(400, None).verdict, Verdict::Unknown);
}

#[test]
fn sides_that_saw_different_things_prove_nothing() {
    type Change = fn(&mut Witness);
    let changes: [(&str, Change); 6] = [
        ("client's identity", |far| far.client_identity = SERVER.into()),
        ("server's identity", |far| far.server_identity = CLIENT.into()),
        ("client's certificate", |far| far.client_serial = "ff".into()),
        ("server's certificate", |far| far.server_serial.clear()),
        ("TLS version", |far| far.tls = "TLSv1_2".into()),
        ("cipher", |far| far.cipher.clear()),
    ];
    for (what, change) in changes {
        let mut far = witness("allowed", "", true);
        change(&mut far);
        let report = answered(200, Some(far));
        assert_eq!((report.verdict, report.verdict.status()), (Verdict::Disagreement, 1), "{what}");
        assert!(!report.authenticated && !report.encrypted && !report.delivered, "{what}");
        assert!(report.summary.contains(what), "{}", report.summary);
    }
}

#[test]
fn without_a_session_nothing_is_authenticated() {
    for (reason, flags, verdict) in [
        ("unknown_issuer", "TLS_FAILURE", Verdict::NotAuthenticated),
        ("no_certificate", "IDENTITY_ERROR", Verdict::NotAuthenticated),
        ("tunnel_connect_timeout", "CONNECT", Verdict::Unknown),
        ("destination_unknown", "CONNECT", Verdict::Unknown),
    ] {
        let report = failed(reason, flags);
        assert_eq!(report.verdict, verdict, "{reason}");
        assert!(!report.authenticated && !report.encrypted && report.allowed.is_none());
        assert!(report.near.unwrap().client_identity.is_empty(), "nobody proved it");
    }
}

/// The kernel did this with it, and policy says that of it.
fn on_lane(kernel: Kernel, connected: Result<(), String>, decision: Result<Option<&str>, Denial>) -> Report {
    let mut facts = facts(true);
    facts.connected = Some(connected);
    facts.lane = Some(Lane {
        kernel,
        client: "10.0.0.1:4000".parse().unwrap(),
        app: address(),
        client_identity: CLIENT.into(),
        server_identity: SERVER.into(),
        pod: "shop/b".into(),
        programs: vec![Program { name: "lookup".into(), program: 3, link: 4 }],
        decision: decision.map(|policy| policy.map(Arc::from)),
    });
    facts.note_heard(5, 7);
    conclude(facts)
}

fn denial() -> Denial {
    Denial::Explicit { policy: "shop/no".into() }
}

#[test]
fn what_the_kernel_carries_is_proven_by_it_and_never_called_encrypted() {
    let report = on_lane(Kernel::Carries, Ok(()), Ok(Some("shop/yes")));
    assert_eq!((report.verdict, report.verdict.status(), &*report.security), (Verdict::Proven, 0, "kernel_attested"));
    assert_eq!((report.authenticated, report.encrypted, report.delivered), (true, false, true));
    assert_eq!((report.allowed, &*report.policy), (Some(true), "shop/yes"));
    assert!(report.summary.contains("nothing is encrypted"), "{}", report.summary);
    assert_eq!((report.bytes.to_app, report.bytes.to_client), (5, 7));
    let lane = report.lane.unwrap();
    assert_eq!((&*lane.kernel, &*lane.pod, &*lane.address), ("carries", "shop/b", "10.0.0.2:80"));
    assert_eq!((&*lane.client_identity, &*lane.server_identity, lane.programs.len()), (CLIENT, SERVER, 1));
    assert!(report.near.is_none() && report.far.is_none());
}

#[test]
fn what_the_kernel_refuses_or_does_not_bring_over_says_so() {
    let not_permitted = || Err("Operation not permitted (os error 1)".to_owned());
    let refused = on_lane(Kernel::Refused, not_permitted(), Err(denial()));
    assert_eq!((refused.verdict, refused.allowed, &*refused.policy), (Verdict::Denied, Some(false), "shop/no"));
    assert_eq!((refused.authenticated, refused.encrypted, &*refused.security), (true, false, "kernel_attested"));
    let silent = on_lane(Kernel::LetOut, Ok(()), Ok(None));
    assert_eq!((silent.verdict, silent.authenticated, silent.delivered), (Verdict::Unknown, false, false));
    let closed = on_lane(Kernel::WouldCarry, Err("Connection refused (os error 111)".into()), Ok(None));
    assert_eq!((closed.verdict, closed.authenticated, closed.allowed), (Verdict::AppRefused, false, Some(true)));
    assert!(closed.summary.contains("Connection refused"), "{}", closed.summary);
    // The kernel and the engine must say the same.
    for (kernel, decision) in
        [(Kernel::Carries, Err(denial())), (Kernel::WouldCarry, Err(denial())), (Kernel::Refused, Ok(None))]
    {
        let report = on_lane(kernel, Ok(()), decision);
        assert_eq!((report.verdict, report.authenticated, report.allowed), (Verdict::Disagreement, false, None));
        assert_eq!((&*report.security, report.delivered), ("", false), "{kernel:?}");
    }
}

/// Carried, or refused, by this agent alone.
fn in_one_crossing(far: Option<Witness>, failure: Option<Failure>) -> Report {
    let mut facts = facts(true);
    facts.arrived = true;
    let flow = Flow { security: Security::KernelAttested, hbone_target: None, ..flow() };
    let answer = Answer { witness: far, ..Answer::default() };
    facts.seen = Some(Seen { flow, answer, connection: None, failure });
    conclude(facts)
}

#[test]
fn one_crossing_of_the_agent_is_proven_by_the_kernel_and_never_called_mutual_tls() {
    let plain = |witness: Witness| Witness {
        client_serial: String::new(),
        server_serial: String::new(),
        tls: String::new(),
        cipher: String::new(),
        ..witness
    };
    let failure = |reason, flags| Some(Failure { reason, flags, detail: "words".into() });
    let proven = in_one_crossing(Some(plain(witness("allowed", "", true))), None);
    assert_eq!((proven.verdict, &*proven.security), (Verdict::Proven, "kernel_attested"));
    assert_eq!((proven.authenticated, proven.encrypted, proven.delivered), (true, false, true));
    let near = proven.near.unwrap();
    assert_eq!((near.tunnel, &*near.security, &*near.tls), (false, "kernel_attested", ""));
    assert_eq!((&*near.client_identity, &*near.server_identity), (CLIENT, SERVER));
    let far = Some(plain(witness("denied", "policy_denied", false)));
    let denied = in_one_crossing(far, failure("denied_by_peer", "DENY"));
    assert_eq!((denied.verdict, denied.allowed, denied.authenticated), (Verdict::Denied, Some(false), true));
    assert!(denied.summary.contains("because of policy_denied") && !denied.encrypted, "{}", denied.summary);
    let far = Some(plain(witness("allowed", "app_timeout", false)));
    let silent = in_one_crossing(far, failure("app_unreachable", "CONNECT"));
    assert_eq!((silent.verdict, silent.allowed, silent.delivered), (Verdict::AppRefused, Some(true), false));
    let full = in_one_crossing(None, failure("app_unreachable", "CONNECT"));
    assert_eq!((full.verdict, full.encrypted, full.delivered), (Verdict::Unknown, false, false));
    let strange = in_one_crossing(Some(witness("allowed", "", true)), None);
    assert_eq!(strange.verdict, Verdict::Disagreement, "it has a certificate where there is no TLS");
}

#[test]
fn a_connection_that_the_agent_did_not_see_is_plain_or_leaks() {
    let outside = conclude(facts(false));
    assert_eq!((outside.verdict, outside.near.is_none()), (Verdict::Plain, true));
    let leak = conclude(facts(true));
    assert_eq!((leak.verdict, leak.verdict.status()), (Verdict::Uncaptured, 1));
    let mut refused = facts(true);
    refused.connected = Some(Err("Operation not permitted".into()));
    assert_eq!(conclude(refused).verdict, Verdict::Unknown);
    let mut dropped = facts(true);
    dropped.arrived = true;
    assert_eq!(conclude(dropped).verdict, Verdict::Unknown);
    let mut late = facts(true);
    late.trouble = Some("nothing was known".into());
    assert_eq!(conclude(late).verdict, Verdict::Unknown);
}

#[test]
fn a_pod_that_is_outside_or_not_captured_says_so() {
    let mut outside = facts(true);
    (outside.enrolled, outside.connected) = (false, None);
    let report = conclude(outside);
    assert_eq!((report.verdict, &*report.from.state), (Verdict::Plain, "outside"));
    let mut uncaptured = facts(true);
    uncaptured.capture = Some(PodState::Uncaptured { reason: "link", detail: "gone".into() });
    uncaptured.connected = None;
    let report = conclude(uncaptured);
    assert_eq!((report.verdict, &*report.from.detail), (Verdict::Uncaptured, "link: gone"));
    // By a Service that has an endpoint outside the mesh.
    let mut plain = facts(true);
    plain.arrived = true;
    let flow = Flow { security: Security::None, hbone_target: None, ..flow() };
    plain.seen = Some(Seen { flow, answer: Answer::default(), connection: None, failure: None });
    let report = conclude(plain);
    assert_eq!((report.verdict, report.encrypted), (Verdict::Plain, false));
}

fn snapshot() -> Snapshot {
    let pods = [workload("a", &["10.0.0.1"]), workload("b", &["fd00::2", "10.0.0.2"]), workload("six", &["fd00::3"])];
    let service = Arc::new(Service {
        cluster_addresses: vec!["fd96::1".parse().unwrap(), "10.96.0.1".parse().unwrap()],
        ports: vec![ServicePort { name: "".into(), port: 80 }],
        endpoints: vec![Endpoint {
            address: "10.0.0.2".parse().unwrap(),
            ports: [("".into(), 7000)].into(),
            ready: true,
            terminating: false,
            node: "".into(),
            zone: "".into(),
        }],
        ..Service::named("shop", "web")
    });
    Snapshot {
        workloads: pods.into_iter().map(|pod| (Arc::clone(&pod.uid), pod)).collect(),
        services: [(Arc::from("shop/web"), service)].into(),
        ..Snapshot::default()
    }
}

#[test]
fn a_destination_is_a_pod_or_a_service_by_an_address_that_the_source_can_reach() {
    let snapshot = snapshot();
    let from = workload("a", &["10.0.0.1"]);
    let found = |text: &str| target(&snapshot, &from, text).map(|target| target.address.to_string());
    assert_eq!(found("shop/b:80").unwrap(), "10.0.0.2:80");
    assert_eq!(found("b:80").unwrap(), "10.0.0.2:80");
    assert_eq!(found("shop/b").unwrap(), "10.0.0.2:7000", "the port of a Service");
    assert_eq!(found("service/web.shop:8080").unwrap(), "10.96.0.1:8080");
    assert_eq!(found("service/web.shop").unwrap(), "10.96.0.1:80");
    let reason = |text: &str| found(text).map_err(|error: ProofError| error.reason()).unwrap_err();
    assert_eq!(reason("shop/six:80"), "no_common_family");
    assert_eq!(reason("shop/a"), "no_port");
    assert_eq!(reason("shop/none:80"), "no_such_pod");
    assert_eq!(reason("service/none.shop:80"), "no_such_service");
    for text in ["shop/b:0", "shop/b:http", ":80", "", "service/web:80"] {
        assert_eq!(reason(text), "bad_destination", "{text}");
    }
}

#[test]
fn the_json_of_a_report_is_stable() {
    let report = answered(200, Some(witness("allowed", "", true)));
    let value = serde_json::to_value(&report).unwrap();
    let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(
        keys(&value),
        "address allowed authenticated bytes delivered encrypted far from lane near policy security summary to verdict"
    );
    assert_eq!(keys(&value["from"]), "detail pod programs state");
    assert_eq!(
        keys(&value["near"]),
        "address cipher client client_identity client_serial detail pod reason security server_identity server_serial status tls \
         tunnel"
    );
    let lane = serde_json::to_value(on_lane(Kernel::Carries, Ok(()), Ok(None)).lane).unwrap();
    assert_eq!(keys(&lane), "address client client_identity kernel pod programs server_identity");
    assert_eq!(
        keys(&value["far"]),
        "cipher client client_identity client_serial decision delivered detail node pod policy programs reason \
         server_identity server_serial tls"
    );
    assert_eq!(keys(&value["bytes"]), "to_app to_client tunnel_received tunnel_sent");
    assert_eq!(value["verdict"], "proven");
    assert_eq!(serde_json::from_value::<Report>(value).unwrap(), report);
}
