//! `heddle agent`: runs the agent of this node.

use std::process::ExitCode;

use anyhow::Context;

use crate::life::{config, log, start};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    config: config::Raw,
}

impl Args {
    /// Whether it can work.
    pub fn validate(self) -> Result<(), config::ConfigError> {
        self.config.validate().map(drop)
    }

    pub fn run(self) -> anyhow::Result<ExitCode> {
        let config = self.config.validate()?;
        let _written_at_the_end = log::start(config.log_format).context("can't start the log")?;
        if let Err(error) = start::run(config) {
            tracing::error!(reason = error.reason(), %error, "Agent can't run");
            return Ok(ExitCode::FAILURE);
        }
        Ok(ExitCode::SUCCESS)
    }
}
