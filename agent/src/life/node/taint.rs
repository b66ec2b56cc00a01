//! The startup taint: pods are not put onto a node before its agent can capture them.
//!
//! Whoever makes nodes puts it on (a node pool's configuration); the agent takes it off, and puts it on again only where it was told
//! to. It never touches another taint: what it writes holds only if nobody has changed the list meanwhile.

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::life::limits;

/// Key of the taint.
pub const TAINT: &str = "heddle.dev/not-ready";
const EFFECT: &str = "NoSchedule";

/// What is known of the taint, and since when the agent is not ready.
#[derive(Debug, Default)]
pub(super) struct State {
    /// As it was written or found last; `None` while nobody has looked.
    on: Option<bool>,
    unready_since: Option<Instant>,
    looked: Option<Instant>,
}

impl State {
    /// Whether the taint should be on, where that is to be written or looked at again.
    pub fn wanted(&mut self, ready: bool, keeps_taint: bool, now: Instant) -> Option<bool> {
        if ready {
            self.unready_since = None;
            // Somebody may have put it on again: a node that was made anew under its name.
            let stale = self.looked.is_none_or(|looked| now.duration_since(looked) >= limits::NODE_TAINT_LOOK);
            return (self.on != Some(false) || stale).then_some(false);
        }
        let since = *self.unready_since.get_or_insert(now);
        // A short wait for something is no reason to keep pods away.
        let lasts = now.duration_since(since) >= limits::NODE_TAINT_AFTER;
        (keeps_taint && lasts && self.on != Some(true)).then_some(true)
    }

    /// Notes what was written.
    pub fn is(&mut self, on: bool) {
        self.on = Some(on);
        self.looked = Some(Instant::now());
    }
}

/// Puts the taint on or takes it off. Whether that changed anything.
pub(super) async fn set(client: &Client, node: &str, on: bool) -> Result<bool, kube::Error> {
    let nodes = Api::<Node>::all(client.clone());
    let found = nodes.get(node).await?;
    let taints = found.spec.and_then(|spec| spec.taints);
    let Some(patch) = patch(taints.as_deref(), on) else { return Ok(false) };
    let patch = serde_json::from_value(patch).map_err(kube::Error::SerdeError)?;
    nodes.patch(node, &PatchParams::default(), &Patch::<Node>::Json(patch)).await?;
    Ok(true)
}

/// What makes the list of taints so, if it is not; refused by the API server where the list is another by then.
fn patch(taints: Option<&[Taint]>, on: bool) -> Option<Value> {
    const PATH: &str = "/spec/taints";
    let ours = |taint: &Taint| taint.key == TAINT;
    let known = taints.unwrap_or_default();
    if known.iter().any(ours) == on {
        return None;
    }
    let mut wanted: Vec<Taint> = known.iter().filter(|taint| !ours(taint)).cloned().collect();
    if on {
        wanted.push(Taint { key: TAINT.to_owned(), effect: EFFECT.to_owned(), ..Taint::default() });
    }
    let test = json!({"op": "test", "path": PATH, "value": taints});
    let write = json!({"op": if taints.is_some() { "replace" } else { "add" }, "path": PATH, "value": wanted});
    // Of a list that is not there nothing can be tested.
    Some(if taints.is_some() { json!([test, write]) } else { json!([write]) })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_taint_goes_when_the_agent_is_ready_and_comes_back_only_where_it_is_kept() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for keeps in [false, true] {
            let mut state = State::default();
            assert_eq!(state.wanted(false, keeps, at(0)), None, "not before it lasts");
            assert_eq!(state.wanted(true, keeps, at(1)), Some(false));
            state.is(false);
            assert_eq!(state.wanted(true, keeps, at(2)), None, "once");
            assert_eq!(state.wanted(false, keeps, at(3)), None);
            assert_eq!(state.wanted(true, keeps, at(4)), None, "a short wait changes nothing");
            assert_eq!(state.wanted(false, keeps, at(5)), None);
            let later = at(5) + limits::NODE_TAINT_AFTER;
            assert_eq!(state.wanted(false, keeps, later), keeps.then_some(true));
            if keeps {
                state.is(true);
                assert_eq!(state.wanted(false, keeps, later), None);
                assert_eq!(state.wanted(true, keeps, later), Some(false));
            }
        }
        let mut state = State::default();
        state.is(false);
        let later = Instant::now() + limits::NODE_TAINT_LOOK;
        assert_eq!(state.wanted(true, false, later), Some(false), "it is looked at again");
    }

    #[test]
    fn other_taints_are_left_as_they_are() {
        let taint = |key: &str| Taint { key: key.to_owned(), effect: "NoExecute".to_owned(), ..Taint::default() };
        let (ours, other) = (taint(TAINT), taint("example.com/gpu"));
        assert_eq!(patch(None, false), None);
        assert_eq!(patch(Some(std::slice::from_ref(&other)), false), None);
        assert_eq!(patch(Some(std::slice::from_ref(&ours)), true), None);
        let off = patch(Some(&[other.clone(), ours.clone()]), false).unwrap();
        assert_eq!(off[0], json!({"op": "test", "path": "/spec/taints", "value": [other, ours]}));
        assert_eq!(off[1], json!({"op": "replace", "path": "/spec/taints", "value": [other]}));
        let on = patch(None, true).unwrap();
        assert_eq!(on[0]["op"], "add");
        assert_eq!(on[0]["value"], json!([{"key": TAINT, "effect": "NoSchedule"}]));
    }
}
