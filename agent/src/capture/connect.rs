//! Connections that the agent makes inside a pod's netns: as the pod itself, and to the pod's app as its client.
//!
//! Last stop before the app. Whether a delivery is allowed has been decided before; here it is only vouched for, for as long as
//! its handshake takes.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use heddle_common::{Attestation, maps};
use socket2::Socket;
use tokio::net::{TcpSocket, TcpStream};

use super::{
    CaptureError, Delivery,
    maps::{NotAttested, tuple},
    pod::{Live, Node, Pod},
    socket,
};
use crate::life::limits;

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

async fn connect(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

/// Connects from the pod's netns and one of its addresses.
pub async fn dial(node: &Node, uid: &str, source: IpAddr, destination: SocketAddr) -> Result<TcpStream, CaptureError> {
    let (_, live) = node.live(uid)?;
    let (source, destination) = (source.to_canonical(), canonical(destination));
    if !live.owns(source) {
        return Err(CaptureError::NotOwn { pod: Arc::clone(&live.spec.name), address: source });
    }
    dial_from(&live, source, destination).await
}

async fn dial_from(live: &Live, source: IpAddr, destination: SocketAddr) -> Result<TcpStream, CaptureError> {
    same_family(live, source, destination)?;
    let pod = || Arc::clone(&live.spec.name);
    let socket = socket::dialer(&live.netns, source).map_err(|source| CaptureError::Socket {
        pod: pod(),
        destination,
        source,
    })?;
    connect(socket, destination).await.map_err(|source| CaptureError::Connect { pod: pod(), destination, source })
}

fn same_family(live: &Live, source: IpAddr, destination: SocketAddr) -> Result<(), CaptureError> {
    if source.is_ipv4() == destination.is_ipv4() {
        return Ok(());
    }
    Err(CaptureError::Family { pod: Arc::clone(&live.spec.name), source_address: source, destination })
}

/// Connects to the app at one of the pod's addresses, from `client`'s address.
pub async fn deliver(node: &Node, uid: &str, client: IpAddr, app: SocketAddr) -> Result<Delivery, CaptureError> {
    let (pod, live) = node.live(uid)?;
    let (client, app) = (client.to_canonical(), canonical(app));
    if !live.owns(app.ip()) {
        return Err(CaptureError::NotOwn { pod: Arc::clone(&live.spec.name), address: app.ip() });
    }
    if live.owns(client) {
        // The pod to itself: `lookup` passes it, and its own address needs no transparency.
        return dial_from(&live, client, app).await.map(|stream| Delivery { stream });
    }
    same_family(&live, client, app)?;
    let name = || Arc::clone(&live.spec.name);
    let no_port = |tries| CaptureError::NoPort { pod: name(), client, app, tries };
    for tries in 0..limits::DELIVERY_TRIES {
        let port = live.ports.pick(client, app.port(), &pod.occupancy).ok_or_else(|| no_port(tries))?;
        match deliver_from(node, &pod, &live, SocketAddr::new(client, port), app).await {
            Ok(stream) => return Ok(Delivery { stream }),
            Err(Try::Taken) => {}
            Err(Try::Failed(error)) => return Err(error),
        }
    }
    Err(no_port(limits::DELIVERY_TRIES))
}

enum Try {
    /// The port is in use: by another delivery, by the app, or in its last second of TIME_WAIT.
    Taken,
    Failed(CaptureError),
}

async fn deliver_from(
    node: &Node,
    pod: &Pod,
    live: &Live,
    client: SocketAddr,
    app: SocketAddr,
) -> Result<TcpStream, Try> {
    let name = || Arc::clone(&live.spec.name);
    let socket = socket::deliverer(&live.netns, client)
        .map_err(|source| taken_or(source, |source| CaptureError::Socket { pod: name(), destination: app, source }))?;
    // Before the SYN leaves, and until the handshake is over either way.
    let _attested =
        node.maps.attest(tuple(client, app), Attestation::by_agent(live.slot)).map_err(|error| match error {
            NotAttested::Taken => Try::Taken,
            NotAttested::Full => Try::Failed(CaptureError::AttestedFull { pod: name() }),
            NotAttested::Failed(error) => Try::Failed(error),
        })?;
    tracing::trace!(pod = %pod.uid, %client, %app, map = maps::ATTESTED, "delivering");
    connect(socket, app)
        .await
        .map_err(|source| taken_or(source, |source| CaptureError::Connect { pod: name(), destination: app, source }))
}

fn taken_or(error: io::Error, other: impl FnOnce(io::Error) -> CaptureError) -> Try {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL) => Try::Taken,
        _ => Try::Failed(other(error)),
    }
}
