//! Which objects a list or watch is about: namespace, field selector and label selector.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{kinds::Target, store::Key};

/// What a request asks for.
#[derive(Debug, Clone)]
pub struct Selection {
    namespace: String,
    /// JSON pointer and value.
    fields: Vec<(&'static str, String)>,
    labels: Vec<Label>,
}

#[derive(Debug, Clone)]
enum Label {
    Has(String),
    HasNot(String),
    Is(String, String),
    IsNot(String, String),
}

/// The one name that is asked for, where it is one: what RBAC compares with `resourceNames`.
pub fn name(query: &BTreeMap<String, String>) -> &str {
    let mut terms = query.get("fieldSelector").map_or("", String::as_str).split(',');
    terms.find_map(|term| term.strip_prefix("metadata.name=")).unwrap_or_default().trim_start_matches('=')
}

impl Selection {
    /// # Errors
    /// What can't be selected by, in the API server's words.
    pub fn parse(target: &Target, query: &BTreeMap<String, String>) -> Result<Self, String> {
        let terms = |key: &str| {
            let text = query.get(key).cloned().unwrap_or_default();
            text.split(',').filter(|term| !term.is_empty()).map(str::to_owned).collect::<Vec<_>>()
        };
        let mut fields = Vec::new();
        for term in terms("fieldSelector") {
            let Some((field, value)) = term.split_once('=') else {
                return Err(format!("invalid selector: {term:?}"));
            };
            let pointer = match (target.kind.plural, field) {
                (_, "metadata.name") => "/metadata/name",
                (_, "metadata.namespace") => "/metadata/namespace",
                ("pods", "spec.nodeName") => "/spec/nodeName",
                ("pods", "spec.serviceAccountName") => "/spec/serviceAccountName",
                ("pods", "status.phase") => "/status/phase",
                _ => return Err(format!("field label not supported: {field}")),
            };
            fields.push((pointer, value.trim_start_matches('=').to_owned()));
        }
        let owned = str::to_owned;
        let label = |term: String| {
            if let Some((key, value)) = term.split_once("!=") {
                Label::IsNot(owned(key), owned(value))
            } else if let Some((key, value)) = term.split_once('=') {
                Label::Is(owned(key), owned(value.trim_start_matches('=')))
            } else if let Some(key) = term.strip_prefix('!') {
                Label::HasNot(owned(key))
            } else {
                Label::Has(term)
            }
        };
        let labels = terms("labelSelector").into_iter().map(label).collect();
        Ok(Self { namespace: target.namespace.clone(), fields, labels })
    }

    pub fn fits(&self, key: &Key, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        (self.namespace.is_empty() || self.namespace == key.namespace)
            && self.fields.iter().all(|(pointer, value)| object.pointer(pointer).and_then(Value::as_str) == Some(value))
            && self.labels.iter().all(|wanted| match wanted {
                Label::Has(key) => label(key).is_some(),
                Label::HasNot(key) => label(key).is_none(),
                Label::Is(key, value) => label(key) == Some(value),
                Label::IsNot(key, value) => label(key) != Some(value),
            })
    }
}
