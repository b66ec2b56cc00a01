//! Packets on the link between the nodes: recorded by tcpdump, put together into TCP streams, searched.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    node::{LINK, Node},
    process::{Place, Process},
    state::Claim,
    wait::until,
};

/// A recording that runs.
#[derive(Debug)]
pub struct Recording {
    process: Process,
    file: PathBuf,
}

/// One direction of one TCP connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

/// What was on the link.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    pub packets: usize,
    pub streams: Vec<Stream>,
}

impl Recording {
    pub fn start(node: &Node, claim: &Claim) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        // Names of its own: what an earlier recording said of itself is not said of this one.
        let name = format!("recording-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let file = claim.dir.join(format!("{name}.pcap"));
        let path = file.to_str().context("path is not UTF-8")?;
        let place = Place {
            netns: Some(node.netns.path()),
            cgroup: Some(claim.cgroup.clone()),
            logs: claim.dir.join("logs"),
            files: None,
        };
        // Whole packets, a kernel buffer of 64 MiB, written packet by packet, and no dropping to another user, who could
        // not write into the lab's folder.
        let args = ["-i", LINK, "-w", path, "-s", "0", "-B", "65536", "-U", "--immediate-mode", "-Z", "root", "-n"];
        let process = Process::start(&place, &name, "tcpdump", &args)?;
        until(Duration::from_secs(10), "tcpdump listening", || process.stderr().contains("listening on").then_some(()))
            .with_context(|| process.stderr())?;
        Ok(Self { process, file })
    }

    /// Ends it. A recording that lost packets proves nothing and is an error.
    pub fn finish(self) -> Result<Traffic> {
        let output = self.process.terminate(Duration::from_secs(10))?;
        ensure!(output.stderr.contains("0 packets dropped by kernel"), "packets were lost: {}", output.stderr);
        Traffic::parse(&fs::read(&self.file)?)
    }
}

impl Traffic {
    /// Reads a pcap file as tcpdump writes it (little endian, Ethernet).
    pub fn parse(file: &[u8]) -> Result<Self> {
        ensure!(le32(file, 0) == Some(0xa1b2_c3d4) && le32(file, 20) == Some(1), "not a pcap file of Ethernet packets");
        let mut traffic = Self::default();
        let mut segments: BTreeMap<(SocketAddr, SocketAddr), Vec<Piece<'_>>> = BTreeMap::new();
        let mut at = 24;
        while let Some(length) = le32(file, at + 8) {
            let length = usize::try_from(length)?;
            let packet = file.get(at + 16..at + 16 + length).context("the recording ends inside a packet")?;
            at += 16 + length;
            traffic.packets += 1;
            if let Some((from, to, sequence, syn, payload)) = tcp(packet) {
                segments.entry((from, to)).or_default().push((sequence, syn, payload));
            }
        }
        for ((from, to), segments) in segments {
            traffic.streams.push(Stream { from, to, bytes: assemble(&segments) });
        }
        Ok(traffic)
    }

    /// Streams in which these bytes appear.
    pub fn holding<'a>(&'a self, needle: &'a [u8]) -> impl Iterator<Item = &'a Stream> + 'a {
        self.streams.iter().filter(move |stream| find(&stream.bytes, needle).is_some())
    }

    /// Streams to this port.
    pub fn to_port(&self, port: u16) -> impl Iterator<Item = &Stream> {
        self.streams.iter().filter(move |stream| stream.to.port() == port)
    }
}

impl Stream {
    /// Whether this is the server's side of a TLS 1.3 connection: a ServerHello whose supported_versions names 0x0304
    /// (RFC 8446, 4.2.1).
    #[must_use]
    pub fn is_tls13_server(&self) -> bool {
        let hello = self.bytes.get(..self.bytes.len().min(512)).unwrap_or_default();
        hello.starts_with(&[22, 3, 3]) && hello.get(5) == Some(&2) && find(hello, &[0, 0x2b, 0, 2, 3, 4]).is_some()
    }

    /// Number of application-data records, where the whole stream is TLS records; `None` where it is anything else.
    #[must_use]
    pub fn tls_application_records(&self) -> Option<usize> {
        let (mut rest, mut count) = (self.bytes.as_slice(), 0);
        while let Some(head) = rest.get(..5) {
            let known = (20..=23).contains(&head[0]) && head[1] == 3;
            let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
            if !known || length > (1 << 14) + 256 {
                return None;
            }
            count += usize::from(head[0] == 23);
            // The last record may be cut by the end of the recording.
            rest = rest.get(5 + length..).unwrap_or_default();
        }
        (count > 0).then_some(count)
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Sequence number, SYN and payload of a segment.
type Piece<'a> = (u32, bool, &'a [u8]);
/// Both addresses, and a [`Piece`].
type Segment<'a> = (SocketAddr, SocketAddr, u32, bool, &'a [u8]);

