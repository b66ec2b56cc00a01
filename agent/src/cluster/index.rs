//! Objects → snapshot, as one pure function: the same objects give the same snapshot, whatever source they came from.
//!
//! It reads no clock, file or network, and keeps nothing. Odd input gets the reading that keeps traffic protected, and a
//! warning.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{
    AnnotatedPlaces, Locality, Objects, Place, Places, PolicyGap, SameNode, Snapshot, Unattended, Warning, Workload,
    enrolment::{self, Wish},
    naming, probes, scrape, services,
};

/// Annotation on a pod: `open` or `closed`.
const WHEN_UNATTENDED: &str = "heddle.dev/when-unattended";
/// Annotation on a pod: `reset` or `keep`.
const ON_ENROL: &str = "heddle.dev/on-enrol";
/// Annotation on a namespace or pod: `mtls` or `kernel`.
pub(super) const SAME_NODE: &str = "heddle.dev/same-node";

/// Label of a node.
pub(super) const REGION: &str = "topology.kubernetes.io/region";

/// What indexing needs to know beside the objects.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Namespace whose policies without a selector hold for the whole mesh.
    pub root_namespace: Arc<str>,
    /// Trust domains that mean the same in policies, our own among them; empty where none has another name.
    pub trust_domains: Arc<[Arc<str>]>,
    /// DNS domain of the cluster's Services.
    pub cluster_domain: Arc<str>,
    /// Of pods that say nothing of it, nor their namespace.
    pub same_node: SameNode,
    pub places: Arc<dyn Places>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root_namespace: "istio-system".into(),
            trust_domains: Arc::default(),
            cluster_domain: "cluster.local".into(),
            same_node: SameNode::default(),
            places: Arc::new(AnnotatedPlaces),
        }
    }
}

/// Indexes objects. Of two objects with one name the later part's holds.
#[must_use]
pub fn index(parts: &[Arc<Objects>], settings: &Settings, generation: u64) -> Snapshot {
    Indexer::new(settings.clone()).index(parts, generation)
}

/// Indexes the same cluster again and again: what has not changed since the last time is not read anew.
#[derive(Debug)]
pub(super) struct Indexer {
    settings: Settings,
    /// By the address of the pod's object, which each entry keeps from being another's.
    pods: HashMap<usize, Indexed>,
}

/// What a pod was read as.
#[derive(Debug)]
struct Indexed {
    /// Never read: it holds the address.
    _pod: Arc<Pod>,
    namespace: Option<Arc<Namespace>>,
    workload: Option<Arc<Workload>>,
    warnings: Vec<Warning>,
}

impl Indexer {
    pub fn new(settings: Settings) -> Self {
        Self { settings, pods: HashMap::new() }
    }

