//! Do the kubelet's probes pass where nothing else does, and nobody else's with them?

use std::{path::Path, time::Duration};

use heddle_lab::{Kubelet, Lab, Pod, Result, call::Call, cgroup, needs_root, reports::Connected, until};
use serde_json::json;

/// The port that a probe of the pod's spec names, and one that none does.
const PROBED: u16 = 7000;
const OTHER: u16 = 7001;
const SOON: Duration = Duration::from_secs(15);

/// A node whose namespace asks for mutual TLS and lets nobody in, a pod that is probed there, and a kubelet.
struct Stage {
    kubelet: Kubelet,
    server: Pod,
    lab: Lab,
}

fn locked_lab() -> Result<Lab> {
    let lab = Lab::one_node()?;
    lab.require("shop", "strict", &json!({"mtls": {"mode": "STRICT"}}))?;
    lab.authorize("shop", "nobody", &json!({}))?;
    Ok(lab)
}

fn probed(lab: &Lab, name: &str) -> heddle_lab::pod::PodBuilder {
    lab.pod("shop", name)
        .serves(&["echo:7000", "echo:7001"])
        .container("ports", json!([{"name": "http", "containerPort": PROBED}]))
        .container("readinessProbe", json!({"httpGet": {"path": "/", "port": "http"}}))
}

fn stage() -> Result<Stage> {
    let lab = locked_lab()?;
    let kubelet = lab.kubelet(1, "kubelet")?;
    let server = probed(&lab, "server").start()?;
    attested(&lab, &kubelet)?;
    Ok(Stage { kubelet, server, lab })
}

fn attested(lab: &Lab, kubelet: &Kubelet) -> Result {
    let agent = lab.agent(1)?;
    until(SOON, "the kubelet to be attested", || {
        let status = agent.status().ok()?;
        (status["kubelet"]["cgroup"] == kubelet.cgroup().display().to_string().as_str()).then_some(())
    })
}

fn unattested(lab: &Lab, reason: &str) -> Result {
    let agent = lab.agent(1)?;
    until(SOON, reason, || (agent.status().ok()?["kubelet"]["reason"] == reason).then_some(()))
}

/// Whether the app itself answers.
fn passes(call: Call<'_, Connected>) -> Result<bool> {
    let seen = call.say("alive").with("--expect", 5).with("--patience", 1_500).run()?;
    assert!(seen.error.is_some() || seen.received == "alive", "{seen:?}");
    Ok(seen.error.is_none())
}

impl Stage {
    fn host(&self, folder: &Path, port: u16) -> Result<bool> {
        passes(self.server.connect(self.server.at(port)).on_the_host_in(&self.lab, folder)?)
    }
}

#[test]
fn the_kubelet_passes_to_a_probe_port_under_strict_and_default_deny_and_nobody_else_does() -> Result {
    needs_root!();
    let stage = stage()?;
    let Stage { kubelet, server, lab } = &stage;
    let agent = lab.agent(1)?;
    for _ in 0..3 {
        assert!(passes(kubelet.probe(lab, server, PROBED)?)?);
    }
    let six = || server.connect(server.at6(PROBED)).on_the_host_in(lab, kubelet.cgroup());
    assert!(passes(six()?)?, "by IPv6");
    assert!(!passes(kubelet.probe(lab, server, OTHER)?)?, "a port that no probe names");
    assert!(!passes(server.connect(server.at(PROBED)).on_the_host(lab)?)?, "another process of the host");
    assert!(!stage.host(&kubelet.child("container")?, PROBED)?, "a process in a cgroup below the kubelet's");
    let enrolled = lab.pod("shop", "enrolled").start()?;
    let plain = lab.pod("shop", "plain").outside_the_mesh().start()?;
    for pod in [&enrolled, &plain] {
        assert!(!passes(pod.connect(server.at(PROBED)))?, "{}", pod.name());
        // With the node's address, and in the pod's netns though in the kubelet's cgroup.
        let forged = || pod.connect(server.at(PROBED)).bind_address(lab.node(1).expect("a node").gateway_v4());
        assert!(!passes(forged())?, "{} with the node's address", pod.name());
        let inside = forged().on_the_host_in(lab, kubelet.cgroup())?.in_netns(pod.netns());
        assert!(!passes(inside)?, "in the netns of {}", pod.name());
    }
    let counted = |pod: &Pod| -> Result<f64> {
        Ok(agent.metrics()?.sum("heddle_probe_connections_total", &[("namespace", "shop"), ("pod", pod.name())]))
    };
    assert!((counted(server)? - 4.0).abs() < 0.5, "{}", counted(server)?);
    assert!((agent.metrics()?.sum("heddle_kubelet_attested", &[]) - 1.0).abs() < 0.5);
    let told = agent.access_log().into_iter().filter(|line| line.get("message") == "connection complete");
    assert_eq!(told.count(), 0, "a probe is no traffic");
    assert_eq!(agent.kernel().attested()?, 0, "nothing stays vouched for");
    Ok(())
}

