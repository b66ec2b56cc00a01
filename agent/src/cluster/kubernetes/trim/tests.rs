use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::cluster::{Objects, Place, Places, Settings, index};

fn full_pod(node: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {
            "name": "web-5d9f7c8b6d-x", "namespace": "shop", "uid": "u1", "resourceVersion": "7", "generation": 2,
            "labels": {"app": "web", "pod-template-hash": "5d9f7c8b6d"},
            "annotations": {
                "heddle.dev/when-unattended": "open", "heddle.dev/on-enrol": "reset", "prometheus.io/port": "9090",
                "sidecar.istio.io/status": "{\"a\":\"long text\"}", "kubernetes.io/limit-ranger": "x",
            },
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d9f7c8b6d", "uid": "r", "controller": true},
                {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "c"},
            ],
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "nodeName": node, "serviceAccountName": "web", "hostNetwork": false,
            "volumes": [{"name": "token", "emptyDir": {}}],
            "containers": [{
                "name": "app", "image": "web:1", "env": [{"name": "PASSWORD", "value": "secret"}],
                "ports": [{"containerPort": 8080, "name": "http"}],
                "livenessProbe": {"httpGet": {"port": 8080, "path": "/live", "httpHeaders": [{"name": "authorization", "value": "secret"}]}},
                "readinessProbe": {"exec": {"command": ["cat", "secret"]}},
            }],
        },
        "status": {
            "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "hostIP": "192.168.0.1",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ],
            "containerStatuses": [{"name": "app", "image": "web:1", "imageID": "i", "ready": true, "restartCount": 3}],
        },
    }))
    .unwrap()
}

/// Finds the pods of node `here`.
#[derive(Debug)]
struct Here;

impl Places for Here {
    fn locate(&self, pod: &Pod) -> Option<Place> {
        let here = pod.spec.as_ref()?.node_name.as_deref() == Some("here");
        here.then(|| Place {
            netns: "/netns".into(),
            netns_inode: None,
            cgroup: "/cgroup".into(),
            addresses: Vec::new(),
        })
    }
}

fn indexed(pod: Pod) -> crate::cluster::Snapshot {
    let settings = Settings { places: Arc::new(Here), ..Settings::default() };
    index(&[Arc::new(Objects { pods: vec![Arc::new(pod)], ..Objects::default() })], &settings, 1)
}

#[test]
fn what_is_kept_of_a_pod_says_the_same_of_it() {
    for node in ["here", "elsewhere"] {
        let (full, kept) = (full_pod(node), pod(full_pod(node), "here"));
        assert!(indexed(full.clone()).same_content(&indexed(kept.clone())));
        let (before, after) = (json!(full).to_string().len(), json!(kept).to_string().len());
        assert!(node == "here" && after < before || after * 2 < before, "{after} of {before} bytes");
    }
}

#[test]
fn no_pods_environment_volumes_or_commands_are_kept() {
    for here in ["here", "elsewhere"] {
        let text = json!(pod(full_pod("here"), here)).to_string();
        for lost in ["secret", "PASSWORD", "volumes", "kubelet", "long text", "limit-ranger", "restartCount", "192.168"]
        {
            assert!(!text.contains(lost), "{lost}: {text}");
        }
    }
}

#[test]
fn of_the_nodes_own_pods_ports_probes_and_what_is_scraped_is_kept() {
    let own = pod(full_pod("here"), "here");
    let container = &own.spec.as_ref().unwrap().containers[0];
    assert_eq!(container.ports.as_ref().unwrap()[0].container_port, 8080);
    let probe = container.liveness_probe.as_ref().unwrap().http_get.as_ref().unwrap();
    assert_eq!(probe.path.as_deref(), Some("/live"));
    assert_eq!(container.readiness_probe, None, "it connects to nothing");
    let annotations = own.metadata.annotations.unwrap();
    assert_eq!(
        annotations.keys().map(String::as_str).collect::<Vec<_>>(),
        ["heddle.dev/on-enrol", "heddle.dev/when-unattended", "prometheus.io/port", "sidecar.istio.io/status"]
    );
    let other = pod(full_pod("elsewhere"), "here");
    assert!(other.spec.unwrap().containers.is_empty());
    assert!(!other.metadata.annotations.unwrap().contains_key("prometheus.io/port"));
}

#[test]
fn what_nothing_reads_makes_no_other_object() {
    let mut later = full_pod("here");
    later.metadata.resource_version = Some("8".into());
    later.metadata.managed_fields = None;
    later.status.as_mut().unwrap().container_statuses = None;
    later.status.as_mut().unwrap().conditions.as_mut().unwrap().remove(0);
    assert_eq!(pod(later, "here"), pod(full_pod("here"), "here"));
    let mut unready = full_pod("here");
    unready.status.as_mut().unwrap().conditions.as_mut().unwrap()[1].status = "False".into();
    assert_ne!(pod(unready, "here"), pod(full_pod("here"), "here"));
}

