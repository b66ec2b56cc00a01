//! `heddle probe`: what the agent starts to connect as a process of a pod would.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use super::ask::print;
use crate::capture::probe::{run, token_line};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Network namespace to connect from.
    #[arg(long)]
    netns: PathBuf,
    /// Cgroup to connect from.
    #[arg(long)]
    cgroup: PathBuf,
    /// Where to connect to.
    #[arg(long)]
    to: SocketAddr,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let token = run(&self.netns, &self.cgroup, self.to)?;
        print(&format!("{}\n", token_line(&token)))?;
        Ok(ExitCode::SUCCESS)
    }
}
