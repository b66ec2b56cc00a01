//! What outlives the agent, in bpffs: `<folder>/v<layout version>/{maps/<NAME>, pods/<uid>/{<program>,…,record},
//! kubelet/<program>}`.
//!
//! The record says what a later agent must know of a pod to adopt it or to clean up after it. It is the target of a symbolic
//! link, as bpffs holds no other text. Only this module knows paths; nothing here touches a pod. A record is a hint for
//! finding things, never proof that they are there.

use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use heddle_common::LAYOUT_VERSION;
use nix::{
    mount::MsFlags,
    sys::statfs::{FsType, statfs},
};
use serde::{Deserialize, Serialize};

use super::{CaptureError, WorkloadId};

/// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`.
const BPFFS: FsType = FsType(0xcafe_4a11);
/// Where bpffs belongs (file-hierarchy(7) of systemd).
const USUAL_MOUNT: &str = "/sys/fs/bpf";
const RECORD: &str = "record";
/// Longest folder name made of a uid; bpffs allows 255 bytes.
const NAME_BYTES: usize = 200;

/// What is known of an enrolled pod beyond the process that enrolled it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub uid: String,
    pub name: String,
    pub slot: u32,
    /// The kernel lane's name for the pod, never given to another.
    pub workload: WorkloadId,
    pub addresses: Vec<IpAddr>,
    pub netns: PathBuf,
    /// Tells this netns from a later one at the same path.
    pub netns_inode: u64,
    pub cgroup: PathBuf,
    /// Switches of the netns that enrolment found off (see [`super::sysctl`]).
    pub switched_on: Vec<String>,
    /// Cookies of sockets that were connected before the pod was enrolled, as many as there is room for.
    #[serde(default)]
    pub older: Vec<u64>,
}

/// The folder of this layout version.
#[derive(Debug, Clone)]
pub struct Pins {
    folder: PathBuf,
    version: PathBuf,
}

impl Pins {
    /// Makes the folders, and mounts bpffs where there is none.
    pub fn open(folder: &Path) -> Result<Self, CaptureError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| CaptureError::Bpffs { path, source }
        };
        mount(folder).map_err(at(folder))?;
        let version = folder.join(format!("v{LAYOUT_VERSION}"));
        for part in ["maps", "pods"] {
            let path = version.join(part);
            fs::create_dir_all(&path).map_err(at(&path))?;
        }
        Ok(Self { folder: folder.to_owned(), version })
    }

    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.version.join("maps")
    }

    /// Folder of the links on the kubelet's cgroup; it may be absent.
    #[must_use]
    pub fn kubelet(&self) -> PathBuf {
        self.version.join("kubelet")
    }

    /// Folder of a pod, made if absent.
    pub fn make_pod(&self, uid: &str) -> io::Result<PathBuf> {
        let path = self.pod(uid);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(path),
        }
    }

    #[must_use]
    pub fn pod(&self, uid: &str) -> PathBuf {
        self.version.join("pods").join(folder_name(uid))
    }

    /// The pod's record, if there is a readable one of this very uid.
    #[must_use]
    pub fn record(&self, uid: &str) -> Option<Record> {
        read_record(&self.pod(uid)).filter(|record| record.uid == uid)
    }

    /// Replaces the pod's record at once.
    pub fn write_record(&self, record: &Record) -> io::Result<()> {
        let folder = self.make_pod(&record.uid)?;
        let next = folder.join("record-next");
        remove_if_there(&next)?;
        symlink(serde_json::to_string(record)?, &next)?;
        fs::rename(&next, folder.join(RECORD))
    }

    /// Every pod folder of this version, with its record where that can be read.
    pub fn pods(&self) -> io::Result<Vec<(PathBuf, Option<Record>)>> {
        pods_below(&self.version)
    }

    /// Folders of other layout versions.
    pub fn other_versions(&self) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let named = path.file_name().and_then(|name| name.to_str());
            let version = named.and_then(|name| name.strip_prefix('v')).is_some_and(|rest| rest.parse::<u32>().is_ok());
            if version && path != self.version {
                found.push(path);
            }
        }
        Ok(found)
    }
}

/// Every pod folder below a version's folder.
pub fn pods_below(version: &Path) -> io::Result<Vec<(PathBuf, Option<Record>)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(version.join("pods")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        other => other?,
    };
    for entry in entries {
        let path = entry?.path();
        let record = read_record(&path);
        found.push((path, record));
    }
    Ok(found)
}

fn read_record(folder: &Path) -> Option<Record> {
    let text = fs::read_link(folder.join(RECORD)).ok()?;
    serde_json::from_str(text.to_str()?).ok()
}

/// Removes a folder of pins with everything in it: what they held goes with them.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A uid as a bpffs name, which allows no dot and no slash: other bytes than letters, digits and `-` become `_xx`, and what is
/// too long ends in a digest of the whole.
fn folder_name(uid: &str) -> String {
    let mut name = String::with_capacity(uid.len());
    for byte in uid.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("_{byte:02x}"));
        }
    }
    if name.len() > NAME_BYTES || name.is_empty() {
        // FNV-1a: stable over processes and versions, which the standard library's hasher is not.
        let digest = uid
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        name.truncate(NAME_BYTES);
        name.push_str(&format!("_{digest:016x}"));
    }
    name
}

/// Sees to it that `folder` lies on a bpffs.
fn mount(folder: &Path) -> io::Result<()> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if statfs(existing)?.filesystem_type() == BPFFS {
        return Ok(());
    }
    let point = if folder.starts_with(USUAL_MOUNT) { Path::new(USUAL_MOUNT) } else { folder };
    fs::create_dir_all(point)?;
    nix::mount::mount(
        Some("bpf"),
        point,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=700"),
    )?;
    tracing::info!(path = %point.display(), "mounted bpffs");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_names_hold_no_dot_and_no_slash_and_stay_apart() {
        assert_eq!(folder_name("6f1c-aa"), "6f1c-aa");
        assert_eq!(folder_name("default/web.1"), "default_2fweb_2e1");
        assert_ne!(folder_name("a_2f"), folder_name("a/"));
        let (long, longer) = ("x".repeat(400), "x".repeat(401));
        assert!(folder_name(&long).len() <= 255);
        assert_ne!(folder_name(&long), folder_name(&longer));
        assert_ne!(folder_name(""), "");
    }

    #[test]
    fn a_record_with_the_longest_names_fits_a_symbolic_link() {
        let record = Record {
            uid: "u".repeat(320),
            name: "n".repeat(320),
            slot: u32::MAX,
            workload: WorkloadId(u64::MAX),
            addresses: vec!["2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap(); 4],
            netns: PathBuf::from("/run/netns/".to_owned() + &"x".repeat(255)),
            netns_inode: u64::MAX,
            cgroup: PathBuf::from("/sys/fs/cgroup/".to_owned() + &"y".repeat(1_000)),
            switched_on: vec!["ipv4/tcp_fwmark_accept".into(); 3],
            older: vec![u64::MAX; crate::life::limits::OLDER_RECORDED],
        };
        let text = serde_json::to_string(&record).unwrap();
        assert!(text.len() < 4_096);
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    }
}
