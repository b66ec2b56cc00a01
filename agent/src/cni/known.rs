//! Who is in the mesh, as the agent knows it, on disk for the plugin: what decides while no agent answers.
//!
//! It holds names and labels' outcomes, no secret. What it does not know is unknown, never *no*.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::protocol::PodName;
use crate::{
    cluster::{Membership, Snapshot},
    life::limits,
};

/// Its name in the agent's state folder.
pub const FILE: &str = "enrolment.json";
const VERSION: u32 = 1;

/// What the agent last knew.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    version: u32,
    /// What each namespace says of its pods.
    namespaces: BTreeMap<String, Says>,
    /// Pods of this node that are not as their namespace says, by uid: whether they are in the mesh.
    #[serde(default)]
    pods: BTreeMap<String, bool>,
}

/// What a namespace says of a pod that nobody knows yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Says {
    Enrolled,
    NotEnrolled,
    /// It says nothing, and pods of it have opted in themselves: this may be another.
    Either,
}

impl Known {
    /// What a snapshot says, for the pods of `node`.
    #[must_use]
    pub fn of(snapshot: &Snapshot, node: &str) -> Self {
        let says = |membership: &Membership| match membership {
            Membership::Enrolled => Says::Enrolled,
            Membership::Unsaid | Membership::OptedOut => Says::NotEnrolled,
        };
        let mut namespaces: BTreeMap<String, Says> =
            snapshot.namespaces.iter().map(|(name, membership)| (name.to_string(), says(membership))).collect();
        for pod in snapshot.workloads.values().filter(|pod| pod.enrolled) {
            if let Some(said @ Says::NotEnrolled) = namespaces.get_mut(&*pod.namespace) {
                *said = Says::Either;
            }
        }
        let here = snapshot.workloads.values().filter(|pod| *pod.node == *node && !pod.host_network);
        let pods = here.filter(|pod| match namespaces.get(&*pod.namespace) {
            Some(Says::Enrolled) => !pod.enrolled,
            Some(Says::NotEnrolled) => false,
            Some(Says::Either) | None => true,
        });
        let pods = pods.map(|pod| (pod.uid.to_string(), pod.enrolled)).collect();
        Self { version: VERSION, namespaces, pods }
    }

    /// Whether the pod is in the mesh; `None` where nobody can say.
    #[must_use]
    pub fn enrolled(&self, pod: &PodName) -> Option<bool> {
        match (self.pods.get(&pod.uid), self.namespaces.get(&pod.namespace)?) {
            (Some(enrolled), _) => Some(*enrolled),
            (None, Says::Enrolled) => Some(true),
            (None, Says::NotEnrolled) => Some(false),
            (None, Says::Either) => None,
        }
    }

    /// Reads it from the state folder.
    ///
    /// # Errors
    /// When it is not there, or can't be read whole.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let mut text = Vec::new();
        File::open(folder.join(FILE))?.take(limits::CNI_KNOWN + 1).read_to_end(&mut text)?;
        let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
        if text.len() as u64 > limits::CNI_KNOWN {
            return Err(invalid(format!("more than {} bytes", limits::CNI_KNOWN)));
        }
        let known: Self = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        match known.version {
            VERSION => Ok(known),
            other => Err(invalid(format!("version {other}, and this program reads {VERSION}"))),
        }
    }

    /// Writes it into the state folder, made if absent, in the place of what is there.
    ///
    /// # Errors
    /// When the folder or the file can't be written; what is there stays then.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let beside = folder.join(format!(".{FILE}.{}", std::process::id()));
        let written = (|| {
            let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(&beside)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            fs::rename(&beside, folder.join(FILE))
        })();
        written.inspect_err(|_| drop(fs::remove_file(&beside)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cluster::Workload;

    fn snapshot(pods: &[(&str, &str, bool, &str)]) -> Snapshot {
        let namespaces = [
            ("meshed", Membership::Enrolled),
            ("plain", Membership::Unsaid),
            ("mixed", Membership::Unsaid),
            ("out", Membership::OptedOut),
        ];
        let pod = |(namespace, name, enrolled, node): &(&str, &str, bool, &str)| {
            let pod = Workload { enrolled: *enrolled, node: (*node).into(), ..Workload::named(namespace, name) };
            (Arc::clone(&pod.uid), Arc::new(pod))
        };
        Snapshot {
            namespaces: Arc::new(namespaces.map(|(name, says)| (name.into(), says)).into()),
            workloads: pods.iter().map(pod).collect(),
            ..Snapshot::default()
        }
    }

    fn pod(namespace: &str, name: &str) -> PodName {
        PodName { namespace: namespace.into(), name: name.into(), uid: format!("uid-{name}") }
    }

    #[test]
    fn a_pod_is_in_the_mesh_as_its_namespace_or_its_own_label_says() {
        let known = Known::of(
            &snapshot(&[
                ("meshed", "out-here", false, "n"),
                ("meshed", "out-there", false, "other"),
                ("mixed", "in", true, "other"),
                ("mixed", "not-in", false, "n"),
            ]),
            "n",
        );
        for (namespace, name, expected) in [
            ("meshed", "new", Some(true)),
            ("meshed", "out-here", Some(false)),
            // Not of this node: never asked about, so not kept.
            ("meshed", "out-there", Some(true)),
            ("plain", "new", Some(false)),
            ("out", "new", Some(false)),
            ("mixed", "new", None),
            ("mixed", "in", None),
            ("unheard-of", "new", None),
        ] {
            assert_eq!(known.enrolled(&pod(namespace, name)), expected, "{namespace}/{name}");
        }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        assert_eq!(Known::read(&state).unwrap_err().kind(), io::ErrorKind::NotFound);
        let known = Known::of(&snapshot(&[("plain", "in", true, "n")]), "n");
        known.write(&state).unwrap();
        assert_eq!(Known::read(&state).unwrap(), known);
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "nothing is left beside it");
        for text in ["", "{", "{\"version\":2,\"namespaces\":{}}", "{\"version\":1,\"namespaces\":{\"a\":\"no\"}}"] {
            fs::write(state.join(FILE), text).unwrap();
            assert_eq!(Known::read(&state).unwrap_err().kind(), io::ErrorKind::InvalidData, "{text}");
        }
    }
}
