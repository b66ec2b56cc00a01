//! The one door to capture: plain values in, plain values and sockets out.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

pub use super::{caller::Caller, error::CaptureError, load::AttachedProgram, ports::Occupied, probe::ProbeCommand};
use super::{
    connect,
    enrol::{self, blocking},
    kernel, kubelet,
    lane::Lane,
    load::{self, Object},
    maps::Maps,
    messages,
    netns::Home,
    older::{self, Older},
    pin::Pins,
    pod::{Node, Slots},
    probe, prove,
};
use crate::cluster::{Place, Unattended};
use heddle_common::attested_by;

/// Where capture keeps its pins, and how it probes.
#[derive(Debug, Clone)]
pub struct CaptureConfig {
    /// Folder in a bpffs, made if absent (the bpffs is mounted if it is not); the layout version's folder goes below it.
    pub bpffs: PathBuf,
    /// Starts the process that an outbound probe needs; `heddle probe` by default.
    pub probe: ProbeCommand,
}

/// A pod to enrol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    pub uid: Arc<str>,
    /// `namespace/name`, for messages.
    pub name: Arc<str>,
    pub addresses: Vec<IpAddr>,
    pub place: Place,
    pub when_unattended: Unattended,
    /// Ports on which the kubelet's connections are let through.
    pub probes: BTreeSet<u16>,
}

/// Sixteen random bytes that only the pod's true listener answers a probe with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeToken(pub [u8; 16]);

/// A pod whose programs are attached and whose listener is open. Not proven yet: see [`Handle::prove`].
#[derive(Debug)]
pub struct Attached {
    /// Dual stack, non-blocking, listening, transparent, inside the pod's netns. Of an accepted socket `local_addr()` is
    /// the original destination; IPv4 addresses may be mapped (`::ffff:a.b.c.d`).
    pub listener: std::net::TcpListener,
    pub token: ProbeToken,
}

/// What was measured of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PodState {
    /// Programs attached, not proven yet.
    Attached,
    /// Links, programs, listener and probe connections were seen to work.
    Captured,
    /// Not proven; `reason` is stable (a metric label), `detail` is for people.
    Uncaptured { reason: &'static str, detail: String },
}

#[derive(Debug, Clone)]
pub struct PodStatus {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub state: PodState,
    /// Sum over CPUs of the kernel's counters.
    pub counts: heddle_common::PodCounts,
}

/// A delivery socket: bound to the client's address, marked, in the pod's netns, connected to the app.
#[derive(Debug)]
pub struct Delivery {
    pub stream: tokio::net::TcpStream,
}

/// Capture on this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    node: Arc<Node>,
}

impl Handle {
    /// Opens or creates the pinned maps of this layout version, and loads the programs once to learn whether this kernel
    /// takes them. The calling thread's netns is from now on the agent's own.
    pub async fn start(config: CaptureConfig) -> Result<Self, CaptureError> {
        let (node, program, id) = blocking(move || open(config)).await?;
        tokio::spawn(messages::forward(program, id));
        Ok(Self { node: Arc::new(node) })
    }

    /// Loads or adopts the pod's programs, opens its listener, puts it in the map. Idempotent per uid: the same pod gives
    /// another descriptor of the same listener. A changed spec (addresses, place, `when_unattended`) is applied without a gap;
    /// only a changed netns has a new listener.
    pub async fn attach(&self, pod: PodSpec) -> Result<Attached, CaptureError> {
        enrol::attach(&self.node, pod).await
    }

    /// Reads the kernel back and makes probe connections; the caller must already be serving the listener and answer
    /// probes (see [`Handle::is_probe`]). On failure the pod's listener is taken out of the map: blocked, not leaked. The next
    /// call puts it back first.
    pub async fn prove(&self, uid: &str) -> PodState {
        prove::prove(&self.node, uid).await
    }

    /// Whether an accepted connection is a probe: then the token is written to it and it is closed.
    #[must_use]
    pub fn is_probe(original_destination: SocketAddr, peer: SocketAddr) -> bool {
        probe::is_probe(original_destination, peer)
    }

    /// Gives up capture's own hold on the pod's listener, which closes once the caller has closed its descriptor too: from then
    /// on new connections are refused (or pass, where the pod asks for that), and another agent may open its own. For an
    /// agent that drains. [`Handle::attach`] opens a new one.
    pub async fn unlisten(&self, uid: &str) -> Result<(), CaptureError> {
        enrol::unlisten(&self.node, uid, false).await
    }