#[test]
fn services_slices_nodes_and_namespaces_say_the_same_trimmed() {
    let objects = |trimmed: bool| {
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "a", "topology.kubernetes.io/region": "r", "x": "y"}},
            "status": {"images": [{"names": ["large"]}]},
        }))
        .unwrap();
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": {"name": "shop", "labels": {"heddle.dev/mesh": "enabled", "x": "y"}, "annotations": {"heddle.dev/same-node": "mtls", "x": "y"}},
        }))
        .unwrap();
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {
                "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"], "selector": {"app": "web"},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30000}, {"port": 53, "protocol": "UDP"}],
                "internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose", "publishNotReadyAddresses": true,
                "externalName": "x",
            },
            "status": {"loadBalancer": {}},
        }))
        .unwrap();
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "web-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web", "x": "y"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "u"}]},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "appProtocol": "http"}],
            "endpoints": [{
                "addresses": ["10.0.0.1"], "conditions": {"ready": true, "serving": true, "terminating": false},
                "nodeName": "n", "zone": "a", "hints": {"forZones": [{"name": "a"}]}, "hostname": "h",
                "targetRef": {"kind": "Pod", "name": "web-5d9f7c8b6d-x", "namespace": "shop", "uid": "u1"},
            }],
        }))
        .unwrap();
        let mut objects = Objects { pods: vec![Arc::new(full_pod("n"))], ..Objects::default() };
        if trimmed {
            objects.nodes.push(Arc::new(super::node(node)));
            objects.namespaces.push(Arc::new(super::namespace(namespace)));
            objects.services.push(Arc::new(super::service(service)));
            objects.endpoint_slices.push(Arc::new(super::endpoint_slice(slice)));
        } else {
            objects.nodes.push(Arc::new(node));
            objects.namespaces.push(Arc::new(namespace));
            objects.services.push(Arc::new(service));
            objects.endpoint_slices.push(Arc::new(slice));
        }
        objects
    };
    let full = index(&[Arc::new(objects(false))], &Settings::default(), 1);
    let kept = index(&[Arc::new(objects(true))], &Settings::default(), 1);
    assert!(full.same_content(&kept), "{full:#?} {kept:#?}");
    assert_eq!(full.services.len(), 1);
    assert!(
        !json!(super::endpoint_slice(EndpointSlice::clone(&objects(false).endpoint_slices[0])))
            .to_string()
            .contains("hints")
    );
}

#[test]
fn of_a_policy_all_but_status_and_foreign_metadata_is_kept() {
    let Value::Object(mut object) = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "extra": 1,
        "metadata": {
            "name": "a", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": [{}], "resourceVersion": "1",
            "annotations": {"istio.io/dry-run": "true", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
        },
        "spec": {"action": "DENY", "unknown": true}, "status": {"conditions": []},
    }) else {
        unreachable!()
    };
    policy(&mut object);
    assert_eq!(
        Value::Object(object),
        json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "extra": 1,
            "metadata": {
                "name": "a", "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z",
                "annotations": {"istio.io/dry-run": "true"},
            },
            "spec": {"action": "DENY", "unknown": true},
        })
    );
}

#[test]
fn what_the_kubelet_connects_to_is_kept_of_the_nodes_own_pods() {
    let whole: Pod = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"nodeName": "node-1", "containers": [{
            "name": "web", "ports": [{"name": "http", "containerPort": 8080}],
            "livenessProbe": {"httpGet": {"port": "http"}}, "readinessProbe": {"tcpSocket": {"port": 8081}},
            "startupProbe": {"grpc": {"port": 9000}},
            "lifecycle": {
                "postStart": {"httpGet": {"port": 8082, "host": "192.0.2.1"}},
                "preStop": {"httpGet": {"port": 8083, "httpHeaders": [{"name": "a", "value": "b"}]}},
            },
        }], "initContainers": [{"name": "side", "startupProbe": {"tcpSocket": {"port": 8084}}}]},
    }))
    .unwrap();
    let ports = crate::cluster::probes::ports;
    let known = ports(&whole, &[]);
    assert_eq!(known.len(), 5);
    assert_eq!(ports(&pod(whole.clone(), "node-1"), &[]), known);
    assert!(ports(&pod(whole, "node-2"), &[]).is_empty(), "of other nodes' pods nobody asks");
}
