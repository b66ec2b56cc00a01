//! Follows the kubelet: its cgroup is the one whose probes the kernel vouches for, as long as the kubelet is there.
//!
//! `find` says which cgroup that is, capture hangs the programs. Where nobody can say it, nobody gets a pass, and that is said
//! once in the log and always in `heddle status`.

mod find;

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::limits;
use crate::{
    capture::{self, CaptureError},
    telemetry::KubeletReport,
};
use find::FindError;

/// Why the kubelet's probes are not vouched for.
#[derive(Debug, thiserror::Error)]
enum KubeletError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("it took longer than {:?}", limits::ENROL_STEP)]
    Timeout,
}

impl KubeletError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Find(error) => error.reason(),
            Self::Capture(error) => error.reason(),
            Self::Timeout => "timeout",
        }
    }
}

/// How it stands, for those who ask. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Kubelet(Arc<Mutex<KubeletReport>>);

impl Kubelet {
    pub fn report(&self) -> KubeletReport {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes how it stands, and says so in the log where that is news.
    fn tell(&self, found: Result<&Path, &KubeletError>) {
        let report = match found {
            Ok(cgroup) => KubeletReport { cgroup: cgroup.display().to_string(), reason: "", detail: String::new() },
            Err(error) => KubeletReport { cgroup: String::new(), reason: error.reason(), detail: error.to_string() },
        };
        let before = std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), report.clone());
        if before == report {
            return;
        }
        let KubeletReport { cgroup, reason, detail } = report;
        if reason.is_empty() {
            tracing::info!(cgroup, "The kubelet's probes are let through");
        } else {
            tracing::warn!(reason, detail, "The kubelet's probes are not let through: under STRICT they fail");
        }
    }
}

/// Follows it until `stop`; what is pinned stays. `given` is the cgroup's folder where it was typed.
pub(super) async fn follow(
    capture: capture::Handle,
    given: Option<PathBuf>,
    kubelet: Kubelet,
    stop: CancellationToken,
) {
    let mut due = interval(limits::KUBELET_LOOK);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let following = async {
        loop {
            due.tick().await;
            let found = timeout(limits::ENROL_STEP, look(&capture, given.clone()));
            let found = found.await.unwrap_or(Err(KubeletError::Timeout));
            kubelet.tell(found.as_deref());
        }
    };
    let _stopped: Option<std::convert::Infallible> = stop.run_until_cancelled(following).await;
}

/// Looks once, and sees to it that the kernel vouches for what was found and for nothing else.
async fn look(capture: &capture::Handle, given: Option<PathBuf>) -> Result<PathBuf, KubeletError> {
    let found = tokio::task::spawn_blocking(move || match given {
        Some(cgroup) => identify(&cgroup).map(|id| (cgroup, id)),
        None => find::find().and_then(|cgroup| identify(&cgroup).map(|id| (cgroup, id))),
    });
    let found = found.await.map_err(|_| CaptureError::ShuttingDown)?;
    let attested = capture.attested_kubelet().await?;
    match found {
        Ok((cgroup, id)) => {
            if attested != Some(id) {
                capture.attest_kubelet(&cgroup).await?;
            }
            Ok(cgroup)
        }
        Err(error) => {
            capture.forget_kubelet().await?;
            Err(error.into())
        }
    }
}

/// The kernel's number of the cgroup. The root is nobody's own.
fn identify(cgroup: &Path) -> Result<u64, FindError> {
    let unreadable = |error| FindError::Unreadable { path: cgroup.to_owned(), error };
    let is_root = !cgroup.join("cgroup.type").try_exists().map_err(unreadable)?;
    let id = std::fs::metadata(cgroup).map_err(unreadable)?.ino();
    if is_root { Err(FindError::Root) } else { Ok(id) }
}
