//! A pod: a network namespace on its node's bridge, a cgroup, its manifest, and real processes inside both.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    binaries,
    call::Call,
    cgroup,
    lab::Ground,
    netns::Netns,
    process::{Place, Process},
    reports::{Arrived, Churned, Connected, Datagrams, Event, Held, Measured, Storm, Tallied, Transferred, Tunnelled},
    wait::until,
};

/// A pod that is being described; [`PodBuilder::start`] makes it.
#[must_use = "a pod exists once it is started"]
#[derive(Debug)]
pub struct PodBuilder {
    ground: Arc<Ground>,
    namespace: String,
    name: String,
    node: u8,
    service_account: String,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    serves: Vec<String>,
    container: Value,
    enrolled: bool,
    unproven: bool,
    slot: Option<u8>,
}

impl PodBuilder {
    pub(crate) fn new(ground: Arc<Ground>, namespace: &str, name: &str) -> Self {
        Self {
            ground,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node: 1,
            service_account: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            annotations: BTreeMap::new(),
            serves: Vec::new(),
            container: json!({"name": "app", "image": "lab"}),
            enrolled: true,
            unproven: false,
            slot: None,
        }
    }

    /// The node that it runs on, 1 or 2.
    pub fn on(mut self, node: u8) -> Self {
        self.node = node;
        self
    }

