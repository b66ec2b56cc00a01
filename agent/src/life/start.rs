//! Makes the stages in the order of the journey, runs them until a signal, and drains.

use std::{borrow::Cow, io, sync::Arc, time::Instant};

use arc_swap::ArcSwap;
use axum::{Router, extract::State, http::StatusCode, routing::get};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    time::{interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    admin::{
        AdminError, Answers, CertificateLine, ConnectionLine, OlderLine, PathLine, PodLine, Socket, Status, Trust,
    },
    budget::{Budget, Machine, memory_available},
    cni::{Asked, CniStatus, Gate},
    config::{self, Config, PlacesBy},
    crl,
    drain::drain,
    enrol::{Enrolment, Journey},
    http,
    keeper::Pods,
    kubelet::{self, Kubelet},
    lane::{Lane, Told},
    limits,
    node::Node,
    proof::Prover,
    readiness::{self, Blocker, Readiness},
    records, scrape,
};
use crate::{
    capture::{
        self, CaptureConfig, CaptureError, ProbeCommand,
        container::{self, ContainerError},
    },
    cluster::{self, NodePlaces, SourceError},
    identity::{CaClientConfig, Certificates, IdentityError, TrustConfig},
    policy::{self, Rulebook},
    telemetry::{AccessLog, Destination, IdentityReport, PodReport, Sources, Telemetry, TelemetryError},
    tunnel::{Context, Observer, Quiet, Registry},
};

/// What readiness waits for until each pod of the node was tried.
const FIRST_PASS: &str = "the first pass over this node's pods";

/// Why the agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    #[error("can't listen on {0}: {1}")]
    Listen(std::net::SocketAddr, io::Error),
    #[error("another crypto provider is installed")]
    Crypto,
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error(transparent)]
    Cluster(#[from] SourceError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
}

impl StartError {
    /// Stable name: log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::System(..) => "system",
            Self::Listen(..) => "listen",
            Self::Crypto => "crypto_provider",
            Self::Admin(error) => error.reason(),
            Self::Container(error) => error.reason(),
            Self::Capture(error) => error.reason(),
            Self::Cluster(error) => error.reason(),
            Self::Identity(error) => error.reason(),
            Self::Telemetry(error) => error.reason(),
        }
    }
}

/// Runs the agent until a signal ends it.
///
/// # Errors
/// When a stage can't start.
pub fn run(config: Config) -> Result<(), StartError> {
    let descriptors = prepare_process()?;
    for done in container::reach_node(&config.bpffs)? {
        tracing::info!("Reach of the node: {done}");
    }
    // Without a number to go by, little is better than too much.
    let memory = memory_available().unwrap_or(limits::MEMORY_UNKNOWN);
    let budget = Budget::new(Machine { descriptors, memory });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.workers)
        .thread_name("heddle")
        .event_interval(limits::POLLS_BETWEEN_EVENTS)
        .enable_all()
        .build()
        .map_err(|error| StartError::System("can't start the runtime", error))?;
    let ended = runtime.block_on(agent(config, budget));
    // What is still there was cut, and told of.
    runtime.shutdown_timeout(limits::CUT_WAIT);
    ended
}

/// Installs the one crypto provider of the tree.
///
/// # Errors
/// When there is another one.
pub fn install_crypto() -> Result<(), StartError> {
    rustls::crypto::aws_lc_rs::default_provider().install_default().map_err(|_| StartError::Crypto)
}

/// Keeps this process' memory to itself: no core dump, and no `ptrace` or `/proc/<pid>/mem` for others of the same user. To be
/// called before there is a key in it.
///
/// # Errors
/// When the kernel refuses.
pub fn protect_memory() -> Result<(), StartError> {
    let refused = |error: nix::Error| StartError::System("can't make memory undumpable", error.into());
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused)?;
    prctl::set_dumpable(false).map_err(refused)
}

/// Gives the limit of open files.
fn prepare_process() -> Result<u64, StartError> {
    install_crypto()?;
    protect_memory()?;
    // A relayed connection is two descriptors, and 1,024 is what many systems start with.
    let limits = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok((soft, hard))
    });
    let (soft, hard) =
        limits.map_err(|error| StartError::System("can't raise the limit of open files", error.into()))?;
    tracing::debug!(soft, hard, "Limit of open files raised");
    Ok(hard)
}

