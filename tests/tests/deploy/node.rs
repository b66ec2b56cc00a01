//! An agent with what its manifest gives it, and a node from which heddle was taken away.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use heddle_lab::{Lab, Result, needs_program, needs_root, until};
use serde_json::Value;

use super::{deploy, documents};

/// Capabilities that the DaemonSet adds, as `setpriv` names them.
fn capabilities() -> Result<Vec<String>> {
    let all = documents(&fs::read_to_string(deploy().join("agent/daemonset.yaml"))?)?;
    let context = all.iter().find_map(|object| object.pointer("/spec/template/spec/containers/0/securityContext"));
    let context = context.context("no security context")?;
    ensure!(
        context["privileged"] == false && context["capabilities"]["drop"] == serde_json::json!(["ALL"]),
        "{context}"
    );
    let added = context["capabilities"]["add"].as_array().context("no capabilities")?;
    Ok(added.iter().filter_map(Value::as_str).map(str::to_lowercase).collect())
}

/// Runs an agent as a container runtime does: few capabilities, `/proc/sys` read-only, mount and cgroup namespaces of its own.
fn contained(capabilities: &[String]) -> String {
    let bounded: String = capabilities.iter().map(|name| format!(",+{name}")).collect();
    format!(
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && \
         exec setpriv --bounding-set=-all{bounded} --inh-caps=-all --ambient-caps=-all -- \"$@\""
    )
}

#[test]
fn an_agent_needs_no_more_than_its_manifest_gives_it() -> Result {
    needs_root!();
    needs_program!("setpriv");
    let script = contained(&capabilities()?);
    let under = ["unshare", "--mount", "--propagation", "slave", "--cgroup", "--", "sh", "-c", &script, "agent"];
    let lab = Lab::builder().agents_under(&under).start()?;
    let agent = lab.agent(1)?;
    let pid = agent.daemon.pid().context("no agent")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).context("no CapEff")?;
    let effective = u64::from_str_radix(effective, 16)?;
    assert_eq!(effective.count_ones() as usize, capabilities()?.len(), "{effective:x}");
    agent.wait_log("In a container: made /proc/sys writable for itself")?;
    // Enrolment, tunnel, lane, policy with live connections closed, proof of capture, withdrawal.
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let near = lab.pod("shop", "near").serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").outside_the_mesh().start()?;
    let before = client.kernel_state()?;
    client.enrol()?;
    agent.wait_state("shop/client", "captured")?;
    for target in [server.at(7000), near.at(7000), near.at(7000)] {
        assert_eq!(client.connect(target).say("x").with("--expect", 1).run()?.error, None);
    }
    lab.authorize("shop", "none", &serde_json::json!({}))?;
    until(Duration::from_secs(10), "the policy", || {
        client.connect(near.at(7000)).run().ok()?.was_refused().then_some(())
    })?;
    client.withdraw()?;
    until(Duration::from_secs(10), "the pod as it was", || (client.kernel_state().ok()? == before).then_some(()))
        .with_context(|| agent.daemon.log())?;
    Ok(())
}

#[test]
fn after_an_uninstall_nothing_of_a_node_is_left_and_before_it_everything_is_listed() -> Result {
    needs_root!();
    let lab = Lab::one_node()?;
    let near = lab.pod("shop", "near").serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    assert_eq!(client.connect(near.at(7000)).say("x").with("--expect", 1).run()?.error, None);
    let agent = lab.agent(1)?;
    let bpffs = agent.bpffs.to_str().context("not UTF-8")?.to_owned();
    let state = lab.dir().join("state");
    fs::create_dir_all(&state)?;
    fs::write(state.join("snapshot"), "x")?;
    let conf = lab.dir().join("cni");
    fs::create_dir_all(&conf)?;
    fs::write(conf.join("10.conflist"), r#"{"plugins": [{"type": "bridge"}]}"#)?;
    let (state, conf) = (state.display().to_string(), conf.display().to_string());
    let places = ["--bpffs", &bpffs, "--state-dir", &state, "--cni-bin-dir", &conf, "--cni-conf-dir", &conf];
    let left = |more: &[&str]| -> Result<(Option<i32>, Vec<(String, String)>)> {
        let output = agent.ask(&[&["uninstall", "--verify", "--json"], more, &places[..]].concat())?;
        let list: Vec<Value> = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
        Ok((output.status.code(), list.iter().map(|one| (text(one, "kind"), text(one, "what"))).collect()))
    };
    let (status, all) = left(&[])?;
    assert_eq!(status, Some(1));
    for kind in ["program", "map", "pin", "rule", "route", "socket", "state"] {
        ensure!(all.iter().any(|(one, _)| one == kind), "no {kind} in {all:?}");
    }
    // Labs beside this one have programs, maps and pods of their own, which stay: what is ours was not there without us.
    let ours = programs_and_maps(&bpffs)?;
    ensure!(ours.iter().all(|id| all.iter().any(|(_, what)| what.contains(id))), "{ours:?} {all:?}");
    agent.daemon.terminate(Duration::from_secs(20))?;
    agent.ask(&[&["uninstall"], &places[..]].concat())?.ok()?;
    let (_, rest) = left(&[])?;
    let mine = |what: &String| what.contains(lab.prefix()) || ours.iter().any(|id| what.contains(id));
    let mine: Vec<_> = rest.iter().filter(|(_, what)| mine(what)).collect();
    ensure!(mine.is_empty(), "{mine:?}");
    if rest.is_empty() {
        assert_eq!(left(&[])?.0, Some(0));
    }
    Ok(())
}

/// `(id N)` of every program and map that is pinned below a folder.
fn programs_and_maps(bpffs: &str) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for kind in ["prog", "map"] {
        let output = std::process::Command::new("bpftool").args(["-j", "-f", kind, "show"]).output()?;
        let all: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        for one in all {
            let pinned = one["pinned"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let names = ["ATTESTED", "VERDICTS", "DESTINATIONS", "RESIDENTS", "LISTENERS"];
            let listed = kind == "prog" || one["name"].as_str().is_some_and(|name| names.contains(&name));
            if listed && pinned.into_iter().any(|path| path.starts_with(bpffs)) {
                ids.push(format!("(id {})", one["id"]));
            }
        }
    }
    ensure!(!ids.is_empty(), "nothing is pinned below {bpffs}");
    Ok(ids)
}
