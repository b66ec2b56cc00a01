//! `heddle ca rotate`: puts another root in the place of the CA's, step by step, with no handshake failed.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use serde::Serialize;

use crate::{
    cli::{
        ask::{json, print},
        table::{span, table},
    },
    cluster::api_client,
    identity::{
        TrustDomain,
        ca::{
            ROOT_LIFETIME,
            rotate::{AGENT_PORT, Given, Group, Outcome, Places, REPLICA_PORT, Rotation, RotationStatus, Step, Store},
        },
        read_small,
    },
    life::{
        config::{ConfigError, ROOT_NAMESPACE, TRUST_DOMAIN, duration, lifetime, trust_domain},
        limits, start,
    },
};

/// One step of a rotation, in the order in which they are taken.
#[derive(Debug, clap::Subcommand)]
pub(in crate::cli) enum Verb {
    /// Make a new root, and have it trusted beside the one in use.
    Prepare(Prepare),
    /// Issue certificates from the new root. Refused until every agent trusts it.
    Switch(Asking),
    /// Have the old root trusted no more. Refused while an agent holds a certificate or a revocation list of it, or a replica of the
    /// CA issues from it.
    Finish(Asking),
    /// Undo what was done, before `finish`. Refused where an agent would be left behind.
    Back(Asking),
    /// Show how far a rotation is.
    Status(Status),
}

/// Where the signing key is.
#[derive(Debug, clap::Args)]
struct Place {
    /// Directory of the CA's signing key: tls.crt, tls.key, ca.crt.
    #[arg(long, env = "HEDDLE_CA_ROOT_DIR", value_name = "DIR", required_unless_present = "root_secret")]
    root_dir: Option<PathBuf>,
    /// Secret of the CA's signing key.
    #[arg(long, env = "HEDDLE_CA_ROOT_SECRET", value_name = "NAMESPACE/NAME", conflicts_with = "root_dir")]
    root_secret: Option<String>,
    /// How to reach the API server from outside of the cluster.
    #[arg(long, env = "HEDDLE_CA_KUBECONFIG", value_name = "FILE", requires = "root_secret")]
    kubeconfig: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Prepare {
    #[command(flatten)]
    place: Place,
    /// SPIFFE trust domain of the mesh, for the new root's name.
    #[arg(long, env = "HEDDLE_TRUST_DOMAIN", default_value = TRUST_DOMAIN, value_name = "NAME")]
    trust_domain: String,
    /// How long the new root lasts.
    #[arg(long, default_value = "87600h", value_name = "DURATION")]
    lifetime: String,
    /// Take this issuing certificate, and those above it (PEM), instead of making a root.
    #[arg(long, requires = "next_key", value_name = "FILE")]
    next_certificate: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, requires = "next_certificate", value_name = "FILE")]
    next_key: Option<PathBuf>,
}

