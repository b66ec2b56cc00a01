//! Where the signing key comes from, and the one that is in force.
//!
//! A source is followed for changes. What it holds is used only if it can be signed with; else one line of the log says what
//! is wrong and where, a metric says that something is, and the last good state stays in force.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::{
    CaError,
    root::{KeyError, KeyProblem, Material, Part, Root},
    secret::SecretSource,
};
use crate::{
    identity::{
        RootStatus, TrustDomain,
        roots::{read_capped, span},
    },
    life::limits,
};

/// Names in cert-manager's layout, of a directory and of a Secret alike.
pub(super) const CERTIFICATE: &str = "tls.crt";
pub(super) const KEY: &str = "tls.key";
pub(super) const BUNDLE: &str = "ca.crt";

/// Where the CA's signing key comes from.
#[derive(Debug, Clone)]
pub enum KeySource {
    /// A new root, whose key lives and dies with the process.
    Memory { lifetime: Duration },
    /// PEM files: the issuing certificate first, then those above it; the issuing key; the roots to trust, where they are more
    /// than the root at the end of the first.
    Files { certificate: PathBuf, key: PathBuf, bundle: Option<PathBuf> },
    /// A directory with `tls.crt`, `tls.key` and, where the first does not end with the one root to trust, `ca.crt`.
    Directory(PathBuf),
    /// A Secret with the same keys; made, with a root that lasts so long, where it is absent.
    Secret { namespace: String, name: String, lifetime: Duration },
}

impl KeySource {
    /// What files hold now; `None` for what is in no file.
    fn read(&self) -> Option<Material> {
        match self {
            Self::Memory { .. } | Self::Secret { .. } => None,
            Self::Files { certificate, key, bundle } => Some(files(certificate, key, bundle.as_deref())),
            Self::Directory(directory) => Some(layout(directory)),
        }
    }
}

fn files(certificate: &Path, key: &Path, bundle: Option<&Path>) -> Material {
    Material { certificate: file(certificate), key: file(key), bundle: bundle.map(file) }
}

fn layout(directory: &Path) -> Material {
    let bundle = Some(file(&directory.join(BUNDLE))).filter(|part| !blank(part));
    Material { certificate: file(&directory.join(CERTIFICATE)), key: file(&directory.join(KEY)), bundle }
}

/// cert-manager leaves `ca.crt` out, or empty, where it does not know the root.
pub(super) fn blank(part: &Part) -> bool {
    match &part.content {
        Ok(bytes) => bytes.trim_ascii().is_empty(),
        Err(problem) => *problem == KeyProblem::Missing,
    }
}

pub(super) fn file(path: &Path) -> Part {
    let content = read_capped(path, limits::BUNDLE_BYTES).map(Zeroizing::new).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => KeyProblem::Missing,
        _ => KeyProblem::Unreadable(error.to_string()),
    });
    Part { place: path.display().to_string(), content }
}

/// What metrics show of the signing key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStatus {
    /// Why what the source holds now is not in force; `None` where it is.
    pub bad: Option<KeyError>,
    /// Bad states seen so far, by reason.
    pub errors: BTreeMap<&'static str, u64>,
    /// The roots of the trust bundle.
    pub roots: Vec<RootStatus>,
    /// Serial number of the issuing certificate, lower-case hex, and when nothing can be issued any more.
    pub issuing: String,
    pub not_after: SystemTime,
}

