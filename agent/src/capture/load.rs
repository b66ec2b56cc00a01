//! One instance of the programs per pod: loaded with the pod's slot and addresses as read-only data, hung on its cgroup and
//! netns by pinned links, adopted by the next agent when they are the very same.
//!
//! Whether a running instance is ours is read from the kernel (program tags, map ids, the read-only data itself), never
//! remembered. A link is replaced in place, or the new one hangs before the old one goes: there is no moment without.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader, GlobalData,
    maps::MapInfo,
    programs::{Program, ProgramError},
};
use heddle_common::{Address, Pod, globals, maps, programs};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::{
    kernel::{self, Hook, LinkInfo, ProgramInfo, Target},
    netns::Netns,
    pin,
};
use crate::causes;

/// The compiled programs; `build.rs` refuses an object that is older than its sources.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/heddle.bpf.o"));

const READ_ONLY: &str = ".rodata";

/// The programs in the order in which they are attached: what catches a marked connection is there before anything marks one.
pub const PROGRAMS: [(&str, Hook); 8] = [
    (programs::LOOKUP, Hook::Lookup),
    (programs::OBSERVE, Hook::SockOps),
    (programs::PEERNAME4, Hook::Peername4),
    (programs::PEERNAME6, Hook::Peername6),
    (programs::CONNECT4, Hook::Connect4),
    (programs::CONNECT6, Hook::Connect6),
    (programs::SENDMSG4, Hook::Sendmsg4),
    (programs::SENDMSG6, Hook::Sendmsg6),
];

/// Kernel ids of a pod's programs, in the order of [`PROGRAMS`].
pub type ProgramIds = [u32; PROGRAMS.len()];

/// A pod's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    file: OwnedFd,
    id: u64,
}

impl Cgroup {
    /// Opens a folder of a cgroup v2 hierarchy.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if fstatfs(&file)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not in a cgroup v2 hierarchy"));
        }
        // The inode of a kernfs node is its id, by which links name it.
        let id = file.metadata()?.ino();
        Ok(Self { file: file.into(), id })
    }

    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The embedded programs, as this kernel takes them.
#[derive(Debug)]
pub struct Object {
    maps: PathBuf,
    /// Each of [`PROGRAMS`] in an instance of the embedded object.
    known: [ProgramInfo; PROGRAMS.len()],
    /// Where the pod lies in the read-only data.
    place: PodPlace,
}

#[derive(Debug)]
struct PodPlace {
    /// Size of the read-only data.
    length: usize,
    offset: usize,
}

/// Loaded programs, in the order in which they were asked for.
pub type Instance<const COUNT: usize> = [(OwnedFd, ProgramInfo); COUNT];

/// A pod of nobody, recognisable in the read-only data.
const NOBODY: Pod = Pod {
    slot: u32::MAX,
    addresses_used: 0,
    workload: 0,
    netns: 0,
    addresses: [Address::v6(*b"heddle:nobody:00"); Pod::MAX_ADDRESSES],
};

impl Object {
    /// Loads the programs once, without attaching them: makes the pinned maps where absent, and learns what an instance
    /// looks like. The id is of a program that lives as long as the descriptor.
    pub fn open(maps: &Path) -> Result<(Self, OwnedFd, u32), String> {
        let programs = pods_instance(maps, &NOBODY)?;
        let known = programs.each_ref().map(|(_, info)| info.clone());
        let [lookup, ..] = programs;
        let (length, data) = read_only_data(&lookup.1)?.ok_or("the look-up program has no read-only data")?;
        let wanted = bytes(&NOBODY);
        let offset = data
            .windows(wanted.len())
            .position(|window| window == wanted)
            .ok_or("the pod is not in the read-only data of the programs")?;
        let object = Self { maps: maps.to_owned(), known, place: PodPlace { length, offset } };
        Ok((object, lookup.0, lookup.1.id))
    }

