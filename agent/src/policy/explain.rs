//! Why a decision is what it is: every policy that was considered, and where each failed to match.
//!
//! Beside [`decide`], whose answer it gives: it decides nothing itself, and never runs for traffic. Its misses are found by
//! walking the rules again, and a property test holds them to what [`Policy::matches`] says.

use std::fmt::Display;

use serde::{Deserialize, Serialize};

use super::{
    Request, Rulebook, decide,
    rulebook::Compiled,
    rules::{Condition, Operation, Policy, Rule, Scope, Source, Values, contains},
};
use crate::identity::SpiffeId;

/// The decision about one request, and everything that went into it. Its JSON is what `heddle policy explain` prints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub allowed: bool,
    /// Why not: stable; empty when allowed.
    pub reason: String,
    /// `namespace/name` of the policy that decided; empty where none did.
    pub policy: String,
    /// The decision in words.
    pub detail: String,
    pub plaintext: PlaintextRule,
    /// Policies of the mesh and of the destination's namespace, in the order in which they are asked.
    pub policies: Vec<Considered>,
    /// Where policies may be missing: files that can't be read.
    pub gaps: Vec<String>,
    /// What is not enforced as written, of the mesh's policies and the namespace's.
    pub problems: Vec<String>,
}

/// What PeerAuthentication says about plaintext to the port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaintextRule {
    pub refused: bool,
    /// `namespace/name`; empty where nobody says anything, which is permissive.
    pub policy: String,
}

/// One AuthorizationPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// `namespace/name`.
    pub policy: String,
    /// `ALLOW` or `DENY`; empty where that can't be enforced.
    pub action: String,
    pub role: Role,
    pub matched: bool,
    /// For each rule the first part of it that fails; empty when one rule matches.
    pub misses: Vec<Miss>,
}

/// What a policy has to say about the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Decides,
    /// Annotated so that it never decides.
    DryRun,
    /// It can't be enforced, and so denies.
    Unenforceable,
    /// Its selector is for other workloads.
    NotSelected,
}

impl Role {
    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Decides => "decides",
            Self::DryRun => "dry run",
            Self::Unenforceable => "can't be enforced",
            Self::NotSelected => "selects other workloads",
        }
    }
}

/// Where a policy failed to match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Miss {
    /// Path of the field.
    pub field: String,
    pub why: String,
}

/// Explains what [`decide`] answers.
#[must_use]
pub fn explain(rules: &Rulebook, request: &Request) -> Explanation {
    let mut explanation = match decide(rules, request) {
        Ok(permit) => Explanation {
            allowed: true,
            policy: permit.policy().map(ToString::to_string).unwrap_or_default(),
            detail: permit
                .policy()
                .map_or_else(|| "no ALLOW policy is for it".into(), |policy| format!("allowed by: {policy}")),
            ..Explanation::default()
        },
        Err(denial) => Explanation {
            reason: denial.reason().into(),
            policy: denial.policy().map(ToString::to_string).unwrap_or_default(),
            detail: denial.to_string(),
            ..Explanation::default()
        },
    };
    let pod = &request.destination;
    let Some(selected) = rules.of(&pod.uid) else { return explanation };
    let port = request.destination_port;
    explanation.plaintext = PlaintextRule {
        refused: selected.strictness.refuses(port).is_some(),
        policy: selected.strictness.by(port).map(ToString::to_string).unwrap_or_default(),
    };
    explanation.gaps = selected.incomplete.iter().map(ToString::to_string).collect();
    explanation.policies =
        rules.policies(&pod.namespace).map(|(scope, policy)| consider(scope, policy, request)).collect();
    explanation.policies.sort_by_key(order);
    explanation.problems = rules
        .problems_at(&pod.namespace)
        .map(|problem| {
            let effect = problem.effect.as_str();
            format!("{} {}: {}: {} ({effect})", problem.kind.as_str(), problem.policy, problem.field, problem.fix)
        })
        .collect();
    explanation
}

/// As [`decide`] asks them; what has no say comes last.
fn order(policy: &Considered) -> u8 {
    match (policy.role, &*policy.action) {
        (Role::Unenforceable, _) => 0,
        (Role::Decides, "DENY") => 1,
        (Role::Decides, _) => 2,
        (Role::DryRun, _) => 3,
        (Role::NotSelected, _) => 4,
    }
}

fn consider(scope: &Scope, policy: &Compiled, request: &Request) -> Considered {
    let labels = &request.destination.labels;
    let unselected = (!scope.selects(labels)).then(|| {
        let other = scope.labels.iter().filter(|(key, value)| labels.get(*key) != Some(value));
        let miss = |(key, value): (&String, &String)| Miss {
            field: format!("spec.selector.matchLabels.{key}"),
            why: match labels.get(key) {
                Some(has) => format!("is {value}, and the pod has {has}"),
                None => format!("is {value}, and the pod has no such label"),
            },
        };
        other.map(miss).collect()
    });
    match (policy, unselected) {
        (Compiled::Unenforceable(name), None) => Considered {
            policy: name.to_string(),
            action: String::new(),
            role: Role::Unenforceable,
            matched: false,
            misses: Vec::new(),
        },
        (Compiled::Unenforceable(name), Some(misses)) => Considered {
            policy: name.to_string(),
            action: String::new(),
            role: Role::NotSelected,
            matched: false,
            misses,
        },
        (Compiled::Enforced(policy), unselected) => {
            let selects = unselected.is_none();
            let matched = selects && policy.matches(request);
            Considered {
                policy: policy.name.to_string(),
                action: policy.action.as_str().into(),
                role: match (selects, policy.dry_run) {
                    (false, _) => Role::NotSelected,
                    (true, true) => Role::DryRun,
                    (true, false) => Role::Decides,
                },
                matched,
                misses: match unselected {
                    Some(misses) => misses,
                    None if matched => Vec::new(),
                    None => misses(policy, request),
                },
            }
        }
    }
}

