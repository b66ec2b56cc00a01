//! Closes connections of the kernel lane at both ends, because policy no longer allows them.
//!
//! The last stop of a connection that the agent never carried: its ends are sockets of apps, in the netns of two pods, which
//! the kernel closes by `SOCK_DESTROY` (the app sees ECONNABORTED, the other side a reset). The kernel's look-up falls back to a
//! listener where the connection is gone, and would close that. So each end is looked up first, and what is closed is the
//! socket that was found, by its cookie: never a listener, and never a later connection of the same 4-tuple.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use heddle_common::{Address, Attestation, Tuple};
use netlink_packet_sock_diag::{
    IPPROTO_TCP, SockDiagDestroy, SockDiagMessage, TCP_CLOSE, TCP_LISTEN, TCP_TIME_WAIT,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use nix::{ifaddrs::getifaddrs, net::if_::if_nametoindex};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkMessage, NetlinkPayload,
        NetlinkSerializable,
    },
    sys::{Socket, SocketAddr as NetlinkAddress, protocols::NETLINK_SOCK_DIAG},
};
use socket2::SockRef;

use super::{
    enrol::blocking,
    netns::Netns,
    pod::{Live, Node},
};
use crate::life::limits;

/// A cookie that matches any socket (`INET_DIAG_NOCOOKIE`).
const ANY: [u8; 8] = [0xff; 8];

/// One end of a connection, as its own socket has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Canonical: the kernel finds an IPv6 socket with mapped addresses by its IPv4 addresses.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// Of the socket, where it is known.
    pub cookie: Option<u64>,
}

impl End {
    /// The ends of a connection: the client's, and the app's.
    #[must_use]
    pub fn both(tuple: &Tuple, attestation: &Attestation) -> [Self; 2] {
        let source = SocketAddr::new(address(tuple.source), tuple.source_port);
        let destination = SocketAddr::new(address(tuple.destination), tuple.destination_port);
        let cookie = Some(attestation.id).filter(|id| *id != 0);
        [Self { local: source, remote: destination, cookie }, Self { local: destination, remote: source, cookie: None }]
    }
}

fn address(key: Address) -> IpAddr {
    IpAddr::from(key.octets).to_canonical()
}

/// Closes these connections of pods of this node. Gives how many were open at either end and are closed now; one that has
/// ended meanwhile is none.
pub async fn destroy(node: &Arc<Node>, doomed: &[(Tuple, Attestation)]) -> usize {
    let (node, doomed) = (Arc::clone(node), doomed.to_vec());
    let closed = blocking(move || {
        let [clients, apps] = places(&node, &doomed);
        let mut fates = vec![Fate::Ended; doomed.len()];
        // A client's reset takes most of the apps' ends with it.
        for mut place in clients.into_iter().chain(apps) {
            place.ends.retain(|(number, _)| fates[*number] != Fate::Later);
            for (number, fate) in close(&place) {
                if fate != Fate::Ended {
                    fates[number] = fate;
                }
            }
        }
        Ok(fates.into_iter().filter(|fate| *fate == Fate::Closed).count())
    });
    // Fails only where the runtime shuts down.
    closed.await.unwrap_or_default()
}

/// What became of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Closed,
    /// It was closed already.
    Ended,
    /// Its 4-tuple is another connection's by now.
    Later,
}

/// Ends in one netns, each with the number of its connection.
struct Place {
    netns: Arc<Netns>,
    ends: Vec<(usize, End)>,
}

/// Which netns the clients' ends are in, and the apps'.
fn places(node: &Node, doomed: &[(Tuple, Attestation)]) -> [Vec<Place>; 2] {
    let pods: Vec<Arc<Live>> = node.pods().iter().filter_map(|pod| pod.live()).collect();
    let (mut clients, mut apps) = (BTreeMap::new(), BTreeMap::new());
    let put = |places: &mut BTreeMap<u64, Place>, live: Option<&Arc<Live>>, index, end| {
        let Some(netns) = live.map(|live| &live.netns) else { return };
        let place = || Place { netns: Arc::clone(netns), ends: Vec::new() };
        places.entry(netns.inode()).or_insert_with(place).ends.push((index, end));
    };
    for (index, (tuple, attestation)) in doomed.iter().enumerate() {
        let [client, app] = End::both(tuple, attestation);
        let of = |id: u64| pods.iter().find(move |live| live.workload.0 == id);
        put(&mut clients, of(attestation.source), index, client);
        put(&mut apps, of(attestation.destination), index, app);
    }
    [clients, apps].map(|places| places.into_values().collect())
}