/// Whom to ask.
#[derive(Debug, clap::Args)]
struct Who {
    /// The agents' metrics, http://HOST:PORT each. Without it, with a Secret: the agents' pods.
    #[arg(long, env = "HEDDLE_AGENTS", value_delimiter = ',', value_name = "URL")]
    agents: Vec<http::Uri>,
    /// Namespace of the agents' pods.
    #[arg(long, default_value = ROOT_NAMESPACE, value_name = "NAME")]
    agent_namespace: String,
    /// Port of their metrics.
    #[arg(long, default_value_t = AGENT_PORT, value_name = "PORT")]
    agent_port: u16,
    /// The metrics of every replica of the CA, http://HOST:PORT each. Without it, with a Secret: the CA's pods.
    #[arg(long, env = "HEDDLE_CA_REPLICAS", value_delimiter = ',', value_name = "URL")]
    replicas: Vec<http::Uri>,
    /// Namespace of the CA's pods, where it is not the Secret's.
    #[arg(long, value_name = "NAME")]
    ca_namespace: Option<String>,
    /// Port of their metrics.
    #[arg(long, default_value_t = REPLICA_PORT, value_name = "PORT")]
    ca_port: u16,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Asking {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    who: Who,
    /// Try again for so long while it is refused.
    #[arg(long, default_value = "0s", value_name = "DURATION")]
    wait: String,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Status {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    who: Who,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Verb {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        start::install_crypto()?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start the runtime")?;
        runtime.block_on(self.take())
    }

    async fn take(self) -> anyhow::Result<ExitCode> {
        let nobody = || Places::Listed(Vec::new());
        match self {
            Self::Prepare(args) => {
                let trust_domain = trust_domain(&args.trust_domain)?;
                let lasts = lifetime("--lifetime", &args.lifetime)?;
                let given = match (&args.next_certificate, &args.next_key) {
                    (Some(certificate), Some(key)) => {
                        let read = |path| read_small(path).with_context(|| format!("can't read {}", path.display()));
                        Some(Given { certificate: read(certificate)?.to_vec(), key: read(key)? })
                    }
                    _ => None,
                };
                let store = args.place.store().await?;
                let (agents, replicas) = (Group::agents(nobody()), Group::replicas(nobody()));
                let rotation = Rotation { store, agents, replicas, trust_domain, lifetime: lasts, given };
                step(&rotation, Step::Prepare, Duration::ZERO).await
            }
            Self::Switch(args) => args.step(Step::Switch).await,
            Self::Finish(args) => args.step(Step::Finish).await,
            Self::Back(args) => args.step(Step::Back).await,
            Self::Status(args) => {
                let status = rotation(&args.place, args.who).await?.status().await?;
                print(&if args.json { json(&Shown::from(&status))? } else { text(&status) })?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

impl Asking {
    async fn step(self, wanted: Step) -> anyhow::Result<ExitCode> {
        let wait = duration("--wait", &self.wait)?;
        step(&rotation(&self.place, self.who).await?, wanted, wait).await
    }
}

async fn rotation(place: &Place, who: Who) -> anyhow::Result<Rotation> {
    let store = place.store().await?;
    let agents = match &store {
        Store::Secret { client, .. } if who.agents.is_empty() => {
            Places::Pods { client: client.clone(), namespace: who.agent_namespace, port: who.agent_port }
        }
        _ => Places::Listed(who.agents),
    };
    let replicas = match &store {
        Store::Secret { client, namespace, .. } if who.replicas.is_empty() => {
            let namespace = who.ca_namespace.unwrap_or_else(|| namespace.clone());
            Places::Pods { client: client.clone(), namespace, port: who.ca_port }
        }
        _ => Places::Listed(who.replicas),
    };
    let (agents, replicas) = (Group::agents(agents), Group::replicas(replicas));
    // Of a root that is made, which only `prepare` does.
    let trust_domain: TrustDomain = trust_domain(TRUST_DOMAIN)?;
    Ok(Rotation { store, agents, replicas, trust_domain, lifetime: ROOT_LIFETIME, given: None })
}

impl Place {
    async fn store(&self) -> anyhow::Result<Store> {
        match (&self.root_dir, &self.root_secret) {
            (Some(directory), _) => Ok(Store::Directory(directory.clone())),
            (None, secret) => {
                let (namespace, name) = secret_name(secret.as_deref().unwrap_or_default())?;
                let client = api_client(self.kubeconfig.as_deref()).await?;
                Ok(Store::Secret { client, namespace, name })
            }
        }
    }
}

/// `NAMESPACE/NAME`.
pub(in crate::cli) fn secret_name(value: &str) -> Result<(String, String), ConfigError> {
    match value.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err(ConfigError {
            flag: "--root-secret",
            value: value.to_owned(),
            problem: "names no Secret".to_owned(),
            fix: "give NAMESPACE/NAME, such as heddle-system/heddle-ca",
        }),
    }
}

async fn step(rotation: &Rotation, step: Step, wait: Duration) -> anyhow::Result<ExitCode> {
    let end = Instant::now() + wait;
    loop {
        match rotation.step(step).await? {
            Outcome::Done(told) => {
                print(&format!("{told}\n"))?;
                return Ok(ExitCode::SUCCESS);
            }
            Outcome::Refused(lines) if Instant::now() >= end => {
                for line in lines {
                    eprintln!("refused: {line}");
                }
                return Ok(ExitCode::FAILURE);
            }
            Outcome::Refused(_) => tokio::time::sleep(limits::ROTATE_LOOK).await,
        }
    }
}

/// As JSON.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    phase: &'static str,
    roots: Vec<ShownRoot<'a>>,
    agents: Vec<ShownAgent<'a>>,
    replicas: Vec<ShownReplica<'a>>,
}

#[derive(Debug, Serialize)]
struct ShownRoot<'a> {
    role: &'static str,
    subject: &'a str,
    serial: &'a str,
    not_after: String,
}

#[derive(Debug, Serialize)]
struct ShownAgent<'a> {
    agent: &'a str,
    says: &'a str,
}

#[derive(Debug, Serialize)]
struct ShownReplica<'a> {
    replica: &'a str,
    says: &'a str,
}

impl<'a> From<&'a RotationStatus> for Shown<'a> {
    fn from(status: &'a RotationStatus) -> Self {
        let roots = status.roots.iter().map(|root| ShownRoot {
            role: root.role,
            subject: &root.subject,
            serial: &root.serial,
            not_after: humantime::format_rfc3339_seconds(root.not_after).to_string(),
        });
        let agents = status.agents.iter().map(|(agent, says)| ShownAgent { agent, says });
        let replicas = status.replicas.iter().map(|(replica, says)| ShownReplica { replica, says });
        Self {
            phase: status.phase.name(),
            roots: roots.collect(),
            agents: agents.collect(),
            replicas: replicas.collect(),
        }
    }
}

fn text(status: &RotationStatus) -> String {
    let left = |at: SystemTime| match at.duration_since(SystemTime::now()) {
        Ok(left) => span(left.as_secs()),
        Err(past) => format!("expired {} ago", span(past.duration().as_secs())),
    };
    let roots: Vec<_> = status
        .roots
        .iter()
        .map(|root| vec![root.role.to_owned(), root.subject.clone(), root.serial.clone(), left(root.not_after)])
        .collect();
    let mut text = format!("{}\n\n{}", status.phase.name(), table(&["ROLE", "ROOT", "SERIAL", "LEFT"], &roots));
    for (who, said) in [("AGENT", &status.agents), ("REPLICA", &status.replicas)] {
        if !said.is_empty() {
            let lines: Vec<_> = said.iter().map(|(who, says)| vec![who.clone(), says.clone()]).collect();
            text.push('\n');
            text.push_str(&table(&[who, "SAYS"], &lines));
        }
    }
    text
}
