//! The cluster as every other stage reads it: one immutable, indexed snapshot, replaced whole.
//!
//! Sources (a manifest directory, the API server) produce it through [`super::index`]; readers take an `Arc` and never
//! see it change. It holds no secret and refers to nothing outside itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::kinds::{AuthorizationPolicy, PeerAuthentication};

/// Every pod, Service and policy that the mesh knows of at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Rises with each snapshot of one process.
    pub generation: u64,
    /// Every pod with an address that is not finished, by uid, host-network pods included.
    pub workloads: HashMap<Arc<str>, Arc<Workload>>,
    /// Pods by address. Host-network pods are not in it: their address is the node's.
    pub by_address: HashMap<IpAddr, Arc<Workload>>,
    /// Services by `namespace/name`.
    pub services: HashMap<Arc<str>, Arc<Service>>,
    /// Services by cluster address.
    pub by_cluster_address: HashMap<IpAddr, Arc<Service>>,
    /// Policies as written, in order of creation, then name.
    pub authorization_policies: Vec<Arc<AuthorizationPolicy>>,
    pub peer_authentications: Vec<Arc<PeerAuthentication>>,
    /// Policies that could not be read as their kind. Carried, so that `policy` can deny where they hold.
    pub invalid_policies: Vec<Arc<InvalidPolicy>>,
    /// Where policies may be missing, because what held them could not be read.
    pub policy_gaps: Vec<Arc<PolicyGap>>,
    /// Namespace whose policies without a selector hold for the whole mesh.
    pub root_namespace: Arc<str>,
    /// Trust domains that mean the same in policies, our own among them; empty where none has another name.
    pub trust_domains: Arc<[Arc<str>]>,
    /// Where nodes are, by name; nodes that don't say are left out.
    pub localities: Arc<HashMap<Arc<str>, Locality>>,
    /// The namespaces that there are, and what each says of its pods.
    pub namespaces: Arc<BTreeMap<Arc<str>, Membership>>,
    /// What indexing found odd, and how it took it. For people: nothing decides by them.
    pub warnings: Vec<Warning>,
}

impl Snapshot {
    /// The addresses whose connections an enrolled pod hands to the agent: enrolled pods and Services.
    pub fn mesh_destinations(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let pods = self.by_address.iter().filter(|(_, workload)| workload.enrolled).map(|(address, _)| *address);
        pods.chain(self.by_cluster_address.keys().copied())
    }

    /// Whether both say the same of the cluster, whatever their generations.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        let Self {
            generation: _,
            workloads,
            by_address,
            services,
            by_cluster_address,
            authorization_policies,
            peer_authentications,
            invalid_policies,
            policy_gaps,
            root_namespace,
            trust_domains,
            localities,
            namespaces,
            warnings,
        } = self;
        *workloads == other.workloads
            && *by_address == other.by_address
            && *services == other.services
            && *by_cluster_address == other.by_cluster_address
            && *authorization_policies == other.authorization_policies
            && *peer_authentications == other.peer_authentications
            && *invalid_policies == other.invalid_policies
            && *policy_gaps == other.policy_gaps
            && *root_namespace == other.root_namespace
            && *trust_domains == other.trust_domains
            && *localities == other.localities
            && *namespaces == other.namespaces
            && *warnings == other.warnings
    }
}

/// An AuthorizationPolicy or PeerAuthentication with a field that heddle does not know, or of a wrong type. Losing it
/// could allow what it denies, so it stays in the snapshot as far as it could be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvalidPolicy {
    pub kind: PolicyKind,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// `spec.selector.matchLabels` where readable; `None` is everything in the namespace (of the root namespace: in the
    /// mesh).
    pub selector: Option<BTreeMap<String, String>>,
    /// Path of the field, such as `spec.rules[0].from[0].source.principles`.
    pub field: String,
    pub message: String,
    /// False where the policy, as far as it is readable, decides nothing here: `istio.io/dry-run`, or `targetRefs`.
    pub decides: bool,
}

impl InvalidPolicy {
    /// `Kind namespace/name`.
    #[must_use]
    pub fn object(&self) -> String {
        format!("{} {}/{}", self.kind.as_str(), self.namespace, self.name)
    }
}

/// A part of the source that could not be read since the agent started, so that there is no earlier state to go on with: it
/// may hold policies. Absent is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyGap {
    /// The file.
    pub source: Arc<str>,
    /// The namespace that the part names; `None` where nobody can say, which is every namespace.
    pub namespace: Option<Arc<str>>,
}

impl PolicyGap {
    /// Which workloads it is about, for people.
    #[must_use]
    pub fn place(&self) -> String {
        self.namespace.as_ref().map_or_else(|| "every pod of the node".into(), |name| format!("namespace {name}"))
    }
}

/// The kinds of policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PolicyKind {
    AuthorizationPolicy,
    PeerAuthentication,
}

impl PolicyKind {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
        }
    }
}

/// Something odd in the objects that has a safe reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// `Kind namespace/name`.
    pub object: String,
    pub field: &'static str,
    /// What is odd and how it was taken.
    pub message: String,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// `metadata.uid`; `namespace/name` where a manifest has none.
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// `spec.serviceAccountName`, `default` where absent.
    pub service_account: Arc<str>,
    /// `spec.nodeName`, empty while unscheduled.
    pub node: Arc<str>,
    /// `status.podIPs`, or what the pod's CNI has just made.
    pub addresses: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    /// Opted in by label, and not on the host's network.
    pub enrolled: bool,
    pub host_network: bool,
    /// Condition `Ready` is true.
    pub ready: bool,
    /// `metadata.deletionTimestamp` is set.
    pub terminating: bool,
    pub when_unattended: Unattended,
    pub same_node: SameNode,
    /// Connections that are older than its enrolment are reset when it is enrolled (`heddle.dev/on-enrol: reset`).
    pub reset_on_enrol: bool,
    /// Names for telemetry, derived from labels and owner as Istio does.
    pub naming: Naming,
    /// Where the node keeps the pod, as far as a manifest can say it.
    pub place: Option<Place>,
    /// Ports that the kubelet connects to by the pod's spec.
    pub probes: BTreeSet<u16>,
    /// How its own metrics are scraped; `None` where its annotations don't ask for it.
    pub metrics: Option<ScrapeTarget>,
}

