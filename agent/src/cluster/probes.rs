//! Which ports of a pod the kubelet connects to, by the pod's spec. Pure.
//!
//! Its probes (liveness, readiness, startup; HTTP, TCP, gRPC) and the HTTP hooks of a container's life. A probe whose `host` is not
//! one of the pod's addresses goes elsewhere, and opens nothing here.

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::{
    api::core::v1::{Container, LifecycleHandler, Pod, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};

/// Those ports, of every container that can have any.
pub fn ports(pod: &Pod, addresses: &[IpAddr]) -> BTreeSet<u16> {
    let Some(spec) = &pod.spec else { return BTreeSet::new() };
    // Init containers that go on (sidecars) are probed too; others can't name a probe.
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    containers.flat_map(|container| of_container(container, addresses)).collect()
}

fn of_container(container: &Container, addresses: &[IpAddr]) -> impl Iterator<Item = u16> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let probes = probes.into_iter().flatten().filter_map(|probe| of_probe(container, probe, addresses));
    let life = container.lifecycle.iter();
    let hooks = life.flat_map(|life| [&life.post_start, &life.pre_stop]).flatten();
    probes.chain(hooks.filter_map(|hook| of_hook(container, hook, addresses)))
}

fn of_probe(container: &Container, probe: &Probe, addresses: &[IpAddr]) -> Option<u16> {
    if let Some(http) = &probe.http_get {
        return here(http.host.as_deref(), addresses).then(|| resolve(container, &http.port))?;
    }
    if let Some(tcp) = &probe.tcp_socket {
        return here(tcp.host.as_deref(), addresses).then(|| resolve(container, &tcp.port))?;
    }
    probe.grpc.as_ref().and_then(|grpc| number(grpc.port))
}

/// A hook by TCP was never carried out by any kubelet.
fn of_hook(container: &Container, hook: &LifecycleHandler, addresses: &[IpAddr]) -> Option<u16> {
    let http = hook.http_get.as_ref()?;
    here(http.host.as_deref(), addresses).then(|| resolve(container, &http.port))?
}

/// Whether the kubelet connects to the pod: it does where no host is named.
fn here(host: Option<&str>, addresses: &[IpAddr]) -> bool {
    match host {
        None | Some("") => true,
        Some(host) => host.parse::<IpAddr>().is_ok_and(|host| addresses.contains(&host.to_canonical())),
    }
}

/// A name is that of a port of the same container; failing that the kubelet takes it for a number.
fn resolve(container: &Container, port: &IntOrString) -> Option<u16> {
    match port {
        IntOrString::Int(port) => number(*port),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            match ports.find(|port| port.name.as_ref() == Some(name)) {
                Some(port) => number(port.container_port),
                None => name.parse().ok().and_then(number),
            }
        }
    }
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(spec: serde_json::Value) -> Vec<u16> {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "web"}, "spec": spec})).unwrap();
        ports(&pod, &["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()]).into_iter().collect()
    }

    #[test]
    fn every_kind_of_probe_and_hook_of_every_container_names_its_port() {
        let ports = of(json!({
            "containers": [
                {
                    "name": "web", "ports": [{"name": "http", "containerPort": 8080}],
                    "livenessProbe": {"httpGet": {"path": "/live", "port": "http"}},
                    "readinessProbe": {"tcpSocket": {"port": 8081}},
                    "startupProbe": {"grpc": {"port": 9000}},
                    "lifecycle": {
                        "postStart": {"httpGet": {"port": 8082}},
                        "preStop": {"httpGet": {"port": "8083", "scheme": "HTTPS"}},
                    },
                },
                {"name": "shell", "livenessProbe": {"exec": {"command": ["true"]}}},
            ],
            "initContainers": [{
                "name": "proxy", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 8084}},
            }],
        }));
        assert_eq!(ports, [8080, 8081, 8082, 8083, 8084, 9000]);
    }

    #[test]
    fn a_probe_of_another_host_opens_no_port_of_the_pod() {
        let probe = |host: &str| {
            of(json!({"containers": [{
                "name": "web", "livenessProbe": {"httpGet": {"host": host, "port": 8080}},
                "readinessProbe": {"tcpSocket": {"host": host, "port": 8081}},
                "lifecycle": {"preStop": {"httpGet": {"host": host, "port": 8082}}},
            }]}))
        };
        for own in ["", "10.0.0.7", "fd00::7", "::ffff:10.0.0.7"] {
            assert_eq!(probe(own), [8080, 8081, 8082], "{own}");
        }
        for other in ["127.0.0.1", "10.0.0.8", "web.shop", "localhost"] {
            assert!(probe(other).is_empty(), "{other}");
        }
    }

    #[test]
    fn a_name_is_resolved_in_its_own_container_and_what_is_no_port_opens_none() {
        let ports = of(json!({"containers": [
            {"name": "a", "ports": [{"name": "http", "containerPort": 8080}]},
            {"name": "b", "livenessProbe": {"httpGet": {"port": "http"}}},
            {"name": "c", "livenessProbe": {"httpGet": {"port": 0}}, "readinessProbe": {"grpc": {"port": 65_536}}},
        ]}));
        assert!(ports.is_empty(), "{ports:?}");
    }
}
