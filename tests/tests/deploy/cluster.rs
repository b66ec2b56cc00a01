//! What `heddle check` and `heddle uninstall --verify` say of a cluster, what they ask its API server, and what they say of one
//! that gives no answer.

use std::{collections::BTreeSet, fs};

use anyhow::{Context, ensure};
use heddle_lab::{Lab, Result, apiserver::Fault, needs_root};
use serde_json::{Value, json};

use super::{deploy, documents};

/// Who asks.
const OPERATOR: &str = "operator";
/// All that `heddle check` asks for; deploy/README.md says so too.
const CHECK_READS: [(&str, &str, &str); 6] = [
    ("get", "apiextensions.k8s.io", "customresourcedefinitions"),
    ("list", "", "namespaces"),
    ("list", "networking.k8s.io", "networkpolicies"),
    ("list", "", "pods"),
    ("get", "apps", "daemonsets"),
    ("get", "apps", "deployments"),
];
const TAINT: &str = "heddle.dev/not-ready";

/// A way to the lab's API server for a user of its own.
fn kubeconfig(lab: &Lab) -> Result<String> {
    let path = lab.dir().join("operator.kubeconfig");
    lab.kubernetes()?.write_kubeconfig_of(&path, OPERATOR)?;
    Ok(path.to_str().context("not UTF-8")?.to_owned())
}

/// The same with one part of its text changed.
fn changed(kubeconfig: &str, name: &str, from: &str, to: &str) -> Result<String> {
    let text = fs::read_to_string(kubeconfig)?;
    ensure!(text.contains(from), "no {from} in {text}");
    let path = format!("{kubeconfig}.{name}");
    fs::write(&path, text.replace(from, to))?;
    Ok(path)
}

/// One that leads to a port on which nobody listens.
fn astray(lab: &Lab, kubeconfig: &str) -> Result<String> {
    let server = lab.kubernetes()?.address();
    changed(kubeconfig, "astray", &server.to_string(), &format!("{}:1", server.ip()))
}

/// What `heddle check` found in the cluster, and its exit status.
struct Checked {
    status: Option<i32>,
    found: Vec<Value>,
}

impl Checked {
    fn ask(lab: &Lab, kubeconfig: &str, more: &[&str]) -> Result<Self> {
        let args = [&["check", "--json", "--area", "cluster", "--kubeconfig", kubeconfig], more].concat();
        let output = lab.agent(1)?.heddle(&args)?;
        let found = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        Ok(Self { status: output.status.code(), found })
    }

    /// Reasons of a severity, each once.
    fn reasons(&self, severity: &str) -> BTreeSet<&str> {
        let of = self.found.iter().filter(|one| one["severity"] == severity);
        of.filter_map(|one| one["reason"].as_str()).collect()
    }

    fn one(&self, reason: &str) -> Result<&Value> {
        self.found
            .iter()
            .find(|one| one["reason"] == reason)
            .with_context(|| format!("no {reason} in {:?}", self.found))
    }
}

fn of_kind(file: &str, kind: &str) -> Result<Value> {
    let all = documents(&fs::read_to_string(deploy().join(file))?)?;
    all.into_iter().find(|object| object["kind"] == kind).with_context(|| format!("no {kind} in {file}"))
}

/// The agents' DaemonSet, as one that wants an agent on each of two nodes.
fn agents(ready: u32) -> Result<Value> {
    let mut object = of_kind("agent/daemonset.yaml", "DaemonSet")?;
    object["status"] = json!({
        "currentNumberScheduled": 2, "desiredNumberScheduled": 2, "numberMisscheduled": 0, "numberReady": ready,
    });
    Ok(object)
}

fn ca(ready: u32) -> Result<Value> {
    let mut object = of_kind("ca/ca.yaml", "Deployment")?;
    // What is zero the real one leaves out.
    object["status"] = if ready == 0 { json!({"replicas": 2}) } else { json!({"replicas": 2, "readyReplicas": ready}) };
    Ok(object)
}

