//! The bench's lab: a client and a server outside the mesh and a client and a server inside it, for each place, on the
//! same two nodes with the same agents running.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use heddle_common::PodCounts;
use heddle_lab::{Lab, Pod, until};
use serde_json::json;

use super::{figures::Way, machine, rows::Place};

/// Ports of the servers in a server pod.
pub const REPLY: u16 = 7000;
pub const WEB: u16 = 8080;
pub const IPERF: u16 = 5201;
const NAMESPACE: &str = "bench";
/// Ephemeral ports of client pods, reused early: a client of a minute must not run out of them, with or without a mesh.
const CLIENT_PORTS: &str = "16000 65000";

/// Everybody who takes part in the measurements of time.
pub struct Stage {
    pub lab: Lab,
    pairs: Vec<(Place, Way, Pair)>,
}

/// A client and its server.
pub struct Pair {
    pub client: Pod,
    pub server: Pod,
}

impl Stage {
    pub fn build(places: &[Place]) -> Result<Self> {
        let mut lab = Lab::builder().logs_in_memory().start()?;
        lab.hush();
        authorize(&lab)?;
        let mut pairs = Vec::new();
        for place in places {
            for way in [Way::None, Way::Mesh] {
                pairs.push((*place, way, Pair::start(&lab, *place, way)?));
            }
        }
        let stage = Self { lab, pairs };
        for (place, way, pair) in &stage.pairs {
            let named = || format!("{} {}", place.name(), way.name());
            pair.warm().with_context(named)?;
            if takes_the_lane(*place, *way) {
                for port in [REPLY, WEB, IPERF] {
                    stage.lab.take_the_lane(&pair.client, &pair.server, port).with_context(named)?;
                }
            }
        }
        Ok(stage)
    }

    pub fn pair(&self, place: Place, way: Way) -> Result<&Pair> {
        let found = self.pairs.iter().find(|(at, how, _)| (*at, *how) == (place, way));
        found.map(|(_, _, pair)| pair).context("no such pair")
    }

    /// What the programs of a client counted so far.
    pub fn counts(&self, pair: &Pair) -> Result<PodCounts> {
        self.lab.agent(1)?.kernel().counts(&pair.client)
    }

    /// The agents that carry traffic of a place, the client's first.
    pub fn agents(&self, place: Place) -> Result<Vec<u32>> {
        agents(&self.lab, place)
    }

    /// Gives back the memory that the access logs have taken: a minute of connections writes a gigabyte.
    pub fn forget_logs(&self) -> Result<()> {
        [1, 2].into_iter().try_for_each(|node| self.lab.agent(node)?.forget_access_log())
    }

    /// The congestion control and MTU of every pod; a bench with two of them would compare nothing.
    pub fn transport(&self) -> Result<(String, String)> {
        let mut seen = BTreeSet::new();
        for (_, _, pair) in &self.pairs {
            for pod in [&pair.client, &pair.server] {
                let control = pod.netns().read_sysctl("net/ipv4/tcp_congestion_control")?;
                let link = pod.netns().show(&["-o", "link", "show", "eth0"])?;
                let mtu = link.split_once("mtu ").and_then(|(_, rest)| rest.split_whitespace().next());
                seen.insert((control, mtu.context("eth0 has no MTU")?.to_owned()));
            }
        }
        ensure!(seen.len() == 1, "pods differ: {seen:?}");
        seen.pop_first().context("no pods")
    }
}

/// One policy that is evaluated for each connection, as a mesh in use has.
fn authorize(lab: &Lab) -> Result<()> {
    let principals = format!("{}/ns/{NAMESPACE}/sa/client", heddle_lab::TRUST_DOMAIN);
    lab.authorize(NAMESPACE, "clients", &json!({"rules": [{"from": [{"source": {"principals": [principals]}}]}]}))
}

fn agents(lab: &Lab, place: Place) -> Result<Vec<u32>> {
    let nodes: &[u8] = match place {
        Place::CrossNode | Place::Identity => &[1, 2],
        Place::SameNode | Place::SameNodeMtls => &[1],
        Place::Plaintext => &[2],
    };
    nodes.iter().map(|node| lab.agent(*node)?.daemon.pid().context("an agent is gone")).collect()
}

/// Whether the kernel lane is what is measured.
pub fn takes_the_lane(place: Place, way: Way) -> bool {
    (place, way) == (Place::SameNode, Way::Mesh)
}

fn server_node(place: Place) -> u8 {
    if matches!(place, Place::CrossNode | Place::Plaintext) { 2 } else { 1 }
}