/// The signing key in force.
pub(super) struct Keys {
    source: KeySource,
    secret: Option<SecretSource>,
    current: ArcSwap<Root>,
    health: Mutex<Health>,
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct Health {
    /// What is in force.
    accepted: [u8; 32],
    /// What was bad at the last look, and may be half of a change.
    doubtful: Option<[u8; 32]>,
    bad: Option<KeyError>,
    errors: BTreeMap<&'static str, u64>,
}

impl Keys {
    /// Makes the key or reads it.
    ///
    /// # Errors
    /// When what the source holds can't be signed with: there is no last good state yet.
    pub async fn open(
        source: KeySource,
        trust_domain: &TrustDomain,
        client: Option<&kube::Client>,
    ) -> Result<Self, CaError> {
        let mut secret = None;
        let material = match &source {
            KeySource::Memory { lifetime } => {
                let root = Root::generate(*lifetime, trust_domain)?;
                return Ok(Self::with(source, None, root, [0; 32]));
            }
            KeySource::Secret { namespace, name, lifetime } => {
                let opened = SecretSource::new(client.ok_or(CaError::NoCluster)?.clone(), namespace, name);
                let material = opened.ensure(*lifetime, trust_domain).await?;
                secret = Some(opened);
                material
            }
            KeySource::Files { certificate, key, bundle } => {
                settled(|| files(certificate, key, bundle.as_deref())).await
            }
            KeySource::Directory(directory) => settled(|| layout(directory)).await,
        };
        let root = Root::assemble(&material, SystemTime::now())?;
        Ok(Self::with(source, secret, root, material.fingerprint()))
    }

    fn with(source: KeySource, secret: Option<SecretSource>, root: Root, accepted: [u8; 32]) -> Self {
        let health = Mutex::new(Health { accepted, ..Health::default() });
        Self { source, secret, current: ArcSwap::from_pointee(root), health, changes: watch::Sender::new(()) }
    }

    /// What signs now. One request takes one of these, so that a certificate and its chain always fit.
    pub fn current(&self) -> Arc<Root> {
        self.current.load_full()
    }

    /// Told whenever another root, or another trust bundle, is in force.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    pub fn status(&self) -> KeyStatus {
        let root = self.current();
        let issuing = root.chain.first().and_then(span).map(|(serial, _, _)| serial).unwrap_or_default();
        let health = self.health();
        KeyStatus {
            bad: health.bad.clone(),
            errors: health.errors.clone(),
            roots: root.roots(),
            issuing,
            not_after: root.not_after,
        }
    }

    /// Follows the source until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        let following = async {
            if let Some(secret) = &self.secret {
                secret.follow(|material| self.offer(&material, Whole::Yes, SystemTime::now())).await;
            }
            loop {
                sleep(limits::KEY_LOOK).await;
                if let Some(material) = self.source.read() {
                    self.offer(&material, Whole::Perhaps, SystemTime::now());
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = following => {}
        }
    }

    /// Puts what the source holds in force, or says why not.
    pub fn offer(&self, material: &Material, whole: Whole, now: SystemTime) {
        let fingerprint = material.fingerprint();
        let mut health = self.health();
        if fingerprint == health.accepted && health.bad.is_none() && self.current.load().not_after > now {
            health.doubtful = None;
            return;
        }
        match Root::assemble(material, now) {
            Ok(root) => {
                health.accepted = fingerprint;
                health.doubtful = None;
                let mended = health.bad.take().is_some();
                let changed = !root.same(&self.current.load());
                if changed || mended {
                    let anchor = root.anchor().and_then(span).map(|(serial, ..)| serial).unwrap_or_default();
                    let roots = root.bundle().len();
                    tracing::info!(root = anchor, roots, changed, "Signing key in force.");
                }
                self.current.store(Arc::new(root));
                drop(health);
                if changed {
                    self.changes.send_replace(());
                }
            }
            // Files that are replaced one after the other are bad for a moment.
            Err(_) if whole == Whole::Perhaps && health.doubtful != Some(fingerprint) => {
                health.doubtful = Some(fingerprint);
            }
            Err(error) => {
                if health.bad.as_ref() != Some(&error) {
                    tracing::error!(reason = error.reason(), %error, "Signing key not taken, the last good one stays in force.");
                    *health.errors.entry(error.reason()).or_default() += 1;
                    health.bad = Some(error);
                }
            }
        }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether what was read can be half of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whole {
    Yes,
    Perhaps,
}

/// What files hold, looked at twice where the first look finds something that can't be signed with.
async fn settled(read: impl Fn() -> Material) -> Material {
    let first = read();
    if Root::assemble(&first, SystemTime::now()).is_ok() {
        return first;
    }
    sleep(limits::KEY_SETTLE).await;
    read()
}

#[cfg(test)]
mod tests;