/// Lets connections to the shop's web pods in on these ports.
fn network_policy(name: &str, ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port, "protocol": "TCP"})).collect();
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {}}], "ports": ports}],
        },
    })
}

/// A cluster in which all is well.
fn sound() -> Result<Lab> {
    let lab = Lab::builder().nodes(1).kubernetes().start()?;
    let api = lab.kubernetes()?;
    api.put_all(documents(&fs::read_to_string(deploy().join("crds/policies.yaml"))?)?);
    api.put_all([agents(2)?, ca(2)?, network_policy("app-and-mesh", &[7000, 15008])]);
    Ok(lab)
}

#[test]
fn a_sound_cluster_passes_the_check_and_what_is_wrong_is_named_with_what_to_do() -> Result {
    needs_root!();
    let lab = sound()?;
    let _web = lab.pod("shop", "web").label("app", "web").start()?;
    let (api, way) = (lab.kubernetes()?, kubeconfig(&lab)?);
    let address = format!("https://{}", lab.ca()?.address);
    let check = || Checked::ask(&lab, &way, &["--ca-address", &address]);
    let passed = check()?;
    let all = ["clock", "crd", "network_policies", "agents", "ca", "ca_reachable"];
    assert_eq!((passed.status, passed.reasons("pass")), (Some(0), all.into()), "{:?}", passed.found);
    assert_eq!(passed.found.len(), all.len() + 1, "two CRDs, and nothing but what passed: {:?}", passed.found);

    // One fault at a time: it is the only one that is told of, and what is asked then is asked of the cluster as it is.
    let policy = network_policy("app-and-mesh", &[7000]);
    let crd = "authorizationpolicies.security.istio.io";
    let there = api.get("customresourcedefinitions", "", crd).context("no CRD")?;
    let faults: [(&str, &str, &str, Value, Value); 3] = [
        (
            "network_policy_blocks",
            "NetworkPolicy shop/app-and-mesh",
            "15008",
            policy,
            network_policy("app-and-mesh", &[7000, 15008]),
        ),
        ("agents_not_ready", "the agents", "1 of 2", agents(1)?, agents(2)?),
        ("ca_not_ready", "the CA", "no replica", ca(0)?, ca(2)?),
    ];
    for (reason, what, detail, broken, mended) in faults {
        api.put(broken);
        let checked = check()?;
        assert_eq!((checked.status, checked.reasons("error")), (Some(1), [reason].into()), "{:?}", checked.found);
        let finding = checked.one(reason)?;
        assert_eq!(finding["what"], what);
        ensure!(finding["detail"].as_str().is_some_and(|text| text.contains(detail)), "{finding}");
        ensure!(finding["fix"].as_str().is_some_and(|text| !text.is_empty()), "{finding}");
        api.put(mended);
        assert_eq!(check()?.status, Some(0), "{reason} is over");
    }
    // Another policy that opens the port for the same pods is enough.
    api.put_all([network_policy("app-and-mesh", &[7000]), network_policy("mesh", &[15008])]);
    assert_eq!(check()?.status, Some(0));
    api.remove("customresourcedefinitions", "", crd);
    let checked = check()?;
    assert_eq!((checked.status, checked.reasons("warning")), (Some(0), ["crd_missing"].into()));
    assert_eq!(checked.one("crd_missing")?["what"], format!("CRD {crd}"));
    api.put(there);
    lab.ca()?.daemon.kill()?;
    assert_eq!(check()?.reasons("error"), ["ca_unreachable"].into());
    Ok(())
}

