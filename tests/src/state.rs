//! What a lab leaves on the machine while it lives, and how it is found and taken away when its owner died.
//!
//! Everything a lab makes carries its prefix `hl-<pid>-<n>`: network namespaces, one cgroup, one folder here with a bpffs
//! mounted inside. Nothing is put into the network namespace of the machine.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::{cgroup, netns::Netns};

/// Folder of all labs.
pub const ROOT: &str = "/run/heddle-lab";
/// Every name that a lab makes begins with it.
pub const PREFIX: &str = "hl-";
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
const AVAILABLE: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";
/// Owner of a lab that was told to stay.
const KEPT: &str = "kept";

/// A lab's claim on its prefix.
#[derive(Debug, Clone)]
pub struct Claim {
    pub prefix: String,
    /// `/run/heddle-lab/<prefix>`.
    pub dir: PathBuf,
    pub cgroup: PathBuf,
}

impl Claim {
    /// A prefix of its own, its folder, its cgroup and its bpffs.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let prefix = format!("{PREFIX}{:x}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(ROOT).join(&prefix);
        let claim = Self { cgroup: cgroup::mount()?.join(&prefix), prefix, dir };
        let _lock = lock()?;
        fs::create_dir_all(&claim.dir)?;
        fs::write(claim.dir.join("owner"), format!("{} {}", process::id(), start_time(process::id())?))?;
        allow_cubic()?;
        cgroup::make(&claim.cgroup)?;
        let bpffs = claim.bpffs();
        fs::create_dir_all(&bpffs)?;
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).context("mounting bpffs")?;
        Ok(claim)
    }

    /// The lab's own bpffs: unmounting it removes every pin.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.dir.join("bpf")
    }

    /// Logs of agents and pods.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Keeps logs in memory: for who measures the mesh, and not the disk that this machine has below `/run`.
    pub fn logs_in_memory(&self) -> Result<()> {
        mount(Some("logs"), &self.logs(), Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mounting a tmpfs")
    }

    /// The lab stays when its owner ends; only [`sweep_kept`] removes it.
    pub fn keep(&self) -> Result<()> {
        Ok(fs::write(self.dir.join("owner"), KEPT)?)
    }

    /// Ends its processes and removes everything.
    pub fn release(&self) -> Result<()> {
        remove(&self.prefix)
    }
}

/// Removes what labs left whose process is gone. Gives their prefixes.
pub fn sweep() -> Result<Vec<String>> {
    sweep_where(|owner| owner != KEPT && !alive(owner))
}

/// Removes labs that were kept, and what dead ones left.
pub fn sweep_kept() -> Result<Vec<String>> {
    sweep_where(|owner| !alive(owner))
}

fn sweep_where(dead: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    // Looked at under the lock: a lab that is just being claimed has a folder before it has an owner in it.
    let claims = lock()?;
    // A lab without an owner file is one that ended half-way through removing itself.
    let owner = |prefix: &String| fs::read_to_string(Path::new(ROOT).join(prefix).join("owner")).unwrap_or_default();
    let swept: Vec<String> = prefixes().into_iter().filter(|prefix| dead(&owner(prefix))).collect();
    drop(claims);
    for prefix in &swept {
        remove(prefix)?;
    }
    Ok(swept)
}

/// Everything on this machine that carries a lab's prefix, for people; kept labs and labs of living owners are left out.
pub fn leftovers() -> Result<Vec<String>> {
    let excused = |prefix: &str| {
        let owner = fs::read_to_string(Path::new(ROOT).join(prefix).join("owner")).unwrap_or_default();
        owner == KEPT || alive(&owner)
    };
    let excused: Vec<String> = prefixes().into_iter().filter(|prefix| excused(prefix)).collect();
    let mine = |name: &str| excused.iter().any(|prefix| prefix_of(name).as_ref() == Some(prefix));
    let mut found = Vec::new();
    found.extend(Netns::named(PREFIX).into_iter().filter(|name| !mine(name)).map(|name| format!("netns {name}")));
    found.extend(names(&cgroup::mount()?).filter(|name| !mine(name)).map(|name| format!("cgroup {name}")));
    found.extend(names(Path::new(ROOT)).filter(|name| !mine(name)).map(|name| format!("folder {ROOT}/{name}")));
    for line in fs::read_to_string("/proc/mounts")?.lines().filter(|line| line.contains(ROOT)) {
        if !excused.iter().any(|prefix| line.contains(&format!("{ROOT}/{prefix}/"))) {
            found.push(format!("mount {line}"));
        }
    }
    for (pid, folder) in lab_processes() {
        if !mine(&folder) {
            found.push(format!("process {pid} in cgroup {folder}"));
        }
    }
    Ok(found)
}

