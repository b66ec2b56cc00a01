//! AuthorizationPolicy as written → rules that can be enforced, or every reason why it can't be.
//!
//! Nothing is skipped: a field, value or key that L4 can't enforce makes the whole policy unenforceable, because dropping
//! a part of a rule makes an ALLOW wider or a DENY narrower than its author wrote. The same goes for an empty list: it is
//! no absent one, and says neither *any* nor *none*.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net};

use super::rules::{Action, Condition, Operation, Principal, Rule, ServiceAccount, Source, Text, Values};
use crate::{
    cluster::kinds::{self, AuthorizationPolicySpec, WorkloadSelector},
    life::limits,
};

/// A reason why a policy can't be enforced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Path from the object's root, such as `spec.rules[0].to[0].operation.methods`.
    pub field: String,
    /// What is wrong and what to write instead.
    pub fix: String,
}

/// A policy that can be enforced as written.
#[derive(Debug)]
pub struct Parsed {
    pub action: Action,
    pub rules: Vec<Rule>,
    /// Sources and operations that name nothing, and so match nothing.
    pub idle: Vec<Fault>,
}

const L7: &str =
    "is an HTTP field, which an L4 mesh can't see: remove it, or enforce the policy at a waypoint with targetRefs";
const EMPTY: &str = "is empty, which says neither any nor none: remove the field, or fill it";

/// Where a fault is.
#[derive(Clone)]
struct At(String);

impl At {
    fn field(&self, name: &str) -> Self {
        Self(format!("{}.{name}", self.0))
    }

    fn item(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }
}

/// Faults as they are found: all of them, so that one look is enough to mend a policy.
#[derive(Default)]
struct Faults {
    all: Vec<Fault>,
    /// Entries that match nothing, which is no fault, but worth a word.
    idle: Vec<Fault>,
}

impl Faults {
    fn add(&mut self, at: &At, fix: impl Into<String>) {
        self.all.push(Fault { field: at.0.clone(), fix: fix.into() });
    }

    fn idle(&mut self, at: &At) {
        let fix = "names nothing, so it matches nothing: fill it, or remove the entry";
        self.idle.push(Fault { field: at.0.clone(), fix: fix.into() });
    }

    fn absent<T>(&mut self, at: &At, field: &str, value: Option<&T>, fix: &str) {
        if value.is_some() {
            self.add(&at.field(field), fix);
        }
    }
}

/// Whether a policy is for a gateway or waypoint only. Istio's L4 proxy ignores it, and so must this one.
pub fn is_elsewhere(spec: &AuthorizationPolicySpec) -> bool {
    let targeted = spec.target_ref.is_some() || spec.target_refs.as_ref().is_some_and(|targets| !targets.is_empty());
    targeted && spec.selector.is_none()
}

/// What a policy stands in.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    pub namespace: &'a str,
    /// Trust domains that mean the same; see [`Principal`].
    pub domains: &'a Arc<[Arc<str>]>,
}

/// Action and rules of a policy.
///
/// # Errors
/// Every reason why it can't be enforced, at least one.
pub fn parse(around: Surroundings<'_>, spec: &AuthorizationPolicySpec) -> Result<Parsed, Vec<Fault>> {
    let AuthorizationPolicySpec { selector, target_ref, target_refs, rules, action, provider } = spec;
    let (at, mut faults) = (At("spec".into()), Faults::default());
    if let Some(selector) = selector {
        faults.all.extend(selector_faults(selector));
    }
    const TARGETS: &str = "an L4 policy selects workloads by selector only: remove it";
    faults.absent(&at, "targetRef", target_ref.as_ref(), TARGETS);
    faults.absent(&at, "targetRefs", target_refs.as_ref(), TARGETS);
    faults.absent(&at, "provider", provider.as_ref(), "is for CUSTOM, which an L4 mesh can't enforce: remove it");
    let action = match action.as_deref() {
        None | Some("ALLOW") => Action::Allow,
        Some("DENY") => Action::Deny,
        Some(other) => {
            faults.add(&at.field("action"), format!("{other:?} can't be enforced at L4: use ALLOW or DENY"));
            Action::Deny
        }
    };
    let at = at.field("rules");
    let rules =
        rules.iter().flatten().enumerate().map(|(index, rule)| parse_rule(around, rule, &at.item(index), &mut faults));
    let rules = rules.collect();
    if faults.all.is_empty() { Ok(Parsed { action, rules, idle: faults.idle }) } else { Err(faults.all) }
}

/// The labels that select workloads. A selector that can select nothing was meant to select something, and nobody knows
/// what: it has none, and so stands for everything.
pub fn labels(selector: Option<&WorkloadSelector>) -> BTreeMap<String, String> {
    let understood = selector.filter(|selector| selector_faults(selector).is_empty());
    understood.and_then(|selector| selector.match_labels.clone()).unwrap_or_default()
}

