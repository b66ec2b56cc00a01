//! Services and their EndpointSlices, joined.
//!
//! Every endpoint is kept, with its conditions: `endpoints` says which of them may be chosen. UDP and SCTP ports are not heddle's.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Node, Pod, Service as KubeService},
    discovery::v1::{Endpoint as KubeEndpoint, EndpointSlice},
};

use super::{
    Distribution, Endpoint, Objects, Service, ServicePort, Settings, Warning,
    index::{ByName, age, by_name, name_of, namespace_of, object, qualified},
};

/// Label of an EndpointSlice that names its Service.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label of a Node.
pub(super) const ZONE: &str = "topology.kubernetes.io/zone";

type Services = (HashMap<Arc<str>, Arc<Service>>, HashMap<IpAddr, Arc<Service>>);

/// Services by `namespace/name` and by cluster address.
pub(super) fn index(
    parts: &[Arc<Objects>],
    pods: &ByName<Pod>,
    nodes: &ByName<Node>,
    settings: &Settings,
    warnings: &mut Vec<Warning>,
) -> Services {
    let mut endpoints = endpoints(parts, pods, nodes);
    let found = by_name(parts.iter().flat_map(|part| &part.services), |service| &service.metadata);
    let mut oldest_first: Vec<&Arc<KubeService>> = found.into_values().collect();
    oldest_first.sort_by(|a, b| age(&a.metadata).cmp(&age(&b.metadata)));

    let mut services = HashMap::with_capacity(oldest_first.len());
    let mut by_address: HashMap<IpAddr, Arc<Service>> = HashMap::with_capacity(oldest_first.len());
    for kube in oldest_first {
        let key = (namespace_of(&kube.metadata), name_of(&kube.metadata));
        let endpoints = endpoints.remove(&key).unwrap_or_default().into_values().collect();
        let service = Arc::new(service(kube, endpoints, settings, warnings));
        for address in &service.cluster_addresses {
            if let Some(holder) = by_address.get(address) {
                let message = format!(
                    "{address} is also the address of Service {}/{}, which holds it",
                    holder.namespace, holder.name
                );
                warnings.push(Warning { object: object("Service", &kube.metadata), field: "spec.clusterIPs", message });
            } else {
                by_address.insert(*address, Arc::clone(&service));
            }
        }
        services.insert(qualified(&kube.metadata), service);
    }
    (services, by_address)
}

fn service(kube: &KubeService, endpoints: Vec<Endpoint>, settings: &Settings, warnings: &mut Vec<Warning>) -> Service {
    let spec = kube.spec.as_ref();
    let external = spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName");
    let written = spec.map(|spec| spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.as_ref()));
    let mut cluster_addresses = Vec::new();
    // A headless Service writes `None`, which is no address.
    for address in written.into_iter().flatten().filter_map(|text| text.parse::<IpAddr>().ok()).filter(|_| !external) {
        if !cluster_addresses.contains(&address.to_canonical()) {
            cluster_addresses.push(address.to_canonical());
        }
    }
    let (name, namespace) = (name_of(&kube.metadata), namespace_of(&kube.metadata));
    let ports = spec.and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
    Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.{}", settings.cluster_domain).into(),
        cluster_addresses,
        ports: ports
            .filter(|port| is_tcp(port.protocol.as_deref()))
            .filter_map(|port| {
                let number = u16::try_from(port.port).ok().filter(|number| *number != 0)?;
                Some(ServicePort { name: port.name.as_deref().unwrap_or_default().into(), port: number })
            })
            .collect(),
        endpoints,
        local_only: local_only(kube, warnings),
        distribution: distribution(kube, warnings),
        publish_not_ready: spec.and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false),
    }
}

/// Whether only endpoints of the client's node count.
fn local_only(kube: &KubeService, warnings: &mut Vec<Warning>) -> bool {
    match kube.spec.as_ref().and_then(|spec| spec.internal_traffic_policy.as_deref()) {
        None | Some("Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            let message = format!("{other:?} is neither Cluster nor Local: taken as Cluster");
            let object = object("Service", &kube.metadata);
            warnings.push(Warning { object, field: "spec.internalTrafficPolicy", message });
            false
        }
    }
}

