//! The thread that follows the API server: seven watches in, whole snapshots out, and the last good one on disk.
//!
//! Reading, indexing and writing happen here and never on the threads that carry traffic.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client,
    core::{ApiResource, DynamicObject},
};
use serde_json::Value;
use tokio::{
    sync::{oneshot, watch},
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    ApiServer, api_client,
    follow::{Followed, Taken},
    reach::Reach,
    saved::Saved,
    shared::{News, Shared},
    store::{Name, Object, Resource, name},
    trim,
};
use crate::{
    cluster::{
        Objects, PolicyKind, Problem, Settings, Snapshot, SourceError,
        index::Indexer,
        read::{checked_pod, checked_service, checked_slice, policy},
        watch::{tell, tell_warnings},
    },
    life::limits,
};

/// What the thread is given.
pub(super) struct Thread {
    pub config: ApiServer,
    pub settings: Settings,
    pub shared: Arc<Shared>,
    pub problems: watch::Sender<Arc<[Problem]>>,
    /// Gets the first snapshot, when everything is known.
    pub first: oneshot::Sender<Result<watch::Receiver<Arc<Snapshot>>, SourceError>>,
    pub progress: watch::Sender<BTreeSet<Resource>>,
    pub stop: CancellationToken,
}

impl Thread {
    pub fn run(self) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return drop(self.first.send(Err(SourceError::Thread(error)))),
        };
        let stop = self.stop.clone();
        let _stopped = runtime.block_on(stop.run_until_cancelled(self.follow()));
        // What is being written is whole or not there.
        runtime.shutdown_timeout(limits::CUT_WAIT);
    }

    async fn follow(self) {
        let client = match api_client(self.config.kubeconfig.as_deref()).await {
            Ok(client) => client,
            Err(error) => return drop(self.first.send(Err(SourceError::Client(error)))),
        };
        // Dropping it ends them.
        let _watches = watches(&client, &self.shared, &self.config.node);
        let _moves = self
            .settings
            .places
            .changes()
            .map(|changes| Aborted(tokio::spawn(moves(changes, Arc::clone(&self.shared)))));
        let saved = Saved::new(self.config.state_dir, self.config.node, self.config.cluster_id);
        let mut publisher = Publisher {
            indexer: Indexer::new(self.settings),
            problems: self.problems,
            shared: self.shared,
            rest: None,
            disk: Disk::new(saved),
        };
        let Some(first) = publisher.first(&self.progress).await else { return };
        let (snapshots, receiver) = watch::channel(Arc::new(first));
        if self.first.send(Ok(receiver)).is_ok() {
            publisher.run(&snapshots).await;
        }
    }
}

