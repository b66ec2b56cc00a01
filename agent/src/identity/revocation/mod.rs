//! Which certificates count no more: revocation lists (RFC 5280 §5) from one file, in force as long as they are fresh.
//!
//! Beside `verify`, which asks [`Standing`] at each handshake. What can't be used is never passed over: until it can, new
//! mutual TLS is refused, or what the last good lists say holds, as configured.

mod lists;

pub use lists::ListStatus;
pub(super) use lists::Lists;

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Instant, SystemTime},
};

use arc_swap::ArcSwap;
use rustls_pki_types::CertificateDer;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use super::roots::{Roots, read_capped};
use crate::life::limits;

/// Where revocation lists come from, and what happens while they can't be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrlConfig {
    /// PEM, one list or several.
    pub path: PathBuf,
    pub failure: CrlFailure,
}

/// What happens while a revocation list can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum CrlFailure {
    /// New mutual TLS is refused.
    #[default]
    Refuse,
    /// What the last good lists say holds. Where there are none yet, new mutual TLS is refused.
    LastGood,
}

/// Why lists can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CrlFault {
    #[error("can't be read: {0}")]
    Unreadable(String),
    #[error("is no valid PEM file of revocation lists: {0}")]
    Invalid(String),
    #[error("holds a list of {issuer:?} that no certificate of the trust bundle has signed")]
    Untrusted { issuer: String },
    #[error("holds a list of {issuer:?}, whose certificate may not sign lists (key usage cRLSign)")]
    NotASigner { issuer: String },
    #[error("holds a list of {issuer:?} that was to be replaced before {}", humantime::format_rfc3339_seconds(*since))]
    Expired { issuer: String, since: SystemTime },
    #[error("can't be verified yet: there is no trust bundle")]
    NoRoots,
}

impl CrlFault {
    /// Every reason, for metrics.
    pub const REASONS: [&str; 6] =
        ["crl_unreadable", "crl_invalid", "crl_untrusted", "crl_not_a_signer", "crl_expired", "crl_without_roots"];

    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "crl_unreadable",
            Self::Invalid(_) => "crl_invalid",
            Self::Untrusted { .. } => "crl_untrusted",
            Self::NotASigner { .. } => "crl_not_a_signer",
            Self::Expired { .. } => "crl_expired",
            Self::NoRoots => "crl_without_roots",
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "put the file there, readable, or start the agent without --crl",
            Self::Invalid(_) => "write each list whole, as PEM (-----BEGIN X509 CRL-----), version 2, not a delta",
            Self::Untrusted { .. } => {
                "take the list out, or add its issuer: an intermediate's certificate to the same file, a root to the bundle"
            }
            Self::NotASigner { .. } => "issue the CA's certificate with the key usage cRLSign",
            Self::Expired { .. } => "write a fresh list from the CA, and renew it before its nextUpdate",
            Self::NoRoots => "wait for the CA to publish its root, or mend --ca-root",
        }
    }
}

/// A file that can't be used, as people are told of it: one line with the file, what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CRL {} {fault}; {}", path.display(), fault.fix())]
pub struct CrlError {
    pub path: PathBuf,
    pub fault: CrlFault,
}

/// Revocation as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrlStatus {
    /// Rises whenever other lists come into force.
    pub generation: u64,
    /// Those in force.
    pub lists: Vec<ListStatus>,
    pub problem: Option<CrlError>,
    /// New mutual TLS is refused because of the problem.
    pub refuses: bool,
}

/// What a handshake is judged by.
#[derive(Debug, Clone, Default)]
pub(super) enum Standing {
    /// Nobody asked for revocation.
    #[default]
    Unasked,
    InForce(Arc<Lists>),
    /// Nothing can be said, for this reason, so nobody gets in.
    Unknown(&'static str),
}

/// Follows the file and says what stands.
#[derive(Debug)]
pub(super) struct Revocation {
    config: CrlConfig,
    roots: Arc<ArcSwap<Roots>>,
    standing: Arc<ArcSwap<Standing>>,
    status: watch::Sender<CrlStatus>,
}

impl Revocation {
    /// Reads the file for the first time.
    pub fn new(config: CrlConfig, roots: Arc<ArcSwap<Roots>>, standing: Arc<ArcSwap<Standing>>) -> (Self, Follower) {
        let status = CrlStatus { generation: 0, lists: Vec::new(), problem: None, refuses: true };
        let revocation = Self { config, roots, standing, status: watch::Sender::new(status) };
        let mut follower = Follower::default();
        follower.look(&revocation, SystemTime::now());
        (revocation, follower)
    }

    pub fn status(&self) -> watch::Receiver<CrlStatus> {
        self.status.subscribe()
    }

