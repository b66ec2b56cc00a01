//! `heddle check` of this node: does its kernel have what capture needs, and is anything of others in the way?

use std::path::Path;

use super::{Finding, Severity};
use crate::capture::survey::{Other, Survey, survey};

/// The oldest kernel on which capture was seen to work.
const OLDEST: (u32, u32) = (5, 10);
/// From here on the kernel lane works: it knows a pod's netns by its cookie.
const LANE: (u32, u32) = (5, 14);

/// Looks and judges.
pub(super) fn check(bpffs: &Path) -> Vec<Finding> {
    match survey(bpffs) {
        Ok(survey) => judge(&survey),
        Err(error) => vec![Finding::new(
            Severity::Error,
            "node_unknown",
            "this node",
            error.to_string(),
            "run it as root on the node, or leave it out with --area",
        )],
    }
}

/// What the survey means.
fn judge(survey: &Survey) -> Vec<Finding> {
    let mut found = vec![kernel(&survey.release)];
    found.extend(programs(survey));
    found.push(match survey.bpffs {
        Some(true) => Finding::pass("bpffs", "bpffs", "is mounted"),
        _ => Finding::new(
            Severity::Warning,
            "bpffs_missing",
            "bpffs",
            "is not mounted; the agent mounts it",
            "mount it when the node starts: bpf /sys/fs/bpf bpf defaults 0 0 in /etc/fstab",
        ),
    });
    found.push(cgroups(survey));
    found.extend(survey.others.iter().map(other));
    if survey.others.is_empty() {
        found.push(Finding::pass("hooks_free", "cgroup programs", "nobody else hangs on connect or sockops"));
    }
    if !survey.on_devices.is_empty() {
        let names = survey.on_devices.join(", ");
        let detail =
            format!("programs of others on devices: {names}; they see packets, after heddle has seen the connection");
        found.push(Finding::pass("device_programs", "tc and XDP", detail));
    }
    found
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Finding::new(Severity::Warning, "kernel_unknown", release, "its version can't be read", "");
    };
    let version = (major, minor);
    if version < OLDEST {
        let detail = format!("is older than {}.{}", OLDEST.0, OLDEST.1);
        Finding::new(Severity::Error, "kernel_too_old", format!("Linux {release}"), detail, "update the node's kernel")
    } else if version < LANE {
        let detail =
            format!("captures; the kernel lane needs {}.{}, so pods of one node go through the agent", LANE.0, LANE.1);
        Finding::new(Severity::Warning, "kernel_without_lane", format!("Linux {release}"), detail, "")
    } else {
        Finding::pass("kernel", format!("Linux {release}"), "has all that heddle uses")
    }
}

fn programs(survey: &Survey) -> Vec<Finding> {
    let refused: Vec<_> = survey.programs.iter().filter_map(|(name, why)| Some((name, why.as_ref()?))).collect();
    if refused.is_empty() {
        let names: Vec<_> = survey.programs.iter().map(|(name, _)| *name).collect();
        let detail = format!("the kernel takes all of {}", names.join(", "));
        return vec![Finding::pass("program_types", "program types", detail)];
    }
    let fix = "run it as root; the kernel needs CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_INET, and no lockdown";
    let finding = |(name, why): (&&str, &String)| {
        Finding::new(Severity::Error, "program_type_refused", format!("program {name}"), why.clone(), fix)
    };
    refused.into_iter().map(finding).collect()
}

fn cgroups(survey: &Survey) -> Finding {
    let cgroups = &survey.cgroups;
    let Some(mount) = &cgroups.mount else {
        let fix = "boot the node with systemd.unified_cgroup_hierarchy=1";
        return Finding::new(Severity::Error, "cgroup2_missing", "cgroup v2", "is not mounted", fix);
    };
    let what = format!("cgroup v2 at {}", mount.display());
    match (cgroups.hybrid, cgroups.pods) {
        (true, 0) => Finding::new(
            Severity::Warning,
            "cgroup_hybrid",
            what,
            "version 1 is mounted beside it and no pod has a folder in version 2: pods in version 1 can't be captured",
            "boot the node with systemd.unified_cgroup_hierarchy=1, with the runtime's cgroups on version 2",
        ),
        (_, pods) => Finding::pass("cgroups", what, format!("{pods} pods have a folder there")),
    }
}

