//! What operators ask a running agent, over a Unix socket, for root and the agent's own user. It changes nothing; a proof makes
//! one connection.
//!
//! The types here are the JSON that `heddle status --json` and its like print.

mod identity;

use std::{
    fmt,
    fs::{self, DirBuilder, Permissions},
    io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

pub use identity::{CertificateLine, IssuerLine, Trust, TrustProblemLine};

use super::{
    http,
    lane::{PathFault, Switch},
    proof::{self, ProofError},
};
use crate::{
    policy::{Explained, Permit, Question, QuestionError, Request, Rulebook, decide},
    telemetry::{KubeletReport, LaneConnection, PodReport, direction_name, named, security_name},
    tunnel::{Connection, Direction, Flow},
};

/// `GET /status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub node: String,
    pub version: String,
    pub ready: bool,
    /// What readiness waits for.
    pub waiting_for: Vec<String>,
    pub pods: Vec<PodLine>,
    /// How often a pod's capture was found wanting and put in order, since the agent started.
    #[serde(default)]
    pub repairs: u64,
    /// Why the runtime does not ask before it starts a pod of the mesh, where it should.
    #[serde(default)]
    pub cni_problem: Option<String>,
    /// Pairs of pods whose connections go through the agent, because nobody can show that packets go straight from one to the other.
    #[serde(default)]
    pub unproven_paths: Vec<PathLine>,
    /// Whose probes are let through.
    #[serde(default)]
    pub kubelet: KubeletLine,
    /// Manifest objects that are not in force as written.
    pub manifest_problems: Vec<String>,
    /// Policies that are not enforced as written.
    pub policy_problems: Vec<String>,
    /// What is wrong with the trust bundle and the revocation lists.
    #[serde(default)]
    pub trust_problems: Vec<String>,
}

/// The kubelet, whose connections to probe ports are let through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubeletLine {
    /// `attested`, or `unattested`: then its probes are plaintext as any other.
    pub state: String,
    /// Its cgroup; empty when it is not attested.
    pub cgroup: String,
    /// Why it is not, stable; empty when it is.
    pub reason: String,
    pub detail: String,
}

impl From<KubeletReport> for KubeletLine {
    fn from(report: KubeletReport) -> Self {
        let state = if report.reason.is_empty() { "attested" } else { "unattested" };
        let KubeletReport { cgroup, reason, detail } = report;
        Self { state: state.to_owned(), cgroup, reason: reason.to_owned(), detail }
    }
}

/// One enrolled pod of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodLine {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    /// `captured`, `attached` (not proven yet) or `uncaptured`.
    pub state: String,
    /// Stable; empty when captured.
    pub reason: String,
    pub detail: String,
    /// Whether its connections with other pods of the node may take the kernel lane: `on` or `off`.
    #[serde(default)]
    pub lane: String,
    /// Why not, stable; empty when they may.
    #[serde(default)]
    pub lane_reason: String,
    #[serde(default)]
    pub lane_detail: String,
    /// The kernel programs' counters.
    pub counters: std::collections::BTreeMap<String, u64>,
}

/// Two pods of the node between which packets could not be shown to go straight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathLine {
    /// `namespace/name`.
    pub from: String,
    pub to: String,
    /// Stable.
    pub reason: String,
    pub detail: String,
}

/// One of `GET /connections`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionLine {
    /// Of the agent's count; of a kernel-lane connection the cookie of the source's socket, in both directions.
    pub id: u64,
    pub direction: String,
    /// `namespace/name` of this node's pod.
    pub pod: String,
    /// `mutual_tls`, `kernel_attested` or `none`.
    pub security: String,
    pub source: String,
    /// `namespace/name`; empty when unknown.
    pub source_workload: String,
    pub source_identity: String,
    pub destination: String,
    pub hbone_target: String,
    pub destination_workload: String,
    pub destination_identity: String,
    pub destination_service: String,
    /// The ALLOW policy that lets it in now (`namespace/name`), on the server's side; empty where none is needed.
    pub policy: String,
    /// The TLS session; empty for plaintext.
    pub tls: String,
    pub cipher: String,
    /// Certificates' serial numbers in lower-case hex, this side's and the peer's.
    pub own_serial: String,
    pub peer_serial: String,
    pub bytes_to_app: u64,
    pub bytes_to_client: u64,
    pub open_seconds: u64,
    pub trace_id: String,
    /// Of a kernel-lane connection, as this direction's socket sees them: smoothed round-trip time in microseconds (absent while
    /// unknown) and segments sent again.
    pub rtt_microseconds: Option<u64>,
    pub retransmissions: Option<u64>,
}

/// One of `GET /older`: a connection that is older than its pod's enrolment, and so outside the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OlderLine {
    /// `namespace/name`.
    pub pod: String,
    /// The pod's own end.
    pub local: String,
    pub remote: String,
}

