//! A pod's network namespace, and the only place where a thread enters one.
//!
//! Sockets belong to the netns of the thread that made them, for good; so a thread goes in, makes the socket and comes
//! back, all within one synchronous call. It never stays: a thread that can't come back ends the process, because everything
//! it did from then on would happen inside a pod.
#![allow(unsafe_code, reason = "setns(2) works on the calling thread; a socket option that socket2 has no name for")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::Arc,
};

use socket2::{Domain, Socket, Type};

/// The netns of the agent itself.
#[derive(Debug, Clone)]
pub struct Home(Arc<OwnedFd>, u64);

impl Home {
    /// That of the calling thread.
    pub fn here() -> io::Result<Self> {
        let file = File::open("/proc/thread-self/ns/net")?;
        let inode = file.metadata()?.ino();
        Ok(Self(Arc::new(file.into()), inode))
    }

    /// As [`Netns::cookie`]. To be called where [`Home::here`] was.
    pub fn cookie(&self) -> io::Result<u64> {
        cookie(&Socket::new(Domain::UNIX, Type::DGRAM.cloexec(), None)?)
    }
}

/// A pod's netns, kept alive by this value.
#[derive(Debug)]
pub struct Netns {
    file: OwnedFd,
    inode: u64,
    home: Home,
}

impl Netns {
    /// Opens the netns; refuses what is none, and the agent's own, which is the host's or another tenant's.
    pub fn open(path: &Path, home: &Home) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = file.metadata()?.ino();
        if inode == home.1 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is the agent's own network namespace"));
        }
        let netns = Self { file: file.into(), inode, home: home.clone() };
        netns.within(|| Ok(()))?;
        Ok(netns)
    }

    /// The agent's own.
    #[must_use]
    pub fn home(&self) -> &impl AsFd {
        &self.home.0
    }

    /// The number by which the kernel names it in link information.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The number by which BPF programs know it (`bpf_get_netns_cookie`); never given to another netns.
    ///
    /// # Errors
    /// `ENOPROTOOPT` before Linux 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        cookie(&self.within(|| Socket::new(Domain::UNIX, Type::DGRAM.cloexec(), None))?)
    }

    /// Does `work` inside the netns, on this thread. `work` must be short: it may run on a worker of the runtime.
    pub fn within<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        struct Return<'a>(&'a Home);
        impl Drop for Return<'_> {
            fn drop(&mut self) {
                if let Err(error) = enter(self.0.0.as_fd()) {
                    tracing::error!(%error, "a thread could not leave a pod's network namespace; ending the process");
                    std::process::abort();
                }
            }
        }
        enter(self.file.as_fd())?;
        let _return = Return(&self.home);
        work()
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// That of the netns which the socket belongs to.
fn cookie(socket: &Socket) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`; both outlive the call, and the descriptor is the socket's.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Moves the calling thread into a netns for good: for a process that exists for one probe.
pub fn enter_for_good(path: &Path) -> io::Result<()> {
    enter(File::open(path)?.as_fd())
}

fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns(2) takes a descriptor and a flag; it changes the calling thread's netns only.
    match unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