/// Addresses, sequence number, SYN and payload of an Ethernet frame with TCP over IPv4 or IPv6 in it.
fn tcp(frame: &[u8]) -> Option<Segment<'_>> {
    let (from, to, segment): (IpAddr, IpAddr, &[u8]) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let packet = frame.get(14..)?;
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            // Length 0 stands for a segment larger than 64 KiB that the sender's offload would have cut.
            let packet = if total == 0 { packet } else { packet.get(..total)? };
            let header = usize::from(packet.first()? & 15) * 4;
            if packet.get(9) != Some(&6) {
                return None;
            }
            let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (address(12)?, address(16)?, packet.get(header..)?)
        }
        [0x86, 0xdd] => {
            let packet = frame.get(14..)?;
            if packet.get(6) != Some(&6) {
                return None;
            }
            let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            let payload = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
            let end = if payload == 0 { packet.len() } else { 40 + payload };
            (address(8)?, address(24)?, packet.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(segment.get(at..at + 2)?.try_into().ok()?));
    let sequence = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
    let header = usize::from(segment.get(12)? >> 4) * 4;
    let syn = segment.get(13)? & 2 != 0;
    Some(((from, port(0)?).into(), (to, port(2)?).into(), sequence, syn, segment.get(header..)?))
}

/// Payload in order of sequence numbers, retransmissions once. A port pair that was used twice gives both, one after the
/// other.
fn assemble(segments: &[Piece<'_>]) -> Vec<u8> {
    let mut whole = Vec::new();
    let starts: Vec<usize> = segments.iter().enumerate().filter(|(_, (_, syn, _))| *syn).map(|(at, _)| at).collect();
    let mut bounds = vec![0];
    bounds.extend(starts.into_iter().filter(|at| *at > 0));
    bounds.push(segments.len());
    for bound in bounds.windows(2) {
        let part = &segments[bound[0]..bound[1]];
        let Some((first, syn, _)) = part.first() else { continue };
        let base = first.wrapping_add(u32::from(*syn));
        let mut pieces: Vec<(u32, &[u8])> = part
            .iter()
            .filter(|(_, _, payload)| !payload.is_empty())
            .map(|(sequence, syn, payload)| (sequence.wrapping_add(u32::from(*syn)).wrapping_sub(base), *payload))
            // Behind the base: keep-alive probes and what was sent before the recording began.
            .filter(|(offset, _)| *offset < 1 << 31)
            .collect();
        pieces.sort_by_key(|(offset, _)| *offset);
        let mut next = 0_u64;
        for (offset, payload) in pieces {
            let offset = u64::from(offset);
            let fresh = usize::try_from(next.saturating_sub(offset)).unwrap_or(usize::MAX);
            if let Some(fresh) = payload.get(fresh..) {
                whole.extend_from_slice(fresh);
                next = next.max(offset + payload.len() as u64);
            }
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::{Stream, assemble};

    #[test]
    fn segments_are_joined_in_order_and_once() {
        let segments: [(u32, bool, &[u8]); 5] =
            [(u32::MAX, true, b""), (3, false, b"dle"), (0, false, b"hed"), (0, false, b"hed"), (2, false, b"ddle!")];
        assert_eq!(assemble(&segments), b"heddle!"[..6].iter().copied().chain(*b"!").collect::<Vec<u8>>());
    }

    #[test]
    fn a_reused_port_pair_keeps_both_connections() {
        let segments: [(u32, bool, &[u8]); 4] =
            [(9, true, b""), (10, false, b"one"), (4, true, b""), (5, false, b"two")];
        assert_eq!(assemble(&segments), b"onetwo");
    }

    #[test]
    fn plain_text_is_no_tls() {
        let address = ([10, 0, 0, 1], 80).into();
        let mut stream = Stream { from: address, to: address, bytes: b"GET / HTTP/1.1\r\n".to_vec() };
        assert_eq!(stream.tls_application_records(), None);
        stream.bytes = vec![22, 3, 3, 0, 1, 0, 23, 3, 3, 0, 2, 9, 9];
        assert_eq!(stream.tls_application_records(), Some(1));
    }
}
