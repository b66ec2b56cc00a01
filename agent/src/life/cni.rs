//! Answers the CNI plugin: a pod of the mesh may start once its capture is proven, in the netns and with the addresses that were just
//! made for it.
//!
//! What it does not know it does not wave through. It changes nothing of a pod itself: it tells `cluster` where the pod is, and looks
//! at what enrolment makes of it.

use std::{
    fs::File,
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    admin::{AdminError, Socket, may_ask},
    keeper::Pods,
    limits,
    readiness::{Blocker, Readiness},
};
use crate::{
    capture::PodState,
    cluster::{Announcement, NodePlaces, Snapshot, View, Workload},
    cni::{
        PLUGIN,
        install::Install,
        known::Known,
        list::Entry,
        protocol::{self, Answer, Question, VERSION, Verb},
    },
};

/// What the agent is told of the node's CNI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    pub socket: PathBuf,
    /// Where what is known of enrolment is left for the plugin.
    pub state_dir: PathBuf,
    /// `None` where somebody else installs the plugin.
    pub bin_dir: Option<PathBuf>,
    pub conf_dir: PathBuf,
}

/// The socket, before anything answers at it.
#[derive(Debug)]
pub struct Gate {
    config: CniConfig,
    socket: Socket,
    listed: Blocker,
    status: CniStatus,
}

/// Whether the runtime asks before it starts a pod. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct CniStatus(Arc<Mutex<Option<Outcome>>>);

/// The entry is in force, or what keeps it from that (reason, detail).
type Outcome = Result<(), (&'static str, String)>;

impl CniStatus {
    /// What is wrong (reason, detail); `None` where nothing is, and where there is no CNI to be asked by.
    #[must_use]
    pub fn problem(&self) -> Option<(&'static str, String)> {
        self.get().and_then(Result::err)
    }

    /// Whether the plugin's entry is in force; `None` where there is no CNI to be asked by, or nothing is known yet.
    #[must_use]
    pub fn installed(&self) -> Option<bool> {
        self.get().map(|outcome| outcome.is_ok())
    }

    fn get(&self) -> Option<Outcome> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, outcome: Outcome) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }
}

impl Gate {
    /// Takes the socket. The agent is not ready before the runtime asks it.
    ///
    /// # Errors
    /// When another agent answers there, or the file can't be made.
    pub async fn bind(config: CniConfig, readiness: &Readiness, status: CniStatus) -> Result<Self, AdminError> {
        let socket = Socket::bind(&config.socket).await?;
        let listed = readiness.block("the node's CNI list to name heddle-cni");
        Ok(Self { config, socket, listed, status })
    }

    /// Answers, keeps what is known on disk, and keeps the plugin installed, until `stop`.
    ///
    /// # Errors
    /// When there is no thread for the installation.
    pub fn run(self, asked: Asked, stop: &CancellationToken) -> io::Result<()> {
        let Self { config, mut socket, listed, status } = self;
        let install = Install {
            program: std::env::current_exe()?.with_file_name(PLUGIN),
            bin_dir: config.bin_dir.clone(),
            conf_dir: config.conf_dir.clone(),
            entry: Entry {
                socket: config.socket.display().to_string(),
                state_dir: config.state_dir.display().to_string(),
            },
        };
        tokio::spawn(remember(config.state_dir, asked.view.clone(), Arc::clone(&asked.node), stop.clone()));
        if let Some(listener) = socket.take_listener() {
            let stop = stop.clone();
            tokio::spawn(async move {
                serve(listener, asked, stop).await;
                drop(socket);
            });
        }
        let (stop, mut listed) = (stop.clone(), Some(listed));
        let keep = move || {
            install.keep(
                || stop.is_cancelled(),
                |outcome| {
                    status.set(outcome.as_ref().map(drop).map_err(|error| (error.reason(), error.to_string())));
                    match outcome {
                        Ok(list) => {
                            listed = None;
                            tracing::info!(list = %list.display(), "Pods of the mesh start once they are captured");
                        }
                        Err(error) => tracing::error!(
                            reason = error.reason(),
                            %error,
                            "The runtime does not ask whether a pod is captured: pods that start now are captured a moment later"
                        ),
                    }
                },
            );
        };
        thread::Builder::new().name("cni".into()).spawn(keep).map(drop)
    }
}

