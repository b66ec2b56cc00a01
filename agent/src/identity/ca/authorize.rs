//! May this caller have this identity? Pure decisions, over what the API server says of a token and of pods.
//!
//! Stricter than the reference: the caller is an agent's pod, which exists with that UID, account and node and has not ended;
//! the identity is of our trust domain and has a pod on that node that has not ended. Each step takes what the one before made:
//! nobody else can make an [`Authorized`], and without one nothing is signed.

use std::{str::FromStr, sync::Arc, time::SystemTime};

use super::{ServiceAccount, refusal::Refusal, review::Review};
use crate::identity::SpiffeId;

/// Who may call, and with what.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    /// That a token must be for.
    pub audience: String,
    /// Accounts of agents.
    pub agents: Vec<ServiceAccount>,
}

/// A caller's token is good, and bound to this pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bound {
    account: ServiceAccount,
    pod: Arc<str>,
    uid: Arc<str>,
    /// Where the API server knows it.
    node: Option<Arc<str>>,
}

/// What is known of a pod that is scheduled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub uid: Arc<str>,
    pub account: Arc<str>,
    /// Empty while it is nowhere.
    pub node: Arc<str>,
    pub phase: Phase,
    /// `deletionTimestamp`: when it must be gone, its grace period included.
    pub ends: Option<SystemTime>,
}

/// Whether a pod's containers may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

impl Phase {
    pub fn read(phase: Option<&str>) -> Self {
        match phase {
            Some("Pending") => Self::Pending,
            Some("Running") => Self::Running,
            Some("Succeeded") => Self::Succeeded,
            Some("Failed") => Self::Failed,
            _ => Self::Unknown,
        }
    }
}

impl Pod {
    /// Why it may not have an identity any more, or yet.
    pub fn ended(&self, now: SystemTime) -> Option<&'static str> {
        match self.phase {
            Phase::Pending | Phase::Running => {}
            Phase::Succeeded => return Some("has succeeded"),
            Phase::Failed => return Some("has failed"),
            Phase::Unknown => return Some("is in no known phase"),
        }
        if self.ends.is_some_and(|end| end <= now) {
            return Some("is past its deletion and grace period");
        }
        self.node.is_empty().then_some("is on no node")
    }
}

/// The caller: an agent, on its node; or whoever holds the shared token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller(Who);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    Agent { node: Arc<str>, pod: Arc<str>, uid: Arc<str> },
    Holder,
}

impl Caller {
    /// Its node, where it has one.
    pub fn node(&self) -> Option<&Arc<str>> {
        match &self.0 {
            Who::Agent { node, .. } => Some(node),
            Who::Holder => None,
        }
    }

    /// What tells it from other callers: its pod's UID.
    pub fn id(&self) -> &str {
        match &self.0 {
            Who::Agent { uid, .. } => uid,
            Who::Holder => "",
        }
    }

    /// For the log.
    pub fn pod(&self) -> &str {
        match &self.0 {
            Who::Agent { pod, .. } => pod,
            Who::Holder => "",
        }
    }
}

/// A caller that may have this identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Authorized {
    caller: Caller,
    identity: SpiffeId,
}

impl Authorized {
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Whoever holds the shared token may have any identity of the trust domain.
    pub fn holder(_proof: Holder, identity: SpiffeId) -> Self {
        Self { caller: Caller(Who::Holder), identity }
    }

    #[cfg(any(test, fuzzing))]
    pub fn unasked(identity: SpiffeId) -> Self {
        Self::holder(Holder(()), identity)
    }
}

/// The shared token was presented.
#[derive(Debug)]
pub(super) struct Holder(());

/// The caller holds the shared token, compared in constant time.
pub(super) fn holder(presented: &[u8], expected: &[u8]) -> Result<Holder, Refusal> {
    use subtle::ConstantTimeEq;
    if expected.is_empty() {
        return Err(Refusal::TokenUnreadable("it is empty".to_owned()));
    }
    if bool::from(presented.ct_eq(expected)) { Ok(Holder(())) } else { Err(Refusal::Token) }
}

