//! A Kubernetes API server in small, over TLS: what heddle asks one for, answered as the real one answers.
//!
//! Objects have versions and conflicts, lists pages and selectors, watches go on from a version, send bookmarks, end by
//! themselves and are told of history that is gone; a TokenReview intersects audiences. It fails on demand, and remembers who
//! used which verb on what, for a test to hold against RBAC rules. It is one of its kind on purpose: the agent's own tests have
//! this very folder by path. Where the real one looks whether a token's pod still exists, it does not: that is the moment in
//! which the CA must look itself. What admission and schemas would refuse, it stores.

mod faults;
mod kinds;
mod listen;
mod patch;
mod requests;
mod select;
mod store;
mod tokens;
mod watches;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};

pub use self::{
    faults::Fault,
    tokens::{Token, review},
};
use self::{
    faults::Faults,
    listen::Connections,
    store::{Key, Store},
};

/// Entries of a list's page at most unless a test says otherwise, whatever is asked for: every list has several.
const PAGE: usize = 3;
/// The mesh's own namespace.
const OWN: &str = "heddle-system";
/// Who has a kubeconfig of [`ApiServer::write_kubeconfig`].
const CA: &str = "ca";

/// A running API server; gone when dropped.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    certificate: String,
    cluster: Arc<Cluster>,
    task: JoinHandle<()>,
}

/// What it knows.
#[derive(Debug)]
struct Cluster {
    state: Mutex<Known>,
    /// Told of each change, and of faults that begin and end.
    changed: watch::Sender<()>,
    connections: Connections,
}

#[derive(Debug)]
struct Known {
    store: Store,
    /// By their text.
    tokens: BTreeMap<String, Token>,
    /// Names by their bearer token.
    users: BTreeMap<String, String>,
    faults: Faults,
    /// Resources that it does not know, by plural: their CRD is absent.
    absent: BTreeSet<String>,
    /// Watches tell of nothing for now.
    hushed: bool,
    page: usize,
    /// Between two bookmarks of a watch.
    bookmarks: Duration,
    /// What was asked, and how often.
    seen: BTreeMap<Seen, usize>,
}

/// One kind of request, as RBAC sees it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    pub user: String,
    pub verb: &'static str,
    pub group: String,
    pub resource: String,
    /// Empty where the object itself was meant.
    pub subresource: String,
    pub namespace: String,
    /// Of lists and watches: that of their field selector.
    pub name: String,
}

impl Seen {
    /// The resource as rules name it: with the subresource, where there is one.
    #[must_use]
    pub fn whole_resource(&self) -> String {
        [&*self.resource, &*self.subresource].join("/").trim_end_matches('/').to_owned()
    }
}

/// A pod as the API server tells of it.
#[must_use]
pub fn pod(namespace: &str, name: &str, uid: &str, account: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": uid},
        "spec": {"serviceAccountName": account, "nodeName": node, "containers": [{"name": "app"}]},
        "status": {"phase": "Running"},
    })
}

impl ApiServer {
    /// Listens on a free port of loopback.
    pub async fn start() -> io::Result<Self> {
        Self::start_on(std::net::TcpListener::bind("127.0.0.1:0")?)
    }

