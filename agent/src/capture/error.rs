//! What can go wrong between a pod and the kernel, each with a stable reason.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

/// Why capture could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("pod {0} is not attached")]
    NotAttached(Arc<str>),
    /// A step of enrolment or withdrawal; the step is the reason.
    #[error("pod {pod}: {}: {source}", step.as_str())]
    Pod { pod: Arc<str>, step: Step, source: io::Error },
    #[error("pod {pod}: {detail}")]
    Spec { pod: Arc<str>, detail: String },
    #[error("pod {pod}: the programs were refused by the kernel: {detail}")]
    Programs { pod: Arc<str>, detail: String },
    #[error("{}: {source}", path.display())]
    Bpffs { path: PathBuf, source: io::Error },
    #[error("map {map}: {detail}")]
    Map { map: &'static str, detail: String },
    #[error("the {wanted} mesh addresses do not fit the {capacity} entries of the kernel's table")]
    DestinationsFull { wanted: usize, capacity: u32 },
    #[error("all {0} slots for enrolled pods are taken")]
    SlotsFull(u32),
    #[error("pod {pod}: the kernel's table of attested connections is full")]
    AttestedFull { pod: Arc<str> },
    #[error("pod {pod}: no free source port for a delivery from {client} to {app} after {tries} tries")]
    NoPort { pod: Arc<str>, client: IpAddr, app: SocketAddr, tries: u32 },
    #[error("pod {pod}: {source_address} and {destination} are of different address families")]
    Family { pod: Arc<str>, source_address: IpAddr, destination: SocketAddr },
    #[error("pod {pod}: {address} is not its address")]
    NotOwn { pod: Arc<str>, address: IpAddr },
    #[error("pod {pod}: socket for {destination}: {source}")]
    Socket { pod: Arc<str>, destination: SocketAddr, source: io::Error },
    /// The other end refused or could not be reached; `source` says which.
    #[error("pod {pod}: connect to {destination}: {source}")]
    Connect { pod: Arc<str>, destination: SocketAddr, source: io::Error },
    #[error("the kubelet's cgroup {}: {detail}", cgroup.display())]
    Kubelet { cgroup: PathBuf, detail: String },
    #[error("probe: {0}")]
    Probe(#[source] io::Error),
    /// The runtime is shutting down.
    #[error("capture is shutting down")]
    ShuttingDown,
}

/// A step of enrolment or withdrawal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Netns,
    Cgroup,
    Record,
    Sysctl,
    Route,
    Listener,
    Link,
    Pins,
    Older,
}

impl Step {
    fn as_str(self) -> &'static str {
        match self {
            Self::Netns => "network namespace",
            Self::Cgroup => "cgroup",
            Self::Record => "record of the pod",
            Self::Sysctl => "sysctl",
            Self::Route => "rule and route",
            Self::Listener => "listener",
            Self::Link => "link",
            Self::Pins => "pins",
            Self::Older => "older connections",
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Netns => "netns",
            Self::Cgroup => "cgroup",
            Self::Record => "record",
            Self::Sysctl => "sysctl",
            Self::Route => "route",
            Self::Listener => "listener",
            Self::Link => "link",
            Self::Pins => "pins",
            Self::Older => "older",
        }
    }
}

impl CaptureError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAttached(_) => "not_attached",
            Self::Pod { step, .. } => step.reason(),
            Self::Spec { .. } => "spec",
            Self::Programs { .. } => "programs",
            Self::Bpffs { .. } => "bpffs",
            Self::Map { .. } => "map",
            Self::DestinationsFull { .. } => "destinations_full",
            Self::SlotsFull(_) => "slots_full",
            Self::AttestedFull { .. } => "attested_full",
            Self::NoPort { .. } => "no_port",
            Self::Family { .. } => "address_family",
            Self::NotOwn { .. } => "not_own_address",
            Self::Socket { .. } => "socket",
            Self::Connect { .. } => "connect",
            Self::Kubelet { .. } => "kubelet_programs",
            Self::Probe(_) => "probe",
            Self::ShuttingDown => "shutting_down",
        }
    }

    /// The operating system's error, where there is one: tells a refused connection from an unreachable one.
    #[must_use]
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::Pod { source, .. }
            | Self::Bpffs { source, .. }
            | Self::Socket { source, .. }
            | Self::Connect { source, .. }
            | Self::Probe(source) => Some(source),
            _ => None,
        }
    }
}
