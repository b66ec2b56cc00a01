//! A question about a connection that need not exist, as an operator asks it, and its answer. Pure.
//!
//! Who from, which pod and port, from which address: looked up in a snapshot, then explained like any request.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{Explanation, Request, Rulebook, explain};
use crate::{
    cluster::{Snapshot, Workload},
    identity::{SpiffeId, TrustDomain},
};

/// As it is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// `NAMESPACE/SERVICEACCOUNT`, a whole SPIFFE id, or `none` for plaintext.
    pub from: String,
    /// `[NAMESPACE/]POD:PORT`.
    pub to: String,
    /// Source address; where it is absent, that of a pod of the service account.
    pub ip: Option<IpAddr>,
}

/// The question as it was understood, and its answer. The JSON of `heddle policy explain`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// SPIFFE id; empty for plaintext.
    pub from: String,
    /// The address that rules about addresses were asked about; empty where none is known, and then no block that says
    /// anything holds it.
    pub source_ip: String,
    /// `namespace/name` of the pod.
    pub to: String,
    pub destination_ip: String,
    pub port: u16,
    #[serde(flatten)]
    pub explanation: Explanation,
}

/// Why a question can't be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    #[error("{0:?} is no source: give NAMESPACE/SERVICEACCOUNT, a SPIFFE id, or none for plaintext")]
    From(String),
    #[error("{0:?} is no destination: give NAMESPACE/POD:PORT")]
    To(String),
    #[error("no pod {0} is known")]
    NoSuchPod(String),
    #[error("pod {name} is in several namespaces: {namespaces}; give NAMESPACE/POD")]
    Ambiguous { name: String, namespaces: String },
}

impl QuestionError {
    /// Stable name: log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::From(_) => "bad_source",
            Self::To(_) => "bad_destination",
            Self::NoSuchPod(_) => "no_such_pod",
            Self::Ambiguous { .. } => "ambiguous_pod",
        }
    }
}

/// Answers by the rules that were compiled from this snapshot.
///
/// # Errors
/// When the question names nothing that is known.
pub fn answer(
    question: &Question,
    snapshot: &Snapshot,
    rules: &Rulebook,
    trust_domain: &TrustDomain,
) -> Result<Explained, QuestionError> {
    let principal = source(&question.from, trust_domain)?;
    let (name, port) = destination(&question.to)?;
    let pod = find_pod(snapshot, name)?;
    let source_ip = question.ip.or_else(|| address_of(snapshot, principal.as_ref()?));
    let family = |address: &&IpAddr| source_ip.is_none_or(|source| source.is_ipv4() == address.is_ipv4());
    let unspecified = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let own = pod.addresses.iter().find(family).or(pod.addresses.first()).copied();
    let destination_ip = own.unwrap_or(unspecified);
    let nowhere = if destination_ip.is_ipv4() { unspecified } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let request = Request {
        principal,
        source_ip: source_ip.unwrap_or(nowhere),
        destination: Arc::clone(pod),
        destination_ip,
        destination_port: port,
    };
    Ok(Explained {
        from: request.principal.as_ref().map(ToString::to_string).unwrap_or_default(),
        source_ip: source_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        to: format!("{}/{}", pod.namespace, pod.name),
        destination_ip: destination_ip.to_string(),
        port,
        explanation: explain(rules, &request),
    })
}

fn source(text: &str, trust_domain: &TrustDomain) -> Result<Option<SpiffeId>, QuestionError> {
    let bad = || QuestionError::From(text.to_owned());
    if text == "none" {
        return Ok(None);
    }
    if text.starts_with("spiffe://") {
        return text.parse().map(Some).map_err(|_| bad());
    }
    let (namespace, account) = text.split_once('/').ok_or_else(bad)?;
    SpiffeId::new(trust_domain, namespace, account).map(Some).map_err(|_| bad())
}