/// Where a pod serves its metrics, over plain HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrapeTarget {
    pub port: u16,
    /// With its leading slash, and a query where the annotation has one.
    pub path: Arc<str>,
}

#[cfg(test)]
impl Workload {
    /// A ready, enrolled pod that is its own workload and service account, for tests.
    pub fn named(namespace: &str, name: &str) -> Self {
        Self {
            uid: format!("uid-{name}").into(),
            name: name.into(),
            namespace: namespace.into(),
            service_account: name.into(),
            node: "node-1".into(),
            addresses: Vec::new(),
            labels: BTreeMap::new(),
            enrolled: true,
            host_network: false,
            ready: true,
            terminating: false,
            when_unattended: Unattended::Closed,
            same_node: SameNode::Kernel,
            reset_on_enrol: false,
            naming: Naming::default(),
            place: None,
            probes: BTreeSet::new(),
            metrics: None,
        }
    }
}

/// What the kernel does with new connections of a pod while no agent serves it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Unattended {
    /// Refuse them.
    #[default]
    Closed,
    /// Let them pass as if the pod were not enrolled (`heddle.dev/when-unattended: open`).
    Open,
}

/// What protects a pod's connections with other enrolled pods of its node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SameNode {
    /// The kernel attests who connects, and no byte leaves the host.
    #[default]
    Kernel,
    /// Mutual TLS, as between nodes (`heddle.dev/same-node: mtls`).
    Mtls,
}

/// What a namespace says of its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// They are in the mesh, unless they opt out.
    Enrolled,
    /// They are not, unless they opt in.
    Unsaid,
    /// None of them is.
    OptedOut,
}

/// How telemetry calls a workload. Empty means unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Naming {
    /// Owner's name (Deployment, Job, …) or the pod's own.
    pub workload: Arc<str>,
    /// One of `deployment`, `cronjob`, `job`, `pod`: the key in `baggage`.
    pub workload_kind: &'static str,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    /// Labels `app` / `app.kubernetes.io/name` and `version` / `app.kubernetes.io/version`.
    pub app: Arc<str>,
    pub version: Arc<str>,
}

/// A pod's netns and cgroup on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// File that opens the network namespace, such as `/var/run/netns/x` or `/proc/<pid>/ns/net`.
    pub netns: PathBuf,
    /// Inode of that network namespace, where it is known: a pid may be given again before the file is opened.
    pub netns_inode: Option<u64>,
    /// Folder in a cgroup v2 hierarchy that holds every process of the pod.
    pub cgroup: PathBuf,
    /// The pod's addresses as its CNI made them, before the API server knows any; empty where the pod's status says it.
    pub addresses: Vec<IpAddr>,
}

/// A Kubernetes Service with its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// `<name>.<namespace>.svc.cluster.local`.
    pub hostname: Arc<str>,
    /// `spec.clusterIPs`, without `None`.
    pub cluster_addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// From all EndpointSlices of the Service. [`super::candidates`] says which of them may be chosen.
    pub endpoints: Vec<Endpoint>,
    /// `spec.internalTrafficPolicy: Local`: endpoints of the client's node, or none.
    pub local_only: bool,
    pub distribution: Distribution,
    /// `spec.publishNotReadyAddresses`: endpoints count whatever is said of their readiness.
    pub publish_not_ready: bool,
}

#[cfg(test)]
impl Service {
    /// A Service with neither addresses, ports nor endpoints, for tests.
    pub fn named(namespace: &str, name: &str) -> Self {
        Self {
            name: name.into(),
            namespace: namespace.into(),
            hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
            cluster_addresses: Vec::new(),
            ports: Vec::new(),
            endpoints: Vec::new(),
            local_only: false,
            distribution: Distribution::Even,
            publish_not_ready: false,
        }
    }
}

/// Which endpoints are preferred while there are any (`spec.trafficDistribution`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Distribution {
    /// None.
    #[default]
    Even,
    /// Those of the client's zone (`PreferSameZone`, `PreferClose`).
    SameZone,
    /// Those of the client's node, then those of its zone (`PreferSameNode`).
    SameNode,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Empty for an unnamed port; joins with [`Endpoint::ports`].
    pub name: Arc<str>,
    pub port: u16,
}

/// One address of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    /// TCP ports of the endpoint by Service port name.
    pub ports: BTreeMap<Arc<str>, u16>,
    pub ready: bool,
    pub terminating: bool,
    pub node: Arc<str>,
    pub zone: Arc<str>,
}

/// Where a node is, by its `topology.kubernetes.io` labels; empty where it does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
}

/// The current snapshot and its changes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View(watch::Receiver<Arc<Snapshot>>);

impl View {
    #[must_use]
    pub fn new(receiver: watch::Receiver<Arc<Snapshot>>) -> Self {
        Self(receiver)
    }

    /// The snapshot in force.
    #[must_use]
    pub fn load(&self) -> Arc<Snapshot> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits for the next snapshot; `None` when the source has ended.
    pub async fn next(&mut self) -> Option<Arc<Snapshot>> {
        self.0.changed().await.ok()?;
        Some(Arc::clone(&self.0.borrow_and_update()))
    }
}