/// What an answer is made of.
#[derive(Debug, Clone)]
pub struct Asked {
    pub node: Arc<str>,
    pub view: View,
    pub places: NodePlaces,
    pub pods: Pods,
}

/// Keeps what is known of enrolment on disk.
async fn remember(folder: PathBuf, mut view: View, node: Arc<str>, stop: CancellationToken) {
    let mut written = None;
    let following = async {
        let mut snapshot = view.load();
        loop {
            let (known, folder) = (Known::of(&snapshot, &node), folder.clone());
            if written.as_ref() != Some(&known) {
                let writing = tokio::task::spawn_blocking(move || known.write(&folder).map(|()| known));
                match writing.await.map_err(io::Error::other).and_then(|result| result) {
                    Ok(known) => written = Some(known),
                    Err(error) => tracing::error!(
                        %error,
                        "What is known of enrolment can't be written: without an agent no pod of the mesh or of a new \
                         namespace starts"
                    ),
                }
            }
            match view.next().await {
                Some(next) => snapshot = next,
                None => return,
            }
        }
    };
    let _stopped = stop.run_until_cancelled(following).await;
}

async fn serve(listener: UnixListener, asked: Asked, stop: CancellationToken) {
    let own = nix::unistd::geteuid().as_raw();
    let turns = Arc::new(Semaphore::new(limits::CNI_REQUESTS));
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "CNI plugin can't be accepted");
                sleep(limits::ACCEPT_PAUSE_MAX).await;
                continue;
            }
        };
        let Some(peer) = stream.peer_cred().ok().filter(|peer| may_ask(peer.uid(), own)) else { continue };
        let (asked, turn, stop) = (asked.clone(), Arc::clone(&turns).try_acquire_owned(), stop.clone());
        tokio::spawn(async move {
            let answering = async {
                match turn {
                    Ok(_turn) => converse(stream, &asked, peer.pid()).await,
                    Err(_) => tell(stream, &refused("busy", "too many pods start at a time")).await,
                }
            };
            if let Some(Err(error)) = stop.run_until_cancelled(answering).await {
                tracing::debug!(%error, "CNI plugin went away");
            }
        });
    }
}

async fn converse(mut stream: UnixStream, asked: &Asked, peer: Option<i32>) -> io::Result<()> {
    let mut message = Vec::new();
    let mut reader = (&mut stream).take(limits::CNI_MESSAGE as u64 + 1);
    timeout(limits::CNI_QUESTION, reader.read_to_end(&mut message)).await??;
    let answer = match protocol::read::<Question>(&message) {
        Ok(question) if question.version == VERSION => asked.answer(&question, peer).await,
        Ok(question) => {
            refused("version", &format!("the plugin speaks version {}, the agent {VERSION}", question.version))
        }
        Err(error) => refused("question", &error.to_string()),
    };
    tell(stream, &answer).await
}

async fn tell(mut stream: UnixStream, answer: &Answer) -> io::Result<()> {
    let answer = serde_json::to_vec(answer)?;
    timeout(limits::CNI_QUESTION, stream.write_all(&answer)).await?
}

fn refused(reason: &str, detail: &str) -> Answer {
    Answer::Refused { reason: reason.to_owned(), detail: detail.to_owned() }
}

/// What is known of a pod's capture.
enum Now {
    Is(Answer),
    /// Not yet (reason, detail).
    Waits(&'static str, String),
    /// The agent has not heard of it.
    Unknown,
}

impl Asked {
    async fn answer(&self, question: &Question, peer: Option<i32>) -> Answer {
        let patience = Duration::from_millis(question.patience).min(limits::CNI_WAIT_MAX);
        let deadline = Instant::now() + patience.saturating_sub(limits::CNI_MARGIN);
        match question.verb {
            Verb::Add => self.add(question, peer, deadline).await,
            Verb::Check => match self.now(question, netns(peer, &question.netns).ok().map(|(_, inode)| inode)) {
                Now::Is(answer) => answer,
                Now::Waits(reason, detail) => refused(reason, &detail),
                Now::Unknown => Answer::Noted,
            },
            Verb::Del => {
                self.places.forget(&question.pod.uid, &question.container);
                Answer::Noted
            }
        }
    }

