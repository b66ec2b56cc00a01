//! `heddle connections`: what this node's agent carries now.

use std::process::ExitCode;

use super::{
    ask::{Ask, json, print},
    table::{span, table},
};
use crate::life::admin::ConnectionLine;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    ask: Ask,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let connections: Vec<ConnectionLine> = self.ask.get("/connections")?;
        print(&if self.ask.json { json(&connections)? } else { text(&connections) })?;
        Ok(ExitCode::SUCCESS)
    }
}

pub(super) fn text(connections: &[ConnectionLine]) -> String {
    let rows: Vec<_> = connections
        .iter()
        .map(|connection| {
            let end = |address: &str, workload: &str| match workload {
                "" => address.to_owned(),
                workload => format!("{address} {workload}"),
            };
            let destination = match &*connection.hbone_target {
                "" => &connection.destination,
                target => target,
            };
            vec![
                connection.direction.clone(),
                end(&connection.source, &connection.source_workload),
                end(destination, &connection.destination_workload),
                connection.security.clone(),
                connection.source_identity.clone(),
                connection.destination_identity.clone(),
                connection.bytes_to_app.to_string(),
                connection.bytes_to_client.to_string(),
                span(connection.open_seconds),
            ]
        })
        .collect();
    let header = [
        "DIRECTION",
        "SOURCE",
        "DESTINATION",
        "SECURITY",
        "SOURCE IDENTITY",
        "DESTINATION IDENTITY",
        "TO APP",
        "TO CLIENT",
        "OPEN",
    ];
    let open = format!("{} connections\n", connections.len());
    if rows.is_empty() { open } else { table(&header, &rows) + "\n" + &open }
}
