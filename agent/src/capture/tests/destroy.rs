//! Connections between two pods, closed by their 4-tuple.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use heddle_common::{Attestation, Tuple};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, SockRef, Socket, Type};

use super::{
    node::{Node, UIDS, V4, V6, Wiring},
    world::{SOON, can_run, connect_in},
};
use crate::capture::{maps::key, netns::Netns, *};

const ANY4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const ANY6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// A port is taken once in a test: a process that another test starts holds a closed listener for a moment longer.
fn listen(netns: &Netns, at: SocketAddr, device: Option<&[u8]>) -> TcpListener {
    let domain = if at.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = netns.within(|| Socket::new(domain, Type::STREAM, None)).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind_device(device).unwrap();
    socket.bind(&at.into()).unwrap();
    socket.listen(2_048).unwrap();
    socket.into()
}

/// A connection of the first pod to the second.
struct Connection {
    client: TcpStream,
    app: TcpStream,
    cookie: u64,
}

impl Connection {
    fn open(client: &Netns, listener: &TcpListener, to: SocketAddr) -> Self {
        let client = connect_in(client, None, to).unwrap();
        let (app, _) = listener.accept().unwrap();
        app.set_read_timeout(Some(SOON)).unwrap();
        let cookie = SockRef::from(&client).cookie().unwrap();
        Self { client, app, cookie }
    }

    fn tuple(&self) -> Tuple {
        let (source, destination) = (self.client.local_addr().unwrap(), self.client.peer_addr().unwrap());
        Tuple {
            source: key(source.ip()),
            destination: key(destination.ip()),
            source_port: source.port(),
            destination_port: destination.port(),
            padding: 0,
        }
    }

    fn doomed(&self, [source, destination]: [u64; 2]) -> (Tuple, Attestation) {
        (self.tuple(), Attestation { source, destination, id: self.cookie, ..Attestation::by_agent(0) })
    }

    fn is_open(&mut self) -> bool {
        let mut byte = [0];
        self.client.write_all(b"?").is_ok() && self.app.read_exact(&mut byte).is_ok() && &byte == b"?"
    }

    /// What the client and the app see.
    fn errors(&mut self) -> [Option<i32>; 2] {
        let error = |stream: &mut TcpStream| stream.read(&mut [0]).err().and_then(|error| error.raw_os_error());
        [error(&mut self.client), error(&mut self.app)]
    }
}

/// The pods' workload ids; one that nobody has where a pod is not attached.
fn workloads(handle: &Handle) -> [u64; 2] {
    UIDS.map(|uid| handle.node().live(uid).map_or(0, |(_, live)| live.workload.0))
}

#[test]
fn connections_are_closed_at_both_ends_whatever_their_sockets_family_and_device() {
    if !can_run("connections_are_closed_at_both_ends_whatever_their_sockets_family_and_device") {
        return;
    }
    const ABORTED: Option<i32> = Some(libc::ECONNABORTED);
    const RESET: Option<i32> = Some(libc::ECONNRESET);
    let mapped = "::ffff:10.214.7.3".parse().unwrap();
    let cases = [
        ("IPv4", ANY4, V4[1], None),
        ("IPv6", ANY6, V6[1], None),
        ("an IPv6 socket's mapped address", ANY4, mapped, None),
        ("an app on [::] and an IPv4 client", ANY6, V4[1], None),
        ("both mapped", ANY6, mapped, None),
        ("an app bound to its device", ANY4, V4[1], Some(&b"eth0"[..])),
        ("an app bound to its device, mapped", ANY6, V4[1], Some(&b"eth0"[..])),
        ("an app bound to its device, IPv6", ANY6, V6[1], Some(&b"eth0"[..])),
    ];
    // Of what is closed, the kernel resets the other end: so each end is also closed while the other's pod is not known.
    for attached in [&[0, 1][..], &[0], &[1]] {
        let node = Node::new(Wiring::Routes);
        node.run(async {
            let (a, b) = (node.netns(0), node.netns(1));
            let mut connections = Vec::new();
            for (port, (what, at, to, device)) in (8_080..).zip(&cases) {
                let listener = listen(&b, SocketAddr::new(*at, port), *device);
                let mut connection = Connection::open(&a, &listener, SocketAddr::new(*to, port));
                assert!(connection.is_open(), "{what}");
                connections.push((what, connection));
            }
            let handle = node.start().await;
            let mut held = Vec::new();
            for pod in attached {
                held.push(handle.attach(node.spec(*pod)).await.unwrap());
            }
            let at = workloads(&handle);
            for (what, mut connection) in connections {
                let doomed = [connection.doomed(at)];
                assert!(connection.is_open(), "{what}: attaching closes nothing");
                assert_eq!(handle.lane().destroy(&doomed).await, 1, "{what}, attached: {attached:?}");
                let expected = match attached {
                    [1] => vec![[RESET, ABORTED]],
                    [0] => vec![[ABORTED, RESET]],
                    _ => vec![[ABORTED, RESET], [ABORTED, ABORTED]],
                };
                let errors = connection.errors();
                assert!(expected.contains(&errors), "{what}, attached: {attached:?}: {errors:?}");
                assert_eq!(handle.lane().destroy(&doomed).await, 0, "{what}: nothing is left");
            }
        });
    }
}

