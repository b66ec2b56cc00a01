//! What a node's processes and cgroups say of where its pods are: one look at `/proc`, whose cost is bounded.
//!
//! It only reads. A process that ends meanwhile is left out; so is one whose pid was given again in between.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
};

use super::cgroups::{self, pod_of, uid_of};
use crate::life::limits;

/// A process of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// When it was started (clock ticks since boot).
    pub started: u64,
    /// The pod's uid.
    pub uid: String,
    /// The pod's cgroup, from the root of the hierarchy.
    pub folder: String,
    /// Inode of its network namespace.
    pub netns: u64,
}

/// A pod's place, by one of its processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub pid: u32,
    pub netns: u64,
    pub folder: String,
}

/// Processes of pods, those of runtimes left out, and the inode of the node's own network namespace: that of process 1.
pub fn processes(proc: &Path) -> io::Result<(Vec<Process>, Option<u64>)> {
    let mut found = Vec::new();
    let (mut left, mut hidden) = (limits::PLACES_PROCESSES, 0_u32);
    for entry in fs::read_dir(proc)? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if left == 0 {
            tracing::warn!(
                looked_at = limits::PLACES_PROCESSES,
                "The node has more processes than are looked at for pods"
            );
            break;
        }
        left -= 1;
        match process(proc, pid) {
            Some((process, Some(netns))) => found.push(Process { netns, ..process }),
            Some((_, None)) => hidden += 1,
            None => {}
        }
    }
    if hidden > 0 {
        tracing::warn!(
            processes = hidden,
            "The namespaces of pods' processes may not be looked at, so these pods are not found: give the agent CAP_SYS_PTRACE"
        );
    }
    Ok((found, netns(&proc.join("1")).flatten()))
}

/// A pod's process, and its network namespace where that may be looked at.
fn process(proc: &Path, pid: u32) -> Option<(Process, Option<u64>)> {
    let folder = proc.join(pid.to_string());
    let text = fs::read_to_string(folder.join("cgroup")).ok()?;
    let pod = pod_of(cgroups::unified(&text)?)?;
    if pod.monitor {
        return None;
    }
    let started = started(&folder)?;
    let netns = netns(&folder)?;
    // The same process as before, in the same cgroup.
    let same = fs::read_to_string(folder.join("cgroup")).ok()? == text && self::started(&folder)? == started;
    let process = Process { pid, started, uid: pod.uid.into_owned(), folder: pod.folder.to_owned(), netns: 0 };
    same.then_some((process, netns))
}

/// Field 22 of `/proc/<pid>/stat`; the name before it may hold anything.
fn started(process: &Path) -> Option<u64> {
    let stat = fs::read(process.join("stat")).ok()?;
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
    String::from_utf8_lossy(&stat[after_name..]).split_whitespace().nth(19)?.parse().ok()
}

/// The inode that the link `ns/net` names (`net:[4026531840]`); `Some(None)` where it may not be read.
fn netns(process: &Path) -> Option<Option<u64>> {
    match fs::read_link(process.join("ns/net")) {
        Ok(link) => Some(Some(link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()?)),
        Err(error) => (error.kind() == io::ErrorKind::PermissionDenied).then_some(None),
    }
}

/// Where each pod is: with its oldest process, which is the one that holds the pod's namespaces; a container can leave its
/// netns, but not before that. `told` are pods whose netns is known otherwise. Processes in the node's own netns are no pod's.
pub fn choose(processes: &[Process], host: Option<u64>, told: &BTreeMap<String, u64>) -> BTreeMap<String, Found> {
    let mut oldest: BTreeMap<&str, &Process> = BTreeMap::new();
    for process in processes.iter().filter(|process| Some(process.netns) != host) {
        // The oldest of those in the netns that is known to be the pod's, where there are any.
        let rank = |process: &Process| {
            (told.get(&process.uid).is_some_and(|netns| *netns != process.netns), process.started, process.pid)
        };
        let best = oldest.entry(&process.uid).or_insert(process);
        if rank(process) < rank(best) {
            *best = process;
        }
    }
    let place = |process: &Process| Found { pid: process.pid, netns: process.netns, folder: process.folder.clone() };
    oldest.into_iter().map(|(uid, process)| (uid.to_owned(), place(process))).collect()
}

