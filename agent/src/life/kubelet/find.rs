//! Which cgroup is the kubelet's: by the process that is called so on the host.
//!
//! A name proves nothing, so a process counts only where no pod's can be: of the agent's netns (the host's), of the outermost pid
//! namespace that the agent sees, of root, and in no pod's cgroup. Of two such nobody can say which is meant, and none is taken.
//! It asks `/proc` for nothing that takes the right to trace the kubelet.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// What the kernel calls the process: the name of its program.
const NAME: &str = "kubelet";
/// What the kubelet calls the cgroups of pods, with any driver: `kubepods`, `kubepods.slice`, `kubepods-besteffort.slice`.
const PODS: &str = "kubepods";
const GIVE: &str = "give --kubelet-cgroup";

/// Why there is no cgroup to vouch for.
#[derive(Debug, thiserror::Error)]
pub(super) enum FindError {
    #[error("no process of the host is called {NAME}: start it, or {GIVE} where it has another name")]
    Absent,
    #[error("processes called {NAME} are in several cgroups, {}: {GIVE}", .0.join(" and "))]
    Several(Vec<String>),
    #[error(
        "it runs in the root cgroup, as any process of the host may, and can't be told from them: start it in a cgroup of its own"
    )]
    Root,
    #[error("no cgroup v2 hierarchy is mounted where the agent sees it")]
    NoCgroup2,
    #[error("its cgroup {0} is not below any mount of cgroup v2 that the agent sees: {GIVE}")]
    Unresolved(String),
    #[error("{}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
}

impl FindError {
    /// Stable name: metric label and log key.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Absent => "no_kubelet",
            Self::Several(_) => "several_kubelets",
            Self::Root => "root_cgroup",
            Self::NoCgroup2 => "no_cgroup2",
            Self::Unresolved(_) => "cgroup_unresolved",
            Self::Unreadable { .. } => "cgroup_unreadable",
        }
    }
}

/// The folder of the kubelet's cgroup. Reads `/proc`: a few microseconds a process.
pub(super) fn find() -> Result<PathBuf, FindError> {
    let kubelets = kubelets()?;
    let cgroup = one(kubelets.iter().map(|(_, cgroup)| cgroup.as_str()))?;
    let path = PathBuf::from("/proc/self/mounts");
    let mounts = fs::read_to_string(&path).map_err(|error| FindError::Unreadable { path, error })?;
    let mut mounts = cgroup2_mounts(&mounts).peekable();
    if mounts.peek().is_none() {
        return Err(FindError::NoCgroup2);
    }
    // In a cgroup namespace of its own the agent sees paths that begin above it; which folder that is, its processes tell.
    let below = cgroup.trim_start_matches("/..").trim_start_matches('/');
    let holds = |folder: &PathBuf| {
        let processes = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        let has = |pid: u32| processes.lines().any(|line| line.parse() == Ok(pid));
        kubelets.iter().any(|(pid, _)| has(*pid))
    };
    let folder = mounts.map(|mount| mount.join(below)).find(holds);
    folder.ok_or_else(|| FindError::Unresolved(cgroup.to_owned()))
}

/// The host's processes of that name, with the path of their cgroup as the kernel tells it.
fn kubelets() -> Result<Vec<(u32, String)>, FindError> {
    let path = PathBuf::from("/proc");
    let unreadable = |error| FindError::Unreadable { path: path.clone(), error };
    let ours = netns(&path.join("thread-self")).map_err(unreadable)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(&path).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let of = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if of("comm").trim_end() != NAME {
            continue;
        }
        // One that ends meanwhile is none.
        let status = of("status");
        if netns(&entry.path()).ok() != Some(ours) || !is_roots(&status) || !is_outermost(&status) {
            continue;
        }
        if let Some(cgroup) = unified(&of("cgroup")).filter(|cgroup| !is_a_pods(cgroup)) {
            found.push((pid, cgroup.to_owned()));
        }
    }
    Ok(found)
}

