//! `heddle ca`: runs the built-in certificate authority.

mod rotate;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    identity::ca::{Authorization, CaConfig, KeySource, NodeAuthorization, ROOT_LIFETIME},
    life::{
        ca::serve,
        config::{ConfigError, TRUST_DOMAIN, lifetime, listen, named, service_account, trust_domain},
        log, start,
    },
    telemetry::Format,
};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group = clap::ArgGroup::new("authorization").required(true).args(["token_file", "kubernetes"]))]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Address to answer on.
    #[arg(long, env = "HEDDLE_CA_LISTEN", default_value = "[::]:15012", value_name = "ADDRESS")]
    listen: String,
    /// SPIFFE trust domain of the mesh.
    #[arg(long, env = "HEDDLE_TRUST_DOMAIN", default_value = TRUST_DOMAIN, value_name = "NAME")]
    trust_domain: String,
    /// Issuing certificate, and those above it (PEM). Without it a root is made in memory and ends with the process.
    #[arg(long, env = "HEDDLE_CA_ROOT_CERTIFICATE", requires = "root_key", value_name = "FILE")]
    root_certificate: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, env = "HEDDLE_CA_ROOT_KEY", requires = "root_certificate", value_name = "FILE")]
    root_key: Option<PathBuf>,
    /// Roots to trust (PEM), where they are more than the root at the end of the issuing certificate.
    #[arg(long, env = "HEDDLE_CA_ROOT_BUNDLE", requires = "root_certificate", value_name = "FILE")]
    root_bundle: Option<PathBuf>,
    /// Directory with tls.crt, tls.key and ca.crt, as cert-manager lays them out, instead of files one by one.
    #[arg(
        long,
        env = "HEDDLE_CA_ROOT_DIR",
        conflicts_with_all = ["root_certificate", "root_secret"],
        value_name = "DIR"
    )]
    root_dir: Option<PathBuf>,
    /// Secret with the same keys; made, with a new root, where it is absent. Needs --kubernetes.
    #[arg(
        long,
        env = "HEDDLE_CA_ROOT_SECRET",
        conflicts_with = "root_certificate",
        requires = "kubernetes",
        value_name = "NAMESPACE/NAME"
    )]
    root_secret: Option<String>,
    /// Where to write the trust bundle, for the nodes to read.
    #[arg(long, env = "HEDDLE_CA_PUBLISH_ROOT", value_name = "FILE")]
    publish_root: Option<PathBuf>,
    /// Bearer token that callers must present, read at each call: whoever has it gets any identity of the mesh. For a lab.
    #[arg(long, env = "HEDDLE_CA_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Answer the agents of a Kubernetes cluster, each for what runs on its node: asks the API server whose token it is, and
    /// which pods there are.
    #[arg(long, env = "HEDDLE_CA_KUBERNETES")]
    kubernetes: bool,
    /// The way to the API server, where this is no pod of the cluster.
    #[arg(long, env = "HEDDLE_CA_KUBECONFIG", conflicts_with = "token_file", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Audience that agents' tokens must be for.
    #[arg(long, env = "HEDDLE_CA_TOKEN_AUDIENCE", default_value = "istio-ca", value_name = "NAME")]
    token_audience: String,
    /// Service account of the agents; may be given again.
    #[arg(
        long = "agent-service-account",
        env = "HEDDLE_CA_AGENT_SERVICE_ACCOUNTS",
        value_delimiter = ',',
        default_value = "heddle-system/heddle",
        value_name = "NAMESPACE/NAME"
    )]
    agent_service_accounts: Vec<String>,
    /// Name of the cluster: a caller that names another one is refused.
    #[arg(long, env = "HEDDLE_CLUSTER_ID", default_value = "Kubernetes", value_name = "NAME")]
    cluster_id: String,
    /// DNS name or IP address of the CA's own TLS certificate; may be given again.
    #[arg(
        long = "name",
        env = "HEDDLE_CA_NAMES",
        value_delimiter = ',',
        default_value = "localhost",
        value_name = "NAME"
    )]
    names: Vec<String>,
    /// Longest lifetime of a workload's certificate.
    #[arg(long, env = "HEDDLE_CA_MAX_LIFETIME", default_value = "1h", value_name = "DURATION")]
    max_lifetime: String,
    /// Address of /metrics and /healthz/ready.
    #[arg(long, env = "HEDDLE_CA_METRICS_LISTEN", default_value = "[::]:15014", value_name = "ADDRESS")]
    metrics_listen: String,
    /// Form of the log, on stderr; filtered by HEDDLE_LOG.
    #[arg(long, env = "HEDDLE_LOG_FORMAT", value_enum, default_value = "text", value_name = "FORMAT")]
    log_format: Format,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Put another root in the place of the CA's, step by step, with no handshake failed.
    #[command(subcommand)]
    Rotate(rotate::Verb),
}

impl Args {
    fn authorization(&self) -> Result<Authorization, ConfigError> {
        if let Some(file) = &self.token_file {
            return Ok(Authorization::Token(file.clone()));
        }
        let fix = "give a name such as istio-ca";
        let agents =
            self.agent_service_accounts.iter().map(|account| service_account("--agent-service-account", account));
        Ok(Authorization::Nodes(NodeAuthorization {
            kubeconfig: self.kubeconfig.clone(),
            audience: named("--token-audience", self.token_audience.clone(), fix)?,
            agents: agents.collect::<Result<_, _>>()?,
            cluster_id: named("--cluster-id", self.cluster_id.clone(), "give a name such as Kubernetes")?,
        }))
    }

    fn config(self) -> Result<CaConfig, ConfigError> {
        Ok(CaConfig {
            authorization: self.authorization()?,
            listen: listen("--listen", &self.listen)?,
            trust_domain: trust_domain(&self.trust_domain)?,
            root: match (self.root_certificate, self.root_key, self.root_dir, &self.root_secret) {
                (Some(certificate), Some(key), ..) => KeySource::Files { certificate, key, bundle: self.root_bundle },
                (_, _, Some(directory), _) => KeySource::Directory(directory),
                (_, _, _, Some(secret)) => {
                    let (namespace, name) = rotate::secret_name(secret)?;
                    KeySource::Secret { namespace, name, lifetime: ROOT_LIFETIME }
                }
                _ => KeySource::Memory { lifetime: ROOT_LIFETIME },
            },
            publish_root: self.publish_root,
            names: self.names,
            max_lifetime: lifetime("--max-lifetime", &self.max_lifetime)?,
        })
    }

    /// Whether it can work.
    pub fn validate(self) -> Result<(), ConfigError> {
        listen("--metrics-listen", &self.metrics_listen)?;
        self.config().map(drop)
    }

    pub fn run(self) -> anyhow::Result<ExitCode> {
        if let Some(Verb::Rotate(step)) = self.verb {
            return step.run();
        }
        let format = self.log_format;
        let metrics = listen("--metrics-listen", &self.metrics_listen)?;
        let config = self.config()?;
        let _written_at_the_end = log::start(format).context("can't start the log")?;
        start::install_crypto()?;
        start::protect_memory()?;
        let runtime = tokio::runtime::Runtime::new().context("can't start the runtime")?;
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).context("can't handle signals")?;
            let mut interrupt = signal(SignalKind::interrupt()).context("can't handle signals")?;
            let shutdown = async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            if let Err(error) = serve(config, metrics, shutdown).await {
                tracing::error!(reason = error.reason(), %error, "CA can't run");
                return Ok(ExitCode::FAILURE);
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}
