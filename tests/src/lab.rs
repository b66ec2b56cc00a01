//! A lab: two nodes, a CA, an agent per node, pods and Services; removed when it is dropped, also by a panic.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use serde_json::Value;
use time::Duration;

use crate::{
    agent::{Agent, AgentOptions, Ca, TRUST_DOMAIN},
    apiserver::ApiServer,
    capture::Recording,
    certificates::{Root, replace},
    containerd::{AGENT_ARGS, CniFolders},
    kubernetes::Kubernetes,
    manifests::{self, Manifests},
    node::Node,
    pod::{Pod, PodBuilder},
    service::{Backend, Service},
    state::Claim,
};

/// Port of the lab's CA.
const CA_PORT: u16 = 15012;

/// File of the revocation lists, below the lab's folder.
const CRL: &str = "crl.pem";

/// What every part of a lab stands on.
#[derive(Debug)]
pub struct Ground {
    pub claim: Claim,
    pub manifests: Manifests,
    nodes: Vec<Node>,
    agents: BTreeMap<u8, Agent>,
    namespaces: Mutex<BTreeSet<String>>,
    slots: [AtomicU8; 2],
    services: AtomicU8,
}

impl Ground {
    pub(crate) fn node(&self, number: u8) -> Result<&Node> {
        self.nodes.iter().find(|node| node.number == number).with_context(|| format!("no node {number} in this lab"))
    }

    pub(crate) fn next_slot(&self, node: u8) -> u8 {
        self.slots[usize::from(node - 1)].fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn next_service(&self) -> u8 {
        self.services.fetch_add(1, Ordering::Relaxed)
    }

    /// The agent of a node, where it runs.
    pub(crate) fn running_agent(&self, node: u8) -> Option<&Agent> {
        self.agents.get(&node).filter(|agent| agent.daemon.pid().is_some())
    }

    /// Writes the Namespace, enrolled, when it is first spoken of.
    pub(crate) fn need_namespace(&self, name: &str) -> Result<()> {
        let fresh = self.namespaces.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
        if fresh { self.manifests.apply(&manifests::namespace(name, true)) } else { Ok(()) }
    }
}

/// What a lab is made of.
#[derive(Debug, Clone)]
pub struct LabBuilder {
    nodes: u8,
    agents: Vec<u8>,
    options: AgentOptions,
    /// Revocation lists are asked for, and what happens while they can't be used.
    crl: Option<String>,
    /// Nodes have folders of CNI plugins and configuration, for a containerd.
    containers: bool,
    /// Agents follow an API server.
    kubernetes: bool,
    logs_in_memory: bool,
}

impl LabBuilder {
    /// One node or two.
    #[must_use]
    pub fn nodes(mut self, count: u8) -> Self {
        self.nodes = count.clamp(1, 2);
        self.agents.retain(|node| *node <= count);
        self
    }

    /// Nodes whose agent runs; none of them for a lab without a mesh.
    #[must_use]
    pub fn agents_on(mut self, nodes: &[u8]) -> Self {
        self.agents = nodes.to_vec();
        self
    }

    /// Lifetime of the certificates that the agents ask for, such as `20s`.
    #[must_use]
    pub fn certificate_lifetime(mut self, lifetime: &str) -> Self {
        lifetime.clone_into(&mut self.options.certificate_lifetime);
        self
    }

    #[must_use]
    pub fn drain_grace(mut self, grace: &str) -> Self {
        grace.clone_into(&mut self.options.drain_grace);
        self
    }

    /// Most open files of every agent.
    #[must_use]
    pub fn files(mut self, count: u64) -> Self {
        self.options.files = Some(count);
        self
    }

    /// Agents follow the revocation lists in [`Lab::crl`]; `failure` is what they do while they can't, `refuse` or `last-good`.
    #[must_use]
    pub fn revocation(mut self, failure: &str) -> Self {
        self.crl = Some(failure.to_owned());
        self
    }

    /// Nodes are made for a containerd each ([`crate::containerd::Containerd`]), and agents find pods by their cgroups.
    #[must_use]
    pub fn containers(mut self) -> Self {
        self.containers = true;
        self.agent_args(&AGENT_ARGS)
    }

    /// Agents follow an API server, which stands on node 1, instead of the manifests.
    #[must_use]
    pub fn kubernetes(mut self) -> Self {
        self.kubernetes = true;
        self
    }

    /// No log touches a disk.
    #[must_use]
    pub fn logs_in_memory(mut self) -> Self {
        self.logs_in_memory = true;
        self
    }

