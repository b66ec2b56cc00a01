//! The text of one manifest file → typed objects, or errors that name object and field.
//!
//! Pure. An AuthorizationPolicy or PeerAuthentication that can't be read as its kind is never dropped: it is carried as an
//! [`InvalidPolicy`], which denies. What may have been a policy and can't be read as any object leaves a gap, with as much of
//! its namespace as can be trusted. Kinds that heddle has no use for are passed over.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    InvalidPolicy, ManifestError, Objects, PolicyKind,
    kinds::{AuthorizationPolicy, PeerAuthentication},
};
use crate::life::limits;

/// Annotation of a policy that is only to be rehearsed.
const DRY_RUN: &str = "istio.io/dry-run";
const POLICY_GROUP: &str = "security.istio.io";
/// The kind of that group which is about HTTP alone: it decides nothing here.
const REQUEST_AUTHENTICATION: &str = "RequestAuthentication";
/// Namespace of a namespaced object that names none, as `kubectl apply` has it.
const DEFAULT_NAMESPACE: &str = "default";

/// What a file holds.
#[derive(Debug, Default)]
pub struct Manifest {
    /// Everything that could be read.
    pub objects: Objects,
    /// Why the file is malformed; empty for a good one.
    pub errors: Vec<ManifestError>,
    /// Policies that are carried as invalid. They don't make the file malformed.
    pub invalid: Vec<ManifestError>,
    /// Parts that may have been policies: the namespace that each names, `None` where nobody can say.
    pub gaps: Vec<Option<Arc<str>>>,
    /// Where each policy stands, the invalid ones too.
    pub policies: Vec<Found>,
    /// Objects that are called like a policy of ours and are of another API.
    pub foreign: Vec<Found>,
    /// The document that is being read ends with a whole line, so that its last word is no half of one.
    whole: bool,
}

/// An object of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Line (from 1) on which its document starts.
    pub line: u64,
    pub kind: PolicyKind,
    /// `namespace/name`.
    pub name: String,
    pub api_version: String,
}

/// Reads YAML (of which JSON is a part), any number of documents, `List` kinds flattened.
pub fn read(text: &str) -> Manifest {
    let mut manifest = Manifest::default();
    let documents = documents(text);
    let last = documents.len().saturating_sub(1);
    for (at, (line, document)) in documents.into_iter().enumerate() {
        manifest.whole = document.ends_with('\n');
        match parse(document) {
            Ok(values) => {
                for value in values {
                    manifest.add(line, value, 0);
                }
            }
            Err((inner, message)) => {
                manifest.errors.push(ManifestError::Syntax { line: line + inner.saturating_sub(1), message });
                // The last document may be the torn one of a file that goes on.
                let outline = Outline::of(document);
                if at == last || outline.may_be_policy() {
                    manifest.gaps.push(outline.namespace.map(Arc::from));
                }
            }
        }
    }
    manifest
}

/// The documents of a YAML stream with the line (from 1) that each starts on. A `---` at the start of a line divides
/// documents wherever it stands (YAML 1.2.2 §9.1.2 forbids it inside scalars), so one malformed document costs no other.
fn documents(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let marker =
            line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker && offset > start {
            documents.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number);
        }
        offset += line.len();
    }
    documents.push((start_line, &text[start..]));
    // What stands before the first marker may be comments and directives only.
    let says_something = |text: &str| text.lines().any(|line| !line.trim().is_empty() && !line.starts_with(['#', '%']));
    documents.retain(|(_, document)| says_something(document));
    documents
}

fn parse(document: &str) -> Result<Vec<Value>, (u64, String)> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: limits::MANIFEST_DEPTH,
            max_nodes: limits::MANIFEST_NODES,
            max_events: 2 * limits::MANIFEST_NODES,
        },
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options(document, options)
        .map_err(|error| (error.location().map_or(1, |location| location.line()), error.to_string()))
}

