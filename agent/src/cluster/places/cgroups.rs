//! Whose pod a cgroup is, by the names that kubelet and the runtimes give: pure functions over text.
//!
//! ```text
//! systemd    /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, _ for ->.slice/cri-containerd-<id>.scope
//! cgroupfs   /kubepods/burstable/pod<uid>/<id>
//! ```
//!
//! Guaranteed pods have no class in between, CRI-O calls its containers `crio-<id>`, and a kubelet may have all of it below
//! another folder (`--cgroup-root`). The outermost name counts: what a pod makes below its own cgroup makes it no other pod.

use std::borrow::Cow;

/// Most bytes of a pod's uid (bytes): Kubernetes makes UUIDs, and MD5 sums of static pods.
const UID: usize = 128;

/// A cgroup that is a pod's, or below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup<'a> {
    /// The pod's uid as kubelet has it.
    pub uid: Cow<'a, str>,
    /// The pod's own folder, from the root of the hierarchy; it begins with a slash.
    pub folder: &'a str,
    /// What is not the pod's, though it is in its cgroup: CRI-O's monitor of a container, which is in the node's netns.
    pub monitor: bool,
}

/// The cgroup v2 path in the text of `/proc/<pid>/cgroup`: that of the line `0::`, whatever v1 hierarchies stand beside it. `None`
/// where there is none, or where the folder was removed.
pub fn unified(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    (path.starts_with('/') && !path.ends_with(" (deleted)")).then_some(path)
}

/// Whose pod the cgroup at `path` is.
pub fn pod_of(path: &str) -> Option<PodCgroup<'_>> {
    let mut end = 0;
    let mut above: [&str; 2] = [""; 2];
    let mut names = path.strip_prefix('/')?.split('/');
    while let Some(name) = names.next() {
        end += 1 + name.len();
        if let Some(uid) = uid_of(name, above) {
            let monitor = names.next().is_some_and(|member| member.starts_with("crio-conmon-"));
            return Some(PodCgroup { uid, folder: &path[..end], monitor });
        }
        above = [above[1], name];
    }
    None
}

/// The uid in the name of a pod's folder; `above` are the names of the two folders that it is in, outermost first.
pub fn uid_of<'a>(name: &'a str, above: [&str; 2]) -> Option<Cow<'a, str>> {
    if let Some(slice) = name.strip_suffix(".slice") {
        let (class, uid) = slice.rsplit_once("-pod")?;
        let class = ["-burstable", "-besteffort"].iter().find_map(|end| class.strip_suffix(end)).unwrap_or(class);
        let kubelet = class == "kubepods" || class.ends_with("-kubepods");
        return (kubelet && is_uid(uid, '_')).then(|| uid.replace('_', "-").into());
    }
    let uid = name.strip_prefix("pod")?;
    let kubelet = matches!(above, [_, "kubepods"] | ["kubepods", "burstable" | "besteffort"]);
    (kubelet && is_uid(uid, '-')).then_some(uid.into())
}

fn is_uid(text: &str, separator: char) -> bool {
    (1..=UID).contains(&text.len())
        && text.chars().all(|character| character.is_ascii_alphanumeric() || character == separator)
}

/// Where a cgroup v2 hierarchy is mounted whole, by the text of `/proc/<pid>/mountinfo`.
pub fn mount(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (mounted, kind) = line.split_once(" - ")?;
        if kind.split(' ').next()? != "cgroup2" {
            return None;
        }
        let mut fields = mounted.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (root == "/").then(|| unescape(point))
    })
}

