//! The few bpf(2) commands that aya keeps to itself: links that are read back, replaced in place and pinned by us, programs
//! and maps by id, sockets in a sockmap.
//!
//! A thin shell over the system call: no decision is made here. Structures are those of `include/uapi/linux/bpf.h`; the
//! kernel takes a shorter attribute than its own, and fills the rest with zeros.
#![allow(unsafe_code, reason = "the bpf(2) system call has no safe wrapper")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const MAP_GET_FD_BY_ID: libc::c_long = 14;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const LINK_DETACH: libc::c_long = 34;

const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_NETNS: u32 = 5;

/// `BPF_NOEXIST`: refuse to replace.
pub const NO_EXIST: u64 = 1;

/// Most programs of one kind on a cgroup (`BPF_CGROUP_MAX_PROGS`).
const MAX_CGROUP_PROGRAMS: usize = 64;

/// Most maps that one program may use (`MAX_USED_MAPS`).
const MAX_USED_MAPS: usize = 64;

/// Where a program hangs. Values are the kernel's `enum bpf_attach_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Peername4 = 29,
    Peername6 = 30,
    Lookup = 36,
}

/// What a link hangs on, as the kernel names it: the cgroup's id (its inode on cgroup v2) or the netns' inode. Zero once that
/// is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Cgroup(u64),
    Netns(u64),
}

/// A link as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    pub id: u32,
    pub program: u32,
    pub target: Target,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
}

/// A program as the kernel reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    pub id: u32,
    /// Digest of the instructions without map references.
    pub tag: [u8; 8],
    pub maps: Vec<u32>,
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct IdAttr {
    id: u32,
    next: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkDetachAttr {
    link: u32,
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The `query` part of `union bpf_attr`, as Linux 4.15 has it.
#[repr(C)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
}

/// The part of `union bpf_attr` for loading, up to the expected attach type (Linux 4.17).
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    kind: u32,
    instructions_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// The `batch` part of `union bpf_attr` (Linux 5.6).
#[repr(C)]
struct BatchAttr {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// `struct bpf_link_info` up to the largest of the two shapes used here.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    /// cgroup: id, low half. netns: inode.
    first: u32,
    /// cgroup: id, high half. netns: attach type.
    second: u32,
    /// cgroup: attach type.
    third: u32,
    rest: u32,
}

/// `struct bpf_prog_info` up to the map ids.
#[repr(C)]
#[derive(Default)]
struct RawProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    translated_length: u32,
    jited: u64,
    translated: u64,
    loaded: u64,
    created_by: u32,
    map_count: u32,
    map_ids: u64,
}

