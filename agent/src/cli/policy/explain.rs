//! `heddle policy explain`: one decision in detail, by the agent that makes it or from manifests.

use std::{fmt::Write as _, net::IpAddr, path::PathBuf, process::ExitCode};

use anyhow::Context;

use crate::{
    cli::{
        ask::{Ask, json, print, query},
        table::{plain, table},
    },
    cluster::{self, Settings},
    life::config::{ConfigError, ROOT_NAMESPACE, TRUST_DOMAIN, aliases, names, trust_domain},
    policy::{Explained, Question, Rulebook, answer},
};

/// When the question names nothing that is known, or nobody can be asked.
const UNKNOWN: u8 = 2;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Who connects: NAMESPACE/SERVICEACCOUNT, a SPIFFE id, or none for plaintext.
    #[arg(long, value_name = "SOURCE")]
    from: String,
    /// Which pod and port: NAMESPACE/POD:PORT.
    #[arg(long, value_name = "POD:PORT")]
    to: String,
    /// From which address, where that is not the address of a pod of the service account.
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<IpAddr>,
    /// Decide by the manifests in this directory, without an agent.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// With --manifests: namespace whose policies without a selector hold for the whole mesh.
    #[arg(long, env = "HEDDLE_ROOT_NAMESPACE", default_value = ROOT_NAMESPACE, value_name = "NAME")]
    root_namespace: String,
    /// With --manifests: SPIFFE trust domain of the mesh.
    #[arg(long, env = "HEDDLE_TRUST_DOMAIN", default_value = TRUST_DOMAIN, value_name = "NAME")]
    trust_domain: String,
    /// With --manifests: another name of the trust domain; may be given again.
    #[arg(long, env = "HEDDLE_TRUST_DOMAIN_ALIAS", value_delimiter = ',', value_name = "NAME")]
    trust_domain_alias: Vec<String>,
    #[command(flatten)]
    ask: Ask,
}

impl Args {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (asks_for_json, explained) = (self.ask.json, self.explained());
        let explained = match explained {
            Ok(explained) => explained,
            Err(error) if error.is::<ConfigError>() => return Err(error),
            Err(error) => {
                eprintln!("heddle: {error:#}");
                return Ok(ExitCode::from(UNKNOWN));
            }
        };
        print(&if asks_for_json { json(&explained)? } else { text(&explained) })?;
        Ok(if explained.explanation.allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn explained(self) -> anyhow::Result<Explained> {
        let question = Question { from: self.from, to: self.to, ip: self.ip };
        match &self.manifests {
            None => {
                let ip = question.ip.map(|ip| ip.to_string());
                let parts = [("from", Some(&*question.from)), ("to", Some(&*question.to)), ("ip", ip.as_deref())];
                self.ask.get(&query("/policy/explain", &parts))
            }
            Some(folder) => {
                let trust_domain = trust_domain(&self.trust_domain)?;
                let settings = Settings {
                    root_namespace: self.root_namespace.as_str().into(),
                    trust_domains: names(&trust_domain, &aliases(&self.trust_domain_alias, &self.trust_domain)?),
                    ..Settings::default()
                };
                let mut directory = cluster::Directory::new(folder.clone());
                directory.scan().with_context(|| folder.display().to_string())?;
                let snapshot = cluster::index(&directory.objects(), &settings, 1);
                Ok(answer(&question, &snapshot, &Rulebook::compile(&snapshot), &trust_domain)?)
            }
        }
    }
}

pub(super) fn text(explained: &Explained) -> String {
    let Explained { from, source_ip, to, destination_ip, port, explanation } = explained;
    let from = if from.is_empty() { "plaintext" } else { from };
    let at = if source_ip.is_empty() { "an unknown address (give --ip)" } else { source_ip };
    let verdict = if explanation.allowed { "allowed" } else { "denied" };
    let reason = if explanation.reason.is_empty() { String::new() } else { format!(" [{}]", explanation.reason) };
    let plaintext = match (explanation.plaintext.refused, &*explanation.plaintext.policy) {
        (true, policy) => format!("refused by PeerAuthentication {policy}"),
        (false, "") => "let in: no PeerAuthentication says anything".to_owned(),
        (false, policy) => format!("let in by PeerAuthentication {policy}"),
    };
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(text, "{} at {at} -> {} ({destination_ip}) port {port}", plain(from), plain(to));
    let _ = writeln!(text, "{verdict}: {}{reason}", plain(&explanation.detail));
    let _ = writeln!(text, "plaintext to the port: {}", plain(&plaintext));
    let rows: Vec<_> = explanation
        .policies
        .iter()
        .map(|policy| {
            let misses: Vec<String> = policy.misses.iter().map(|miss| format!("{} {}", miss.field, miss.why)).collect();
            let matched = if policy.matched { "yes" } else { "no" };
            vec![
                policy.policy.clone(),
                policy.action.clone(),
                policy.role.as_str().to_owned(),
                matched.to_owned(),
                misses.join("; "),
            ]
        })
        .collect();
    if rows.is_empty() {
        text.push_str("no AuthorizationPolicy is for it\n");
    } else {
        let _ = writeln!(text, "\n{}", table(&["POLICY", "ACTION", "ROLE", "MATCHES", "WHY NOT"], &rows).trim_end());
    }
    for gap in &explanation.gaps {
        let _ = writeln!(text, "policies may be missing: {} can't be read", plain(gap));
    }
    for problem in &explanation.problems {
        let _ = writeln!(text, "problem: {}", plain(problem));
    }
    text
}
