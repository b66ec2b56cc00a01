//! The decision: a pure function of rules and request, and the only maker of a [`Permit`].
//!
//! Plaintext where TLS is required, then policies that can't be enforced, then DENY, then ALLOW, and a permit only where no
//! policy may be missing. Whatever is unknown denies.

use std::sync::Arc;

use super::{Action, Denial, Outcome, Permit, Request, Rulebook};

/// May it? Its cost grows with the policies that select the destination, and with nothing else.
///
/// # Errors
/// The reason why not.
pub fn decide(rules: &Rulebook, request: &Request) -> Outcome {
    let uid = &request.destination.uid;
    let selected = rules.of(uid).ok_or_else(|| Denial::UnknownWorkload { uid: Arc::clone(uid) })?;
    if request.principal.is_none()
        && let Some(policy) = selected.strictness.refuses(request.destination_port)
    {
        return Err(Denial::PlaintextRefused { policy: Arc::clone(policy) });
    }
    if let Some(policy) = &selected.unenforceable {
        return Err(Denial::Unenforceable { policy: Arc::clone(policy) });
    }
    if let Some(policy) = selected.deny.iter().find(|policy| policy.matches(request)) {
        return Err(Denial::Explicit { policy: Arc::clone(&policy.name) });
    }
    let by = if selected.allow.is_empty() {
        None
    } else {
        Some(selected.allow.iter().find(|policy| policy.matches(request)).ok_or(Denial::NotAllowed)?)
    };
    match &selected.incomplete {
        // Last, so that it is the reason only of what would be allowed.
        Some(source) => Err(Denial::Incomplete { source_file: Arc::clone(source) }),
        None => Ok(Permit { by: by.map(|policy| Arc::clone(&policy.name)) }),
    }
}

/// What a dry-run policy would have done: it matched, and never decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rehearsal {
    /// `namespace/name`.
    pub policy: Arc<str>,
    pub action: Action,
}

/// The dry-run policies that match a request. Costs nothing where there are none.
#[must_use]
pub fn rehearse(rules: &Rulebook, request: &Request) -> Vec<Rehearsal> {
    let dry_run = rules.of(&request.destination.uid).map(|selected| &*selected.dry_run).unwrap_or_default();
    let matching = dry_run.iter().filter(|policy| policy.matches(request));
    matching.map(|policy| Rehearsal { policy: Arc::clone(&policy.name), action: policy.action }).collect()
}
