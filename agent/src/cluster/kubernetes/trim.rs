//! What is kept of an object that the API server sends: the fields that something here reads, and nothing else. Pure.
//!
//! A pod comes with ten times of what is kept. What is made of two objects that differ only in the rest is equal, so such a
//! change is none. Of the node's own pods a little more is kept: where they are probed, and what is to be scraped.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        core::v1::{
            Container, ContainerPort, Lifecycle, LifecycleHandler, Namespace, Node, ObjectReference, Pod, PodCondition,
            PodSpec, PodStatus, Probe, Service, ServicePort, ServiceSpec,
        },
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use serde_json::{Map, Value};

use crate::cluster::{
    enrolment::{DATAPLANE_MODE, MESH, SIDECAR},
    index::{REGION, SAME_NODE},
    places::{CGROUP, MIRROR, NETNS, STATIC_POD},
    services::{SERVICE_NAME, ZONE},
};

type Texts = BTreeMap<String, String>;

/// What annotations of heddle's own begin with.
const OWN: &str = "heddle.dev/";
/// Those of what is scraped.
const SCRAPED: &str = "prometheus.io/";
/// What `kubectl apply` leaves behind: the whole object once more.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Those of `texts` that fit; `None` for none.
fn some(texts: Option<Texts>, fits: impl Fn(&str) -> bool) -> Option<Texts> {
    let mut texts = texts?;
    texts.retain(|key, _| fits(key));
    (!texts.is_empty()).then_some(texts)
}

/// Name, namespace and uid.
fn named(metadata: &mut ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        name: metadata.name.take(),
        namespace: metadata.namespace.take(),
        uid: metadata.uid.take(),
        ..ObjectMeta::default()
    }
}

pub(super) fn namespace(mut namespace: Namespace) -> Namespace {
    let metadata = &mut namespace.metadata;
    Namespace {
        metadata: ObjectMeta {
            labels: some(metadata.labels.take(), |key| matches!(key, MESH | DATAPLANE_MODE)),
            annotations: some(metadata.annotations.take(), |key| key == SAME_NODE),
            uid: None,
            ..named(metadata)
        },
        ..Namespace::default()
    }
}

pub(super) fn node(mut node: Node) -> Node {
    let metadata = &mut node.metadata;
    let labels = some(metadata.labels.take(), |key| matches!(key, ZONE | REGION));
    Node { metadata: ObjectMeta { labels, uid: None, ..named(metadata) }, ..Node::default() }
}

/// `here` is the name of this node.
pub(super) fn pod(mut pod: Pod, here: &str) -> Pod {
    let metadata = &mut pod.metadata;
    let spec = pod.spec.take().unwrap_or_default();
    let own = spec.node_name.as_deref() == Some(here);
    let mut annotations = some(metadata.annotations.take(), |key| {
        matches!(key, SIDECAR | NETNS | CGROUP | MIRROR | STATIC_POD)
            || key.starts_with(OWN)
            || own && key.starts_with(SCRAPED)
    });
    if let Some(sidecar) = annotations.as_mut().and_then(|annotations| annotations.get_mut(SIDECAR)) {
        // That it is there says all; what it says is long.
        *sidecar = String::new();
    }
    let controller = |owner: &OwnerReference| owner.controller == Some(true);
    let owners = metadata.owner_references.take();
    let owners: Vec<_> = owners.into_iter().flatten().filter(controller).map(owner).collect();
    let containers = |all: Vec<Container>| all.into_iter().map(container).collect();
    Pod {
        metadata: ObjectMeta {
            labels: metadata.labels.take().filter(|labels| !labels.is_empty()),
            annotations,
            creation_timestamp: metadata.creation_timestamp.take(),
            deletion_timestamp: metadata.deletion_timestamp.take(),
            owner_references: (!owners.is_empty()).then_some(owners),
            ..named(metadata)
        },
        spec: Some(PodSpec {
            service_account_name: spec.service_account_name,
            node_name: spec.node_name,
            host_network: spec.host_network,
            containers: if own { containers(spec.containers) } else { Vec::new() },
            init_containers: spec.init_containers.filter(|_| own).map(containers),
            ..PodSpec::default()
        }),
        status: pod.status.take().map(status),
    }
}

fn status(status: PodStatus) -> PodStatus {
    let conditions = status.conditions.into_iter().flatten().filter(|condition| condition.type_ == "Ready");
    let conditions: Vec<_> = conditions
        .map(|condition| PodCondition { type_: condition.type_, status: condition.status, ..PodCondition::default() })
        .collect();
    // The first of all addresses is the one that stands alone.
    let pod_ips = status.pod_ips.filter(|all| !all.is_empty());
    PodStatus {
        phase: status.phase,
        pod_ip: status.pod_ip.filter(|_| pod_ips.is_none()),
        pod_ips,
        conditions: (!conditions.is_empty()).then_some(conditions),
        ..PodStatus::default()
    }
}