/// For each rule of a policy that does not match the first part that fails.
pub(super) fn misses(policy: &Policy, request: &Request) -> Vec<Miss> {
    if policy.rules.is_empty() {
        return vec![Miss { field: "spec.rules".into(), why: "has no rule, so it matches nothing".into() }];
    }
    let rules = policy.rules.iter().enumerate();
    rules.filter_map(|(index, rule)| miss_of_rule(&format!("spec.rules[{index}]"), rule, request)).collect()
}

fn miss_of_rule(at: &str, rule: &Rule, request: &Request) -> Option<Miss> {
    let Rule { from, to, when } = rule;
    let from = || entries(at, "from", from.as_deref(), |at, source| miss_of_source(at, source, request));
    let to = || entries(at, "to", to.as_deref(), |at, operation| miss_of_operation(at, operation, request));
    let mut when = when.iter().enumerate();
    from().or_else(to).or_else(|| {
        when.find_map(|(index, condition)| miss_of_condition(&format!("{at}.when[{index}]"), condition, request))
    })
}

/// The miss of the only entry, or what they all come to.
fn entries<T>(at: &str, part: &str, entries: Option<&[T]>, miss: impl Fn(&str, &T) -> Option<Miss>) -> Option<Miss> {
    let entries = entries?;
    let mut misses = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        misses.push(miss(&format!("{at}.{part}[{index}]"), entry)?);
    }
    if misses.len() == 1 {
        return misses.pop();
    }
    let all: Vec<String> = misses.into_iter().map(|miss| format!("{} {}", miss.field, miss.why)).collect();
    Some(Miss { field: format!("{at}.{part}"), why: format!("has no entry that matches: {}", all.join("; ")) })
}

fn miss_of_source(at: &str, source: &Source, request: &Request) -> Option<Miss> {
    let Source { principals, namespaces, service_accounts, ip_blocks } = source;
    let at = format!("{at}.source");
    if principals.is_absent() && namespaces.is_absent() && service_accounts.is_absent() && ip_blocks.is_absent() {
        return Some(nothing(at));
    }
    let id = request.principal.as_ref();
    let named = |text: Option<&str>| text.unwrap_or(NO_IDENTITY).to_owned();
    let (principal, namespace) = (id.map(SpiffeId::principal), id.map(SpiffeId::namespace));
    let account = id.map(|id| format!("{}/{}", id.namespace(), id.service_account()));
    values(&at, "principals", principals, &named(principal), |principal| principal.matches(id))
        .or_else(|| values(&at, "namespaces", namespaces, &named(namespace), |text| text.matches(namespace)))
        .or_else(|| {
            values(&at, "serviceAccounts", service_accounts, &named(account.as_deref()), |account| account.is(id))
        })
        .or_else(|| {
            let ip = request.source_ip;
            values(&at, "ipBlocks", ip_blocks, &ip, |block| contains(block, ip))
        })
}

fn miss_of_operation(at: &str, operation: &Operation, request: &Request) -> Option<Miss> {
    let (at, port) = (format!("{at}.operation"), request.destination_port);
    if operation.ports.is_absent() {
        return Some(nothing(at));
    }
    values(&at, "ports", &operation.ports, &port, |one| *one == port)
}

fn miss_of_condition(at: &str, condition: &Condition, request: &Request) -> Option<Miss> {
    let id = request.principal.as_ref();
    let (principal, namespace) = (id.map(SpiffeId::principal), id.map(SpiffeId::namespace));
    let (from, to, port) = (request.source_ip, request.destination_ip, request.destination_port);
    match condition {
        Condition::SourceIp(blocks) => values(at, "values", blocks, &from, |block| contains(block, from)),
        Condition::SourceNamespace(texts) => {
            values(at, "values", texts, &namespace.unwrap_or(NO_IDENTITY), |text| text.matches(namespace))
        }
        Condition::SourcePrincipal(texts) => {
            values(at, "values", texts, &principal.unwrap_or(NO_IDENTITY), |principal| principal.matches(id))
        }
        Condition::DestinationIp(blocks) => values(at, "values", blocks, &to, |block| contains(block, to)),
        Condition::DestinationPort(ports) => values(at, "values", ports, &port, |one| *one == port),
    }
}

const NO_IDENTITY: &str = "a client without identity";

fn nothing(field: String) -> Miss {
    Miss { field, why: "names nothing, so it matches nothing".into() }
}

/// Why a field does not match, if it does not.
fn values<T: Display>(
    at: &str,
    name: &str,
    values: &Values<T>,
    has: &impl Display,
    one: impl Fn(&T) -> bool,
) -> Option<Miss> {
    if values.matches(&one) {
        return None;
    }
    if let Some(excluded) = values.none.iter().find(|value| one(value)) {
        let mut letters = name.chars();
        let capital = letters.next().map(|first| first.to_ascii_uppercase()).unwrap_or_default();
        let field = format!("{at}.not{capital}{}", letters.as_str());
        return Some(Miss { field, why: format!("excludes {has} by {excluded}") });
    }
    let wanted: Vec<String> = values.any.iter().flatten().map(ToString::to_string).collect();
    Some(Miss { field: format!("{at}.{name}"), why: format!("wants {}, and this is {has}", wanted.join(" or ")) })
}