impl Manifest {
    /// Takes one object, or those of a list.
    fn add(&mut self, line: u64, value: Value, depth: usize) {
        let Value::Object(mut object) = value else {
            self.gaps.push(None);
            return self.refuse(line, "document", "", "is no object: a manifest has apiVersion, kind and metadata");
        };
        let text =
            |object: &Map<String, Value>, key| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (api_version, kind) = (text(&object, "apiVersion"), text(&object, "kind"));
        if api_version.is_empty() || kind.is_empty() {
            let field = if kind.is_empty() { "kind" } else { "apiVersion" };
            self.lose(&object);
            return self.refuse(line, &described(&kind, &object), field, "is missing, or no text");
        }
        if let (Some(item_kind), true) = (kind.strip_suffix("List"), object.contains_key("items")) {
            return self.add_items(line, &api_version, item_kind, object.remove("items"), depth);
        }
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let named = match kind.as_str() {
            "AuthorizationPolicy" => Some(PolicyKind::AuthorizationPolicy),
            "PeerAuthentication" => Some(PolicyKind::PeerAuthentication),
            _ => None,
        };
        if group.is_empty() && named.is_some() {
            self.lose(&object);
            let fix = "is of no group: write security.istio.io/v1";
            return self.refuse(line, &described(&kind, &object), "apiVersion", fix);
        }
        if group == POLICY_GROUP && named.is_none() && kind != REQUEST_AUTHENTICATION {
            self.lose(&object);
            let fix = "is no kind of security.istio.io: AuthorizationPolicy and PeerAuthentication are";
            return self.refuse(line, &described(&kind, &object), "kind", fix);
        }
        let policy = named.filter(|_| group == POLICY_GROUP);
        let known_version = match policy {
            Some(_) => matches!(version, "v1" | "v1beta1"),
            None => version == "v1",
        };
        let known_kind = matches!(
            (group, kind.as_str()),
            ("", "Namespace" | "Node" | "Pod" | "Service") | ("discovery.k8s.io", "EndpointSlice")
        );
        if policy.is_none() && !known_kind {
            tracing::debug!(object = described(&kind, &object), api_version, "Kind is of no use here, passed over");
            if let Some(kind) = named {
                self.foreign.push(found(line, kind, &object, &api_version));
            }
            return;
        }
        let cluster_scoped = matches!(kind.as_str(), "Namespace" | "Node");
        if let Err((field, message)) = settle_names(&mut object, cluster_scoped) {
            if policy.is_some() {
                self.lose(&object);
            }
            return self.refuse(line, &described(&kind, &object), field, message);
        }
        self.policies.extend(policy.map(|policy| found(line, policy, &object, &api_version)));
        match policy {
            Some(policy) if !known_version => {
                self.carry(
                    line,
                    policy,
                    &object,
                    "apiVersion".into(),
                    format!("{api_version} is not known: v1 and v1beta1 are"),
                );
            }
            Some(policy) => self.add_policy(line, policy, object),
            None if !known_version => {
                self.refuse(line, &described(&kind, &object), "apiVersion", "is not known: v1 is")
            }
            None => self.add_object(line, &kind, object),
        }
    }

    fn add_items(&mut self, line: u64, api_version: &str, item_kind: &str, items: Option<Value>, depth: usize) {
        let Some(Value::Array(items)) = items.filter(|_| depth < limits::MANIFEST_LISTS) else {
            if may_be_policy(item_kind) {
                self.gaps.push(None);
            }
            return self.refuse(line, &format!("{item_kind}List"), "items", "is no list, or lists are nested too deep");
        };
        for mut item in items {
            // Items of `List` name their kind; those of `PodList` and its like leave it to the list.
            if let (Value::Object(object), false) = (&mut item, item_kind.is_empty()) {
                object.entry("kind").or_insert_with(|| item_kind.into());
                object.entry("apiVersion").or_insert_with(|| api_version.into());
            }
            self.add(line, item, depth + 1);
        }
    }

    fn add_object(&mut self, line: u64, kind: &str, object: Map<String, Value>) {
        let name = described(kind, &object);
        let objects = &mut self.objects;
        let result = match kind {
            "Namespace" => typed::<Namespace>(object).map(|found| objects.namespaces.push(found.into())),
            "Node" => typed::<Node>(object).map(|found| objects.nodes.push(found.into())),
            "Pod" => typed(object).and_then(checked_pod).map(|found| objects.pods.push(found.into())),
            "Service" => typed(object).and_then(checked_service).map(|found| objects.services.push(found.into())),
            _ => typed(object).and_then(checked_slice).map(|found| objects.endpoint_slices.push(found.into())),
        };
        if let Err((field, message)) = result {
            self.refuse(line, &name, &field, &message);
        }
    }

    fn add_policy(&mut self, line: u64, kind: PolicyKind, object: Map<String, Value>) {
        match policy(kind, object) {
            Policy::Authorization(policy) => self.objects.authorization_policies.push(policy),
            Policy::Peer(policy) => self.objects.peer_authentications.push(policy),
            Policy::Invalid(policy) => self.add_invalid(line, policy),
        }
    }

