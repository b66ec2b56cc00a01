//! A Kubernetes API server as far as the CA asks it: TokenReview, and pods by GET, LIST and WATCH, over TLS.
//!
//! It answers as the real one does: audiences are intersected, lists have pages and field selectors, a watch goes on from a
//! resource version and ends by itself. It is one of its kind on purpose: the agent's own tests have this very file by path.
//! Where the real one looks whether a token's pod still exists, it does not: that is the moment in which the CA must look itself.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Query, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::Listener,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures::stream;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// What the CA shows to be let in.
const OWN_TOKEN: &str = "the-ca-of-the-lab";
/// Entries of a list's page at most, whatever is asked for.
const PAGE: usize = 3;

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
    /// The version of the last change.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Known {
    /// By namespace and name.
    pods: BTreeMap<(String, String), Value>,
    /// Every change since the beginning: version, kind, object.
    history: Vec<(u64, &'static str, Value)>,
    /// By their text.
    tokens: BTreeMap<String, Token>,
    /// What it answers instead of anything else.
    fault: Option<Fault>,
    /// Watches tell of nothing for now.
    hushed: bool,
    /// How often each kind of question was asked.
    asked: BTreeMap<&'static str, usize>,
}

/// How it can be of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every question is answered with this status.
    Status(u16),
    /// None is answered.
    Silence,
}

/// A service account's token, bound to a pod.
#[derive(Debug, Clone)]
pub struct Token {
    pub namespace: String,
    pub account: String,
    pub pod: String,
    pub pod_uid: String,
    /// As newer API servers tell it; empty where it does not.
    pub node: String,
    pub audiences: Vec<String>,
    /// Seconds from now; negative for one that has expired.
    pub expires: i64,
    /// What its text says of its expiry and audience is not so: only the API server knows.
    pub lies: bool,
}

impl Token {
    /// A good one of an agent's pod.
    #[must_use]
    pub fn of(namespace: &str, account: &str, pod: &str, pod_uid: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            account: account.to_owned(),
            pod: pod.to_owned(),
            pod_uid: pod_uid.to_owned(),
            node: String::new(),
            audiences: vec!["istio-ca".to_owned()],
            expires: 3_600,
            lies: false,
        }
    }

    /// Its text; a number makes it another one.
    #[must_use]
    pub fn text(&self, number: usize) -> String {
        let audiences = if self.lies { vec!["istio-ca".to_owned()] } else { self.audiences.clone() };
        let expires = unix(SystemTime::now()) + if self.lies { 3_600 } else { self.expires };
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let head = part(&json!({"alg": "RS256", "kid": "stand-in"}));
        let claims = part(&json!({
            "aud": audiences,
            "exp": expires,
            "iss": "https://kubernetes.default.svc",
            "sub": format!("system:serviceaccount:{}:{}", self.namespace, self.account),
            "kubernetes.io": {"namespace": self.namespace, "pod": {"name": self.pod, "uid": self.pod_uid}},
        }));
        format!("{head}.{claims}.{}", URL_SAFE_NO_PAD.encode(format!("signature {number}")))
    }
}

fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
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

/// What a TokenReview of `token` for these audiences says (`status`).
#[must_use]
pub fn review(tokens: &BTreeMap<String, Token>, text: &str, audiences: &[String]) -> Value {
    let Some(token) = tokens.get(text) else {
        return json!({"user": {}, "error": "[invalid bearer token, Token has been invalidated]"});
    };
    if token.expires <= 0 {
        return json!({"user": {}, "error": "[invalid bearer token, service account token has expired]"});
    }
    let both: Vec<&String> = audiences.iter().filter(|audience| token.audiences.contains(audience)).collect();
    if both.is_empty() {
        let error = format!(
            "[invalid bearer token, token audiences {:?} is invalid for the target audiences {audiences:?}]",
            token.audiences
        );
        return json!({"user": {}, "error": error});
    }
    let mut extra = json!({
        "authentication.kubernetes.io/pod-name": [token.pod],
        "authentication.kubernetes.io/pod-uid": [token.pod_uid],
    });
    if !token.node.is_empty() {
        extra["authentication.kubernetes.io/node-name"] = json!([token.node]);
    }
    json!({
        "authenticated": true,
        "audiences": both,
        "user": {
            "username": format!("system:serviceaccount:{}:{}", token.namespace, token.account),
            "uid": "00000000-0000-0000-0000-000000000000",
            "groups": [
                "system:serviceaccounts",
                format!("system:serviceaccounts:{}", token.namespace),
                "system:authenticated",
            ],
            "extra": extra,
        },
    })
}

