//! The kernel lane on the running kernel: who gets onto it, what the app sees, and what is told of it.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use heddle_common::{
    Ended, LocalEndpoint, LocalEndpoints, Pair, ServicePort, Verdict, attested_by, choice, side, verdict,
};
use socket2::{Domain, Socket, Type};

use super::world::{OUT4, OUT6, POD4, POD6, SERVICE4, SERVICE6, SOON, World, beside, can_run, next, serve};
use crate::capture::{maps::key, *};

pub const PORT: u16 = 7_000;
pub const ANSWER: usize = 50_000;

/// Two pods: that of the [`World`] connects, its neighbour answers.
struct Pair2 {
    handle: Handle,
    lane: Lane,
    near: ResidentPod,
    far: ResidentPod,
    accepted: tokio::sync::mpsc::UnboundedReceiver<(SocketAddr, SocketAddr)>,
    _app: App,
    cgroup: PathBuf,
    world: World,
}

impl Drop for Pair2 {
    fn drop(&mut self) {
        self._app.end();
        for _ in 0..100 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Pair2 {
    async fn start() -> Self {
        let world = World::new();
        let cgroup = world.cgroup.with_file_name(format!("{}-far", world.out_ns()));
        fs::create_dir(&cgroup).unwrap();
        let handle = world.start().await;
        let far = PodSpec {
            uid: "far".into(),
            name: "default/far".into(),
            addresses: vec![OUT4, OUT6],
            place: crate::cluster::Place {
                netns: Path::new("/var/run/netns").join(world.out_ns()),
                cgroup: cgroup.clone(),
                ..Default::default()
            },
            ..world.spec()
        };
        handle.set_destinations([OUT4, OUT6, POD4, POD6, SERVICE4, SERVICE6].into()).await.unwrap();
        let (accepted, _) = serve(handle.attach(world.spec()).await.unwrap());
        let (_, _) = serve(handle.attach(far).await.unwrap());
        let lane = handle.lane();
        let resident = |uid: &str| lane.residents().into_iter().find(|pod| &*pod.uid == uid).unwrap();
        let (near, far) = (resident("default/web.1"), resident("far"));
        let app = App::start(&world.out_ns(), &cgroup);
        Self { handle, lane, near, far, accepted, _app: app, cgroup, world }
    }

    fn pair(&self) -> Pair {
        Pair::new(self.near.id.0, self.far.id.0, PORT)
    }

    fn decide(&self, action: u32) {
        assert!(self.lane.put_verdict(self.pair(), Verdict { action, counter: 7 }).unwrap());
    }

    async fn call(&self, to: SocketAddr, say: usize) -> Result<Said, String> {
        self.call_with(to, say, &[]).await
    }

    async fn call_with(&self, to: SocketAddr, say: usize, more: &[(&str, String)]) -> Result<Said, String> {
        let mut command = role("client", &self.world.pod_ns(), &self.world.cgroup);
        command.env("HC_TO", to.to_string()).env("HC_SAY", say.to_string());
        command.envs(more.iter().map(|(name, value)| (*name, value)));
        beside(move || {
            let output = command.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let said = text.lines().find_map(|line| line.strip_prefix("SAID ")).map(str::to_owned);
            let Some(said) = said else {
                return Err(text + &String::from_utf8_lossy(&output.stderr));
            };
            let mut words = said.split(' ');
            let mut word = || words.next().unwrap().to_owned();
            Ok(Said { peer: word().parse().unwrap(), local: word().parse().unwrap(), read: word().parse().unwrap() })
        })
        .await
    }

    fn counts(&self) -> heddle_common::PodCounts {
        self.handle.status().into_iter().find(|pod| &*pod.uid == "default/web.1").unwrap().counts
    }
}

struct Said {
    peer: SocketAddr,
    local: SocketAddr,
    read: usize,
}

/// An app in the far pod: reads all, answers, closes.
pub struct App(Child);

impl App {
    pub fn start(netns: &str, cgroup: &Path) -> Self {
        let mut child = role("app", netns, cgroup).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "READY"));
        std::thread::spawn(move || lines.for_each(drop));
        Self(child)
    }