    /// Whether a running program is what [`Object::attach`] would put there for `pod`.
    fn is_current(&self, index: usize, program: u32, pod: &Pod, shared: &BTreeSet<u32>) -> bool {
        let Ok(info) = kernel::program_by_id(program).and_then(|program| kernel::program_info(&program)) else {
            return false;
        };
        let Some(known) = self.known.get(index) else {
            return false;
        };
        // The same instructions over other maps (pins that were removed and made again) would be blind.
        let same_maps = known.maps.iter().filter(|id| shared.contains(id)).all(|id| info.maps.contains(id));
        if info.tag != known.tag || !same_maps {
            return false;
        }
        match read_only_data(&info) {
            Ok(Some((length, data))) => {
                let PodPlace { offset, .. } = self.place;
                length == self.place.length && data.get(offset..).is_some_and(|rest| rest.starts_with(&bytes(pod)))
            }
            // What looks at nothing of the pod is the same for every one.
            Ok(None) => true,
            Err(_) => false,
        }
    }

    /// Sees to it that the pod's links hang on `netns` and `cgroup` with programs made for `pod`, pinned in `folder`.
    /// Adopts what is right already. `shared` are the ids of the pinned maps.
    pub fn attach(
        &self,
        folder: &Path,
        pod: &Pod,
        netns: &Netns,
        cgroup: &Cgroup,
        shared: &BTreeSet<u32>,
    ) -> Result<(ProgramIds, How), AttachError> {
        let found: Vec<Option<(OwnedFd, LinkInfo)>> =
            PROGRAMS.iter().map(|(name, _)| existing(&folder.join(name))).collect::<Result<_, _>>()?;
        let mut ids = [0; PROGRAMS.len()];
        let mut current = 0;
        for (index, (slot, (_, hook))) in found.iter().zip(PROGRAMS).enumerate() {
            if let (Some((_, info)), Some(id)) = (slot, ids.get_mut(index))
                && hangs(info, hook, netns.inode(), cgroup.id())
                && self.is_current(index, info.program, pod, shared)
            {
                *id = info.program;
                current += 1;
            }
        }
        if current == PROGRAMS.len() {
            return Ok((ids, How::Adopted));
        }
        let replaced = found.iter().any(Option::is_some);
        let programs = pods_instance(&self.maps, pod).map_err(AttachError::Programs)?;
        for ((slot, (name, hook)), ((program, info), id)) in
            found.into_iter().zip(PROGRAMS).zip(programs.iter().zip(&mut ids))
        {
            let at = folder.join(name);
            if let Some((link, old)) = &slot
                && hangs(old, hook, netns.inode(), cgroup.id())
                && kernel::relink(link, program).is_ok()
            {
                *id = info.id;
                continue;
            }
            let link = match hook {
                Hook::Lookup => kernel::link(program, netns, hook),
                _ => kernel::link(program, cgroup, hook),
            }?;
            // The old link goes with its name and with `slot`.
            pin_over(&link, &at)?;
            *id = info.id;
        }
        Ok((ids, if replaced { How::Replaced } else { How::Attached }))
    }
}

/// What [`Object::attach`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Attached,
    Adopted,
    Replaced,
}

#[derive(Debug)]
pub enum AttachError {
    Programs(String),
    Link(io::Error),
}

impl From<io::Error> for AttachError {
    fn from(error: io::Error) -> Self {
        Self::Link(error)
    }
}

/// Compares the pinned links with what they should be. `Err` names the first that is not.
pub fn read_back(folder: &Path, netns: u64, cgroup: u64, expected: &ProgramIds) -> Result<(), String> {
    for ((name, hook), program) in PROGRAMS.iter().zip(expected) {
        let Some((_, info)) = existing(&folder.join(name)).map_err(|error| format!("link {name}: {error}"))? else {
            return Err(format!("link {name} is not pinned"));
        };
        if !hangs(&info, *hook, netns, cgroup) {
            return Err(format!("link {name} hangs on {:?}, not on the pod", info.target));
        }
        if info.program != *program {
            return Err(format!("link {name} runs program {}, not {program}", info.program));
        }
    }
    Ok(())
}

/// A program on a pod, as the kernel reports it now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachedProgram {
    /// As in the object, and as the pin is called.
    pub name: &'static str,
    /// Kernel ids.
    pub program: u32,
    pub link: u32,
}

