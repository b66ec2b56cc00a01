//! `heddle check`: may heddle work on this node and in this cluster, and does it? Looked at before and after it is installed.
//!
//! Each area asks and then judges by a pure function; nothing is changed.

mod agent;
mod cluster;
mod node;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[cfg(test)]
pub(super) use agent::findings;

use super::{
    ask::{Ask, json, print},
    reach::Kubeconfig,
    table::{plain, table},
};
use crate::life::{
    config::{BPFFS, ROOT_NAMESPACE},
    start,
};

/// How long the API server may take for all that it is asked.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    ask: Ask,
    /// What to look at [default: this node; its agent, where one answers; the cluster, where there is a way to it].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    area: Vec<Area>,
    /// Folder of the pins.
    #[arg(long, env = "HEDDLE_BPFFS", default_value = BPFFS, value_name = "DIR")]
    bpffs: PathBuf,
    /// The way to the API server [default: as kubectl finds it].
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Only the NetworkPolicies of this namespace, enrolled or not [default: of every enrolled one].
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Namespace of the agents and the CA.
    #[arg(long, default_value = ROOT_NAMESPACE, value_name = "NAME")]
    root_namespace: String,
    /// The CA, to be reached from here: https://HOST:PORT [default: it is not tried].
    #[arg(long, value_name = "URL")]
    ca_address: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Area {
    /// Kernel, cgroups, bpffs, other programs on the hooks.
    Node,
    /// Certificates and roots of this node's agent.
    Agent,
    /// CRDs, NetworkPolicies, clock, agents and CA.
    Cluster,
}

/// How bad it is, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// Connections fail, or will not be protected as configured.
    Error,
    /// They will, unless somebody does something.
    Warning,
    /// It was looked at, and is as it should be.
    Pass,
}

impl Severity {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Pass => "pass",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Finding {
    pub severity: Severity,
    /// Stable.
    pub reason: String,
    /// The identity, certificate, file, object or part of the node that it is of.
    pub what: String,
    pub detail: String,
    /// What to do; empty where the detail says it.
    pub fix: String,
}

impl Finding {
    fn new(severity: Severity, reason: &str, what: impl Into<String>, detail: impl Into<String>, fix: &str) -> Self {
        Self { severity, reason: reason.to_owned(), what: what.into(), detail: detail.into(), fix: fix.to_owned() }
    }

    fn pass(reason: &str, what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(Severity::Pass, reason, what, detail, "")
    }
}

impl Args {
    /// Ends with status 1 when there is an error, with --json too.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let named = |area| self.area.contains(&area);
        let all = self.area.is_empty();
        let mut found = Vec::new();
        if all || named(Area::Node) {
            found.extend(node::check(&self.bpffs));
        }
        if named(Area::Agent) || all && self.ask.admin_socket.exists() {
            found.extend(agent::check(&self.ask)?);
        } else if all {
            let what = self.ask.admin_socket.display().to_string();
            found.push(Finding::pass("no_agent", what, "no agent runs here, so none was asked"));
        }
        if all || named(Area::Cluster) {
            match Kubeconfig::find(self.kubeconfig.as_deref())? {
                Some(way) => {
                    start::install_crypto()?;
                    let question = cluster::Question {
                        namespace: self.namespace.as_deref(),
                        root_namespace: &self.root_namespace,
                        ca_address: self.ca_address.as_deref(),
                    };
                    found.extend(cluster::check(&way, &question, PATIENCE));
                }
                None if all => {
                    found.push(Finding::pass(
                        "no_kubeconfig",
                        "cluster",
                        "no kubeconfig, so the cluster was not asked",
                    ));
                }
                None => anyhow::bail!("there is no kubeconfig: name one with --kubeconfig"),
            }
        }
        found.sort();
        print(&if self.ask.json { json(&found)? } else { text(&found) })?;
        let failed = found.iter().any(|finding| finding.severity == Severity::Error);
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

pub(super) fn text(findings: &[Finding]) -> String {
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let total = format!(
        "{} errors, {} warnings, {} passed\n",
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Pass)
    );
    if findings.is_empty() {
        return total;
    }
    let row = |finding: &Finding| {
        let Finding { severity, reason, what, detail, fix } = finding;
        let detail = if fix.is_empty() { plain(detail) } else { format!("{}; {fix}", plain(detail)) };
        [severity.name(), reason, what, &detail].map(str::to_owned).into()
    };
    let rows: Vec<Vec<String>> = findings.iter().map(row).collect();
    table(&["SEVERITY", "REASON", "WHAT", "DETAIL"], &rows) + "\n" + &total
}
