//! Is any capability of the agent's manifest superfluous? Without each alone something that the agent is for fails, and its log
//! says which step.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, ensure};
use heddle_lab::{
    Lab, Pod, Result, cgroup, needs_program, needs_root,
    process::{Place, Process},
    until,
};

use super::node::{bit, capabilities, contained, mask};

/// How an agent that lacks a capability fails.
#[derive(Debug, PartialEq, Eq)]
enum Fails {
    /// It ends at its start.
    Start,
    /// It runs, and a pod is not captured.
    Capture,
}

/// How it fails, with which reason, and a part of what the log says of it; deploy/README.md has the same table.
type Need = (Fails, &'static str, &'static str);

fn needs() -> BTreeMap<&'static str, Need> {
    BTreeMap::from([
        ("sys_admin", (Fails::Start, "container_switches", "give the container CAP_SYS_ADMIN")),
        ("net_admin", (Fails::Capture, "route", "rule and route: ")),
        (
            "sys_ptrace",
            (Fails::Capture, "place_unknown", "where the node keeps the pod's netns and cgroup is not known"),
        ),
        ("sys_resource", (Fails::Start, "programs", "give the container CAP_SYS_RESOURCE")),
    ])
}

/// A process of a pod in the cgroup that a kubelet would have made for it: by that the agent finds the pod.
fn process_of(lab: &Lab, pod: &Pod) -> Result<Process> {
    let folder = lab.claim().cgroup.join(format!("kubepods/burstable/pod{}", pod.uid()));
    cgroup::make(&folder)?;
    let place =
        Place { netns: Some(pod.netns().path()), cgroup: Some(folder), logs: lab.dir().join("logs"), files: None };
    Process::start(&place, pod.name(), "sleep", &["600"])
}

/// The kernel that counts maps as locked memory, whose limit nobody else may raise.
fn counts_maps_as_locked_memory() -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        anyhow::bail!("the version of kernel {release} can't be read");
    };
    Ok((major, minor) < (5, 11))
}

/// Writes what the next agent is given.
fn give(file: &Path, capabilities: &[&String]) -> Result {
    let text: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
    fs::write(file, text).with_context(|| file.display().to_string())
}

#[test]
fn without_any_one_of_its_capabilities_an_agent_fails_and_its_log_says_at_what() -> Result {
    needs_root!();
    needs_program!("setpriv");
    needs_program!("unshare");
    let all = capabilities()?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("capabilities");
    give(&file, &all.iter().collect::<Vec<_>>())?;
    let script = contained(&format!("\"$(cat {})\"", file.display()));
    // In the node's own cgroup namespace: there are machines on which not even root may look at the first process.
    let under = ["unshare", "--mount", "--propagation", "slave", "--", "sh", "-c", &script, "agent"];
    let lab = Lab::builder().nodes(1).agents_under(&under).agent_args(&["--places", "node"]).start()?;
    let agent = lab.agent(1)?;
    let needs = needs();
    let own = mask("self", "CapBnd")?;
    let mut pods: Vec<(Pod, Process)> = Vec::new();
    for lacking in &all {
        let need = needs.get(lacking.as_str()).with_context(|| format!("what {lacking} is for is not known"))?;
        let (fails, reason, says) = need;
        if own & bit(lacking)? == 0 {
            skip(lacking, "this machine does not have it itself");
            continue;
        }
        if lacking == "sys_resource" && !counts_maps_as_locked_memory()? {
            skip(lacking, "it is for kernels before 5.11, and this one is newer");
            continue;
        }
        agent.daemon.terminate(Duration::from_secs(20))?;
        // Before the agent, so that what it finds at its first look is all there is.
        let pod = lab.pod("shop", &lacking.replace('_', "-")).unproven().start()?;
        let process = process_of(&lab, &pod)?;
        let before = agent.daemon.log().len();
        let log = || agent.daemon.log().get(before..).unwrap_or_default().to_owned();
        give(&file, &all.iter().filter(|name| *name != lacking).collect::<Vec<_>>())?;
        agent.daemon.spawn()?;
        let seen = until(Duration::from_secs(20), "a failure", || {
            if agent.daemon.died() {
                return Some((Fails::Start, log()));
            }
            let (state, reason) = agent.pod_state(&pod.full_name()).ok()??;
            (state == "uncaptured").then_some((Fails::Capture, reason))
        })
        .with_context(|| format!("without {lacking} nothing fails: {:?} {}", agent.status(), log()))?;
        let told = log();
        println!("without {lacking}: {seen:?}: {}", told.lines().find(|line| line.contains(says)).unwrap_or(&told));
        ensure!(seen.0 == *fails && seen.1.contains(reason), "{lacking}: {seen:?}: {told}");
        ensure!(told.lines().any(|line| line.contains(reason) && line.contains(says)), "{reason}, {says}: {told}");
        pods.push((pod, process));
        // With all of them the same pod is captured: nothing else was in the way.
        agent.daemon.stop();
        give(&file, &all.iter().collect::<Vec<_>>())?;
        agent.start()?;
        for (pod, _) in &pods {
            agent.wait_state(&pod.full_name(), "captured")?;
        }
    }
    ensure!(!pods.is_empty(), "this machine has none of {all:?}");
    Ok(())
}

fn skip(capability: &str, why: &str) {
    heddle_lab::skip(&format!("deploy::capabilities: an agent without {capability}"), why);
}
