//! `heddle connections`: what this node's agent carries now, and what goes on the kernel lane beside it.

use std::process::ExitCode;

use super::{
    ask::{Ask, json, print},
    table::{span, table},
};
use crate::life::admin::ConnectionLine;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only those of this pod of the node: NAMESPACE/POD, or POD in any namespace.
    #[arg(long, value_name = "POD")]
    pod: Option<String>,
    #[command(flatten)]
    ask: Ask,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut connections: Vec<ConnectionLine> = self.ask.get("/connections")?;
        if let Some(pod) = &self.pod {
            connections.retain(|connection| is_of(connection, pod));
        }
        print(&if self.ask.json { json(&connections)? } else { text(&connections) })?;
        Ok(ExitCode::SUCCESS)
    }
}

pub(super) fn is_of(connection: &ConnectionLine, pod: &str) -> bool {
    let name = connection.pod.split_once('/').map_or("", |(_, name)| name);
    connection.pod == pod || name == pod
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
