//! `heddle uninstall`: takes everything away that heddle put into this node's pods and its kernel.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::ask::print;
use crate::{
    capture::{CaptureConfig, Handle, ProbeCommand},
    life::config::{ADMIN_SOCKET, BPFFS},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder of the pins.
    #[arg(long, env = "HEDDLE_BPFFS", default_value = BPFFS, value_name = "DIR")]
    bpffs: PathBuf,
    /// Admin socket of the agent, which must not run any more.
    #[arg(long, env = "HEDDLE_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "FILE")]
    admin_socket: PathBuf,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if UnixStream::connect(&self.admin_socket).is_ok() {
            bail!("an agent answers at {}: stop it first, or it enrols the pods again", self.admin_socket.display());
        }
        if !self.bpffs.try_exists().with_context(|| self.bpffs.display().to_string())? {
            print(&format!("{} is not there: nothing to remove\n", self.bpffs.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        let there = statfs(&self.bpffs).with_context(|| self.bpffs.display().to_string())?;
        if there.filesystem_type() != BPF_FS_MAGIC {
            bail!("{} is not in a bpffs, so nothing in it is heddle's", self.bpffs.display());
        }
        let runtime = tokio::runtime::Runtime::new().context("can't start the runtime")?;
        let gone = runtime.block_on(async {
            let config = CaptureConfig { bpffs: self.bpffs.clone(), probe: ProbeCommand::default() };
            let capture = Handle::start(config).await.context("can't open the pins")?;
            capture.reap(&HashSet::new()).await.context("can't withdraw every pod")
        })?;
        drop(runtime);
        for pod in &gone {
            print(&format!("withdrew pod {pod}\n"))?;
        }
        let mut removed = Vec::new();
        remove(&self.bpffs, &mut removed).with_context(|| format!("can't remove {}", self.bpffs.display()))?;
        for path in &removed {
            print(&format!("removed {}\n", path.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
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
