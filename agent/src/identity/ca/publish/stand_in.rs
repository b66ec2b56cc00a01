//! An API server in small, over HTTP: objects with versions, conflicts, selectors and watches, as far as the CA asks for them. It
//! remembers what was asked, so that a test can hold it against the RBAC rules in `deploy/`.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use futures::stream;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

/// One request, as RBAC sees it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    pub verb: &'static str,
    pub group: String,
    pub resource: String,
    pub namespace: String,
    /// Of lists and watches: that of their field selector.
    pub name: String,
}

type Key = (String, String, String);

#[derive(Default)]
struct Objects {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// Version, kind of event, object.
    events: Vec<(u64, &'static str, Key, Value)>,
    asked: BTreeSet<Asked>,
    /// What TokenReviews say (`status`), by token.
    reviews: BTreeMap<String, Value>,
    /// Answers 500 to everything.
    broken: bool,
}

#[derive(Clone)]
struct Shared {
    objects: Arc<Mutex<Objects>>,
    changed: watch::Sender<()>,
}

pub struct ApiServer {
    shared: Shared,
    pub client: kube::Client,
    address: String,
    task: JoinHandle<()>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ApiServer {
    pub async fn start() -> Self {
        let shared = Shared { objects: Arc::default(), changed: watch::Sender::new(()) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().fallback(answer).with_state(shared.clone());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let config = kube::Config::new(address.parse().unwrap());
        Self { shared, client: kube::Client::try_from(config).unwrap(), address, task }
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.shared.objects.lock().unwrap()
    }

    pub fn break_down(&self, broken: bool) {
        self.objects().broken = broken;
    }

    /// Creates or replaces an object, as somebody else would.
    pub fn put(&self, resource: &str, namespace: &str, mut object: Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        object["metadata"]["namespace"] = json!(namespace);
        self.objects().store((resource.to_owned(), namespace.to_owned(), name), object);
        self.shared.changed.send_replace(());
    }

    /// From now on this is what a review of the token says (`status`).
    pub fn reviewed(&self, token: &str, status: Value) {
        self.objects().reviews.insert(token.to_owned(), status);
    }

    /// A kubeconfig that leads here.
    pub fn kubeconfig(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "heddle-system"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.address}}],
            "users": [{"name": "test", "user": {}}],
        })
    }

    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Value> {
        self.objects().objects.get(&(resource.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
    }

    pub fn remove(&self, resource: &str, namespace: &str, name: &str) {
        let key = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        self.objects().take(key);
        self.shared.changed.send_replace(());
    }

    pub fn asked(&self) -> BTreeSet<Asked> {
        self.objects().asked.clone()
    }
}

impl Objects {
    fn take(&mut self, key: Key) -> Value {
        self.version += 1;
        let object = self.objects.remove(&key).unwrap();
        self.events.push((self.version, "DELETED", key, object.clone()));
        object
    }

    fn store(&mut self, key: Key, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let event = if self.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        self.objects.insert(key.clone(), object.clone());
        self.events.push((self.version, event, key, object.clone()));
        object
    }
}

fn status(code: StatusCode, reason: &str) -> Response {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code.as_u16(),
    });
    (code, axum::Json(body)).into_response()
}

/// Group, resource, namespace and name of a path.
fn target(path: &str) -> (String, String, String, String) {
    let mut parts = path.trim_start_matches('/').split('/').map(str::to_owned).collect::<Vec<_>>();
    let group = if parts[0] == "apis" { parts.remove(1) } else { String::new() };
    let rest = parts.split_off(2);
    let part = |at: usize| rest.get(at).cloned().unwrap_or_default();
    if part(0) == "namespaces" && rest.len() > 2 {
        (group, part(2), part(1), part(3))
    } else {
        (group, part(0), String::new(), part(1))
    }
}

fn query(uri: &Uri) -> BTreeMap<String, String> {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let plain = |text: &str| text.replace("%3D", "=").replace("%2F", "/").replace("%2C", ",");
    pairs.map(|(key, value)| (key.to_owned(), plain(value))).collect()
}