impl From<&PathFault> for PathLine {
    fn from(path: &PathFault) -> Self {
        let PathFault { from, to, reason, detail } = path;
        Self { from: from.clone(), to: to.clone(), reason: (*reason).to_owned(), detail: detail.clone() }
    }
}

impl PodLine {
    /// `lane` is `None` for a pod that is not attached.
    pub(super) fn new(pod: &PodReport, lane: Option<&Switch>) -> Self {
        use crate::capture::PodState;
        let state = match pod.state {
            PodState::Captured => "captured",
            PodState::Attached => "attached",
            PodState::Uncaptured { .. } => "uncaptured",
        };
        let (lane, lane_reason, lane_detail) = match lane {
            Some(Switch::On) => ("on", "", ""),
            Some(Switch::Off { reason, detail }) => ("off", *reason, &**detail),
            None => ("off", "unattached", "the pod's programs are not attached"),
        };
        Self {
            uid: pod.uid.to_string(),
            namespace: pod.namespace.to_string(),
            name: pod.name.to_string(),
            state: state.to_owned(),
            reason: pod.reason().to_owned(),
            detail: pod.detail().to_owned(),
            lane: lane.to_owned(),
            lane_reason: lane_reason.to_owned(),
            lane_detail: lane_detail.to_owned(),
            counters: named(&pod.counts).into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        }
    }
}

impl ConnectionLine {
    /// `rules` say which policy lets it in: another one may by now.
    pub(super) fn new(connection: &Connection, rules: &Rulebook) -> Self {
        Self {
            id: connection.id,
            open_seconds: connection.opened.elapsed().as_secs(),
            ..Self::of(&connection.flow, connection.bytes(), connection.request.as_ref(), rules)
        }
    }

    /// One direction of a kernel-lane connection.
    pub(super) fn of_lane(connection: &LaneConnection, rules: &Rulebook) -> Self {
        let rtt = u64::try_from(connection.rtt.as_micros()).unwrap_or(u64::MAX);
        Self {
            id: connection.id,
            open_seconds: connection.lasted.as_secs(),
            rtt_microseconds: (rtt > 0).then_some(rtt),
            retransmissions: Some(connection.retransmissions.into()),
            ..Self::of(&connection.flow, connection.bytes, connection.request.as_ref(), rules)
        }
    }

    fn of(flow: &Flow, (bytes_to_app, bytes_to_client): (u64, u64), asked: Option<&Request>, rules: &Rulebook) -> Self {
        let session = flow.session.as_deref();
        let permit = asked.and_then(|request| decide(rules, request).ok());
        let workload = |workload: &Option<Arc<crate::cluster::Workload>>| {
            workload.as_ref().map(|workload| format!("{}/{}", workload.namespace, workload.name)).unwrap_or_default()
        };
        let address = |address: &SocketAddr| address.to_string();
        let identity =
            |id: &Option<crate::identity::SpiffeId>| id.as_ref().map(ToString::to_string).unwrap_or_default();
        Self {
            direction: direction_name(flow.direction).to_owned(),
            pod: workload(match flow.direction {
                Direction::Outbound => &flow.source_workload,
                Direction::Inbound => &flow.destination_workload,
            }),
            security: security_name(flow.security).to_owned(),
            source: address(&flow.source),
            source_workload: workload(&flow.source_workload),
            source_identity: identity(&flow.source_principal),
            destination: address(&flow.destination),
            hbone_target: flow.hbone_target.as_ref().map(address).unwrap_or_default(),
            destination_workload: workload(&flow.destination_workload),
            destination_identity: identity(&flow.destination_principal),
            destination_service: flow
                .destination_service
                .as_ref()
                .map(|service| service.hostname.to_string())
                .unwrap_or_default(),
            policy: permit.as_ref().and_then(Permit::policy).map(ToString::to_string).unwrap_or_default(),
            tls: session.map(|session| session.version.to_owned()).unwrap_or_default(),
            cipher: session.map(|session| session.cipher.to_owned()).unwrap_or_default(),
            own_serial: session.map(|session| session.own_serial.to_string()).unwrap_or_default(),
            peer_serial: session.map(|session| session.peer_serial.to_string()).unwrap_or_default(),
            bytes_to_app,
            bytes_to_client,
            trace_id: flow.trace.as_ref().map(ToString::to_string).unwrap_or_default(),
            ..Self::default()
        }
    }
}

/// Where the answers come from.
pub struct Answers {
    pub status: Box<dyn Fn() -> Status + Send + Sync>,
    pub connections: Box<dyn Fn() -> Vec<ConnectionLine> + Send + Sync>,
    pub certificates: Box<dyn Fn() -> Vec<CertificateLine> + Send + Sync>,
    pub trust: Box<dyn Fn() -> Trust + Send + Sync>,
    pub explain: Box<dyn Fn(&Question) -> Explaining + Send + Sync>,
    pub prove: Box<dyn Fn(proof::Request) -> Proving + Send + Sync>,
    pub older: Box<dyn Fn() -> Vec<OlderLine> + Send + Sync>,
}

