//! I1: the table of what a stolen node, or a thief of its token, tries. Every row is tried on the decisions alone, and again on
//! a CA that listens, with an API server behind it.

use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant, SystemTime},
};

use rcgen::{BasicConstraints, IsCa};
use serde_json::{Value, json};

use super::{
    HOUR, WEB,
    apiserver::{self, Token, pod},
    csr, named,
    nodes::Cluster,
    plain_csr, request, trust_domain, uri,
};
use crate::{
    identity::ca::{
        ServiceAccount,
        admission::{Admission, Approved},
        authorize::{Caller, Rules, bound, here},
        issue::{examine, identity},
        kubernetes,
        refusal::Refusal,
        review::{Review, claims},
    },
    life::limits,
};

const API: &str = "spiffe://mesh.test/ns/shop/sa/api";

/// The pods of the story: an agent on each of two nodes, and what runs there.
pub(super) fn pods() -> Vec<Value> {
    let with = |mut pod: Value, path: &str, field: &str, value: Value| {
        pod[path][field] = value;
        pod
    };
    let at = |seconds: i64| {
        let now = SystemTime::now();
        let span = Duration::from_secs(seconds.unsigned_abs());
        let time = if seconds < 0 { now - span } else { now + span };
        json!(humantime::format_rfc3339_seconds(time).to_string())
    };
    vec![
        pod("heddle-system", "heddle-a", "agent-1", "heddle", "node-1"),
        pod("heddle-system", "heddle-b", "agent-2", "heddle", "node-2"),
        pod("shop", "web-0", "web-0", "web", "node-1"),
        pod("shop", "web-1", "web-1", "web", "node-2"),
        pod("shop", "api-0", "api-0", "api", "node-2"),
        with(pod("shop", "starting-0", "s", "starting", "node-1"), "status", "phase", json!("Pending")),
        with(pod("shop", "leaving-0", "l", "leaving", "node-1"), "metadata", "deletionTimestamp", at(30)),
        with(pod("shop", "gone-0", "g", "gone", "node-1"), "metadata", "deletionTimestamp", at(-1)),
        with(pod("jobs", "done-0", "d", "done", "node-1"), "status", "phase", json!("Succeeded")),
        with(pod("jobs", "failed-0", "f", "failed", "node-1"), "status", "phase", json!("Failed")),
    ]
}

/// The token of the agent on the first node.
pub(super) fn agent() -> Token {
    Token::of("heddle-system", "heddle", "heddle-a", "agent-1")
}

fn other_agent() -> Token {
    Token::of("heddle-system", "heddle", "heddle-b", "agent-2")
}

/// Somebody asks for something.
#[derive(Clone)]
pub(super) struct Try {
    what: &'static str,
    token: Token,
    identity: String,
    csr: String,
    /// Reasons any of which it may be refused for; none for what is granted.
    reasons: &'static [&'static str],
}

