//! A connection to the app from outside the mesh: policy may let it in, and the app then sees the client's own address.

use std::{net::SocketAddr, sync::Arc};

use tokio::net::TcpStream;

use super::{AnswerError, deliver, ended, failed, permit};
use crate::{
    policy::Request,
    tunnel::{
        Direction, Flow,
        connections::Carried,
        edge::Edge,
        pod::{Pod, workload_at},
        relay::{self, Broken, Counters},
    },
};

/// Carries a plaintext connection from `client` to `app`, to its end.
pub(crate) async fn plaintext<E: Edge>(pod: &Pod<E>, tcp: TcpStream, client: SocketAddr, app: SocketAddr) {
    // Delivery from the same client must not take this connection's source port.
    let _occupied = pod.edge.occupy(pod.uid(), client, app);
    let snapshot = pod.shared.cluster.load();
    let destination = pod.record(&snapshot);
    let flow = Flow {
        source_workload: workload_at(&snapshot, client.ip()).cloned(),
        destination_workload: Some(Arc::clone(&destination)),
        ..Flow::new(Direction::Inbound, client, app)
    };
    drop(snapshot);
    let request = Request {
        principal: None,
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
            let result: Result<(), Broken> = relay::direct(tcp, far, counters, &carried.cancel).await;
            let end = ended(&carried, result, false);
            carried.end(&end);
        }
        Err(error) => {
            carried.end(&failed(&error));
            relay::reset(tcp);
        }
    }
}

async fn admit<E: Edge>(
    pod: &Pod<E>,
    carried: &Carried,
    client: SocketAddr,
    app: SocketAddr,
) -> Result<TcpStream, AnswerError> {
    let permit = permit(pod, carried)?;
    deliver(pod, permit, client, app).await
}
