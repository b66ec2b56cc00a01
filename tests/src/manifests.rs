//! The cluster as a directory of Kubernetes manifests: one YAML file per object, replaced by rename so that an agent
//! never reads half of one.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::kubernetes::Kubernetes;

/// The directory that every agent of a lab watches.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// Beside it, on the same file system: files are written here first.
    staging: PathBuf,
    /// The API server that has the same objects, where agents follow one.
    kubernetes: Option<Arc<Kubernetes>>,
}

impl Manifests {
    pub fn create(lab: &Path) -> Result<Self> {
        let manifests = Self { dir: lab.join("manifests"), staging: lab.join("staging"), kubernetes: None };
        fs::create_dir_all(&manifests.dir)?;
        fs::create_dir_all(&manifests.staging)?;
        Ok(manifests)
    }

    /// Has an API server serve the same objects from now on.
    pub(crate) fn serve(&mut self, kubernetes: Arc<Kubernetes>) {
        self.kubernetes = Some(kubernetes);
    }

    #[must_use]
    pub fn kubernetes(&self) -> Option<&Kubernetes> {
        self.kubernetes.as_deref()
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes or replaces an object.
    pub fn apply(&self, object: &Value) -> Result<()> {
        if let Some(kubernetes) = &self.kubernetes {
            kubernetes.api().put(object.clone());
        }
        let yaml = serde_saphyr::to_string(object).context("writing YAML")?;
        self.put(&file_name(object)?, &yaml)
    }

    /// Writes a file as it is, for manifests that are not right.
    pub fn put(&self, name: &str, text: &str) -> Result<()> {
        let staged = self.staging.join(name);
        fs::write(&staged, text)?;
        fs::rename(&staged, self.dir.join(name)).with_context(|| format!("placing {name}"))
    }

    pub fn delete(&self, object: &Value) -> Result<()> {
        if let Some(kubernetes) = &self.kubernetes {
            kubernetes.api().remove_object(object);
        }
        let name = file_name(object)?;
        fs::remove_file(self.dir.join(&name)).with_context(|| format!("removing {name}"))
    }
}

fn file_name(object: &Value) -> Result<String> {
    let kind = object["kind"].as_str().context("object without kind")?.to_lowercase();
    let name = object["metadata"]["name"].as_str().context("object without name")?;
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{kind}-{namespace}-{name}.yaml"),
        None => format!("{kind}-{name}.yaml"),
    })
}

#[must_use]
pub fn namespace(name: &str, meshed: bool) -> Value {
    let labels = if meshed { json!({"heddle.dev/mesh": "enabled"}) } else { json!({}) };
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

#[must_use]
pub fn node(name: &str, addresses: &[IpAddr]) -> Value {
    let addresses: Vec<Value> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": format!("zone-{name}")}},
        "status": {"addresses": addresses},
    })
}

/// `AuthorizationPolicy` with this spec.
#[must_use]
pub fn authorization_policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    })
}

/// `PeerAuthentication` with this spec.
#[must_use]
pub fn peer_authentication(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    })
}
