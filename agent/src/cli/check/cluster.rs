//! `heddle check` of the cluster: is the way to it there, do the clocks agree, and does a NetworkPolicy keep the mesh's port shut?

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use http::StatusCode;
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        core::v1::{Namespace, Pod},
        networking::v1::{NetworkPolicy, NetworkPolicyPort},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
    jiff,
};
use kube::{Api, Client, ResourceExt, api::ListParams, client::Body};
use tokio::net::TcpStream;

use super::{super::reach::Kubeconfig, Finding, Severity};
use crate::{
    cluster::{MESH, enrolled},
    life::limits,
};

/// Where a peer's agent is asked for (`HBONE_PORT`).
const PORT: i32 = heddle_common::HBONE_PORT as i32;
/// Certificates are valid from a little before they are made: more than this and a fresh one is not valid yet.
const SKEW: Duration = Duration::from_secs(60);
const CRDS: [&str; 2] = ["authorizationpolicies.security.istio.io", "peerauthentications.security.istio.io"];

/// What is asked.
pub(super) struct Question<'a> {
    pub namespace: Option<&'a str>,
    pub root_namespace: &'a str,
    pub ca_address: Option<&'a str>,
}

/// Asks and judges. A question that gets no answer is a finding of its own.
pub(super) fn check(way: &Kubeconfig, question: &Question<'_>, patience: Duration) -> Vec<Finding> {
    way.ask(patience, async |client| Ok(all(&client, question).await))
        .unwrap_or_else(|error| vec![unreachable(format!("{error:#}"))])
}

fn unreachable(error: impl Into<String>) -> Finding {
    let fix = "see that the kubeconfig leads to a cluster that runs";
    Finding::new(Severity::Error, "api_server_unreachable", "API server", error, fix)
}

async fn all(client: &Client, question: &Question<'_>) -> Vec<Finding> {
    let mut found = match clock(client).await {
        Ok(Ok(finding)) => vec![finding],
        // Nothing else would be answered either.
        Ok(Err(useless)) => return vec![useless],
        Err(error) => return vec![unreachable(format!("{error:#}"))],
    };
    for name in CRDS {
        let api: Api<CustomResourceDefinition> = Api::all(client.clone());
        found.push(asked(
            &format!("CRD {name}"),
            api.get_metadata_opt(name).await.map(|there| crd(name, there.is_some())),
        ));
    }
    let network = policies(client, question.namespace).await;
    match network {
        Ok(some) => found.extend(some),
        Err(error) => found.push(unasked("NetworkPolicies", &error)),
    }
    let agents: Api<DaemonSet> = Api::namespaced(client.clone(), question.root_namespace);
    found.push(asked("the agents", agents.get_opt("heddle-agent").await.map(|there| daemon_set(there.as_ref()))));
    let ca: Api<Deployment> = Api::namespaced(client.clone(), question.root_namespace);
    found.extend(match ca.get_opt("heddle-ca").await {
        Ok(there) => there.as_ref().map(deployment),
        Err(error) => Some(unasked("the CA", &error)),
    });
    if let Some(address) = question.ca_address {
        found.push(reach(address).await);
    }
    found
}

/// What came of a question, or that it was not answered.
fn asked(what: &str, answer: Result<Finding, kube::Error>) -> Finding {
    answer.unwrap_or_else(|error| unasked(what, &error))
}

fn unasked(what: &str, error: &dyn std::error::Error) -> Finding {
    let fix = "ask as somebody who may read it";
    Finding::new(Severity::Warning, "not_asked", what, error.to_string(), fix)
}

/// The API server's clock, by the date of an answer; or that its answers are of no use.
async fn clock(client: &Client) -> anyhow::Result<Result<Finding, Finding>> {
    let request = http::Request::get("/version").body(Body::empty())?;
    let answer = client.send(request).await?;
    if let Some(finding) = useless(answer.status()) {
        return Ok(Err(finding));
    }
    let date = answer.headers().get(http::header::DATE).context("the API server's answer has no date")?.to_str()?;
    let theirs =
        jiff::fmt::rfc2822::parse(date).context("the date of the API server's answer")?.timestamp().as_second();
    let own = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(Ok(skew(theirs - i64::try_from(own).unwrap_or(i64::MAX))))
}

