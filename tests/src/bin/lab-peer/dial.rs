//! How a client makes its socket: family, protocol and options before `connect()`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clap::Args;
use heddle_lab::sys;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

/// Options of every client.
#[derive(Debug, Clone, Args)]
pub struct Dial {
    #[arg(long)]
    pub to: SocketAddr,
    /// An IPv6 socket to `::ffff:a.b.c.d`.
    #[arg(long)]
    pub v4_mapped: bool,
    #[arg(long)]
    pub mptcp: bool,
    #[arg(long)]
    pub fastopen: bool,
    #[arg(long)]
    pub bind_port: Option<u16>,
    /// An address to connect from, which may be somebody else's.
    #[arg(long)]
    pub bind_address: Option<IpAddr>,
    #[arg(long)]
    pub bind_device: Option<String>,
    #[arg(long)]
    pub mark: Option<u32>,
    /// Another mark once `connect()` has returned: with Fast Open that is before the SYN leaves.
    #[arg(long)]
    pub mark_after: Option<u32>,
    /// Connect, and each wait for bytes (milliseconds).
    #[arg(long, default_value_t = 10_000)]
    pub patience: u64,
}

impl Dial {
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.patience)
    }

    /// The address that `connect()` is given.
    fn target(&self) -> SocketAddr {
        match self.to {
            SocketAddr::V4(to) if self.v4_mapped => (to.ip().to_ipv6_mapped(), to.port()).into(),
            to => to,
        }
    }

    /// A connected stream.
    pub async fn connect(&self) -> io::Result<TcpStream> {
        let target = self.target();
        let protocol = if self.mptcp { Protocol::MPTCP } else { Protocol::TCP };
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        if let Some(device) = &self.bind_device {
            socket.bind_device(Some(device.as_bytes()))?;
        }
        if let Some(address) = self.bind_address {
            if address.is_ipv4() {
                socket.set_freebind_v4(true)?;
                socket.set_ip_transparent_v4(true)?;
            } else {
                socket.set_freebind_v6(true)?;
                socket.set_ip_transparent_v6(true)?;
            }
        }
        if self.bind_port.is_some() || self.bind_address.is_some() {
            let any: IpAddr =
                if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            socket.set_reuse_address(true)?;
            let from = SocketAddr::new(self.bind_address.unwrap_or(any), self.bind_port.unwrap_or(0));
            socket.bind(&from.into())?;
        }
        if self.fastopen {
            sys::set_fastopen_connect(&socket)?;
        }
        if !self.mptcp {
            socket.set_tcp_nodelay(true)?;
        }
        let socket = TcpSocket::from_std_stream(socket.into());
        let connected = timeout(self.patience(), socket.connect(target)).await;
        let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        if let Some(mark) = self.mark_after {
            SockRef::from(&stream).set_mark(mark)?;
        }
        Ok(stream)
    }
}

/// A short stable name of what went wrong.
pub fn kind(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
            "reset".to_owned()
        }
        io::ErrorKind::PermissionDenied => "forbidden".to_owned(),
        io::ErrorKind::TimedOut => "timeout".to_owned(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable => "address".to_owned(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
        io::ErrorKind::UnexpectedEof => "closed".to_owned(),
        _ => error.to_string(),
    }
}