/// The programs that hang on a pod, by its pins; those that are gone are left out.
pub fn attached(folder: &Path, netns: u64, cgroup: u64) -> io::Result<Vec<AttachedProgram>> {
    let mut found = Vec::with_capacity(PROGRAMS.len());
    for (name, hook) in PROGRAMS {
        if let Some((_, info)) = existing(&folder.join(name))?
            && hangs(&info, hook, netns, cgroup)
        {
            found.push(AttachedProgram { name, program: info.program, link: info.id });
        }
    }
    Ok(found)
}

/// Pins a link under a name that another one may have, which then has none.
pub fn pin_over(link: &OwnedFd, at: &Path) -> io::Result<()> {
    let mut next = at.as_os_str().to_owned();
    next.push("-next");
    let next = Path::new(&next);
    pin::remove_if_there(next)?;
    kernel::pin(link, next)?;
    std::fs::rename(next, at)
}

pub fn hangs(info: &LinkInfo, hook: Hook, netns: u64, cgroup: u64) -> bool {
    let target = match hook {
        Hook::Lookup => Target::Netns(netns),
        _ => Target::Cgroup(cgroup),
    };
    info.attach_type == hook as u32 && info.target == target
}

pub fn existing(at: &Path) -> io::Result<Option<(OwnedFd, LinkInfo)>> {
    match kernel::open_pin(at) {
        Ok(link) => {
            let info = kernel::link_info(&link)?;
            Ok(Some((link, info)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn pods_instance(maps: &Path, pod: &Pod) -> Result<Instance<{ PROGRAMS.len() }>, String> {
    instance(maps, (globals::POD, pod.into()), PROGRAMS)
}

/// Loads some of the programs, with one of their read-only globals, over the pinned maps of `folder`.
pub fn instance<const COUNT: usize>(
    folder: &Path,
    (global, value): (&str, GlobalData<'_>),
    wanted: [(&'static str, Hook); COUNT],
) -> Result<Instance<COUNT>, String> {
    let mut ebpf = EbpfLoader::new()
        // The programs have no CO-RE relocations, so the kernel's types are not needed.
        .btf(None)
        .default_map_pin_directory(folder)
        .map_pin_path(maps::LOGS, folder.join(maps::LOGS))
        .map_pin_path(maps::ASKED, folder.join(maps::ASKED))
        .override_global(global, value, true)
        .load(OBJECT)
        .map_err(|error| causes::told(&error))?;
    let mut load = |name: &str| -> Result<(OwnedFd, ProgramInfo), String> {
        let program = ebpf.program_mut(name).ok_or_else(|| format!("the object has no program {name}"))?;
        let loaded: Result<(), ProgramError> = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::SkLookup(program) => program.load(),
            Program::SockOps(program) => program.load(),
            _ => return Err(format!("program {name} is of another type")),
        };
        loaded.map_err(|error| format!("program {name}: {}", causes::told(&error)))?;
        let fd = program.fd().map_err(|error| causes::told(&error))?;
        let fd = fd.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
        let info = kernel::program_info(&fd).map_err(|error| format!("program {name}: {error}"))?;
        Ok((fd, info))
    };
    let programs: Vec<_> = wanted.iter().map(|(name, _)| load(name)).collect::<Result<_, _>>()?;
    programs.try_into().map_err(|_| "a program is missing".to_owned())
}

/// Size and content of a program's read-only data.
fn read_only_data(program: &ProgramInfo) -> Result<Option<(usize, Vec<u8>)>, String> {
    for id in &program.maps {
        let map = MapInfo::from_id(*id).map_err(|error| causes::told(&error))?;
        if map.name() == READ_ONLY.as_bytes() {
            let length = map.value_size() as usize;
            let data = kernel::read_only_data(*id, length).map_err(|error| format!("{READ_ONLY}: {error}"))?;
            return Ok(Some((length, data)));
        }
    }
    Ok(None)
}

/// A pod as it lies in memory.
fn bytes(pod: &Pod) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<Pod>());
    bytes.extend(pod.slot.to_ne_bytes());
    bytes.extend(pod.addresses_used.to_ne_bytes());
    bytes.extend(pod.workload.to_ne_bytes());
    bytes.extend(pod.netns.to_ne_bytes());
    for address in &pod.addresses {
        bytes.extend(address.octets);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_bytes_are_all_of_it() {
        assert_eq!(bytes(&NOBODY).len(), size_of::<Pod>());
    }
}
