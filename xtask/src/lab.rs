//! `cargo xtask lab`: the demonstration's topology with the mesh running, until Enter or Ctrl-C.

use std::process::ExitCode;

use anyhow::Result;

use crate::demo::with_lab;

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Remove what `cargo xtask demo --keep` left running
    #[arg(long)]
    remove: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    with_lab(&[if options.remove { "remove" } else { "up" }.into()])
}
