//! cgroup v2 folders: every process of a lab lives in one, so that none outlives it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait::until;

/// Where cgroup v2 is mounted: `/sys/fs/cgroup` on most machines, `/sys/fs/cgroup/unified` on hybrid ones.
pub fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context("no cgroup2 file system is mounted")
}

/// Makes the folder and its parents.
pub fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making cgroup {}", folder.display()))
}

/// Every process in the folder and below it. A folder that is gone has none.
pub fn processes(folder: &Path) -> Vec<Pid> {
    let mut found: Vec<Pid> = fs::read_to_string(folder.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .map(Pid::from_raw)
        .collect();
    for child in children(folder) {
        found.extend(processes(&child));
    }
    found
}

/// Kills what is left in the folder and removes it with everything below.
pub fn remove(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    let mut last = None;
    until(Duration::from_secs(5), "", || {
        for pid in processes(folder) {
            // ESRCH only says that it ended by itself.
            let _ = kill(pid, Signal::SIGKILL);
        }
        match remove_tree(folder) {
            Ok(()) => Some(()),
            Err(error) => {
                last = Some(error);
                None
            }
        }
    })
    .or_else(|_| match last {
        Some(error) => Err(error).with_context(|| format!("removing cgroup {}", folder.display())),
        None => bail!("cgroup {} could not be removed", folder.display()),
    })
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    for child in children(folder) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}
