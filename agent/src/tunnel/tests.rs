//! The tunnel over loopback: two pods with real listeners, real mutual TLS and HTTP/2, and an app; only capture is not there.

mod abuse;
mod budgets;
mod carry;
mod deadlines;
mod local;
mod revoked;
mod world;

use std::{collections::HashMap, sync::Arc};

use crate::cluster::{Service, Snapshot, Workload};

pub(super) fn workload(name: &str, addresses: &[&str], enrolled: bool) -> Arc<Workload> {
    Arc::new(Workload {
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        enrolled,
        ..Workload::named("default", name)
    })
}

pub(super) fn snapshot(workloads: &[Arc<Workload>], services: &[Service]) -> Snapshot {
    let services: Vec<Arc<Service>> = services.iter().cloned().map(Arc::new).collect();
    Snapshot {
        workloads: workloads.iter().map(|w| (w.uid.clone(), w.clone())).collect(),
        by_address: workloads.iter().flat_map(|w| w.addresses.iter().map(|a| (*a, w.clone()))).collect(),
        by_cluster_address: services
            .iter()
            .flat_map(|s| s.cluster_addresses.iter().map(|a| (*a, s.clone())))
            .collect::<HashMap<_, _>>(),
        services: services.iter().map(|s| (format!("{}/{}", s.namespace, s.name).into(), s.clone())).collect(),
        root_namespace: "istio-system".into(),
        ..Snapshot::default()
    }
}
