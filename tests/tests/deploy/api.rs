//! The Kubernetes API as far as manifests need it: its types, strictly, and what `kubectl` asks of a server before it believes
//! that a kind exists.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context, bail, ensure};
use axum::{Json, Router, extract::State, http::StatusCode, http::Uri};
use heddle_lab::Result;
use k8s_openapi::{
    api::{apps::v1 as apps, core::v1 as core, networking::v1 as networking, policy::v1 as policy, rbac::v1 as rbac},
    apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

macro_rules! kinds {
    ($object:expr, $($kind:ty),*) => {
        $(if is::<$kind>($object) {
            return kept::<$kind>($object);
        })*
    };
}

/// Reads an object as its type, and that no field of it was passed over.
pub fn strictly(object: &Value) -> Result {
    kinds!(
        object,
        core::Namespace,
        core::ResourceQuota,
        core::ServiceAccount,
        core::ConfigMap,
        core::Service,
        rbac::Role,
        rbac::RoleBinding,
        rbac::ClusterRole,
        rbac::ClusterRoleBinding,
        networking::NetworkPolicy,
        policy::PodDisruptionBudget,
        apps::Deployment,
        apps::DaemonSet,
        apiextensions::CustomResourceDefinition
    );
    match (text(object, "/apiVersion"), text(object, "/kind")) {
        ("monitoring.coreos.com/v1", "PodMonitor" | "ServiceMonitor") => kept::<Others<Monitor>>(object),
        ("cert-manager.io/v1", "Certificate") => kept::<Others<Certificate>>(object),
        // heddle's own reader is stricter than any type: `policy::tests` reads these files.
        ("security.istio.io/v1", "AuthorizationPolicy" | "PeerAuthentication") => Ok(()),
        (version, kind) => bail!("{version} {kind} is no kind that deploy/ should have"),
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn is<T: k8s_openapi::Resource>(object: &Value) -> bool {
    text(object, "/apiVersion") == T::API_VERSION && text(object, "/kind") == T::KIND
}

/// What goes in must come out.
fn kept<T: Serialize + DeserializeOwned>(object: &Value) -> Result {
    let name = || format!("{} {}", text(object, "/kind"), text(object, "/metadata/name"));
    let typed: T = serde_json::from_value(object.clone()).with_context(name)?;
    let again = serde_json::to_value(typed)?;
    let mut lost = Vec::new();
    compare(object, &again, "", &mut lost);
    ensure!(lost.is_empty(), "{}: not of the API: {}", name(), lost.join(", "));
    Ok(())
}

fn compare(object: &Value, again: &Value, path: &str, lost: &mut Vec<String>) {
    match (object, again) {
        (Value::Object(fields), Value::Object(kept)) => {
            for (key, value) in fields {
                compare(value, kept.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}"), lost);
            }
        }
        (Value::Array(items), Value::Array(kept)) => {
            for (index, value) in items.iter().enumerate() {
                compare(value, kept.get(index).unwrap_or(&Value::Null), &format!("{path}[{index}]"), lost);
            }
        }
        (object, again) if object != again => lost.push(path.to_owned()),
        _ => {}
    }
}

/// An object of an operator that has no Rust types, with the fields that `deploy/` uses: others are misspelt.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Others<S> {
    api_version: String,
    kind: String,
    metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
    spec: S,
}

/// `PodMonitor` and `ServiceMonitor` of the Prometheus operator.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Monitor {
    selector: k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_metrics_endpoints: Option<Vec<Endpoint>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoints: Option<Vec<Endpoint>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Endpoint {
    port: String,
    path: String,
    interval: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    honor_labels: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    relabelings: Option<Vec<Relabeling>>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Relabeling {
    source_labels: Vec<String>,
    target_label: String,
}

/// `Certificate` of cert-manager.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Certificate {
    #[serde(rename = "isCA")]
    is_ca: bool,
    common_name: String,
    secret_name: String,
    duration: String,
    renew_before: String,
    private_key: BTreeMap<String, Value>,
    usages: Vec<String>,
    issuer_ref: BTreeMap<String, String>,
}

/// A server that knows which kinds there are, and has no object of any.
pub struct Discovery {
    _runtime: tokio::runtime::Runtime,
    address: SocketAddr,
}

/// Group and version, with its kinds: plural, kind, whether it is in a namespace.
type Kinds = BTreeMap<String, Vec<(&'static str, &'static str, bool)>>;

impl Discovery {
    pub fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let router = Router::new().fallback(answer).with_state(known());
        runtime.spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                eprintln!("the discovery server ended: {error}");
            }
        });
        Ok(Self { _runtime: runtime, address })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn known() -> Kinds {
    [
        (
            "v1",
            vec![
                ("namespaces", "Namespace", false),
                ("resourcequotas", "ResourceQuota", true),
                ("serviceaccounts", "ServiceAccount", true),
                ("services", "Service", true),
            ],
        ),
        ("apps/v1", vec![("deployments", "Deployment", true), ("daemonsets", "DaemonSet", true)]),
        (
            "rbac.authorization.k8s.io/v1",
            vec![
                ("roles", "Role", true),
                ("rolebindings", "RoleBinding", true),
                ("clusterroles", "ClusterRole", false),
                ("clusterrolebindings", "ClusterRoleBinding", false),
            ],
        ),
        ("policy/v1", vec![("poddisruptionbudgets", "PodDisruptionBudget", true)]),
        ("networking.k8s.io/v1", vec![("networkpolicies", "NetworkPolicy", true)]),
        ("apiextensions.k8s.io/v1", vec![("customresourcedefinitions", "CustomResourceDefinition", false)]),
    ]
    .into_iter()
    .map(|(group, kinds)| (group.to_owned(), kinds))
    .collect()
}

async fn answer(State(kinds): State<Kinds>, uri: Uri) -> (StatusCode, Json<Value>) {
    let path = uri.path().trim_end_matches('/');
    let group = path.strip_prefix("/apis/").or_else(|| path.strip_prefix("/api/")).unwrap_or_default();
    let found = match path {
        "/api" => Some(json!({"kind": "APIVersions", "versions": ["v1"]})),
        "/apis" => {
            let groups = kinds.keys().filter_map(|key| Some((key, key.split_once('/')?)));
            let groups = groups.map(|(key, (name, version))| {
                let version = json!({"groupVersion": key, "version": version});
                json!({"name": name, "versions": [version], "preferredVersion": version})
            });
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups.collect::<Vec<_>>()}))
        }
        _ => kinds.get(group).map(|kinds| {
            let resources = kinds.iter().map(|(name, kind, namespaced)| {
                let verbs = ["create", "delete", "get", "list", "patch"];
                json!({"name": name, "kind": kind, "namespaced": namespaced, "singularName": "", "verbs": verbs})
            });
            let resources: Vec<Value> = resources.collect();
            json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources})
        }),
    };
    match found {
        Some(found) => (StatusCode::OK, Json(found)),
        None => {
            let status =
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404});
            (StatusCode::NOT_FOUND, Json(status))
        }
    }
}