/// A program of somebody else's, by what it does to a connection that heddle has marked: programs of a pod's own cgroup, such
/// as heddle's, run before those of the cgroups above it.
fn other(other: &Other) -> Finding {
    let what = format!("{} ({} on {})", other.name, other.hook, other.cgroup.display());
    let connects = other.hook.starts_with("connect");
    let known = [("cil_", "Cilium"), ("cali", "Calico"), ("calico", "Calico")];
    let owner = known.iter().find(|(prefix, _)| other.name.starts_with(prefix)).map(|(_, owner)| *owner);
    if other.exclusive {
        return Finding::new(
            Severity::Error,
            "hook_exclusive",
            what,
            "it was attached so that nobody can attach to the pods below: none of them can be captured",
            "have its owner attach it with BPF_F_ALLOW_MULTI, or remove it",
        );
    }
    let fix = match owner {
        Some("Cilium") => "set socketLB.hostNamespaceOnly=true, so that Cilium leaves pods' Services to the mesh",
        Some("Calico") => "set bpfConnectTimeLoadBalancing to Disabled in FelixConfiguration",
        _ => "if it rewrites Services' addresses when a pod connects, switch that off for pods",
    };
    if connects {
        let detail = "runs after heddle's and may change where a connection goes: the agent then sees the endpoint that it chose, not the Service";
        return Finding::new(Severity::Warning, "connect_program", what, detail, fix);
    }
    Finding::pass("other_program", what, "runs after heddle's, and changes no destination")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::survey::Cgroups;

    fn sound() -> Survey {
        Survey {
            release: "6.12.5-amd64".into(),
            programs: vec![("lookup", None), ("connect4", None)],
            bpffs: Some(true),
            cgroups: Cgroups { mount: Some("/sys/fs/cgroup".into()), hybrid: false, pods: 3 },
            ..Survey::default()
        }
    }

    fn worst(survey: &Survey) -> (Severity, String) {
        judge(survey).into_iter().min().map(|finding| (finding.severity, finding.reason)).unwrap()
    }

    #[test]
    fn a_sound_node_passes_and_each_fault_is_told_by_its_name() {
        assert_eq!(worst(&sound()).0, Severity::Pass);
        let other =
            |hook, name: &str, exclusive| Other { cgroup: "/sys/fs/cgroup".into(), hook, name: name.into(), exclusive };
        let faults: [(Survey, Severity, &str); 9] = [
            (Survey { release: "5.4.0".into(), ..sound() }, Severity::Error, "kernel_too_old"),
            (Survey { release: "5.10.0-28-amd64".into(), ..sound() }, Severity::Warning, "kernel_without_lane"),
            (Survey { release: "mine".into(), ..sound() }, Severity::Warning, "kernel_unknown"),
            (
                Survey { programs: vec![("lookup", Some("Invalid argument".into()))], ..sound() },
                Severity::Error,
                "program_type_refused",
            ),
            (Survey { bpffs: Some(false), ..sound() }, Severity::Warning, "bpffs_missing"),
            (Survey { cgroups: Cgroups::default(), ..sound() }, Severity::Error, "cgroup2_missing"),
            (
                Survey { cgroups: Cgroups { hybrid: true, pods: 0, ..sound().cgroups }, ..sound() },
                Severity::Warning,
                "cgroup_hybrid",
            ),
            (
                Survey { others: vec![other("connect4", "cil_sock4_conne", false)], ..sound() },
                Severity::Warning,
                "connect_program",
            ),
            (Survey { others: vec![other("observe", "x", true)], ..sound() }, Severity::Error, "hook_exclusive"),
        ];
        for (survey, severity, reason) in faults {
            assert_eq!(worst(&survey), (severity, reason.to_owned()), "{survey:?}");
        }
        let cilium = Survey { others: vec![other("connect4", "cil_sock4_conne", false)], ..sound() };
        assert!(judge(&cilium).iter().any(|finding| finding.fix.contains("socketLB.hostNamespaceOnly")));
        let devices = Survey { on_devices: vec!["cil_from_contai".into()], ..sound() };
        assert!(judge(&devices).iter().any(|finding| finding.detail.contains("cil_from_contai")));
    }
}
