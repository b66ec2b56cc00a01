//! Capture against the running kernel: a pod, its neighbour and the agent, each test with a netns pair, a cgroup and a bpffs folder
//! of its own. Needs root; without it each test prints that it was skipped.

use std::{
    collections::HashSet,
    env, fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use super::{
    netns::{Home, Netns},
    *,
};
use crate::cluster::{Place, Unattended};

const POD4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 213, 7, 2));
const POD6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd0c, 0x6865, 0, 0, 0, 0, 0, 2));
const OUT4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 213, 7, 1));
const OUT6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd0c, 0x6865, 0, 0, 0, 0, 0, 1));
/// Mesh addresses that nothing routes.
const SERVICE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));
const SERVICE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd0c, 0x96, 0, 0, 0, 0, 0, 0x10));
const FROM_AGENT: &[u8; 16] = b"from the agent!!";
const FROM_APP: &[u8; 16] = b"from the app!!!!";
const SOON: Duration = Duration::from_secs(5);

/// Whether the test can run; says so if not.
fn can_run(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED (needs root): {test}");
    }
    root
}

/// A pod's netns and cgroup, a neighbour's netns, and a bpffs folder; gone with this value.
struct World {
    name: String,
    cgroup: PathBuf,
    bpffs: PathBuf,
    scripts: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("hc-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mut mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mount.find(|fields| fields[2] == "cgroup2").expect("a cgroup2 mount")[1].to_owned();
        let world = Self {
            cgroup: Path::new(&root).join(&name),
            bpffs: Path::new("/sys/fs/bpf").join(&name),
            scripts: tempfile::tempdir().unwrap(),
            name,
        };
        fs::create_dir(&world.cgroup).unwrap();
        let (pod, out) = (world.pod_ns(), world.out_ns());
        // The neighbour's end of the link is made in place, so that names never meet in the host's netns.
        ip(&format!("netns add {pod}"));
        ip(&format!("netns add {out}"));
        ip(&format!("-n {pod} link add eth0 type veth peer name eth0 netns {out}"));
        for (ns, v4, v6) in [(&pod, POD4, POD6), (&out, OUT4, OUT6)] {
            ip(&format!("-n {ns} link set lo up"));
            ip(&format!("-n {ns} addr add {v4}/24 dev eth0"));
            ip(&format!("-n {ns} addr add {v6}/64 dev eth0 nodad"));
            ip(&format!("-n {ns} link set eth0 up"));
        }
        ip(&format!("-n {pod} route add default via {OUT4}"));
        ip(&format!("-n {pod} -6 route add default via {OUT6}"));
        world
    }

    fn pod_ns(&self) -> String {
        format!("{}-pod", self.name)
    }

    fn out_ns(&self) -> String {
        format!("{}-out", self.name)
    }

    fn netns(name: &str) -> Netns {
        Netns::open(&Path::new("/var/run/netns").join(name), &Home::here().unwrap()).unwrap()
    }

    fn pod(&self) -> Netns {
        Self::netns(&self.pod_ns())
    }

    fn out(&self) -> Netns {
        Self::netns(&self.out_ns())
    }

    fn spec(&self) -> PodSpec {
        PodSpec {
            // Worst case of a manifest without a uid.
            uid: "default/web.1".into(),
            name: "default/web.1".into(),
            addresses: vec![POD4, POD6],
            place: Place { netns: Path::new("/var/run/netns").join(self.pod_ns()), cgroup: self.cgroup.clone() },
            when_unattended: Unattended::Closed,
        }
    }

