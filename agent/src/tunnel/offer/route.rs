//! Where a captured connection may go, from one snapshot. Pure.
//!
//! What the mesh does not know is never passed through: a Service without an endpoint fails, an unknown address waits.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::error::OfferError;
use crate::{
    cluster::{self, SameNode, Service, Snapshot, Unavailable, Workload},
    tunnel::{classify::REFUSED_TARGETS, pod::workload_at},
};

/// One endpoint that can be tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub address: SocketAddr,
    pub workload: Option<Arc<Workload>>,
    pub transport: Transport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// HBONE to the workload.
    Tunnel,
    /// Through this agent alone: both pods are on its node, and neither asks for more.
    Local,
    /// As the pod itself would: the endpoint is not enrolled, or is the pod itself.
    Plain,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub service: Option<Arc<Service>>,
    /// At least one.
    pub candidates: Vec<Candidate>,
    /// Which of them the kernel can choose, in the order in which it counts them.
    pub on_lane: Vec<usize>,
}

/// Every endpoint that `source`, a pod of `node`, may be connected to for `destination`.
///
/// # Errors
/// [`OfferError::DestinationUnknown`] when the snapshot has neither a Service nor a pod of that address;
/// [`OfferError::NoSuchPort`], [`OfferError::NoHealthyUpstream`] of a Service.
pub(crate) fn route(
    snapshot: &Snapshot,
    node: &str,
    source: &Workload,
    destination: SocketAddr,
) -> Result<Route, OfferError> {
    let candidate = |address: SocketAddr, workload: Option<&Arc<Workload>>| {
        let transport = transport(node, source, workload.map(|workload| &**workload), address.port());
        Candidate { address, workload: workload.cloned(), transport }
    };
    let Some(service) = snapshot.by_cluster_address.get(&destination.ip()) else {
        let workload = workload_at(snapshot, destination.ip()).ok_or(OfferError::DestinationUnknown)?;
        let candidates = vec![candidate(destination, Some(workload))];
        return Ok(Route { service: None, candidates, on_lane: Vec::new() });
    };
    let found = cluster::candidates(snapshot, node, service, destination.port(), destination.ip());
    let found = found.map_err(|why| match why {
        Unavailable::NoSuchPort => OfferError::NoSuchPort(Arc::clone(&service.hostname)),
        Unavailable::NoneReady => OfferError::NoHealthyUpstream(Arc::clone(&service.hostname)),
    })?;
    Ok(Route {
        service: Some(Arc::clone(service)),
        on_lane: cluster::on_lane(&found, node, destination.ip()).map(|(at, _)| at).collect(),
        candidates: found.iter().map(|one| candidate(one.address, one.workload.as_ref())).collect(),
    })
}

fn transport(node: &str, source: &Workload, destination: Option<&Workload>, port: u16) -> Transport {
    let Some(destination) = destination.filter(|workload| workload.enrolled && workload.uid != source.uid) else {
        return Transport::Plain;
    };
    let kernel = [source, destination].iter().all(|workload| workload.same_node == SameNode::Kernel);
    // The mesh's own ports are refused at a tunnel's end, with the words for it.
    let local = *destination.node == *node && kernel && !REFUSED_TARGETS.contains(&port);
    if local { Transport::Local } else { Transport::Tunnel }
}

pub(crate) fn same_family(one: IpAddr, other: IpAddr) -> bool {
    one.is_ipv4() == other.is_ipv4()
}

