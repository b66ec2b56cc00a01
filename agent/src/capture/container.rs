//! Where the agent runs in a container: what the container withholds of the node, and capture needs.
//!
//! A container has a cgroup namespace of its own, from which no process can be put into a pod's cgroup and other processes'
//! cgroups are told from the wrong root; `/proc/sys` is read-only in it, also for pods' own switches; and a bpffs that it
//! mounted would go with it, and with that every pin. All three need the node's processes in sight (hostPID) and
//! CAP_SYS_ADMIN. Outside of a container nothing is done. It must run before there are threads: a thread keeps the namespaces
//! with which it was made.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::{
        statfs::{BPF_FS_MAGIC, statfs},
        statvfs::{FsFlags, statvfs},
    },
};

/// Namespaces of the first process of those that are in sight: the node's, where the node's processes are.
const NODE: &str = "/proc/1/ns";
const OWN: &str = "/proc/thread-self/ns";
/// Switches of pods (see [`super::sysctl`]).
const SWITCHES: &str = "/proc/sys";
/// Where bpffs belongs.
pub(super) const BPFFS: &str = "/sys/fs/bpf";

/// Why the node is out of reach.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error(
        "can't enter the node's cgroup namespace: {0}; give the container hostPID, CAP_SYS_ADMIN and CAP_SYS_PTRACE"
    )]
    Cgroup(io::Error),
    #[error(
        "{SWITCHES} is read-only and can't be made writable: {0}; give the container CAP_SYS_ADMIN and no AppArmor profile"
    )]
    Switches(io::Error),
    #[error("{BPFFS} is no bpffs and can't be made one: {0}; mount it on the node: mount -t bpf bpf {BPFFS}")]
    Bpffs(io::Error),
}

impl ContainerError {
    /// Stable name: log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Cgroup(_) => "container_cgroup",
            Self::Switches(_) => "container_switches",
            Self::Bpffs(_) => "container_bpffs",
        }
    }
}

/// Makes the node reachable for this thread, and those that it starts from now on. Gives what it did, for the log.
///
/// # Errors
/// What can't be done, with what the container lacks.
pub fn reach_node(bpffs: &Path) -> Result<Vec<&'static str>, ContainerError> {
    let mut done = Vec::new();
    let sight = in_sight();
    if sight && elsewhere("cgroup").map_err(ContainerError::Cgroup)? {
        enter("cgroup", CloneFlags::CLONE_NEWCGROUP).map_err(ContainerError::Cgroup)?;
        done.push("entered the node's cgroup namespace");
    }
    if sight && !elsewhere("mnt").map_err(ContainerError::Bpffs)? {
        return Ok(done);
    }
    // Only a mount of a container's is read-only by itself.
    if read_only(SWITCHES).map_err(ContainerError::Switches)? {
        writable(SWITCHES).map_err(ContainerError::Switches)?;
        done.push("made /proc/sys writable for itself");
    }
    if sight && bpffs.starts_with(BPFFS) && !is_bpffs(BPFFS).map_err(ContainerError::Bpffs)? {
        mount_on_node().map_err(ContainerError::Bpffs)?;
        done.push("mounted bpffs on the node");
    }
    if !sight {
        // What is out of reach then shows as pods that can't be captured, each with its reason.
        done.push("may not look at the first process (CAP_SYS_PTRACE), so the node's namespaces are out of reach");
    }
    Ok(done)
}

/// Whether the first process' namespaces may be looked at.
fn in_sight() -> bool {
    !matches!(fs::metadata(Path::new(NODE).join("mnt")), Err(error) if error.kind() == io::ErrorKind::PermissionDenied)
}

/// Whether the first process' namespace of this kind is another than this thread's.
fn elsewhere(kind: &str) -> io::Result<bool> {
    let inode = |folder: &str| fs::metadata(Path::new(folder).join(kind)).map(|metadata| metadata.ino());
    Ok(inode(NODE)? != inode(OWN)?)
}

fn enter(kind: &str, flag: CloneFlags) -> io::Result<()> {
    Ok(setns(File::open(Path::new(NODE).join(kind))?, flag)?)
}

fn read_only(path: &str) -> io::Result<bool> {
    Ok(statvfs(path)?.flags().contains(FsFlags::ST_RDONLY))
}

fn is_bpffs(path: &str) -> io::Result<bool> {
    Ok(statfs(path)?.filesystem_type() == BPF_FS_MAGIC)
}

/// Only in this mount namespace: what others see of `/proc/sys` stays as it is.
fn writable(path: &str) -> io::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)?;
    if read_only(path)? { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(()) }
}

/// In the node's mount namespace, by a thread of its own that ends there; the container sees it by its volume's propagation.
fn mount_on_node() -> io::Result<()> {
    let node = thread::spawn(|| -> io::Result<()> {
        // A thread that shares its working directory with others can't change its mount namespace.
        unshare(CloneFlags::CLONE_FS)?;
        enter("mnt", CloneFlags::CLONE_NEWNS)?;
        if is_bpffs(BPFFS)? {
            return Ok(());
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        Ok(mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=700"))?)
    });
    node.join().map_err(|_| io::Error::other("the thread that mounts it broke off"))??;
    if is_bpffs(BPFFS)? {
        return Ok(());
    }
    Err(io::Error::other("it is mounted on the node, but the container's volume does not show it (mountPropagation)"))
}