/// What a question comes to.
pub type Explaining = Result<Explained, QuestionError>;
/// A proof under way.
pub type Proving = Pin<Box<dyn Future<Output = Result<proof::Report, ProofError>> + Send>>;

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answers").finish_non_exhaustive()
    }
}

fn router(answers: Arc<Answers>) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/connections", get(connections))
        .route("/older", get(older))
        .route("/certificates", get(async |State(answers): State<Arc<Answers>>| Json((answers.certificates)())))
        .route("/trust", get(async |State(answers): State<Arc<Answers>>| Json((answers.trust)())))
        .route("/policy/explain", get(explain))
        .route("/proof", post(prove))
        .with_state(answers)
}

/// Waits for the lane's decisions, which may be at work.
async fn status(State(answers): State<Arc<Answers>>) -> Result<Json<Status>, (StatusCode, String)> {
    let told = tokio::task::spawn_blocking(move || (answers.status)()).await;
    told.map(Json).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// There may be ten thousands of them: nothing for a worker that carries bytes.
async fn connections(State(answers): State<Arc<Answers>>) -> Result<Json<Vec<ConnectionLine>>, (StatusCode, String)> {
    let listed = tokio::task::spawn_blocking(move || (answers.connections)()).await;
    listed.map(Json).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// The kernel is asked about the sockets of each pod that has any.
async fn older(State(answers): State<Arc<Answers>>) -> Result<Json<Vec<OlderLine>>, (StatusCode, String)> {
    let listed = tokio::task::spawn_blocking(move || (answers.older)()).await;
    listed.map(Json).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

async fn prove(
    State(answers): State<Arc<Answers>>,
    Query(request): Query<proof::Request>,
) -> Result<Json<proof::Report>, (StatusCode, String)> {
    let refused = |error: ProofError| (StatusCode::BAD_REQUEST, error.to_string());
    (answers.prove)(request).await.map(Json).map_err(refused)
}

async fn explain(
    State(answers): State<Arc<Answers>>,
    Query(question): Query<Question>,
) -> Result<Json<Explained>, (StatusCode, String)> {
    (answers.explain)(&question).map(Json).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))
}

/// Why there is no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("another agent answers at {}: stop it first, or give another path", .0.display())]
    Taken(PathBuf),
    #[error("{} is there and is no socket: remove it, or give another path", .0.display())]
    NotASocket(PathBuf),
    #[error("socket {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

impl AdminError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Taken(_) => "admin_taken",
            Self::NotASocket(_) => "admin_not_a_socket",
            Self::Io { .. } => "admin_io",
        }
    }
}

/// The socket's file; removed when dropped, if it is still this one.
#[derive(Debug)]
pub struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Makes the socket with mode 0600, in the place of one that nobody answers any more. The folder is made if absent.
    ///
    /// # Errors
    /// When another agent answers there, or the file can't be made.
    pub async fn bind(path: &Path) -> Result<Self, AdminError> {
        let failed = |error| AdminError::Io { path: path.to_owned(), error };
        if let Some(folder) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        }
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => return Err(AdminError::NotASocket(path.to_owned())),
            Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(AdminError::Taken(path.to_owned())),
            _ => {}
        }
        // Made beside and moved, so that it never stands there with wider rights, nor is missing for a moment.
        let beside = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
        let make = || {
            match fs::remove_file(&beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&beside)?;
            fs::set_permissions(&beside, Permissions::from_mode(0o600))?;
            let inode = fs::symlink_metadata(&beside)?.ino();
            fs::rename(&beside, path)?;
            Ok((listener, inode))
        };
        let (listener, inode) = make().map_err(failed)?;
        Ok(Self { listener: Some(listener), path: path.to_owned(), inode })
    }

    /// The listener, for who answers there otherwise than by HTTP; the file stays as long as this does.
    pub(super) fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }

    /// Answers until `stop`, then removes the file.
    pub async fn serve(mut self, answers: Answers, stop: CancellationToken) {
        let own = nix::unistd::geteuid().as_raw();
        let admit = move |stream: &UnixStream| stream.peer_cred().is_ok_and(|peer| may_ask(peer.uid(), own));
        if let Some(listener) = self.listener.take() {
            http::serve(listener, router(Arc::new(answers)), admit, stop).await;
        }
    }
}

/// Root and the agent's own user: the file's mode says so too, but a mode can be changed by mistake.
pub(super) fn may_ask(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "Socket can't be removed");
        }
    }
}
