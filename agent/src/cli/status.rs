//! `heddle status`: this node's pods and whether they are captured.

use std::process::ExitCode;

use super::{
    ask::{Ask, json, print},
    table::{plain, table},
};
use crate::life::admin::{PathLine, Status};

/// Ends with status 1 when a pod is not captured; with --json only when the agent can't be asked.
pub(super) fn run(ask: &Ask) -> anyhow::Result<ExitCode> {
    let status: Status = ask.get("/status")?;
    if ask.json {
        print(&json(&status)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&text(&status))?;
    Ok(if all_captured(&status) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(super) fn all_captured(status: &Status) -> bool {
    status.pods.iter().all(|pod| pod.state == "captured")
}

pub(super) fn text(status: &Status) -> String {
    let rows: Vec<_> = status
        .pods
        .iter()
        .map(|pod| {
            let lane = match &*pod.lane_reason {
                "" => pod.lane.clone(),
                reason => format!("{} ({reason})", pod.lane),
            };
            let reason = match (&*pod.reason, &*pod.detail) {
                // What is captured can still have something to say of the lane.
                ("", _) => pod.lane_detail.clone(),
                (reason, "") => reason.to_owned(),
                (reason, detail) => format!("{reason}: {detail}"),
            };
            vec![format!("{}/{}", pod.namespace, pod.name), pod.state.clone(), lane, reason]
        })
        .collect();
    let mut text =
        if rows.is_empty() { String::new() } else { table(&["POD", "STATE", "LANE", "REASON"], &rows) + "\n" };
    let captured = status.pods.iter().filter(|pod| pod.state == "captured").count();
    let ready = if status.ready {
        "ready".to_owned()
    } else {
        format!("not ready: waits for {}", status.waiting_for.join(", "))
    };
    text.push_str(&format!(
        "{captured} of {} enrolled pods captured on node {} (heddle {}, {ready})\n",
        status.pods.len(),
        status.node,
        status.version
    ));
    if status.repairs > 0 {
        text.push_str(&format!("capture was found wanting and put in order {} times\n", status.repairs));
    }
    if let Some(problem) = &status.cni_problem {
        text.push_str(&format!("cni problem: {}\n", plain(problem)));
    }
    for PathLine { from, to, reason, detail } in &status.unproven_paths {
        text.push_str(&format!("no lane from {from} to {to}: {reason}: {}\n", plain(detail)));
    }
    if status.kubelet.state == "unattested" {
        let (reason, detail) = (&status.kubelet.reason, plain(&status.kubelet.detail));
        text.push_str(&format!("probes of the kubelet are not let through: {reason}: {detail}\n"));
    }
    for (what, problems) in [
        ("manifest", &status.manifest_problems),
        ("policy", &status.policy_problems),
        ("trust", &status.trust_problems),
    ] {
        for problem in problems {
            text.push_str(&format!("{what} problem: {problem}\n"));
        }
    }
    text
}
