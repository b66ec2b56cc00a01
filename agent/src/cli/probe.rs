//! `heddle probe`: what the agent starts to connect as a process of a pod would.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use super::ask::print;
use crate::capture::{
    caller,
    probe::{run, token_line},
};

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
    /// Connect when told to on stdin, and tell how it went, instead of reading a token.
    #[arg(long)]
    call: bool,
    /// What to say on the connection.
    #[arg(long, requires = "call", default_value = "")]
    say: String,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if self.call {
            caller::run(&self.netns, &self.cgroup, self.to, &self.say)?;
        } else {
            let token = run(&self.netns, &self.cgroup, self.to)?;
            print(&format!("{}\n", token_line(&token)))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
