//! `cargo xtask lab`: the demonstration's topology with the mesh running, until Enter or Ctrl-C.

use std::process::ExitCode;

use anyhow::Result;

use crate::demo::with_lab;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Remove what `cargo xtask demo --keep` left running
    #[arg(long)]
    remove: bool,
    /// Measure throughput, connect rate and latency between the nodes, with the mesh and without
    #[arg(long, conflicts_with = "remove")]
    measure: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let verb = match options {
        Options { remove: true, .. } => "remove",
        Options { measure: true, .. } => "measure",
        _ => "up",
    };
    with_lab(&[verb.into()])
}