    /// Its service account; its own name where this isn't called.
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    pub fn annotate(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Servers of `lab-peer`, such as `echo:7000` or `who+mptcp:7001`.
    pub fn serves(mut self, servers: &[&str]) -> Self {
        self.serves.extend(servers.iter().map(|server| (*server).to_owned()));
        self
    }

    /// A field of its container in its manifest, such as a probe.
    pub fn container(mut self, field: &str, value: Value) -> Self {
        if let Some(fields) = self.container.as_object_mut() {
            fields.insert(field.to_owned(), value);
        }
        self
    }

    /// Not enrolled, though its namespace is.
    pub fn outside_the_mesh(mut self) -> Self {
        self.enrolled = false;
        self
    }

    /// Gets the addresses that a deleted pod of this node had ([`Pod::slot`]).
    pub fn at_slot(mut self, slot: u8) -> Self {
        self.slot = Some(slot);
        self
    }

    /// Doesn't wait until the agent has proven its capture.
    pub fn unproven(mut self) -> Self {
        self.unproven = true;
        self
    }

    /// Makes it, starts its servers, and waits until the agent of its node has captured it.
    pub fn start(self) -> Result<Pod> {
        let Self { ground, namespace, name, node, .. } = self;
        ground.need_namespace(&namespace)?;
        let full = format!("{}-{namespace}-{name}", ground.claim.prefix);
        let host = ground.node(node)?;
        let slot = self.slot.unwrap_or_else(|| ground.next_slot(node));
        let (v4, v6) = host.pod_addresses(slot);
        let device = format!("pod{slot}");
        if self.slot.is_some() {
            // That of an earlier pod goes by itself with the last who has its namespace open, which may be right now.
            until(Duration::from_secs(5), &format!("an earlier {device} to go"), || {
                let _ = host.netns.batch(&[format!("link del {device}")]);
                host.netns.show(&["link", "show", &device]).is_err().then_some(())
            })?;
        }
        let netns = Netns::create(&full)?;
        netns.batch(&[
            format!("link add eth0 type veth peer name {device} netns {}", host.netns.name()),
            format!("addr add {v4}/24 dev eth0"),
            format!("addr add {v6}/64 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            format!("route add default via {}", host.gateway_v4()),
            format!("route add default via {}", host.gateway_v6()),
        ])?;
        host.netns.batch(&[format!("link set {device} master pods up")])?;
        let folder = ground.claim.cgroup.join(format!("pod-{namespace}-{name}"));
        cgroup::make(&folder)?;
        let pod = Pod {
            uid: full,
            name,
            namespace,
            service_account: self.service_account,
            node,
            slot,
            v4,
            v6,
            netns,
            cgroup: folder,
            labels: self.labels,
            container: self.container,
            annotations: Mutex::new(self.annotations),
            enrolled: Mutex::new(self.enrolled),
            processes: Mutex::new(Vec::new()),
            ground,
        };
        if !self.serves.is_empty() {
            let mut args = vec!["serve".to_owned(), "--name".to_owned(), pod.name.clone()];
            args.extend(self.serves);
            let mut server = pod.start_process("serve", binaries::lab_peer()?, &args)?;
            let first: Event = serde_json::from_str(&server.next_line(Duration::from_secs(10))?)?;
            ensure!(first == Event::Ready, "{} says {first:?}", pod.name);
            pod.processes().push(server);
        }
        pod.apply()?;
        if self.enrolled && !self.unproven {
            pod.wait_captured()?;
        }
        Ok(pod)
    }
}

/// Where a client of a pod runs, if not where the pod's processes do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Elsewhere {
    pub netns: Option<PathBuf>,
    pub cgroup: Option<PathBuf>,
}

/// A pod that exists.
#[derive(Debug)]
pub struct Pod {
    ground: Arc<Ground>,
    uid: String,
    name: String,
    namespace: String,
    service_account: String,
    node: u8,
    slot: u8,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    netns: Netns,
    cgroup: PathBuf,
    labels: BTreeMap<String, String>,
    container: Value,
    annotations: Mutex<BTreeMap<String, String>>,
    enrolled: Mutex<bool>,
    processes: Mutex<Vec<Process>>,
}

/// A lock whose holder panicked holds what it held: every value here is whole after each statement.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pod {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn node(&self) -> u8 {
        self.node
    }

    /// Which of its node's addresses it has.
    #[must_use]
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its SPIFFE id in the lab's trust domain.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("spiffe://{}/{}", crate::TRUST_DOMAIN, self.principal().split_once('/').map_or("", |(_, path)| path))
    }

    /// Its identity as an AuthorizationPolicy writes it, without `spiffe://`.
    #[must_use]
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", crate::TRUST_DOMAIN, self.namespace, self.service_account)
    }

    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its IPv4 address with this port.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// Its IPv6 address with this port.
    #[must_use]
    pub fn at6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    fn processes(&self) -> MutexGuard<'_, Vec<Process>> {
        locked(&self.processes)
    }

    /// What its servers printed so far.
    #[must_use]
    pub fn printed(&self) -> String {
        self.processes().iter().map(Process::stdout).collect()
    }

    /// Events that its servers reported so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.printed().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Starts any program inside the pod and leaves it running as long as the pod lives.
    pub fn runs<S: AsRef<OsStr>>(&self, name: &str, program: &str, args: &[S]) -> Result<()> {
        let process = self.start_process(name, program, args)?;
        self.processes().push(process);
        Ok(())
    }

    /// Starts any program inside the pod.
    pub fn start_process<S: AsRef<OsStr>>(
        &self,
        name: &str,
        program: impl AsRef<OsStr>,
        args: &[S],
    ) -> Result<Process> {
        self.start_elsewhere(&Elsewhere::default(), name, program, args)
    }

    /// Starts any program of the pod, but in another network namespace or cgroup.
    fn start_elsewhere<S: AsRef<OsStr>>(
        &self,
        elsewhere: &Elsewhere,
        name: &str,
        program: impl AsRef<OsStr>,
        args: &[S],
    ) -> Result<Process> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let name = format!("{}-{}-{name}-{}", self.namespace, self.name, COUNT.fetch_add(1, Ordering::Relaxed));
        let place = Place {
            netns: Some(elsewhere.netns.clone().unwrap_or_else(|| self.netns.path())),
            cgroup: Some(elsewhere.cgroup.clone().unwrap_or_else(|| self.cgroup.clone())),
            logs: self.ground.claim.dir.join("logs"),
            files: None,
        };
        Process::start(&place, &name, program, args)
    }

    /// Runs a program to its end and gives its stdout; a program that fails is an error.
    pub fn output<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> Result<String> {
        self.start_process("run", program, args)?.wait(Duration::from_secs(60))?.ok()
    }

    pub(crate) fn call<T>(&self, verb: &str) -> Call<'_, T> {
        Call::new(self, verb)
    }

    /// One connection.
    pub fn connect(&self, to: SocketAddr) -> Call<'_, Connected> {
        self.call("connect").with("--to", to)
    }

    /// `count` connections, `concurrent` at a time, each verified with an echoed byte.
    pub fn churn(&self, to: SocketAddr, count: u64, concurrent: u64) -> Call<'_, Churned> {
        self.call("churn").with("--to", to).with("--count", count).with("--concurrent", concurrent).within(180)
    }

    /// `count` connections to a `who` server, `concurrent` at a time: who answered, and over which way.
    pub fn tally(&self, to: SocketAddr, count: u64, concurrent: u64) -> Call<'_, Tallied> {
        self.call("tally").with("--to", to).with("--count", count).with("--concurrent", concurrent).within(180)
    }

    /// `count` connections that stay open: see [`crate::call::Holding`].
    pub fn hold(&self, to: SocketAddr, count: u64) -> Call<'_, Held> {
        self.call("hold").with("--to", to).with("--count", count).within(60)
    }

    /// `bytes` there and back at the same time, with checksums.
    pub fn transfer(&self, to: SocketAddr, bytes: u64) -> Call<'_, Transferred> {
        self.call("transfer").with("--to", to).with("--bytes", bytes).within(120)
    }

    /// One byte there and back, again and again.
    pub fn latency(&self, to: SocketAddr, count: u64) -> Call<'_, Measured> {
        self.call("latency").with("--to", to).with("--count", count).within(60)
    }

    /// Bytes one way, to a sink, as fast as they go.
    pub fn throughput(&self, to: SocketAddr, seconds: u64) -> Call<'_, Measured> {
        self.call("throughput").with("--to", to).with("--seconds", seconds).within(60 + seconds)
    }

    /// Datagrams to a UDP echo server, each answered before the next.
    pub fn datagrams(&self, to: SocketAddr, count: u64) -> Call<'_, Datagrams> {
        self.call("udp").with("--to", to).with("--count", count).within(60)
    }

    /// Answers datagrams on this port as long as the pod lives.
    pub fn echoes_datagrams(&self, port: u16) -> Result<()> {
        let args = ["--port".to_owned(), port.to_string()];
        let mut server =
            self.start_process("udp-echo", binaries::lab_peer()?, &[&["udp-echo".to_owned()], &args[..]].concat())?;
        let first: Event = serde_json::from_str(&server.next_line(Duration::from_secs(10))?)?;
        ensure!(first == Event::Ready, "{} says {first:?}", self.name);
        self.processes().push(server);
        Ok(())
    }

    /// Short connections for a time by clients that cost little.
    pub fn storm(&self, to: SocketAddr, concurrent: u32, seconds: u64) -> Call<'_, Storm> {
        self.call("storm")
            .with("--to", to)
            .with("--concurrent", concurrent)
            .with("--seconds", seconds)
            .within(60 + seconds)
    }

    /// Connections until one is carried, each tried a millisecond after the one before failed.
    pub fn first(&self, to: SocketAddr, seconds: u64) -> Call<'_, Arrived> {
        self.call("first").with("--to", to).with("--seconds", seconds).within(30 + seconds)
    }

    /// `rate` echoed requests of 256 bytes a second over `connections`; latency counts from when each was due.
    pub fn paced(&self, to: SocketAddr, (rate, connections): (u32, u32), seconds: u64) -> Call<'_, Measured> {
        let pace = self.call("paced").with("--to", to).with("--rate", rate).with("--connections", connections);
        pace.with("--size", 256).with("--seconds", seconds).within(60 + seconds)
    }

    /// HBONE by hand, with any certificate.
    pub fn speak_hbone(&self, to: SocketAddr, authority: &str) -> Call<'_, Tunnelled> {
        self.call("hbone").with("--to", to).with("--authority", authority)
    }

    /// One that yields has the lowest priority of all on this machine.
    pub(crate) fn start_lab_peer(
        &self,
        elsewhere: &Elsewhere,
        verb: &str,
        args: &[String],
        yields: bool,
    ) -> Result<Process> {
        let binary = binaries::lab_peer()?;
        if !yields {
            return self.start_elsewhere(elsewhere, verb, binary, args);
        }
        let mut all = vec!["-n".to_owned(), "19".to_owned(), binary.display().to_string()];
        all.extend_from_slice(args);
        self.start_elsewhere(elsewhere, verb, "nice", &all)
    }

    /// Waits until the agent of its node has proven its capture. A node without a running agent is passed over.
    pub fn wait_captured(&self) -> Result<()> {
        self.wait_state("captured").map(drop)
    }

    /// Waits for a state in `heddle status`; gives the reason that stands beside it.
    pub fn wait_state(&self, state: &str) -> Result<String> {
        match self.ground.running_agent(self.node) {
            Some(agent) => agent.wait_state(&self.full_name(), state),
            None => Ok(String::new()),
        }
    }

    /// Waits until `heddle status` doesn't know it any more.
    pub fn wait_forgotten(&self) -> Result<()> {
        let Some(agent) = self.ground.running_agent(self.node) else { return Ok(()) };
        let what = format!("{} to be withdrawn", self.full_name());
        until(Duration::from_secs(20), &what, || match agent.pod_state(&self.full_name()) {
            Ok(None) => Some(()),
            Ok(Some((state, _))) if !["captured", "attached", "uncaptured"].contains(&state.as_str()) => Some(()),
            _ => None,
        })
    }

    /// Opts it in, and waits until it is captured.
    pub fn enrol(&self) -> Result<()> {
        self.begin_enrolment()?;
        self.wait_captured()
    }

    /// Opts it in, and waits for nothing.
    pub fn begin_enrolment(&self) -> Result<()> {
        *locked(&self.enrolled) = true;
        self.apply()
    }

    /// Opts it out, and waits until that is done.
    pub fn withdraw(&self) -> Result<()> {
        *locked(&self.enrolled) = false;
        self.apply()?;
        self.wait_forgotten()
    }

    /// Changes an annotation of the running pod.
    pub fn annotate(&self, key: &str, value: &str) -> Result<()> {
        locked(&self.annotations).insert(key.to_owned(), value.to_owned());
        self.apply()
    }

    /// Takes an annotation off the running pod.
    pub fn unannotate(&self, key: &str) -> Result<()> {
        locked(&self.annotations).remove(key);
        self.apply()
    }

    /// Ends its servers, as a crash would; the pod itself stays.
    pub fn stop_servers(&self) -> Result<()> {
        std::mem::take(&mut *self.processes()).into_iter().try_for_each(Process::kill)
    }

    /// Deletes it: manifest, processes, cgroup, namespace. Its addresses may be given again ([`PodBuilder::at_slot`]).
    pub fn delete(self) -> Result<()> {
        self.ground.manifests.delete(&self.manifest())?;
        self.processes().clear();
        cgroup::remove(&self.cgroup)?;
        Netns::delete(self.netns.name())
    }

    /// Writes its manifest.
    pub fn apply(&self) -> Result<()> {
        self.ground.manifests.apply(&self.manifest()).with_context(|| format!("manifest of {}", self.full_name()))
    }

    fn manifest(&self) -> Value {
        let mut labels = self.labels.clone();
        let mesh = if *locked(&self.enrolled) { "enabled" } else { "disabled" };
        labels.insert("heddle.dev/mesh".to_owned(), mesh.to_owned());
        let mut annotations = BTreeMap::from([
            ("lab.heddle.dev/netns".to_owned(), self.netns.path().display().to_string()),
            ("lab.heddle.dev/cgroup".to_owned(), self.cgroup.display().to_string()),
        ]);
        annotations.extend(locked(&self.annotations).clone());
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": self.name, "namespace": self.namespace, "uid": self.uid,
                "labels": labels, "annotations": annotations,
            },
            "spec": {
                "nodeName": format!("node{}", self.node),
                "serviceAccountName": self.service_account,
                "containers": [self.container],
            },
            "status": {
                "phase": "Running",
                "podIP": self.v4, "podIPs": [{"ip": self.v4}, {"ip": self.v6}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        })
    }

    /// Everything that capture may put into the pod's namespace, as text: rules, routes of every table, sysctls.
    pub fn kernel_state(&self) -> Result<String> {
        let mut text = String::new();
        for args in [
            ["-4", "rule", "show"].as_slice(),
            &["-6", "rule", "show"],
            &["-4", "route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
        ] {
            text.push_str(&self.netns.show(args)?);
        }
        for key in ["net/ipv4/tcp_fwmark_accept", "net/ipv4/fwmark_reflect", "net/ipv4/ip_local_port_range"] {
            text.push_str(&format!("{key} = {}\n", self.netns.read_sysctl(key)?));
        }
        // Whether the link was up at that moment is not capture's doing.
        Ok(text.replace(" linkdown", ""))
    }
}