/// Closes what is still open of these ends. Gives what became of each that it could ask about. Blocks, for some
/// microseconds an end.
fn close(place: &Place) -> Vec<(usize, Fate)> {
    /// It does not change while the kernel runs.
    static UNABLE: AtomicBool = AtomicBool::new(false);
    let (numbers, ends): (Vec<usize>, Vec<End>) = place.ends.iter().copied().unzip();
    match Diag::open(&place.netns).and_then(|diag| diag.close(&ends)) {
        Ok(fates) => numbers.into_iter().zip(fates).collect(),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            if !UNABLE.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    "this kernel can't close connections (CONFIG_INET_DIAG_DESTROY): those of the kernel lane outlive the \
                     policy that allowed them"
                );
            }
            Vec::new()
        }
        Err(error) => {
            tracing::warn!(%error, netns = place.netns.inode(), ends = ends.len(), "connections could not be closed");
            Vec::new()
        }
    }
}

/// A `sock_diag` socket that was made inside a netns, and so speaks of its sockets.
pub struct Diag {
    socket: Socket,
    /// A connection may be bound to the device of its address, and is then found by it alone; others are found by it too.
    devices: Vec<(IpAddr, u32)>,
}

impl Diag {
    pub fn open(netns: &Netns) -> io::Result<Self> {
        let (mut socket, devices) = netns.within(|| Ok((Socket::new(NETLINK_SOCK_DIAG)?, devices()?)))?;
        SockRef::from(&socket).set_read_timeout(Some(limits::SOCK_DIAG))?;
        socket.bind_auto()?;
        Ok(Self { socket, devices })
    }

