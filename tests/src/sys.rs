//! The system calls that std, nix and socket2 don't wrap: start a process inside a pod, and three TCP socket options.
//!
//! The only file of the lab with `unsafe`. It must stay as small as it is.
#![allow(unsafe_code, reason = "pre_exec and TCP options without a safe wrapper")]

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::resource::{Resource, setrlimit},
};

/// Starts `command` inside `cgroup` and `netns`, with at most `files` open files, in a process group of its own so that
/// Ctrl-C reaches the lab alone.
///
/// Only the network namespace changes: `ip netns exec` would remount /sys too and hide cgroups and bpffs.
pub fn spawn_in(
    command: &mut Command,
    netns: Option<&Path>,
    cgroup: Option<&Path>,
    files: Option<u64>,
) -> io::Result<Child> {
    let mut procs = match cgroup {
        Some(folder) => Some(OpenOptions::new().write(true).open(folder.join("cgroup.procs"))?),
        None => None,
    };
    let netns = match netns {
        Some(file) => Some(File::open(file)?),
        None => None,
    };
    command.process_group(0);
    // SAFETY: between fork and exec the closure only makes the system calls write(2) and setns(2) on descriptors that
    // were opened before, and setrlimit(2); all are async-signal-safe and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            if let Some(procs) = procs.as_mut() {
                procs.write_all(b"0")?;
            }
            if let Some(netns) = netns.as_ref() {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            }
            if let Some(files) = files {
                setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
            }
            Ok(())
        });
    }
    command.spawn()
}

fn set_tcp_option(socket: &impl AsFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor lives as long as `socket`; the pointer and the length describe `value`.
    let done = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), length)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `connect(2)` waits for the first write and sends it in the SYN (`TCP_FASTOPEN_CONNECT`, tcp(7)).
pub fn set_fastopen_connect(socket: &impl AsFd) -> io::Result<()> {
    set_tcp_option(socket, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// A listener that takes data in the SYN, with a queue of `length` (`TCP_FASTOPEN`, tcp(7)).
pub fn set_fastopen_listen(socket: &impl AsFd, length: i32) -> io::Result<()> {
    set_tcp_option(socket, libc::TCP_FASTOPEN, length)
}

/// Whether an MPTCP socket still speaks MPTCP or fell back to TCP (`TCP_IS_MPTCP`, linux/tcp.h). An error, of a plain
/// TCP socket on an old kernel, means no.
pub fn is_mptcp(socket: &impl AsFd) -> bool {
    const TCP_IS_MPTCP: libc::c_int = 43;
    let mut value: libc::c_int = 0;
    let Ok(mut length) = libc::socklen_t::try_from(size_of::<libc::c_int>()) else { return false };
    // SAFETY: the descriptor lives as long as `socket`; the kernel writes at most `length` bytes into `value`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_IS_MPTCP,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    done == 0 && value == 1
}