    /// Puts a judgement in force, and tells of it once.
    fn settle(&self, judged: Result<Arc<Lists>, CrlFault>, last_good: Option<&Arc<Lists>>) {
        let problem =
            judged.as_ref().err().map(|fault| CrlError { path: self.config.path.clone(), fault: fault.clone() });
        let standing = match (&judged, self.config.failure, last_good) {
            (Ok(lists), ..) => Standing::InForce(Arc::clone(lists)),
            (Err(_), CrlFailure::LastGood, Some(lists)) => Standing::InForce(Arc::clone(lists)),
            (Err(fault), ..) => Standing::Unknown(fault.reason()),
        };
        let (lists, refuses) = match &standing {
            Standing::InForce(lists) => (lists.status(), false),
            Standing::Unasked | Standing::Unknown(_) => (Vec::new(), true),
        };
        self.standing.store(Arc::new(standing));
        let told = self.status.borrow().problem != problem;
        match (&problem, refuses) {
            (Some(error), true) if told => {
                tracing::error!(reason = error.fault.reason(), "{error}. New mutual TLS is refused until then.");
            }
            (Some(error), false) if told => {
                tracing::error!(
                    reason = error.fault.reason(),
                    "{error}. The last good lists stay in force until then."
                );
            }
            (None, _) => {
                let revoked: usize = lists.iter().map(|list| list.revoked).sum();
                tracing::info!(file = %self.config.path.display(), lists = lists.len(), revoked, "CRL in force.");
            }
            _ => {}
        }
        self.status.send_modify(|status| {
            *status = CrlStatus { generation: status.generation + u64::from(judged.is_ok()), lists, problem, refuses };
        });
    }
}

/// What tells that a file is another than before, without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        // Through symbolic links: a ConfigMap's files change by them.
        let found = fs::metadata(path)?;
        let changed = (found.ctime(), found.ctime_nsec());
        Ok(Self { device: found.dev(), inode: found.ino(), size: found.size(), changed })
    }
}

/// The file's bytes, or why they can't be read.
type Content = Result<Vec<u8>, String>;

/// What was seen of the file so far.
#[derive(Debug, Default)]
pub(super) struct Follower {
    stamp: Option<Stamp>,
    read: Option<Instant>,
    /// What the last judgement rests on.
    judged: Option<(Content, Arc<Roots>)>,
    /// What came of it.
    outcome: Option<Result<Arc<Lists>, CrlFault>>,
    last_good: Option<Arc<Lists>>,
}

impl Follower {
    /// Whether there is something to read: the file looks changed, the roots are others, or it was not read for a while.
    fn due(&self, revocation: &Revocation) -> bool {
        self.read.is_none_or(|at| at.elapsed() >= limits::BUNDLE_POLL)
            || self.stamp != Stamp::of(&revocation.config.path).ok()
            || !self.same_roots(&revocation.roots.load())
    }

    fn same_roots(&self, roots: &Arc<Roots>) -> bool {
        self.judged.as_ref().is_some_and(|(_, before)| Arc::ptr_eq(before, roots))
    }

    /// Reads the file and settles what changed.
    fn look(&mut self, revocation: &Revocation, now: SystemTime) {
        let path = &revocation.config.path;
        // Before it is read: what changes meanwhile is read again.
        self.stamp = Stamp::of(path).ok();
        self.read = Some(Instant::now());
        let roots = revocation.roots.load_full();
        let bytes = read_capped(path, limits::CRL_BYTES).map_err(|error| error.to_string());
        let same = self.same_roots(&roots) && self.judged.as_ref().is_some_and(|(before, _)| *before == bytes);
        if same && matches!(self.outcome, Some(Ok(_))) {
            return self.age(revocation, now);
        }
        let outcome = judge(&bytes, roots.certificates(), now).map(Arc::new);
        self.judged = Some((bytes, roots));
        self.decide(revocation, outcome);
    }

    /// A list that was good may have become too old meanwhile.
    fn age(&mut self, revocation: &Revocation, now: SystemTime) {
        let Some(Ok(lists)) = &self.outcome else { return };
        if let Some(fault) = lists.expired(now) {
            self.decide(revocation, Err(fault));
        }
    }

    fn decide(&mut self, revocation: &Revocation, outcome: Result<Arc<Lists>, CrlFault>) {
        if let (Err(new), Some(Err(old))) = (&outcome, &self.outcome)
            && new == old
        {
            return;
        }
        if let Ok(lists) = &outcome {
            self.last_good = Some(Arc::clone(lists));
        }
        revocation.settle(outcome.clone(), self.last_good.as_ref());
        self.outcome = Some(outcome);
    }
}

/// What a file says under these roots.
fn judge(bytes: &Content, roots: &[CertificateDer<'_>], now: SystemTime) -> Result<Lists, CrlFault> {
    let bytes = bytes.as_ref().map_err(|error| CrlFault::Unreadable(error.clone()))?;
    let lists = Lists::parse(bytes, roots)?;
    match lists.expired(now) {
        Some(fault) => Err(fault),
        None => Ok(lists),
    }
}

/// Follows the file until `stop`.
pub(super) async fn follow(revocation: Arc<Revocation>, mut follower: Follower, stop: CancellationToken) {
    let mut due = interval(limits::CRL_LOOK);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let following = async {
        loop {
            due.tick().await;
            if !follower.due(&revocation) {
                follower.age(&revocation, SystemTime::now());
                continue;
            }
            // A long list takes a while.
            let reading = Arc::clone(&revocation);
            let read = tokio::task::spawn_blocking(move || {
                follower.look(&reading, SystemTime::now());
                follower
            });
            follower = match read.await {
                Ok(follower) => follower,
                Err(error) => {
                    revocation.settle(Err(CrlFault::Invalid(format!("reading it broke off: {error}"))), None);
                    Follower::default()
                }
            };
        }
    };
    let _stopped: Option<std::convert::Infallible> = stop.run_until_cancelled(following).await;
}