    fn config(&self) -> CaptureConfig {
        // Stands for `heddle probe`: this test program, run for one test.
        let script = self.scripts.path().join("probe");
        let test = format!("{}::the_pods_process", module_path!().split_once("::").unwrap().1);
        let this = env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nHC_NETNS=$2 HC_CGROUP=$4 HC_TO=$6 exec '{}' --exact {test} --nocapture\n",
            this.display()
        );
        if !script.exists() {
            fs::write(&script, text).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        }
        CaptureConfig {
            bpffs: self.bpffs.clone(),
            probe: ProbeCommand { program: "/bin/sh".into(), arguments: vec![script.into()] },
        }
    }

    async fn start(&self) -> Handle {
        Handle::start(self.config()).await.unwrap()
    }

    /// A process of the pod, in its cgroup and netns, connects and reads 16 bytes.
    async fn pod_connects(&self, to: SocketAddr) -> Result<[u8; 16], String> {
        let probe = self.config().probe;
        let output = tokio::process::Command::new(probe.program)
            .args(probe.arguments)
            .arg("--netns")
            .arg(Path::new("/var/run/netns").join(self.pod_ns()))
            .arg("--cgroup")
            .arg(&self.cgroup)
            .arg("--to")
            .arg(to.to_string())
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = said.lines().map(str::trim).find(|line| line.len() == 32 && u128::from_str_radix(line, 16).is_ok());
        match line {
            Some(line) => Ok(u128::from_str_radix(line, 16).unwrap().to_be_bytes()),
            None => Err(said + &String::from_utf8_lossy(&output.stderr)),
        }
    }

    fn ids(&self) -> Vec<u32> {
        let folder = super::pin::Pins::open(&self.bpffs).unwrap().pod("default/web.1");
        let read = |(name, _): &(&str, super::kernel::Hook)| {
            let link = super::kernel::open_pin(&folder.join(name)).unwrap();
            super::kernel::link_info(&link).unwrap().program
        };
        super::load::PROGRAMS.iter().map(read).collect()
    }

    fn rules_and_routes(&self) -> String {
        let ns = self.pod_ns();
        let table = heddle_common::ROUTE_TABLE;
        let mut all = String::new();
        for family in ["-4", "-6"] {
            let rules = ip(&format!("-n {ns} {family} rule show"));
            all.extend(rules.lines().filter(|line| line.starts_with(&format!("{}:", heddle_common::RULE_PREFERENCE))));
            // A table that never held a route does not exist.
            let routes = Command::new("ip")
                .args(["-n", &ns, family, "route", "show", "table", &table.to_string()])
                .output()
                .unwrap();
            all.push_str(&String::from_utf8_lossy(&routes.stdout));
        }
        all
    }

    /// The switches that are off.
    fn off(&self) -> usize {
        super::sysctl::off(&self.pod()).unwrap().len()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for ns in [self.pod_ns(), self.out_ns()] {
            let _gone = Command::new("ip").args(["netns", "del", &ns]).output();
        }
        let _gone = fs::remove_dir_all(&self.bpffs);
        let _gone = fs::remove_dir(self.cgroup.join("heddle-probe"));
        // A process that has just ended keeps it busy for a moment.
        for _ in 0..50 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A blocking connection whose socket belongs to `netns`.
fn connect_in(netns: &Netns, from: Option<SocketAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = netns.within(|| Socket::new(domain, Type::STREAM, None))?;
    if let Some(from) = from {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

fn greeting(stream: &mut TcpStream) -> io::Result<[u8; 16]> {
    let mut greeting = [0; 16];
    stream.read_exact(&mut greeting)?;
    Ok(greeting)
}

/// An app in `netns` that greets, then echoes; tells its clients' addresses. Ends when the receiver goes and one more comes.
fn app(netns: &Netns, at: SocketAddr) -> std::sync::mpsc::Receiver<SocketAddr> {
    let domain = if at.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = netns.within(|| Socket::new(domain, Type::STREAM, None)).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&at.into()).unwrap();
    socket.listen(1_024).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for stream in TcpListener::from(socket).incoming() {
            let Ok(mut stream) = stream else { return };
            if sender.send(stream.peer_addr().unwrap()).is_err() {
                return;
            }
            thread::spawn(move || -> io::Result<()> {
                stream.write_all(FROM_APP)?;
                let mut reader = stream.try_clone()?;
                io::copy(&mut reader, &mut stream).map(drop)
            });
        }
    });
    receiver
}