/// Whether an API server that answers so answers nobody, or not us. Who is known and may not ask this may ask other things.
fn useless(status: StatusCode) -> Option<Finding> {
    if status == StatusCode::UNAUTHORIZED {
        let fix = "renew the credentials in the kubeconfig";
        let detail = format!("does not know who asks ({status})");
        return Some(Finding::new(Severity::Error, "not_authenticated", "API server", detail, fix));
    }
    status.is_server_error().then(|| unreachable(format!("answers, but is of no use: {status}")))
}

/// `ahead`: how far the API server's clock is ahead of ours (seconds).
fn skew(ahead: i64) -> Finding {
    if ahead.unsigned_abs() <= SKEW.as_secs() {
        return Finding::pass(
            "clock",
            "API server",
            format!("answers; its clock and this one are {} s apart", ahead.abs()),
        );
    }
    let direction = if ahead > 0 { "behind" } else { "ahead of" };
    Finding::new(
        Severity::Error,
        "clock_skew",
        "clock",
        format!(
            "{} s {direction} the API server's: tokens and certificates are taken for expired or not valid yet",
            ahead.abs()
        ),
        "let both follow a time server (NTP)",
    )
}

fn crd(name: &str, there: bool) -> Finding {
    if there {
        return Finding::pass("crd", format!("CRD {name}"), "is there");
    }
    Finding::new(
        Severity::Warning,
        "crd_missing",
        format!("CRD {name}"),
        "is not there: no such policy can be written",
        "heddle install --crds=yes, or install Istio's",
    )
}

fn daemon_set(agents: Option<&DaemonSet>) -> Finding {
    let Some(agents) = agents else {
        return Finding::pass("not_installed", "the agents", "are not installed yet");
    };
    let status = agents.status.clone().unwrap_or_default();
    let (wanted, ready) = (status.desired_number_scheduled, status.number_ready);
    if ready < wanted {
        let detail = format!("{ready} of {wanted} are ready");
        let fix = "kubectl describe the pods that are not, and see `heddle status` there: it says what it waits for";
        return Finding::new(Severity::Error, "agents_not_ready", "the agents", detail, fix);
    }
    Finding::pass("agents", "the agents", format!("all {wanted} are ready"))
}

fn deployment(ca: &Deployment) -> Finding {
    let ready = ca.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
    match ready {
        0 => Finding::new(
            Severity::Error,
            "ca_not_ready",
            "the CA",
            "no replica is ready: certificates serve until they expire, and no new identity gets one",
            "see the log of its pods; it names what is wrong with its key",
        ),
        ready => Finding::pass("ca", "the CA", format!("{ready} replicas are ready")),
    }
}

/// Whether anything answers at the CA's address.
async fn reach(address: &str) -> Finding {
    let fix = "see that the CA runs, and that no firewall or NetworkPolicy is between";
    let uri: http::Uri = match address.parse() {
        Ok(uri) => uri,
        Err(error) => {
            return Finding::new(
                Severity::Error,
                "ca_unreachable",
                address,
                error_text(&error),
                "give https://HOST:PORT",
            );
        }
    };
    let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(443));
    match tokio::time::timeout(limits::CONNECT_PEER, TcpStream::connect((host.trim_matches(['[', ']']), port))).await {
        Ok(Ok(_)) => Finding::pass("ca_reachable", address, "answers"),
        Ok(Err(error)) => Finding::new(Severity::Error, "ca_unreachable", address, error_text(&error), fix),
        Err(_) => {
            let detail = format!("no answer in {:?}", limits::CONNECT_PEER);
            Finding::new(Severity::Error, "ca_unreachable", address, detail, fix)
        }
    }
}

fn error_text(error: &dyn std::error::Error) -> String {
    error.to_string()
}