/// The one cgroup that all of them are in.
fn one<'a>(cgroups: impl Iterator<Item = &'a str>) -> Result<&'a str, FindError> {
    let all: BTreeSet<_> = cgroups.collect();
    let mut each = all.iter();
    match (each.next(), each.next()) {
        (None, _) => Err(FindError::Absent),
        (Some(&"/"), None) => Err(FindError::Root),
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => Err(FindError::Several(all.iter().map(|&cgroup| cgroup.to_owned()).collect())),
    }
}

/// What tells a process' netns from another one: its files of the kernel's devices are one file.
fn netns(process: &Path) -> io::Result<(u64, u64)> {
    let file = fs::metadata(process.join("net/dev"))?;
    Ok((file.dev(), file.ino()))
}

/// Whether the process of `/proc/<pid>/status` has one number alone: in a pid namespace below, it would have another one there.
fn is_outermost(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    line.is_some_and(|ids| ids.split_whitespace().count() == 1)
}

/// Whether the real and the effective user of `/proc/<pid>/status` are root.
fn is_roots(status: &str) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.is_some_and(|ids| ids.split_whitespace().take(2).eq(["0", "0"]))
}

/// The path in the v2 hierarchy, of `/proc/<pid>/cgroup`.
fn unified(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

fn is_a_pods(cgroup: &str) -> bool {
    cgroup.split('/').any(|part| part.starts_with(PODS))
}

/// Where cgroup v2 is mounted, of `/proc/self/mounts`.
fn cgroup2_mounts(text: &str) -> impl Iterator<Item = PathBuf> {
    let fields = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields.get(2) == Some(&"cgroup2")).filter_map(|fields| fields.get(1).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cgroup_of_its_own_is_taken_and_nothing_else() {
        let one = |cgroups: &[&'static str]| one(cgroups.iter().copied()).map_err(|error| error.reason());
        assert_eq!(one(&["/system.slice/kubelet.service"]), Ok("/system.slice/kubelet.service"));
        assert_eq!(one(&["/a", "/a"]), Ok("/a"));
        assert_eq!(one(&[]), Err("no_kubelet"));
        assert_eq!(one(&["/"]), Err("root_cgroup"));
        assert_eq!(one(&["/a", "/b"]), Err("several_kubelets"));
        assert_eq!(one(&["/", "/b"]), Err("several_kubelets"));
    }

    #[test]
    fn a_process_in_a_pods_cgroup_is_no_kubelet_whatever_its_name() {
        for pods in [
            "/kubepods/besteffort/pod1-2/abc",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope",
            "/../../kubelet.slice/kubelet-kubepods.slice/kubepods-pod1.slice/x",
        ] {
            assert!(is_a_pods(pods), "{pods}");
        }
        for own in ["/system.slice/kubelet.service", "/podruntime.slice/kubelet.service", "/kubelet"] {
            assert!(!is_a_pods(own), "{own}");
        }
    }

    #[test]
    fn what_proc_says_is_read_to_the_letter() {
        assert_eq!(unified("4:memory:/a\n1:name=systemd:/b\n0::/c d\n"), Some("/c d"));
        assert_eq!(unified("1:name=systemd:/b\n"), None);
        assert!(is_roots("Name:\tkubelet\nUid:\t0\t0\t0\t0\n"));
        assert!(!is_roots("Name:\tkubelet\nUid:\t1000\t0\t0\t0\n"));
        assert!(!is_roots("Name:\tkubelet\nUid:\t0\t1000\t0\t0\n"));
        assert!(!is_roots(""));
        assert!(is_outermost("NSpid:\t412\n"));
        assert!(!is_outermost("NSpid:\t412\t1\n") && !is_outermost(""));
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mounts(mounts).collect::<Vec<_>>(), [PathBuf::from("/sys/fs/cgroup/unified")]);
    }
}