fn distribution(kube: &KubeService, warnings: &mut Vec<Warning>) -> Distribution {
    match kube.spec.as_ref().and_then(|spec| spec.traffic_distribution.as_deref()) {
        None => Distribution::Even,
        Some("PreferClose" | "PreferSameZone") => Distribution::SameZone,
        Some("PreferSameNode") => Distribution::SameNode,
        Some(other) => {
            let message = format!(
                "{other:?} is none of PreferSameZone, PreferSameNode and PreferClose: taken as absent, every endpoint alike"
            );
            let object = object("Service", &kube.metadata);
            warnings.push(Warning { object, field: "spec.trafficDistribution", message });
            Distribution::Even
        }
    }
}

/// Endpoints of each Service by address. One address may be in several slices: its ports come together, and it is ready if
/// any slice says so (slices overlap while the control plane moves endpoints between them).
fn endpoints<'a>(
    parts: &'a [Arc<Objects>],
    pods: &ByName<Pod>,
    nodes: &ByName<Node>,
) -> BTreeMap<(&'a str, &'a str), BTreeMap<IpAddr, Endpoint>> {
    let mut services: BTreeMap<(&str, &str), BTreeMap<IpAddr, Endpoint>> = BTreeMap::new();
    let slices = by_name(parts.iter().flat_map(|part| &part.endpoint_slices), |slice| &slice.metadata);
    for ((namespace, _), slice) in slices {
        let Some(service) = service_name(slice).filter(|_| matches!(slice.address_type.as_str(), "IPv4" | "IPv6"))
        else {
            continue;
        };
        let ports = tcp_ports(slice);
        let of_service = services.entry((namespace, service)).or_default();
        for kube in slice.endpoints.iter().flatten() {
            for address in kube.addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok()) {
                let found = endpoint(kube, address.to_canonical(), &ports, namespace, pods, nodes);
                match of_service.entry(found.address) {
                    Entry::Vacant(vacant) => {
                        vacant.insert(found);
                    }
                    Entry::Occupied(mut known) => {
                        let known = known.get_mut();
                        known.ports.extend(found.ports);
                        known.ready |= found.ready;
                        known.terminating &= found.terminating;
                    }
                }
            }
        }
    }
    services
}

fn endpoint(
    kube: &KubeEndpoint,
    address: IpAddr,
    ports: &BTreeMap<Arc<str>, u16>,
    namespace: &str,
    pods: &ByName<Pod>,
    nodes: &ByName<Node>,
) -> Endpoint {
    let target = kube.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    let pod = target.and_then(|target| {
        let namespace = target.namespace.as_deref().unwrap_or(namespace);
        pods.get(&(namespace, target.name.as_deref().unwrap_or_default()))
    });
    // The pod is known to go before its slice says so.
    let leaving = pod.is_some_and(|pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
    });
    let conditions = kube.conditions.as_ref();
    let node = kube
        .node_name
        .as_deref()
        .or_else(|| pod.and_then(|pod| pod.spec.as_ref()).and_then(|spec| spec.node_name.as_deref()))
        .unwrap_or_default();
    let zone_of_node =
        || nodes.get(&("", node)).and_then(|node| node.metadata.labels.as_ref()?.get(ZONE)).map(String::as_str);
    Endpoint {
        address,
        ports: ports.clone(),
        // Absent means ready (discovery/v1 EndpointConditions).
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        terminating: leaving || conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        node: node.into(),
        zone: kube.zone.as_deref().or_else(zone_of_node).unwrap_or_default().into(),
    }
}

/// The Service of a slice: its label, else its owner.
fn service_name(slice: &EndpointSlice) -> Option<&str> {
    let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    let owner = || {
        let mut owners = slice.metadata.owner_references.iter().flatten();
        owners.find(|owner| owner.kind == "Service").map(|owner| &owner.name)
    };
    label.or_else(owner).map(String::as_str)
}

fn tcp_ports(slice: &EndpointSlice) -> BTreeMap<Arc<str>, u16> {
    let ports = slice.ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_deref()));
    ports
        .filter_map(|port| {
            let number = port.port.and_then(|number| u16::try_from(number).ok()).filter(|number| *number != 0)?;
            Some((port.name.as_deref().unwrap_or_default().into(), number))
        })
        .collect()
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}
