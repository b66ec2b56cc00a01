//! A connection to the app without a tunnel: from outside the mesh, or from a pod of this node whose connection the kernel vouches
//! for and had no verdict for. Policy may let it in, and the app then sees the client's own address.

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use super::{admit, ended, failed};
use crate::{
    cluster::{SameNode, Snapshot, Workload},
    identity::SpiffeId,
    policy::Request,
    tunnel::{
        Direction, Flow, Security,
        connections::Carried,
        edge::Edge,
        pod::{Pod, workload_at},
        relay::{self, Counters},
    },
};

/// Carries a plaintext connection from `client` to `app`, to its end.
pub(crate) async fn plaintext<E: Edge>(pod: &Pod<E>, tcp: TcpStream, client: SocketAddr, app: SocketAddr) {
    // Delivery from the same client must not take this connection's source port.
    let _occupied = pod.edge.occupy(pod.uid(), client, app);
    let snapshot = pod.shared.cluster.load();
    let destination = pod.record(&snapshot);
    let mut flow = Flow {
        source_workload: workload_at(&snapshot, client.ip()).cloned(),
        destination_workload: Some(Arc::clone(&destination)),
        ..Flow::new(Direction::Inbound, client, app)
    };
    if let Some((source, principal)) = attested(pod, &snapshot, &destination, client, app) {
        flow.security = Security::KernelAttested;
        flow.source_workload = Some(source);
        flow.source_principal = Some(principal);
        flow.destination_principal = pod.identity(&destination).ok();
    }
    drop(snapshot);
    let request = Request {
        principal: flow.source_principal.clone(),
        source_ip: client.ip(),
        destination,
        destination_ip: app.ip(),
        destination_port: app.port(),
    };
    let mut carried = Carried::register(&pod.shared.registry, &pod.shared.observer, flow, Some(request));
    let delivered = tokio::select! {
        biased;
        () = carried.cancel.cancelled() => {
            let end = carried.cancelled();
            carried.end(&end);
            return relay::reset(tcp);
        }
        delivered = admit(pod, &carried, client, app) => delivered,
    };
    match delivered {
        Ok(far) => {
            carried.open();
            let counters = Counters { from_near: &carried.sent, to_near: &carried.received };
            let result = relay::direct(tcp, far, &[counters], carried.cancel.cancelled()).await;
            let end = ended(&carried, &result, false);
            carried.end(&end);
        }
        Err(error) => {
            carried.end(&failed(&error));
            relay::reset(tcp);
        }
    }
}

/// The pod of this node that a connection comes from, and its identity, where the kernel vouches for that. An address alone says
/// nothing. Where either pod asks for mutual TLS, this is not it.
fn attested<E: Edge>(
    pod: &Pod<E>,
    snapshot: &Snapshot,
    destination: &Workload,
    client: SocketAddr,
    app: SocketAddr,
) -> Option<(Arc<Workload>, SpiffeId)> {
    let eligible = |one: &&Arc<Workload>| {
        one.enrolled && *one.node == *pod.shared.node && one.same_node == SameNode::Kernel && one.uid != destination.uid
    };
    // Nobody else is worth a system call.
    workload_at(snapshot, client.ip()).filter(eligible)?;
    if destination.same_node != SameNode::Kernel {
        return None;
    }
    let uid = pod.edge.attested(pod.uid(), client, app)?;
    let source = snapshot.workloads.get(&uid).filter(eligible)?;
    let principal = pod.identity(source).ok()?;
    pod.shared.lane.missed(&source.uid, &destination.uid, app.port());
    Some((Arc::clone(source), principal))
}