    /// Every TCP connection of the netns, as its sockets here have it, with their cookies.
    pub fn open_connections(&self) -> io::Result<Vec<End>> {
        const OPEN: StateFlags = StateFlags::ESTABLISHED
            .union(StateFlags::SYN_SENT)
            .union(StateFlags::FIN_WAIT1)
            .union(StateFlags::FIN_WAIT2)
            .union(StateFlags::CLOSE_WAIT)
            .union(StateFlags::LAST_ACK)
            .union(StateFlags::CLOSING);
        let mut found = Vec::new();
        for (family, unspecified) in
            [(libc::AF_INET, IpAddr::V4(Ipv4Addr::UNSPECIFIED)), (libc::AF_INET6, IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
        {
            let any = SocketId {
                source_port: 0,
                destination_port: 0,
                source_address: unspecified,
                destination_address: unspecified,
                interface_id: 0,
                cookie: ANY,
            };
            let request = InetRequest {
                family: family as u8,
                protocol: IPPROTO_TCP,
                extensions: ExtensionFlags::empty(),
                states: OPEN,
                socket_id: any,
            };
            self.dump(request, |header| {
                let id = &header.socket_id;
                let at = |address: IpAddr, port| SocketAddr::new(address.to_canonical(), port);
                found.push(End {
                    local: at(id.source_address, id.source_port),
                    remote: at(id.destination_address, id.destination_port),
                    cookie: Some(cookie(id.cookie)),
                });
            })?;
        }
        Ok(found)
    }

    /// Gives every answer to a request for many.
    fn dump(&self, request: InetRequest, mut answered: impl FnMut(&InetResponseHeader)) -> io::Result<()> {
        let mut message = NetlinkMessage::from(SockDiagMessage::InetRequest(request));
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        message.finalize();
        let mut sent = vec![0; message.buffer_len()];
        message.serialize(&mut sent);
        self.socket.send_to(&sent, &NetlinkAddress::new(0, 0), 0)?;
        let mut received = Vec::with_capacity(limits::SOCK_DIAG_DUMP);
        loop {
            received.clear();
            self.socket.recv(&mut received, 0)?;
            let mut rest = received.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
                match &message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => answered(&response.header),
                    _ => {}
                }
                // Messages begin at multiples of 4 bytes; one without a length would never end.
                let length = (message.header.length as usize).max(1).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }

    /// Closes these ends; gives how many were open.
    pub fn closed(&self, ends: &[End]) -> io::Result<usize> {
        Ok(self.close(ends)?.into_iter().filter(|fate| *fate == Fate::Closed).count())
    }

    /// What becomes of each end.
    fn close(&self, ends: &[End]) -> io::Result<Vec<Fate>> {
        let mut fates = vec![Fate::Ended; ends.len()];
        let asked: Vec<_> = ends.iter().map(|end| SockDiagMessage::InetRequest(self.request(end))).collect();
        let mut found = Vec::new();
        self.exchange(&asked, NLM_F_REQUEST, |index, answer| {
            if let Ok(Some(SockDiagMessage::InetResponse(response))) = answer {
                match seen(&ends[index], &response.header) {
                    Seen::Open(cookie) => found.push((index, cookie)),
                    Seen::Later => fates[index] = Fate::Later,
                    Seen::Nothing => {}
                }
            }
            Ok(())
        })?;
        let requests = found.iter().map(|(index, cookie)| {
            let mut request = self.request(&ends[*index]);
            request.socket_id.cookie = *cookie;
            SockDiagDestroy::new(SockDiagMessage::InetRequest(request))
        });
        let mut refused = Vec::new();
        self.exchange(&requests.collect::<Vec<_>>(), NLM_F_REQUEST | NLM_F_ACK, |index, answer| {
            match answer {
                Ok(_) => fates[found[index].0] = Fate::Closed,
                // It has ended by itself.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                // Before Linux 6.0 one that has just come to wait in TIME_WAIT can't be closed: no reason to leave the others.
                Err(error) => refused.push(error),
            }
            Ok(())
        })?;
        let all = refused.len() == found.len();
        match refused.pop() {
            Some(error) if all => Err(error),
            Some(error) => {
                tracing::warn!(%error, more = refused.len(), "a connection could not be closed");
                Ok(fates)
            }
            None => Ok(fates),
        }
    }

    fn request(&self, end: &End) -> InetRequest {
        let own = end.local.ip();
        InetRequest {
            family: if own.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 },
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: SocketId {
                source_port: end.local.port(),
                destination_port: end.remote.port(),
                source_address: own,
                destination_address: end.remote.ip(),
                interface_id: self.devices.iter().find(|(address, _)| *address == own).map_or(0, |(_, index)| *index),
                cookie: ANY,
            },
        }
    }

    /// Sends requests, many at a time, and gives each one's answer with its index: a message, an acknowledgement (`None`) or an
    /// error. The kernel has answered when the call that sends them returns.
    fn exchange<M>(
        &self,
        requests: &[M],
        flags: u16,
        mut answered: impl FnMut(usize, io::Result<Option<M>>) -> io::Result<()>,
    ) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone + Into<NetlinkPayload<M>>,
    {
        let kernel = NetlinkAddress::new(0, 0);
        let mut received = Vec::with_capacity(limits::SOCK_DIAG_ANSWER);
        for (round, batch) in requests.chunks(limits::SOCK_DIAG_BATCH).enumerate() {
            let first = round * limits::SOCK_DIAG_BATCH;
            let mut sent = Vec::new();
            for (index, request) in (first..).zip(batch) {
                let mut message = NetlinkMessage::from(request.clone());
                message.header.flags = flags;
                message.header.sequence_number = u32::try_from(index).map_err(io::Error::other)?;
                message.finalize();
                let start = sent.len();
                sent.resize(start + message.buffer_len(), 0);
                message.serialize(&mut sent[start..]);
            }
            self.socket.send_to(&sent, &kernel, 0)?;
            let mut missing = batch.len();
            while missing > 0 {
                received.clear();
                self.socket.recv(&mut received, 0)?;
                let message = NetlinkMessage::<M>::deserialize(&received).map_err(io::Error::other)?;
                let index = message.header.sequence_number as usize;
                if !(first..first + batch.len()).contains(&index) {
                    continue;
                }
                missing -= 1;
                match message.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => answered(index, Ok(None))?,
                    NetlinkPayload::Error(error) => answered(index, Err(error.to_io()))?,
                    NetlinkPayload::InnerMessage(inner) => answered(index, Ok(Some(inner)))?,
                    _ => answered(index, Err(io::ErrorKind::InvalidData.into()))?,
                }
            }
        }
        Ok(())
    }
}

/// The addresses of the calling thread's netns, each with its device.
fn devices() -> io::Result<Vec<(IpAddr, u32)>> {
    let mut devices = Vec::new();
    for interface in getifaddrs()? {
        let Some(address) = interface.address else { continue };
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let v6 = address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
        if let Some(address) = v4.or(v6) {
            devices.push((address, if_nametoindex(interface.interface_name.as_str())?));
        }
    }
    Ok(devices)
}