    /// The snapshot of these objects: the same as of an indexer that has seen none before.
    pub fn index(&mut self, parts: &[Arc<Objects>], generation: u64) -> Snapshot {
        let mut warnings = Vec::new();
        let namespaces = by_name(parts.iter().flat_map(|part| &part.namespaces), |namespace| &namespace.metadata);
        let nodes = by_name(parts.iter().flat_map(|part| &part.nodes), |node| &node.metadata);
        let pods = by_name(parts.iter().flat_map(|part| &part.pods), |pod| &pod.metadata);

        let mut indexed = HashMap::with_capacity(pods.len());
        let mut workloads: HashMap<Arc<str>, Arc<Workload>> = HashMap::with_capacity(pods.len());
        let mut holders: HashMap<IpAddr, (&Pod, Arc<Workload>)> = HashMap::with_capacity(pods.len());
        let mut memberships = BTreeMap::new();
        for namespace in namespaces.values() {
            let labels = namespace.metadata.labels.as_ref();
            memberships.insert(name_of(&namespace.metadata).into(), enrolment::membership(labels));
            warn_of_unclear_wish("Namespace", &namespace.metadata, &mut warnings);
            if let Err(message) = same_node(&namespace.metadata) {
                let object = object("Namespace", &namespace.metadata);
                warnings.push(Warning { object, field: "metadata.annotations", message });
            }
        }
        for pod in pods.values() {
            let namespace = namespaces.get(&("", namespace_of(&pod.metadata))).copied();
            let key = Arc::as_ptr(pod).addr();
            let read = self.read(key, pod, namespace);
            warnings.extend(read.warnings.iter().cloned());
            let workload = read.workload.clone();
            indexed.insert(key, read);
            let Some(mut workload) = workload else { continue };
            if workloads.contains_key(&workload.uid) {
                let message = format!("uid {} is another pod's: known as namespace/name instead", workload.uid);
                warnings.push(Warning { object: object("Pod", &pod.metadata), field: "metadata.uid", message });
                workload = Arc::new(Workload { uid: qualified(&pod.metadata), ..Workload::clone(&workload) });
            }
            if !workload.host_network {
                for address in &workload.addresses {
                    hold(&mut holders, *address, pod, &workload, &mut warnings);
                }
            }
            workloads.insert(Arc::clone(&workload.uid), workload);
        }
        // Only what this cluster has: what is gone is forgotten.
        self.pods = indexed;

        let settings = &self.settings;
        let (services, by_cluster_address) = services::index(parts, &pods, &nodes, settings, &mut warnings);
        let mut invalid: Vec<_> = parts.iter().flat_map(|part| &part.invalid_policies).cloned().collect();
        invalid.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Snapshot {
            generation,
            workloads,
            by_address: holders.into_iter().map(|(address, (_, workload))| (address, workload)).collect(),
            services,
            by_cluster_address,
            authorization_policies: in_order(parts.iter().flat_map(|part| &part.authorization_policies), |policy| {
                &policy.metadata
            }),
            peer_authentications: in_order(parts.iter().flat_map(|part| &part.peer_authentications), |policy| {
                &policy.metadata
            }),
            invalid_policies: invalid,
            policy_gaps: parts.iter().flat_map(|part| &part.policy_gaps).map(|gap| whole_mesh(gap, settings)).collect(),
            root_namespace: Arc::clone(&settings.root_namespace),
            trust_domains: Arc::clone(&settings.trust_domains),
            localities: Arc::new(nodes.values().filter_map(|node| locality(&node.metadata)).collect()),
            namespaces: Arc::new(memberships),
            warnings,
        }
    }

    /// What the pod is, by what it was if neither it, its namespace nor its place is another.
    fn read(&mut self, key: usize, pod: &Arc<Pod>, namespace: Option<&Arc<Namespace>>) -> Indexed {
        let place = self.settings.places.locate(pod);
        let same = |before: Option<&Arc<Namespace>>| match (before, namespace) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            (before, now) => before.is_none() && now.is_none(),
        };
        // One that was no workload may become one by a place that has its address.
        let unmoved = |known: &Indexed| match &known.workload {
            Some(workload) => workload.place == place,
            None => place.is_none(),
        };
        if let Some(known) = self.pods.remove(&key).filter(|known| same(known.namespace.as_ref()) && unmoved(known)) {
            return known;
        }
        let mut warnings = Vec::new();
        let (of, same_node) = (namespace.map(|found| &found.metadata), self.settings.same_node);
        let workload = workload(pod, of, place, same_node, &mut warnings).map(Arc::new);
        Indexed { _pod: Arc::clone(pod), namespace: namespace.cloned(), workload, warnings }
    }
}

/// What may be missing from the root namespace may be missing everywhere.
fn whole_mesh(gap: &Arc<PolicyGap>, settings: &Settings) -> Arc<PolicyGap> {
    match &gap.namespace {
        Some(namespace) if **namespace == *settings.root_namespace => {
            Arc::new(PolicyGap { source: Arc::clone(&gap.source), namespace: None })
        }
        _ => Arc::clone(gap),
    }
}

/// Name and place of a node that says where it is.
fn locality(node: &ObjectMeta) -> Option<(Arc<str>, Locality)> {
    let labels = node.labels.as_ref()?;
    let label = |key| labels.get(key).map(String::as_str).unwrap_or_default();
    let (region, zone) = (label(REGION), label(services::ZONE));
    let known = !region.is_empty() || !zone.is_empty();
    known.then(|| (name_of(node).into(), Locality { region: region.into(), zone: zone.into() }))
}

/// Objects by (namespace, name); a later one replaces an earlier one.
pub(super) type ByName<'a, T> = BTreeMap<(&'a str, &'a str), &'a Arc<T>>;

