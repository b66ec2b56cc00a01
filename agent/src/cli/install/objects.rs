//! The Kubernetes objects that heddle consists of, each of its own type. What a type does not know is an error, never lost.

use anyhow::{Context, bail, ensure};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        core::v1::{ConfigMap, Namespace, ResourceQuota, Secret, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

macro_rules! objects {
    ($($kind:ident),*) => {
        /// One object.
        #[derive(Debug, Clone, PartialEq)]
        pub(in crate::cli) enum Object {
            $($kind(Box<$kind>)),*
        }

        impl Object {
            /// # Errors
            /// A kind that is none of these, a value that does not fit its type, a field that the type does not have.
            pub fn read(value: &Value) -> anyhow::Result<Self> {
                let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default();
                let (version, kind) = (text("apiVersion"), text("kind"));
                $(if (version, kind) == (<$kind as k8s_openapi::Resource>::API_VERSION, <$kind as k8s_openapi::Resource>::KIND) {
                    return Ok(Self::$kind(Box::new(strictly(value)?)));
                })*
                bail!("{version} {kind} is no kind that heddle consists of")
            }

            pub fn metadata(&self) -> &ObjectMeta {
                match self { $(Self::$kind(object) => &object.metadata),* }
            }

            pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
                match self { $(Self::$kind(object) => &mut object.metadata),* }
            }

            pub fn kind(&self) -> &'static str {
                match self { $(Self::$kind(_) => <$kind as k8s_openapi::Resource>::KIND),* }
            }

            /// # Errors
            /// Never in practice: only where the type could not be written.
            pub fn value(&self) -> anyhow::Result<Value> {
                match self { $(Self::$kind(object) => Ok(serde_json::to_value(object)?)),* }
            }
        }

        $(impl From<$kind> for Object {
            fn from(object: $kind) -> Self {
                Self::$kind(Box::new(object))
            }
        })*
    };
}

objects!(
    Namespace,
    ResourceQuota,
    ServiceAccount,
    ConfigMap,
    Secret,
    Role,
    RoleBinding,
    ClusterRole,
    ClusterRoleBinding,
    CustomResourceDefinition,
    NetworkPolicy,
    Service,
    PodDisruptionBudget,
    Deployment,
    DaemonSet
);

impl Object {
    /// `Kind name`, for messages.
    pub fn described(&self) -> String {
        format!("{} {}", self.kind(), self.metadata().name.as_deref().unwrap_or_default())
    }
}

/// Every document of a text of YAML.
///
/// # Errors
/// The object and field that is none of Kubernetes' API.
pub(in crate::cli) fn parse(text: &str) -> anyhow::Result<Vec<Object>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    documents.iter().filter(|document| !document.is_null()).map(Object::read).collect()
}

/// The same way back, document by document.
///
/// # Errors
/// Never in practice.
pub(in crate::cli) fn yaml(objects: &[Object]) -> anyhow::Result<String> {
    let mut text = String::new();
    for object in objects {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(&object.value()?).with_context(|| object.described())?);
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    Ok(text)
}

/// Reads a value as `T`, and that every field of it went in: the API's types pass over what they don't know.
pub(in crate::cli) fn strictly<T: Serialize + DeserializeOwned>(value: &Value) -> anyhow::Result<T> {
    let name = || {
        let kind = value.get("kind").and_then(Value::as_str).unwrap_or_default();
        let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
        format!("{kind} {name}")
    };
    let object: T = serde_path_to_error::deserialize(value).with_context(name)?;
    let lost = lost(value, &serde_json::to_value(&object)?, &mut String::new());
    ensure!(lost.is_none(), "{}: unknown field {}", name(), lost.unwrap_or_default());
    Ok(object)
}

/// The first field of `value` that `kept` has not, or has otherwise.
fn lost(value: &Value, kept: &Value, path: &mut String) -> Option<String> {
    let inside = |key: &str, value: &Value, kept: Option<&Value>, path: &mut String| {
        let length = path.len();
        path.push_str(key);
        let found = match kept {
            Some(kept) => lost(value, kept, path),
            None => Some(path.clone()),
        };
        path.truncate(length);
        found
    };
    match (value, kept) {
        (Value::Object(fields), Value::Object(kept)) => {
            fields.iter().find_map(|(key, value)| inside(&format!(".{key}"), value, kept.get(key), path))
        }
        (Value::Array(items), Value::Array(kept)) => {
            let items = items.iter().enumerate();
            items.into_iter().find_map(|(index, value)| inside(&format!("[{index}]"), value, kept.get(index), path))
        }
        (value, kept) => (value != kept).then(|| path.clone()),
    }
}