/// The address that the connection to `target` comes from: the client's own where the family allows it.
pub(crate) fn source_address(client: IpAddr, own: &[IpAddr], target: IpAddr) -> Result<IpAddr, OfferError> {
    if same_family(client, target) {
        return Ok(client);
    }
    own.iter().copied().find(|address| same_family(*address, target)).ok_or(OfferError::NoSourceAddress)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        cluster::{Endpoint, ServicePort},
        tunnel::tests::{snapshot, workload},
    };

    fn endpoint(address: &str, ready: bool, terminating: bool) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            ports: BTreeMap::from([("http".into(), 8080)]),
            ready,
            terminating,
            node: "n".into(),
            zone: "".into(),
        }
    }

    fn service(endpoints: Vec<Endpoint>) -> Service {
        Service {
            cluster_addresses: vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()],
            ports: vec![ServicePort { name: "http".into(), port: 80 }, ServicePort { name: "admin".into(), port: 81 }],
            endpoints,
            ..Service::named("shop", "web")
        }
    }

    fn targets(route: &Route) -> Vec<(String, Transport)> {
        route.candidates.iter().map(|c| (c.address.to_string(), c.transport)).collect()
    }

    #[test]
    fn a_service_is_its_ready_endpoints_of_the_family_asked_for() {
        let source = workload("a", &["10.0.0.1", "fd00::1"], true);
        let pods = [
            source.clone(),
            workload("b", &["10.0.0.2", "fd00::2"], true),
            workload("c", &["10.0.0.3"], true),
            workload("plain", &["10.0.0.4"], false),
        ];
        let service = service(vec![
            endpoint("10.0.0.2", true, false),
            endpoint("fd00::2", true, false),
            endpoint("10.0.0.3", false, false),
            endpoint("10.0.0.4", true, false),
            endpoint("10.0.0.1", true, false),
            endpoint("192.168.7.7", true, false),
            endpoint("10.0.0.5", true, true),
        ]);
        let snapshot = snapshot(&pods, &[service]);
        let four = route(&snapshot, "node-9", &source, "10.96.0.1:80".parse().unwrap()).unwrap();
        assert_eq!(
            targets(&four),
            [
                ("10.0.0.2:8080".into(), Transport::Tunnel),
                ("10.0.0.4:8080".into(), Transport::Plain),
                ("10.0.0.1:8080".into(), Transport::Plain),
                ("192.168.7.7:8080".into(), Transport::Plain),
            ]
        );
        let six = route(&snapshot, "node-9", &source, "[fd96::1]:80".parse().unwrap()).unwrap();
        assert_eq!(targets(&six), [("[fd00::2]:8080".into(), Transport::Tunnel)]);
        // On their own node the kernel can choose the enrolled ones, the client itself among them.
        assert_eq!(four.on_lane, [0_usize; 0]);
        let here = route(&snapshot, "node-1", &source, "10.96.0.1:80".parse().unwrap()).unwrap();
        assert_eq!((&*here.on_lane, here.candidates[0].transport), (&[0, 2][..], Transport::Local));
    }

    #[test]
    fn another_family_is_better_than_none() {
        let source = workload("a", &["10.0.0.1", "fd00::1"], true);
        let b = workload("b", &["10.0.0.2"], true);
        let snapshot = snapshot(&[source.clone(), b], &[service(vec![endpoint("10.0.0.2", true, false)])]);
        let six = route(&snapshot, "node-9", &source, "[fd96::1]:80".parse().unwrap()).unwrap();
        assert_eq!(targets(&six), [("10.0.0.2:8080".into(), Transport::Tunnel)]);
        let from = source_address("fd00::1".parse().unwrap(), &source.addresses, "10.0.0.2".parse().unwrap());
        assert_eq!(from.unwrap(), "10.0.0.1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn a_service_without_an_endpoint_fails_and_never_passes_through() {
        let source = workload("a", &["10.0.0.1"], true);
        let mut ending = Workload::clone(&workload("b", &["10.0.0.2"], true));
        ending.terminating = true;
        let snapshot =
            snapshot(&[source.clone(), Arc::new(ending)], &[service(vec![endpoint("10.0.0.2", true, false)])]);
        let reason = |to: &str| route(&snapshot, "node-9", &source, to.parse().unwrap()).unwrap_err().reason();
        assert_eq!(reason("10.96.0.1:80"), "no_healthy_upstream", "the only endpoint is terminating");
        assert_eq!(reason("10.96.0.1:81"), "no_healthy_upstream", "no endpoint has the port");
        assert_eq!(reason("10.96.0.1:82"), "no_such_port");
        assert_eq!(reason("10.9.9.9:80"), "destination_unknown");
    }

    #[test]
    fn pods_of_this_node_are_reached_without_a_tunnel_unless_either_asks_for_one() {
        let source = workload("a", &["10.0.0.1"], true);
        let with = |change: fn(&mut Workload)| {
            let mut workload = Workload::clone(&workload("b", &["10.0.0.2"], true));
            change(&mut workload);
            Arc::new(workload)
        };
        let transport = |source: &Arc<Workload>, other: Arc<Workload>, to: &str| {
            let snapshot = snapshot(&[source.clone(), other], &[]);
            route(&snapshot, "node-1", source, to.parse().unwrap()).unwrap().candidates[0].transport
        };
        let b = "10.0.0.2:80";
        assert_eq!(transport(&source, with(|_| {}), b), Transport::Local);
        assert_eq!(transport(&source, with(|other| other.node = "node-2".into()), b), Transport::Tunnel);
        assert_eq!(transport(&source, with(|other| other.node = "".into()), b), Transport::Tunnel);
        assert_eq!(transport(&source, with(|other| other.same_node = SameNode::Mtls), b), Transport::Tunnel);
        assert_eq!(transport(&source, with(|other| other.enrolled = false), b), Transport::Plain);
        assert_eq!(transport(&source, with(|_| {}), "10.0.0.1:80"), Transport::Plain, "itself");
        assert_eq!(transport(&source, with(|_| {}), "10.0.0.2:15008"), Transport::Tunnel);
        let mut asks = Workload::clone(&source);
        asks.same_node = SameNode::Mtls;
        assert_eq!(transport(&Arc::new(asks), with(|_| {}), b), Transport::Tunnel);
    }

    #[test]
    fn a_pod_address_is_that_pod() {
        let source = workload("a", &["10.0.0.1"], true);
        let b = workload("b", &["10.0.0.2"], true);
        let snapshot = snapshot(&[source.clone(), b.clone()], &[]);
        let found = route(&snapshot, "node-9", &source, "10.0.0.2:5432".parse().unwrap()).unwrap();
        assert_eq!(found.candidates.first().unwrap().workload, Some(b));
        assert_eq!(targets(&found), [("10.0.0.2:5432".into(), Transport::Tunnel)]);
    }
}