impl ApiServer {
    /// Listens on a free port of loopback.
    pub async fn start() -> io::Result<Self> {
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).map_err(io::Error::other)?;
        let certificate = params.self_signed(&key).map_err(io::Error::other)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let secret = PrivateKeyDer::try_from(key.serialize_der()).map_err(io::Error::other)?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], secret))
            .map_err(io::Error::other)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let cluster = Arc::new(Cluster { state: Mutex::default(), changed: watch::Sender::new(1) });
        let router = Router::new()
            .route("/apis/authentication.k8s.io/v1/tokenreviews", post(token_review))
            .route("/api/v1/pods", get(all_pods))
            .route("/api/v1/namespaces/{namespace}/pods", get(pods))
            .route("/api/v1/namespaces/{namespace}/pods/{name}", get(one_pod))
            .fallback(|| async { failure(404, "NotFound", "the server could not find the requested resource") })
            .layer(from_fn_with_state(Arc::clone(&cluster), admit))
            .with_state(Arc::clone(&cluster));
        let listener = Encrypted { listener, acceptor: TlsAcceptor::from(Arc::new(config)) };
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the API server ended: {error}");
            }
        });
        Ok(Self { address, certificate: certificate.pem(), cluster, task })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.cluster.known()
    }

    /// Writes a kubeconfig that leads here, and the certificate beside it.
    pub fn write_kubeconfig(&self, path: &Path) -> io::Result<()> {
        let certificate = path.with_extension("crt");
        std::fs::write(&certificate, &self.certificate)?;
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "ca"}}],
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{}", self.address),
                "certificate-authority": certificate,
            }}],
            "users": [{"name": "ca", "user": {"token": OWN_TOKEN}}],
        });
        std::fs::write(path, config.to_string())
    }

    /// Makes or changes a pod.
    pub fn put(&self, pod: Value) {
        self.cluster.change(&pod, false);
    }

    /// Takes a pod away.
    pub fn delete(&self, namespace: &str, name: &str) {
        let pod = self.known().pods.get(&(namespace.to_owned(), name.to_owned())).cloned();
        if let Some(pod) = pod {
            self.cluster.change(&pod, true);
        }
    }

    /// Issues a token: its text.
    pub fn issue(&self, token: Token) -> String {
        let mut known = self.known();
        let text = token.text(known.tokens.len());
        known.tokens.insert(text.clone(), token);
        text
    }

    /// It is of no use from now on, or of use again. Connections and watches that are open end too.
    pub fn break_down(&self, fault: Option<Fault>) {
        self.known().fault = fault;
        self.cluster.changed.send_modify(|_| ());
    }

    /// Watches tell of nothing until they may again: lists and single pods are ahead of them.
    pub fn hush_watches(&self, hushed: bool) {
        self.known().hushed = hushed;
        self.cluster.changed.send_modify(|_| ());
    }

    /// How often this was asked: `tokenreview`, `pod`, `pods`, `list` or `watch`.
    #[must_use]
    pub fn asked(&self, what: &str) -> usize {
        self.known().asked.get(what).copied().unwrap_or(0)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Cluster {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, pod: &Value, gone: bool) {
        let mut known = self.known();
        let version = *self.changed.borrow() + 1;
        let mut pod = pod.clone();
        pod["metadata"]["resourceVersion"] = json!(version.to_string());
        let part = |field: &str| pod["metadata"][field].as_str().unwrap_or_default().to_owned();
        let key = (part("namespace"), part("name"));
        let kind = match gone {
            true => known.pods.remove(&key).map(|_| "DELETED"),
            false => known.pods.insert(key, pod.clone()).map(|_| "MODIFIED").or(Some("ADDED")),
        };
        if let Some(kind) = kind {
            known.history.push((version, kind, pod));
            self.changed.send_replace(version);
        }
    }

    fn count(&self, what: &'static str) {
        *self.known().asked.entry(what).or_default() += 1;
    }
}

type Shared = State<Arc<Cluster>>;

/// `metav1.Status` of a failure.
fn failure(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, answer(&status)).into_response()
}

