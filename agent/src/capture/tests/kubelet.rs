//! The kubelet's probes on the running kernel: whose connections are vouched for, and for how long.
//!
//! The neighbour's netns plays the host: the agent of these tests lives there.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use heddle_common::{Attestation, attested_by, side};

use super::{
    lane::{ANSWER, App, PORT, role},
    world::{FROM_AGENT, OUT4, OUT6, POD4, POD6, World, beside, can_run, greeting, serve},
};
use crate::capture::*;

/// What the agent's greeting is long.
const TO_THE_AGENT: usize = FROM_AGENT.len();

/// A pod with an app, an agent on the host, and the cgroup of a kubelet; its folders go with it.
struct Stage {
    handle: Handle,
    app: App,
    kubelet: PathBuf,
    child: PathBuf,
    world: World,
}

impl Stage {
    async fn start_in(world: World) -> Self {
        let kubelet = world.cgroup.with_file_name(format!("{}-kubelet", world.out_ns()));
        let child = kubelet.join("child");
        fs::create_dir_all(&child).unwrap();
        let app = App::start(&world.pod_ns(), &world.cgroup);
        let handle = world.start().await;
        let probes = BTreeSet::from([PORT]);
        serve(handle.attach(PodSpec { probes, ..world.spec() }).await.unwrap());
        Self { handle, app, kubelet, child, world }
    }

    /// What a process of `cgroup` in `netns` reads of `to`.
    async fn read(&self, netns: &str, cgroup: &Path, to: SocketAddr) -> usize {
        let mut command = role("client", netns, cgroup);
        command.env("HC_TO", to.to_string()).env("HC_SAY", "0");
        let output = beside(move || command.output().unwrap()).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = text.lines().find_map(|line| line.strip_prefix("SAID ")).unwrap_or_else(|| panic!("{output:?}"));
        said.rsplit(' ').next().unwrap().parse().unwrap()
    }

    async fn probe(&self, to: SocketAddr) -> usize {
        self.read(&self.world.out_ns(), &self.kubelet, to).await
    }

    fn vouched(&self) -> usize {
        self.handle.node().maps.all_attested().unwrap().len()
    }

