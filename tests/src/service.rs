//! A Service with cluster addresses that nothing routes, and its EndpointSlices.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use anyhow::Result;
use serde_json::{Value, json};

use crate::{lab::Ground, pod::Pod};

/// A Service of the lab: one port, IPv4 and IPv6.
#[derive(Debug)]
pub struct Service {
    ground: Arc<Ground>,
    name: String,
    namespace: String,
    port: u16,
    target_port: u16,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// An endpoint as a slice writes it.
#[derive(Debug, Clone)]
pub struct Backend {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub node: String,
    pub pod: Option<(String, String)>,
    pub ready: bool,
}

impl From<&Pod> for Backend {
    fn from(pod: &Pod) -> Self {
        let (namespace, name) = pod.full_name().split_once('/').map(|(a, b)| (a.to_owned(), b.to_owned())).unzip();
        Self { v4: pod.v4(), v6: pod.v6(), node: format!("node{}", pod.node()), pod: namespace.zip(name), ready: true }
    }
}

impl Service {
    pub(crate) fn create(
        ground: Arc<Ground>,
        (namespace, name): (&str, &str),
        (port, target_port): (u16, u16),
        backends: &[Backend],
    ) -> Result<Self> {
        ground.need_namespace(namespace)?;
        let number = ground.next_service();
        let service = Self {
            ground,
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            port,
            target_port,
            v4: Ipv4Addr::new(10, 96, 0, number),
            v6: Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number.into()),
        };
        service.set_fields(&json!({}))?;
        service.set_backends(backends)?;
        Ok(service)
    }

    /// Replaces its manifest: with these fields of the `spec` beside its own.
    pub fn set_fields(&self, more: &Value) -> Result<()> {
        let mut spec = json!({
            "type": "ClusterIP", "clusterIP": self.v4, "clusterIPs": [self.v4, self.v6],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"name": "main", "port": self.port, "targetPort": self.target_port, "protocol": "TCP"}],
            "selector": {"app": self.name},
        });
        for (field, value) in more.as_object().into_iter().flatten() {
            spec[field.as_str()] = value.clone();
        }
        self.ground.manifests.apply(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": spec,
        }))
    }

    /// Replaces its endpoints.
    pub fn set_backends(&self, backends: &[Backend]) -> Result<()> {
        self.ground.manifests.apply(&self.slice("IPv4", backends, |backend| backend.v4.into()))?;
        self.ground.manifests.apply(&self.slice("IPv6", backends, |backend| backend.v6.into()))
    }

    fn slice(&self, family: &str, backends: &[Backend], address: impl Fn(&Backend) -> IpAddr) -> Value {
        let endpoints: Vec<Value> = backends
            .iter()
            .map(|backend| {
                let mut endpoint = json!({
                    "addresses": [address(backend)],
                    "nodeName": backend.node,
                    "conditions": {"ready": backend.ready, "serving": backend.ready, "terminating": false},
                });
                if let Some((namespace, name)) = &backend.pod {
                    endpoint["targetRef"] = json!({"kind": "Pod", "namespace": namespace, "name": name});
                }
                endpoint
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{}-{}", self.name, family.to_lowercase()), "namespace": self.namespace,
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": family,
            "ports": [{"name": "main", "port": self.target_port, "protocol": "TCP"}],
            "endpoints": endpoints,
        })
    }

    /// Its IPv4 cluster address and port.
    #[must_use]
    pub fn at(&self) -> SocketAddr {
        (self.v4, self.port).into()
    }

    /// Its IPv6 cluster address and port.
    #[must_use]
    pub fn at6(&self) -> SocketAddr {
        (self.v6, self.port).into()
    }
}