pub(super) fn by_name<'a, T>(all: impl Iterator<Item = &'a Arc<T>>, metadata: fn(&T) -> &ObjectMeta) -> ByName<'a, T> {
    all.map(|one| ((namespace_of(metadata(one)), name_of(metadata(one))), one)).collect()
}

/// Oldest first, then by name: the order in which Istio lets policies win. One without a time is older than any with one.
fn in_order<'a, T: 'a>(all: impl Iterator<Item = &'a Arc<T>>, metadata: fn(&T) -> &ObjectMeta) -> Vec<Arc<T>> {
    let mut policies: Vec<_> = by_name(all, metadata).into_values().cloned().collect();
    policies.sort_by(|a, b| age(metadata(a)).cmp(&age(metadata(b))));
    policies
}

/// What sorts older objects first.
pub(super) fn age(metadata: &ObjectMeta) -> impl Ord + '_ {
    (metadata.creation_timestamp.as_ref().map(|time| time.0), name_of(metadata), namespace_of(metadata))
}

pub(super) fn namespace_of(metadata: &ObjectMeta) -> &str {
    metadata.namespace.as_deref().unwrap_or_default()
}

pub(super) fn name_of(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}

/// `namespace/name`.
pub(super) fn qualified(metadata: &ObjectMeta) -> Arc<str> {
    format!("{}/{}", namespace_of(metadata), name_of(metadata)).into()
}

/// `Kind namespace/name`, for messages.
pub(super) fn object(kind: &str, metadata: &ObjectMeta) -> String {
    match &metadata.namespace {
        Some(namespace) => format!("{kind} {namespace}/{}", name_of(metadata)),
        None => format!("{kind} {}", name_of(metadata)),
    }
}

/// Gives an address to the pod, unless another pod has the better claim: one that is not terminating, then the newer one.
fn hold<'a>(
    holders: &mut HashMap<IpAddr, (&'a Pod, Arc<Workload>)>,
    address: IpAddr,
    pod: &'a Pod,
    workload: &Arc<Workload>,
    warnings: &mut Vec<Warning>,
) {
    let claim = |pod: &Pod, workload: &Workload| {
        (!workload.terminating, pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
    };
    let Some((held_by, holder)) = holders.get(&address) else {
        holders.insert(address, (pod, Arc::clone(workload)));
        return;
    };
    if holder.uid == workload.uid {
        return;
    }
    let (winner, loser) = if claim(pod, workload) > claim(held_by, holder) {
        let loser = Arc::clone(holder);
        holders.insert(address, (pod, Arc::clone(workload)));
        (Arc::clone(workload), loser)
    } else {
        (Arc::clone(holder), Arc::clone(workload))
    };
    warnings.push(Warning {
        object: format!("Pod {}/{}", loser.namespace, loser.name),
        field: "status.podIPs",
        message: format!("{address} is also the address of Pod {}/{}, which holds it", winner.namespace, winner.name),
    });
}

/// The record of a pod; `None` while it has no address, and once it is finished.
fn workload(
    pod: &Pod,
    namespace: Option<&ObjectMeta>,
    place: Option<Place>,
    same_node: SameNode,
    warnings: &mut Vec<Warning>,
) -> Option<Workload> {
    let status = pod.status.as_ref();
    if matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed")) {
        return None;
    }
    // What the CNI has just said is newer than what the status says.
    let addresses = match &place {
        Some(Place { addresses, .. }) if !addresses.is_empty() => addresses.clone(),
        _ => addresses(pod),
    };
    if addresses.is_empty() {
        return None;
    }
    warn_of_unclear_wish("Pod", &pod.metadata, warnings);
    let spec = pod.spec.as_ref();
    let ready =
        |condition: &k8s_openapi::api::core::v1::PodCondition| condition.type_ == "Ready" && condition.status == "True";
    let non_empty = |text: Option<&String>| text.filter(|text| !text.is_empty()).cloned();
    Some(Workload {
        uid: non_empty(pod.metadata.uid.as_ref()).map_or_else(|| qualified(&pod.metadata), Arc::from),
        name: name_of(&pod.metadata).into(),
        namespace: namespace_of(&pod.metadata).into(),
        service_account: non_empty(spec.and_then(|spec| spec.service_account_name.as_ref()))
            .map_or_else(|| "default".into(), Arc::from),
        node: non_empty(spec.and_then(|spec| spec.node_name.as_ref())).unwrap_or_default().into(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        enrolled: enrolment::enrolled(pod, namespace.and_then(|namespace| namespace.labels.as_ref())),
        host_network: enrolment::host_network(pod),
        ready: status.and_then(|status| status.conditions.as_ref()).into_iter().flatten().any(ready),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        when_unattended: when_unattended(pod, warnings),
        same_node: same_node_of(pod, namespace, same_node, warnings),
        reset_on_enrol: reset_on_enrol(pod, warnings),
        naming: naming::name(pod),
        // Of pods of other nodes a source may not have kept what these are read from.
        probes: if place.is_some() { probes::ports(pod, &addresses) } else { BTreeSet::new() },
        metrics: if place.is_some() { scrape::target(pod, warnings) } else { None },
        place,
        addresses,
    })
}

/// `status.podIPs`, else `status.podIP`, without what is no address (`read` refuses such a pod).
fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = pod.status.as_ref() else { return Vec::new() };
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).chain(status.pod_ip.as_deref());
    let mut addresses = Vec::new();
    for address in all.filter_map(|text| text.parse::<IpAddr>().ok()).map(|address| address.to_canonical()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

fn reset_on_enrol(pod: &Pod, warnings: &mut Vec<Warning>) -> bool {
    match pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(ON_ENROL)).map(String::as_str) {
        None | Some("keep") => false,
        Some("reset") => true,
        Some(other) => {
            let message =
                format!("{ON_ENROL}: {other:?} is neither reset nor keep: taken as keep; write one of the two");
            warnings.push(Warning { object: object("Pod", &pod.metadata), field: "metadata.annotations", message });
            false
        }
    }
}

