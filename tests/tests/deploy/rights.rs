//! What the agents ask of the API server is what their role allows: no less, and nothing that they don't ask.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, ensure};
use heddle_lab::{Lab, Result, needs_root, until};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};

use super::{deploy, documents};

fn rules() -> Result<Vec<PolicyRule>> {
    let all = documents(&fs::read_to_string(deploy().join("agent/rbac.yaml"))?)?;
    let role = all.into_iter().find(|object| object["kind"] == "ClusterRole").context("no ClusterRole")?;
    serde_json::from_value::<ClusterRole>(role)?.rules.context("no rules")
}

#[test]
fn agents_ask_for_what_their_role_allows_and_their_role_allows_no_more() -> Result {
    needs_root!();
    let lab = Lab::builder().kubernetes().start()?;
    let server = lab.pod("shop", "server").on(2).serves(&["echo:7000"]).start()?;
    let client = lab.pod("shop", "client").start()?;
    until(Duration::from_secs(30), "an echo", || {
        let seen = client.connect(server.at(7000)).say("x").with("--expect", 1).run().ok()?;
        seen.error.is_none().then_some(())
    })?;
    let rules = rules()?;
    let of_rules: BTreeSet<(String, String, String)> = rules
        .iter()
        .flat_map(|rule| {
            let each = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
            let (groups, resources) = (each(&rule.api_groups), each(&rule.resources));
            groups.into_iter().flat_map(move |group| {
                let group = group.clone();
                resources.clone().into_iter().flat_map(move |resource| {
                    let (group, resource) = (group.clone(), resource.clone());
                    rule.verbs.iter().map(move |verb| (group.clone(), resource.clone(), verb.clone()))
                })
            })
        })
        .collect();
    ensure!(of_rules.iter().all(|(group, resource, verb)| [group, resource, verb].iter().all(|word| *word != "*")));
    // The plugin's and the lab's own questions have other users.
    let seen = lab.kubernetes()?.verbs_seen();
    let asked: BTreeSet<(String, String, String)> = seen
        .into_iter()
        .filter(|seen| seen.user == "agent")
        .map(|seen| (seen.group.clone(), seen.whole_resource(), seen.verb.to_owned()))
        .collect();
    let missing: Vec<_> = asked.difference(&of_rules).collect();
    ensure!(missing.is_empty(), "agents ask for what deploy/agent/rbac.yaml does not allow: {missing:?}");
    // Events are written of pods that stay uncaptured, and here there is none.
    let unused: Vec<_> = of_rules.difference(&asked).filter(|(_, resource, _)| resource != "events").collect();
    ensure!(unused.is_empty(), "deploy/agent/rbac.yaml allows what no agent asks: {unused:?}");
    Ok(())
}
