//! `heddle connections`: what this node's agent carries now, and what goes on the kernel lane beside it.

use std::process::ExitCode;

use super::{
    ask::{Ask, json, print},
    table::{span, table},
};
use crate::life::admin::{ConnectionLine, OlderLine};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only those of this pod of the node: NAMESPACE/POD, or POD in any namespace.
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    /// Those that are older than their pod's enrolment instead: they go on outside the mesh until they end.
    #[arg(long)]
    older: bool,
    #[command(flatten)]
    ask: Ask,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if self.older {
            let mut older: Vec<OlderLine> = self.ask.get("/older")?;
            if let Some(pod) = &self.pod {
                older.retain(|line| is_pod(&line.pod, pod));
            }
            print(&if self.ask.json { json(&older)? } else { older_text(&older) })?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut connections: Vec<ConnectionLine> = self.ask.get("/connections")?;
        if let Some(pod) = &self.pod {
            connections.retain(|connection| is_of(connection, pod));
        }
        print(&if self.ask.json { json(&connections)? } else { text(&connections) })?;
        Ok(ExitCode::SUCCESS)
    }
}

pub(super) fn is_of(connection: &ConnectionLine, pod: &str) -> bool {
    is_pod(&connection.pod, pod)
}

/// Whether `namespace/name` is the pod that is meant.
fn is_pod(full: &str, pod: &str) -> bool {
    full == pod || full.split_once('/').is_some_and(|(_, name)| name == pod)
}

pub(super) fn older_text(older: &[OlderLine]) -> String {
    let rows: Vec<_> =
        older.iter().map(|line| vec![line.pod.clone(), line.local.clone(), line.remote.clone()]).collect();
    let count = format!("{} connections older than their pod's enrolment\n", older.len());
    if rows.is_empty() { count } else { table(&["POD", "ADDRESS", "PEER"], &rows) + "\n" + &count }
}

pub(super) fn text(connections: &[ConnectionLine]) -> String {
    let rows: Vec<_> = connections
        .iter()
        .map(|connection| {
            let end = |address: &str, workload: &str| match workload {
                "" => address.to_owned(),
                workload => format!("{address} {workload}"),
            };
            let outbound = connection.direction == "outbound";
            let target = match &*connection.hbone_target {
                "" => &*connection.destination,
                target => target,
            };
            let (peer, identity) = if outbound {
                (end(target, &connection.destination_workload), &connection.destination_identity)
            } else {
                (end(&connection.source, &connection.source_workload), &connection.source_identity)
            };
            let security = if connection.cipher.is_empty() { &connection.security } else { &connection.cipher };
            vec![
                connection.direction.clone(),
                connection.pod.clone(),
                if outbound { connection.source.clone() } else { target.to_owned() },
                peer,
                identity.clone(),
                security.clone(),
                connection.policy.clone(),
                connection.bytes_to_app.to_string(),
                connection.bytes_to_client.to_string(),
                span(connection.open_seconds),
                connection.rtt_microseconds.map(|rtt| format!("{rtt}us")).unwrap_or_default(),
                connection.retransmissions.map(|count| count.to_string()).unwrap_or_default(),
            ]
        })
        .collect();
    let header = [
        "DIRECTION",
        "POD",
        "ADDRESS",
        "PEER",
        "PEER IDENTITY",
        "SECURITY",
        "POLICY",
        "TO APP",
        "TO CLIENT",
        "OPEN",
        "RTT",
        "RETRANSMITTED",
    ];
    let open = format!("{} connections\n", connections.len());
    if rows.is_empty() { open } else { table(&header, &rows) + "\n" + &open }
}