    pub fn end(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

pub fn role(role: &str, netns: &str, cgroup: &Path) -> Command {
    let test = format!("{}::a_process_of_a_pod", module_path!().split_once("::").unwrap().1);
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", &test, "--nocapture"]).env("HC_ROLE", role);
    command.env("HC_NETNS", Path::new("/var/run/netns").join(netns)).env("HC_CGROUP", cgroup);
    command
}

/// Not a test by itself: the body of processes that the tests start in a pod.
#[test]
fn a_process_of_a_pod() {
    let Ok(role) = env::var("HC_ROLE") else { return };
    let cgroup = PathBuf::from(env::var("HC_CGROUP").unwrap());
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    netns::enter_for_good(Path::new(&env::var("HC_NETNS").unwrap())).unwrap();
    match role.as_str() {
        "app" => {
            let listener = TcpListener::bind(("::", PORT)).unwrap();
            println!("\nREADY");
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let _read = stream.read_to_end(&mut Vec::new());
                    let _written = stream.write_all(&[7; ANSWER]);
                });
            }
        }
        _ => {
            let to: SocketAddr = env::var("HC_TO").unwrap().parse().unwrap();
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
            if let Ok(mark) = env::var("HC_MARK") {
                socket.set_mark(mark.parse().unwrap()).unwrap();
            }
            if let Ok(device) = env::var("HC_DEVICE") {
                socket.bind_device(Some(device.as_bytes())).unwrap();
            }
            if let Ok(from) = env::var("HC_FROM") {
                socket.set_reuse_address(true).unwrap();
                socket.bind(&from.parse::<SocketAddr>().unwrap().into()).unwrap();
            }
            socket.connect(&to.into()).unwrap_or_else(|error| panic!("connect: {error}"));
            let mut stream = std::net::TcpStream::from(socket);
            stream.set_read_timeout(Some(SOON)).unwrap();
            let (peer, local) = (stream.peer_addr().unwrap(), stream.local_addr().unwrap());
            stream.write_all(&vec![1; env::var("HC_SAY").unwrap().parse().unwrap()]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            println!("\nSAID {peer} {local} {}", answer.len());
        }
    }
}