async fn agent(config: Config, budget: Budget) -> Result<(), StartError> {
    let mut terminate = Terminate::new()?;
    let readiness = Readiness::default();
    let reading = readiness.block("the first snapshot of the cluster");
    let mapping = readiness.block("the kernel's maps");
    let certifying = readiness.block("a first certificate");
    let enrolling = readiness.block(FIRST_PASS);
    let revoking = readiness.block("the revocation lists");

    let (log, _written_at_the_end) = AccessLog::open(&config.access_log, config.log_format).map_err(|error| {
        let path = match &config.access_log {
            Destination::Stdout => "-".to_owned(),
            Destination::File(path) => path.display().to_string(),
        };
        TelemetryError::AccessLog { path, error }
    })?;
    let mut telemetry = Telemetry::new(Arc::clone(&config.cluster_id), log)?;
    if config.metrics_locality {
        telemetry.add_localities();
    }
    let export = |export| telemetry.export(export, Arc::clone(&config.node), Arc::clone(&config.cluster_id));
    let exporting = config.spans.as_ref().map(export).transpose()?;
    let telemetry = Arc::new(telemetry);

    // Bound first: of two agents on one node the second must end before it touches anything.
    let admin = Socket::bind(&config.admin_socket).await?;
    let metrics = bind(config.metrics_listen).await?;
    let ready = bind(config.readiness_listen).await?;
    let cni = CniStatus::default();
    let gate = match config.cni.clone() {
        Some(config) => Some(Gate::bind(config, &readiness, cni.clone()).await?),
        None => None,
    };
    let serving = CancellationToken::new();
    tokio::spawn(http::serve(ready, readiness::router(readiness.clone()), |_| true, serving.clone()));

    let capture =
        capture::Handle::start(CaptureConfig { bpffs: config.bpffs.clone(), probe: ProbeCommand::default() }).await?;
    drop(mapping);
    let places = find_pods(&config).await?;
    let read = tokio::select! {
        read = read_cluster(&config, places.clone(), &readiness) => read?,
        () = terminate.next() => {
            tracing::info!("Agent ends: it was told to before it knew its cluster");
            return Ok(());
        }
    };
    let (view, source) = read;
    let ca = CaClientConfig {
        address: config.ca_address.clone(),
        server_name: config.ca_name.clone(),
        root_certificate: config.ca_root.clone(),
        token_file: config.ca_token_file.clone(),
        cluster_id: config.cluster_id.to_string(),
        cert_signer: config.ca_cert_signer.clone(),
        headers: config.ca_headers.clone(),
        trust_domain: config.trust_domain.clone(),
        lifetime: config.certificate_lifetime,
    };
    let trust = TrustConfig { aliases: config.trust_domain_aliases.clone(), crl: config.crl.clone() };
    let certificates = Certificates::start_with(ca, trust)?;
    let rules = Arc::new(ArcSwap::from_pointee(Rulebook::compile(&view.load())));
    let (lane, misses) = Lane::new(
        capture.lane(),
        Arc::clone(&rules),
        Arc::clone(&telemetry) as Arc<dyn Told>,
        config.trust_domain.clone(),
        Arc::clone(&config.node),
    );
    let context = Context {
        capture,
        cluster: view.clone(),
        certificates,
        rules,
        registry: Registry::default(),
        observer: Arc::clone(&telemetry) as Arc<dyn Observer>,
        budget,
        lane: Arc::new(lane.clone()),
        cluster_id: Arc::clone(&config.cluster_id),
        node: Arc::clone(&config.node),
    };
    crl::watch(&context.certificates, &context.registry);
    let (pods, kubelet) = (Pods::default(), Kubelet::default());
    let known = Known {
        context: context.clone(),
        pods: pods.clone(),
        kubelet: kubelet.clone(),
        problems: source.problems(),
        readiness: readiness.clone(),
        telemetry: Arc::clone(&telemetry),
        lane: lane.clone(),
        cni,
    };
    tokio::spawn(http::serve(
        metrics,
        metrics_router(Arc::clone(&telemetry), known.sources()).merge(scrape::router(&context)),
        |_| true,
        serving.clone(),
    ));
    let admin = tokio::spawn(admin.serve(known.answers(), serving.clone()));

    let stop = CancellationToken::new();
    if let (Some(gate), Some(places)) = (gate, places) {
        let asked = Asked { node: Arc::clone(&config.node), view: view.clone(), places, pods: pods.clone() };
        gate.run(asked, &stop).map_err(|error| StartError::System("can't keep the CNI plugin installed", error))?;
    }
    let telling = match config.source.clone() {
        config::Source::Kubernetes(kubeconfig) => {
            let node = Node::new(Arc::clone(&config.node), config.taint);
            Some(tokio::spawn(node.tell(kubeconfig, readiness.clone(), pods.clone(), stop.clone())))
        }
        config::Source::Manifests(_) => None,
    };
    tokio::spawn(lane.clone().follow(misses, stop.clone()));
    let journey = Journey { tunnel: context.clone(), lane };
    let enrolment = Enrolment::new(journey, Arc::clone(&config.node), pods, enrolling, stop.clone());
    let enrolment = tokio::spawn(enrolment.run(view.clone()));
    tokio::spawn(kubelet::follow(context.capture.clone(), config.kubelet_cgroup.clone(), kubelet, stop.clone()));
    tokio::spawn(first_certificate(context.certificates.clone(), readiness.clone(), certifying));
    let (certificates, registry) = (context.certificates.clone(), context.registry.clone());
    tokio::spawn(crl::follow(certificates, registry, readiness.clone(), revoking, stop.clone()));
    tokio::spawn(learn(Arc::clone(&telemetry), view.clone(), stop.clone()));
    let tried = first_pass(readiness.clone());
    records::start(Arc::clone(&telemetry), context.clone(), tried, serving.clone())
        .map_err(|error| StartError::System("no thread for the kernel lane's records", error))?;
    tokio::spawn(sweep(telemetry, view.clone(), stop.clone()));
    tokio::spawn(close_idle(context.registry.clone(), stop.clone()));
    tokio::spawn(incomplete(view, readiness.clone(), reading, stop.clone()));
    tracing::info!(
        node = %config.node,
        version = env!("CARGO_PKG_VERSION"),
        workers = config.workers,
        trust_domain = %config.trust_domain,
        "Agent runs"
    );

    terminate.next().await;
    let _draining = readiness.block("the agent's end: it drains");
    tracing::info!(carried = context.registry.live().len(), grace = ?config.drain_grace, "Agent drains");
    stop.cancel();
    if timeout(limits::ENROL_STEP, enrolment).await.is_err() {
        tracing::warn!("Enrolment did not stop in time");
    }
    let drained = drain(&context.registry, config.drain_grace, terminate.next()).await;
    tracing::info!("drained: {} completed, {} cut", drained.completed, drained.cut);
    if let Some(exporting) = exporting {
        exporting.finish().await;
    }
    if let Some(telling) = telling {
        let _how_it_ended = timeout(limits::NODE_CALL, telling).await;
    }
    serving.cancel();
    let _how_it_ended = timeout(limits::CUT_WAIT, admin).await;
    drop(source);
    Ok(())
}

