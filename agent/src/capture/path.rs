//! May the kernel lane go from one pod of this node to another? Measured, because nothing else keeps its plaintext on the node.
//!
//! Beside the journey, before the first connection of a pair. Three questions: are both pods' devices links to this node
//! ([`device`]), do the routes between them stay on those links (`path/route.rs`), and does a connection arrive as it left
//! (`path/probe.rs`)? It decides nothing about policy.

mod device;
mod probe;
mod route;

use std::{io, net::IpAddr, sync::Arc};

use tokio::time::timeout;

pub use device::{VethDevice, device};

use super::{
    netns::Netns,
    pod::{Live, Node},
    route::Link,
};
use crate::life::limits;

/// Why two pods, or a pod and any other, can't talk on the kernel lane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaneFault {
    /// Another way leads into the pod than one link to this node.
    #[error("device: {0}")]
    Device(String),
    /// The way from one pod to the other is not theirs alone.
    #[error("route: {0}")]
    Route(String),
    /// Something between the pods changes addresses, or answers in the other's place.
    #[error("rewritten: {0}")]
    Rewritten(String),
    #[error("this kernel does not tell a netns' cookie (SO_NETNS_COOKIE, Linux 5.14)")]
    NoNetnsCookie,
    /// It could not be measured.
    #[error("probe: {0}")]
    Probe(String),
}

impl LaneFault {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Device(_) => "device",
            Self::Route(_) => "route",
            Self::Rewritten(_) => "rewritten",
            Self::NoNetnsCookie => "no_netns_cookie",
            Self::Probe(_) => "probe",
        }
    }
}

fn unknown(what: &str) -> impl FnOnce(io::Error) -> LaneFault {
    move |error| LaneFault::Probe(format!("{what}: {error}"))
}

/// What is true of a pod whatever the other is.
pub async fn measure(netns: &Netns, addresses: &[IpAddr]) -> Result<VethDevice, LaneFault> {
    match netns.cookie() {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => return Err(LaneFault::NoNetnsCookie),
        other => other.map_err(unknown("netns cookie"))?,
    };
    in_time(device(netns, addresses)).await
}

/// Measures the way from one pod to another, over every pair of their addresses that connections can have. Some milliseconds.
pub async fn prove(node: &Arc<Node>, source: &str, destination: &str) -> Result<(), LaneFault> {
    let live = |uid: &str| node.live(uid).map_err(|error| LaneFault::Probe(error.to_string()));
    let (pod, _) = live(destination)?;
    // A probe takes the destination's tunnel port for itself.
    let _turn = pod.turn.lock().await;
    let ((_, source), (_, destination)) = (live(source)?, live(destination)?);
    let pairs = pairs(&source, &destination);
    if pairs.is_empty() {
        return Err(LaneFault::Probe("the pods have no addresses of the same family".into()));
    }
    let from = measure(&source.netns, &source.spec.addresses).await?;
    let to = measure(&destination.netns, &destination.spec.addresses).await?;
    let home = Link::home().map_err(unknown("netlink"))?;
    let inside = |live: &Live| Link::open(&live.netns).map_err(unknown("netlink"));
    let (at_source, at_destination) = (inside(&source)?, inside(&destination)?);
    for (own, other) in &pairs {
        // Answers carry plaintext too.
        in_time(route::check(&at_source, &home, (*own, &from), (*other, &to))).await?;
        in_time(route::check(&at_destination, &home, (*other, &to), (*own, &from))).await?;
        probe::probe(node, &source, &destination, *own, *other).await?;
    }
    Ok(())
}

/// Source and destination of every connection that may be.
fn pairs(source: &Live, destination: &Live) -> Vec<(IpAddr, IpAddr)> {
    let of = |own: &IpAddr| {
        let own = *own;
        let same = move |other: &&IpAddr| other.is_ipv4() == own.is_ipv4();
        destination.spec.addresses.iter().filter(same).map(move |other| (own, *other)).collect::<Vec<_>>()
    };
    source.spec.addresses.iter().flat_map(of).collect()
}

async fn in_time<T>(measured: impl Future<Output = Result<T, LaneFault>>) -> Result<T, LaneFault> {
    let late = |_| LaneFault::Probe(format!("netlink: no answer in {:?}", limits::PROBE));
    timeout(limits::PROBE, measured).await.map_err(late)?
}
