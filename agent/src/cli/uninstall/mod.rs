//! `heddle uninstall`: takes everything away that heddle put onto this node, shows that nothing is left, and prints what takes
//! it out of a cluster.

mod manifests;
mod verify;

use std::{
    collections::HashSet,
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use tokio::signal::unix::{SignalKind, signal};

use super::ask::print;
use crate::{
    capture::{CaptureConfig, Handle, ProbeCommand, container},
    cni,
    life::config::{ADMIN_SOCKET, BPFFS, STATE_DIR},
};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    node: Node,
    /// Change nothing: list what is left of heddle on this node, and end with status 1 if that is anything.
    #[arg(long, conflicts_with = "stay")]
    verify: bool,
    /// Print what is left as JSON.
    #[arg(long, requires = "verify")]
    json: bool,
    /// Stay when nothing is left, until a signal: what runs in the place of the agents while a cluster is cleaned.
    #[arg(long)]
    stay: bool,
}

/// Where heddle's things are on a node.
#[derive(Debug, clap::Args)]
struct Node {
    /// Folder of the pins.
    #[arg(long, env = "HEDDLE_BPFFS", default_value = BPFFS, value_name = "DIR")]
    bpffs: PathBuf,
    /// Admin socket of the agent, which must not run any more.
    #[arg(long, env = "HEDDLE_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "FILE")]
    admin_socket: PathBuf,
    /// Socket on which the CNI plugin asks.
    #[arg(long, env = "HEDDLE_CNI_SOCKET", default_value = cni::SOCKET, value_name = "FILE")]
    cni_socket: PathBuf,
    /// What the agent remembers.
    #[arg(long, env = "HEDDLE_STATE_DIR", default_value = STATE_DIR, value_name = "DIR")]
    state_dir: PathBuf,
    /// The node's CNI plugins, where heddle's is among them.
    #[arg(long, env = "HEDDLE_CNI_BIN_DIR", requires = "cni_conf_dir", value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
    /// The node's CNI configuration.
    #[arg(long, env = "HEDDLE_CNI_CONF_DIR", requires = "cni_bin_dir", value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// This node, to look for the taint that agents take off. Needs a way to the API server.
    #[arg(long, env = "HEDDLE_NODE", value_name = "NAME")]
    node: Option<String>,
    /// The way to the API server [default: as kubectl finds it].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Print what takes heddle out of a cluster, in two steps. First: `heddle uninstall manifests nodes | kubectl apply -f -`
    /// has every node cleaned in the place of its agent; `kubectl -n heddle-system rollout status ds/heddle-agent` ends when
    /// nothing is left on any. Then: `heddle uninstall manifests cluster | kubectl delete -f -`. Give the options that
    /// `heddle install` had.
    Manifests(Box<manifests::Args>),
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(Verb::Manifests(args)) = self.verb {
            return args.run();
        }
        // In a container the node's things are as far away as for an agent.
        container::reach_node(&self.node.bpffs)?;
        if self.verify {
            return verify::run(&self.node, self.json);
        }
        clean(&self.node)?;
        if !self.stay {
            return Ok(ExitCode::SUCCESS);
        }
        let left = verify::run(&self.node, false)?;
        if left != ExitCode::SUCCESS {
            return Ok(left);
        }
        wait_for_the_end()
    }
}

fn clean(node: &Node) -> anyhow::Result<()> {
    if UnixStream::connect(&node.admin_socket).is_ok() {
        bail!("an agent answers at {}: stop it first, or it enrols the pods again", node.admin_socket.display());
    }
    let mut removed = Vec::new();
    // First, so that no pod that starts meanwhile waits for an agent.
    if let (Some(bin_dir), Some(conf_dir)) = (&node.cni_bin_dir, &node.cni_conf_dir) {
        for path in cni::remove(bin_dir, conf_dir).context("can't take the CNI plugin away")? {
            print(&format!("took the CNI plugin out of {}\n", path.display()))?;
        }
    }
    pods(&node.bpffs)?;
    for path in [&node.admin_socket, &node.cni_socket, &node.state_dir] {
        if fs::symlink_metadata(path).is_ok() {
            inside(path, &mut removed).with_context(|| format!("can't remove {}", path.display()))?;
        }
    }
    for path in &removed {
        print(&format!("removed {}\n", path.display()))?;
    }
    Ok(())
}

/// Withdraws every pod, and removes the pins.
fn pods(bpffs: &Path) -> anyhow::Result<()> {
    if !bpffs.try_exists().with_context(|| bpffs.display().to_string())? {
        return print(&format!("{} is not there: nothing to remove\n", bpffs.display()));
    }
    let there = statfs(bpffs).with_context(|| bpffs.display().to_string())?;
    if there.filesystem_type() != BPF_FS_MAGIC {
        bail!("{} is not in a bpffs, so nothing in it is heddle's", bpffs.display());
    }
    let runtime = tokio::runtime::Runtime::new().context("can't start the runtime")?;
    let gone = runtime.block_on(async {
        let config = CaptureConfig { bpffs: bpffs.to_owned(), probe: ProbeCommand::default() };
        let capture = Handle::start(config).await.context("can't open the pins")?;
        capture.forget_kubelet().await.context("can't take the programs off the kubelet's cgroup")?;
        capture.reap(&HashSet::new()).await.context("can't withdraw every pod")
    })?;
    drop(runtime);
    for pod in &gone {
        print(&format!("withdrew pod {pod}\n"))?;
    }
    let mut removed = Vec::new();
    remove(bpffs, &mut removed).with_context(|| format!("can't remove {}", bpffs.display()))?;
    for path in &removed {
        print(&format!("removed {}\n", path.display()))?;
    }
    Ok(())
}

/// Until SIGTERM or SIGINT.
fn wait_for_the_end() -> anyhow::Result<ExitCode> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("can't handle signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("can't handle signals")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Removes what is in a folder, which itself may be a mount; or the file.
fn inside(path: &Path, removed: &mut Vec<PathBuf>) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return remove(path, removed);
    }
    for entry in fs::read_dir(path)? {
        remove(&entry?.path(), removed)?;
    }
    Ok(())
}

/// Removes a folder with all that is in it, and notes each. Links are removed, never followed.
pub(super) fn remove(path: &Path, removed: &mut Vec<PathBuf>) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            remove(&entry?.path(), removed)?;
        }
        fs::remove_dir(path)?;
    } else {
        fs::remove_file(path)?;
    }
    removed.push(path.to_owned());
    Ok(())
}