/// What is wrong with a selector: values that no label can have would select nothing, silently.
pub fn selector_faults(selector: &WorkloadSelector) -> Vec<Fault> {
    let at = At("spec.selector.matchLabels".into());
    let bad = |text: &str, also: &str| {
        !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b) || also.as_bytes().contains(&b))
    };
    let labels = selector.match_labels.iter().flatten();
    let faulty = labels.filter(|(key, value)| key.is_empty() || bad(key, "/") || bad(value, ""));
    faulty
        .map(|(key, value)| Fault {
            field: at.field(key).0,
            fix: format!(
                "{value:?} can't be the value of a label {key:?}: labels are compared whole, without wildcards"
            ),
        })
        .collect()
}

fn parse_rule(around: Surroundings<'_>, rule: &kinds::Rule, at: &At, faults: &mut Faults) -> Rule {
    let kinds::Rule { from, to, when } = rule;
    let from = entries(from.as_deref(), &at.field("from"), faults, |from, at, faults| {
        let (at, source) = (at.field("source"), from.source.clone().unwrap_or_default());
        if source == kinds::Source::default() {
            faults.idle(&at);
        }
        parse_source(around, &source, &at, faults)
    });
    let to = entries(to.as_deref(), &at.field("to"), faults, |to, at, faults| {
        let (at, operation) = (at.field("operation"), to.operation.clone().unwrap_or_default());
        if operation == kinds::Operation::default() {
            faults.idle(&at);
        }
        parse_operation(&operation, &at, faults)
    });
    let when = entries(when.as_deref(), &at.field("when"), faults, |condition, at, faults| {
        parse_condition(around, condition, at, faults)
    });
    Rule { from, to, when: when.into_iter().flatten().flatten().collect() }
}

/// The entries of a list. An absent list is none; an empty one is a fault.
fn entries<T, U>(
    list: Option<&[T]>,
    at: &At,
    faults: &mut Faults,
    mut parse: impl FnMut(&T, &At, &mut Faults) -> U,
) -> Option<Vec<U>> {
    let list = list?;
    if list.is_empty() {
        faults.add(at, EMPTY);
    }
    Some(list.iter().enumerate().map(|(index, entry)| parse(entry, &at.item(index), faults)).collect())
}

fn parse_source(around: Surroundings<'_>, source: &kinds::Source, at: &At, faults: &mut Faults) -> Source {
    let kinds::Source {
        principals,
        not_principals,
        request_principals,
        not_request_principals,
        namespaces,
        not_namespaces,
        service_accounts,
        not_service_accounts,
        ip_blocks,
        not_ip_blocks,
        remote_ip_blocks,
        not_remote_ip_blocks,
        trust_domains,
        not_trust_domains,
    } = source;
    faults.absent(at, "requestPrincipals", request_principals.as_ref(), L7);
    faults.absent(at, "notRequestPrincipals", not_request_principals.as_ref(), L7);
    faults.absent(at, "remoteIpBlocks", remote_ip_blocks.as_ref(), L7);
    faults.absent(at, "notRemoteIpBlocks", not_remote_ip_blocks.as_ref(), L7);
    const TRUST: &str = "is not enforced at L4: write the trust domain in principals, as in cluster.local/ns/a/sa/b";
    faults.absent(at, "trustDomains", trust_domains.as_ref(), TRUST);
    faults.absent(at, "notTrustDomains", not_trust_domains.as_ref(), TRUST);

    let by_account = service_accounts.is_some() || not_service_accounts.is_some();
    let by_name = principals.is_some() || not_principals.is_some() || namespaces.is_some() || not_namespaces.is_some();
    if by_account && by_name {
        faults.add(&at.field("serviceAccounts"), "can't stand beside principals or namespaces: use one of them");
    }
    for (name, accounts) in [("serviceAccounts", service_accounts), ("notServiceAccounts", not_service_accounts)] {
        if accounts.as_ref().is_some_and(|accounts| accounts.len() > limits::SERVICE_ACCOUNTS) {
            faults.add(
                &at.field(name),
                format!("has more than {}: spread them over several sources", limits::SERVICE_ACCOUNTS),
            );
        }
    }
    let account = |text: &str| parse_account(around.namespace, text);
    let principal = |text: &str| parse_principal(around, text);
    Source {
        principals: values(at, ["principals", "notPrincipals"], [principals, not_principals], faults, principal),
        namespaces: values(at, ["namespaces", "notNamespaces"], [namespaces, not_namespaces], faults, parse_namespace),
        service_accounts: values(
            at,
            ["serviceAccounts", "notServiceAccounts"],
            [service_accounts, not_service_accounts],
            faults,
            account,
        ),
        ip_blocks: values(at, ["ipBlocks", "notIpBlocks"], [ip_blocks, not_ip_blocks], faults, parse_block),
    }
}

fn parse_operation(operation: &kinds::Operation, at: &At, faults: &mut Faults) -> Operation {
    let kinds::Operation { hosts, not_hosts, ports, not_ports, methods, not_methods, paths, not_paths } = operation;
    let http = [
        ("hosts", hosts),
        ("notHosts", not_hosts),
        ("methods", methods),
        ("notMethods", not_methods),
        ("paths", paths),
        ("notPaths", not_paths),
    ];
    for (name, value) in http {
        faults.absent(at, name, value.as_ref(), L7);
    }
    Operation { ports: values(at, ["ports", "notPorts"], [ports, not_ports], faults, parse_port) }
}