/// The policies that keep tunnels out of, or in, the pods of enrolled namespaces, or of the named one.
async fn policies(client: &Client, only: Option<&str>) -> Result<Vec<Finding>, kube::Error> {
    let all = Api::<Namespace>::all(client.clone());
    let namespaces: Vec<Namespace> = match only {
        Some(name) => match all.get_opt(name).await? {
            Some(mut namespace) => {
                // As if it were enrolled: that is what is asked.
                namespace.labels_mut().insert(MESH.to_owned(), "enabled".to_owned());
                vec![namespace]
            }
            None => {
                let what = format!("namespace {name}");
                let fix = "give the name of one that is there";
                return Ok(vec![Finding::new(Severity::Error, "namespace_missing", what, "is not there", fix)]);
            }
        },
        None => all.list(&ListParams::default().labels(&format!("{MESH}=enabled"))).await?.items,
    };
    let mut found = Vec::new();
    for namespace in &namespaces {
        match of_namespace(client, namespace).await {
            Ok(shut) => found.extend(shut),
            // Who may read one namespace is told of that one.
            Err(error) => found.push(unasked(&format!("NetworkPolicies of {}", namespace.name_any()), &error)),
        }
    }
    if found.is_empty() {
        let detail = format!("none of {} namespaces keeps port {PORT} shut", namespaces.len());
        found.push(Finding::pass("network_policies", "NetworkPolicies", detail));
    }
    Ok(found)
}

async fn of_namespace(client: &Client, namespace: &Namespace) -> Result<Vec<Finding>, kube::Error> {
    let name = namespace.name_any();
    let policies: Api<NetworkPolicy> = Api::namespaced(client.clone(), &name);
    let policies = policies.list(&ListParams::default()).await?.items;
    if policies.is_empty() {
        return Ok(Vec::new());
    }
    let pods = Api::<Pod>::namespaced(client.clone(), &name).list(&ListParams::default()).await?.items;
    let pods: Vec<Pod> = pods.into_iter().filter(|pod| enrolled(pod, Some(namespace.labels()))).collect();
    Ok(blocked(&name, &pods, &policies))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Ingress,
    Egress,
}

/// Pods that no policy of theirs lets talk on the mesh's port, by the policies that isolate them.
fn blocked(namespace: &str, pods: &[Pod], policies: &[NetworkPolicy]) -> Vec<Finding> {
    let mut shut: BTreeMap<(Way, BTreeSet<String>), usize> = BTreeMap::new();
    for pod in pods {
        for way in [Way::Ingress, Way::Egress] {
            let isolating = policies.iter().filter(|policy| isolates(policy, way) && selects(policy, pod.labels()));
            let isolating: Vec<&NetworkPolicy> = isolating.collect();
            if !isolating.is_empty() && !isolating.iter().any(|policy| lets(policy, way)) {
                let names = isolating.iter().map(|policy| policy.name_any()).collect();
                *shut.entry((way, names)).or_default() += 1;
            }
        }
    }
    let finding = |((way, names), count): ((Way, BTreeSet<String>), usize)| {
        let names = names.into_iter().collect::<Vec<_>>().join(", ");
        let (which, fix) = match way {
            Way::Ingress => ("into", "add TCP port 15008 to an ingress rule of one of them"),
            Way::Egress => ("out of", "add TCP port 15008 to an egress rule of one of them"),
        };
        Finding::new(
            Severity::Error,
            "network_policy_blocks",
            format!("NetworkPolicy {namespace}/{names}"),
            format!("lets no tunnel {which} {count} pods: TCP port {PORT} is in none of their rules"),
            fix,
        )
    };
    shut.into_iter().map(finding).collect()
}

/// Whether a policy shuts what it does not let through, that way.
fn isolates(policy: &NetworkPolicy, way: Way) -> bool {
    let Some(spec) = &policy.spec else { return false };
    match &spec.policy_types {
        Some(types) => types.iter().any(|kind| kind == if way == Way::Ingress { "Ingress" } else { "Egress" }),
        None => way == Way::Ingress || spec.egress.is_some(),
    }
}

fn selects(policy: &NetworkPolicy, labels: &BTreeMap<String, String>) -> bool {
    let selector = policy.spec.as_ref().and_then(|spec| spec.pod_selector.as_ref());
    selector.is_none_or(|selector| fits(selector, labels))
}

fn fits(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let within = selector.match_expressions.iter().flatten().all(|wanted| {
        let has = labels.get(&wanted.key);
        let listed = || has.is_some_and(|value| wanted.values.iter().flatten().any(|one| one == value));
        match wanted.operator.as_str() {
            "In" => listed(),
            "NotIn" => !listed(),
            "Exists" => has.is_some(),
            "DoesNotExist" => has.is_none(),
            _ => false,
        }
    });
    equal && within
}

