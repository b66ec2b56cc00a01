//! Requests: who asks, for what, and the answer.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Router,
    body::Bytes,
    extract::{Query, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    Cluster, Fault, Known, Seen,
    kinds::{Named, Target},
    patch,
    select::{self, Selection},
    store::{Key, Stored},
    tokens::review,
    watches::follow,
};

const REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

type Parameters = BTreeMap<String, String>;

pub(super) fn router(cluster: Arc<Cluster>) -> Router {
    Router::new().fallback(answer).with_state(cluster)
}

/// `metav1.Status` of a failure.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    let mut status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    if code == 429 {
        status["details"] = json!({"retryAfterSeconds": 1});
    }
    status
}

fn failure(code: u16, reason: &str, message: &str) -> Response {
    let text = status(code, reason, message).to_string();
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, written(text)).into_response();
    if code == 429 {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

fn written(text: String) -> ([(header::HeaderName, &'static str); 1], String) {
    ([(header::CONTENT_TYPE, "application/json")], text)
}

fn found(stored: &Stored) -> Response {
    written(stored.text.to_string()).into_response()
}

fn missing(target: &Target) -> Response {
    failure(404, "NotFound", &format!("{} \"{}\" not found", target.kind.plural, target.name))
}

async fn answer(
    State(cluster): State<Arc<Cluster>>,
    Query(query): Query<Parameters>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let named = Named::parse(uri.path());
    let fault = cluster.known().fault(named.map_or("", |named| named.plural));
    match fault {
        Some(Fault::Status(code)) => return failure(code, "Broken", "the API server is broken for a test"),
        Some(Fault::Silence | Fault::BlackHole) => std::future::pending().await,
        Some(Fault::Hangup) => {
            cluster.connections.drop_all();
            std::future::pending().await
        }
        None => {}
    }
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let user = shown.and_then(|shown| cluster.known().users.get(shown.strip_prefix("Bearer ")?).cloned());
    let Some(user) = user else { return failure(401, "Unauthorized", "Unauthorized") };
    let verb = named.and_then(|named| verb(&method, named, &query));
    if let (Some(named), Some(verb)) = (named, verb) {
        cluster.known().see(user, verb, named, &query);
    }
    match (uri.path(), named.and_then(Named::target)) {
        ("/version", _) => {
            written(json!({"major": "1", "minor": "34", "gitVersion": "v1.34.0"}).to_string()).into_response()
        }
        (REVIEWS, _) => token_review(&cluster.known(), &body),
        (_, Some(target)) if !cluster.known().absent.contains(target.kind.plural) => match verb {
            Some(verb) => served(&cluster, verb, &target, &query, &headers, &body),
            None => failure(405, "MethodNotAllowed", "the server does not allow this method on the requested resource"),
        },
        // As the real one answers what no handler has: no Status, and no JSON.
        _ => (StatusCode::NOT_FOUND, "404 page not found\n").into_response(),
    }
}

/// What RBAC calls a request.
fn verb(method: &Method, named: Named<'_>, query: &Parameters) -> Option<&'static str> {
    let watching = query.get("watch").is_some_and(|value| value == "true" || value == "1");
    match (method, named.name.is_empty(), watching) {
        (&Method::GET, false, _) => Some("get"),
        (&Method::GET, true, false) => Some("list"),
        (&Method::GET, true, true) => Some("watch"),
        (&Method::POST, true, _) => Some("create"),
        (&Method::PUT, false, _) => Some("update"),
        (&Method::PATCH, false, _) => Some("patch"),
        (&Method::DELETE, false, _) => Some("delete"),
        _ => None,
    }
}

impl Known {
    /// As RBAC of the real one: before anybody looks whether there is such a resource.
    fn see(&mut self, user: String, verb: &'static str, named: Named<'_>, query: &Parameters) {
        let owned = str::to_owned;
        let seen = Seen {
            user,
            verb,
            group: owned(named.group),
            resource: owned(named.plural),
            subresource: owned(named.subresource),
            namespace: owned(named.namespace),
            name: owned(if named.name.is_empty() { select::name(query) } else { named.name }),
        };
        *self.seen.entry(seen).or_default() += 1;
    }
}

fn token_review(known: &Known, body: &[u8]) -> Response {
    let Ok(mut question) = serde_json::from_slice::<Value>(body) else {
        return failure(400, "BadRequest", "the body is no TokenReview");
    };
    let text = question["spec"]["token"].as_str().unwrap_or_default().to_owned();
    let audiences = question["spec"]["audiences"].as_array().into_iter().flatten();
    let audiences: Vec<String> = audiences.filter_map(|one| one.as_str().map(str::to_owned)).collect();
    question["status"] = review(&known.tokens, &text, &audiences);
    (StatusCode::CREATED, written(question.to_string())).into_response()
}

fn served(
    cluster: &Arc<Cluster>,
    verb: &str,
    target: &Target,
    query: &Parameters,
    headers: &HeaderMap,
    body: &[u8],
) -> Response {
    let selection = match Selection::parse(target, query) {
        Ok(selection) => selection,
        Err(message) => return failure(400, "BadRequest", &message),
    };
    let mut known = cluster.known();
    let key = Key::new(target.kind, &target.namespace, &target.name);
    match verb {
        "get" => known.store.get(&key).map_or_else(|| missing(target), found),
        "list" => list(&known, target, &selection, query),
        "watch" => {
            drop(known);
            follow(Arc::clone(cluster), target, selection, query)
        }
        "delete" => {
            if let Some(field) = known.store.get(&key).and_then(|there| unmet(&there.value, body)) {
                return failure(409, "Conflict", &format!("Precondition failed: {field} is another"));
            }
            let gone = known.store.remove(&key);
            drop(known);
            cluster.tell();
            gone.map_or_else(|| missing(target), |gone| found(&gone))
        }
        verb => {
            let content = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
            let written = write(&mut known, verb, target, key, content, body);
            drop(known);
            cluster.tell();
            written
        }
    }
}

/// What the preconditions of DeleteOptions say, and is not so.
fn unmet(there: &Value, options: &[u8]) -> Option<&'static str> {
    let options: Value = serde_json::from_slice(options).unwrap_or_default();
    let other = |wanted: &Value, is: &Value| !wanted.is_null() && wanted != is;
    ["uid", "resourceVersion"]
        .into_iter()
        .find(|field| other(&options["preconditions"][field], &there["metadata"][field]))
}

/// One page. Its continue token says up to which version the list began, and the last name.
fn list(known: &Known, target: &Target, selection: &Selection, query: &Parameters) -> Response {
    let limit = query.get("limit").and_then(|text| text.parse::<usize>().ok()).filter(|limit| *limit > 0);
    let limit = limit.unwrap_or(usize::MAX).min(known.page);
    let mut version = known.store.version();
    let mut after = None;
    if let Some(token) = query.get("continue").filter(|token| !token.is_empty()) {
        let mut parts = token.splitn(3, '/');
        let began = parts.next().and_then(|text| text.parse::<u64>().ok());
        let (Some(began), Some(namespace), Some(name)) = (began, parts.next(), parts.next()) else {
            return failure(400, "BadRequest", "continue key is not valid");
        };
        if began < known.store.compacted() {
            return failure(
                410,
                "Expired",
                "The provided continue parameter is too old to display a consistent list result.",
            );
        }
        version = began;
        after = Some(Key::new(target.kind, namespace, name));
    }
    let rest = known.store.all(target.kind).filter(|(key, _)| after.as_ref().is_none_or(|after| *key > after));
    let mut fitting = rest.filter(|(key, stored)| selection.fits(key, &stored.value));
    let page: Vec<_> = fitting.by_ref().take(limit).collect();
    let more = page.last().filter(|_| fitting.next().is_some());
    let token = more.map_or_else(String::new, |(key, _)| format!("{version}/{}/{}", key.namespace, key.name));
    let metadata = json!({"resourceVersion": version.to_string(), "continue": token});
    let items: Vec<&str> = page.iter().map(|(_, stored)| &*stored.text).collect();
    written(format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[{}]}}",
        target.kind.kind,
        target.api_version(),
        items.join(","),
    ))
    .into_response()
}