    /// Keeps a policy that is not readable as its kind, by what is readable of it.
    fn carry(&mut self, line: u64, kind: PolicyKind, object: &Map<String, Value>, field: String, message: String) {
        self.add_invalid(line, Arc::new(unreadable(kind, object, field, message)));
    }

    fn add_invalid(&mut self, line: u64, policy: Arc<InvalidPolicy>) {
        self.invalid.push(ManifestError::Policy {
            line,
            object: policy.object(),
            field: policy.field.clone(),
            message: policy.message.clone(),
        });
        self.objects.invalid_policies.push(policy);
    }

    /// Notes that an object which may have been a policy is lost.
    fn lose(&mut self, object: &Map<String, Value>) {
        let namespace = object.get("metadata").and_then(|metadata| metadata.get("namespace")).and_then(Value::as_str);
        let trusted = namespace.filter(|name| self.whole && kubernetes_name(name));
        self.gaps.push(trusted.map(Arc::from));
    }

    fn refuse(&mut self, line: u64, object: &str, field: &str, message: &str) {
        self.errors.push(ManifestError::Object {
            line,
            object: object.into(),
            field: field.into(),
            message: message.into(),
        });
    }
}

/// A policy as it could be read.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Policy {
    Authorization(Arc<AuthorizationPolicy>),
    Peer(Arc<PeerAuthentication>),
    Invalid(Arc<InvalidPolicy>),
}

/// Reads a policy strictly: a field that its kind does not have, or of another type, makes it invalid and never loses it.
pub(super) fn policy(kind: PolicyKind, mut object: Map<String, Value>) -> Policy {
    const TOP: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
    let invalid = |object: &Map<String, Value>, field: String, message: String| {
        Policy::Invalid(Arc::new(unreadable(kind, object, field, message)))
    };
    if let Some(unknown) = object.keys().find(|key| !TOP.contains(&key.as_str())) {
        return invalid(&object, unknown.clone(), "is not a field of this kind".into());
    }
    // As the API server has it: a policy without a spec is one with an empty spec.
    if object.get("spec").is_none_or(Value::is_null) {
        object.insert("spec".into(), Value::Object(Map::new()));
    }
    // Not read, and allowed to be anything.
    object.remove("status");
    if let Some(field) = object.get("spec").and_then(|spec| list_for_object("spec", spec)) {
        return invalid(&object, field, "is a list where an object is expected".into());
    }
    let result = match kind {
        PolicyKind::AuthorizationPolicy => typed(object.clone()).map(|policy| Policy::Authorization(Arc::new(policy))),
        PolicyKind::PeerAuthentication => typed(object.clone()).map(|policy| Policy::Peer(Arc::new(policy))),
    };
    result.unwrap_or_else(|(field, message)| invalid(&object, field, message))
}

/// What is kept of a policy that is not readable as its kind.
fn unreadable(kind: PolicyKind, object: &Map<String, Value>, field: String, message: String) -> InvalidPolicy {
    let metadata = |key| object.get("metadata").and_then(|metadata| metadata.get(key));
    let spec = |key| object.get("spec").and_then(|spec| spec.get(key));
    let name = |key| Arc::from(metadata(key).and_then(Value::as_str).unwrap_or_default());
    let selector =
        spec("selector").and_then(|selector| serde_json::from_value(selector.get("matchLabels")?.clone()).ok());
    let dry_run = metadata("annotations").and_then(|annotations| annotations.get(DRY_RUN)?.as_str()) == Some("true");
    // For a gateway or waypoint, which heddle has none of.
    let elsewhere = spec("selector").is_none()
        && (spec("targetRef").is_some_and(Value::is_object)
            || spec("targetRefs").and_then(Value::as_array).is_some_and(|targets| !targets.is_empty()));
    InvalidPolicy {
        kind,
        namespace: name("namespace"),
        name: name("name"),
        selector,
        field,
        message,
        decides: !dry_run && !elsewhere,
    }
}

/// Whether an object of this kind, or of a list of it, may hold policies.
fn may_be_policy(kind: &str) -> bool {
    matches!(kind.strip_suffix("List").unwrap_or(kind), "" | "AuthorizationPolicy" | "PeerAuthentication")
}