    /// More arguments for every agent.
    #[must_use]
    pub fn agent_args(mut self, args: &[&str]) -> Self {
        self.options.extra.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// What every agent is run by, with arguments: something that becomes the agent.
    #[must_use]
    pub fn agents_under(mut self, wrapper: &[&str]) -> Self {
        self.options.wrapper = wrapper.iter().map(|part| (*part).to_owned()).collect();
        self
    }

    /// Builds it, and waits until CA and agents are ready.
    pub fn start(self) -> Result<Lab> {
        raise_file_limit()?;
        crate::state::sweep()?;
        let claim = Claim::new()?;
        // From here on the lab is dropped, and so removed, whatever fails.
        let mut lab = Lab { ground: Arc::new(Ground::empty(claim)?), ca: None, root: None, keep: false, hushed: false };
        if self.logs_in_memory {
            lab.ground.claim.logs_in_memory()?;
        }
        lab.raise(&self)?;
        Ok(lab)
    }
}

impl Ground {
    fn empty(claim: Claim) -> Result<Self> {
        fs::create_dir_all(claim.logs())?;
        let manifests = Manifests::create(&claim.dir)?;
        Ok(Self {
            claim,
            manifests,
            nodes: Vec::new(),
            agents: BTreeMap::new(),
            namespaces: Mutex::default(),
            slots: [AtomicU8::new(1), AtomicU8::new(1)],
            services: AtomicU8::new(10),
        })
    }
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    ground: Arc<Ground>,
    ca: Option<Ca>,
    root: Option<Root>,
    keep: bool,
    hushed: bool,
}

impl Lab {
    /// Two nodes with an agent each.
    pub fn two_nodes() -> Result<Self> {
        Self::builder().start()
    }

    /// One node with an agent.
    pub fn one_node() -> Result<Self> {
        Self::builder().nodes(1).start()
    }

    /// Two nodes and no mesh: what the lab itself is tested and measured with.
    pub fn without_mesh() -> Result<Self> {
        Self::builder().agents_on(&[]).start()
    }

    #[must_use]
    pub fn builder() -> LabBuilder {
        LabBuilder {
            nodes: 2,
            agents: vec![1, 2],
            options: AgentOptions::default(),
            crl: None,
            containers: false,
            kubernetes: false,
            logs_in_memory: false,
        }
    }

    fn raise(&mut self, wanted: &LabBuilder) -> Result<()> {
        // Nothing else holds the ground yet: pods come after this.
        let ground = Arc::get_mut(&mut self.ground).context("a lab is raised once")?;
        for number in 1..=wanted.nodes {
            let node = Node::create(&ground.claim.prefix, number)?;
            if wanted.containers {
                CniFolders::of(&ground.claim.dir, &node.name()).write(&node)?;
            }
            ground.nodes.push(node);
        }
        if let [first, second] = ground.nodes.as_slice() {
            first.join(second)?;
        }
        // With one node there is no link and no link address: the bridge's serves.
        let first = ground.node(1)?;
        let host = if wanted.nodes == 1 { first.gateway_v4() } else { first.v4() };
        if wanted.kubernetes {
            let kubernetes = Kubernetes::start(first, host, &ground.claim.dir)?;
            ground.manifests.serve(Arc::new(kubernetes));
        }
        for node in &ground.nodes {
            ground.manifests.apply(&manifests::node(&node.name(), &node.addresses()))?;
        }
        let root = Root::create(&ground.claim.dir, "root", TRUST_DOMAIN)?;
        if !wanted.agents.is_empty() {
            let first = ground.node(1)?;
            let claim = &ground.claim;
            let ca = Ca::new(
                &first.netns,
                SocketAddr::from((host, CA_PORT)),
                &claim.cgroup,
                &claim.dir,
                &root.certificate,
                &root.key,
            )?;
            ca.start()?;
            let mut options = wanted.options.clone();
            options.kubeconfig = ground.manifests.kubernetes().map(|kubernetes| kubernetes.kubeconfig().to_owned());
            if let Some(failure) = &wanted.crl {
                let path = claim.dir.join(CRL);
                replace(&path, &root.crl(&[], Duration::hours(1))?)?;
                let path = path.to_str().context("the lab's folder is not UTF-8")?.to_owned();
                options.extra.extend(["--crl".to_owned(), path, "--crl-failure".to_owned(), failure.clone()]);
            }
            let mut agents = BTreeMap::new();
            for number in &wanted.agents {
                let agent = Agent::new(
                    ground.node(*number)?,
                    &ca,
                    ground.manifests.dir(),
                    &claim.cgroup,
                    &claim.dir,
                    &claim.bpffs(),
                    &options,
                )?;
                agents.insert(*number, agent);
            }
            ground.agents = agents;
            for agent in ground.agents.values() {
                agent.start()?;
            }
            self.ca = Some(ca);
        }
        self.root = Some(root);
        Ok(())
    }

    /// Describes a pod; its service account has its name, it is enrolled and on node 1 unless said otherwise.
    pub fn pod(&self, namespace: &str, name: &str) -> PodBuilder {
        PodBuilder::new(Arc::clone(&self.ground), namespace, name)
    }

