//! Every policy of a snapshot, compiled once and indexed by the workloads that it selects.
//!
//! A policy that can't be enforced is not left out: it denies for what it selects, and is on the list of problems.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    parse::{self, Fault, Parsed, Surroundings},
    rules::{Action, Policy, Scope},
    strictness::{Levels, Strictness, Taken},
};
use crate::cluster::{
    InvalidPolicy, PolicyGap, PolicyKind, Snapshot, Workload,
    kinds::{AuthorizationPolicy, WorkloadSelector},
};

/// Annotation of a policy that never decides.
const DRY_RUN: &str = "istio.io/dry-run";

/// A policy, or a part of one, that is not enforced as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unenforceable {
    pub kind: PolicyKind,
    /// `namespace/name`.
    pub policy: Arc<str>,
    /// Path of the field.
    pub field: String,
    /// What is wrong and what to write instead.
    pub fix: String,
    pub effect: Effect,
}

/// What a policy does that is not enforced as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Every connection to the workloads that it selects is denied.
    Denies,
    /// Plaintext to the workloads that it selects is refused.
    RefusesPlaintext,
    /// Nothing: the policy is not for this mesh's L4 (targetRefs, a root-namespace PeerAuthentication with a selector) or
    /// is a dry run; or the field is an entry that names nothing.
    Nothing,
}

impl Effect {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Denies => "denies",
            Self::RefusesPlaintext => "refuses_plaintext",
            Self::Nothing => "nothing",
        }
    }
}

/// Every policy of a snapshot, compiled and indexed by the workloads that it selects. The default knows no workload, and
/// so denies everything.
#[derive(Debug, Default)]
pub struct Rulebook {
    workloads: HashMap<Arc<str>, Selected>,
    problems: Vec<Unenforceable>,
    gaps: Vec<Arc<PolicyGap>>,
    root_namespace: Arc<str>,
    /// Every policy with what it is for, those that select nothing too: for explaining, not for deciding.
    policies: ByNamespace,
}

/// Policies by namespace; `None` is the whole mesh.
pub(super) type ByNamespace = HashMap<Option<Arc<str>>, Vec<(Scope, Compiled)>>;

/// What holds for one workload.
#[derive(Debug, Default)]
pub(super) struct Selected {
    pub strictness: Strictness,
    /// `namespace/name` of a policy that can't be enforced.
    pub unenforceable: Option<Arc<str>>,
    /// What could not be read and may have held policies for it.
    pub incomplete: Option<Arc<str>>,
    pub deny: Vec<Arc<Policy>>,
    pub allow: Vec<Arc<Policy>>,
    pub dry_run: Vec<Arc<Policy>>,
}

/// A policy ready to be given to workloads.
#[derive(Debug, Clone)]
pub(super) enum Compiled {
    Enforced(Arc<Policy>),
    Unenforceable(Arc<str>),
}

#[derive(Debug, Default)]
struct Compiler {
    policies: ByNamespace,
    gaps: Vec<(Scope, Arc<str>)>,
    /// Trust domains that mean the same.
    domains: Arc<[Arc<str>]>,
    levels: Levels,
    problems: Vec<Unenforceable>,
}

impl Rulebook {
    /// Compiles a snapshot's policies. Policies that can't be enforced deny for the workloads that they select.
    #[must_use]
    pub fn compile(snapshot: &Snapshot) -> Self {
        let mut compiler = Compiler { domains: Arc::clone(&snapshot.trust_domains), ..Compiler::default() };
        for policy in &snapshot.authorization_policies {
            compiler.add_authorization(policy, &snapshot.root_namespace);
        }
        for policy in &snapshot.peer_authentications {
            let (namespace, name) = (policy.metadata.namespace.as_deref(), policy.metadata.name.as_deref());
            let namespace = namespace.unwrap_or_default();
            let qualified = qualified(namespace, name.unwrap_or_default());
            let taken = compiler.levels.add(Arc::clone(&qualified), namespace, &snapshot.root_namespace, &policy.spec);
            compiler.note_peer_authentication(&qualified, taken);
        }
        for policy in &snapshot.invalid_policies {
            compiler.add_invalid(policy, &snapshot.root_namespace);
        }
        for gap in &snapshot.policy_gaps {
            let scope = match &gap.namespace {
                Some(namespace) => Scope::new(namespace, &snapshot.root_namespace, BTreeMap::new()),
                None => Scope { namespace: None, labels: BTreeMap::new() },
            };
            compiler.gaps.push((scope, Arc::clone(&gap.source)));
        }
        let workloads = snapshot.workloads.iter().map(|(uid, workload)| (Arc::clone(uid), compiler.select(workload)));
        Self {
            workloads: workloads.collect(),
            problems: compiler.problems,
            gaps: snapshot.policy_gaps.clone(),
            root_namespace: Arc::clone(&snapshot.root_namespace),
            policies: compiler.policies,
        }
    }

    /// Where policies may be missing: connections there are denied.
    #[must_use]
    pub fn gaps(&self) -> &[Arc<PolicyGap>] {
        &self.gaps
    }

    /// What is not enforced as written, in the order of the snapshot's policies.
    #[must_use]
    pub fn problems(&self) -> &[Unenforceable] {
        &self.problems
    }

    pub(super) fn of(&self, uid: &str) -> Option<&Selected> {
        self.workloads.get(uid)
    }

    /// What is not enforced as written among the policies that may be for a namespace's workloads.
    pub(super) fn problems_at(&self, namespace: &str) -> impl Iterator<Item = &Unenforceable> {
        self.problems.iter().filter(move |problem| {
            let of = problem.policy.split_once('/').map_or("", |(namespace, _)| namespace);
            of == namespace || *of == *self.root_namespace
        })
    }

