//! Which endpoints the kernel may choose itself: the table of Services. Pure.
//!
//! The list and its order are the agent's own ([`cluster::candidates`], [`cluster::on_lane`]), so that a choice means the same
//! to both.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use heddle_common::{Address, LocalEndpoint, LocalEndpoints, MAX_SERVICES, ServicePort};

use crate::cluster::{self, Snapshot};

/// Every port of every Service that has endpoints on the node, as far as the kernel's table goes. What is left out is left to the
/// agent: a port with more endpoints here than an entry holds, and ports beyond the table's size.
pub(super) fn services(snapshot: &Snapshot, node: &str) -> HashMap<ServicePort, LocalEndpoints> {
    let asked = snapshot
        .by_cluster_address
        .iter()
        .flat_map(|(address, service)| service.ports.iter().map(move |port| (*address, port.port, service)));
    let mut found: Vec<_> = asked
        .filter_map(|(address, port, service)| {
            let candidates = cluster::candidates(snapshot, node, service, port, address).ok()?;
            let here = cluster::on_lane(&candidates, node, address).map(|(_, candidate)| endpoint(candidate.address));
            let entry = entry(candidates.len(), here)?;
            Some((ServicePort { address: key(address), port, padding: 0 }, entry))
        })
        .collect();
    // The same ones each time, where they are too many.
    found.sort_unstable_by_key(|(port, _)| *port);
    found.truncate(usize::try_from(MAX_SERVICES).unwrap_or(usize::MAX));
    found.into_iter().collect()
}

fn entry(total: usize, here: impl Iterator<Item = LocalEndpoint>) -> Option<LocalEndpoints> {
    let nowhere = LocalEndpoint { address: Address::v6([0; 16]), port: 0, padding: 0 };
    let mut endpoints = [nowhere; LocalEndpoints::MAX];
    let mut local = 0;
    for endpoint in here {
        *endpoints.get_mut(local)? = endpoint;
        local += 1;
    }
    (local > 0)
        .then(|| Some(LocalEndpoints { total: total.try_into().ok()?, local: local.try_into().ok()?, endpoints }))
        .flatten()
}

fn endpoint(address: SocketAddr) -> LocalEndpoint {
    LocalEndpoint { address: key(address.ip()), port: address.port(), padding: 0 }
}

pub(super) fn key(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => Address::v4(address.octets()),
        IpAddr::V6(address) => Address::v6(address.octets()),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::cluster::{Endpoint, Service, ServicePort as Port, Workload};

    fn snapshot(endpoints: usize, here: impl Fn(usize) -> bool) -> Snapshot {
        let address = |at: usize| IpAddr::from([10, 0, 1, u8::try_from(at).unwrap()]);
        let mut snapshot = Snapshot::default();
        let service = Arc::new(Service {
            cluster_addresses: vec!["10.96.0.1".parse().unwrap()],
            ports: vec![Port { name: "http".into(), port: 80 }, Port { name: "none".into(), port: 81 }],
            endpoints: (0..endpoints)
                .map(|at| Endpoint {
                    address: address(at),
                    ports: BTreeMap::from([("http".into(), 8080)]),
                    ready: true,
                    terminating: false,
                    node: "".into(),
                    zone: "".into(),
                })
                .collect(),
            ..Service::named("shop", "web")
        });
        snapshot.by_cluster_address.insert(service.cluster_addresses[0], Arc::clone(&service));
        for at in (0..endpoints).filter(|at| here(*at)) {
            let pod = Workload { addresses: vec![address(at)], ..Workload::named("shop", &format!("web-{at}")) };
            snapshot.by_address.insert(address(at), Arc::new(pod));
        }
        snapshot
    }

    #[test]
    fn the_table_lists_the_nodes_own_endpoints_and_counts_all() {
        let table = services(&snapshot(5, |at| at % 2 == 1), "node-1");
        let only = table[&ServicePort { address: Address::v4([10, 96, 0, 1]), port: 80, padding: 0 }];
        assert_eq!((table.len(), only.total, only.local), (1, 5, 2));
        let at = |last| LocalEndpoint { address: Address::v4([10, 0, 1, last]), port: 8080, padding: 0 };
        assert_eq!(only.endpoints[..2], [at(1), at(3)]);
    }

    #[test]
    fn a_service_with_no_endpoint_here_or_more_than_fit_is_the_agents() {
        assert!(services(&snapshot(5, |_| false), "node-1").is_empty());
        assert!(services(&snapshot(5, |_| true), "node-2").is_empty());
        assert_eq!(services(&snapshot(LocalEndpoints::MAX, |_| true), "node-1").len(), 1);
        assert!(services(&snapshot(LocalEndpoints::MAX + 1, |_| true), "node-1").is_empty());
    }
}