#[test]
fn no_pass_survives_its_pod_its_socket_or_the_kubelets_cgroup() -> Result {
    needs_root!();
    let Stage { kubelet, server, lab } = stage()?;
    let agent = lab.agent(1)?;
    // Held open while the pod goes, and another pod gets the address whose spec names no probe.
    let (_held, first) =
        server.hold(server.at(PROBED), 1).bind_port(30_000).on_the_host_in(&lab, kubelet.cgroup())?.open()?;
    assert_eq!(first.alive, 1);
    assert_eq!(agent.kernel().attested()?, 1);
    let slot = server.slot();
    server.delete()?;
    let heir = lab.pod("shop", "heir").serves(&["echo:7000"]).at_slot(slot).unproven().start()?;
    heir.wait_captured()?;
    for _ in 0..3 {
        assert!(!passes(kubelet.probe(&lab, &heir, PROBED)?)?, "the address has another owner");
    }
    until(SOON, "what was vouched for to go with the pod", || (agent.kernel().attested().ok()? == 0).then_some(()))?;

    // The kubelet moves to another cgroup: the old one is anybody's.
    let server = probed(&lab, "again").start()?;
    assert!(passes(kubelet.probe(&lab, &server, PROBED)?)?);
    let old = kubelet.stop()?;
    unattested(&lab, "no_kubelet")?;
    assert!(!passes(server.connect(server.at(PROBED)).on_the_host_in(&lab, &old)?)?);
    let moved = lab.kubelet(1, "moved")?;
    attested(&lab, &moved)?;
    assert!(passes(moved.probe(&lab, &server, PROBED)?)?);
    assert!(!passes(server.connect(server.at(PROBED)).on_the_host_in(&lab, &old)?)?);
    // Started again in a new cgroup of the same name, as systemd does it.
    let folder = moved.stop()?;
    cgroup::remove(&folder)?;
    let again = lab.kubelet(1, "moved")?;
    until(SOON, "probes to pass again", || passes(again.probe(&lab, &server, PROBED).ok()?).ok()?.then_some(()))?;
    // Two of that name, and nobody can say which is meant.
    let _second = lab.kubelet(1, "second")?;
    unattested(&lab, "several_kubelets")?;
    assert!(!passes(again.probe(&lab, &server, PROBED)?)?);
    assert!(agent.status_text()?.stdout.contains("probes of the kubelet are not let through"));
    Ok(())
}

#[test]
fn probes_go_on_without_the_agent_and_everything_goes_with_uninstall() -> Result {
    needs_root!();
    let Stage { kubelet, server, lab } = stage()?;
    let agent = lab.agent(1)?;
    agent.daemon.kill()?;
    for _ in 0..3 {
        assert!(passes(kubelet.probe(&lab, &server, PROBED)?)?, "the programs are pinned");
    }
    assert!(!passes(kubelet.probe(&lab, &server, OTHER)?)?);
    assert!(!passes(server.connect(server.at(PROBED)).on_the_host(&lab)?)?);
    agent.start()?;
    server.wait_captured()?;
    attested(&lab, &kubelet)?;
    assert!(passes(kubelet.probe(&lab, &server, PROBED)?)?);
    let pinned = |part: &str| agent.pins().iter().filter(|pin| pin.to_string_lossy().contains(part)).count();
    assert_eq!(pinned("/kubelet/"), 3);
    agent.daemon.terminate(Duration::from_secs(20))?;
    assert!(passes(kubelet.probe(&lab, &server, PROBED)?)?);
    let bpffs = agent.bpffs.to_str().unwrap_or_default().to_owned();
    agent.heddle(&["uninstall", "--bpffs", &bpffs])?.ok()?;
    assert_eq!(agent.pins(), Vec::<std::path::PathBuf>::new());
    let programs = heddle_lab::kernel::programs_on(kubelet.cgroup())?;
    assert_eq!(programs, 0, "none is left on the kubelet's cgroup");
    Ok(())
}

#[test]
fn a_probe_of_another_host_opens_nothing_and_a_hook_of_the_pods_life_does() -> Result {
    needs_root!();
    let lab = locked_lab()?;
    let kubelet = lab.kubelet(1, "kubelet")?;
    attested(&lab, &kubelet)?;
    let elsewhere = lab
        .pod("shop", "elsewhere")
        .serves(&["echo:7000", "echo:7001"])
        .container("livenessProbe", json!({"tcpSocket": {"host": "192.0.2.1", "port": PROBED}}))
        .container("lifecycle", json!({"preStop": {"httpGet": {"port": OTHER}}}))
        .start()?;
    assert!(!passes(kubelet.probe(&lab, &elsewhere, PROBED)?)?, "that probe goes to another host");
    assert!(passes(kubelet.probe(&lab, &elsewhere, OTHER)?)?, "a hook comes from the kubelet too");
    Ok(())
}

#[test]
fn a_kubelet_in_the_root_cgroup_can_not_be_told_apart_and_gets_no_pass() -> Result {
    needs_root!();
    let root = cgroup::mount()?;
    let given = ["--kubelet-cgroup", root.to_str().unwrap_or_default()];
    let lab = Lab::builder().nodes(1).agent_args(&given).start()?;
    lab.require("shop", "strict", &json!({"mtls": {"mode": "STRICT"}}))?;
    let server = probed(&lab, "server").start()?;
    unattested(&lab, "root_cgroup")?;
    assert!(!passes(server.connect(server.at(PROBED)).on_the_host(&lab)?)?);
    let agent = lab.agent(1)?;
    assert!((agent.metrics()?.with("heddle_kubelet_attested", &[("reason", "root_cgroup")]).count()) == 1);
    let told = agent.daemon.log().matches("The kubelet's probes are not let through").count();
    assert_eq!(told, 1, "said once");
    Ok(())
}
