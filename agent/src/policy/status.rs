//! What is said of a policy in its own status: whether it is enforced as it is written. Pure.
//!
//! One condition is heddle's, the others belong to whoever wrote them and stay as they are. It changes only when what it says
//! does, so that who writes it never follows its own writing.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};

use super::{Effect, Unenforceable};

/// The type of heddle's condition. Other meshes write theirs beside it.
pub const CONDITION: &str = "heddle.dev/Accepted";
/// As the API server bounds `metav1.Condition.message` (bytes).
const MESSAGE: usize = 32_768;

/// What is wrong with each policy, by kind and `namespace/name`.
pub type Faults<'a> = BTreeMap<(&'static str, &'a str), Vec<&'a Unenforceable>>;

/// Sorts what a rulebook found by the policy that it is about.
#[must_use]
pub fn faults(problems: &[Unenforceable]) -> Faults<'_> {
    let mut faults = Faults::new();
    for problem in problems {
        faults.entry((problem.kind.as_str(), &*problem.policy)).or_default().push(problem);
    }
    faults
}

/// What `status.conditions` of a policy should be; `None` where they are so already. `now` is RFC 3339.
#[must_use]
pub fn conditions(policy: &Value, problems: &[&Unenforceable], now: &str) -> Option<Value> {
    let generation = policy.pointer("/metadata/generation").cloned().unwrap_or(Value::Null);
    let mut message: String = match problems {
        [] => "in force as it is written".to_owned(),
        problems => problems.iter().map(|problem| told(problem)).collect::<Vec<_>>().join("\n"),
    };
    message.truncate(message.floor_char_boundary(MESSAGE));
    let (status, reason) = match problems {
        [] => ("True", "Enforced"),
        problems if problems.iter().all(|problem| problem.effect == Effect::Nothing) => ("True", "PartlyMeaningless"),
        _ => ("False", "Unenforceable"),
    };
    let there = policy.pointer("/status/conditions").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let ours = |condition: &&Value| condition["type"] == CONDITION;
    let before = there.iter().find(ours).unwrap_or(&Value::Null);
    let mut next = json!({"type": CONDITION, "status": status, "reason": reason, "message": message});
    if !generation.is_null() {
        next["observedGeneration"] = generation;
    }
    // It tells since when the status is what it is, not when somebody looked.
    let unchanged = before["status"] == status && before["lastTransitionTime"].is_string();
    next["lastTransitionTime"] = if unchanged { before["lastTransitionTime"].clone() } else { json!(now) };
    if *before == next {
        return None;
    }
    let mut all: Vec<Value> = there.iter().filter(|condition| !ours(condition)).cloned().collect();
    all.push(next);
    Some(Value::Array(all))
}

fn told(problem: &Unenforceable) -> String {
    let effect = match problem.effect {
        Effect::Denies => "until then it denies every connection where it holds",
        Effect::RefusesPlaintext => "until then plaintext is refused where it holds",
        Effect::Nothing => "until then it has no effect",
    };
    format!("{}: {}; {effect}", problem.field, problem.fix)
}

/// A name for what is asked of [`faults`].
#[must_use]
pub fn qualified(policy: &Value) -> Arc<str> {
    let part = |field: &str| policy["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", part("namespace"), part("name")).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::PolicyKind;

    const NOW: &str = "2026-01-02T00:00:00Z";
    const BEFORE: &str = "2026-01-01T00:00:00Z";

    fn problem(effect: Effect) -> Unenforceable {
        let (field, fix) = ("spec.rules[0].to[0].operation.paths".to_owned(), "is HTTP: remove it".to_owned());
        Unenforceable { kind: PolicyKind::AuthorizationPolicy, policy: "shop/a".into(), field, fix, effect }
    }

    fn policy(conditions: Value) -> Value {
        json!({"metadata": {"namespace": "shop", "name": "a", "generation": 3}, "status": {"conditions": conditions}})
    }

    /// What is written of it, and that writing that again would change nothing.
    fn written(mut policy: Value, problems: &[&Unenforceable]) -> Value {
        let next = conditions(&policy, problems, NOW).unwrap();
        policy["status"]["conditions"] = next.clone();
        assert_eq!(conditions(&policy, problems, "2027-01-01T00:00:00Z"), None, "and then it stays");
        next
    }

    #[test]
    fn a_policy_that_is_enforced_is_accepted_at_its_generation() {
        let condition = json!({
            "type": CONDITION, "status": "True", "reason": "Enforced", "message": "in force as it is written",
            "observedGeneration": 3, "lastTransitionTime": NOW,
        });
        for before in [json!([]), Value::Null, json!("nonsense")] {
            assert_eq!(written(policy(before), &[]), json!([condition]));
        }
    }

    #[test]
    fn one_that_is_not_is_told_with_field_fix_and_effect() {
        let next = written(policy(json!([])), &[&problem(Effect::Denies)]);
        assert_eq!((&next[0]["status"], &next[0]["reason"]), (&json!("False"), &json!("Unenforceable")));
        assert_eq!(
            next[0]["message"],
            "spec.rules[0].to[0].operation.paths: is HTTP: remove it; until then it denies every connection where it holds"
        );
        let next = written(policy(json!([])), &[&problem(Effect::Nothing)]);
        assert_eq!((&next[0]["status"], &next[0]["reason"]), (&json!("True"), &json!("PartlyMeaningless")));
    }

    #[test]
    fn conditions_of_others_stay_as_they_are() {
        let other = json!({"type": "Reconciled", "status": "True", "extra": {"a": 1}});
        let ours = json!({"type": CONDITION, "status": "True", "lastTransitionTime": BEFORE});
        let next = written(policy(json!([ours, other])), &[&problem(Effect::Denies)]);
        assert_eq!(next[0], other);
        assert_eq!((next[1]["status"].as_str(), next[1]["lastTransitionTime"].as_str()), (Some("False"), Some(NOW)));
    }

    #[test]
    fn the_time_is_that_of_the_last_change_of_mind() {
        let ours =
            json!({"type": CONDITION, "status": "False", "reason": "Unenforceable", "lastTransitionTime": BEFORE});
        let next = written(policy(json!([ours])), &[&problem(Effect::Denies)]);
        assert_eq!(next[0]["lastTransitionTime"], BEFORE);
    }

    #[test]
    fn many_problems_fit_what_the_api_server_takes() {
        let problems = vec![problem(Effect::Denies); 1_000];
        let next = written(policy(json!([])), &problems.iter().collect::<Vec<_>>());
        assert!(next[0]["message"].as_str().unwrap().len() <= MESSAGE);
    }

    #[test]
    fn faults_are_found_by_kind_and_name() {
        let problems = [problem(Effect::Denies), problem(Effect::Nothing)];
        let faults = faults(&problems);
        let name = qualified(&policy(Value::Null));
        assert_eq!(faults[&("AuthorizationPolicy", &*name)].len(), 2);
        assert!(!faults.contains_key(&("PeerAuthentication", &*name)));
    }
}