async fn ended(ring: &mut EndedRing) -> Ended {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(ended) = ring.next() {
            return ended;
        }
        assert!(Instant::now() < deadline, "no end was told");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allowed_pair_talks_without_the_agent_and_its_bytes_are_told_exactly() {
    if !can_run("an_allowed_pair_talks_without_the_agent_and_its_bytes_are_told_exactly") {
        return;
    }
    let mut pods = Pair2::start().await;
    let mut ring = pods.lane.ended().unwrap();
    pods.decide(verdict::ALLOW);
    let mapped: IpAddr = "::ffff:10.213.7.1".parse().unwrap();
    for (to, from, say) in [(OUT4, POD4, 100_000), (OUT6, POD6, 0), (mapped, POD4, 1)] {
        let said = pods.call(SocketAddr::new(to, PORT), say).await.unwrap();
        assert_eq!((said.peer, said.read), (SocketAddr::new(to, PORT), ANSWER));
        assert_eq!(said.local.ip().to_canonical(), from);
        let end = ended(&mut ring).await;
        assert_eq!((end.tuple.source, end.tuple.source_port), (key(from), said.local.port()));
        assert_eq!((end.tuple.destination, end.tuple.destination_port), (key(to), PORT));
        let told = end.attestation;
        assert_eq!((told.by, told.source, told.destination), (attested_by::KERNEL, pods.near.id.0, pods.far.id.0));
        assert_eq!((told.sent, told.received), (say as u64, ANSWER as u64), "{told:?}");
        let whole = side::ESTABLISHED | side::FINISHED | side::ACKNOWLEDGED | side::CLOSED;
        assert_eq!((told.source_state, told.destination_state), (whole, whole));
        assert!(end.closed > told.opened && told.service_port == 0);
    }
    assert_eq!((pods.counts().lane, pods.counts().marked), (3, 0));
    assert!(pods.lane.connections().unwrap().is_empty());
    assert!(pods.accepted.try_recv().is_err(), "the agent saw none of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_pair_is_refused_at_once_and_an_unknown_one_is_the_agents() {
    if !can_run("a_denied_pair_is_refused_at_once_and_an_unknown_one_is_the_agents") {
        return;
    }
    let mut pods = Pair2::start().await;
    let to = SocketAddr::new(OUT4, PORT);
    assert_eq!(pods.call(to, 0).await.unwrap().read, 16, "the agent's greeting");
    assert_eq!(next(&mut pods.accepted).await.0, to);
    assert_eq!(pods.counts().lane_missed, 1);
    pods.decide(verdict::DENY);
    let refused = pods.call(to, 0).await.err().unwrap();
    assert!(refused.contains("Operation not permitted"), "{refused}");
    assert_eq!((pods.lane.denial(7).unwrap(), pods.counts().lane_denied), (1, 1));
    pods.lane.remove_verdict(&pods.pair()).unwrap();
    assert_eq!(pods.call(to, 0).await.unwrap().read, 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_service_the_kernel_takes_its_share_and_tells_the_agent_what_is_left() {
    if !can_run("of_a_service_the_kernel_takes_its_share_and_tells_the_agent_what_is_left") {
        return;
    }
    let mut pods = Pair2::start().await;
    let mut ring = pods.lane.ended().unwrap();
    pods.decide(verdict::ALLOW);
    let of = |total, address| {
        let none = LocalEndpoint { address: key(address), port: PORT, padding: 0 };
        LocalEndpoints { total, local: 1, endpoints: [none; LocalEndpoints::MAX] }
    };
    let port = |address| ServicePort { address: key(address), port: 80, padding: 0 };
    pods.lane.set_services(&HashMap::from([(port(SERVICE4), of(1, OUT4)), (port(SERVICE6), of(1, OUT6))])).unwrap();
    let mapped: IpAddr = "::ffff:10.96.0.10".parse().unwrap();
    for (service, real) in [(SERVICE4, OUT4), (SERVICE6, OUT6), (mapped, OUT4)] {
        let said = pods.call(SocketAddr::new(service, 80), 5).await.unwrap();
        assert_eq!((said.peer, said.read), (SocketAddr::new(service, 80), ANSWER), "getpeername is the Service's");
        let end = ended(&mut ring).await;
        assert_eq!((end.tuple.destination, end.attestation.sent), (key(real), 5));
        assert_eq!((end.attestation.service, end.attestation.service_port), (key(service), 80));
    }
    // None of the endpoints that are left: the agent is told so by the mark.
    pods.lane.set_services(&HashMap::from([(port(SERVICE4), LocalEndpoints { local: 0, ..of(3, OUT4) })])).unwrap();
    assert_eq!(pods.call(SocketAddr::new(SERVICE4, 80), 0).await.unwrap().read, 16);
    assert_eq!(next(&mut pods.accepted).await.0, SocketAddr::new(SERVICE4, 80));
    assert_eq!(choice::REST, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_table_a_foreign_mark_and_a_foreign_address_lead_to_the_agent() {
    if !can_run("a_full_table_a_foreign_mark_and_a_foreign_address_lead_to_the_agent") {
        return;
    }
    let mut pods = Pair2::start().await;
    pods.decide(verdict::ALLOW);
    let to = SocketAddr::new(OUT4, PORT);
    // The agent's own mark, on the app's socket: taken off, as it would lead astray.
    let mark = ("HC_MARK", heddle_common::MARK.to_string());
    assert_eq!(pods.call_with(to, 0, &[mark]).await.unwrap().read, ANSWER);
    // Another way than that which was measured: unbound, it is the agent's.
    let device = ("HC_DEVICE", "eth0".to_owned());
    assert_eq!(pods.call_with(to, 0, &[device]).await.unwrap().read, 16, "the agent's greeting");
    assert_eq!(next(&mut pods.accepted).await.0, to);
    // An address of the pod's netns that is not the pod's own.
    super::world::ip(&format!("-n {} addr add 10.213.7.77/24 dev eth0", pods.world.pod_ns()));
    let from = ("HC_FROM", "10.213.7.77:0".to_owned());
    let said = pods.call_with(to, 0, &[from]).await;
    assert!(said.is_err() || said.unwrap().read == 16, "it never reaches the app");
    while pods.accepted.try_recv().is_ok() {}

    let map = kernel::open_pin(&pin::Pins::open(&pods.world.bpffs).unwrap().maps().join("ATTESTED")).unwrap();
    let mut attested = aya::maps::HashMap::<_, heddle_common::Tuple, heddle_common::Attestation>::try_from(
        aya::maps::Map::HashMap(aya::maps::MapData::from_fd(map).unwrap()),
    )
    .unwrap();
    let nobody = |at: u32| heddle_common::Tuple {
        source: key(IpAddr::from(at.to_be_bytes())),
        destination: key(POD4),
        source_port: 1,
        destination_port: 1,
        padding: 0,
    };
    for at in 0..heddle_common::MAX_ATTESTED {
        attested.insert(nobody(at), heddle_common::Attestation::by_agent(u32::MAX), 0).unwrap();
    }
    assert_eq!(pods.call(to, 0).await.unwrap().read, 16, "to the agent, of which the SYN is told after all");
    assert_eq!(next(&mut pods.accepted).await.0, to);
    assert_eq!(pods.counts().lane_full, 1);
    attested.remove(&nobody(0)).unwrap();
    assert_eq!(pods.call(to, 0).await.unwrap().read, ANSWER);
}

/// A verdict that goes between the connect() and the SYN can't be timed, so the entry is made by hand: what `observe` writes.
#[tokio::test(flavor = "multi_thread")]
async fn an_attested_syn_without_a_verdict_is_the_agents_who_knows_whose_it_is() {
    if !can_run("an_attested_syn_without_a_verdict_is_the_agents_who_knows_whose_it_is") {
        return;
    }
    let pods = Pair2::start().await;
    let to = SocketAddr::new(OUT4, PORT);
    // A port of its own for each, as the one before waits in TIME_WAIT.
    let from = |port| SocketAddr::new(POD4, port);
    let tuple = |port| heddle_common::Tuple {
        source: key(POD4),
        destination: key(to.ip()),
        source_port: port,
        destination_port: to.port(),
        padding: 0,
    };
    let attestation = heddle_common::Attestation {
        by: attested_by::KERNEL,
        source: pods.near.id.0,
        destination: pods.far.id.0,
        ..heddle_common::Attestation::by_agent(pods.far.slot)
    };
    let attest = |port, attestation| {
        // It stays: the kernel's entries are nobody's to drop.
        std::mem::forget(pods.handle.node().maps.attest(tuple(port), attestation).unwrap());
    };
    // From the agent's own cgroup, so that nothing is written beside it.
    let dial = |port| {
        let near = World::netns(&pods.world.pod_ns());
        beside(move || super::world::connect_in(&near, Some(from(port)), to))
    };
    attest(40_000, attestation);
    let mut stream = dial(40_000).await.unwrap();
    assert_eq!(&super::world::greeting(&mut stream).unwrap(), super::world::FROM_AGENT);
    let known = pods.lane.take_attested(from(40_000), to).unwrap();
    assert_eq!((known.source, known.destination), (pods.near.id.0, pods.far.id.0));
    assert!(pods.lane.take_attested(from(40_000), to).is_none(), "once");
    // With a verdict of denial: reset at once, counted, and nothing is left of it.
    attest(40_001, attestation);
    pods.decide(verdict::DENY);
    assert_eq!(dial(40_001).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(pods.lane.denial(7).unwrap(), 1);
    assert!(pods.lane.connections().unwrap().is_empty());
    // Of a connection that its app has taken already, and of a pod that had the address before: nobody's.
    pods.decide(verdict::ALLOW);
    for (port, other) in [
        (40_002, heddle_common::Attestation { destination_state: side::ESTABLISHED, ..attestation }),
        (40_003, heddle_common::Attestation { destination: pods.far.id.0 ^ 1, ..attestation }),
    ] {
        attest(port, other);
        let mut stream = dial(port).await.unwrap();
        assert_eq!(&super::world::greeting(&mut stream).unwrap(), super::world::FROM_AGENT);
        pods.handle.node().maps.remove_attested(&tuple(port)).unwrap();
    }
}