    /// Takes the pod's programs off and gives up the listener: from then on its new connections are its own, in both
    /// directions. Rules and routes stay for the connections that the agent carries; [`Handle::withdraw`] takes them when
    /// those have ended.
    pub async fn release(&self, uid: &str) -> Result<(), CaptureError> {
        enrol::unlisten(&self.node, uid, true).await
    }

    /// Takes away everything of the pod: links, rules, routes, sysctl, pins. Connections that the agent still carries for the pod
    /// lose their route: close them first. The app's own are untouched.
    pub async fn withdraw(&self, uid: &str) -> Result<(), CaptureError> {
        match enrol::withdraw(&self.node, uid).await? {
            true => Ok(()),
            false => Err(CaptureError::NotAttached(Arc::from(uid))),
        }
    }

    /// Withdraws every pinned pod that is not in `keep` (pods that went while no agent ran), then removes what other layout
    /// versions left behind: call it when everything in `keep` is attached. Gives the uids. Goes on after a failure and gives
    /// the first.
    pub async fn reap(&self, keep: &HashSet<Arc<str>>) -> Result<Vec<String>, CaptureError> {
        let node = Arc::clone(&self.node);
        let bpffs = self.node.config.bpffs.clone();
        let (pods, versions) = blocking(move || {
            let read = || Ok((node.pins.pods()?, node.pins.other_versions()?));
            read().map_err(|source| CaptureError::Bpffs { path: bpffs, source })
        })
        .await?;
        let kept: HashSet<PathBuf> = keep.iter().map(|uid| self.node.pins.pod(uid)).collect();
        let mut gone = Vec::new();
        let mut first = Ok(());
        for (folder, record) in pods {
            if kept.contains(&folder) {
                continue;
            }
            let result = match record {
                Some(record) => enrol::withdraw(&self.node, &record.uid).await.map(|_| record.uid),
                // Nobody can say whose this was; its programs go with its pins.
                None => {
                    let name = folder.display().to_string();
                    blocking(move || {
                        super::pin::remove(&folder).map_err(|source| CaptureError::Bpffs { path: folder, source })
                    })
                    .await
                    .map(|()| name)
                }
            };
            match result {
                Ok(uid) => gone.push(uid),
                Err(error) => first = first.and(Err(error)),
            }
        }
        for version in versions {
            first = first.and(enrol::remove_version(&self.node, &version, |uid| keep.contains(uid)).await);
        }
        first.map(|()| gone)
    }

    /// Makes the set of captured destinations exactly this one. An address that was and stays in the set is captured throughout.
    pub async fn set_destinations(&self, addresses: HashSet<IpAddr>) -> Result<(), CaptureError> {
        let node = Arc::clone(&self.node);
        blocking(move || {
            let mut destinations = node.destinations.lock().unwrap_or_else(PoisonError::into_inner);
            destinations.set(&node.maps, &addresses)
        })
        .await
    }

    /// The programs that capture the pod, read back from the kernel.
    pub async fn programs(&self, uid: &str) -> Result<Vec<AttachedProgram>, CaptureError> {
        let (_, live) = self.node.live(uid)?;
        let folder = self.node.pins.pod(uid);
        blocking(move || {
            load::attached(&folder, live.netns.inode(), live.cgroup.id())
                .map_err(|source| CaptureError::Bpffs { path: folder, source })
        })
        .await
    }

    /// Starts a process in the pod's cgroup and netns that will connect to `to` as the pod's app would.
    pub async fn caller(&self, uid: &str, to: SocketAddr, say: &str) -> Result<Caller, CaptureError> {
        let (_, live) = self.node.live(uid)?;
        let place = &live.spec.place;
        Caller::start(&self.node.config.probe, &place.netns, &place.cgroup, to, say).await
    }

    /// Vouches for the connections of this cgroup's own tasks to probe ports from now on, in the place of an earlier cgroup. It
    /// goes on without this process.
    pub async fn attest_kubelet(&self, cgroup: &Path) -> Result<(), CaptureError> {
        let (node, cgroup) = (Arc::clone(&self.node), cgroup.to_owned());
        blocking(move || kubelet::attach(&node, &cgroup)).await
    }

    /// Vouches for nobody's any more. Whether it did.
    pub async fn forget_kubelet(&self) -> Result<bool, CaptureError> {
        let node = Arc::clone(&self.node);
        blocking(move || kubelet::release(&node)).await
    }