/// What the lines of a document that is no YAML still say, where they are in the usual block style.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outline<'a> {
    kinds: Vec<&'a str>,
    /// The one `metadata.namespace`.
    namespace: Option<&'a str>,
}

impl<'a> Outline<'a> {
    fn of(document: &'a str) -> Self {
        let mut outline = Self::default();
        let (mut in_metadata, mut indent, mut clash) = (false, None, false);
        // A last line without its end may be half of one.
        for line in document.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let text = line.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let depth = line.len() - line.trim_start().len();
            if depth == 0 {
                (in_metadata, indent) = (text == "metadata:", None);
                outline.kinds.extend(scalar(text, "kind"));
            } else if in_metadata
                && *indent.get_or_insert(depth) == depth
                && let Some(namespace) = scalar(text, "namespace")
            {
                clash |= outline.namespace.is_some_and(|other| other != namespace) || !kubernetes_name(namespace);
                outline.namespace = Some(namespace);
            }
        }
        // A list has objects of many namespaces.
        if clash || outline.kinds.iter().any(|kind| kind.ends_with("List")) {
            outline.namespace = None;
        }
        outline
    }

    fn may_be_policy(&self) -> bool {
        self.kinds.is_empty() || self.kinds.iter().any(|kind| may_be_policy(kind))
    }
}

/// The value of `key: value` on a line.
fn scalar<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let value = line.strip_prefix(key)?.strip_prefix(':')?;
    let value = value.split_once(" #").map_or(value, |(value, _)| value).trim();
    Some(value.trim_matches(['"', '\'']))
}

fn found(line: u64, kind: PolicyKind, object: &Map<String, Value>, api_version: &str) -> Found {
    let metadata = |key| object.get("metadata").and_then(|metadata| metadata.get(key)).and_then(Value::as_str);
    let name = format!("{}/{}", metadata("namespace").unwrap_or(DEFAULT_NAMESPACE), metadata("name").unwrap_or("?"));
    Found { line, kind, name, api_version: api_version.into() }
}

/// `Kind namespace/name`, as far as readable.
fn described(kind: &str, object: &Map<String, Value>) -> String {
    let metadata = |key| object.get("metadata").and_then(|metadata| metadata.get(key)).and_then(Value::as_str);
    let kind = if kind.is_empty() { "object" } else { kind };
    match (metadata("namespace"), metadata("name")) {
        (Some(namespace), name) => format!("{kind} {namespace}/{}", name.unwrap_or("?")),
        (None, Some(name)) => format!("{kind} {name}"),
        (None, None) => format!("{kind} without a name"),
    }
}

/// Path of a field, and what is wrong with it.
pub(super) type Fault = (String, String);

/// Path of a list that stands where a policy has an object: serde would take its items for the fields, by position.
fn list_for_object(path: &str, value: &Value) -> Option<String> {
    /// Fields of the policy kinds that are objects; those of `portLevelMtls` are named for ports.
    const OBJECTS: [&str; 6] = ["selector", "targetRef", "provider", "source", "operation", "mtls"];
    let in_object = |(key, value): (&String, &Value)| {
        let path = format!("{path}.{key}");
        let is_port = key.bytes().all(|b| b.is_ascii_digit());
        let misplaced = value.is_array() && (OBJECTS.contains(&key.as_str()) || is_port);
        if misplaced { Some(path) } else { list_for_object(&path, value) }
    };
    match value {
        Value::Object(object) => object.iter().find_map(in_object),
        Value::Array(_) if path == "spec" => Some(path.into()),
        // No list of these kinds holds lists.
        Value::Array(items) => items.iter().enumerate().find_map(|(index, item)| {
            let path = format!("{path}[{index}]");
            if item.is_array() { Some(path) } else { list_for_object(&path, item) }
        }),
        _ => None,
    }
}

/// Reads one object as its type; a failure names the field's path.
fn typed<T: DeserializeOwned>(object: Map<String, Value>) -> Result<T, Fault> {
    serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
        let path = error.path().to_string();
        (path, error.into_inner().to_string())
    })
}

