//! The last good snapshot on disk: the trimmed objects that an agent decided by, for the next one to decide alike while the API
//! server is away.
//!
//! One line says what it is, how long and of which SHA-256 the rest is; the rest is the objects in JSON. It is taken whole or
//! not at all, and replaced by a rename. Nothing of it is secret, and nobody else may write it: it says what is allowed.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{
        InvalidPolicy, Objects,
        kinds::{AuthorizationPolicy, PeerAuthentication},
    },
    life::limits,
};

/// Its name in the state directory.
pub(super) const FILE: &str = "last-good-snapshot";
const FORMAT: &str = "heddle last good snapshot";
/// Raised whenever an older agent would read it otherwise than it is meant.
const VERSION: u32 = 1;
/// The first line is far shorter (bytes).
const HEAD: u64 = 4 << 10;

/// Why there is no snapshot to be had from disk.
#[derive(Debug, thiserror::Error)]
pub(super) enum SavedError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("is larger than {} bytes", limits::SAVED_BYTES)]
    TooLarge,
    #[error("is no regular file of the agent's user that nobody else may write")]
    NotOurs,
    #[error("is no snapshot of heddle's, or its beginning is broken")]
    Foreign,
    #[error("is of version {0}, and this agent knows {VERSION}")]
    Version(u32),
    #[error("is of node {node:?} in cluster {cluster:?}")]
    Elsewhere { node: String, cluster: String },
    #[error("is {} old, more than {}", humantime::format_duration(*.0), humantime::format_duration(limits::SAVED_AGE))]
    Old(Duration),
    #[error("was written {} from now: the clock was or is wrong", humantime::format_duration(*.0))]
    Future(Duration),
    #[error("is broken: {0}")]
    Broken(String),
}

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    format: String,
    version: u32,
    /// Seconds since 1970: the objects were the API server's last word then.
    written: u64,
    node: String,
    cluster: String,
    bytes: u64,
    sha256: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Body {
    namespaces: Vec<Arc<Namespace>>,
    nodes: Vec<Arc<Node>>,
    pods: Vec<Arc<Pod>>,
    services: Vec<Arc<Service>>,
    endpoint_slices: Vec<Arc<EndpointSlice>>,
    authorization_policies: Vec<Arc<AuthorizationPolicy>>,
    peer_authentications: Vec<Arc<PeerAuthentication>>,
    invalid_policies: Vec<Arc<InvalidPolicy>>,
}

/// Where it is, and of whom.
#[derive(Debug, Clone)]
pub(super) struct Saved {
    directory: PathBuf,
    node: Arc<str>,
    cluster: Arc<str>,
}

impl Saved {
    pub fn new(directory: PathBuf, node: Arc<str>, cluster: Arc<str>) -> Self {
        Self { directory, node, cluster }
    }

    pub fn path(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    /// Replaces it. Blocks.
    ///
    /// # Errors
    /// When it can't be written; then the one before stays.
    pub fn write(&self, objects: &Objects, now: SystemTime) -> Result<(), SavedError> {
        let body = Body {
            namespaces: objects.namespaces.clone(),
            nodes: objects.nodes.clone(),
            pods: objects.pods.clone(),
            services: objects.services.clone(),
            endpoint_slices: objects.endpoint_slices.clone(),
            authorization_policies: objects.authorization_policies.clone(),
            peer_authentications: objects.peer_authentications.clone(),
            invalid_policies: objects.invalid_policies.clone(),
        };
        let broken = |error: serde_json::Error| SavedError::Broken(error.to_string());
        let body = serde_json::to_vec(&body).map_err(broken)?;
        if body.len() as u64 > limits::SAVED_BYTES {
            return Err(SavedError::TooLarge);
        }
        let head = Head {
            format: FORMAT.to_owned(),
            version: VERSION,
            written: now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            node: self.node.to_string(),
            cluster: self.cluster.to_string(),
            bytes: body.len() as u64,
            sha256: digest(&body),
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let (path, next) = (self.path(), self.directory.join(format!("{FILE}.new")));
        let written = || {
            // One that an agent left which was killed is in nobody's use: there is one agent.
            match fs::remove_file(&next) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&next)?;
            let mut line = serde_json::to_vec(&head).map_err(io::Error::other)?;
            line.push(b'\n');
            file.write_all(&line)?;
            file.write_all(&body)?;
            file.sync_all()?;
            fs::rename(&next, &path)?;
            File::open(&self.directory)?.sync_all()
        };
        written().map_err(|error| {
            // The first error is the one to report.
            let _ = fs::remove_file(&next);
            error.into()
        })
    }

    /// What was written last, and when; `None` where there is nothing. Blocks.
    ///
    /// # Errors
    /// Why it can't be used.
    pub fn read(&self, now: SystemTime) -> Result<Option<(Objects, SystemTime)>, SavedError> {
        let Some(file) = open(&self.path())? else { return Ok(None) };
        let mut file = BufReader::new(file);
        let mut line = Vec::new();
        file.by_ref().take(HEAD).read_until(b'\n', &mut line)?;
        let head: Head = serde_json::from_slice(&line).map_err(|_| SavedError::Foreign)?;
        if head.format != FORMAT {
            return Err(SavedError::Foreign);
        }
        if head.version != VERSION {
            return Err(SavedError::Version(head.version));
        }
        if head.node != *self.node || head.cluster != *self.cluster {
            return Err(SavedError::Elsewhere { node: head.node, cluster: head.cluster });
        }
        let written = UNIX_EPOCH.checked_add(Duration::from_secs(head.written)).ok_or(SavedError::Foreign)?;
        match now.duration_since(written) {
            Ok(age) if age > limits::SAVED_AGE => return Err(SavedError::Old(Duration::from_secs(age.as_secs()))),
            Ok(_) => {}
            Err(ahead) if ahead.duration() > limits::CLOCK_SKEW => {
                return Err(SavedError::Future(Duration::from_secs(ahead.duration().as_secs())));
            }
            Err(_) => {}
        }
        if head.bytes > limits::SAVED_BYTES {
            return Err(SavedError::TooLarge);
        }
        let mut body = Vec::new();
        file.take(head.bytes + 1).read_to_end(&mut body)?;
        if body.len() as u64 != head.bytes {
            return Err(SavedError::Broken(format!("it has not the {} bytes that it says", head.bytes)));
        }
        if digest(&body) != head.sha256 {
            return Err(SavedError::Broken("it has another SHA-256 than it says".to_owned()));
        }
        let body: Body = serde_json::from_slice(&body).map_err(|error| SavedError::Broken(error.to_string()))?;
        let objects = Objects {
            namespaces: body.namespaces,
            nodes: body.nodes,
            pods: body.pods,
            services: body.services,
            endpoint_slices: body.endpoint_slices,
            authorization_policies: body.authorization_policies,
            peer_authentications: body.peer_authentications,
            invalid_policies: body.invalid_policies,
            policy_gaps: Vec::new(),
        };
        Ok(Some((objects, written)))
    }
}

fn open(path: &Path) -> Result<Option<File>, SavedError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A symbolic link.
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(SavedError::NotOurs),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    let ours = metadata.is_file() && metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    if ours { Ok(Some(file)) } else { Err(SavedError::NotOurs) }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
