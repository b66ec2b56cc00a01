//! One who sends as if it were somebody else: whole connections made by hand on a raw socket, their numbers guessed.

use std::{
    collections::HashSet,
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use clap::Args;
use heddle_lab::hostile::Scanned;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    dial::kind,
    packet::{ACK, PSH, RST, SYN, Segment},
};

/// How long answers are waited for after the last packet.
const LISTEN: Duration = Duration::from_millis(300);

#[derive(Debug, Args)]
pub struct Forge {
    #[arg(long)]
    to: SocketAddr,
    /// Whose address the packets carry.
    #[arg(long)]
    source: IpAddr,
    /// The first of `count` source ports.
    #[arg(long)]
    port: u16,
    #[arg(long)]
    count: u16,
    /// After each SYN, this many segments with data that acknowledge a guess.
    #[arg(long, default_value_t = 0)]
    guesses: u32,
}

/// Sends, and counts what came back to this pod: `sent`, `syn-ack`, `rst`, `other`.
pub fn run(forge: &Forge) -> anyhow::Result<Scanned> {
    let domain = Domain::for_address(forge.to);
    // It takes whole packets (raw(7)), and with IPv6 also (Linux 4.5).
    let sender = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    let listener = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
    listener.set_nonblocking(true)?;
    let mut report = Scanned::default();
    let ports: HashSet<u16> = (0..forge.count).map(|number| forge.port.saturating_add(number)).collect();
    // Where a raw socket sends to has no port (ip(7)).
    let target = SocketAddr::new(forge.to.ip(), 0);
    let mut send = |segment: &Segment<'_>, from: SocketAddr| {
        let how = match sender.send_to(&segment.packet(from, forge.to), &target.into()) {
            Ok(_) => "sent".to_owned(),
            Err(error) => kind(&error),
        };
        *report.met.entry(how).or_default() += 1;
    };
    for port in &ports {
        let from = SocketAddr::new(forge.source, *port);
        let sequence = u32::from(*port) << 8;
        send(&Segment { sequence, ..Segment::SYN }, from);
        for number in 0..forge.guesses {
            // Fibonacci hashing: spread over all there are.
            let acknowledgement = number.wrapping_mul(0x9e37_79b9).wrapping_add(u32::from(*port));
            let sequence = sequence.wrapping_add(1);
            send(&Segment { sequence, acknowledgement, flags: ACK | PSH, payload: b"forged" }, from);
        }
    }
    let end = Instant::now() + LISTEN;
    while Instant::now() < end {
        match answer(&listener, forge.to) {
            Ok(Some((port, flags))) if ports.contains(&port) => {
                let what = match flags & (SYN | ACK | RST) {
                    flags if flags & RST != 0 => "rst",
                    flags if flags == SYN | ACK => "syn-ack",
                    _ => "other",
                };
                *report.met.entry(what.to_owned()).or_default() += 1;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(report)
}

/// Port and flags of the next segment from that port; `None` for any other one.
fn answer(mut listener: &Socket, from: SocketAddr) -> io::Result<Option<(u16, u8)>> {
    let mut packet = [0; 2_048];
    let length = listener.read(&mut packet)?;
    // An IPv4 raw socket gives the header, too; an IPv6 one doesn't.
    let header = if from.is_ipv4() { 4 * usize::from(packet[0] & 15) } else { 0 };
    let tcp = packet.get(header..length).unwrap_or_default();
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    Ok(port(2).zip(tcp.get(13).copied()).filter(|_| port(0) == Some(from.port())))
}