async fn bind(address: std::net::SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::Listen(address, error))
}

/// Looking for pods blocks.
async fn find_pods(config: &Config) -> Result<Option<NodePlaces>, StartError> {
    let failed = |error| StartError::System("can't look for this node's pods", error);
    let node = Arc::clone(&config.node);
    match config.places {
        PlacesBy::Annotated => Ok(None),
        PlacesBy::Node => tokio::task::spawn_blocking(move || NodePlaces::start(node))
            .await
            .map_err(|error| failed(error.into()))?
            .map(Some)
            .map_err(failed),
    }
}

/// Gives the cluster when it is known. Reading the directory blocks; the API server is waited for.
async fn read_cluster(
    config: &Config,
    places: Option<NodePlaces>,
    readiness: &Readiness,
) -> Result<(cluster::View, cluster::Source), StartError> {
    let mut settings = cluster::Settings {
        root_namespace: Arc::clone(&config.root_namespace),
        trust_domains: config::names(&config.trust_domain, &config.trust_domain_aliases),
        same_node: config.same_node,
        ..cluster::Settings::default()
    };
    if let Some(places) = places {
        settings.places = Arc::new(places);
    }
    match config.source.clone() {
        config::Source::Manifests(directory) => {
            tokio::task::spawn_blocking(move || cluster::Source::start(directory, settings))
                .await
                .map_err(|error| StartError::System("can't read the manifests", error.into()))?
                .map_err(Into::into)
        }
        config::Source::Kubernetes(kubeconfig) => {
            let api_server = cluster::ApiServer {
                kubeconfig,
                state_dir: config.state_dir.clone(),
                node: Arc::clone(&config.node),
                cluster_id: Arc::clone(&config.cluster_id),
            };
            Ok(cluster::Source::watch(api_server, settings, |what| readiness.block(what)).await?)
        }
    }
}