    /// Serves a socket, which may be of another network namespace. To be called in a runtime.
    pub fn start_on(listener: std::net::TcpListener) -> io::Result<Self> {
        let known = Known {
            store: Store::default(),
            tokens: BTreeMap::new(),
            users: BTreeMap::from([(token_of(CA), CA.to_owned())]),
            faults: Faults::default(),
            absent: BTreeSet::new(),
            hushed: false,
            page: PAGE,
            bookmarks: Duration::from_secs(60),
            seen: BTreeMap::new(),
        };
        let address = listener.local_addr()?;
        let (certificate, connections, listener) = listen::listen(listener)?;
        let cluster = Arc::new(Cluster { state: Mutex::new(known), changed: watch::Sender::new(()), connections });
        let router = requests::router(Arc::clone(&cluster));
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the API server ended: {error}");
            }
        });
        Ok(Self { address, certificate, cluster, task })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.cluster.known()
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes the CA's kubeconfig that leads here, and the certificate beside it.
    pub fn write_kubeconfig(&self, path: &Path) -> io::Result<()> {
        self.write_kubeconfig_of(path, CA)
    }

    /// Writes a kubeconfig of a user, by whom [`ApiServer::verbs_seen`] tells requests apart. Its namespace is the mesh's own.
    pub fn write_kubeconfig_of(&self, path: &Path, user: &str) -> io::Result<()> {
        let certificate = path.with_extension("crt");
        std::fs::write(&certificate, &self.certificate)?;
        self.known().users.insert(token_of(user), user.to_owned());
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user, "namespace": OWN}}],
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{}", self.address),
                "certificate-authority": certificate,
            }}],
            "users": [{"name": user, "user": {"token": token_of(user)}}],
        });
        std::fs::write(path, config.to_string())
    }

    /// Makes or changes an object, as somebody else would.
    ///
    /// # Panics
    /// When it is of a kind that the stand-in does not have.
    pub fn put(&self, object: Value) {
        self.put_all([object]);
    }

    /// Makes or changes objects, all at once.
    ///
    /// # Panics
    /// When one is of a kind that the stand-in does not have.
    pub fn put_all(&self, objects: impl IntoIterator<Item = Value>) {
        let mut known = self.known();
        for object in objects {
            let Some(kind) = kinds::of(&object) else { panic!("no kind of the stand-in's: {object}") };
            known.store.put(Key::of(kind, &object), object);
        }
        drop(known);
        self.cluster.tell();
    }

    /// Makes or changes an object of a resource, which need not say its kind.
    ///
    /// # Panics
    /// When the stand-in has no such resource.
    pub fn put_as(&self, plural: &str, mut object: Value) {
        let Some(kind) = kinds::plural(plural) else { panic!("no resource of the stand-in's: {plural}") };
        let version = kind.versions[0];
        let api_version = if kind.group.is_empty() { version.to_owned() } else { format!("{}/{version}", kind.group) };
        object["apiVersion"] = json!(api_version);
        object["kind"] = json!(kind.kind);
        self.put(object);
    }

    /// Takes a pod away.
    pub fn delete(&self, namespace: &str, name: &str) {
        self.remove("pods", namespace, name);
    }

    /// Takes an object away; one that is not there stays so.
    pub fn remove(&self, plural: &str, namespace: &str, name: &str) {
        if let Some(kind) = kinds::plural(plural) {
            self.known().store.remove(&Key::new(kind, namespace, name));
            self.cluster.tell();
        }
    }

    /// Takes away the object that is called so.
    pub fn remove_object(&self, object: &Value) {
        if let Some(kind) = kinds::of(object) {
            self.known().store.remove(&Key::of(kind, object));
            self.cluster.tell();
        }
    }

    /// An object as it is stored.
    #[must_use]
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = Key::new(kinds::plural(plural)?, namespace, name);
        self.known().store.get(&key).map(|stored| Value::clone(&stored.value))
    }

    /// Every object of a resource, in the order of names.
    #[must_use]
    pub fn all(&self, plural: &str) -> Vec<Value> {
        let known = self.known();
        let of = |kind| known.store.all(kind).map(|(_, stored)| Value::clone(&stored.value)).collect();
        kinds::KINDS.iter().find(|kind| kind.plural == plural).map(of).unwrap_or_default()
    }

    /// Issues a token: its text.
    pub fn issue(&self, token: Token) -> String {
        let mut known = self.known();
        let text = token.text(known.tokens.len());
        known.users.insert(text.clone(), format!("system:serviceaccount:{}:{}", token.namespace, token.account));
        known.tokens.insert(text.clone(), token);
        text
    }

    /// It is of no use from now on, or of use again. What becomes of open watches each [`Fault`] says.
    pub fn break_down(&self, fault: Option<Fault>) {
        self.known().faults.all = fault;
        self.cluster.tell();
    }

    /// The next requests for a resource fail, this many of them.
    pub fn fail(&self, plural: &str, fault: Fault, times: usize) {
        self.known().faults.some.push((plural.to_owned(), fault, times));
    }

    /// Requests for a resource fail no more.
    pub fn recover(&self, plural: &str) {
        self.known().faults.some.retain(|(of, ..)| of != plural);
    }

    /// Ends every connection without a word.
    pub fn drop_connections(&self) {
        self.cluster.connections.drop_all();
    }

    /// It does not know a resource, by plural: the CRD was never applied, or is again.
    pub fn set_absent(&self, plural: &str, absent: bool) {
        let mut known = self.known();
        if absent {
            known.absent.insert(plural.to_owned());
        } else {
            known.absent.remove(plural);
        }
    }

    /// Forgets the history, and ends open watches: whoever goes on from an older version is answered 410 Gone.
    pub fn compact(&self) {
        self.known().store.compact();
        self.drop_connections();
    }

    /// Watches tell of nothing until they may again: lists and single objects are ahead of them.
    pub fn hush_watches(&self, hushed: bool) {
        self.known().hushed = hushed;
        self.cluster.tell();
    }

    /// Entries of a page at most.
    pub fn set_page(&self, entries: usize) {
        self.known().page = entries.max(1);
    }

    /// How often watches are sent a bookmark, where they ask for them.
    pub fn set_bookmarks(&self, every: Duration) {
        self.known().bookmarks = every;
    }

    /// How often this was asked: `tokenreview`, `pod`, `pods`, `list` or `watch`; the latter two of all pods.
    #[must_use]
    pub fn asked(&self, what: &str) -> usize {
        let (verb, plural, namespaced) = match what {
            "tokenreview" => ("create", "tokenreviews", false),
            "pod" => ("get", "pods", true),
            "pods" => ("list", "pods", true),
            what => (what, "pods", false),
        };
        self.sum(|seen| seen.verb == verb && seen.resource == plural && seen.namespace.is_empty() != namespaced)
    }

    /// How often a verb was used on a resource.
    #[must_use]
    pub fn count(&self, verb: &str, plural: &str) -> usize {
        self.sum(|seen| seen.verb == verb && seen.resource == plural)
    }

    fn sum(&self, counts: impl Fn(&Seen) -> bool) -> usize {
        self.known().seen.iter().filter(|(seen, _)| counts(seen)).map(|(_, times)| times).sum()
    }

    /// Everything that anybody asked for.
    #[must_use]
    pub fn verbs_seen(&self) -> BTreeSet<Seen> {
        self.known().seen.keys().cloned().collect()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
        self.cluster.connections.drop_all();
    }
}

/// What a user shows to be let in.
fn token_of(user: &str) -> String {
    format!("the-{user}-of-the-lab")
}

impl Cluster {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.changed.send_replace(());
    }
}