/// `create`, `update` and `patch`, of an object or of its status.
fn write(known: &mut Known, verb: &str, target: &Target, key: Key, content: &str, body: &[u8]) -> Response {
    let Ok(sent) = serde_json::from_slice::<Value>(body) else {
        return failure(400, "BadRequest", "the body is no JSON");
    };
    let of_status = target.subresource == "status";
    if of_status && !target.kind.status || !of_status && !target.subresource.is_empty() {
        return missing(target);
    }
    let there = known.store.get(&key).map(|stored| Value::clone(&stored.value));
    if verb == "create" {
        return create(known, target, sent);
    }
    let apply = content.starts_with("application/apply-patch");
    let Some(there) = there else {
        return if verb == "patch" && apply && !of_status { create(known, target, sent) } else { missing(target) };
    };
    let version = &sent["metadata"]["resourceVersion"];
    if !version.is_null() && *version != there["metadata"]["resourceVersion"] {
        let message = "the object has been modified; please apply your changes to the latest version and try again";
        return failure(409, "Conflict", message);
    }
    let mut next = match verb {
        "update" => sent,
        _ => {
            let mut next = there.clone();
            match content {
                "application/merge-patch+json" => patch::merge(&mut next, &sent),
                _ if apply => patch::merge(&mut next, &sent),
                "application/json-patch+json" => {
                    if let Err(message) = patch::operations(&mut next, &sent) {
                        return failure(422, "Invalid", &message);
                    }
                }
                other => return failure(415, "UnsupportedMediaType", &format!("{other} is not supported here")),
            }
            next
        }
    };
    if of_status {
        let changed = std::mem::replace(&mut next, there.clone());
        next["status"] = changed["status"].clone();
    } else if target.kind.status && !there["status"].is_null() {
        next["status"] = there["status"].clone();
    }
    next["metadata"]["resourceVersion"] = there["metadata"]["resourceVersion"].clone();
    next["metadata"]["generation"] = there["metadata"]["generation"].clone();
    if next == there {
        // As the real one: what changes nothing is no change.
        return written(there.to_string()).into_response();
    }
    found(&known.store.put(key, next))
}

fn create(known: &mut Known, target: &Target, mut object: Value) -> Response {
    let mut name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    if name.is_empty() {
        let Some(prefix) = object["metadata"]["generateName"].as_str() else {
            return failure(422, "Invalid", "metadata.name: Required value: name or generateName is required");
        };
        name = format!("{prefix}{}", known.store.version());
        object["metadata"]["name"] = json!(name);
    }
    if target.kind.namespaced {
        object["metadata"]["namespace"] = json!(target.namespace);
    }
    object["apiVersion"] = json!(target.api_version());
    object["kind"] = json!(target.kind.kind);
    let key = Key::new(target.kind, &target.namespace, &name);
    if known.store.get(&key).is_some() {
        return failure(409, "AlreadyExists", &format!("{} \"{name}\" already exists", target.kind.plural));
    }
    let stored = known.store.put(key, object);
    (StatusCode::CREATED, written(stored.text.to_string())).into_response()
}