fn answer(value: &Value) -> ([(header::HeaderName, &'static str); 1], String) {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string())
}

/// Lets in who shows the CA's own token, unless nobody is answered.
async fn admit(State(cluster): Shared, headers: HeaderMap, request: Request, next: Next) -> Response {
    let fault = cluster.known().fault;
    match fault {
        Some(Fault::Status(code)) => return failure(code, "Broken", "the API server is broken for a test"),
        Some(Fault::Silence) => std::future::pending().await,
        None => {}
    }
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if shown != Some(&format!("Bearer {OWN_TOKEN}")) {
        return failure(401, "Unauthorized", "Unauthorized");
    }
    next.run(request).await
}

async fn token_review(State(cluster): Shared, body: Bytes) -> Response {
    cluster.count("tokenreview");
    let Ok(mut question) = serde_json::from_slice::<Value>(&body) else {
        return failure(400, "BadRequest", "the body is no TokenReview");
    };
    let text = question["spec"]["token"].as_str().unwrap_or_default().to_owned();
    let audiences = question["spec"]["audiences"].as_array().into_iter().flatten();
    let audiences: Vec<String> = audiences.filter_map(|one| one.as_str().map(str::to_owned)).collect();
    question["status"] = review(&cluster.known().tokens, &text, &audiences);
    (StatusCode::CREATED, answer(&question)).into_response()
}

async fn one_pod(
    State(cluster): Shared,
    axum::extract::Path((namespace, name)): axum::extract::Path<(String, String)>,
) -> Response {
    cluster.count("pod");
    match cluster.known().pods.get(&(namespace, name.clone())) {
        Some(pod) => answer(pod).into_response(),
        None => failure(404, "NotFound", &format!("pods \"{name}\" not found")),
    }
}

async fn pods(
    State(cluster): Shared,
    axum::extract::Path(namespace): axum::extract::Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    cluster.count("pods");
    list(&cluster, Some(&namespace), &query)
}

async fn all_pods(State(cluster): Shared, Query(query): Query<BTreeMap<String, String>>) -> Response {
    if query.get("watch").is_some_and(|watch| watch == "true") {
        cluster.count("watch");
        return follow(cluster, &query);
    }
    cluster.count("list");
    list(&cluster, None, &query)
}

fn list(cluster: &Cluster, namespace: Option<&str>, query: &BTreeMap<String, String>) -> Response {
    let mut fields = Vec::new();
    for term in query.get("fieldSelector").into_iter().flat_map(|all| all.split(',')) {
        let Some((field, value)) = term.split_once('=') else {
            return failure(400, "BadRequest", &format!("invalid selector: {term:?}"));
        };
        let pointer = match field {
            "spec.nodeName" => "/spec/nodeName",
            "spec.serviceAccountName" => "/spec/serviceAccountName",
            _ => return failure(400, "BadRequest", &format!("field label not supported: {field}")),
        };
        fields.push((pointer, value));
    }
    let number = |key: &str| query.get(key).and_then(|text| text.parse::<usize>().ok());
    let (skip, limit) = (number("continue").unwrap_or(0), number("limit").unwrap_or(usize::MAX).min(PAGE));
    let known = cluster.known();
    let fits = |(key, pod): &(&(String, String), &Value)| {
        namespace.is_none_or(|namespace| key.0 == namespace)
            && fields.iter().all(|(pointer, value)| pod.pointer(pointer).and_then(Value::as_str) == Some(value))
    };
    let found: Vec<&Value> = known.pods.iter().filter(fits).map(|(_, pod)| pod).collect();
    let page: Vec<&&Value> = found.iter().skip(skip).take(limit).collect();
    let more = found.len() > skip + page.len();
    answer(&json!({
        "kind": "PodList",
        "apiVersion": "v1",
        "metadata": {
            "resourceVersion": cluster.changed.borrow().to_string(),
            "continue": if more { (skip + page.len()).to_string() } else { String::new() },
        },
        "items": page,
    }))
    .into_response()
}

/// A watch from a resource version on: a line of JSON for each change, until its time is over or the server breaks.
fn follow(cluster: Arc<Cluster>, query: &BTreeMap<String, String>) -> Response {
    let number = |key: &str| query.get(key).and_then(|text| text.parse::<u64>().ok());
    let (since, lasts) = (number("resourceVersion").unwrap_or(0), number("timeoutSeconds").unwrap_or(300));
    let end = tokio::time::Instant::now() + Duration::from_secs(lasts);
    let changed = cluster.changed.subscribe();
    let lines = stream::unfold((cluster, changed, since), move |(cluster, mut changed, since)| async move {
        loop {
            changed.mark_unchanged();
            let (broken, new) = {
                let known = cluster.known();
                let fresh = |(version, ..): &&(u64, &str, Value)| *version > since && !known.hushed;
                let new: Vec<_> = known.history.iter().filter(fresh).cloned().collect();
                (known.fault.is_some(), new)
            };
            if broken {
                return None;
            }
            if let Some((last, ..)) = new.last() {
                let last = *last;
                let text: String = new
                    .iter()
                    .map(|(_, kind, object)| format!("{}\n", json!({"type": kind, "object": object})))
                    .collect();
                return Some((Ok::<_, io::Error>(text), (cluster, changed, last)));
            }
            let changed = tokio::time::timeout_at(end, changed.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return None;
            }
        }
    });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(lines)).into_response()
}

/// A listener whose connections are TLS.
struct Encrypted {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for Encrypted {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, peer) = Listener::accept(&mut self.listener).await;
            // Who comes is the CA under test, one connection after the other.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