/// Serves a pod as the tunnel would: answers probes, greets the rest and tells original destination and client.
fn serve(attached: Attached) -> (mpsc::UnboundedReceiver<(SocketAddr, SocketAddr)>, tokio::task::JoinHandle<()>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let Attached { listener, token } = attached;
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, peer) = listener.accept().await.unwrap();
            let to = stream.local_addr().unwrap();
            if Handle::is_probe(to, peer) {
                let _told = stream.write_all(&token.0).await;
                continue;
            }
            let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            let _told = sender.send((canonical(to), canonical(peer)));
            tokio::spawn(async move {
                let _told = stream.write_all(FROM_AGENT).await;
                let _ended = stream.read(&mut [0]).await;
            });
        }
    });
    (receiver, task)
}

async fn next<T>(receiver: &mut mpsc::UnboundedReceiver<T>) -> T {
    timeout(SOON, receiver.recv()).await.expect("nothing came").unwrap()
}

/// Runs blocking test code beside the runtime.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// Not a test by itself: the body of processes that tests start in a pod.
#[test]
fn the_pods_process() {
    let Ok(to) = env::var("HC_TO") else { return };
    let (netns, cgroup) = (env::var("HC_NETNS").unwrap(), env::var("HC_CGROUP").unwrap());
    match probe::run(Path::new(&netns), Path::new(&cgroup), to.parse().unwrap()) {
        Ok(token) => println!("\n{}", probe::token_line(&token)),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_pod_is_proven_captured_on_both_families() {
    if !can_run("an_attached_pod_is_proven_captured_on_both_families") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let attached = handle.attach(world.spec()).await.unwrap();
    let again = handle.attach(world.spec()).await.unwrap();
    assert_eq!(again.token, attached.token, "idempotent");
    drop(again);
    assert_eq!(handle.status()[0].state, PodState::Attached);
    let (_accepted, _task) = serve(attached);
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
    let status = handle.status();
    assert_eq!(status[0].state, PodState::Captured);
    assert_eq!((status[0].counts.marked, status[0].counts.captured), (2, 4), "{:?}", status[0].counts);
    assert!(!world.cgroup.join("heddle-probe").exists(), "the probe's cgroup goes");
    assert!(matches!(handle.prove("nobody").await, PodState::Uncaptured { reason: "not_attached", .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn outbound_to_mesh_destinations_is_captured_with_its_original_destination_and_nothing_else_is() {
    if !can_run("outbound_to_mesh_destinations_is_captured_with_its_original_destination_and_nothing_else_is") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (mut accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    handle.set_destinations(HashSet::from([SERVICE4, SERVICE6])).await.unwrap();
    for (service, own) in [(SERVICE4, POD4), (SERVICE6, POD6)] {
        let to = SocketAddr::new(service, 443);
        assert_eq!(&world.pod_connects(to).await.unwrap(), FROM_AGENT);
        let (original, client) = next(&mut accepted).await;
        assert_eq!((original, client.ip()), (to, own));
    }
    // v4-mapped: an IPv6 socket that speaks to an IPv4 service.
    let mapped: SocketAddr = "[::ffff:10.96.0.10]:443".parse().unwrap();
    assert_eq!(&world.pod_connects(mapped).await.unwrap(), FROM_AGENT);
    assert_eq!(next(&mut accepted).await.0, SocketAddr::new(SERVICE4, 443));

    let outside = app(&world.out(), SocketAddr::new(OUT4, 8_080));
    assert_eq!(&world.pod_connects(SocketAddr::new(OUT4, 8_080)).await.unwrap(), FROM_APP);
    assert_eq!(outside.recv().unwrap().ip(), POD4);
    // The agent's own connections from the pod are never captured, also to a mesh destination.
    handle.set_destinations(HashSet::from([OUT4, OUT6])).await.unwrap();
    let outside6 = app(&world.out(), SocketAddr::new(OUT6, 8_080));
    for (own, to, seen) in [(POD4, OUT4, &outside), (POD6, OUT6, &outside6)] {
        let mut stream = handle.dial("default/web.1", own, SocketAddr::new(to, 8_080)).await.unwrap();
        let mut greeting = [0; 16];
        stream.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, FROM_APP);
        assert!(stream.nodelay().unwrap());
        assert_eq!(seen.recv().unwrap().ip(), own);
    }
    let refused = handle.dial("default/web.1", POD4, SocketAddr::new(OUT4, 9)).await.unwrap_err();
    assert_eq!(refused.io().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(
        handle.dial("default/web.1", OUT4, SocketAddr::new(OUT4, 9)).await.unwrap_err().reason(),
        "not_own_address"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn inbound_is_captured_on_every_port_also_where_the_app_listens() {
    if !can_run("inbound_is_captured_on_every_port_also_where_the_app_listens") {
        return;
    }
    let world = World::new();
    let listening = app(&world.pod(), SocketAddr::new(POD4, 8_080));
    let mut early = connect_in(&world.out(), None, SocketAddr::new(POD4, 8_080)).unwrap();
    assert_eq!(&greeting(&mut early).unwrap(), FROM_APP);
    let handle = world.start().await;
    let (mut accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    for (pod, client, port) in [(POD4, OUT4, 8_080), (POD4, OUT4, 15_008), (POD6, OUT6, 9)] {
        let to = SocketAddr::new(pod, port);
        let out = world.out();
        let mut stream = beside(move || connect_in(&out, None, to)).await.unwrap();
        let (original, peer) = next(&mut accepted).await;
        assert_eq!((original, peer), (to, stream.local_addr().unwrap()));
        assert_eq!(peer.ip(), client);
        assert_eq!(&beside(move || greeting(&mut stream)).await.unwrap(), FROM_AGENT);
    }
    let direct = connect_in(&world.out(), None, SocketAddr::new(POD4, heddle_common::LISTENER_PORT));
    assert_eq!(
        direct.unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused,
        "nobody addresses the listener's own port"
    );
    // A connection from before enrolment goes on, and the app saw no other.
    early.write_all(b"still").unwrap();
    let mut echo = [0; 5];
    early.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"still");
    assert_eq!(listening.try_iter().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_reaches_the_app_from_the_clients_address() {
    if !can_run("delivery_reaches_the_app_from_the_clients_address") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (_accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    let far4: IpAddr = "198.51.100.7".parse().unwrap();
    let far6: IpAddr = "2001:db8:1::7".parse().unwrap();
    let any4 = app(&world.pod(), "0.0.0.0:8080".parse().unwrap());
    let any6 = app(&world.pod(), "[::]:8081".parse().unwrap());
    let cases = [
        (OUT4, POD4, 8_080, OUT4, &any4),
        (far4, POD4, 8_080, far4, &any4),
        ("::ffff:198.51.100.8".parse().unwrap(), POD4, 8_080, "198.51.100.8".parse().unwrap(), &any4),
        (OUT6, POD6, 8_081, OUT6, &any6),
        (far6, POD6, 8_081, far6, &any6),
        (POD4, POD4, 8_080, POD4, &any4),
        (POD6, POD6, 8_081, POD6, &any6),
    ];
    for (client, pod, port, expected, seen) in cases {
        let Delivery { mut stream } =
            timeout(SOON, handle.deliver("default/web.1", client, SocketAddr::new(pod, port))).await.unwrap().unwrap();
        let mut answer = [0; 21];
        stream.write_all(b"hello").await.unwrap();
        timeout(SOON, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer[16..], b"hello");
        let peer = seen.recv_timeout(SOON).unwrap();
        assert_eq!(peer.ip().to_canonical(), expected);
        assert!(client == pod || peer.port() < 32_768, "{peer}");
        assert!(stream.nodelay().unwrap());
    }
    assert_eq!(handle.node().maps.attested_count(), 0, "nothing stays attested");
    for (client, pod) in [(far4, POD4), (far6, POD6)] {
        let delivery = handle.deliver("default/web.1", client, SocketAddr::new(pod, 9));
        let refused = timeout(Duration::from_secs(1), delivery).await.expect("told at once").unwrap_err();
        assert_eq!(refused.reason(), "connect");
        assert_eq!(refused.io().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    }
    let mixed = handle.deliver("default/web.1", far6, SocketAddr::new(POD4, 8_080)).await.unwrap_err();
    assert_eq!(mixed.reason(), "address_family");
    assert_eq!(handle.node().maps.attested_count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_deliveries_of_one_client_to_one_port_use_ports_in_time_wait_again() {
    if !can_run("thousands_of_deliveries_of_one_client_to_one_port_use_ports_in_time_wait_again") {
        return;
    }
    let world = World::new();
    // 4,177 ports for deliveries, so that 2 x 3,000 go round.
    world.pod().within(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "5200 60999")).unwrap();
    let handle = world.start().await;
    let (_accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    let seen = app(&world.pod(), "[::]:8080".parse().unwrap());
    for (client, pod) in [(OUT4, POD4), (OUT6, POD6)] {
        let started = Instant::now();
        for round in 0..2 {
            for turn in 0..3_000 {
                let Delivery { mut stream } = handle
                    .deliver("default/web.1", client, SocketAddr::new(pod, 8_080))
                    .await
                    .unwrap_or_else(|error| panic!("{client} round {round} turn {turn}: {error}"));
                let mut answer = [0; 16];
                stream.read_exact(&mut answer).await.unwrap();
                assert_eq!(&answer, FROM_APP);
                // The agent closes first: TIME_WAIT stays on its side.
                stream.shutdown().await.unwrap();
                assert_eq!(stream.read(&mut answer).await.unwrap(), 0);
            }
            tokio::time::sleep(Duration::from_millis(1_200)).await;
        }
        let ports: HashSet<u16> = seen.try_iter().map(|peer| peer.port()).collect();
        println!("{client}: 6,000 deliveries over {} ports in {:?}", ports.len(), started.elapsed());
        assert!(ports.len() < 6_000 && ports.iter().all(|port| (1_024..5_200).contains(port)));
    }
    assert_eq!(handle.node().maps.attested_count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_keeps_off_the_ports_of_connections_that_the_agent_holds() {
    if !can_run("delivery_keeps_off_the_ports_of_connections_that_the_agent_holds") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (mut accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    let seen = app(&world.pod(), "0.0.0.0:8080".parse().unwrap());
    let app_at = SocketAddr::new(POD4, 8_080);
    // Ports that delivery comes to in its turn.
    let mut held = Vec::new();
    for port in (2_000..2_400).step_by(4) {
        let out = world.out();
        let stream = beside(move || connect_in(&out, Some(SocketAddr::new(OUT4, port)), app_at)).await.unwrap();
        let (_, client) = next(&mut accepted).await;
        held.push((stream, handle.occupy("default/web.1", client, app_at)));
    }
    world.pod().within(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "32768 60999")).unwrap();
    let occupancy = &handle.node().pod("default/web.1").unwrap().occupancy;
    let rotation = super::ports::Rotation::new(2_000..=2_399);
    for _ in 0..400 {
        let port = rotation.pick(OUT4, 8_080, occupancy).unwrap();
        assert!(!(2_000..2_400).step_by(4).any(|taken| taken == port), "{port}");
    }
    for _ in 0..200 {
        let delivery = handle.deliver("default/web.1", OUT4, app_at);
        timeout(SOON, delivery).await.unwrap().unwrap();
    }
    for _ in 0..200 {
        assert_eq!(seen.recv_timeout(SOON).unwrap().ip(), OUT4);
    }
    for (stream, _) in &mut held {
        assert_eq!(&greeting(stream).unwrap(), FROM_AGENT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_adopts_what_runs_and_without_an_agent_connections_are_refused() {
    if !can_run("a_restarted_agent_adopts_what_runs_and_without_an_agent_connections_are_refused") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let to = SocketAddr::new(POD4, 8_080);
    let first = world.start().await;
    first.set_destinations(HashSet::from([SERVICE4])).await.unwrap();
    let (_accepted, task) = serve(first.attach(world.spec()).await.unwrap());
    assert_eq!(first.prove("default/web.1").await, PodState::Captured);
    let before = world.ids();
    first.unlisten("default/web.1").await.unwrap();
    task.abort();
    let _ended = task.await;
    drop(first);

    let refused = connect_in(&world.out(), None, to).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "fails closed");
    let said = world.pod_connects(SocketAddr::new(SERVICE4, 443)).await.unwrap_err();
    assert!(said.contains("Operation not permitted") || said.contains("refused"), "{said}");
    assert_eq!(world.ids(), before);

    let second = world.start().await;
    let (mut accepted, _task) = serve(second.attach(world.spec()).await.unwrap());
    assert_eq!(world.ids(), before, "adopted, not loaded again");
    assert_eq!(second.prove("default/web.1").await, PodState::Captured);
    assert_eq!(&world.pod_connects(SocketAddr::new(SERVICE4, 443)).await.unwrap(), FROM_AGENT);
    assert_eq!(next(&mut accepted).await.0, SocketAddr::new(SERVICE4, 443));
    let counts = second.status()[0].counts;
    assert!(counts.unattended_dropped >= 2 && counts.captured > 4, "counters go on: {counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_asks_for_it_is_left_alone_while_no_agent_is_there() {
    if !can_run("a_pod_that_asks_for_it_is_left_alone_while_no_agent_is_there") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let _outside = app(&world.out(), SocketAddr::new(OUT4, 8_080));
    let handle = world.start().await;
    handle.set_destinations(HashSet::from([OUT4])).await.unwrap();
    let open = PodSpec { when_unattended: Unattended::Open, ..world.spec() };
    drop(handle.attach(open).await.unwrap());
    handle.unlisten("default/web.1").await.unwrap();
    drop(handle);
    for pod in [POD4, POD6] {
        let mut stream = connect_in(&world.out(), None, SocketAddr::new(pod, 8_080)).unwrap();
        assert_eq!(&greeting(&mut stream).unwrap(), FROM_APP);
    }
    assert_eq!(&world.pod_connects(SocketAddr::new(OUT4, 8_080)).await.unwrap(), FROM_APP);
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_addresses_replace_the_programs_without_a_moment_in_which_the_app_is_reached() {
    if !can_run("changed_addresses_replace_the_programs_without_a_moment_in_which_the_app_is_reached") {
        return;
    }
    let world = World::new();
    let seen = app(&world.pod(), "[::]:8080".parse().unwrap());
    let handle = world.start().await;
    let only4 = PodSpec { addresses: vec![POD4], ..world.spec() };
    let (mut accepted, _task) = serve(handle.attach(only4).await.unwrap());
    let before = world.ids();
    let one_family = world.rules_and_routes();
    assert_eq!(one_family.matches("local default").count(), 1, "{one_family}");
    assert_eq!(one_family.matches("unreachable default").count(), 2, "{one_family}");

    let stop = Arc::new(AtomicBool::new(false));
    let knocking = {
        let (stop, out) = (Arc::clone(&stop), world.out());
        thread::spawn(move || {
            let mut answers = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut stream = connect_in(&out, None, SocketAddr::new(POD4, 8_080)).unwrap();
                assert_eq!(&greeting(&mut stream).unwrap(), FROM_AGENT);
                answers += 1;
            }
            answers
        })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(handle.attach(world.spec()).await.unwrap());
    tokio::time::sleep(Duration::from_millis(100)).await;
    stop.store(true, Ordering::Relaxed);
    let answers = beside(move || knocking.join().unwrap()).await;
    assert!(answers > 10, "{answers}");
    assert_eq!(seen.try_iter().count(), 0);

    assert!(world.ids().iter().zip(&before).all(|(now, then)| now != then), "made for the new addresses");
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
    let out = world.out();
    while accepted.try_recv().is_ok() {}
    let _stream = beside(move || connect_in(&out, None, SocketAddr::new(POD6, 8_080))).await.unwrap();
    assert_eq!(next(&mut accepted).await.0.ip(), POD6);
    let both = world.rules_and_routes();
    assert_eq!(both.matches("local default").count(), 2, "{both}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_proven_is_blocked_and_the_next_proof_unblocks_it() {
    if !can_run("what_is_not_proven_is_blocked_and_the_next_proof_unblocks_it") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let handle = world.start().await;
    let attached = handle.attach(world.spec()).await.unwrap();
    let PodState::Uncaptured { reason, detail } = handle.prove("default/web.1").await else {
        panic!("nobody answers, and yet it is proven");
    };
    assert_eq!(reason, "inbound_probe", "{detail}");
    let refused = connect_in(&world.out(), None, SocketAddr::new(POD4, 8_080)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let (_accepted, _task) = serve(attached);
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);

    // Somebody removes a rule: no answer finds its way back, and it shows.
    ip(&format!("-n {} rule del pref {}", world.pod_ns(), heddle_common::RULE_PREFERENCE));
    let PodState::Uncaptured { reason, .. } = handle.prove("default/web.1").await else { panic!("the rule is gone") };
    assert!(reason.ends_with("probe"), "{reason}");
    drop(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);

    // Somebody removes the routes to `lo`: what is marked goes nowhere, least of all out plainly.
    let outside = app(&world.out(), SocketAddr::new(OUT4, 8_080));
    let outside6 = app(&world.out(), SocketAddr::new(OUT6, 8_080));
    handle.set_destinations(HashSet::from([OUT4, OUT6])).await.unwrap();
    for (family, to) in [("-4", OUT4), ("-6", OUT6)] {
        let table = heddle_common::ROUTE_TABLE;
        ip(&format!("{family} -n {} route del local default dev lo table {table}", world.pod_ns()));
        let said = world.pod_connects(SocketAddr::new(to, 8_080)).await.unwrap_err();
        assert!(said.contains("unreachable") || said.contains("No route"), "{said}");
    }
    assert_eq!(outside.try_iter().count() + outside6.try_iter().count(), 0);
    drop(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);

    // Somebody removes a link.
    fs::remove_file(super::pin::Pins::open(&world.bpffs).unwrap().pod("default/web.1").join("connect6")).unwrap();
    let PodState::Uncaptured { reason, detail } = handle.prove("default/web.1").await else { panic!("a link is gone") };
    assert_eq!(reason, "link", "{detail}");
    drop(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
}

#[tokio::test(flavor = "multi_thread")]
async fn withdrawal_leaves_nothing_and_reaping_finds_what_an_earlier_agent_left() {
    if !can_run("withdrawal_leaves_nothing_and_reaping_finds_what_an_earlier_agent_left") {
        return;
    }
    let world = World::new();
    let _app = app(&world.pod(), "[::]:8080".parse().unwrap());
    let handle = world.start().await;
    let clean = |when: &str| {
        assert_eq!(world.rules_and_routes(), "", "{when}");
        assert_eq!(world.off(), 3, "{when}");
        let left = super::pin::Pins::open(&world.bpffs).unwrap().pods().unwrap();
        assert!(left.is_empty(), "{when}: {left:?}");
        for pod in [POD4, POD6] {
            let mut stream = connect_in(&world.out(), None, SocketAddr::new(pod, 8_080)).unwrap();
            assert_eq!(&greeting(&mut stream).unwrap(), FROM_APP, "{when}");
        }
    };
    let (_accepted, task) = serve(handle.attach(world.spec()).await.unwrap());
    assert_eq!(world.off(), 0);
    handle.withdraw("default/web.1").await.unwrap();
    clean("withdrawn");
    assert!(handle.status().is_empty());
    assert_eq!(handle.withdraw("default/web.1").await.unwrap_err().reason(), "not_attached");
    task.abort();
    let _ended = task.await;

    drop(handle.attach(world.spec()).await.unwrap());
    drop(handle);
    let next = world.start().await;
    fs::create_dir_all(world.bpffs.join("v9999/pods")).unwrap();
    let kept = next.reap(&HashSet::from(["default/web.1".into()])).await.unwrap();
    assert!(kept.is_empty() && world.ids().len() == super::load::PROGRAMS.len(), "{kept:?}");
    assert!(!world.bpffs.join("v9999").exists(), "another version goes");
    assert_eq!(next.reap(&HashSet::new()).await.unwrap(), ["default/web.1"]);
    clean("reaped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_sandbox_was_made_again_moves_with_its_slot() {
    if !can_run("a_pod_whose_sandbox_was_made_again_moves_with_its_slot") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let (_old, task) = serve(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
    task.abort();
    let _ended = task.await;
    let ns = world.pod_ns();
    let former = world.pod().inode();
    ip(&format!("netns del {ns}"));
    ip(&format!("netns add {ns}"));
    ip(&format!("-n {ns} link set lo up"));
    ip(&format!("-n {ns} link add eth0 type veth peer name eth1"));
    ip(&format!("-n {ns} addr add {POD4}/24 dev eth0"));
    ip(&format!("-n {ns} addr add {POD6}/64 dev eth0 nodad"));
    ip(&format!("-n {ns} link set eth0 up"));
    ip(&format!("-n {ns} link set eth1 up"));
    assert_ne!(fs::metadata(format!("/var/run/netns/{ns}")).unwrap().ino(), former);
    let PodState::Uncaptured { reason, .. } = handle.prove("default/web.1").await else { panic!("it moved") };
    assert_eq!(reason, "netns");
    let (_accepted, _task) = serve(handle.attach(world.spec()).await.unwrap());
    assert_eq!(handle.prove("default/web.1").await, PodState::Captured);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernels_destinations_are_made_equal_also_after_a_restart() {
    if !can_run("the_kernels_destinations_are_made_equal_also_after_a_restart") {
        return;
    }
    let world = World::new();
    let held = |handle: &Handle| -> HashSet<heddle_common::Address> {
        handle.node().maps.destinations.lock().unwrap().keys().map(Result::unwrap).collect()
    };
    let with_probes = |addresses: &[IpAddr]| -> HashSet<heddle_common::Address> {
        addresses.iter().chain(&probe::DESTINATIONS).copied().map(super::maps::key).collect()
    };
    let handle = world.start().await;
    assert_eq!(held(&handle), with_probes(&[]));
    handle.set_destinations(HashSet::from([SERVICE4, OUT4])).await.unwrap();
    handle.set_destinations(HashSet::from([SERVICE4, SERVICE6])).await.unwrap();
    assert_eq!(held(&handle), with_probes(&[SERVICE4, SERVICE6]));
    drop(handle);
    let handle = world.start().await;
    assert_eq!(held(&handle), with_probes(&[SERVICE4, SERVICE6]), "kept until told otherwise");
    handle.set_destinations(HashSet::from([OUT6])).await.unwrap();
    assert_eq!(held(&handle), with_probes(&[OUT6]));

    let many: HashSet<IpAddr> = (0..100_000_u32).map(|last| IpAddr::from(Ipv4Addr::from(0x0b00_0000 + last))).collect();
    let started = Instant::now();
    handle.set_destinations(many).await.unwrap();
    println!("100,000 destinations in {:?}", started.elapsed());
    assert_eq!(held(&handle).len(), 100_002);
    handle.set_destinations(HashSet::new()).await.unwrap();
    assert_eq!(held(&handle), with_probes(&[]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_can_not_be_captured_is_refused_with_a_reason() {
    if !can_run("a_pod_that_can_not_be_captured_is_refused_with_a_reason") {
        return;
    }
    let world = World::new();
    let handle = world.start().await;
    let place = |netns: &str, cgroup: &Path| Place { netns: netns.into(), cgroup: cgroup.to_owned() };
    let ns = format!("/var/run/netns/{}", world.pod_ns());
    let cases = [
        (PodSpec { addresses: vec![], ..world.spec() }, "spec"),
        (PodSpec { addresses: vec!["127.0.0.1".parse().unwrap()], ..world.spec() }, "spec"),
        (PodSpec { place: place("/proc/self/ns/net", &world.cgroup), ..world.spec() }, "netns"),
        (PodSpec { place: place("/proc/self/ns/mnt", &world.cgroup), ..world.spec() }, "netns"),
        (PodSpec { place: place("/nowhere", &world.cgroup), ..world.spec() }, "netns"),
        (PodSpec { place: place(&ns, Path::new("/tmp")), ..world.spec() }, "cgroup"),
    ];
    for (spec, reason) in cases {
        let error = handle.attach(spec).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains("default/web.1"), "{error}");
        let state = &handle.status()[0].state;
        assert!(matches!(state, PodState::Uncaptured { reason: found, .. } if *found == reason), "{state:?}");
    }
    assert_eq!(world.rules_and_routes(), "");
    drop(handle.attach(world.spec()).await.unwrap());
}
