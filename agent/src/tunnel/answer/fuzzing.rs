//! Fuzzing of what a peer's CONNECT says: see [`crate::fuzzing`].

use std::{
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
};

use super::{meant_service, target::target};
use crate::{
    cluster::{self, Snapshot},
    tunnel::{
        Trace,
        classify::{REFUSED_TARGETS, canonical},
    },
};

/// A target that is accepted is the pod's own address and an app's port, whatever it was written as.
pub fn connect_target(data: &[u8]) {
    let Some((family, rest)) = data.split_first() else { return };
    let Ok(authority) = std::str::from_utf8(rest) else { return };
    let own: IpAddr = if family & 1 == 0 { [10, 0, 0, 5].into() } else { [0xfd00, 0, 0, 0, 0, 0, 0, 5].into() };
    match target(authority, own) {
        Ok(app) => {
            assert_eq!(app.ip(), own, "{authority}");
            assert!(!REFUSED_TARGETS.contains(&app.port()), "{authority}");
            assert_eq!(target(&app.to_string(), own), Ok(app), "{authority}");
            assert_eq!(authority.parse::<SocketAddr>().map(canonical), Ok(app), "{authority}");
        }
        Err(error) => assert!(!error.reason().is_empty()),
    }
}

/// The pod of the cluster that is asked about, behind one of its two Services.
const CLUSTER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: web}
spec: {containers: []}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 80}]
endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, namespace: shop, name: web}}]
"#;

/// No header makes a Service of one that the pod is not behind; a trace that is joined is the one that was named, and is
/// joined by the next in the same way.
pub fn request_headers(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(trace) = Trace::join(text) {
        assert!(trace.trace_id != 0 && text.contains(&trace.to_string()), "{text}");
        let next = Trace::join(&trace.traceparent());
        let next = next.map(|next| (next.trace_id, next.parent, next.sampled));
        assert_eq!(next, Some((trace.trace_id, Some(trace.span_id), trace.sampled)), "{text}");
    }
    static READ: LazyLock<Snapshot> = LazyLock::new(|| cluster::fuzzing::snapshot(CLUSTER));
    let snapshot = &*READ;
    let Some(pod) = snapshot.workloads.get("web") else { unreachable!("the cluster has the pod") };
    if let Some(service) = meant_service(snapshot, Some(text), pod) {
        assert_eq!(&*service.name, "web", "{text}");
        assert!(text.contains(&*service.hostname), "{text}");
    }
}