/// What the API server says of the token is good enough.
pub(super) fn bound(rules: &Rules, review: &Review) -> Result<Bound, Refusal> {
    if !review.authenticated {
        return Err(Refusal::TokenRejected(review.error.clone()));
    }
    // A server that knows of no audiences leaves them out: then the token may be for anybody.
    if !review.audiences.contains(&rules.audience) {
        return Err(Refusal::TokenAudience { presented: review.audiences.clone(), expected: rules.audience.clone() });
    }
    let stranger = || Refusal::CallerAccount(review.username.clone());
    let account = review.username.strip_prefix(USERNAME).ok_or_else(stranger)?;
    let (namespace, name) = account.split_once(':').ok_or_else(stranger)?;
    let account = rules.agents.iter().find(|agent| agent.namespace == namespace && agent.name == name);
    let account = account.ok_or_else(stranger)?;
    // A name is not enough: another authenticator could hand out one like it, but not these groups beside it.
    for group in [GROUP.to_owned(), format!("{GROUP}:{namespace}")] {
        if !review.groups.contains(&group) {
            return Err(stranger());
        }
    }
    let one = |values: &[String]| match values {
        [value] if !value.is_empty() => Some(Arc::<str>::from(value.as_str())),
        _ => None,
    };
    let (Some(pod), Some(uid)) = (one(&review.pod_names), one(&review.pod_uids)) else {
        return Err(Refusal::TokenUnbound);
    };
    let node = match review.node_names.as_slice() {
        [] => None,
        names => Some(one(names).ok_or(Refusal::TokenUnbound)?),
    };
    Ok(Bound { account: account.clone(), pod, uid, node })
}

const USERNAME: &str = "system:serviceaccount:";
const GROUP: &str = "system:serviceaccounts";

impl Bound {
    pub fn namespace(&self) -> &str {
        &self.account.namespace
    }

    pub fn pod(&self) -> &str {
        &self.pod
    }

    /// The caller's pod is the one that it was, and has not ended.
    pub fn stand(&self, pod: Option<&Pod>, now: SystemTime) -> Result<Caller, Refusal> {
        let name = || format!("{}/{}", self.account.namespace, self.pod);
        let Some(pod) = pod.filter(|pod| *pod.namespace == *self.account.namespace && pod.name == self.pod) else {
            return Err(Refusal::CallerPodGone(name()));
        };
        if pod.uid != self.uid {
            let (found, claimed) = (pod.uid.to_string(), self.uid.to_string());
            return Err(Refusal::CallerPodUid { pod: name(), found, claimed });
        }
        if *pod.account != *self.account.name {
            let (found, claimed) = (pod.account.to_string(), self.account.name.clone());
            return Err(Refusal::CallerPodAccount { pod: name(), found, claimed });
        }
        if let Some(why) = pod.ended(now) {
            return Err(Refusal::CallerPodEnded(name(), why));
        }
        if let Some(claimed) = self.node.as_ref().filter(|node| **node != pod.node) {
            let (found, claimed) = (pod.node.to_string(), claimed.to_string());
            return Err(Refusal::CallerNode { pod: name(), found, claimed });
        }
        Ok(Caller(Who::Agent { node: Arc::clone(&pod.node), pod: name().into(), uid: Arc::clone(&self.uid) }))
    }
}

/// Some pod of the identity is on the caller's node and has not ended.
pub(super) fn here<'a>(
    caller: &Caller,
    identity: &SpiffeId,
    pods: impl IntoIterator<Item = &'a Pod>,
    now: SystemTime,
) -> Result<Authorized, Refusal> {
    let Who::Agent { node, .. } = &caller.0 else { return Err(Refusal::Token) };
    let mut why = None;
    for pod in pods {
        let own =
            pod.node == *node && *pod.namespace == *identity.namespace() && *pod.account == *identity.service_account();
        if !own {
            continue;
        }
        why = pod.ended(now);
        if why.is_none() {
            return Ok(Authorized { caller: caller.clone(), identity: identity.clone() });
        }
    }
    let (identity, node) = (identity.clone(), node.to_string());
    Err(match why {
        Some(why) => Refusal::Ended { identity, node, why },
        None => Refusal::NotOnNode { identity, node },
    })
}

impl FromStr for ServiceAccount {
    type Err = String;

    /// `NAMESPACE/NAME`.
    fn from_str(text: &str) -> Result<Self, String> {
        let good = |part: &&str| {
            let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
            !part.is_empty() && part.bytes().all(allowed)
        };
        match text.split_once('/') {
            Some((namespace, name)) if [namespace, name].iter().all(good) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("is no NAMESPACE/NAME of a service account".to_owned()),
        }
    }
}