#[test]
fn a_listener_and_a_later_connection_of_the_same_tuple_are_left_alone() {
    if !can_run("a_listener_and_a_later_connection_of_the_same_tuple_are_left_alone") {
        return;
    }
    let node = Node::new(Wiring::Bridge);
    node.run(async {
        let (a, b) = (node.netns(0), node.netns(1));
        for (any, address, port) in [(ANY4, V4[1], 8_080), (ANY6, V6[1], 8_081)] {
            let listener = listen(&b, SocketAddr::new(any, port), None);
            let to = SocketAddr::new(address, port);
            let gone = Connection::open(&a, &listener, to);
            let mut ended = Connection::open(&a, &listener, to);
            let mut kept = Connection::open(&a, &listener, to);
            let handle = node.start().await;
            let _a = handle.attach(node.spec(0)).await.unwrap();
            let _b = handle.attach(node.spec(1)).await.unwrap();
            let at = workloads(&handle);

            // Neither end is there: the app's look-up finds the listener.
            let doomed = gone.doomed(at);
            for stream in [&gone.client, &gone.app] {
                SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop(gone);
            assert_eq!(handle.lane().destroy(&[doomed]).await, 0);
            // One that the client has ended and the app has not: TIME_WAIT is no connection.
            let doomed = ended.doomed(at);
            ended.client.shutdown(std::net::Shutdown::Both).unwrap();
            assert_eq!(ended.app.read(&mut [0]).unwrap(), 0);
            drop(ended);
            assert_eq!(handle.lane().destroy(&[doomed]).await, 0);
            // The source's socket is another than the one that was attested, so the app's end is another's too.
            let (tuple, attestation) = kept.doomed(at);
            let later = Attestation { id: kept.cookie + 1, ..attestation };
            assert_eq!(handle.lane().destroy(&[(tuple, later)]).await, 0);
            // And nobody has these workload ids.
            assert_eq!(handle.lane().destroy(&[kept.doomed([1, 2])]).await, 0);

            // The listener still listens: what it accepts comes from within the pod, which capture leaves alone.
            let mut own = Connection::open(&b, &listener, to);
            assert!(own.is_open());
            assert!(kept.is_open());
            handle.withdraw(UIDS[0]).await.unwrap();
            handle.withdraw(UIDS[1]).await.unwrap();
        }
    });
}

#[test]
fn a_thousand_connections_are_closed_at_once() {
    if !can_run("a_thousand_connections_are_closed_at_once") {
        return;
    }
    const CONNECTIONS: usize = 1_000;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let node = Node::new(Wiring::Routes);
    node.run(async {
        let (a, b) = (node.netns(0), node.netns(1));
        let mut took = Vec::new();
        // Promised are 50 ms of a machine that does nothing else; this one runs other tests, and an unoptimised build.
        for port in 8_080..8_083 {
            let listener = listen(&b, SocketAddr::new(ANY6, port), None);
            let open = |turn: usize| {
                let address = if turn.is_multiple_of(2) { V4[1] } else { V6[1] };
                Connection::open(&a, &listener, SocketAddr::new(address, port))
            };
            let mut connections: Vec<_> = (0..CONNECTIONS).map(open).collect();
            let handle = node.start().await;
            let _a = handle.attach(node.spec(0)).await.unwrap();
            let _b = handle.attach(node.spec(1)).await.unwrap();
            let at = workloads(&handle);
            let doomed: Vec<_> = connections.iter().map(|connection| connection.doomed(at)).collect();
            let started = Instant::now();
            assert_eq!(handle.lane().destroy(&doomed).await, CONNECTIONS);
            took.push(started.elapsed());
            for connection in &mut connections {
                assert!(connection.errors().iter().all(Option::is_some));
            }
            handle.withdraw(UIDS[0]).await.unwrap();
            handle.withdraw(UIDS[1]).await.unwrap();
        }
        println!("{CONNECTIONS} connections closed at both ends: {took:?}");
        assert!(took.iter().min().unwrap() < &Duration::from_millis(500), "{took:?}");
    });
}
