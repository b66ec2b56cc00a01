//! The thread that follows the manifest directory: inotify tells it when to look, a slow poll makes up for what inotify
//! misses.
//!
//! It publishes whole snapshots, and only those that say something new.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Instant,
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::watch;

use super::{
    Problem, Settings, Snapshot, View,
    index::Indexer,
    kubernetes::{self, ApiServer, ClientError},
    manifests::Directory,
};
use crate::life::limits;

/// Why there can't be a source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("manifest directory {}: {error}", directory.display())]
    Directory { directory: PathBuf, error: io::Error },
    #[error("no way to the API server: {0}")]
    Client(#[from] ClientError),
    #[error("no thread to follow the cluster: {0}")]
    Thread(io::Error),
    #[error("the thread that follows the API server has ended")]
    Ended,
}

impl SourceError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Directory { .. } => "manifest_directory",
            Self::Client(error) => error.reason(),
            Self::Thread(_) => "thread",
            Self::Ended => "thread_ended",
        }
    }
}

/// A followed manifest directory or API server. Dropping it ends the source: [`View::next`] then gives `None`.
#[derive(Debug)]
pub struct Source {
    problems: watch::Receiver<Arc<[Problem]>>,
    _following: Following,
}

#[derive(Debug)]
enum Following {
    Directory { _thread: Awake },
    ApiServer { _thread: kubernetes::Following },
}

/// Wakes the directory's thread, and ends it when it is dropped.
#[derive(Debug)]
struct Awake {
    wake: SyncSender<()>,
    /// Asks the thread to end when it wakes.
    stop: Arc<AtomicBool>,
}

