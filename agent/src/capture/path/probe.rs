//! Does a connection from one pod to the other arrive as it left?
//!
//! The agent makes it from the one netns and takes it in the other, on sockets of its own. The one 4-tuple is attested, so it alone
//! is let past the pod's listener, to a socket that listens for as long as that takes; nothing else can be taken for it. If
//! something on the way changes an address, the connection is another, and comes to the listener as everyone's.

use std::{
    net::{IpAddr, SocketAddr},
    pin::pin,
};

use heddle_common::{Attestation, HBONE_PORT};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use super::{
    super::{
        maps::{NotAttested, tuple},
        pod::{Live, Node, random},
        socket,
    },
    LaneFault, unknown,
};
use crate::life::limits;

/// To the port of the tunnel, which is open wherever pods of a mesh talk.
pub async fn probe(
    node: &Node,
    source: &Live,
    destination: &Live,
    own: IpAddr,
    other: IpAddr,
) -> Result<(), LaneFault> {
    let to = SocketAddr::new(other, HBONE_PORT);
    let listener = socket::path_listener(&destination.netns, to).map_err(unknown("socket to be probed"))?;
    let listener = TcpListener::from_std(listener).map_err(unknown("socket to be probed"))?;
    let (socket, from) = socket::path_prober(&source.netns, own).map_err(unknown("probing socket"))?;
    let _attested = node.maps.attest(tuple(from, to), Attestation::by_agent(destination.slot)).map_err(|error| {
        LaneFault::Probe(match error {
            NotAttested::Taken => format!("{from} to {to} is a connection already"),
            NotAttested::Full => "the kernel's table of attested connections is full".into(),
            NotAttested::Failed(error) => error.to_string(),
        })
    })?;

    let way = format!("{from} to {to}");
    // Taken from the beginning: connections of the pod itself would fill the socket's queue, and this one never come in.
    let mut arriving = pin!(arrival(&listener, from));
    let mut arrived = None;
    let connecting = async {
        let mut connecting = pin!(TcpSocket::from_std_stream(socket.into()).connect(to));
        loop {
            tokio::select! {
                connected = &mut connecting => return connected,
                came = &mut arriving, if arrived.is_none() => arrived = Some(came),
            }
        }
    };
    let stream = match timeout(limits::PROBE, connecting).await {
        Err(_) => return Err(LaneFault::Probe(format!("{way}: no answer in {:?}", limits::PROBE))),
        Ok(connected) => connected.map_err(unknown(&way))?,
    };
    let arrived = match arrived {
        Some(came) => came,
        None => timeout(limits::PROOF_ARRIVAL, arriving).await.map_err(|_| {
            LaneFault::Rewritten(format!("{way} was answered, but did not arrive at the pod with these addresses"))
        })?,
    };
    let token = random().map_err(unknown("probe's token"))?;
    match timeout(limits::PROBE, said(stream, arrived.map_err(unknown(&way))?, token)).await {
        Err(_) => Err(LaneFault::Probe(format!("{way}: nothing said in {:?}", limits::PROBE))),
        Ok(Err(error)) => Err(unknown(&way)(error)),
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(LaneFault::Rewritten(format!("{way} arrived, but not what was said on it"))),
    }
}

/// Waits for the connection that is from `from`. Others are of the pod itself.
async fn arrival(listener: &TcpListener, from: SocketAddr) -> std::io::Result<TcpStream> {
    loop {
        let (stream, peer) = listener.accept().await?;
        if peer == from {
            return Ok(stream);
        }
    }
}

/// Whether one end hears what the other says.
async fn said(mut stream: TcpStream, mut arrived: TcpStream, token: [u8; 16]) -> std::io::Result<bool> {
    stream.write_all(&token).await?;
    let mut heard = [0; 16];
    arrived.read_exact(&mut heard).await?;
    Ok(heard == token)
}
