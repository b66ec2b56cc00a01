//! What this node offers to capture, and who else hangs on its hooks: asked of the kernel, for `heddle check`. It attaches nothing.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use aya::programs::loaded_programs;
use heddle_common::{maps, programs};
use nix::sys::{
    statfs::{BPF_FS_MAGIC, statfs},
    utsname::uname,
};

use super::kernel::{self, Hook};

/// Hooks without which nothing is captured, by the name of their program.
const NEEDED: [(&str, Hook); 4] = [
    (programs::LOOKUP, Hook::Lookup),
    (programs::CONNECT4, Hook::Connect4),
    (programs::CONNECT6, Hook::Connect6),
    (programs::OBSERVE, Hook::SockOps),
];
/// Deepest folder below a cgroup root that is looked at.
const DEPTH: usize = 8;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// `uname -r`.
    pub release: String,
    /// Each needed kind of program, and why the kernel does not take it.
    pub programs: Vec<(&'static str, Option<String>)>,
    /// Whether `/sys/fs/bpf`, or what stands for it, is one.
    pub bpffs: Option<bool>,
    pub cgroups: Cgroups,
    /// Programs of others on cgroups, outermost cgroup first, in the order in which they run there.
    pub others: Vec<Other>,
    /// Names of others' programs on devices (tc, tcx, XDP).
    pub on_devices: Vec<String>,
}

/// How cgroups are laid out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Where cgroup v2 is mounted.
    pub mount: Option<PathBuf>,
    /// Whether version 1 has controllers beside it.
    pub hybrid: bool,
    /// Folders of pods below the mount.
    pub pods: usize,
}

/// A program of somebody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    pub cgroup: PathBuf,
    pub hook: &'static str,
    pub name: String,
    /// Attached so that nobody can attach below.
    pub exclusive: bool,
}

/// Looks.
///
/// # Errors
/// What can't be read; a kernel that refuses a program is no error.
pub fn survey(bpffs: &Path) -> io::Result<Survey> {
    let release = uname()?.release().to_string_lossy().into_owned();
    // Where it can't, a kernel that needs it refuses the programs, and says so.
    let _as_before = kernel::allow_memory();
    let programs = NEEDED.map(|(name, hook)| (name, kernel::try_load(hook).err().map(|error| error.to_string())));
    let existing = bpffs.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let mounted = statfs(existing)?.filesystem_type() == BPF_FS_MAGIC;
    let cgroups = cgroups(&fs::read_to_string("/proc/self/mountinfo")?);
    let mut survey = Survey {
        release,
        programs: programs.into(),
        bpffs: Some(mounted),
        cgroups,
        others: Vec::new(),
        on_devices: devices(),
    };
    if let Some(mount) = survey.cgroups.mount.clone() {
        look(&mount, 0, &mut survey);
    }
    Ok(survey)
}

/// Where cgroup v2 is mounted.
///
/// # Errors
/// When the mounts can't be read.
pub fn cgroup_mount() -> io::Result<Option<PathBuf>> {
    Ok(cgroups(&fs::read_to_string("/proc/self/mountinfo")?).mount)
}

/// Where version 2 is mounted, and whether version 1 is.
fn cgroups(mounts: &str) -> Cgroups {
    let mut found = Cgroups::default();
    for line in mounts.lines() {
        let Some((place, source)) = line.split_once(" - ") else { continue };
        let (kind, point) = (source.split(' ').next(), place.split(' ').nth(4));
        match (kind, point) {
            (Some("cgroup2"), Some(point)) if found.mount.is_none() => found.mount = Some(PathBuf::from(point)),
            (Some("cgroup"), _) => found.hybrid = true,
            _ => {}
        }
    }
    found
}

/// A cgroup and those below it: pods, and programs of others.
fn look(folder: &Path, depth: usize, survey: &mut Survey) {
    let Ok(cgroup) = File::open(folder) else { return };
    for (name, hook) in NEEDED.iter().filter(|(_, hook)| *hook != Hook::Lookup) {
        let Ok((ids, flags)) = kernel::attached(&cgroup, *hook) else { continue };
        for id in ids {
            if let Some(other) = stranger(id) {
                let (cgroup, exclusive) = (folder.to_owned(), flags == 0);
                survey.others.push(Other { cgroup, hook: name, name: other, exclusive });
            }
        }
    }
    let pod = folder.file_name().and_then(|name| name.to_str()).is_some_and(is_pod);
    survey.cgroups.pods += usize::from(pod);
    if depth == DEPTH {
        return;
    }
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            look(&entry.path(), depth + 1, survey);
        }
    }
}

/// `pod<uid>` (cgroupfs driver) or `kubepods-…-pod<uid>.slice` (systemd's).
fn is_pod(name: &str) -> bool {
    let name = name.strip_suffix(".slice").unwrap_or(name);
    let uid = name.rsplit_once("-pod").filter(|(before, _)| before.starts_with("kubepods")).map(|(_, uid)| uid);
    let uid = uid.or_else(|| name.strip_prefix("pod"));
    uid.is_some_and(|uid| uid.len() >= 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || b"-_".contains(&byte)))
}

/// The name of a program that is not heddle's; `None` where it is, or has gone.
fn stranger(id: u32) -> Option<String> {
    let program = kernel::program_by_id(id).ok()?;
    let info = kernel::program_info(&program).ok()?;
    let ours = info.maps.iter().any(|map| map_name(*map).is_some_and(|name| name == maps::ATTESTED));
    (!ours).then(|| program_name(id).unwrap_or_else(|| format!("program {id}")))
}

fn map_name(id: u32) -> Option<String> {
    aya::maps::MapInfo::from_id(id).ok()?.name_as_str().map(str::to_owned)
}

fn program_name(id: u32) -> Option<String> {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id)?;
    program.name_as_str().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// Programs for devices that are loaded: which device each is on, and in which order, differs by how it was put there.
fn devices() -> Vec<String> {
    /// `BPF_PROG_TYPE_SCHED_CLS` and `BPF_PROG_TYPE_XDP`.
    const ON_DEVICE: [u32; 2] = [3, 6];
    let on_device = |program: &aya::programs::ProgramInfo| ON_DEVICE.contains(&(program.program_type() as u32));
    let found = loaded_programs().filter_map(Result::ok).filter(on_device);
    let mut names: Vec<String> = found.filter_map(|program| program.name_as_str().map(str::to_owned)).collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_told_by_their_folders_of_either_driver() {
        for name in [
            "pod6f1c3a52-0d8f-4a9f-9d3e-2b1a6f0c7d11",
            "kubepods-pod6f1c3a52_0d8f_4a9f_9d3e_2b1a6f0c7d11.slice",
            "kubepods-burstable-pod6f1c3a52_0d8f_4a9f_9d3e_2b1a6f0c7d11.slice",
        ] {
            assert!(is_pod(name), "{name}");
        }
        for name in
            ["kubepods.slice", "podman", "system.slice", "cri-containerd-6f1c3a520d8f4a9f9d3e2b1a6f0c7d11.scope"]
        {
            assert!(!is_pod(name), "{name}");
        }
    }

    #[test]
    fn cgroup_versions_are_read_from_the_mounts() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(cgroups(unified), Cgroups { mount: Some("/sys/fs/cgroup".into()), ..Cgroups::default() });
        let hybrid = "31 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n32 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let found = cgroups(hybrid);
        assert!(found.hybrid && found.mount == Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroups(""), Cgroups::default());
    }
}