/// `[NAMESPACE/]POD:PORT`.
fn destination(text: &str) -> Result<(&str, u16), QuestionError> {
    let parsed = text.rsplit_once(':').and_then(|(pod, port)| Some((pod, port.parse().ok()?)));
    parsed.filter(|(pod, port)| !pod.is_empty() && *port != 0).ok_or_else(|| QuestionError::To(text.to_owned()))
}

/// A pod by `namespace/name`, or by a name that only one pod has.
///
/// # Errors
/// When none or several are meant.
pub fn find_pod<'a>(snapshot: &'a Snapshot, text: &str) -> Result<&'a Arc<Workload>, QuestionError> {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, text),
    };
    let named = |pod: &&Arc<Workload>| *pod.name == *name && namespace.is_none_or(|of| *pod.namespace == *of);
    let mut found: Vec<_> = snapshot.workloads.values().filter(named).collect();
    found.sort_by_key(|pod| (pod.terminating, &pod.namespace, &pod.uid));
    match found.as_slice() {
        [] => Err(QuestionError::NoSuchPod(text.to_owned())),
        [first, others @ ..] if others.iter().all(|other| other.namespace == first.namespace) => Ok(first),
        several => {
            let namespaces: Vec<&str> = several.iter().map(|pod| &*pod.namespace).collect();
            Err(QuestionError::Ambiguous { name: name.to_owned(), namespaces: namespaces.join(", ") })
        }
    }
}

/// An address of a pod of that identity.
fn address_of(snapshot: &Snapshot, id: &SpiffeId) -> Option<IpAddr> {
    let of = |pod: &&Arc<Workload>| *pod.namespace == *id.namespace() && *pod.service_account == *id.service_account();
    let first = snapshot.workloads.values().filter(of).min_by_key(|pod| &pod.name);
    first.and_then(|pod| pod.addresses.first()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests::{CLIENT, authorization, cluster};

    fn ask(from: &str, to: &str, ip: Option<&str>) -> Result<Explained, QuestionError> {
        let snapshot =
            cluster(&[authorization("shop/p", "{rules: [{from: [{source: {ipBlocks: [10.0.0.9]}}]}]}")], &[]);
        let question = Question { from: from.into(), to: to.into(), ip: ip.map(|ip| ip.parse().unwrap()) };
        answer(&question, &snapshot, &Rulebook::compile(&snapshot), &"cluster.local".parse().unwrap())
    }

    #[test]
    fn a_question_is_looked_up_and_answered() {
        let found = ask("shop/web", "shop/db:8080", None).unwrap();
        assert_eq!((found.from.as_str(), found.to.as_str()), ("spiffe://cluster.local/ns/shop/sa/web", "shop/db"));
        // The address of the pod that runs as shop/web.
        assert_eq!((found.source_ip.as_str(), found.port), ("10.0.0.9", 8080));
        assert!(found.explanation.allowed);
        let plain = ask("none", "db:8080", None).unwrap();
        assert_eq!((plain.from.as_str(), plain.source_ip.as_str()), ("", ""));
        assert!(!plain.explanation.allowed);
        assert!(ask("none", "shop/db:8080", Some("10.0.0.9")).unwrap().explanation.allowed);
        assert_eq!(ask(CLIENT, "shop/db:1", None).unwrap().from, CLIENT);
    }

    #[test]
    fn what_names_nothing_is_said() {
        let reason = |from: &str, to: &str| ask(from, to, None).unwrap_err().reason();
        assert_eq!(reason("shop", "shop/db:1"), "bad_source");
        assert_eq!(reason("spiffe://x", "shop/db:1"), "bad_source");
        for to in ["shop/db", "shop/db:", "shop/db:0", "shop/db:http", ":80", "shop/db:65536"] {
            assert_eq!(reason("none", to), "bad_destination", "{to}");
        }
        assert_eq!(reason("none", "shop/none:1"), "no_such_pod");
        assert_eq!(reason("none", "web:1"), "ambiguous_pod");
    }
}
