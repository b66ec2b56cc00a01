//! PeerAuthentication: where plaintext is refused.
//!
//! Workload before namespace before mesh, the oldest of a level wins, `UNSET` asks the next level, and what nobody says is
//! PERMISSIVE. `DISABLE` is like PERMISSIVE at every level: traffic between captured pods is encrypted all the same. A
//! PeerAuthentication that can't be understood is STRICT where it holds, whatever others say.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    parse::{Fault, labels, selector_faults},
    rules::Scope,
};
use crate::cluster::kinds::{MutualTls, PeerAuthenticationSpec};

/// Where a workload refuses plaintext, and by which policy (`namespace/name`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strictness {
    /// Ports with a mode of their own.
    ports: BTreeMap<u16, Answer>,
    /// Every other port.
    others: Answer,
}

/// What holds for a port, and who says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Answer {
    Strict(Arc<str>),
    Open(Arc<str>),
    /// Nobody says anything: open.
    #[default]
    Unsaid,
}

impl Strictness {
    /// The policy that refuses plaintext to a pod's port.
    pub fn refuses(&self, port: u16) -> Option<&Arc<str>> {
        match self.answer(port) {
            Answer::Strict(policy) => Some(policy),
            Answer::Open(_) | Answer::Unsaid => None,
        }
    }

    /// The policy that decides about a port's plaintext, whatever it says.
    pub fn by(&self, port: u16) -> Option<&Arc<str>> {
        match self.answer(port) {
            Answer::Strict(policy) | Answer::Open(policy) => Some(policy),
            Answer::Unsaid => None,
        }
    }

    fn answer(&self, port: u16) -> &Answer {
        self.ports.get(&port).unwrap_or(&self.others)
    }
}

/// What a level says. `None` is `UNSET`.
type Mode = Option<bool>;

#[derive(Debug)]
struct Level {
    policy: Arc<str>,
    scope: Scope,
    strict: Mode,
    ports: BTreeMap<u16, Mode>,
}

impl Level {
    fn answer(&self, strict: Mode) -> Option<Answer> {
        let policy = Arc::clone(&self.policy);
        strict.map(|strict| if strict { Answer::Strict(policy) } else { Answer::Open(policy) })
    }
}

/// Every PeerAuthentication of the mesh, by what it is for. Each list is oldest first.
#[derive(Debug, Default)]
pub struct Levels {
    mesh: Vec<Level>,
    namespaces: HashMap<Arc<str>, Vec<Level>>,
    workloads: HashMap<Arc<str>, Vec<Level>>,
    /// Not understood: STRICT.
    faulty: Vec<(Arc<str>, Scope)>,
}

/// What became of a policy that was put in.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    InForce,
    /// Root namespace and selector: for nothing, as in Istio.
    Ignored,
    Faulty(Vec<Fault>),
}

impl Levels {
    /// Puts in a policy; older ones first.
    pub fn add(
        &mut self,
        policy: Arc<str>,
        namespace: &str,
        root_namespace: &str,
        spec: &PeerAuthenticationSpec,
    ) -> Taken {
        let selects = spec
            .selector
            .as_ref()
            .and_then(|selector| selector.match_labels.as_ref())
            .is_some_and(|labels| !labels.is_empty());
        if namespace == root_namespace && selects {
            return Taken::Ignored;
        }
        let scope = Scope::new(namespace, root_namespace, labels(spec.selector.as_ref()));
        match read(spec, selects) {
            Ok((strict, ports)) => {
                let of_namespace = Arc::from(namespace);
                let level = match (&scope.namespace, scope.labels.is_empty()) {
                    (None, _) => &mut self.mesh,
                    (Some(_), true) => self.namespaces.entry(of_namespace).or_default(),
                    (Some(_), false) => self.workloads.entry(of_namespace).or_default(),
                };
                level.push(Level { policy, scope, strict, ports });
                Taken::InForce
            }
            Err(faults) => {
                self.add_faulty(policy, scope);
                Taken::Faulty(faults)
            }
        }
    }

    /// Puts in a policy that nobody understands.
    pub fn add_faulty(&mut self, policy: Arc<str>, scope: Scope) {
        self.faulty.push((policy, scope));
    }

    /// What holds for a workload.
    pub fn of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Strictness {
        let in_scope =
            |scope: &Scope| scope.namespace.as_deref().is_none_or(|of| of == namespace) && scope.selects(labels);
        if let Some((policy, _)) = self.faulty.iter().find(|(_, scope)| in_scope(scope)) {
            return Strictness { ports: BTreeMap::new(), others: Answer::Strict(Arc::clone(policy)) };
        }
        let workload = self.workloads.get(namespace).into_iter().flatten().find(|level| level.scope.selects(labels));
        let of_namespace = self.namespaces.get(namespace).and_then(|levels| levels.first());
        let levels = [workload, of_namespace, self.mesh.first()];
        let others = levels.into_iter().flatten().find_map(|level| level.answer(level.strict)).unwrap_or_default();
        let own = |level: &Level| {
            let ports = level.ports.iter();
            ports.map(|(port, strict)| (*port, level.answer(*strict).unwrap_or_else(|| others.clone()))).collect()
        };
        Strictness { ports: workload.map(own).unwrap_or_default(), others }
    }
}

fn read(spec: &PeerAuthenticationSpec, selects: bool) -> Result<(Mode, BTreeMap<u16, Mode>), Vec<Fault>> {
    let PeerAuthenticationSpec { selector, mtls, port_level_mtls } = spec;
    let mut faults: Vec<Fault> = selector.iter().flat_map(selector_faults).collect();
    let mut mode = |field: String, mtls: Option<&MutualTls>| match mtls.and_then(|mtls| mtls.mode.as_deref()) {
        None | Some("UNSET") => None,
        Some("STRICT") => Some(true),
        Some("PERMISSIVE" | "DISABLE") => Some(false),
        Some(other) => {
            let fix = format!("{other:?} is no mode: use UNSET, DISABLE, PERMISSIVE or STRICT");
            faults.push(Fault { field, fix });
            None
        }
    };
    let strict = mode("spec.mtls.mode".into(), mtls.as_ref());
    let mut ports = BTreeMap::new();
    let mut bad_ports = Vec::new();
    for (port, mtls) in port_level_mtls.iter().flatten() {
        let strict = mode(format!("spec.portLevelMtls.{port}.mode"), Some(mtls));
        match port.parse::<u16>() {
            Ok(number) if number != 0 && number.to_string() == *port => {
                ports.insert(number, strict);
            }
            _ => bad_ports.push(Fault {
                field: format!("spec.portLevelMtls.{port}"),
                fix: format!("{port:?} is no port of a pod: write one number from 1 to 65535"),
            }),
        }
    }
    faults.extend(bad_ports);
    if !ports.is_empty() && !selects {
        let fix = "needs a selector with labels: ports are a workload's".into();
        faults.push(Fault { field: "spec.portLevelMtls".into(), fix });
    }
    if faults.is_empty() { Ok((strict, ports)) } else { Err(faults) }
}
