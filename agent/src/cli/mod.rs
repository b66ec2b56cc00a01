//! What an operator types: one file per verb.
//!
//! The last stop: it parses, calls into the other stages, prints. Nothing is decided here.

mod agent;
mod ask;
mod ca;
mod certs;
mod check;
mod connections;
mod install;
mod policy;
mod probe;
mod proof;
mod reach;
mod status;
mod table;
#[cfg(test)]
mod tests;
mod uninstall;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::life::config::{ConfigError, EXIT_USAGE};

/// heddle, a sidecarless service mesh for Kubernetes.
#[derive(Debug, Parser)]
#[command(name = "heddle", version, about, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent of this node.
    Agent(Box<agent::Args>),
    /// Run the built-in certificate authority.
    Ca(Box<ca::Args>),
    /// Show this node's pods and whether they are captured.
    ///
    /// Ends with status 1 when a pod is not captured; with --json only when the agent can't be asked.
    Status(ask::Ask),
    /// Show the connections that this node's agent carries.
    Connections(connections::Args),
    /// Show the certificates that this node's agent holds, and what signed them.
    Certs(ask::Ask),
    /// Show whether heddle can work on this node and in this cluster, and what is wrong, or will be within 30 days.
    ///
    /// Looks at the node's kernel, at its agent where one runs, and at the cluster where there is a kubeconfig: before heddle is
    /// installed and after. Ends with status 1 when there is an error.
    Check(Box<check::Args>),
    /// Show by a connection how a pair of pods is protected.
    ///
    /// Connects from pod A to pod B as A's app would, and shows what the agents of both saw of that connection. Ask the agent
    /// of A's node. Ends with status 0 when the connection was authenticated, encrypted, allowed and accepted by the app, 1
    /// when it was not, and 2 when that could not be found out.
    Proof(proof::Args),
    /// Check policies before they are applied, and explain decisions.
    #[command(subcommand)]
    Policy(policy::Verb),
    /// Print the manifests that install heddle into a cluster: `heddle install | kubectl apply -f -`.
    Install(Box<install::Args>),
    /// Take heddle's programs, routes, pins and files away from this node, or show that nothing is left.
    Uninstall(Box<uninstall::Args>),
    /// Be the CNI plugin: what a container runtime asks with, as CNI_COMMAND and stdin say. The program heddle-cni does the same.
    #[command(hide = true)]
    Cni,
    /// Connect as a process of a pod would, and print what answers. Started by the agent.
    #[command(hide = true)]
    Probe(probe::Args),
}

impl Cli {
    /// Whether what the agent or the CA is told can work, as far as that can be said without starting it.
    ///
    /// # Errors
    /// The first value that can't work.
    fn validate(self) -> Result<(), ConfigError> {
        match self.verb {
            Verb::Agent(args) => args.validate(),
            Verb::Ca(args) => args.validate(),
            _ => Ok(()),
        }
    }

    /// Does what was asked.
    ///
    /// # Errors
    /// When it could not be done; [`exit_code`] says with which status to end.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.verb {
            Verb::Agent(args) => args.run(),
            Verb::Ca(args) => args.run(),
            Verb::Status(ask) => status::run(&ask),
            Verb::Connections(args) => args.run(),
            Verb::Certs(ask) => certs::run(&ask),
            Verb::Check(args) => args.run(),
            Verb::Proof(args) => args.run(),
            Verb::Policy(verb) => verb.run(),
            Verb::Install(args) => args.run(),
            Verb::Uninstall(args) => args.run(),
            Verb::Cni => Ok(crate::cni::plugin::main()),
            Verb::Probe(args) => args.run(),
        }
    }
}

/// The status that an error ends the program with: 64 for a configuration that can't work, else 1.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<ConfigError>() {
        Some(_) => ExitCode::from(EXIT_USAGE),
        None => ExitCode::FAILURE,
    }
}

/// The status that a command line which can't be parsed ends the program with; help and version are no errors.
#[must_use]
pub fn parse_exit_code(error: &clap::Error) -> ExitCode {
    if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS }
}