/// Whether some rule has the mesh's port, for whomever.
fn lets(policy: &NetworkPolicy, way: Way) -> bool {
    let Some(spec) = &policy.spec else { return false };
    let ports: Vec<Option<&Vec<NetworkPolicyPort>>> = match way {
        Way::Ingress => spec.ingress.iter().flatten().map(|rule| rule.ports.as_ref()).collect(),
        Way::Egress => spec.egress.iter().flatten().map(|rule| rule.ports.as_ref()).collect(),
    };
    ports.into_iter().any(|ports| ports.is_none_or(|ports| ports.is_empty() || ports.iter().any(has)))
}

fn has(port: &NetworkPolicyPort) -> bool {
    let tcp = port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    tcp && match (&port.port, port.end_port) {
        (None, _) => true,
        (Some(IntOrString::Int(first)), Some(last)) => (*first..=last).contains(&PORT),
        (Some(IntOrString::Int(only)), None) => *only == PORT,
        // Named ports are those of containers, and none of them has the mesh's.
        (Some(IntOrString::String(_)), _) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(name: &str, spec: Value) -> NetworkPolicy {
        let policy = json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec});
        serde_json::from_value(policy).unwrap()
    }

    fn pod(app: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": app, "labels": {"app": app}}, "spec": {"containers": []}}))
            .unwrap()
    }

    #[test]
    fn a_policy_that_keeps_the_meshs_port_shut_is_named_and_one_that_another_opens_is_not() {
        let pods = [pod("web"), pod("db")];
        let only = |ports: Value| {
            json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"],
                   "ingress": [{"from": [{"podSelector": {}}], "ports": ports}]})
        };
        let shut = policy("app-port", only(json!([{"port": 5432}])));
        let names = |policies: &[NetworkPolicy]| -> Vec<String> {
            blocked("shop", &pods, policies).into_iter().map(|finding| finding.what).collect()
        };
        assert_eq!(names(std::slice::from_ref(&shut)), ["NetworkPolicy shop/app-port"]);
        for ports in [
            json!([{"port": 5432}, {"port": 15008, "protocol": "TCP"}]),
            json!([{"port": 15000, "endPort": 15100}]),
            json!([{"protocol": "TCP"}]),
            json!([]),
        ] {
            assert_eq!(names(&[policy("open", only(ports.clone()))]), Vec::<String>::new(), "{ports}");
            assert_eq!(names(&[shut.clone(), policy("open", only(ports))]), Vec::<String>::new());
        }
        for ports in [json!([{"port": 15008, "protocol": "UDP"}]), json!([{"port": "hbone"}]), json!([{"port": 15009}])]
        {
            assert_eq!(names(&[policy("shut", only(ports))]).len(), 1);
        }
        let deny = policy("deny-all", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
        let found = blocked("shop", &pods, &[deny]);
        assert_eq!(found.len(), 2, "one for each way: {found:?}");
        assert!(found.iter().all(|finding| finding.severity == Severity::Error && finding.detail.contains("2 pods")));
        let other = policy(
            "elsewhere",
            json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web", "db"]}]}}),
        );
        assert_eq!(names(&[other]), Vec::<String>::new());
    }

    #[test]
    fn an_api_server_that_answers_nobody_is_no_sound_one_and_one_that_forbids_a_question_may_answer_others() {
        let reason = |status| useless(status).map(|finding| (finding.severity, finding.reason));
        assert_eq!(reason(StatusCode::UNAUTHORIZED), Some((Severity::Error, "not_authenticated".to_owned())));
        for status in [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE] {
            assert_eq!(reason(status), Some((Severity::Error, "api_server_unreachable".to_owned())), "{status}");
        }
        for status in [StatusCode::OK, StatusCode::FORBIDDEN, StatusCode::NOT_FOUND] {
            assert_eq!(reason(status), None, "{status}");
        }
    }

    #[test]
    fn clocks_may_differ_by_a_minute() {
        for (ahead, severity) in
            [(0, Severity::Pass), (60, Severity::Pass), (-61, Severity::Error), (61, Severity::Error)]
        {
            assert_eq!(skew(ahead).severity, severity, "{ahead}");
        }
        assert!(skew(90).detail.contains("behind") && skew(-90).detail.contains("ahead of"));
    }
}
