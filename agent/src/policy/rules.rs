//! Compiled rules of AuthorizationPolicies, and how one request matches them.
//!
//! Rules OR; from, to and when AND; entries inside from and to OR; the fields of an entry AND; the values of a field OR,
//! and of a `not` field none may match. Strings are compared whole or by one end, never as patterns of any other kind.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use super::Request;
use crate::identity::SpiffeId;

/// What a policy does with the requests that match it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    Allow,
    Deny,
}

impl Action {
    /// As it is written in a policy.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
        }
    }
}

/// A policy that can be enforced, whole.
#[derive(Debug)]
pub struct Policy {
    /// `namespace/name`.
    pub name: Arc<str>,
    pub action: Action,
    /// Annotated `istio.io/dry-run: "true"`: it never decides.
    pub dry_run: bool,
    pub rules: Vec<Rule>,
}

/// Which workloads a policy is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// `None` is every namespace.
    pub namespace: Option<Arc<str>>,
    /// Labels that a workload must have, all of them.
    pub labels: BTreeMap<String, String>,
}

impl Scope {
    /// A policy's scope: its namespace, or the whole mesh where that is the root namespace.
    pub fn new(namespace: &str, root_namespace: &str, labels: BTreeMap<String, String>) -> Self {
        Self { namespace: (namespace != root_namespace).then(|| namespace.into()), labels }
    }

    /// Whether it selects a workload of its namespace with these labels.
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// Absent parts match everything.
#[derive(Debug, Default)]
pub struct Rule {
    pub from: Option<Vec<Source>>,
    pub to: Option<Vec<Operation>>,
    pub when: Vec<Condition>,
}

/// Values of a field: one of `any` must match (unless the field is absent), and none of `none` may.
#[derive(Debug)]
pub struct Values<T> {
    /// `None` is an absent field.
    pub any: Option<Vec<T>>,
    pub none: Vec<T>,
}

impl<T> Values<T> {
    pub fn matches(&self, one: impl Fn(&T) -> bool) -> bool {
        self.any.as_ref().is_none_or(|any| any.iter().any(&one)) && !self.none.iter().any(&one)
    }

    pub fn is_absent(&self) -> bool {
        self.any.is_none() && self.none.is_empty()
    }
}

/// `source` of a rule.
#[derive(Debug)]
pub struct Source {
    pub principals: Values<Principal>,
    pub namespaces: Values<Text>,
    pub service_accounts: Values<ServiceAccount>,
    pub ip_blocks: Values<IpNet>,
}

/// `operation` of a rule.
#[derive(Debug)]
pub struct Operation {
    /// The pod's ports.
    pub ports: Values<u16>,
}

/// One entry of `when`.
#[derive(Debug)]
pub enum Condition {
    SourceIp(Values<IpNet>),
    SourceNamespace(Values<Text>),
    SourcePrincipal(Values<Principal>),
    DestinationIp(Values<IpNet>),
    DestinationPort(Values<u16>),
}

/// A string to compare with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// `x`
    Exact(Box<str>),
    /// `x*`
    Prefix(Box<str>),
    /// `*x`
    Suffix(Box<str>),
    /// `*`: anything that is there.
    Present,
}

impl Text {
    /// A peer without identity has no text, which nothing matches.
    pub fn matches(&self, text: Option<&str>) -> bool {
        let Some(text) = text else { return false };
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }

    /// Whether it matches `head` and `tail` written one after the other.
    fn matches_both(&self, head: &str, tail: &str) -> bool {
        match self {
            Self::Exact(exact) => exact.strip_prefix(head) == Some(tail),
            Self::Prefix(prefix) => match prefix.strip_prefix(head) {
                Some(rest) => tail.starts_with(rest),
                None => head.starts_with(&**prefix),
            },
            Self::Suffix(suffix) => match suffix.strip_suffix(tail) {
                Some(rest) => head.ends_with(rest),
                None => tail.ends_with(&**suffix),
            },
            Self::Present => !head.is_empty() || !tail.is_empty(),
        }
    }
}

/// As it is written in a policy.
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(exact) => f.write_str(exact),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
            Self::Present => f.write_str("*"),
        }
    }
}

/// An identity to compare with, written without `spiffe://`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    pub text: Text,
    /// Trust domains that mean the same (Istio's `trustDomainAliases`). An identity of one of them is compared under the name
    /// of each; empty where none has another name.
    pub domains: Arc<[Arc<str>]>,
}

impl Principal {
    pub fn matches(&self, id: Option<&SpiffeId>) -> bool {
        let Some(id) = id else { return false };
        if self.domains.iter().any(|domain| **domain == *id.trust_domain()) {
            return self.domains.iter().any(|domain| self.text.matches_both(domain, id.path()));
        }
        self.text.matches(Some(id.principal()))
    }
}

/// As it is written in a policy.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

/// A service account of any trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    pub namespace: Box<str>,
    pub name: Box<str>,
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl ServiceAccount {
    pub fn is(&self, id: Option<&SpiffeId>) -> bool {
        id.is_some_and(|id| id.namespace() == &*self.namespace && id.service_account() == &*self.name)
    }
}

impl Policy {
    /// Whether any rule matches. A policy without rules matches nothing.
    pub fn matches(&self, request: &Request) -> bool {
        self.rules.iter().any(|rule| rule.matches(request))
    }
}

impl Rule {
    fn matches(&self, request: &Request) -> bool {
        self.from.as_ref().is_none_or(|sources| sources.iter().any(|source| source.matches(request)))
            && self.to.as_ref().is_none_or(|operations| operations.iter().any(|operation| operation.matches(request)))
            && self.when.iter().all(|condition| condition.matches(request))
    }
}

impl Source {
    fn matches(&self, request: &Request) -> bool {
        let Self { principals, namespaces, service_accounts, ip_blocks } = self;
        let id = request.principal.as_ref();
        // One that names nothing matches nothing (ztunnel skips a match without fields).
        let says_something = !(principals.is_absent()
            && namespaces.is_absent()
            && service_accounts.is_absent()
            && ip_blocks.is_absent());
        says_something
            && principals.matches(|principal| principal.matches(id))
            && namespaces.matches(|text| text.matches(id.map(SpiffeId::namespace)))
            && service_accounts.matches(|account| account.is(id))
            && ip_blocks.matches(|block| contains(block, request.source_ip))
    }
}

impl Operation {
    fn matches(&self, request: &Request) -> bool {
        !self.ports.is_absent() && self.ports.matches(|port| *port == request.destination_port)
    }
}

impl Condition {
    fn matches(&self, request: &Request) -> bool {
        let id = request.principal.as_ref();
        match self {
            Self::SourceIp(blocks) => blocks.matches(|block| contains(block, request.source_ip)),
            Self::SourceNamespace(texts) => texts.matches(|text| text.matches(id.map(SpiffeId::namespace))),
            Self::SourcePrincipal(principals) => principals.matches(|principal| principal.matches(id)),
            Self::DestinationIp(blocks) => blocks.matches(|block| contains(block, request.destination_ip)),
            Self::DestinationPort(ports) => ports.matches(|port| *port == request.destination_port),
        }
    }
}

/// An IPv4 address is the same in its IPv6-mapped form; blocks are kept unmapped.
pub fn contains(block: &IpNet, address: IpAddr) -> bool {
    block.contains(&address.to_canonical())
}