/// What a look-up for an end has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// The end, by its cookie.
    Open([u8; 8]),
    /// An open connection of its 4-tuple that is not its own.
    Later,
    /// Nothing that is open; a listener, which is found where nothing else is.
    Nothing,
}

fn seen(end: &End, found: &InetResponseHeader) -> Seen {
    let id = &found.socket_id;
    let at = |address: IpAddr, port| SocketAddr::new(address.to_canonical(), port);
    let same = at(id.source_address, id.source_port) == end.local
        && at(id.destination_address, id.destination_port) == end.remote;
    if !same || [TCP_LISTEN, TCP_TIME_WAIT, TCP_CLOSE].contains(&found.state) {
        return Seen::Nothing;
    }
    match end.cookie {
        Some(cookie) if id.cookie != words(cookie) => Seen::Later,
        _ => Seen::Open(id.cookie),
    }
}

/// A cookie as `sock_diag` has it: two words, the lower first.
fn words(cookie: u64) -> [u8; 8] {
    let mut words = [0; 8];
    words[..4].copy_from_slice(&(cookie as u32).to_ne_bytes());
    words[4..].copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    words
}

/// The other way.
fn cookie(words: [u8; 8]) -> u64 {
    let [a, b, c, d, e, f, g, h] = words;
    u64::from(u32::from_ne_bytes([e, f, g, h])) << 32 | u64::from(u32::from_ne_bytes([a, b, c, d]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_two_words_and_comes_back() {
        for number in [0, 1, 1 << 32, u64::MAX, 0x0102_0304_0506_0708] {
            assert_eq!(cookie(words(number)), number);
        }
    }

    fn found(state: u8, remote: &str, cookie: u64) -> InetResponseHeader {
        let (local, remote): (SocketAddr, SocketAddr) =
            ("[::ffff:10.0.0.2]:80".parse().unwrap(), remote.parse().unwrap());
        let socket_id = SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local.ip(),
            destination_address: remote.ip(),
            interface_id: 0,
            cookie: words(cookie),
        };
        InetResponseHeader {
            family: libc::AF_INET6 as u8,
            state,
            timer: None,
            socket_id,
            recv_queue: 0,
            send_queue: 0,
            uid: 0,
            inode: 0,
        }
    }

    #[test]
    fn what_is_closed_is_that_end_and_never_a_listener() {
        const ESTABLISHED: u8 = 1;
        let cookie = 0x0102_0304_0506_0708;
        let any = End { local: "10.0.0.2:80".parse().unwrap(), remote: "10.0.0.1:4000".parse().unwrap(), cookie: None };
        let known = End { cookie: Some(cookie), ..any };
        let mapped = "[::ffff:10.0.0.1]:4000";
        let own = Seen::Open(words(cookie));
        assert_eq!(seen(&any, &found(ESTABLISHED, mapped, cookie)), own);
        assert_eq!(seen(&known, &found(ESTABLISHED, mapped, cookie)), own);
        assert_eq!(seen(&known, &found(ESTABLISHED, mapped, cookie + (1 << 32))), Seen::Later);
        assert_eq!(seen(&any, &found(ESTABLISHED, "10.0.0.1:4001", cookie)), Seen::Nothing);
        assert_eq!(seen(&any, &found(ESTABLISHED, "[::]:0", cookie)), Seen::Nothing);
        for state in [TCP_LISTEN, TCP_TIME_WAIT, TCP_CLOSE] {
            assert_eq!(seen(&any, &found(state, mapped, cookie)), Seen::Nothing, "{state}");
        }
    }

    #[test]
    fn the_ends_of_a_connection_are_each_others_mirror() {
        let tuple = Tuple {
            source: Address::v4([10, 0, 0, 1]),
            destination: Address::v4([10, 0, 0, 2]),
            source_port: 4_000,
            destination_port: 80,
            padding: 0,
        };
        let attestation = Attestation { id: 7, ..Attestation::by_agent(0) };
        let [client, app] = End::both(&tuple, &attestation);
        let (from, to) = ("10.0.0.1:4000".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        assert_eq!(client, End { local: from, remote: to, cookie: Some(7) });
        assert_eq!(app, End { local: to, remote: from, cookie: None });
    }
}