/// SIGTERM and SIGINT.
struct Terminate {
    terminate: Signal,
    interrupt: Signal,
}

impl Terminate {
    fn new() -> Result<Self, StartError> {
        let listen = |kind| signal(kind).map_err(|error| StartError::System("can't handle signals", error));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What the stages know, for those who ask.
struct Known {
    context: Context,
    pods: Pods,
    kubelet: Kubelet,
    problems: tokio::sync::watch::Receiver<Arc<[cluster::Problem]>>,
    readiness: Readiness,
    telemetry: Arc<Telemetry>,
    lane: Lane<capture::Lane>,
    cni: CniStatus,
}

impl Known {
    fn pods(context: &Context, pods: &Pods) -> Vec<PodReport> {
        let counts: std::collections::HashMap<_, _> =
            context.capture.status().into_iter().map(|status| (status.uid, status.counts)).collect();
        let mut pods = pods.list();
        for pod in &mut pods {
            pod.counts = counts.get(&pod.uid).copied().unwrap_or_default();
        }
        pods
    }

    fn sources(&self) -> Sources {
        let (live, capture, certificates, rules) =
            (self.context.clone(), self.context.clone(), self.context.clone(), self.context.clone());
        let (gaps, trust) = (self.context.clone(), self.context.certificates.clone());
        let (lane, lost) = (self.context.capture.lane(), self.context.capture.lane());
        let decisions = self.lane.clone();
        let (pods, problems) = (self.pods.clone(), self.problems.clone());
        let (repaired, cni) = (self.pods.clone(), self.cni.clone());
        let kubelet = self.kubelet.clone();
        let aged = self.context.capture.clone();
        Sources {
            kubelet: Box::new(move || kubelet.report()),
            live: Box::new(move || live.registry.live()),
            lane: Box::new(move || records::table(&lane)),
            lane_lost: Box::new(move || lost.events_lost()),
            verdicts: Box::new(move || decisions.report().counts),
            pods: Box::new(move || Self::pods(&capture, &pods)),
            identity: Box::new(move || {
                let certificates = &certificates.certificates;
                IdentityReport {
                    certificates: certificates.list(),
                    roots: certificates.roots(),
                    fetches: certificates.fetches(),
                }
            }),
            trust: Box::new(move || trust.trust()),
            sessions: Arc::clone(self.context.registry.sessions()),
            manifest_problems: Box::new(move || problems.borrow().len()),
            policy_problems: Box::new(move || {
                rules.rules.load().problems().iter().map(|problem| (problem.kind, problem.effect)).collect()
            }),
            pool: Arc::clone(self.context.registry.pool()),
            policy_gaps: Box::new(move || gaps.rules.load().gaps().len()),
            repairs: Box::new(move || repaired.repairs()),
            older: Box::new(move || aged.older().iter().map(|(_, older)| older.len()).sum()),
            cni: Box::new(move || cni.installed()),
            budget: self.context.budget.clone(),
        }
    }

    fn answers(self) -> Answers {
        let (live, certificates) = (self.context.registry.clone(), self.context.certificates.clone());
        let trusting = certificates.clone();
        let (lane, telemetry) = (self.context.capture.lane(), Arc::clone(&self.telemetry));
        let rules = Arc::clone(&self.context.rules);
        let (explained, proving, known) = (self.context.clone(), self.context.clone(), self.pods.clone());
        let prover = Arc::new(Prover::default());
        let (aged, named) = (self.context.capture.clone(), self.pods.clone());
        Answers {
            connections: Box::new(move || {
                let rules = rules.load();
                let mut lines: Vec<_> =
                    live.live().iter().map(|connection| ConnectionLine::new(connection, &rules)).collect();
                telemetry.lane().look(|| records::table(&lane));
                let on_lane = telemetry.lane().connections();
                lines.extend(on_lane.iter().map(|connection| ConnectionLine::of_lane(connection, &rules)));
                lines.sort_by_key(|line| line.id);
                lines
            }),
            certificates: Box::new(move || {
                let now = std::time::SystemTime::now();
                let mut lines: Vec<_> =
                    certificates.list().iter().map(|status| CertificateLine::new(status, now)).collect();
                lines.sort_by(|one, other| one.identity.cmp(&other.identity));
                lines
            }),
            trust: Box::new(move || Trust::new(&trusting.roots(), &trusting.trust(), std::time::SystemTime::now())),
            explain: Box::new(move |question| {
                let Context { cluster, rules, certificates, .. } = &explained;
                policy::answer(question, &cluster.load(), &rules.load(), certificates.trust_domain())
            }),
            prove: Box::new(move |request| {
                let (context, pods, prover) = (proving.clone(), known.clone(), Arc::clone(&prover));
                Box::pin(async move { prover.prove(&context, &pods.list(), &request).await })
            }),
            older: Box::new(move || {
                let pods = named.list();
                let name = |uid: &Arc<str>| {
                    let pod = pods.iter().find(|pod| pod.uid == *uid);
                    pod.map_or_else(|| uid.to_string(), |pod| format!("{}/{}", pod.namespace, pod.name))
                };
                let mut lines = Vec::new();
                for (uid, older) in aged.older() {
                    let pod = name(&uid);
                    lines.extend(older.iter().map(|older| OlderLine {
                        pod: pod.clone(),
                        local: older.local.to_string(),
                        remote: older.remote.to_string(),
                    }));
                }
                lines
            }),
            status: Box::new(move || {
                let waiting_for = self.readiness.waiting_for();
                let lane = self.lane.report();
                let line = |pod: &PodReport| PodLine::new(pod, lane.pods.get(&pod.uid));
                let mut pods: Vec<_> = Self::pods(&self.context, &self.pods).iter().map(line).collect();
                pods.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
                let rules = self.context.rules.load();
                let trust = self.context.certificates.trust();
                let crl = trust.crl.and_then(|crl| crl.problem).map(|problem| problem.to_string());
                Status {
                    node: self.context.node.to_string(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    ready: waiting_for.is_empty(),
                    waiting_for: waiting_for.into_iter().map(Cow::into_owned).collect(),
                    pods,
                    repairs: self.pods.repairs(),
                    cni_problem: self.cni.problem().map(|(reason, detail)| format!("{reason}: {detail}")),
                    kubelet: self.kubelet.report().into(),
                    unproven_paths: lane.paths.iter().map(PathLine::from).collect(),
                    manifest_problems: self
                        .problems
                        .borrow()
                        .iter()
                        .map(|problem| {
                            format!("{}: {}; {}", problem.file.display(), problem.error, problem.error.fix())
                        })
                        .collect(),
                    trust_problems: trust.bundle.map(|problem| problem.to_string()).into_iter().chain(crl).collect(),
                    policy_problems: rules
                        .problems()
                        .iter()
                        .map(|problem| {
                            let (kind, effect) = (problem.kind.as_str(), problem.effect);
                            format!("{kind} {}: {}: {} ({effect:?})", problem.policy, problem.field, problem.fix)
                        })
                        .collect(),
                }
            }),
        }
    }
}

/// Prometheus' text format.
pub(super) const EXPOSITION: [(&str, &str); 1] = [("content-type", "text/plain; version=0.0.4; charset=utf-8")];

/// `GET /metrics` and, where Istio's scrapers look, `/stats/prometheus`.
fn metrics_router(telemetry: Arc<Telemetry>, sources: Sources) -> Router {
    type Scraped = (Arc<Telemetry>, Arc<Sources>);
    async fn scrape(
        State((telemetry, sources)): State<Scraped>,
    ) -> Result<([(&'static str, &'static str); 1], String), (StatusCode, String)> {
        // Reading kernel counters and making text is CPU work, of milliseconds with many pods.
        match tokio::task::spawn_blocking(move || telemetry.scrape(&sources)).await {
            Ok(Ok(text)) => Ok((EXPOSITION, text)),
            Ok(Err(error)) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
            Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
        }
    }
    Router::new()
        .route("/metrics", get(scrape))
        .route("/stats/prometheus", get(scrape))
        .with_state((telemetry, Arc::new(sources)))
}

/// Waits until each pod of the node was tried.
async fn first_pass(readiness: Readiness) {
    while readiness.waiting_for().iter().any(|what| what == FIRST_PASS) {
        sleep(limits::WATCH_INTERVAL).await;
    }
}

/// Holds `blocker` until the first certificate is there, or the first pass found no pod that needs one.
async fn first_certificate(certificates: Certificates, readiness: Readiness, blocker: Blocker) {
    loop {
        let list = certificates.list();
        let first_pass = readiness.waiting_for().iter().any(|what| what == FIRST_PASS);
        if list.iter().any(|status| status.not_after.is_some()) || list.is_empty() && !first_pass {
            return drop(blocker);
        }
        sleep(limits::WATCH_INTERVAL).await;
    }
}

/// Keeps the agent from being ready while policies may be missing, and says so in the log.
async fn incomplete(mut view: cluster::View, readiness: Readiness, first: Blocker, stop: CancellationToken) {
    let watching = async {
        let mut first = Some(first);
        let mut known = Vec::new();
        let mut _blockers = Vec::new();
        let mut snapshot = view.load();
        loop {
            if known != snapshot.policy_gaps {
                let gone = known.iter().filter(|gap| !snapshot.policy_gaps.contains(gap));
                gone.for_each(|gap| tracing::info!(file = %gap.source, "Policies are complete again"));
                for gap in snapshot.policy_gaps.iter().filter(|gap| !known.contains(gap)) {
                    tracing::error!(
                        file = %gap.source,
                        reason = "policies_incomplete",
                        "Policies may be missing: new connections to {} are denied until the file is mended or removed",
                        gap.place(),
                    );
                }
                known.clone_from(&snapshot.policy_gaps);
                _blockers = known.iter().map(|gap| readiness.block(told(gap))).collect();
            }
            // Not before: the agent must not be ready for a moment in between.
            drop(first.take());
            match view.next().await {
                Some(next) => snapshot = next,
                None => return,
            }
        }
    };
    let _stopped = stop.run_until_cancelled(watching).await;
}

/// What readiness and `heddle status` say of a gap.
fn told(gap: &cluster::PolicyGap) -> String {
    format!("{} to be readable: connections to {} are denied, as policies may be missing", gap.source, gap.place())
}

/// Closes connections on which nothing is said any more.
async fn close_idle(registry: Registry, stop: CancellationToken) {
    let mut due = interval(limits::STREAM_IDLE_LOOK);
    let mut quiet = Quiet::default();
    let looking = async {
        loop {
            due.tick().await;
            let closed = quiet.close(&registry, limits::STREAM_IDLE, Instant::now());
            if closed > 0 {
                tracing::info!(closed, "Idle connections closed");
            }
        }
    };
    let _stopped: Option<std::convert::Infallible> = stop.run_until_cancelled(looking).await;
}

/// Tells telemetry of each snapshot.
async fn learn(telemetry: Arc<Telemetry>, mut view: cluster::View, stop: CancellationToken) {
    telemetry.learn(&view.load());
    while let Some(Some(snapshot)) = stop.run_until_cancelled(view.next()).await {
        telemetry.learn(&snapshot);
    }
}

/// Forgets metrics of workloads that are gone.
async fn sweep(telemetry: Arc<Telemetry>, view: cluster::View, stop: CancellationToken) {
    let mut due = interval(limits::METRIC_SWEEP);
    let sweeping = async {
        loop {
            due.tick().await;
            telemetry.expire(&view.load());
        }
    };
    let _stopped: Option<std::convert::Infallible> = stop.run_until_cancelled(sweeping).await;
}
