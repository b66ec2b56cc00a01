//! `heddle uninstall --verify`: proves that nothing of heddle is left on this node, or lists what is.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use k8s_openapi::api::core::v1;
use kube::Api;
use serde_json::Value;

use super::{
    super::{
        ask::{json, print},
        reach::Kubeconfig,
        table::plain,
    },
    Node,
};
use crate::{
    capture::{
        leftovers::{self, Left},
        survey,
    },
    cni::PLUGIN,
    life::{limits, start},
};

/// The taint that an agent takes off.
const TAINT: &str = "heddle.dev/not-ready";
/// The kernel lets go of a program some time after its last pin: how long that may take, and how often it is asked.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);

pub(super) fn run(node: &Node, as_json: bool) -> anyhow::Result<ExitCode> {
    let left = left(node)?;
    if as_json {
        print(&json(&left)?)?;
    } else {
        print(&text(&left))?;
    }
    Ok(if left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(left: &[Left]) -> String {
    if left.is_empty() {
        return "nothing of heddle is left on this node\n".to_owned();
    }
    let mut text = String::new();
    for Left { kind, what } in left {
        text.push_str(&format!("{kind} {}\n", plain(what)));
    }
    text.push_str(&format!("{} left\n", left.len()));
    text
}

/// Everything that is left.
fn left(node: &Node) -> anyhow::Result<Vec<Left>> {
    // First, because it alone may get no answer.
    let taint = taint(node)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start the runtime")?;
    let cgroups = survey::cgroup_mount().context("can't find cgroup v2")?;
    let began = Instant::now();
    let mut left = loop {
        let left = runtime.block_on(leftovers::in_kernel(&node.bpffs, cgroups.as_deref()));
        let left = left.context("can't look at the kernel (as root, with CAP_SYS_ADMIN)")?;
        if left.is_empty() || began.elapsed() >= PATIENCE {
            break left;
        }
        std::thread::sleep(PAUSE);
    };
    drop(runtime);
    for socket in [&node.admin_socket, &node.cni_socket] {
        if socket.exists() {
            left.push(Left::new("socket", socket.display().to_string()));
        }
    }
    left.extend(files(&node.state_dir)?.into_iter().map(|path| Left::new("state", path.display().to_string())));
    left.extend(cni(node.cni_bin_dir.as_deref(), node.cni_conf_dir.as_deref())?);
    left.extend(taint);
    Ok(left)
}

/// Entries of a folder that may be absent, by name.
fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| folder.display().to_string())?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>();
    let mut paths = paths.with_context(|| folder.display().to_string())?;
    paths.sort();
    Ok(paths)
}

/// The plugin's file, and every configuration that names it. One that can't be read might.
fn cni(bin_dir: Option<&Path>, conf_dir: Option<&Path>) -> anyhow::Result<Vec<Left>> {
    let mut left = Vec::new();
    let plugins = bin_dir.map(files).transpose()?.unwrap_or_default();
    let named =
        |path: &&PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.contains(PLUGIN));
    left.extend(plugins.iter().filter(named).map(|path| Left::new("cni plugin", path.display().to_string())));
    for path in conf_dir.map(files).transpose()?.unwrap_or_default() {
        let configuration =
            path.extension().is_some_and(|kind| ["conf", "conflist", "json"].iter().any(|one| kind == *one));
        if !configuration {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        if names_plugin(&text) {
            left.push(Left::new("cni entry", path.display().to_string()));
        }
    }
    Ok(left)
}

/// Whether a CNI configuration calls heddle's plugin. What is no JSON calls none, unless the name is in it.
fn names_plugin(text: &str) -> bool {
    let Ok(configuration) = serde_json::from_str::<Value>(text) else { return text.contains(PLUGIN) };
    let is = |plugin: &Value| plugin["type"].as_str() == Some(PLUGIN);
    is(&configuration) || configuration["plugins"].as_array().is_some_and(|plugins| plugins.iter().any(is))
}

fn taint(node: &Node) -> anyhow::Result<Option<Left>> {
    let Some(name) = &node.node else { return Ok(None) };
    let Some(cluster) = Kubeconfig::find(node.kubeconfig.as_deref())? else {
        anyhow::bail!(
            "no way to the API server to look at the taints of node {name}: give --kubeconfig, or leave --node out"
        );
    };
    start::install_crypto()?;
    let found = cluster.ask(limits::ADMIN_ANSWER_WAIT, async |client| {
        let nodes: Api<v1::Node> = Api::all(client);
        Ok(nodes.get(name).await?)
    });
    let found = found.with_context(|| format!("can't look at node {name}"))?;
    let taints = found.spec.and_then(|spec| spec.taints).unwrap_or_default();
    Ok(taints.iter().any(|taint| taint.key == TAINT).then(|| Left::new("taint", format!("{TAINT} of node {name}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cni_configuration_is_left_as_long_as_it_calls_the_plugin() {
        let list = |kind: &str| {
            format!(r#"{{"cniVersion":"1.0.0","name":"n","plugins":[{{"type":"bridge"}},{{"type":"{kind}"}}]}}"#)
        };
        assert!(names_plugin(&list(PLUGIN)) && !names_plugin(&list("portmap")));
        assert!(names_plugin(r#"{"type":"heddle-cni"}"#) && !names_plugin(r#"{"name":"heddle-cni","type":"bridge"}"#));
        assert!(names_plugin("half a file: heddle-cni") && !names_plugin("half a file"));
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("10-net.conflist"), list(PLUGIN)).unwrap();
        fs::write(folder.path().join("10-net.conflist.old"), list(PLUGIN)).unwrap();
        fs::write(folder.path().join("heddle-cni"), "").unwrap();
        let found = cni(Some(folder.path()), Some(folder.path())).unwrap();
        let kinds: Vec<_> = found.iter().map(|left| left.kind).collect();
        assert_eq!(kinds, ["cni plugin", "cni entry"], "{found:?}");
        assert_eq!(cni(Some(&folder.path().join("none")), None).unwrap(), []);
        assert!(text(&found).ends_with("2 left\n") && text(&[]).starts_with("nothing"));
    }
}