fn when_unattended(pod: &Pod, warnings: &mut Vec<Warning>) -> Unattended {
    match pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(WHEN_UNATTENDED)).map(String::as_str)
    {
        None | Some("closed") => Unattended::Closed,
        Some("open") => Unattended::Open,
        Some(other) => {
            let message = format!("{WHEN_UNATTENDED}: {other:?} is neither open nor closed: taken as closed");
            warnings.push(Warning { object: object("Pod", &pod.metadata), field: "metadata.annotations", message });
            Unattended::Closed
        }
    }
}

/// The pod's word, else its namespace's, else what holds for all. What is said badly means the one that asks more: mutual TLS.
fn same_node_of(pod: &Pod, namespace: Option<&ObjectMeta>, unsaid: SameNode, warnings: &mut Vec<Warning>) -> SameNode {
    match same_node(&pod.metadata) {
        Ok(Some(said)) => said,
        // An unclear word of the namespace is warned of once, with the namespace.
        Ok(None) => namespace.map_or(Ok(None), same_node).unwrap_or(Some(SameNode::Mtls)).unwrap_or(unsaid),
        Err(message) => {
            warnings.push(Warning { object: object("Pod", &pod.metadata), field: "metadata.annotations", message });
            SameNode::Mtls
        }
    }
}

/// What the annotation says; `Err` is what is wrong with it.
fn same_node(metadata: &ObjectMeta) -> Result<Option<SameNode>, String> {
    match metadata.annotations.as_ref().and_then(|annotations| annotations.get(SAME_NODE)).map(String::as_str) {
        None => Ok(None),
        Some("kernel") => Ok(Some(SameNode::Kernel)),
        Some("mtls") => Ok(Some(SameNode::Mtls)),
        Some(other) => {
            Err(format!("{SAME_NODE}: {other:?} is neither mtls nor kernel: taken as mtls; write one of the two"))
        }
    }
}

fn warn_of_unclear_wish(kind: &str, metadata: &ObjectMeta, warnings: &mut Vec<Warning>) {
    if enrolment::wish(metadata.labels.as_ref()) == Wish::Unclear {
        let message = format!("{} is neither enabled nor disabled: taken as absent", enrolment::MESH);
        warnings.push(Warning { object: object(kind, metadata), field: "metadata.labels", message });
    }
}

#[cfg(test)]
mod tests;