/// Finds the folders of pods in which no process is yet. Gives them from the root of the hierarchy, by uid.
pub fn folders(mount: &Path, wanted: &HashSet<String>) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut left = limits::PLACES_FOLDERS;
    let mut level: Vec<(PathBuf, [String; 2])> = vec![(PathBuf::from("/"), Default::default())];
    for _ in 0..limits::PLACES_DEPTH {
        let mut below = Vec::new();
        for (folder, above) in level {
            let Ok(entries) = fs::read_dir(mount.join(folder.strip_prefix("/").unwrap_or(&folder))) else { continue };
            let names = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
                if found.len() == wanted.len() {
                    return found;
                }
                if left == 0 {
                    tracing::warn!(
                        looked_at = limits::PLACES_FOLDERS,
                        "The node has more cgroups than are looked at for pods"
                    );
                    return found;
                }
                left -= 1;
                let path = folder.join(&name);
                match uid_of(&name, [&above[0], &above[1]]) {
                    Some(uid) if wanted.contains(&*uid) => {
                        found.insert(uid.into_owned(), path.display().to_string());
                    }
                    Some(_) => {}
                    None => below.push((path, [above[1].clone(), name])),
                }
            }
        }
        level = below;
    }
    found
}

/// Where the unified hierarchy is mounted for the calling thread.
pub fn mount(proc: &Path) -> io::Result<PathBuf> {
    let text = fs::read_to_string(proc.join("thread-self/mountinfo"))?;
    let found = cgroups::mount(&text).map(PathBuf::from);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 hierarchy is mounted whole"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: u64 = 1;

    fn process(uid: &str, pid: u32, started: u64, netns: u64) -> Process {
        Process { pid, started, uid: uid.into(), folder: format!("/kubepods/pod{uid}"), netns }
    }

    fn chosen(processes: &[Process], told: &[(&str, u64)]) -> Vec<(String, u32, u64)> {
        let told = told.iter().map(|(uid, netns)| ((*uid).to_owned(), *netns)).collect();
        let found = choose(processes, Some(HOST), &told);
        found.into_iter().map(|(uid, found)| (uid, found.pid, found.netns)).collect()
    }

    #[test]
    fn a_pod_is_where_its_oldest_process_is() {
        let all = [process("a", 9, 5, 20), process("a", 4, 6, 21), process("b", 3, 7, 22)];
        assert_eq!(chosen(&all, &[]), [("a".into(), 9, 20), ("b".into(), 3, 22)]);
        // Of those that started in one tick, the one with the lower pid.
        assert_eq!(chosen(&[process("a", 9, 5, 20), process("a", 8, 5, 21)], &[]), [("a".into(), 8, 21)]);
    }

    #[test]
    fn a_process_in_the_nodes_netns_is_no_place_of_a_pod() {
        assert_eq!(chosen(&[process("a", 2, 1, HOST), process("a", 9, 5, 20)], &[]), [("a".into(), 9, 20)]);
        assert_eq!(chosen(&[process("a", 2, 1, HOST)], &[]), []);
    }

    #[test]
    fn what_is_told_of_a_pods_netns_wins_over_an_older_sandbox() {
        let all = [process("a", 2, 1, 20), process("a", 9, 5, 21), process("a", 8, 6, 21)];
        assert_eq!(chosen(&all, &[("a", 21)]), [("a".into(), 9, 21)]);
        assert_eq!(chosen(&all, &[("a", 30)]), [("a".into(), 2, 20)]);
    }

    #[test]
    fn folders_of_pods_without_a_process_are_found_below_any_root() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| fs::create_dir_all(root.path().join(path)).unwrap();
        make("kubepods/burstable/pod1-1");
        make("lab/kubepods/besteffort/pod2/container");
        make("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod3_3.slice");
        make("kubepods/burstable/pod9/kubepods/pod4");
        make("system.slice/a.service/pod5");
        let wanted = ["1-1", "2", "3-3", "4", "5"].map(str::to_owned).into();
        let found = folders(root.path(), &wanted);
        let expected = [
            ("1-1", "/kubepods/burstable/pod1-1"),
            ("2", "/lab/kubepods/besteffort/pod2"),
            ("3-3", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod3_3.slice"),
        ];
        assert_eq!(found, expected.map(|(uid, folder)| (uid.to_owned(), folder.to_owned())).into());
    }

    #[test]
    fn a_process_outside_of_pods_is_left_out_and_proc_is_read_whole() {
        // This one's own: it is no pod's, and nothing fails over those that come and go.
        let (found, host) = processes(Path::new("/proc")).unwrap();
        assert!(!found.iter().any(|process| process.pid == std::process::id()));
        assert_eq!(host.is_some(), fs::read_link("/proc/1/ns/net").is_ok());
        assert!(started(&PathBuf::from("/proc/self")).is_some());
        assert!(netns(&PathBuf::from("/proc/self")).is_some());
    }
}