    /// A Service with one port and these pods behind it.
    pub fn service(&self, namespace: &str, name: &str, ports: (u16, u16), pods: &[&Pod]) -> Result<Service> {
        let backends: Vec<Backend> = pods.iter().map(|pod| Backend::from(*pod)).collect();
        Service::create(Arc::clone(&self.ground), (namespace, name), ports, &backends)
    }

    /// The agent of a node.
    pub fn agent(&self, node: u8) -> Result<&Agent> {
        self.ground.agents.get(&node).with_context(|| format!("no agent on node {node}"))
    }

    pub fn node(&self, number: u8) -> Result<&Node> {
        self.ground.node(number)
    }

    pub fn ca(&self) -> Result<&Ca> {
        self.ca.as_ref().context("this lab has no CA")
    }

    /// The mesh's root, to sign with.
    pub fn root(&self) -> Result<&Root> {
        self.root.as_ref().context("this lab has no root")
    }

    /// The API server, with [`LabBuilder::kubernetes`].
    pub fn kubernetes(&self) -> Result<&ApiServer> {
        Ok(self.manifests().kubernetes().context("this lab has no API server")?.api())
    }

    #[must_use]
    pub fn manifests(&self) -> &Manifests {
        &self.ground.manifests
    }

    /// Where agents look for revocation lists, with [`LabBuilder::revocation`].
    #[must_use]
    pub fn crl(&self) -> PathBuf {
        self.dir().join(CRL)
    }

    /// Revokes these certificates, by serial numbers in hex, and no other.
    pub fn revoke(&self, serials: &[String]) -> Result<()> {
        replace(&self.crl(), &self.root()?.crl(serials, Duration::hours(1))?)
    }

    /// Folder of the lab's files: logs, manifests, certificates.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.ground.claim.dir
    }

    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.ground.claim.prefix
    }

    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.ground.claim
    }

    /// Writes the Namespace, enrolled, when it is first spoken of.
    pub fn need_namespace(&self, name: &str) -> Result<()> {
        self.ground.need_namespace(name)
    }

    /// Writes or replaces an AuthorizationPolicy.
    pub fn authorize(&self, namespace: &str, name: &str, spec: &Value) -> Result<()> {
        self.ground.need_namespace(namespace)?;
        self.manifests().apply(&manifests::authorization_policy(namespace, name, spec))
    }

    /// Takes an AuthorizationPolicy away.
    pub fn unauthorize(&self, namespace: &str, name: &str) -> Result<()> {
        self.manifests().delete(&manifests::authorization_policy(namespace, name, &Value::Null))
    }

    /// Writes or replaces a PeerAuthentication.
    pub fn require(&self, namespace: &str, name: &str, spec: &Value) -> Result<()> {
        self.ground.need_namespace(namespace)?;
        self.manifests().apply(&manifests::peer_authentication(namespace, name, spec))
    }

    /// Takes a PeerAuthentication away.
    pub fn unrequire(&self, namespace: &str, name: &str) -> Result<()> {
        self.manifests().delete(&manifests::peer_authentication(namespace, name, &Value::Null))
    }

    /// Records every packet on the link between the nodes.
    pub fn record(&self) -> Result<Recording> {
        Recording::start(self.ground.node(1)?, &self.ground.claim)
    }

    /// Stays when this process ends: prints nothing, removes nothing.
    pub fn keep(&mut self) -> Result<()> {
        self.ground.claim.keep()?;
        self.keep = true;
        Ok(())
    }

    /// Doesn't print logs when it is dropped.
    pub fn hush(&mut self) {
        self.hushed = true;
    }

    /// Removes nothing when it is dropped, because it was removed by other means.
    pub fn forget(&mut self) {
        self.keep = true;
    }

    /// Ends agents and CA with SIGTERM, then removes everything, and says what went wrong, which a drop can't.
    pub fn remove(self) -> Result<()> {
        self.stop_daemons();
        self.ground.claim.release()
    }

    fn stop_daemons(&self) {
        thread::scope(|scope| {
            for agent in self.ground.agents.values() {
                scope.spawn(|| agent.daemon.stop());
            }
        });
        if let Some(ca) = &self.ca {
            ca.daemon.stop();
        }
    }

    /// The end of every log, on stderr.
    pub fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(self.dir().join("logs")) else { return };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let daemon = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| ["agent-", "ca.", "access-"].iter().any(|prefix| name.starts_with(prefix)));
            let text = fs::read_to_string(&path).unwrap_or_default();
            if daemon && !text.is_empty() {
                let lines: Vec<&str> = text.lines().collect();
                let tail = lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n");
                eprintln!("--- end of {}\n{tail}", path.display());
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // A test that returns an error is not known to fail yet. The harness shows this only of those that do.
        if !self.hushed {
            self.print_logs();
        }
        if let Err(error) = self.ground.claim.release() {
            eprintln!("{}: {error:#}", self.prefix());
        }
    }
}

/// A thousand connections of a lab take more descriptors than the usual soft limit; children inherit the raised one.
fn raise_file_limit() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")
}
