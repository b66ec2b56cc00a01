//! An agent with what its manifest gives it, and a node from which heddle was taken away.

use std::{fs, time::Duration};

use anyhow::{Context, ensure};
use heddle_lab::{Lab, Result, needs_program, needs_root, until};
use serde_json::Value;

use super::{deploy, documents};

/// Kind and name of a thing that is left.
type Left = (String, String);

/// Capabilities that the DaemonSet adds, as `setpriv` names them.
pub fn capabilities() -> Result<Vec<String>> {
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

/// Number of a capability (`include/uapi/linux/capability.h`), as a bit.
pub fn bit(name: &str) -> Result<u64> {
    let known = [("net_admin", 12), ("sys_ptrace", 19), ("sys_admin", 21), ("sys_resource", 24)];
    let number = known.iter().find(|(known, _)| *known == name).with_context(|| format!("{name} is new here"))?.1;
    Ok(1 << number)
}

/// A set of capabilities of a process.
pub fn mask(pid: &str, set: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":\t"));
    Ok(u64::from_str_radix(line.with_context(|| format!("no {set}"))?, 16)?)
}

/// Runs an agent as a container runtime does: few capabilities (`,+one,+another`), little locked memory, `/proc/sys` read-only,
/// mount and cgroup namespaces of its own.
pub fn contained(capabilities: &str) -> String {
    format!(
        "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && ulimit -l 64 && \
         exec setpriv --bounding-set=-all{capabilities} --inh-caps=-all --ambient-caps=-all -- \"$@\""
    )
}

#[test]
fn an_agent_needs_no_more_than_its_manifest_gives_it() -> Result {
    needs_root!();
    needs_program!("setpriv");
    needs_program!("unshare");
    let given: String = capabilities()?.iter().map(|name| format!(",+{name}")).collect();
    let script = contained(&given);
    let under = ["unshare", "--mount", "--propagation", "slave", "--cgroup", "--", "sh", "-c", &script, "agent"];
    let lab = Lab::builder().agents_under(&under).start()?;
    let agent = lab.agent(1)?;
    let pid = agent.daemon.pid().context("no agent")?;
    // A machine that is itself contained can't give what it does not have.
    let wanted = capabilities()?.iter().map(|name| bit(name)).sum::<Result<u64>>()? & mask("self", "CapBnd")?;
    assert_eq!(mask(&pid.to_string(), "CapEff")?, wanted);
    agent.wait_log("made /proc/sys writable for itself")?;
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
    until(Duration::from_secs(30), "the policy", || {
        client.connect(near.at(7000)).run().ok()?.was_refused().then_some(())
    })?;
    client.withdraw()?;
    until(Duration::from_secs(30), "the pod as it was", || (client.kernel_state().ok()? == before).then_some(()))
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
    fs::write(
        conf.join("10.conflist"),
        r#"{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}, {"type": "heddle-cni"}]}"#,
    )?;
    let (state, conf) = (state.display().to_string(), conf.display().to_string());
    let cni_socket = lab.dir().join("cni.sock").display().to_string();
    let places = [
        "--cni-socket",
        &cni_socket,
        "--bpffs",
        &bpffs,
        "--state-dir",
        &state,
        "--cni-bin-dir",
        &conf,
        "--cni-conf-dir",
        &conf,
    ];
    let left = |more: &[&str]| -> Result<(Option<i32>, Vec<Left>)> {
        let output = agent.ask(&[&["uninstall", "--verify", "--json"], more, &places[..]].concat())?;
        let list: Vec<Value> = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
        Ok((output.status.code(), list.iter().map(|one| (text(one, "kind"), text(one, "what"))).collect()))
    };
    let (status, all) = left(&[])?;
    assert_eq!(status, Some(1));
    for kind in ["program", "map", "pin", "rule", "route", "socket", "state", "cni entry"] {
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

/// `(id N)` of the programs whose links, and of the maps that, are pinned below a folder.
fn programs_and_maps(bpffs: &str) -> Result<Vec<String>> {
    let show = |kind: &str, id: &str| -> Result<Vec<String>> {
        let output = std::process::Command::new("bpftool").args(["-j", "-f", kind, "show"]).output()?;
        let all: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let ours = all.iter().filter(|one| {
            let mut pinned = one["pinned"].as_array().into_iter().flatten().filter_map(Value::as_str);
            // Of the maps some have names that others' maps have too.
            let named = ["ATTESTED", "VERDICTS", "DESTINATIONS", "RESIDENTS", "LISTENERS"];
            let named = kind == "link" || one["name"].as_str().is_some_and(|name| named.contains(&name));
            named && pinned.any(|path| path.starts_with(bpffs))
        });
        Ok(ours.map(|one| format!("(id {})", one[id])).collect())
    };
    let (programs, maps) = (show("link", "prog_id")?, show("map", "id")?);
    ensure!(programs.len() >= 16 && maps.len() == 5, "pinned below {bpffs}: {programs:?} {maps:?}");
    Ok([programs, maps].concat())
}