fn parse_condition(
    around: Surroundings<'_>,
    condition: &kinds::Condition,
    at: &At,
    faults: &mut Faults,
) -> Option<Condition> {
    let kinds::Condition { key, values: any, not_values } = condition;
    if any.is_none() && not_values.is_none() {
        faults.add(&at.field("values"), "is missing: a condition needs values or notValues");
    }
    let (names, lists) = (["values", "notValues"], [any, not_values]);
    Some(match key.as_str() {
        "source.ip" => Condition::SourceIp(values(at, names, lists, faults, parse_block)),
        "source.namespace" => Condition::SourceNamespace(values(at, names, lists, faults, parse_namespace)),
        "source.principal" => {
            Condition::SourcePrincipal(values(at, names, lists, faults, |text| parse_principal(around, text)))
        }
        "destination.ip" => Condition::DestinationIp(values(at, names, lists, faults, parse_block)),
        "destination.port" => Condition::DestinationPort(values(at, names, lists, faults, parse_port)),
        other => {
            const KEYS: &str = "source.ip, source.namespace, source.principal, destination.ip and destination.port";
            faults.add(&at.field("key"), format!("{other:?} can't be enforced at L4, only {KEYS} can"));
            return None;
        }
    })
}

/// A field and its `not` form.
fn values<T>(
    at: &At,
    [name, not_name]: [&str; 2],
    [any, none]: [&Option<Vec<String>>; 2],
    faults: &mut Faults,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Values<T> {
    let mut read = |name: &str, list: &Option<Vec<String>>| {
        let at = at.field(name);
        let parsed = entries(list.as_deref(), &at, faults, |text, at, faults| match parse(text) {
            Ok(value) => Some(value),
            Err(fix) => {
                faults.add(at, fix);
                None
            }
        });
        parsed.map(|parsed| parsed.into_iter().flatten().collect::<Vec<_>>())
    };
    Values { any: read(name, any), none: read(not_name, none).unwrap_or_default() }
}

fn parse_namespace(text: &str) -> Result<Text, String> {
    parse_text(text, "-.")
}

fn parse_principal(around: Surroundings<'_>, text: &str) -> Result<Principal, String> {
    if text.contains("spiffe:") {
        let without = text.replacen("spiffe://", "", 1);
        return Err(format!(
            "principals are written without spiffe://, so {text:?} would match nothing: write {without:?}"
        ));
    }
    Ok(Principal { text: parse_text(text, "-._/")?, domains: Arc::clone(around.domains) })
}

/// A text with a `*` alone or at one end. A text that no identity can have would match nothing, which is not what its
/// author meant; beside lower-case letters and digits, `others` are what it may have.
fn parse_text(text: &str, others: &str) -> Result<Text, String> {
    let (literal, make): (&str, fn(Box<str>) -> Text) = match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => return Ok(Text::Present),
        (Some(rest), _) => (rest, Text::Suffix),
        (None, Some(rest)) => (rest, Text::Prefix),
        (None, None) => (text, Text::Exact),
    };
    if literal.is_empty() {
        return Err("an empty text matches nothing: remove it".into());
    }
    if literal.contains('*') {
        return Err(format!("{text:?}: a * stands alone or at one end, and there is no other wildcard"));
    }
    match literal.chars().find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || others.contains(*c))) {
        Some(other) => Err(format!("{text:?} would match nothing: no identity has a {other:?} there")),
        None => Ok(make(literal.into())),
    }
}

fn parse_account(policy_namespace: &str, text: &str) -> Result<ServiceAccount, String> {
    let (namespace, name) = text.split_once('/').unwrap_or((policy_namespace, text));
    let name_like = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
    };
    if !name_like(namespace) || !name_like(name) {
        return Err(format!(
            "{text:?} is neither <service account> nor <namespace>/<service account>, without wildcards"
        ));
    }
    Ok(ServiceAccount { namespace: namespace.into(), name: name.into() })
}

fn parse_port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let port = u16::from_str(text).ok().filter(|port| digits && *port != 0);
    port.ok_or_else(|| format!("{text:?} is no port: write one number from 1 to 65535"))
}

/// An address or a CIDR block; IPv4-mapped IPv6 becomes IPv4.
fn parse_block(text: &str) -> Result<IpNet, String> {
    let address = || IpAddr::from_str(text).ok().map(IpNet::from);
    let block = IpNet::from_str(text).ok().or_else(address);
    let block = block.ok_or_else(|| format!("{text:?} is neither an IP address nor a block such as 10.0.0.0/8"))?;
    Ok(match block {
        IpNet::V6(block) => unmapped(block.network(), block.prefix_len()).map_or(IpNet::V6(block), IpNet::V4),
        IpNet::V4(_) => block,
    })
}

fn unmapped(network: Ipv6Addr, prefix: u8) -> Option<Ipv4Net> {
    Ipv4Net::new(network.to_ipv4_mapped()?, prefix.checked_sub(96)?).ok()
}