/// Makes sure of `metadata.name`, and of `metadata.namespace`: `default` where a namespaced object has none, none where
/// the kind has no namespace.
fn settle_names(object: &mut Map<String, Value>, cluster_scoped: bool) -> Result<(), (&'static str, &'static str)> {
    const NAME: &str = "is missing, or no Kubernetes name (a-z, 0-9, '-', '.', at most 253)";
    let Some(Value::Object(metadata)) = object.get_mut("metadata") else {
        return Err(("metadata", "is missing, or no object"));
    };
    if !metadata.get("name").and_then(Value::as_str).is_some_and(kubernetes_name) {
        return Err(("metadata.name", NAME));
    }
    if cluster_scoped {
        metadata.remove("namespace");
        return Ok(());
    }
    if metadata.get("namespace").is_none_or(|namespace| namespace.is_null() || namespace == "") {
        metadata.insert("namespace".into(), DEFAULT_NAMESPACE.into());
    }
    if !metadata.get("namespace").and_then(Value::as_str).is_some_and(kubernetes_name) {
        return Err(("metadata.namespace", NAME));
    }
    Ok(())
}

/// An RFC 1123 subdomain: what the API server lets objects be called, so that a name is safe in paths and SPIFFE ids.
fn kubernetes_name(name: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |label: &str| {
        let bytes = label.as_bytes();
        bytes.first().copied().is_some_and(alphanumeric)
            && bytes.last().copied().is_some_and(alphanumeric)
            && bytes.iter().all(|b| alphanumeric(*b) || *b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn is_address(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok()
}

pub(super) fn checked_pod(pod: Pod) -> Result<Pod, Fault> {
    if let Some(status) = &pod.status {
        if let Some(bad) = status.pod_ip.as_ref().filter(|text| !text.is_empty() && !is_address(text)) {
            return Err(("status.podIP".into(), format!("{bad:?} is no IP address")));
        }
        if let Some((at, bad)) = status.pod_ips.iter().flatten().enumerate().find(|(_, ip)| !is_address(&ip.ip)) {
            return Err((format!("status.podIPs[{at}].ip"), format!("{:?} is no IP address", bad.ip)));
        }
    }
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_ref());
    if let Some(bad) = account.filter(|name| !name.is_empty() && !kubernetes_name(name)) {
        return Err(("spec.serviceAccountName".into(), format!("{bad:?} is no Kubernetes name")));
    }
    checked_uid(&pod.metadata)?;
    Ok(pod)
}

/// A uid becomes part of file names.
fn checked_uid(metadata: &ObjectMeta) -> Result<(), Fault> {
    match metadata.uid.as_deref() {
        Some(uid) if uid.len() > 128 || !uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') => {
            Err(("metadata.uid".into(), format!("{uid:?} is no uid: letters, digits and '-', at most 128")))
        }
        _ => Ok(()),
    }
}

pub(super) fn checked_service(service: Service) -> Result<Service, Fault> {
    let Some(spec) = &service.spec else { return Ok(service) };
    let bad = |text: &String| !text.is_empty() && text != "None" && !is_address(text);
    if let Some(text) = spec.cluster_ip.as_ref().filter(|text| bad(text)) {
        return Err(("spec.clusterIP".into(), format!("{text:?} is no IP address")));
    }
    if let Some((at, text)) = spec.cluster_ips.iter().flatten().enumerate().find(|(_, text)| bad(text)) {
        return Err((format!("spec.clusterIPs[{at}]"), format!("{text:?} is no IP address")));
    }
    let mut ports = spec.ports.iter().flatten().enumerate();
    match ports.find(|(_, port)| !(1..=65_535).contains(&port.port)) {
        Some((at, port)) => Err((format!("spec.ports[{at}].port"), format!("{} is no port", port.port))),
        None => Ok(service),
    }
}

pub(super) fn checked_slice(slice: EndpointSlice) -> Result<EndpointSlice, Fault> {
    if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6" | "FQDN") {
        return Err(("addressType".into(), format!("{:?} is none of IPv4, IPv6, FQDN", slice.address_type)));
    }
    let addresses = slice.endpoints.iter().flatten().enumerate();
    let mut addresses = addresses.flat_map(|(at, endpoint)| endpoint.addresses.iter().map(move |text| (at, text)));
    if let Some((at, bad)) = addresses.find(|(_, text)| slice.address_type != "FQDN" && !is_address(text)) {
        return Err((format!("endpoints[{at}].addresses"), format!("{bad:?} is no IP address")));
    }
    let mut ports = slice.ports.iter().flatten().enumerate();
    match ports.find(|(_, port)| port.port.is_some_and(|port| !(1..=65_535).contains(&port))) {
        Some((at, port)) => Err((format!("ports[{at}].port"), format!("{} is no port", port.port.unwrap_or_default()))),
        None => Ok(slice),
    }
}

#[cfg(test)]
mod tests;