impl Pair {
    fn start(lab: &Lab, place: Place, way: Way) -> Result<Self> {
        let name = |role: &str| format!("{role}-{}-{}", place.name().replace('_', "-"), way.name());
        let describe = |role: &str, node: u8| {
            let pod = lab.pod(NAMESPACE, &name(role)).on(node).service_account(role);
            let pod = if place == Place::SameNodeMtls { pod.annotate("heddle.dev/same-node", "mtls") } else { pod };
            let outside = way == Way::None || (place, role) == (Place::Plaintext, "client");
            if outside { pod.outside_the_mesh() } else { pod }
        };
        let server = describe("server", server_node(place)).serves(&[&format!("reply:{REPLY}")]).start()?;
        if (place, way) == (Place::Plaintext, Way::Mesh) {
            let selector = json!({"matchLabels": {"app": server.name()}});
            lab.authorize(NAMESPACE, "anyone", &json!({"selector": selector, "rules": [{}]}))?;
        }
        let client = describe("client", 1).start()?;
        client.netns().sysctl(&[("net/ipv4/ip_local_port_range", CLIENT_PORTS), ("net/ipv4/tcp_tw_reuse", "1")])?;
        let folder = lab.dir().join(server.name());
        let config = folder.join("nginx.conf");
        fs::create_dir_all(&folder)?;
        fs::write(&config, nginx_config(&folder))?;
        let config = config.to_str().context("path is not UTF-8")?.to_owned();
        server.runs("nginx", "nginx", &["-c", &config, "-e", "stderr"])?;
        server.runs("iperf3", "iperf3", &["-s", "-p", &IPERF.to_string()])?;
        Ok(Self { client, server })
    }

    /// Servers answer, and tunnels are set up: what is measured comes after that.
    fn warm(&self) -> Result<()> {
        let url = format!("http://{}/", self.server.at(WEB));
        until(Duration::from_secs(10), "nginx", || self.client.output("curl", &["-sf", &url]).ok())?;
        let churned = self.client.churn(self.server.at(REPLY), 500, 16).run()?;
        ensure!(churned.failed == 0, "{churned:?}");
        let iperf = self.server.at(IPERF);
        until(Duration::from_secs(10), "iperf3", || {
            self.client.connect(iperf).with("--expect", 0).run().is_ok_and(|seen| seen.connected).then_some(())
        })
    }
}

/// nginx in the foreground: 128 bytes from memory, connections that are never closed, no log.
fn nginx_config(folder: &Path) -> String {
    let (folder, body) = (folder.display(), "h".repeat(128));
    format!(
        "daemon off;\nuser root;\nworker_processes 2;\npid {folder}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
         \x20 access_log off;\n\
         \x20 keepalive_requests 1000000000; keepalive_time 1d; keepalive_timeout 1d;\n\
         \x20 client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n\
         \x20 uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
         \x20 server {{ listen {WEB}; listen [::]:{WEB}; location / {{ return 200 \"{body}\"; }} }}\n\
         }}\n"
    )
}

/// Memory of an agent (MiB).
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    pub all: f64,
    pub anonymous: f64,
}

/// Memory of the agents of a fresh lab, at each of its numbers of connections; the client's agent first. Two pairs of pods share
/// the connections, because one pod may not have as many.
pub fn memory(place: Place) -> Result<Vec<(u16, Vec<Resident>)>> {
    /// Buffers of the set-up are given back.
    const SETTLE: Duration = Duration::from_secs(2);
    let mut lab = Lab::two_nodes()?;
    lab.hush();
    authorize(&lab)?;
    let mut pairs = Vec::new();
    for number in 1..=2_u8 {
        let server = lab.pod(NAMESPACE, &format!("server-{number}")).on(server_node(place)).service_account("server");
        let server = server.serves(&[&format!("reply:{REPLY}")]).start()?;
        let client = lab.pod(NAMESPACE, &format!("client-{number}")).service_account("client").start()?;
        if place == Place::SameNode {
            lab.take_the_lane(&client, &server, REPLY)?;
        }
        pairs.push((client, server));
    }
    let (mut seen, mut held, mut open) = (Vec::new(), Vec::new(), 0);
    for connections in place.idle_connections().iter().copied() {
        let each = u64::from((connections - open) / 2);
        open = connections;
        for (client, server) in pairs.iter().filter(|_| each > 0) {
            let (holding, first) = client.hold(server.at(REPLY), each).open()?;
            ensure!(first.alive == each && first.failed == 0, "{each} connections: {first:?}");
            held.push(holding);
        }
        std::thread::sleep(SETTLE);
        let now = agents(&lab, place)?.into_iter().map(|pid| {
            let (all, anonymous) = machine::memory(pid)?;
            Ok(Resident { all, anonymous })
        });
        seen.push((connections, now.collect::<Result<_>>()?));
    }
    for mut holding in held {
        let last = holding.check()?;
        ensure!(last.failed == 0, "idle connections were lost: {last:?}");
        holding.close()?;
    }
    drop(pairs);
    lab.remove()?;
    Ok(seen)
}
