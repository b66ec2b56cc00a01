//! `heddle policy`: policies before they are applied, and one decision in detail.

mod explain;
mod lint;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Check manifests before they are applied: what can't be enforced as written, and what it does instead.
    Lint(lint::Args),
    /// Show how one connection is decided, with every policy that is considered.
    Explain(explain::Args),
}

impl Verb {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Lint(args) => args.run(),
            Self::Explain(args) => args.run(),
        }
    }
}