fn bpf<A>(command: libc::c_long, attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: each `A` is a repr(C) prefix of `union bpf_attr` without padding bytes; its length goes with it and every pointer
    // in it points at memory that outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().unsigned_abs()
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Lets this process have maps of any size: before Linux 5.11 they count as locked memory, whoever it is that makes them.
pub fn allow_memory() -> io::Result<()> {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    Ok(setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?)
}

/// Gives `object` a name in bpffs; it lives as long as the name does.
pub fn pin(object: &impl AsFd, at: &Path) -> io::Result<()> {
    let at = path(at)?;
    bpf(OBJ_PIN, &mut ObjectAttr { path: at.as_ptr() as u64, fd: number(object), flags: 0 }).map(drop)
}

/// Opens what is pinned; `NotFound` where nothing is.
pub fn open_pin(at: &Path) -> io::Result<OwnedFd> {
    let at = path(at)?;
    owned(bpf(OBJ_GET, &mut ObjectAttr { path: at.as_ptr() as u64, fd: 0, flags: 0 })?)
}

/// Hangs a program on a cgroup (beside others, never instead of them) or a netns.
pub fn link(program: &impl AsFd, target: &impl AsFd, hook: Hook) -> io::Result<OwnedFd> {
    let mut attr =
        LinkCreateAttr { program: number(program), target: number(target), attach_type: hook as u32, flags: 0 };
    owned(bpf(LINK_CREATE, &mut attr)?)
}

/// Exchanges the program of a link atomically (cgroup: Linux 5.7, netns: 5.8).
pub fn relink(link: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let mut attr = LinkUpdateAttr { link: number(link), program: number(program), flags: 0, old_program: 0 };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Takes a link's program off its hook, now (Linux 5.9). Closing the last descriptor does it too, but some time later.
pub fn unlink(link: &impl AsFd) -> io::Result<()> {
    bpf(LINK_DETACH, &mut LinkDetachAttr { link: number(link) }).map(drop)
}

fn info<I>(object: &impl AsFd, info: &mut I) -> io::Result<()> {
    let length = u32::try_from(size_of::<I>()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    bpf(OBJ_GET_INFO_BY_FD, &mut InfoAttr { fd: number(object), length, info: std::ptr::from_mut(info) as u64 })
        .map(drop)
}

/// Reads a link back.
pub fn link_info(link: &impl AsFd) -> io::Result<LinkInfo> {
    let mut raw = RawLinkInfo::default();
    info(link, &mut raw)?;
    let (target, attach_type) = match raw.kind {
        LINK_TYPE_CGROUP => (Target::Cgroup(join(raw.first, raw.second)), raw.third),
        LINK_TYPE_NETNS => (Target::Netns(raw.first.into()), raw.second),
        other => return Err(io::Error::other(format!("a pin of ours holds a link of type {other}"))),
    };
    Ok(LinkInfo { id: raw.id, program: raw.program, target, attach_type })
}

/// Two halves of a 64-bit field as they lie in memory.
fn join(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// Reads a program back.
pub fn program_info(program: &impl AsFd) -> io::Result<ProgramInfo> {
    let mut maps = vec![0_u32; MAX_USED_MAPS];
    let mut raw = RawProgramInfo {
        map_count: MAX_USED_MAPS as u32,
        map_ids: maps.as_mut_ptr() as u64,
        ..RawProgramInfo::default()
    };
    info(program, &mut raw)?;
    maps.truncate(raw.map_count as usize);
    Ok(ProgramInfo { id: raw.id, tag: raw.tag, maps })
}

/// Opens a loaded program.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    owned(bpf(PROG_GET_FD_BY_ID, &mut IdAttr { id, next: 0, flags: 0 })?)
}

/// The one value of a read-only data map of `length` bytes.
pub fn read_only_data(map: u32, length: usize) -> io::Result<Vec<u8>> {
    let map = owned(bpf(MAP_GET_FD_BY_ID, &mut IdAttr { id: map, next: 0, flags: 0 })?)?;
    // The kernel copies the value's size rounded up to eight bytes.
    let mut value = vec![0_u8; length.next_multiple_of(8)];
    element(MAP_LOOKUP_ELEM, &map, 0, value.as_mut_ptr() as u64, 0)?;
    value.truncate(length);
    Ok(value)
}

/// The programs of a kind that hang on a cgroup or netns itself, in the order in which they run, and how they were attached
/// (`BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`, or neither).
pub fn attached(target: &impl AsFd, hook: Hook) -> io::Result<(Vec<u32>, u32)> {
    let mut programs = vec![0_u32; MAX_CGROUP_PROGRAMS];
    let mut attr = QueryAttr {
        target: number(target),
        attach_type: hook as u32,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr() as u64,
        count: MAX_CGROUP_PROGRAMS as u32,
        padding: 0,
    };
    bpf(PROG_QUERY, &mut attr)?;
    programs.truncate(attr.count as usize);
    Ok((programs, attr.attach_flags))
}

/// Loads a program that only says yes, and lets it go: whether the kernel has programs of this kind.
pub fn try_load(hook: Hook) -> io::Result<()> {
    /// `r0 = 1; exit`.
    const YES: [u64; 2] = [0x0000_0001_0000_00b7, 0x0000_0000_0000_0095];
    const SOCK_OPS: u32 = 13;
    const CGROUP_SOCK_ADDR: u32 = 18;
    const SK_LOOKUP: u32 = 30;
    let (kind, expected_attach_type) = match hook {
        // Its attach type is asked for when it is attached.
        Hook::SockOps => (SOCK_OPS, 0),
        Hook::Lookup => (SK_LOOKUP, hook as u32),
        _ => (CGROUP_SOCK_ADDR, hook as u32),
    };
    let mut attr = LoadAttr {
        kind,
        instructions_count: YES.len() as u32,
        instructions: YES.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type,
        ..LoadAttr::default()
    };
    owned(bpf(PROG_LOAD, &mut attr)?).map(drop)
}

fn element(command: libc::c_long, map: &impl AsFd, key: u32, value: u64, flags: u64) -> io::Result<()> {
    let mut attr = ElementAttr { map: number(map), padding: 0, key: std::ptr::from_ref(&key) as u64, value, flags };
    bpf(command, &mut attr).map(drop)
}

/// Entries that are read at a time; a bucket of the kernel's table must fit.
const BATCH: u32 = 1_024;

/// Every entry of a hash map. The kernel reads bucket by bucket, each under its lock, so that an entry which is there
/// throughout is read once.
pub fn read_all<K: aya::Pod, V: aya::Pod>(map: &impl AsFd) -> io::Result<Vec<(K, V)>> {
    let (mut keys, mut values) = (Vec::<K>::with_capacity(BATCH as usize), Vec::<V>::with_capacity(BATCH as usize));
    let (mut all, mut from, mut next, mut first) = (Vec::new(), 0_u32, 0_u32, true);
    loop {
        let mut attr = BatchAttr {
            from: if first { 0 } else { std::ptr::from_mut(&mut from) as u64 },
            next: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: BATCH,
            map: number(map),
            element_flags: 0,
            flags: 0,
        };
        let result = bpf(MAP_LOOKUP_BATCH, &mut attr);
        let ended = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let read = attr.count.min(BATCH) as usize;
        // SAFETY: the kernel has written `count` keys and values, each of the map's sizes, which are those of `K` and `V`
        // (made with the same types); both are plain old data and the buffers hold that many.
        unsafe {
            keys.set_len(read);
            values.set_len(read);
        }
        all.extend(keys.drain(..).zip(values.drain(..)));
        if ended {
            return Ok(all);
        }
        (from, first) = (next, false);
    }
}

/// A record of a ring, if it is one of this type.
pub fn read_record<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is that of `T`, plain old data that any bytes are valid for.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Puts a socket into a sockmap, instead of another one that is there. Never the same one again: Linux 5.10 then forgets to empty the
/// slot when the socket closes, and what it holds afterwards is no socket any more ([`keep_socket`]).
pub fn put_socket(map: &impl AsFd, index: u32, socket: &impl AsFd) -> io::Result<()> {
    let value = [number(socket), 0];
    element(MAP_UPDATE_ELEM, map, index, value.as_ptr() as u64, 0)
}

/// Puts a socket into a slot of a sockmap if it is empty. Whether it held one already: which, can't be read of a sockmap with four-byte
/// values.
pub fn keep_socket(map: &impl AsFd, index: u32, socket: &impl AsFd) -> io::Result<bool> {
    let value = [number(socket), 0];
    match element(MAP_UPDATE_ELEM, map, index, value.as_ptr() as u64, NO_EXIST) {
        Ok(()) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Empties a slot of a sockmap. Whether it held a socket.
pub fn take_socket(map: &impl AsFd, index: u32) -> io::Result<bool> {
    match element(MAP_DELETE_ELEM, map, index, 0, 0) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}
