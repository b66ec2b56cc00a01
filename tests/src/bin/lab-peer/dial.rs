//! How a client makes its socket: family, protocol and options before `connect()`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clap::Args;
use heddle_lab::sys;
use socket2::{Domain, Protocol, Socket, Type};
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
    #[arg(long)]
    pub bind_device: Option<String>,
    #[arg(long)]
    pub mark: Option<u32>,
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
        if let Some(port) = self.bind_port {
            let any: IpAddr =
                if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(any, port).into())?;
        }
        if self.fastopen {
            sys::set_fastopen_connect(&socket)?;
        }
        if !self.mptcp {
            socket.set_tcp_nodelay(true)?;
        }
        let socket = TcpSocket::from_std_stream(socket.into());
        timeout(self.patience(), socket.connect(target)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
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
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
        io::ErrorKind::UnexpectedEof => "closed".to_owned(),
        _ => error.to_string(),
    }
}