async fn answer(State(shared): State<Shared>, method: Method, uri: Uri, body: Bytes) -> Response {
    let (group, resource, namespace, name) = target(uri.path());
    let query = query(&uri);
    let watching = query.get("watch").is_some_and(|value| value == "true" || value == "1");
    let wanted = query.get("fieldSelector").and_then(|field| field.strip_prefix("metadata.name=")).unwrap_or_default();
    let verb = match (&method, name.is_empty(), watching) {
        (&Method::GET, false, _) => "get",
        (&Method::GET, true, false) => "list",
        (&Method::GET, true, true) => "watch",
        (&Method::POST, ..) => "create",
        (&Method::PUT, ..) => "update",
        (&Method::DELETE, false, _) => "delete",
        _ => return status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
    };
    let mut objects = shared.objects.lock().unwrap();
    objects.asked.insert(Asked {
        verb,
        group,
        resource: resource.clone(),
        namespace: namespace.clone(),
        name: if name.is_empty() { wanted.to_owned() } else { name.clone() },
    });
    if objects.broken {
        return status(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
    }
    // KEY, or KEY=VALUE.
    let selector = query.get("labelSelector").cloned().unwrap_or_default();
    let wants = selector.split(',').filter(|term| !term.is_empty()).map(|term| match term.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(json!(value))),
        None => (term.to_owned(), None),
    });
    let wants: Vec<(String, Option<Value>)> = wants.collect();
    let (here, named) = (namespace.clone(), wanted.to_owned());
    let kind = resource.clone();
    let fits = move |key: &Key, object: &Value| {
        key.0 == kind
            && (here.is_empty() || key.1 == here)
            && (named.is_empty() || key.2 == named)
            && wants.iter().all(|(label, value)| {
                let there = &object["metadata"]["labels"][label];
                !there.is_null() && value.as_ref().is_none_or(|value| value == there)
            })
    };
    match verb {
        "get" => match objects.objects.get(&(resource, namespace, name)) {
            Some(object) => axum::Json(object.clone()).into_response(),
            None => status(StatusCode::NOT_FOUND, "NotFound"),
        },
        "list" => {
            let items: Vec<_> = objects
                .objects
                .iter()
                .filter(|(key, object)| fits(key, object))
                .map(|(_, object)| object.clone())
                .collect();
            let version = objects.version.to_string();
            axum::Json(
                json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items}),
            )
            .into_response()
        }
        "watch" => {
            let since: u64 = query.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or_default();
            drop(objects);
            follow(&shared, since, fits)
        }
        "create" if resource == "tokenreviews" => {
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            let text = review["spec"]["token"].as_str().unwrap().to_owned();
            review["status"] = objects.reviews.get(&text).cloned().unwrap_or(json!({"authenticated": false}));
            (StatusCode::CREATED, axum::Json(review)).into_response()
        }
        "delete" => {
            let key = (resource, namespace, name);
            let preconditions: Value = serde_json::from_slice(&body).unwrap_or_default();
            let wanted = &preconditions["preconditions"]["resourceVersion"];
            match objects.objects.get(&key) {
                None => return status(StatusCode::NOT_FOUND, "NotFound"),
                Some(there) if !wanted.is_null() && *wanted != there["metadata"]["resourceVersion"] => {
                    return status(StatusCode::CONFLICT, "Conflict");
                }
                Some(_) => {}
            }
            let gone = objects.take(key);
            drop(objects);
            shared.changed.send_replace(());
            axum::Json(gone).into_response()
        }
        "create" => {
            let object: Value = serde_json::from_slice(&body).unwrap();
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            let key = (resource, namespace.clone(), name);
            if objects.objects.contains_key(&key) {
                return status(StatusCode::CONFLICT, "AlreadyExists");
            }
            let mut object = object;
            object["metadata"]["namespace"] = json!(namespace);
            let stored = objects.store(key, object);
            drop(objects);
            shared.changed.send_replace(());
            (StatusCode::CREATED, axum::Json(stored)).into_response()
        }
        _ => {
            let object: Value = serde_json::from_slice(&body).unwrap();
            let key = (resource, namespace, name);
            let Some(there) = objects.objects.get(&key) else { return status(StatusCode::NOT_FOUND, "NotFound") };
            let version = &object["metadata"]["resourceVersion"];
            if !version.is_null() && *version != there["metadata"]["resourceVersion"] {
                return status(StatusCode::CONFLICT, "Conflict");
            }
            let stored = objects.store(key, object);
            drop(objects);
            shared.changed.send_replace(());
            axum::Json(stored).into_response()
        }
    }
}

/// Events after `since`, a JSON line each.
fn follow(shared: &Shared, since: u64, fits: impl Fn(&Key, &Value) -> bool + Send + 'static) -> Response {
    let (objects, changes) = (Arc::clone(&shared.objects), shared.changed.subscribe());
    let lines = stream::unfold((since, objects, changes, fits), |(since, objects, mut changes, fits)| async move {
        loop {
            changes.mark_unchanged();
            let next = {
                let objects = objects.lock().unwrap();
                let mut events = objects.events.iter();
                events.find(|(version, _, key, object)| *version > since && fits(key, object)).cloned()
            };
            if let Some((version, kind, _, object)) = next {
                let line = format!("{}\n", json!({"type": kind, "object": object}));
                return Some((Ok::<_, Infallible>(Bytes::from(line)), (version, objects, changes, fits)));
            }
            changes.changed().await.ok()?;
        }
    });
    Body::from_stream(lines).into_response()
}