/// Processes whose cgroup is a lab's.
fn lab_processes() -> Vec<(u32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            // A zombie runs no more; it is only its parent's to reap.
            if stat_field(pid, 3).ok()? == "Z" {
                return None;
            }
            let cgroups = fs::read_to_string(entry.path().join("cgroup")).ok()?;
            let folder = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?.split('/').next()?.to_owned();
            folder.starts_with(PREFIX).then_some((pid, folder))
        })
        .collect()
}

fn remove(prefix: &str) -> Result<()> {
    cgroup::remove(&cgroup::mount()?.join(prefix))?;
    for name in Netns::named(&format!("{prefix}-")) {
        Netns::delete(&name)?;
    }
    let dir = Path::new(ROOT).join(prefix);
    for mounted in ["bpf", "logs"] {
        match umount2(&dir.join(mounted), MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error).with_context(|| format!("unmounting the lab's {mounted}")),
        }
    }
    let _lock = lock()?;
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", dir.display()));
        }
        _ => {}
    }
    if names(Path::new(ROOT)).next().is_none() {
        restore_congestion_control()?;
    }
    Ok(())
}

/// Prefixes of all labs of which anything is left.
fn prefixes() -> BTreeSet<String> {
    let folders = names(Path::new(ROOT));
    let namespaces = Netns::named(PREFIX).into_iter().filter_map(|name| prefix_of(&name));
    let cgroups = cgroup::mount().into_iter().flat_map(|mount| names(&mount).collect::<Vec<_>>());
    folders.chain(namespaces).chain(cgroups).collect()
}

/// `hl-1f3-2` of `hl-1f3-2-node1`.
fn prefix_of(name: &str) -> Option<String> {
    let mut parts = name.strip_prefix(PREFIX)?.split('-');
    Some(format!("{PREFIX}{}-{}", parts.next()?, parts.next()?))
}

/// Entries of a folder that carry a lab's prefix.
fn names(folder: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(PREFIX))
}

/// Whether the process that wrote `<pid> <start time>` still runs: a pid alone is given again.
fn alive(owner: &str) -> bool {
    let Some((pid, started)) = owner.split_once(' ') else { return false };
    let Ok(pid) = pid.parse() else { return false };
    start_time(pid).is_ok_and(|now| now == started)
}

/// Start time of a process in clock ticks since boot.
fn start_time(pid: u32) -> Result<String> {
    stat_field(pid, 22)
}

/// A field of `/proc/<pid>/stat`, counted as proc(5) does, from the third on.
fn stat_field(pid: u32, number: usize) -> Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').context("stat without a name")?.1;
    Ok(after_name.split_whitespace().nth(number - 3).context("stat is short")?.to_owned())
}

fn lock() -> Result<Flock<File>> {
    fs::create_dir_all(ROOT)?;
    let file = File::create(Path::new(ROOT).join(".lock"))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error).context("locking the lab's folder")
}

/// Network namespaces may only choose what the machine allows. The lab measures with CUBIC everywhere, because BBR
/// halves bulk through any proxy on a link without delay.
fn allow_cubic() -> Result<()> {
    let has = |text: &str| text.split_whitespace().any(|name| name == "cubic");
    let allowed = fs::read_to_string(ALLOWED)?;
    if has(&allowed) || !has(&fs::read_to_string(AVAILABLE)?) {
        return Ok(());
    }
    fs::write(Path::new(ROOT).join("congestion-control"), &allowed)?;
    fs::write(ALLOWED, format!("{} cubic", allowed.trim())).context("allowing cubic")
}

fn restore_congestion_control() -> Result<()> {
    let saved = Path::new(ROOT).join("congestion-control");
    let Ok(allowed) = fs::read_to_string(&saved) else { return Ok(()) };
    fs::write(ALLOWED, allowed).context("restoring the allowed congestion controls")?;
    Ok(fs::remove_file(saved)?)
}