    fn probes(&self) -> u64 {
        self.handle.status().iter().map(|pod| pod.counts.probes).sum()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.app.end();
        for folder in [&self.child, &self.kubelet] {
            for _ in 0..100 {
                if fs::remove_dir(folder).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Runs a test as root whose agent is in the neighbour's netns: every thread of its runtime is.
fn on_the_host(test: &str, claim: impl AsyncFnOnce(Stage) + Send + 'static) {
    if !can_run(test) {
        return;
    }
    let host = World::new();
    let netns = Path::new("/var/run/netns").join(host.out_ns());
    let test = std::thread::spawn(move || {
        netns::enter_for_good(&netns).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async { claim(Stage::start_in(host).await).await });
    });
    if let Err(panic) = test.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn the_kubelets_own_tasks_pass_to_a_probe_port_and_no_others() {
    on_the_host("the_kubelets_own_tasks_pass_to_a_probe_port_and_no_others", async |stage| {
        let to = |address: IpAddr| SocketAddr::new(address, PORT);
        assert_eq!(stage.probe(to(POD4)).await, TO_THE_AGENT, "before its cgroup is known");
        stage.handle.attest_kubelet(&stage.kubelet).await.unwrap();
        let mapped: IpAddr = "::ffff:10.213.7.2".parse().unwrap();
        for address in [POD4, POD6, mapped] {
            assert_eq!(stage.probe(to(address)).await, ANSWER, "{address}");
        }
        assert_eq!(stage.probes(), 3);
        assert_eq!(stage.probe(SocketAddr::new(POD4, PORT + 1)).await, TO_THE_AGENT, "no probe names that port");
        let host = stage.world.out_ns();
        assert_eq!(stage.read(&host, &stage.child, to(POD4)).await, TO_THE_AGENT, "a cgroup below it");
        let elsewhere = stage.kubelet.with_file_name(format!("{host}-other"));
        fs::create_dir(&elsewhere).unwrap();
        let other = stage.read(&host, &elsewhere, to(POD4)).await;
        fs::remove_dir(&elsewhere).unwrap();
        assert_eq!(other, TO_THE_AGENT, "another cgroup");
        assert_eq!((stage.probes(), stage.vouched()), (3, 0), "each left with its socket");
    });
}

#[test]
fn a_pass_is_for_one_handshake_of_this_pod_and_this_port() {
    on_the_host("a_pass_is_for_one_handshake_of_this_pod_and_this_port", async |stage| {
        let node = stage.handle.node();
        let slot = node.pod("default/web.1").unwrap().live().unwrap().slot;
        let workload = node.pod("default/web.1").unwrap().live().unwrap().workload.0;
        let pass = Attestation { by: attested_by::KUBELET, destination: workload, ..Attestation::by_agent(slot) };
        let cases = [
            (PORT, pass, true),
            (PORT + 1, pass, false),
            (PORT, Attestation { destination: workload ^ 1, ..pass }, false),
            (PORT, Attestation { destination_state: side::ESTABLISHED, ..pass }, false),
        ];
        for (from, (port, attestation, passes)) in (41_000..).zip(cases) {
            let (from, to) = (SocketAddr::new(OUT4, from), SocketAddr::new(POD4, port));
            let tuple = maps::tuple(from, to);
            let _held = node.maps.attest(tuple, attestation).unwrap();
            let mut stream = beside(move || {
                // The agent's own netns is the host's here.
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&from.into()).unwrap();
                socket.connect_timeout(&to.into(), Duration::from_secs(2)).unwrap();
                let stream = std::net::TcpStream::from(socket);
                stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
                stream
            })
            .await;
            // The app waits for the client's end before it answers; the agent greets at once.
            assert_eq!(greeting(&mut stream).is_err(), passes, "{attestation:?}");
            if passes {
                let consumed = node.maps.attested(&tuple).unwrap().destination_state;
                assert_eq!(consumed, side::ESTABLISHED, "no other SYN is let in by it");
            }
        }
        let no_ports = BTreeSet::new();
        node.maps.set_probe_ports(WorkloadId(workload), &no_ports).unwrap();
        stage.handle.attest_kubelet(&stage.kubelet).await.unwrap();
        assert_eq!(stage.probe(SocketAddr::new(POD4, PORT)).await, TO_THE_AGENT, "no probe names it any more");
    });
}

#[test]
fn another_agent_takes_the_programs_over_and_they_go_with_the_last_word() {
    on_the_host("another_agent_takes_the_programs_over_and_they_go_with_the_last_word", async |stage| {
        let id = load::Cgroup::open(&stage.kubelet).unwrap().id();
        assert_eq!(stage.handle.attested_kubelet().await.unwrap(), None);
        assert!(!stage.handle.forget_kubelet().await.unwrap());
        stage.handle.attest_kubelet(&stage.kubelet).await.unwrap();
        let next = stage.world.start().await;
        assert_eq!(next.attested_kubelet().await.unwrap(), Some(id));
        next.attest_kubelet(&stage.kubelet).await.unwrap();
        assert_eq!(stage.probe(SocketAddr::new(POD6, PORT)).await, ANSWER);
        // Another cgroup instead: the first is anybody's, and what was vouched for is no more.
        let node = next.node();
        let old = Attestation { by: attested_by::KUBELET, source: id, ..Attestation::by_agent(0) };
        let tuple = maps::tuple(SocketAddr::new(OUT6, 1), SocketAddr::new(POD6, PORT));
        std::mem::forget(node.maps.attest(tuple, old).unwrap());
        next.attest_kubelet(&stage.child).await.unwrap();
        assert_eq!(stage.vouched(), 0);
        assert_eq!(stage.probe(SocketAddr::new(POD4, PORT)).await, TO_THE_AGENT);
        let host = stage.world.out_ns();
        assert_eq!(stage.read(&host, &stage.child, SocketAddr::new(POD4, PORT)).await, ANSWER);
        assert!(next.forget_kubelet().await.unwrap());
        assert_eq!(next.attested_kubelet().await.unwrap(), None);
        assert_eq!(stage.read(&host, &stage.child, SocketAddr::new(POD4, PORT)).await, TO_THE_AGENT);
        let refused = stage.handle.attest_kubelet(&stage.world.cgroup).await.unwrap_err();
        assert_eq!(refused.reason(), "kubelet_programs", "a pod's cgroup is never the kubelet's: {refused}");
    });
}
