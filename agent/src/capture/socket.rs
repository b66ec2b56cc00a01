//! Sockets that live in a pod's netns: the listener, the one that dials as the pod, the one that delivers as its client.
//!
//! Only makes and binds them; connecting is the caller's. A port is never left to the kernel to search at bind time: with
//! a foreign source address that search grows with every connection (`IP_BIND_ADDRESS_NO_PORT` is the way out). A path's
//! prober, one at a time and from the pod's own address, is the exception.
#![allow(unsafe_code, reason = "socket options that socket2 has no name for")]

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};

use heddle_common::{LISTENER_PORT, MARK};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use super::netns::Netns;
use crate::life::limits;

fn stream(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

/// The socket inside the netns; nothing else of it happens there.
fn stream_in(netns: &Netns, address: IpAddr) -> io::Result<Socket> {
    netns.within(|| stream(if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }))
}

/// Answers for addresses that are not its netns' own.
fn set_transparent(socket: &Socket, v6: bool) -> io::Result<()> {
    if v6 { socket.set_ip_transparent_v6(true) } else { socket.set_ip_transparent_v4(true) }
}

/// Leaves the choice of the port to `connect`, which knows the whole 4-tuple.
fn set_no_port_at_bind(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which outlives the call, and the descriptor is the socket's.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn set_stream_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(limits::KEEPALIVE_IDLE)
        .with_interval(limits::KEEPALIVE_INTERVAL)
        .with_retries(limits::KEEPALIVE_TRIES);
    socket.set_tcp_keepalive(&keepalive)
}

/// The pod's one listener, on every port by way of `lookup`: both families, or IPv4 alone where the kernel has no IPv6.
/// Accepted sockets inherit TCP_NODELAY and keepalive: a client that vanished without a word is found out.
pub fn listener(netns: &Netns) -> io::Result<TcpListener> {
    match netns.within(|| stream(Domain::IPV6)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            set_transparent(&socket, true)?;
            set_transparent(&socket, false)?;
            listen(socket, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = netns.within(|| stream(Domain::IPV4))?;
            set_transparent(&socket, false)?;
            listen(socket, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
        }
        Err(error) => Err(error),
    }
}

fn listen(socket: Socket, address: IpAddr) -> io::Result<TcpListener> {
    socket.set_reuse_address(true)?;
    set_stream_options(&socket)?;
    socket.bind(&SockAddr::from(SocketAddr::new(address, LISTENER_PORT)))?;
    socket.listen(limits::LISTEN_BACKLOG)?;
    Ok(socket.into())
}

/// A socket that connects as the pod itself would.
pub fn dialer(netns: &Netns, source: IpAddr) -> io::Result<Socket> {
    let socket = stream_in(netns, source)?;
    set_stream_options(&socket)?;
    set_no_port_at_bind(&socket)?;
    socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    Ok(socket)
}

/// A socket that connects to the pod's app as `client` from an explicit port. On `lo`, so that ports in TIME_WAIT are used
/// again after a second (`tcp_tw_reuse` = 2 counts as loopback what is bound to it).
pub fn deliverer(netns: &Netns, client: SocketAddr) -> io::Result<Socket> {
    let socket = stream_in(netns, client.ip())?;
    set_transparent(&socket, client.is_ipv6())?;
    socket.set_mark(MARK)?;
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(b"lo"))?;
    set_stream_options(&socket)?;
    socket.bind(&SockAddr::from(client))?;
    Ok(socket)
}

/// A socket that comes to the pod's listener as if from outside, from an address that nobody has.
pub fn prober(netns: &Netns, source: IpAddr) -> io::Result<Socket> {
    let socket = stream_in(netns, source)?;
    set_transparent(&socket, source.is_ipv6())?;
    socket.set_mark(MARK)?;
    set_no_port_at_bind(&socket)?;
    socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    Ok(socket)
}

/// A socket that takes one connection to a pod's address and port, where capture lets it in.
pub fn path_listener(netns: &Netns, at: SocketAddr) -> io::Result<TcpListener> {
    let socket = stream_in(netns, at.ip())?;
    socket.set_reuse_address(true)?;
    // Accepted sockets too: nothing is left of a probe.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.bind(&SockAddr::from(at))?;
    socket.listen(limits::PATH_BACKLOG)?;
    Ok(socket.into())
}

/// A socket that connects as the pod itself would, and its address: the port is known before it does.
pub fn path_prober(netns: &Netns, source: IpAddr) -> io::Result<(Socket, SocketAddr)> {
    let socket = stream_in(netns, source)?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    let own = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok((socket, own))
}

/// What the kernel chose of the Service that an accepted connection was made to: one of [`heddle_common::choice`], from the half of the mark
/// that the rule does not look at. One system call.
///
/// # Errors
/// When it is no socket.
pub fn chosen(socket: BorrowedFd<'_>) -> io::Result<u16> {
    let [high, low, ..] = SockRef::from(&socket).mark()?.to_be_bytes();
    Ok(u16::from_be_bytes([high, low]))
}

/// How well TCP gets on, as the sending side sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpHealth {
    /// Smoothed round-trip time (microseconds); 0 before the first measurement.
    pub rtt: u32,
    /// Data segments sent so far, sent again included; wraps.
    pub segments: u32,
    /// Segments sent again so far; wraps.
    pub retransmitted: u32,
    /// Segments that TCP takes for lost at this moment.
    pub lost: u32,
}

/// Asks the kernel about a TCP socket: one system call, of less than a microsecond. What an older kernel does not know is 0.
///
/// # Errors
/// When it is no TCP socket.
pub fn tcp_health(socket: BorrowedFd<'_>) -> io::Result<TcpHealth> {
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: integers only, so zeros are a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most `length` bytes to `info`; both outlive the call, and the descriptor is borrowed.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TcpHealth {
        rtt: info.tcpi_rtt,
        segments: info.tcpi_data_segs_out,
        retransmitted: info.tcpi_total_retrans,
        lost: info.tcpi_lost,
    })
}