/// A task that ends with its handle.
struct Aborted(JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn moves(mut changes: watch::Receiver<u64>, shared: Arc<Shared>) {
    while changes.changed().await.is_ok() {
        shared.moved();
    }
}

/// A watch for each kind.
fn watches(client: &Client, shared: &Arc<Shared>, node: &Arc<str>) -> JoinSet<()> {
    let mut watches = JoinSet::new();
    let reach = Arc::new(Reach::new(client.clone()));
    let pulse = Arc::clone(&reach);
    watches.spawn(async move { pulse.pulse().await });
    macro_rules! follow {
        ($kind:ident, $resource:ident, $take:expr) => {{
            let take: fn($kind) -> Result<$kind, (String, String)> = $take;
            let followed = Followed::<$kind> {
                resource: Resource::$resource,
                apis: vec![Api::all(client.clone())],
                take: Box::new(move |object| {
                    let name = name(&object.metadata);
                    (name, take(object).map(|object| Object::$kind(Arc::new(object))))
                }),
            };
            watches.spawn(followed.run(Arc::clone(shared), Arc::clone(&reach)));
        }};
    }
    follow!(Namespace, Namespaces, |object| Ok(trim::namespace(object)));
    follow!(Node, Nodes, |object| Ok(trim::node(object)));
    follow!(Service, Services, |object| checked_service(trim::service(object)));
    follow!(EndpointSlice, EndpointSlices, |object| checked_slice(trim::endpoint_slice(object)));
    let here = Arc::clone(node);
    let pods = Followed::<Pod> {
        resource: Resource::Pods,
        apis: vec![Api::all(client.clone())],
        take: Box::new(move |pod| {
            let name = name(&pod.metadata);
            (name, checked_pod(trim::pod(pod, &here)).map(|pod| Object::Pod(Arc::new(pod))))
        }),
    };
    watches.spawn(pods.run(Arc::clone(shared), Arc::clone(&reach)));
    for resource in [Resource::AuthorizationPolicies, Resource::PeerAuthentications] {
        let Some(kind) = resource.policy() else { continue };
        let api = |version: &str| {
            let api_version = format!("security.istio.io/{version}");
            let (group, kind, plural) = ("security.istio.io".to_owned(), kind.as_str().to_owned(), resource.name());
            let version = version.to_owned();
            let resource = ApiResource { group, version, api_version, kind, plural: plural.to_owned() };
            Api::all_with(client.clone(), &resource)
        };
        let followed = Followed::<DynamicObject> {
            resource,
            apis: vec![api("v1"), api("v1beta1")],
            take: Box::new(move |object| take_policy(kind, object)),
        };
        watches.spawn(followed.run(Arc::clone(shared), Arc::clone(&reach)));
    }
    watches
}

/// A policy is read strictly, from what was sent: an unknown field makes it invalid.
fn take_policy(kind: PolicyKind, object: DynamicObject) -> Taken {
    let name: Name = name(&object.metadata);
    let object = match serde_json::to_value(&object) {
        Ok(Value::Object(mut object)) => {
            trim::policy(&mut object);
            // The items of some servers' lists leave both to the list.
            object.insert("kind".to_owned(), kind.as_str().into());
            object.entry("apiVersion").or_insert_with(|| "security.istio.io/v1".into());
            Ok(Object::Policy(policy(kind, object)))
        }
        Ok(_) => Err((String::new(), "is no object".to_owned())),
        Err(error) => Err((String::new(), error.to_string())),
    };
    (name, object)
}

/// Makes snapshots of what the watches tell.
struct Publisher {
    indexer: Indexer,
    problems: watch::Sender<Arc<[Problem]>>,
    shared: Arc<Shared>,
    /// What the last snapshot cost, and when it was done.
    rest: Option<(Duration, Instant)>,
    disk: Disk,
}

impl Publisher {
    /// Waits until everything is known, from the API server or from disk.
    async fn first(&mut self, progress: &watch::Sender<BTreeSet<Resource>>) -> Option<Snapshot> {
        let told = |known| {
            progress.send_replace(known);
        };
        if !self.shared.complete(limits::SAVED_PATIENCE, told).await
            && let Some((objects, written)) = self.disk.read(&self.shared).await
        {
            let age = SystemTime::now().duration_since(written).unwrap_or_default().as_secs();
            tracing::warn!(
                age_seconds = age,
                pods = objects.pods.len(),
                "The API server is away: deciding by the last good snapshot"
            );
            self.shared.recall(objects);
        }
        loop {
            match self.shared.next(None).await {
                News::Problems(problems) => self.tell(problems),
                News::Objects { objects, urgent } => {
                    let known = self.shared.known();
                    let complete = known.len() == Resource::ALL.len();
                    progress.send_replace(known);
                    if complete {
                        let first = self.index(&objects, 1);
                        tell_warnings(&first, None);
                        tracing::info!(
                            workloads = first.workloads.len(),
                            services = first.services.len(),
                            "Cluster is known"
                        );
                        self.disk.want(objects, urgent);
                        return Some(first);
                    }
                }
            }
        }
    }

    async fn run(mut self, snapshots: &watch::Sender<Arc<Snapshot>>) {
        loop {
            let news = tokio::select! {
                news = self.shared.next(self.rest) => news,
                () = self.disk.due() => {
                    self.disk.write(&self.shared);
                    continue;
                }
            };
            match news {
                News::Problems(problems) => self.tell(problems),
                News::Objects { objects, urgent } => {
                    let current = Arc::clone(&snapshots.borrow());
                    let next = self.index(&objects, current.generation + 1);
                    if !next.same_content(&current) {
                        tell_warnings(&next, Some(&current));
                        tracing::debug!(
                            generation = next.generation,
                            workloads = next.workloads.len(),
                            "Cluster changed"
                        );
                        snapshots.send_replace(Arc::new(next));
                    }
                    self.disk.want(objects, urgent);
                }
            }
        }
    }

    fn index(&mut self, objects: &Arc<Objects>, generation: u64) -> Snapshot {
        let began = Instant::now();
        let snapshot = self.indexer.index(std::slice::from_ref(objects), generation);
        self.rest = Some((began.elapsed(), Instant::now()));
        snapshot
    }

    fn tell(&self, problems: Vec<Problem>) {
        if *problems != **self.problems.borrow() {
            tell(&problems, &self.problems.borrow());
            self.problems.send_replace(problems.into());
        }
    }
}

/// The last good snapshot on its way to disk.
struct Disk {
    saved: Saved,
    /// What is to be written.
    wanted: Option<Arc<Objects>>,
    /// A policy is among what is to be written.
    urgent: bool,
    /// What was written last.
    written: Option<Arc<Objects>>,
    /// When that was, or could not be.
    tried: Option<Instant>,
    writing: Option<JoinHandle<()>>,
}

impl Disk {
    fn new(saved: Saved) -> Self {
        Self { saved, wanted: None, urgent: false, written: None, tried: None, writing: None }
    }

    fn want(&mut self, objects: Arc<Objects>, urgent: bool) {
        self.wanted = Some(objects);
        self.urgent |= urgent;
    }

    /// Ends when there is something to write, and it may be written again. What has not changed is written again too, before
    /// it looks too old.
    async fn due(&self) {
        let pause = match (&self.wanted, self.urgent) {
            (Some(_), true) => limits::SAVED_PAUSE_POLICY,
            (Some(_), false) => limits::SAVED_PAUSE,
            (None, _) => limits::SAVED_AGAIN,
        };
        match self.tried {
            Some(at) => tokio::time::sleep_until((at + pause).into()).await,
            None if self.wanted.is_some() => {}
            None => std::future::pending().await,
        }
    }

    fn write(&mut self, shared: &Arc<Shared>) {
        self.tried = Some(Instant::now());
        // What the API server does not confirm gets no younger.
        if self.writing.as_ref().is_some_and(|writing| !writing.is_finished()) || !shared.in_step() {
            return;
        }
        let Some(objects) = self.wanted.take().or_else(|| self.written.take()) else { return };
        self.urgent = false;
        self.written = Some(Arc::clone(&objects));
        let (saved, shared) = (self.saved.clone(), Arc::clone(shared));
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let problem = saved.write(&objects, SystemTime::now()).err();
            shared.saved(problem.map(|error| format!("{} can't be written: {error}", saved.path().display())));
        }));
    }

    async fn read(&self, shared: &Arc<Shared>) -> Option<(Objects, SystemTime)> {
        let saved = self.saved.clone();
        let read = tokio::task::spawn_blocking(move || saved.read(SystemTime::now())).await;
        let problem = match read {
            Ok(Ok(found)) => return found,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        shared.saved(Some(format!("{}, which is not used: {problem}", self.saved.path().display())));
        None
    }
}
