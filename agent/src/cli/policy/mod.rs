//! `heddle policy`: policies before they are applied, and one decision in detail.

mod explain;
mod lint;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Verb {
    /// Check manifests before they are applied: what can't be enforced as written, and what it does instead.
    ///
    /// Ends with status 0 when everything is enforced as written, 1 when something is not, and 2 when something can't be read.
    Lint(lint::Args),
    /// Show how one connection is decided, with every policy that is considered.
    ///
    /// Ends with status 0 when the connection would be allowed, 1 when it would be denied, and 2 when nobody can say.
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