fn owner(owner: OwnerReference) -> OwnerReference {
    OwnerReference { kind: owner.kind, name: owner.name, controller: owner.controller, ..OwnerReference::default() }
}

fn container(container: Container) -> Container {
    let port = |port: ContainerPort| ContainerPort {
        name: port.name,
        container_port: port.container_port,
        protocol: port.protocol,
        ..ContainerPort::default()
    };
    Container {
        name: container.name,
        ports: container.ports.map(|ports| ports.into_iter().map(port).collect()),
        liveness_probe: container.liveness_probe.and_then(probe),
        readiness_probe: container.readiness_probe.and_then(probe),
        startup_probe: container.startup_probe.and_then(probe),
        lifecycle: container.lifecycle.and_then(lifecycle),
        ..Container::default()
    }
}

/// Hooks by HTTP: where to.
fn lifecycle(life: Lifecycle) -> Option<Lifecycle> {
    let http = |hook: Option<LifecycleHandler>| {
        let get = hook?.http_get.map(|mut get| {
            get.http_headers = None;
            get
        });
        get.map(|get| LifecycleHandler { http_get: Some(get), ..LifecycleHandler::default() })
    };
    let (post_start, pre_stop) = (http(life.post_start), http(life.pre_stop));
    let any = post_start.is_some() || pre_stop.is_some();
    any.then(|| Lifecycle { post_start, pre_stop, ..Lifecycle::default() })
}

/// One that connects: where to.
fn probe(probe: Probe) -> Option<Probe> {
    let Probe { http_get, tcp_socket, grpc, .. } = probe;
    let connects = http_get.is_some() || tcp_socket.is_some() || grpc.is_some();
    let http_get = http_get.map(|mut get| {
        get.http_headers = None;
        get
    });
    connects.then(|| Probe { http_get, tcp_socket, grpc, ..Probe::default() })
}

pub(super) fn service(mut service: Service) -> Service {
    let metadata = &mut service.metadata;
    let creation_timestamp = metadata.creation_timestamp.take();
    let port = |port: ServicePort| ServicePort {
        name: port.name,
        port: port.port,
        protocol: port.protocol,
        ..ServicePort::default()
    };
    let spec = service.spec.take().map(|spec| ServiceSpec {
        type_: spec.type_,
        cluster_ip: spec.cluster_ip.filter(|_| spec.cluster_ips.is_none()),
        cluster_ips: spec.cluster_ips,
        ports: spec.ports.map(|ports| ports.into_iter().map(port).collect()),
        internal_traffic_policy: spec.internal_traffic_policy,
        traffic_distribution: spec.traffic_distribution,
        publish_not_ready_addresses: spec.publish_not_ready_addresses,
        ..ServiceSpec::default()
    });
    Service { metadata: ObjectMeta { creation_timestamp, uid: None, ..named(metadata) }, spec, status: None }
}

pub(super) fn endpoint_slice(mut slice: EndpointSlice) -> EndpointSlice {
    let metadata = &mut slice.metadata;
    let labels = some(metadata.labels.take(), |key| key == SERVICE_NAME);
    let owners = metadata.owner_references.take().filter(|_| labels.is_none());
    let owners: Vec<_> = owners.into_iter().flatten().filter(|owner| owner.kind == "Service").map(owner).collect();
    let owner_references = (!owners.is_empty()).then_some(owners);
    let port = |port: EndpointPort| EndpointPort {
        name: port.name,
        port: port.port,
        protocol: port.protocol,
        app_protocol: None,
    };
    EndpointSlice {
        metadata: ObjectMeta { labels, owner_references, uid: None, ..named(metadata) },
        address_type: slice.address_type,
        endpoints: slice.endpoints.map(|endpoints| endpoints.into_iter().map(endpoint).collect()),
        ports: slice.ports.map(|ports| ports.into_iter().map(port).collect()),
    }
}

fn endpoint(endpoint: Endpoint) -> Endpoint {
    Endpoint {
        addresses: endpoint.addresses,
        conditions: endpoint.conditions.map(|conditions| EndpointConditions {
            ready: conditions.ready,
            serving: None,
            terminating: conditions.terminating,
        }),
        node_name: endpoint.node_name,
        target_ref: endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod")).map(|target| {
            ObjectReference {
                kind: target.kind,
                name: target.name,
                namespace: target.namespace,
                ..ObjectReference::default()
            }
        }),
        zone: endpoint.zone,
        ..Endpoint::default()
    }
}

/// The whole object, but for the parts of its metadata that nothing reads and its status.
pub(super) fn policy(object: &mut Map<String, Value>) {
    const METADATA: [&str; 4] = ["name", "namespace", "creationTimestamp", "annotations"];
    object.remove("status");
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    metadata.retain(|key, _| METADATA.contains(&key.as_str()));
    if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.remove(LAST_APPLIED);
    }
}

#[cfg(test)]
mod tests;