    /// Policies of the whole mesh, then of a namespace, whether they select its workloads or not.
    pub(super) fn policies(&self, namespace: &Arc<str>) -> impl Iterator<Item = &(Scope, Compiled)> {
        let of = |namespace: Option<Arc<str>>| self.policies.get(&namespace).into_iter().flatten();
        of(None).chain(of(Some(Arc::clone(namespace))))
    }
}

impl Compiler {
    fn add_authorization(&mut self, policy: &AuthorizationPolicy, root_namespace: &str) {
        let metadata = &policy.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let name = qualified(namespace, metadata.name.as_deref().unwrap_or_default());
        let kind = PolicyKind::AuthorizationPolicy;
        if parse::is_elsewhere(&policy.spec) {
            let fix = "is for a gateway or waypoint, and not enforced here: use selector for an L4 policy".into();
            let fault = Fault { field: "spec.targetRefs".into(), fix };
            return self.note(kind, &name, vec![fault], Effect::Nothing);
        }
        let dry_run = metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(DRY_RUN))
            .is_some_and(|text| is_true(text));
        let scope = Scope::new(namespace, root_namespace, parse::labels(policy.spec.selector.as_ref()));
        match parse::parse(Surroundings { namespace, domains: &self.domains }, &policy.spec) {
            Ok(Parsed { action, rules, idle }) => {
                self.note(kind, &name, idle, Effect::Nothing);
                self.add(scope, Compiled::Enforced(Arc::new(Policy { name, action, dry_run, rules })));
            }
            Err(faults) if dry_run => self.note(kind, &name, faults, Effect::Nothing),
            Err(faults) => {
                self.note(kind, &name, faults, Effect::Denies);
                self.add(scope, Compiled::Unenforceable(name));
            }
        }
    }

    fn add_invalid(&mut self, policy: &InvalidPolicy, root_namespace: &str) {
        let InvalidPolicy { kind, namespace, name, selector, field, message, decides } = policy;
        let name = qualified(namespace, name);
        let selected_root =
            selector.as_ref().is_some_and(|labels| !labels.is_empty()) && **namespace == *root_namespace;
        let effect = match kind {
            _ if !decides => Effect::Nothing,
            PolicyKind::AuthorizationPolicy => Effect::Denies,
            PolicyKind::PeerAuthentication if selected_root => Effect::Nothing,
            PolicyKind::PeerAuthentication => Effect::RefusesPlaintext,
        };
        self.note(*kind, &name, vec![Fault { field: field.clone(), fix: message.clone() }], effect);
        let selector = WorkloadSelector { match_labels: selector.clone() };
        let scope = Scope::new(namespace, root_namespace, parse::labels(Some(&selector)));
        match effect {
            Effect::Denies => self.add(scope, Compiled::Unenforceable(name)),
            Effect::RefusesPlaintext => self.levels.add_faulty(name, scope),
            Effect::Nothing => {}
        }
    }

    fn note_peer_authentication(&mut self, policy: &Arc<str>, taken: Taken) {
        let kind = PolicyKind::PeerAuthentication;
        match taken {
            Taken::InForce => {}
            Taken::Ignored => {
                let fix =
                    "a PeerAuthentication of the root namespace is for the whole mesh, and ignored with a selector"
                        .into();
                self.note(kind, policy, vec![Fault { field: "spec.selector".into(), fix }], Effect::Nothing);
            }
            Taken::Faulty(faults) => self.note(kind, policy, faults, Effect::RefusesPlaintext),
        }
    }

    fn note(&mut self, kind: PolicyKind, policy: &Arc<str>, faults: Vec<Fault>, effect: Effect) {
        let policy = || Arc::clone(policy);
        self.problems.extend(faults.into_iter().map(|Fault { field, fix }| Unenforceable {
            kind,
            policy: policy(),
            field,
            fix,
            effect,
        }));
    }

    fn add(&mut self, scope: Scope, policy: Compiled) {
        self.policies.entry(scope.namespace.clone()).or_default().push((scope, policy));
    }

    fn select(&self, workload: &Workload) -> Selected {
        let mut selected =
            Selected { strictness: self.levels.of(&workload.namespace, &workload.labels), ..Selected::default() };
        let missing = |scope: &Scope| scope.namespace.as_ref().is_none_or(|of| *of == workload.namespace);
        selected.incomplete = self.gaps.iter().find(|(scope, _)| missing(scope)).map(|(_, source)| Arc::clone(source));
        let of = |namespace: Option<Arc<str>>| self.policies.get(&namespace).into_iter().flatten();
        for (scope, compiled) in of(None).chain(of(Some(Arc::clone(&workload.namespace)))) {
            if !scope.selects(&workload.labels) {
                continue;
            }
            match compiled {
                Compiled::Unenforceable(name) => {
                    selected.unenforceable.get_or_insert_with(|| Arc::clone(name));
                }
                Compiled::Enforced(policy) => match policy.action {
                    _ if policy.dry_run => selected.dry_run.push(Arc::clone(policy)),
                    Action::Deny => selected.deny.push(Arc::clone(policy)),
                    Action::Allow => selected.allow.push(Arc::clone(policy)),
                },
            }
        }
        selected
    }
}

fn qualified(namespace: &str, name: &str) -> Arc<str> {
    format!("{namespace}/{name}").into()
}

/// As Go's `strconv.ParseBool`, which Istio reads the annotation with.
fn is_true(text: &str) -> bool {
    matches!(text, "1" | "t" | "T" | "true" | "TRUE" | "True")
}