#[test]
fn a_namespace_that_is_not_enrolled_yet_is_checked_by_its_name_as_if_it_were() -> Result {
    needs_root!();
    let lab = Lab::builder().nodes(1).kubernetes().start()?;
    let (api, way) = (lab.kubernetes()?, kubeconfig(&lab)?);
    api.put(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}));
    let mut pod = heddle_lab::apiserver::pod("shop", "web", "00000000-0000-4000-8000-000000000001", "web", "elsewhere");
    pod["metadata"]["labels"] = json!({"app": "web"});
    api.put_all([pod, network_policy("app", &[7000])]);
    assert_eq!(Checked::ask(&lab, &way, &[])?.reasons("error"), BTreeSet::new());
    let checked = Checked::ask(&lab, &way, &["--namespace", "shop"])?;
    assert_eq!((checked.status, checked.reasons("error")), (Some(1), ["network_policy_blocks"].into()));
    let checked = Checked::ask(&lab, &way, &["--namespace", "shpo"])?;
    assert_eq!((checked.status, checked.reasons("error")), (Some(1), ["namespace_missing"].into()));
    assert_eq!(checked.one("namespace_missing")?["what"], "namespace shpo");
    Ok(())
}

#[test]
fn a_check_reads_six_kinds_and_says_which_of_them_its_user_may_not_read() -> Result {
    needs_root!();
    let lab = sound()?;
    let _web = lab.pod("shop", "web").label("app", "web").start()?;
    let (api, way) = (lab.kubernetes()?, kubeconfig(&lab)?);
    assert_eq!(Checked::ask(&lab, &way, &[])?.status, Some(0));
    let of_operator = || api.verbs_seen().into_iter().filter(|seen| seen.user == OPERATOR);
    let asked: BTreeSet<(String, String, String)> =
        of_operator().map(|seen| (seen.verb.to_owned(), seen.group, seen.resource)).collect();
    let allowed = CHECK_READS.map(|(verb, group, resource)| (verb.to_owned(), group.to_owned(), resource.to_owned()));
    assert_eq!(asked, allowed.into());
    ensure!(of_operator().all(|seen| seen.resource != "secrets" && seen.subresource.is_empty()));

    // Whatever may not be read is a finding by its name, never one that passed; the rest is looked at as before.
    for (plural, what, passed) in [
        ("customresourcedefinitions", "CRD authorizationpolicies.security.istio.io", "crd"),
        ("namespaces", "NetworkPolicies", "network_policies"),
        ("networkpolicies", "NetworkPolicies of shop", "network_policies"),
        ("pods", "NetworkPolicies of shop", "network_policies"),
        ("daemonsets", "the agents", "agents"),
        ("deployments", "the CA", "ca"),
    ] {
        api.fail(plural, Fault::Status(403), usize::MAX);
        let checked = Checked::ask(&lab, &way, &[])?;
        api.recover(plural);
        assert_eq!((checked.status, checked.reasons("warning")), (Some(0), ["not_asked"].into()), "{plural}");
        assert_eq!(checked.one("not_asked")?["what"], what, "{:?}", checked.found);
        let sound = ["clock", "crd", "network_policies", "agents", "ca"].into_iter().filter(|one| *one != passed);
        assert_eq!(checked.reasons("pass"), sound.collect(), "{plural}");
    }
    // Of two namespaces the one that may be read is judged.
    lab.need_namespace("bank")?;
    let mut shut = network_policy("app", &[7000]);
    shut["metadata"]["namespace"] = json!("bank");
    api.put_all([shut, network_policy("app-and-mesh", &[7000])]);
    api.fail("networkpolicies", Fault::Status(403), 1);
    let checked = Checked::ask(&lab, &way, &[])?;
    assert_eq!(checked.one("not_asked")?["what"], "NetworkPolicies of bank");
    assert_eq!(checked.one("network_policy_blocks")?["what"], "NetworkPolicy shop/app-and-mesh");
    Ok(())
}