impl Source {
    /// Follows the API server. The first snapshot, of generation 1, is whole when this returns: made of what was listed or, while
    /// the API server is away, of the last good snapshot on disk. Until then it holds what `block` gives for each kind that is
    /// not known yet, by what is waited for.
    ///
    /// # Errors
    /// When there is no way to the API server. One that is away is waited for: see [`Source::problems`].
    pub async fn watch<B>(
        config: ApiServer,
        settings: Settings,
        block: impl Fn(&'static str) -> B,
    ) -> Result<(View, Self), SourceError> {
        let (view, problems, thread) = kubernetes::follow(config, settings, block).await?;
        Ok((view, Self { problems, _following: Following::ApiServer { _thread: thread } }))
    }

    /// Reads the directory and follows it from then on. The first snapshot, of generation 1, is whole when this returns.
    /// It blocks while it reads.
    ///
    /// # Errors
    /// When the directory can't be listed. Malformed files are no error: see [`Source::problems`].
    pub fn start(directory: impl Into<PathBuf>, settings: Settings) -> Result<(View, Self), SourceError> {
        let path = directory.into();
        let (wake, woken) = sync_channel(1);
        // Watched before it is read, so that nothing changes unseen in between.
        let writing = Arc::new(AtomicBool::new(false));
        let moved = Arc::new(AtomicBool::new(false));
        if let Some(changes) = settings.places.changes() {
            follow_places(changes, wake.clone(), Arc::clone(&moved)).map_err(SourceError::Thread)?;
        }
        let mut watcher = Watched::new(path.clone(), wake.clone(), Arc::clone(&writing));
        let mut directory = Directory::new(path.clone());
        directory.scan().map_err(|error| SourceError::Directory { directory: path, error })?;
        let first_problems: Arc<[Problem]> = directory.problems().into();
        tell(&first_problems, &[]);
        let mut indexer = Indexer::new(settings);
        let first = indexer.index(&directory.objects(), 1);
        tell_warnings(&first, None);
        let (snapshots, view) = watch::channel(Arc::new(first));
        let (problems_sender, problems) = watch::channel(first_problems);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let follow = move || {
            loop {
                wait(&woken, &writing);
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                watcher.renew();
                let moved = moved.swap(false, Ordering::Relaxed);
                update(&mut directory, moved, &mut indexer, &snapshots, &problems_sender);
            }
        };
        thread::Builder::new().name("manifests".into()).spawn(follow).map_err(SourceError::Thread)?;
        let thread = Awake { wake, stop };
        Ok((View::new(view), Self { problems, _following: Following::Directory { _thread: thread } }))
    }

    /// What is wrong in the directory now, and its changes.
    #[must_use]
    pub fn problems(&self) -> watch::Receiver<Arc<[Problem]>> {
        self.problems.clone()
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A full channel wakes the thread just as well.
        let _already_woken = self.wake.try_send(());
    }
}

/// Waits for a change or for the next poll, and then for quiet: a file that is being written is not worth reading. Where
/// files were only renamed into the directory or taken away, all of them are whole, and a moment is enough.
fn wait(woken: &Receiver<()>, writing: &AtomicBool) {
    if woken.recv_timeout(limits::MANIFEST_POLL) != Ok(()) {
        return;
    }
    let latest = Instant::now() + limits::MANIFEST_QUIET_MAX;
    let mut quiet = limits::MANIFEST_QUIET_WHOLE;
    while Instant::now() < latest {
        if writing.swap(false, Ordering::Relaxed) {
            quiet = limits::MANIFEST_QUIET;
        }
        if woken.recv_timeout(quiet) == Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// Wakes the thread when a pod may be found elsewhere than before. Its own thread ends with the places.
fn follow_places(mut changes: watch::Receiver<u64>, wake: SyncSender<()>, moved: Arc<AtomicBool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let following = async move {
        while changes.changed().await.is_ok() {
            moved.store(true, Ordering::Relaxed);
            // A full channel wakes the thread just as well.
            let _already_woken = wake.try_send(());
        }
    };
    thread::Builder::new().name("moved-pods".into()).spawn(move || runtime.block_on(following)).map(drop)
}

/// Looks at the directory and publishes what is new; `moved` is whether pods may be found elsewhere than before.
fn update(
    directory: &mut Directory,
    moved: bool,
    indexer: &mut Indexer,
    snapshots: &watch::Sender<Arc<Snapshot>>,
    problems: &watch::Sender<Arc<[Problem]>>,
) {
    let changed = directory.scan();
    let found: Arc<[Problem]> = match changed {
        Ok(false) if !moved => return,
        Ok(_) | Err(_) => directory.problems().into(),
    };
    if *found != **problems.borrow() {
        tell(&found, &problems.borrow());
        problems.send_replace(found);
    }
    if changed.is_err() {
        return;
    }
    let current = Arc::clone(&snapshots.borrow());
    let next = indexer.index(&directory.objects(), current.generation + 1);
    if next.same_content(&current) {
        return;
    }
    tell_warnings(&next, Some(&current));
    tracing::info!(
        generation = next.generation,
        workloads = next.workloads.len(),
        services = next.services.len(),
        policies = next.authorization_policies.len() + next.peer_authentications.len() + next.invalid_policies.len(),
        "Cluster changed"
    );
    snapshots.send_replace(Arc::new(next));
}

/// Logs problems that were not there before, and that one is gone.
pub(super) fn tell(problems: &[Problem], before: &[Problem]) {
    for problem in problems.iter().filter(|problem| !before.contains(problem)) {
        tracing::warn!(
            file = %problem.file.display(),
            reason = problem.error.reason(),
            in_force = ?problem.in_force,
            fix = problem.error.fix(),
            error = %problem.error,
            "The cluster's source has a problem"
        );
    }
    for problem in before.iter().filter(|problem| !problems.contains(problem)) {
        tracing::info!(file = %problem.file.display(), reason = problem.error.reason(), "A problem of the cluster's source is gone");
    }
}

pub(super) fn tell_warnings(next: &Snapshot, before: Option<&Snapshot>) {
    let known = |warning| before.is_some_and(|before| before.warnings.contains(warning));
    for warning in next.warnings.iter().filter(|warning| !known(warning)) {
        tracing::warn!(object = warning.object, field = warning.field, "{}", warning.message);
    }
}

/// Whether an event is of someone reading, such as this agent.
fn only_read(kind: EventKind) -> bool {
    kind.is_access() && kind != EventKind::Access(AccessKind::Close(AccessMode::Write))
}

/// Whether an event leaves nothing half-written behind: a rename, or an end. What replaced files leave (their access
/// time, their last link) changes nothing either.
fn leaves_whole(kind: EventKind) -> bool {
    matches!(kind, EventKind::Modify(ModifyKind::Name(_)) | EventKind::Remove(_))
}

/// An inotify watch on the directory, made again when another directory takes its place.
struct Watched {
    path: PathBuf,
    wake: SyncSender<()>,
    /// Something was written in place since the directory was last read.
    writing: Arc<AtomicBool>,
    /// The watcher and the directory (device, inode) that it is on.
    on: Option<(RecommendedWatcher, (u64, u64))>,
    /// Whether the last try failed, so that it is told once.
    failed: bool,
}

impl Watched {
    fn new(path: PathBuf, wake: SyncSender<()>, writing: Arc<AtomicBool>) -> Self {
        let mut watched = Self { path, wake, writing, on: None, failed: false };
        watched.renew();
        watched
    }

    fn renew(&mut self) {
        use std::os::unix::fs::MetadataExt;
        let Ok(metadata) = std::fs::metadata(&self.path) else { return };
        let identity = (metadata.dev(), metadata.ino());
        if self.on.as_ref().is_some_and(|(_, watched)| *watched == identity) {
            return;
        }
        self.on = match self.watch() {
            Ok(watcher) => Some((watcher, identity)),
            Err(error) => {
                if !self.failed {
                    tracing::warn!(
                        directory = %self.path.display(),
                        %error,
                        "Manifest directory can't be watched, so changes are seen only every {:?}",
                        limits::MANIFEST_POLL
                    );
                }
                None
            }
        };
        self.failed = self.on.is_none();
    }

    fn watch(&self) -> Result<RecommendedWatcher, notify::Error> {
        let (wake, writing) = (self.wake.clone(), Arc::clone(&self.writing));
        // A full channel means that the thread is to look anyway. An error (lost events) is a reason to look, too.
        let on_event = move |event: notify::Result<notify::Event>| {
            if !event.as_ref().is_ok_and(|event| only_read(event.kind)) {
                if !event.is_ok_and(|event| leaves_whole(event.kind)) {
                    writing.store(true, Ordering::Relaxed);
                }
                let _already_woken = wake.try_send(());
            }
        };
        let mut watcher = notify::recommended_watcher(on_event)?;
        watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    }
}

#[cfg(test)]
mod tests;