/// A path as `mountinfo` has it: space, tab, newline and backslash are octal.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, character)| text.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "8f5bc6a5-7d62-4f19-9ad5-0b1c7a5c1e11";

    #[test]
    fn the_layouts_of_containerd_and_cri_o_with_both_drivers_name_their_pod() {
        let escaped = UUID.replace('-', "_");
        let id = "3f".repeat(32);
        // path after the pod's folder, the pod's folder
        let folders = [
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{escaped}.slice"),
            format!("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{escaped}.slice"),
            format!("/kubepods.slice/kubepods-pod{escaped}.slice"),
            // kind: a kubelet below a root of its own
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-pod{escaped}.slice"
            ),
            format!(
                "/system.slice/docker-ab.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{escaped}.slice"
            ),
            format!("/kubepods/burstable/pod{UUID}"),
            format!("/kubepods/besteffort/pod{UUID}"),
            format!("/kubepods/pod{UUID}"),
            format!("/kubelet/kubepods/burstable/pod{UUID}"),
        ];
        let members = [
            (format!("cri-containerd-{id}.scope"), false),
            (format!("crio-{id}.scope"), false),
            (format!("crio-{id}.scope/container"), false),
            (format!("crio-conmon-{id}.scope"), true),
            (format!("crio-conmon-{id}"), true),
            (format!("docker-{id}.scope"), false),
            (id.clone(), false),
            (format!("crio-{id}"), false),
            // An app with a cgroup manager of its own.
            (format!("{id}/init.scope"), false),
        ];
        for folder in &folders {
            let own = PodCgroup { uid: UUID.into(), folder, monitor: false };
            assert_eq!(pod_of(folder), Some(own.clone()), "{folder}");
            for (member, monitor) in &members {
                let path = format!("{folder}/{member}");
                assert_eq!(pod_of(&path), Some(PodCgroup { monitor: *monitor, ..own.clone() }), "{path}");
            }
        }
    }

    #[test]
    fn a_static_pod_is_known_by_the_hash_that_kubelet_gave_it() {
        let path =
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0123456789abcdef0123456789abcdef.slice/a";
        assert_eq!(pod_of(path).unwrap().uid, "0123456789abcdef0123456789abcdef");
    }

    #[test]
    fn what_kubelet_did_not_make_is_no_pod() {
        for path in [
            "/",
            "",
            "kubepods/pod1",
            "/kubepods",
            "/kubepods.slice",
            "/kubepods.slice/kubepods-burstable.slice",
            "/system.slice/containerd.service",
            "/user.slice/user-1000.slice/pod1",
            "/kubepods/burstable/container",
            "/kubepods/burstable/pod",
            "/kubepods/burstable/podx y",
            "/elsewhere/burstable/pod1",
            "/machine.slice/machine-pod1.slice",
            "/kubepods.slice/kubepods-pod.slice",
            "/kubepods.slice/kubepods-podx-y.slice",
            "/libpod_parent/pod1",
        ] {
            assert_eq!(pod_of(path), None, "{path}");
        }
        assert_eq!(pod_of(&format!("/kubepods/pod{}", "1".repeat(UID + 1))), None);
    }

    #[test]
    fn a_pod_that_makes_cgroups_with_names_of_pods_stays_itself() {
        let path = "/kubepods/podmine/c/kubepods/podyours/c";
        assert_eq!(pod_of(path).unwrap().uid, "mine");
        let path = "/kubepods.slice/kubepods-podmine.slice/c.scope/kubepods.slice/kubepods-podyours.slice";
        assert_eq!(pod_of(path).unwrap().uid, "mine");
    }

    #[test]
    fn of_the_hierarchies_of_a_process_only_the_unified_one_counts() {
        let hybrid = "12:pids:/kubepods/pod1/a\n1:name=systemd:/kubepods/pod1/a\n0::/kubepods/pod2/b\n";
        assert_eq!(unified(hybrid), Some("/kubepods/pod2/b"));
        assert_eq!(unified("0::/\n"), Some("/"));
        assert_eq!(unified("0::/kubepods/pod1/a (deleted)\n"), None);
        assert_eq!(unified("5:cpu:/kubepods/pod1/a\n"), None);
        assert_eq!(unified(""), None);
    }

    #[test]
    fn the_hierarchy_is_where_its_root_is_mounted() {
        let text = "\
25 1 0:22 / /sys rw,nosuid - sysfs sysfs rw
30 25 0:26 /docker/1 /some/part rw shared:9 - cgroup2 cgroup2 rw
31 25 0:26 / /sys/fs/cgroup/uni\\040fied rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
32 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
";
        assert_eq!(mount(text).as_deref(), Some("/sys/fs/cgroup/uni fied"));
        assert_eq!(mount("32 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }
}