#[test]
fn an_api_server_that_answers_nobody_or_not_this_user_fails_the_check() -> Result {
    needs_root!();
    let lab = sound()?;
    let (api, way) = (lab.kubernetes()?, kubeconfig(&lab)?);
    let failed = |way: &str, reason: &str| -> Result<Value> {
        let checked = Checked::ask(&lab, way, &[])?;
        assert_eq!((checked.status, checked.found.len()), (Some(1), 1), "{:?}", checked.found);
        let finding = checked.one(reason)?;
        assert_eq!(finding["severity"], "error");
        Ok(finding.clone())
    };
    failed(&astray(&lab, &way)?, "api_server_unreachable")?;
    let stranger = changed(&way, "stranger", "the-operator-of-the-lab", "of-nobody-here")?;
    failed(&stranger, "not_authenticated")?;
    api.break_down(Some(Fault::Status(503)));
    let finding = failed(&way, "api_server_unreachable")?;
    ensure!(finding["detail"].as_str().is_some_and(|detail| detail.contains("503")), "{finding}");
    api.break_down(Some(Fault::Hangup));
    failed(&way, "api_server_unreachable")?;
    api.break_down(None);
    assert_eq!(Checked::ask(&lab, &way, &[])?.status, Some(0));
    Ok(())
}

/// `heddle uninstall --verify --node NAME`, of which only the taint is looked at: the lab's agent runs.
fn verify(lab: &Lab, kubeconfig: &str, node: &str) -> Result<heddle_lab::process::Output> {
    let agent = lab.agent(1)?;
    let bpffs = agent.bpffs.to_str().context("not UTF-8")?;
    let state = agent.state.to_str().context("not UTF-8")?;
    agent.ask(&[
        "uninstall",
        "--verify",
        "--json",
        "--bpffs",
        bpffs,
        "--state-dir",
        state,
        "--node",
        node,
        "--kubeconfig",
        kubeconfig,
    ])
}

fn taints(lab: &Lab, kubeconfig: &str) -> Result<Vec<String>> {
    let output = verify(lab, kubeconfig, "node1")?;
    let left: Vec<Value> = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    // An agent that runs has a socket, so this is no empty list by mistake.
    ensure!(output.status.code() == Some(1) && left.iter().any(|one| one["kind"] == "socket"), "{output:?}");
    let taints = left.iter().filter(|one| one["kind"] == "taint");
    Ok(taints.filter_map(|one| one["what"].as_str().map(str::to_owned)).collect())
}

#[test]
fn a_nodes_startup_taint_is_left_until_it_is_taken_off_and_a_node_that_cannot_be_asked_about_is_an_error() -> Result {
    needs_root!();
    let lab = Lab::builder().nodes(1).kubernetes().start()?;
    let (api, way) = (lab.kubernetes()?, kubeconfig(&lab)?);
    let mut node = api.get("nodes", "", "node1").context("no node")?;
    node["spec"] = json!({"taints": [
        {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"},
        {"key": TAINT, "effect": "NoSchedule"},
    ]});
    api.put(node.clone());
    assert_eq!(taints(&lab, &way)?, [format!("{TAINT} of node node1")]);
    let asked: Vec<_> = api.verbs_seen().into_iter().filter(|seen| seen.user == OPERATOR).collect();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!((asked[0].verb, &*asked[0].resource, &*asked[0].name), ("get", "nodes", "node1"));
    // Somebody else's stays, and is nothing of heddle's.
    node["spec"]["taints"] = json!([{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]);
    api.put(node);
    assert_eq!(taints(&lab, &way)?, Vec::<String>::new());

    let fails = |way: &str, node: &str, why: &str| -> Result {
        let output = verify(&lab, way, node)?;
        ensure!(!output.status.success() && output.stdout.is_empty(), "not a list, and no good end: {output:?}");
        ensure!(output.stderr.contains(&format!("can't look at node {node}")), "{output:?}");
        ensure!(output.stderr.contains(why), "{why}: {output:?}");
        Ok(())
    };
    fails(&astray(&lab, &way)?, "node1", "refused")?;
    fails(&way, "node-of-nobody", "not found")?;
    api.fail("nodes", Fault::Status(403), usize::MAX);
    let forbidden = fails(&way, "node1", "403");
    api.recover("nodes");
    forbidden?;
    fails(&changed(&way, "stranger", "the-operator-of-the-lab", "of-nobody-here")?, "node1", "Unauthorized")?;
    api.break_down(Some(Fault::Hangup));
    fails(&way, "node1", "")?;
    Ok(())
}