    /// Id of the cgroup whose connections are vouched for, read back from the kernel; `None` where it is none's, or that cgroup is
    /// gone.
    pub async fn attested_kubelet(&self) -> Result<Option<u64>, CaptureError> {
        let node = Arc::clone(&self.node);
        blocking(move || kubelet::attached(&node)).await
    }

    /// Every pod that was attached or should have been, in no order. A few system calls per pod.
    #[must_use]
    pub fn status(&self) -> Vec<PodStatus> {
        let status = |pod: Arc<super::pod::Pod>| {
            let counts = pod.live().and_then(|live| match self.node.maps.counts(live.slot) {
                Ok(counts) => Some(counts),
                Err(error) => {
                    tracing::warn!(pod = %pod.name(), %error, "the pod's counters could not be read");
                    None
                }
            });
            PodStatus {
                uid: Arc::clone(&pod.uid),
                name: pod.name(),
                state: pod.state(),
                counts: counts.unwrap_or_default(),
            }
        };
        self.node.pods().into_iter().map(status).collect()
    }

    /// Connections that are older than their pod's enrolment and still open, by the pod's uid. Some system calls for each pod that
    /// has any.
    #[must_use]
    pub fn older(&self) -> Vec<(Arc<str>, Vec<Older>)> {
        older::list(&self.node)
    }

    /// Closes those of a pod: the app sees its connection aborted, the other side a reset. Gives how many were open.
    pub async fn reset_older(&self, uid: &str) -> Result<usize, CaptureError> {
        older::reset(&self.node, uid).await
    }

    /// A connection from the pod's netns and address, as the pod itself would make it, uncaptured (the agent's cgroup is not
    /// the pod's). TCP_NODELAY set. The caller bounds the time.
    pub async fn dial(
        &self,
        uid: &str,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Result<tokio::net::TcpStream, CaptureError> {
        connect::dial(&self.node, uid, source, destination).await
    }

    /// A connection to the pod's app that comes from `client`. TCP_NODELAY set. The caller bounds the time.
    pub async fn deliver(&self, uid: &str, client: IpAddr, app: SocketAddr) -> Result<Delivery, CaptureError> {
        connect::deliver(&self.node, uid, client, app).await
    }

    /// Notes the 4-tuple of a plaintext connection that the agent holds, so that delivery avoids its source port.
    #[must_use]
    pub fn occupy(&self, uid: &str, client: SocketAddr, app: SocketAddr) -> Occupied {
        match self.node.pod(uid) {
            Some(pod) => pod.occupancy.hold(client, app),
            None => Occupied::nothing(),
        }
    }

    /// The kernel lane of this node.
    #[must_use]
    pub fn lane(&self) -> Lane {
        Lane::new(Arc::clone(&self.node))
    }

    #[cfg(test)]
    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

fn open(config: CaptureConfig) -> Result<(Node, OwnedFd, u32), CaptureError> {
    let home =
        Home::here().map_err(|source| CaptureError::Bpffs { path: "/proc/thread-self/ns/net".into(), source })?;
    // From Linux 5.11 on nobody asks for it. Before, the kernel refuses maps, and says nothing better than that.
    let memory =
        kernel::allow_memory().inspect_err(|error| tracing::debug!(%error, "Limit of locked memory not raised"));
    let pins = Pins::open(&config.bpffs)?;
    let (object, program, id) = Object::open(&pins.maps()).map_err(|detail| CaptureError::Programs {
        pod: Arc::from("none yet"),
        detail: match memory {
            Ok(()) => detail,
            Err(error) => format!(
                "{detail}; the limit of locked memory can't be raised ({error}), and before Linux 5.11 maps are a part of that: give \
                 the container CAP_SYS_RESOURCE"
            ),
        },
    })?;
    let maps = Maps::open(&pins.maps())?;
    // Entries of an agent that died between vouching and connecting.
    let stale = maps.sweep_attested(|by| by.by == attested_by::AGENT)?;
    if stale > 0 {
        tracing::info!(stale, "removed attested connections of an earlier agent");
    }
    let mut slots = Slots::default();
    let recorded = pins.pods().map_err(|source| CaptureError::Bpffs { path: config.bpffs.clone(), source })?;
    for record in recorded.into_iter().filter_map(|(_, record)| record) {
        slots.take(&Arc::from(record.uid.as_str()), Some(record.slot))?;
    }
    let node = Node::new(config, home, pins, object, maps, slots);
    node.destinations.lock().unwrap_or_else(PoisonError::into_inner).keep_probes(&node.maps)?;
    Ok((node, program, id))
}