fn attempt(what: &'static str, token: Token, identity: &str, reasons: &'static [&'static str]) -> Try {
    Try { what, token, identity: identity.to_owned(), csr: plain_csr(), reasons }
}

/// What must be granted: without it a CA that refuses everybody would pass.
fn granted() -> Vec<Try> {
    let shop = |account: &str| format!("spiffe://mesh.test/ns/shop/sa/{account}");
    vec![
        attempt("its own pod", agent(), WEB, &[]),
        attempt("a pod that starts", agent(), &shop("starting"), &[]),
        attempt("a pod within its grace period", agent(), &shop("leaving"), &[]),
        attempt("the other node's own pod", other_agent(), API, &[]),
        attempt("a token that names its node", Token { node: "node-1".to_owned(), ..agent() }, WEB, &[]),
        Try {
            csr: csr(|csr| csr.subject_alt_names = vec![uri(WEB)]),
            ..attempt("a CSR that names the identity", agent(), WEB, &[])
        },
    ]
}

/// The 12 rows, and their relatives.
fn refused() -> Vec<Try> {
    let replayed = plain_csr();
    let sans =
        |sans: &'static [&'static str]| csr(|csr| csr.subject_alt_names = sans.iter().map(|san| uri(san)).collect());
    vec![
        attempt("1 a pod of another node", agent(), API, &["not_on_node"]),
        attempt("2 another UID", Token { pod_uid: "old".to_owned(), ..agent() }, WEB, &["caller_pod_uid"]),
        attempt(
            "3 a service account that is no agent's",
            Token::of("shop", "web", "web-0", "web-0"),
            WEB,
            &["caller_account"],
        ),
        attempt(
            "3 an account of that name in another namespace",
            Token::of("shop", "heddle", "heddle-a", "agent-1"),
            WEB,
            &["caller_account"],
        ),
        attempt(
            "4 another audience",
            Token { audiences: vec!["vault".to_owned()], ..agent() },
            WEB,
            &["token_audience"],
        ),
        attempt(
            "4 another audience, as only the API server knows",
            Token { audiences: vec!["vault".to_owned()], lies: true, ..agent() },
            WEB,
            &["token_rejected"],
        ),
        attempt("5 an expired token", Token { expires: -1, ..agent() }, WEB, &["token_expired"]),
        attempt(
            "5 an expired token, as only the API server knows",
            Token { expires: -1, lies: true, ..agent() },
            WEB,
            &["token_rejected"],
        ),
        attempt("6 a foreign trust domain", agent(), "spiffe://other.test/ns/shop/sa/web", &["trust_domain"]),
        attempt("7 a pod that has succeeded", agent(), "spiffe://mesh.test/ns/jobs/sa/done", &["pod_ended"]),
        attempt("7 a pod that has failed", agent(), "spiffe://mesh.test/ns/jobs/sa/failed", &["pod_ended"]),
        attempt("8 a pod past its deletion", agent(), "spiffe://mesh.test/ns/shop/sa/gone", &["pod_ended"]),
        attempt("8 a pod that was never there", agent(), "spiffe://mesh.test/ns/shop/sa/nobody", &["not_on_node"]),
        attempt(
            "8 a caller whose pod was deleted",
            Token { pod: "heddle-z".to_owned(), ..agent() },
            WEB,
            &["caller_pod_gone"],
        ),
        Try {
            csr: replayed.clone(),
            ..attempt("9 (the CSR of the other node, granted there)", other_agent(), WEB, &[])
        },
        Try { csr: replayed.clone(), ..attempt("9 a CSR of the other node", agent(), WEB, &["csr_replayed"]) },
        Try { csr: replayed, ..attempt("9 that CSR for another identity", other_agent(), API, &["csr_replayed"]) },
        Try { csr: sans(&[WEB, API]), ..attempt("10 two SANs", agent(), WEB, &["csr_other_name"]) },
        Try { csr: sans(&[WEB, WEB]), ..attempt("10 the same SAN twice", agent(), WEB, &["csr_names"]) },
        Try { csr: sans(&[API]), ..attempt("10 somebody else's SAN", agent(), WEB, &["csr_other_name"]) },
        Try {
            csr: csr(|csr| csr.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            ..attempt("11 CA:TRUE", agent(), WEB, &["csr_ca"])
        },
        Try {
            csr: format!("{}{}", plain_csr(), "\n".repeat(limits::CSR_BYTES)),
            ..attempt("12 an oversize CSR", agent(), WEB, &["csr_too_large"])
        },
        attempt(
            "a token of another node's agent",
            Token { node: "node-2".to_owned(), ..agent() },
            WEB,
            &["caller_node"],
        ),
        attempt(
            "a token that is bound to no pod",
            Token { pod_uid: String::new(), ..agent() },
            WEB,
            &["token_unbound"],
        ),
    ]
}

/// The decisions, one after the other, without any I/O.
struct Decisions {
    pods: Vec<crate::identity::ca::authorize::Pod>,
    rules: Rules,
    admission: Admission,
}

impl Decisions {
    fn new() -> Self {
        let agents = vec![ServiceAccount { namespace: "heddle-system".to_owned(), name: "heddle".to_owned() }];
        let read = |pod: &Value| kubernetes::read(&serde_json::from_value(pod.clone()).unwrap()).unwrap();
        Self {
            pods: pods().iter().map(read).collect(),
            rules: Rules { audience: "istio-ca".to_owned(), agents },
            admission: Admission::new(HOUR),
        }
    }

    fn decide(&self, attempt: &Try) -> Result<Approved, Refusal> {
        let (now, asked) = (SystemTime::now(), request(attempt.csr.clone(), named(&attempt.identity), 60));
        let text = attempt.token.text(0);
        claims(text.as_bytes(), &self.rules.audience, now)?;
        let known = BTreeMap::from([(text.clone(), attempt.token.clone())]);
        let answer = json!({"status": apiserver::review(&known, &text, std::slice::from_ref(&self.rules.audience))});
        let bound = bound(&self.rules, &Review::read(&answer.to_string())?)?;
        let own = self.pods.iter().find(|pod| *pod.namespace == *bound.namespace() && *pod.name == *bound.pod());
        let caller: Caller = bound.stand(own, now)?;
        let identity = identity(&asked, &trust_domain())?;
        let authorized = here(&caller, &identity, &self.pods, now)?;
        self.admission.admit(examine(&asked, authorized, HOUR)?, Instant::now())
    }
}

#[test]
fn i1_decisions_refuse_each_of_twelve_and_their_relatives_for_its_reason() {
    let decisions = Decisions::new();
    for attempt in granted().into_iter().chain(refused()) {
        match decisions.decide(&attempt) {
            Ok(_) => assert!(attempt.reasons.is_empty(), "{}: granted", attempt.what),
            Err(refusal) => {
                assert!(
                    attempt.reasons.contains(&refusal.reason()),
                    "{}: {refusal} ({})",
                    attempt.what,
                    refusal.reason()
                );
                assert!(!refusal.outage(), "{}", attempt.what);
            }
        }
    }
    let rows: HashSet<u32> =
        refused().iter().filter_map(|attempt| attempt.what.split(' ').next()?.parse().ok()).collect();
    assert_eq!(rows, (1..=12).collect(), "every row of the table is tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn i1_a_ca_behind_a_real_api_server_refuses_each_of_twelve_with_one_answer() {
    let cluster = Cluster::start(pods()).await;
    let mut told = HashSet::new();
    let (mut issued, mut reasons) = (0.0, BTreeMap::<&str, f64>::new());
    for attempt in granted().into_iter().chain(refused()) {
        let token = cluster.api.issue(attempt.token.clone());
        let asked = request(attempt.csr.clone(), named(&attempt.identity), 60);
        match cluster.ask(&token, asked).await {
            Ok(chain) => {
                assert!(attempt.reasons.is_empty(), "{}: granted", attempt.what);
                assert_eq!(chain.len(), 2);
                issued += 1.0;
            }
            Err(status) => {
                assert!(!attempt.reasons.is_empty(), "{}: {status:?}", attempt.what);
                told.insert((status.code() as i32, status.message().to_owned(), status.metadata().len()));
                *reasons.entry(attempt.reasons[0]).or_default() += 1.0;
            }
        }
        // What the log and the metric say is the one reason, after every single try.
        for (reason, count) in &reasons {
            assert_eq!(cluster.requests("refused", reason), *count, "{}: {reason}", attempt.what);
        }
    }
    assert_eq!(cluster.requests("issued", ""), issued);
    let told: Vec<_> = told.into_iter().map(|(code, message, _)| (code, message)).collect();
    assert_eq!(told, [(16, "request authenticate failure".to_owned())], "one answer to all of them");
}

#[test]
fn a_review_is_believed_only_in_whole() {
    let decisions = Decisions::new();
    let good = {
        let text = agent().text(0);
        apiserver::review(&BTreeMap::from([(text.clone(), agent())]), &text, &["istio-ca".to_owned()])
    };
    let decide = |status: &Value| {
        let review = Review::read(&json!({ "status": status }).to_string()).unwrap();
        bound(&decisions.rules, &review).map_err(|refusal| refusal.reason())
    };
    assert!(decide(&good).is_ok());
    let pod_name = "/user/extra/authentication.kubernetes.io~1pod-name";
    let node_name = "/user/extra/authentication.kubernetes.io~1node-name";
    for (what, pointer, value, reason) in [
        ("not authenticated", "/authenticated", json!(false), "token_rejected"),
        ("a server that knows of no audiences", "/audiences", json!([]), "token_audience"),
        ("another audience", "/audiences", json!(["istio-ca2"]), "token_audience"),
        ("a user", "/user/username", json!("admin"), "caller_account"),
        ("a longer name", "/user/username", json!("system:serviceaccount:heddle-system:heddle:x"), "caller_account"),
        ("a user that is named like one", "/user/groups", json!(["system:authenticated"]), "caller_account"),
        (
            "an account of no namespace that is ours",
            "/user/groups",
            json!(["system:serviceaccounts", "system:serviceaccounts:shop"]),
            "caller_account",
        ),
        ("no pod", pod_name, json!([]), "token_unbound"),
        ("two pods", pod_name, json!(["heddle-a", "heddle-b"]), "token_unbound"),
        ("an empty pod", pod_name, json!([""]), "token_unbound"),
    ] {
        let mut changed = good.clone();
        *changed.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        assert_eq!(decide(&changed).unwrap_err(), reason, "{what}");
    }
    let mut two_nodes = good;
    two_nodes["user"]["extra"][node_name.rsplit_once('/').unwrap().1.replace("~1", "/")] = json!(["a", "b"]);
    assert_eq!(decide(&two_nodes).unwrap_err(), "token_unbound");
    assert!(Review::read("{\"status\":{}}").is_ok_and(|review| !review.authenticated));
    assert_eq!(Review::read("nothing").unwrap_err().reason(), "api_unavailable");
}
