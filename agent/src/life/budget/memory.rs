//! How much memory the agent may use: its cgroup's limit (version 1 or 2), or what the machine has.

use std::{fs, path::Path};

/// Bytes. The smallest limit on the way from the agent's cgroup up counts.
#[must_use]
pub fn available() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = candidates(&own).into_iter().filter_map(|path| limit(&fs::read_to_string(path).ok()?));
    let machine = total(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    limits.chain(machine).min()
}

/// Files that may hold a limit: of the agent's memory cgroup and those above it, on either hierarchy.
fn candidates(own: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let roots: &[(&str, &str)] = if controllers.is_empty() {
            &[("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/unified", "memory.max")]
        } else if controllers.split(',').any(|controller| controller == "memory") {
            &[("/sys/fs/cgroup/memory", "memory.limit_in_bytes")]
        } else {
            continue;
        };
        for ancestor in Path::new(path).ancestors() {
            let ancestor = ancestor.to_string_lossy();
            let ancestor = ancestor.trim_end_matches('/');
            // In a cgroup namespace a path may begin above what is mounted.
            if !ancestor.contains("..") {
                files.extend(roots.iter().map(|(root, file)| format!("{root}{ancestor}/{file}")));
            }
        }
    }
    files
}

/// `max` is none, and so is version 1's largest number of pages.
fn limit(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok().filter(|limit| *limit < u64::MAX >> 2)
}

/// `MemTotal:  24600000 kB`
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_hierarchies_are_looked_at_up_to_their_roots() {
        let found = candidates("12:cpu,memory:/kube/pod1\n5:pids:/x\n0::/kube.slice/pod1\n");
        for file in [
            "/sys/fs/cgroup/memory/kube/pod1/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/kube/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/kube.slice/pod1/memory.max",
            "/sys/fs/cgroup/memory.max",
        ] {
            assert!(found.iter().any(|there| there == file), "{file} of {found:?}");
        }
        assert!(found.iter().all(|file| !file.contains("pids")));
        assert!(candidates("0::/../outside\nnonsense\n").iter().all(|file| !file.contains("..")));
    }

    #[test]
    fn no_limit_is_no_number() {
        assert_eq!(limit("134217728\n"), Some(134_217_728));
        assert_eq!(limit("max\n"), None);
        assert_eq!(limit("9223372036854771712\n"), None);
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       24600000 kB\n"), Some(24_600_000 * 1_024));
        assert!(available().is_some_and(|bytes| bytes > 64 << 20));
    }
}