    async fn add(&self, question: &Question, peer: Option<i32>, deadline: Instant) -> Answer {
        let (file, inode) = match netns(peer, &question.netns) {
            Ok(opened) => opened,
            Err(error) => return refused("netns", &format!("{}: {error}", question.netns.display())),
        };
        let pod = &question.pod;
        let announcement = Announcement {
            container: question.container.clone(),
            netns: file,
            inode,
            addresses: question.addresses.clone(),
        };
        self.places.announce(&pod.uid, announcement);
        let waiting = async {
            loop {
                if let Now::Is(answer) = self.now(question, Some(inode)) {
                    return answer;
                }
                sleep(limits::WATCH_INTERVAL).await;
            }
        };
        let answer = match timeout_at(deadline, waiting).await {
            Ok(answer) => answer,
            Err(_) => self.too_late(question, inode),
        };
        match &answer {
            Answer::Refused { reason, detail } => {
                tracing::warn!(
                    namespace = pod.namespace,
                    pod = pod.name,
                    reason,
                    detail,
                    "Pod can't start: it is not captured"
                );
            }
            // Nobody looks for it.
            Answer::NotEnrolled => self.places.forget(&pod.uid, &question.container),
            _ => {}
        }
        answer
    }

    /// The answer when time is up.
    fn too_late(&self, question: &Question, inode: u64) -> Answer {
        match self.now(question, Some(inode)) {
            Now::Is(answer) => answer,
            Now::Waits(reason, detail) => refused(reason, &detail),
            // As the plugin would decide without an agent.
            Now::Unknown => match Known::of(&self.view.load(), &self.node).enrolled(&question.pod) {
                Some(false) => Answer::NotEnrolled,
                _ => refused("pod_unknown", "the agent has not heard of the pod"),
            },
        }
    }

    fn now(&self, question: &Question, inode: Option<u64>) -> Now {
        let snapshot = self.view.load();
        let Some(workload) = workload(&snapshot, question, &self.node) else { return Now::Unknown };
        if !workload.enrolled {
            return Now::Is(Answer::NotEnrolled);
        }
        let Some((state, of)) = self.pods.proof(&workload.uid) else {
            return Now::Waits("unproven", "its enrolment has not begun".to_owned());
        };
        match state {
            PodState::Captured => {
                let proven = of.as_ref().is_some_and(|of| {
                    // That of an earlier sandbox of the pod says nothing of this one.
                    inode.is_none_or(|inode| of.place.netns_inode == Some(inode))
                        && question.addresses.iter().all(|address| of.addresses.contains(address))
                });
                if proven {
                    Now::Is(Answer::Captured)
                } else {
                    Now::Waits("unproven", "only an earlier network of the pod is proven".to_owned())
                }
            }
            PodState::Attached => Now::Waits("unproven", "programs are attached, the proof is under way".to_owned()),
            PodState::Uncaptured { reason, detail } => Now::Waits(reason, detail),
        }
    }
}

/// The pod that is asked about. Of a static pod the API server knows another uid than kubelet.
fn workload<'a>(snapshot: &'a Snapshot, question: &Question, node: &str) -> Option<&'a Arc<Workload>> {
    let pod = &question.pod;
    snapshot.workloads.get(&*pod.uid).or_else(|| {
        let is_static = !pod.uid.contains('-');
        let named = |workload: &&Arc<Workload>| {
            *workload.name == *pod.name && *workload.namespace == *pod.namespace && *workload.node == *node
        };
        is_static.then(|| snapshot.workloads.values().find(named)).flatten()
    })
}

/// Opens the netns that the plugin names, as the plugin sees it: its file system need not be the agent's.
fn netns(peer: Option<i32>, path: &Path) -> io::Result<(File, u64)> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no absolute path"));
    }
    let open = |path: &Path| {
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no network namespace"));
        }
        let inode = file.metadata()?.ino();
        Ok((file, inode))
    };
    let theirs = peer.filter(|pid| *pid > 0).map(|pid| PathBuf::from(format!("/proc/{pid}/root{}", path.display())));
    match theirs.map(|theirs| open(&theirs)) {
        Some(Ok(opened)) => Ok(opened),
        _ => open(path),
    }
}

#[cfg(test)]
mod tests;
