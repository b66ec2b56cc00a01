//! Where the node keeps a pod: its netns and cgroup, asked through one small trait.
//!
//! It only names paths. Whether they exist, and belong to the pod, is capture's to find out.
//!
//! - [`AnnotatedPlaces`]: the pod's own annotations say it
//! - [`NodePlaces`]: found by the pod's uid, among the processes and cgroups of the node

mod cgroups;
mod node;
mod scan;

use std::{fmt, path::PathBuf};

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

pub use node::{Announcement, MIRROR, NodePlaces, STATIC_POD};

use super::Place;

/// Annotation that names the file of a pod's network namespace, an absolute path.
pub const NETNS: &str = "lab.heddle.dev/netns";
/// Annotation that names a pod's cgroup folder, an absolute path.
pub const CGROUP: &str = "lab.heddle.dev/cgroup";

/// Finds a pod's netns and cgroup on this node.
pub trait Places: Send + Sync + fmt::Debug {
    /// `None` where the pod is not on this node, or not found yet.
    fn locate(&self, pod: &Pod) -> Option<Place>;

    /// Rises whenever a pod may be found elsewhere than before: a source indexes again then. `None` where that depends on the
    /// objects alone.
    fn changes(&self) -> Option<watch::Receiver<u64>> {
        None
    }
}

/// Places that the pod's own annotations name, [`NETNS`] and [`CGROUP`]: for pods that no container runtime made.
/// Whoever can write a pod's annotations chooses the netns that the agent enters, so it is not for clusters.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnnotatedPlaces;

impl Places for AnnotatedPlaces {
    fn locate(&self, pod: &Pod) -> Option<Place> {
        let annotations = pod.metadata.annotations.as_ref()?;
        let absolute = |key| annotations.get(key).map(PathBuf::from).filter(|path| path.is_absolute());
        Some(Place { netns: absolute(NETNS)?, cgroup: absolute(CGROUP)?, ..Place::default() })
    }
}
