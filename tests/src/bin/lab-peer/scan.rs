//! A scanner: ports that nobody serves, and SYNs of clients that don't exist.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    time::{Duration, Instant},
};

use heddle_lab::hostile::Scanned;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::task::JoinSet;

use crate::{
    dial::{Dial, kind},
    packet::Segment,
};

/// Connects to `count` ports from that of `dial` on, 64 at a time. What answers is closed at once.
pub async fn ports(dial: &Dial, count: u16) -> anyhow::Result<Scanned> {
    const AT_A_TIME: usize = 64;
    let mut report = Scanned::default();
    let (mut trying, mut ports) = (JoinSet::new(), (0..count).map(|number| dial.to.port().saturating_add(number)));
    loop {
        while trying.len() < AT_A_TIME {
            let Some(port) = ports.next() else { break };
            let mut dial = dial.clone();
            dial.to.set_port(port);
            trying.spawn(async move {
                let mut stream = dial.connect().await?;
                crate::one::ping(&mut stream, dial.patience()).await
            });
        }
        let Some(tried) = trying.join_next().await else { return Ok(report) };
        let how = tried?.map_or_else(|error| kind(&error), |()| "open".to_owned());
        *report.met.entry(how).or_default() += 1;
    }
}

/// `count` SYNs a second for `time` to `to`, each from another address and port of `sources` (a /24): no one there
/// answers the SYN-ACK. It needs CAP_NET_RAW.
pub fn syns(to: SocketAddrV4, sources: Ipv4Addr, rate: u64, time: Duration) -> anyhow::Result<Scanned> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let (start, mut sent, mut report) = (Instant::now(), 0_u32, Scanned::default());
    while start.elapsed() < time {
        let due = u64::try_from(start.elapsed().as_millis())? * rate / 1_000;
        while u64::from(sent) < due {
            sent += 1;
            let [a, b, c, _] = sources.octets();
            let source = Ipv4Addr::new(a, b, c, 100 + u8::try_from(sent % 150)?);
            let from = SocketAddrV4::new(source, 1_024 + u16::try_from(sent / 150 % 60_000)?);
            let packet = Segment { sequence: sent, ..Segment::SYN }.packet(from.into(), to.into());
            let how = match socket.send_to(&packet, &SocketAddr::V4(to).into()) {
                Ok(_) => "sent".to_owned(),
                // The queue of the device: a flood that is faster than it is lossy.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => "dropped".to_owned(),
                Err(error) => kind(&error),
            };
            *report.met.entry(how).or_default() += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(report)
}

/// Connections that end badly on purpose, `concurrent` at a time: reset at once, after bytes, or with bytes unread.
pub async fn aborts(dial: &Dial, count: u64, concurrent: u64) -> anyhow::Result<Scanned> {
    let mut report = Scanned::default();
    let (mut aborting, mut left) = (JoinSet::new(), 0..count);
    loop {
        while aborting.len() < usize::try_from(concurrent)? {
            let Some(number) = left.next() else { break };
            let dial = dial.clone();
            aborting.spawn(async move { abort(&dial, number).await });
        }
        let Some(aborted) = aborting.join_next().await else { return Ok(report) };
        let how = aborted?.map_or_else(|error| kind(&error), |()| "aborted".to_owned());
        *report.met.entry(how).or_default() += 1;
    }
}

async fn abort(dial: &Dial, number: u64) -> io::Result<()> {
    use tokio::io::AsyncWriteExt;
    let mut stream = dial.connect().await?;
    match number % 4 {
        0 => {}
        1 => stream.write_all(&[b'x'; 5_000]).await?,
        2 => crate::one::ping(&mut stream, dial.patience()).await?,
        _ => {
            // Half-closed, and gone before the echo is read: the kernel resets where bytes are unread.
            stream.write_all(&[b'x'; 5_000]).await?;
            stream.shutdown().await?;
            return Ok(());
        }
    }
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}
