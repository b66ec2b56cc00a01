//! What was typed ([`Raw`]) and what it means ([`Config`]).
//!
//! Read once, at start. A value that can't work is refused with its flag, the problem and what to write instead; nothing
//! is corrected silently.

use std::{net::SocketAddr, num::NonZero, path::PathBuf, sync::Arc, time::Duration};

use super::{cni::CniConfig, limits, node::Taint};
use crate::{
    cluster::SameNode,
    cni,
    identity::{CaHeader, CrlConfig, CrlFailure, TrustDomain, ca::ServiceAccount},
    telemetry::{Destination, Export, Format},
};

/// Where the agent's admin socket is unless configured otherwise.
pub const ADMIN_SOCKET: &str = "/run/heddle/admin.sock";
/// Where pins are kept unless configured otherwise.
pub const BPFFS: &str = "/sys/fs/bpf/heddle";
/// Where the agent keeps what it is to know after a restart, unless configured otherwise.
pub const STATE_DIR: &str = "/var/lib/heddle";
/// Namespace of the policies for the whole mesh unless configured otherwise.
pub const ROOT_NAMESPACE: &str = "heddle-system";
/// Trust domain unless configured otherwise.
pub const TRUST_DOMAIN: &str = "cluster.local";

/// Exit status of a configuration that can't work (`EX_USAGE` of sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// Longest path that fits a socket address (bytes), with room for the suffix under which it is made.
const SOCKET_PATH: usize = 107 - ".4294967295".len();

/// `heddle agent`, as typed. Every flag can also be set as `HEDDLE_` and its name in capitals.
#[derive(Debug, Clone, clap::Args)]
pub struct Raw {
    /// Name of this node, as in `spec.nodeName` of its pods.
    #[arg(long, env = "HEDDLE_NODE")]
    pub node: String,
    /// Directory of Kubernetes manifests (YAML), followed for changes; instead of --kubernetes.
    #[arg(long, env = "HEDDLE_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Follow the cluster's API server, as every pod reaches it, or by --kubeconfig.
    #[arg(long, env = "HEDDLE_KUBERNETES")]
    pub kubernetes: bool,
    /// Another way to the API server.
    #[arg(long, env = "HEDDLE_KUBECONFIG", value_name = "FILE", requires = "kubernetes")]
    pub kubeconfig: Option<PathBuf>,
    /// Take the taint heddle.dev/not-ready off this node once capture works; needs --kubernetes, and get and patch of nodes.
    #[arg(long, env = "HEDDLE_STARTUP_TAINT", requires = "kubernetes")]
    pub startup_taint: bool,
    /// The same, and put it on again while the agent is not ready or ends.
    #[arg(long, env = "HEDDLE_NODE_TAINT", requires = "kubernetes")]
    pub node_taint: bool,
    /// How a pod's network namespace and cgroup are found on this node [default: node with --kubernetes, else annotated].
    #[arg(long, env = "HEDDLE_PLACES", value_enum, value_name = "HOW")]
    pub places: Option<PlacesBy>,
    /// Folder of what the agent keeps over its restarts, the same for the agent and for the node: the last good snapshot of the
    /// cluster, and, for the CNI plugin to read, who is enrolled.
    #[arg(long, env = "HEDDLE_STATE_DIR", default_value = cni::STATE_DIR, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Unix socket at which the CNI plugin asks; the same path for the agent and for the node.
    #[arg(long, env = "HEDDLE_CNI_SOCKET", default_value = cni::SOCKET, value_name = "FILE")]
    pub cni_socket: PathBuf,
    /// The node's folder of CNI configuration, as the agent sees it: heddle-cni is put at the end of its first list, and pods of the
    /// mesh start once they are captured. Needs --places node [default: none, and pods are captured a moment after they start].
    #[arg(long, env = "HEDDLE_CNI_CONF_DIR", value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// The node's folder of CNI plugins, as the agent sees it: heddle-cni is copied there [default: somebody else does].
    #[arg(long, env = "HEDDLE_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// SPIFFE trust domain of the mesh.
    #[arg(long, env = "HEDDLE_TRUST_DOMAIN", default_value = TRUST_DOMAIN, value_name = "NAME")]
    pub trust_domain: String,
    /// Another name of the mesh's trust domain: peers of it are accepted, and policies mean both. May be given again (in the
    /// environment: separated by commas).
    #[arg(long, env = "HEDDLE_TRUST_DOMAIN_ALIAS", value_delimiter = ',', value_name = "NAME")]
    pub trust_domain_alias: Vec<String>,
    /// Revocation lists of the CAs (PEM, one or several), followed for changes. What a revoked peer has open is ended.
    #[arg(long, env = "HEDDLE_CRL", value_name = "FILE")]
    pub crl: Option<PathBuf>,
    /// While the lists are missing, broken, signed by nobody trusted or too old: refuse new mutual TLS, or go on with the last
    /// good ones.
    #[arg(long, env = "HEDDLE_CRL_FAILURE", value_enum, default_value = "refuse", value_name = "WHAT")]
    pub crl_failure: CrlFailure,
    /// Namespace whose policies without a selector hold for the whole mesh.
    #[arg(long, env = "HEDDLE_ROOT_NAMESPACE", default_value = ROOT_NAMESPACE, value_name = "NAME")]
    pub root_namespace: String,
    /// How two pods of one node talk where neither they nor their namespaces say it (heddle.dev/same-node).
    #[arg(long, env = "HEDDLE_SAME_NODE", value_enum, default_value = "kernel", value_name = "HOW")]
    pub same_node: SameNode,
    /// Name of the cluster in metrics, in baggage and to the CA.
    #[arg(long, env = "HEDDLE_CLUSTER_ID", default_value = "Kubernetes", value_name = "NAME")]
    pub cluster_id: String,
    /// The CA, https://HOST:PORT.
    #[arg(long, env = "HEDDLE_CA_ADDRESS", value_name = "URL")]
    pub ca_address: String,
    /// Name that the CA's certificate must carry, where it is not the host of its address.
    #[arg(long, env = "HEDDLE_CA_NAME", value_name = "NAME")]
    pub ca_name: Option<String>,
    /// Trust bundle (PEM) that verifies the CA and the mesh's peers. May appear later; read again when it changes.
    #[arg(long, env = "HEDDLE_CA_ROOT", value_name = "FILE")]
    pub ca_root: PathBuf,
    /// Bearer token for the CA, read at each call.
    #[arg(long, env = "HEDDLE_CA_TOKEN_FILE", value_name = "FILE")]
    pub ca_token_file: PathBuf,
    /// Signer that an istiod shall ask (CertSigner in the request's metadata) [default: none is named].
    #[arg(long, env = "HEDDLE_CA_CERT_SIGNER", value_name = "NAME")]
    pub ca_cert_signer: Option<String>,
    /// Header of each call to the CA, NAME=VALUE; may be given again.
    #[arg(long, env = "HEDDLE_CA_HEADER", value_name = "NAME=VALUE", hide_env_values = true)]
    pub ca_header: Vec<String>,
    /// Lifetime to ask the CA for; certificates are renewed at half of it.
    #[arg(long, env = "HEDDLE_CERTIFICATE_LIFETIME", default_value = "1h", value_name = "DURATION")]
    pub certificate_lifetime: String,
    /// Folder for pins in a bpffs; made, and the bpffs mounted, if absent.
    #[arg(long, env = "HEDDLE_BPFFS", default_value = BPFFS, value_name = "DIR")]
    pub bpffs: PathBuf,
    /// The kubelet's cgroup, a folder of cgroup v2 [default: that of the process called kubelet].
    #[arg(long, env = "HEDDLE_KUBELET_CGROUP", value_name = "DIR")]
    pub kubelet_cgroup: Option<PathBuf>,
    /// Unix socket that `heddle status` and its like ask.
    #[arg(long, env = "HEDDLE_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "FILE")]
    pub admin_socket: PathBuf,
    /// Address of /metrics and /stats/prometheus.
    #[arg(long, env = "HEDDLE_METRICS_LISTEN", default_value = "[::]:15020", value_name = "ADDRESS")]
    pub metrics_listen: String,
    /// Address of /healthz/ready.
    #[arg(long, env = "HEDDLE_READINESS_LISTEN", default_value = "[::]:15021", value_name = "ADDRESS")]
    pub readiness_listen: String,
    /// Form of the agent's log (on stderr; filtered by HEDDLE_LOG) and of the access log.
    #[arg(long, env = "HEDDLE_LOG_FORMAT", value_enum, default_value = "text", value_name = "FORMAT")]
    pub log_format: Format,
    /// File that the access log is appended to, or - for stdout.
    #[arg(long, env = "HEDDLE_ACCESS_LOG", default_value = "-", value_name = "FILE")]
    pub access_log: PathBuf,
    /// Add the labels source_region, source_zone, destination_region and destination_zone to the istio_tcp_ metrics, from
    /// the topology labels of Nodes.
    #[arg(long, env = "HEDDLE_METRICS_LOCALITY")]
    pub metrics_locality: bool,
    /// OpenTelemetry collector that gets a span per side of each tunnelled connection (OTLP over gRPC, without TLS),
    /// http://HOST:PORT [default: none is sent].
    #[arg(long, env = "HEDDLE_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Share of the traces beginning here whose spans are sent, 0 to 1.
    #[arg(
        long,
        env = "HEDDLE_OTLP_SAMPLE_RATIO",
        default_value = "1",
        allow_hyphen_values = true,
        value_name = "RATIO"
    )]
    pub otlp_sample_ratio: String,
    /// How long carried connections may go on after SIGTERM.
    #[arg(long, env = "HEDDLE_DRAIN_GRACE", default_value = "30s", value_name = "DURATION")]
    pub drain_grace: String,
    /// Threads that carry traffic [default: a quarter of the cores, at least 2].
    #[arg(long, env = "HEDDLE_WORKERS", value_name = "N")]
    pub workers: Option<String>,
}

/// How pods are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PlacesBy {
    /// By their uid, among the processes and cgroups of the node, as kubelet and its runtimes name them.
    Node,
    /// By annotations of the pods, lab.heddle.dev/netns and lab.heddle.dev/cgroup: for pods that no runtime made. Whoever may
    /// annotate a pod chooses the netns that the agent enters.
    Annotated,
}

/// A configuration that can work.
#[derive(Debug, Clone)]
pub struct Config {
    pub node: Arc<str>,
    pub source: Source,
    pub taint: Taint,
    pub state_dir: PathBuf,
    pub places: PlacesBy,
    /// `None` where no CNI asks.
    pub cni: Option<CniConfig>,
    pub trust_domain: TrustDomain,
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Where revocation lists come from; `None` asks for none.
    pub crl: Option<CrlConfig>,
    pub root_namespace: Arc<str>,
    /// Of pods that say nothing of it.
    pub same_node: SameNode,
    pub cluster_id: Arc<str>,
    pub ca_address: String,
    pub ca_name: Option<String>,
    pub ca_root: PathBuf,
    pub ca_token_file: PathBuf,
    pub ca_cert_signer: Option<String>,
    pub ca_headers: Vec<CaHeader>,
    pub certificate_lifetime: Duration,
    pub bpffs: PathBuf,
    /// `None` looks for it.
    pub kubelet_cgroup: Option<PathBuf>,
    pub admin_socket: PathBuf,
    pub metrics_listen: SocketAddr,
    pub readiness_listen: SocketAddr,
    pub log_format: Format,
    pub access_log: Destination,
    pub metrics_locality: bool,
    /// Where spans are sent; `None` sends none.
    pub spans: Option<Export>,
    pub drain_grace: Duration,
    pub workers: usize,
}

/// Where the truth about the cluster comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server, by this kubeconfig where it is one.
    Kubernetes(Option<PathBuf>),
}

/// A value that can't work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{flag} {value:?}: {problem}; {fix}")]
pub struct ConfigError {
    pub flag: &'static str,
    pub value: String,
    pub problem: String,
    /// What to write instead.
    pub fix: &'static str,
}

impl ConfigError {
    fn new(flag: &'static str, value: impl Into<String>, problem: impl ToString, fix: &'static str) -> Self {
        Self { flag, value: value.into(), problem: problem.to_string(), fix }
    }
}

impl Raw {
    /// Says what it means.
    ///
    /// # Errors
    /// The first flag whose value can't work.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let places = self.places.unwrap_or(if self.kubernetes { PlacesBy::Node } else { PlacesBy::Annotated });
        Ok(Config {
            node: named("--node", self.node, "give the node's name, as in spec.nodeName of its pods")?.into(),
            source: source(self.manifests, self.kubernetes, self.kubeconfig)?,
            taint: match (self.startup_taint, self.node_taint) {
                (_, true) => Taint::Kept,
                (true, false) => Taint::TakenOff,
                (false, false) => Taint::Left,
            },
            state_dir: absolute(
                "--state-dir",
                self.state_dir.clone(),
                "give an absolute path such as /var/lib/heddle",
            )?,
            places,
            cni: cni(places, self.cni_socket, self.state_dir, self.cni_conf_dir, self.cni_bin_dir)?,
            trust_domain: trust_domain(&self.trust_domain)?,
            trust_domain_aliases: aliases(&self.trust_domain_alias, &self.trust_domain)?,
            crl: self.crl.map(|path| CrlConfig { path, failure: self.crl_failure }),
            root_namespace: named("--root-namespace", self.root_namespace, "give a namespace such as heddle-system")?
                .into(),
            same_node: self.same_node,
            cluster_id: named("--cluster-id", self.cluster_id, "give a name such as Kubernetes")?.into(),
            ca_address: ca_address(self.ca_address)?,
            ca_name: self
                .ca_name
                .map(|name| named("--ca-name", name, "leave it out, or give a DNS name"))
                .transpose()?,
            ca_root: self.ca_root,
            ca_token_file: self.ca_token_file,
            ca_cert_signer: self
                .ca_cert_signer
                .map(|name| named("--ca-cert-signer", name, "leave it out, or give the name of a signer"))
                .transpose()?,
            ca_headers: self.ca_header.iter().map(|text| ca_header(text)).collect::<Result<_, _>>()?,
            certificate_lifetime: lifetime("--certificate-lifetime", &self.certificate_lifetime)?,
            bpffs: absolute("--bpffs", self.bpffs, "give an absolute path such as /sys/fs/bpf/heddle")?,
            kubelet_cgroup: self
                .kubelet_cgroup
                .map(|path| {
                    absolute(
                        "--kubelet-cgroup",
                        path,
                        "give a path such as /sys/fs/cgroup/system.slice/kubelet.service",
                    )
                })
                .transpose()?,
            admin_socket: socket("--admin-socket", self.admin_socket)?,
            metrics_listen: listen("--metrics-listen", &self.metrics_listen)?,
            readiness_listen: listen("--readiness-listen", &self.readiness_listen)?,
            log_format: self.log_format,
            access_log: match self.access_log.as_os_str() {
                path if path == "-" => Destination::Stdout,
                _ => Destination::File(self.access_log),
            },
            metrics_locality: self.metrics_locality,
            spans: spans(self.otlp_endpoint, &self.otlp_sample_ratio)?,
            drain_grace: duration("--drain-grace", &self.drain_grace)?,
            workers: workers(self.workers)?,
        })
    }
}

/// Takes a name.
///
/// # Errors
/// When it is empty.
pub fn named(flag: &'static str, value: String, fix: &'static str) -> Result<String, ConfigError> {
    if value.trim().is_empty() {
        return Err(ConfigError::new(flag, value, "is empty", fix));
    }
    Ok(value)
}

fn absolute(flag: &'static str, path: PathBuf, fix: &'static str) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(ConfigError::new(flag, path.to_string_lossy(), "is not absolute", fix))
    }
}

fn source(manifests: Option<PathBuf>, kubernetes: bool, kubeconfig: Option<PathBuf>) -> Result<Source, ConfigError> {
    let fix = "give --kubernetes in a cluster, or --manifests DIR";
    match (manifests, kubernetes) {
        (Some(path), false) => directory("--manifests", path).map(Source::Manifests),
        (None, true) => Ok(Source::Kubernetes(kubeconfig)),
        (Some(path), true) => {
            Err(ConfigError::new("--manifests", path.to_string_lossy(), "is given with --kubernetes", fix))
        }
        (None, false) => Err(ConfigError::new("--kubernetes", "", "is not given, nor is --manifests", fix)),
    }
}

fn directory(flag: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    let fix = "give a directory that exists; it may be empty";
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(ConfigError::new(flag, path.to_string_lossy(), "is not a directory", fix)),
        Err(error) => Err(ConfigError::new(flag, path.to_string_lossy(), error, fix)),
    }
}

/// Parses `--trust-domain`.
///
/// # Errors
/// When it is no trust domain.
pub fn trust_domain(value: &str) -> Result<TrustDomain, ConfigError> {
    let fix = "give a name of lower-case letters, digits, dots, dashes and underscores such as cluster.local";
    value.parse().map_err(|error| ConfigError::new("--trust-domain", value, error, fix))
}

/// Parses a service account, `NAMESPACE/NAME`.
///
/// # Errors
/// When it is none.
pub fn service_account(flag: &'static str, value: &str) -> Result<ServiceAccount, ConfigError> {
    value.parse().map_err(|error: String| ConfigError::new(flag, value, error, "give one such as heddle-system/heddle"))
}

/// Parses every `--trust-domain-alias`.
///
/// # Errors
/// When one is no trust domain, or is ours, or there are too many.
pub fn aliases(values: &[String], own: &str) -> Result<Vec<TrustDomain>, ConfigError> {
    const FLAG: &str = "--trust-domain-alias";
    if let Some(extra) = values.get(limits::TRUST_DOMAIN_ALIASES) {
        let problem = format!("is one of more than {}", limits::TRUST_DOMAIN_ALIASES);
        return Err(ConfigError::new(FLAG, extra, problem, "leave out the names that no certificate has any more"));
    }
    let alias = |value: &String| {
        if value == own {
            return Err(ConfigError::new(
                FLAG,
                value,
                "is the trust domain itself",
                "give the other name, or leave it out",
            ));
        }
        let fix = "give a name of lower-case letters, digits, dots, dashes and underscores such as old.example";
        value.parse().map_err(|error| ConfigError::new(FLAG, value, error, fix))
    };
    values.iter().map(alias).collect()
}

/// The names of the trust domain as policies take them: none where it has but one.
#[must_use]
pub fn names(own: &TrustDomain, aliases: &[TrustDomain]) -> Arc<[Arc<str>]> {
    let all = std::iter::once(own).chain(aliases).map(|name| name.as_str().into());
    if aliases.is_empty() { Arc::default() } else { all.collect() }
}

fn ca_address(value: String) -> Result<String, ConfigError> {
    const FIX: &str = "give https://HOST:PORT, such as https://ca.heddle-system.svc:15012";
    let problem = match value.parse::<http::Uri>() {
        Err(error) => error.to_string(),
        Ok(address) if address.scheme_str() != Some("https") => "is not https".to_owned(),
        Ok(address) if address.port_u16().is_none() => "has no port".to_owned(),
        Ok(address) if !matches!(address.path(), "" | "/") => "has a path".to_owned(),
        Ok(_) => return Ok(value),
    };
    Err(ConfigError::new("--ca-address", value, problem, FIX))
}

/// The value may be a secret: what is said of a header is its name.
fn ca_header(text: &str) -> Result<CaHeader, ConfigError> {
    let fix = "give NAME=VALUE in ASCII, such as x-tenant=shop; authorization and clusterid have flags of their own";
    let name = text.split('=').next().unwrap_or_default();
    text.parse().map_err(|error| ConfigError::new("--ca-header", name, error, fix))
}

fn spans(endpoint: Option<String>, ratio: &str) -> Result<Option<Export>, ConfigError> {
    const RATIO: &str = "--otlp-sample-ratio";
    let fix = "give a number from 0 to 1, such as 0.01";
    let ratio = match ratio.parse::<f64>() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
        Ok(_) => return Err(ConfigError::new(RATIO, ratio, "is out of range", fix)),
        Err(error) => return Err(ConfigError::new(RATIO, ratio, error, fix)),
    };
    let Some(endpoint) = endpoint else { return Ok(None) };
    let problem = match endpoint.parse::<http::Uri>() {
        Err(error) => error.to_string(),
        Ok(address) if address.scheme_str() != Some("http") => "is not http".to_owned(),
        Ok(address) if address.port_u16().is_none() => "has no port".to_owned(),
        Ok(address) if !matches!(address.path(), "" | "/") => "has a path".to_owned(),
        Ok(_) => return Ok(Some(Export { endpoint, ratio })),
    };
    Err(ConfigError::new("--otlp-endpoint", endpoint, problem, "give http://HOST:PORT, such as http://127.0.0.1:4317"))
}

/// Parses a duration such as `30s` or `1h`.
///
/// # Errors
/// When it is none.
pub fn duration(flag: &'static str, value: &str) -> Result<Duration, ConfigError> {
    humantime::parse_duration(value)
        .map_err(|error| ConfigError::new(flag, value, error, "give a duration such as 30s or 1h"))
}

/// Parses the lifetime of certificates.
///
/// # Errors
/// When it is no duration, or one too short to renew within.
pub fn lifetime(flag: &'static str, value: &str) -> Result<Duration, ConfigError> {
    const SHORTEST: Duration = Duration::from_secs(2);
    match duration(flag, value)? {
        lifetime if lifetime >= SHORTEST => Ok(lifetime),
        _ => Err(ConfigError::new(flag, value, "is too short to renew within", "give at least 2s; 1h is usual")),
    }
}

/// Parses an address to listen on.
///
/// # Errors
/// When it is none.
pub fn listen(flag: &'static str, value: &str) -> Result<SocketAddr, ConfigError> {
    value
        .parse()
        .map_err(|error| ConfigError::new(flag, value, error, "give IP:PORT, such as 127.0.0.1:15020 or [::]:15020"))
}

fn cni(
    places: PlacesBy,
    at: PathBuf,
    state_dir: PathBuf,
    conf_dir: Option<PathBuf>,
    bin_dir: Option<PathBuf>,
) -> Result<Option<CniConfig>, ConfigError> {
    const CONF: &str = "--cni-conf-dir";
    const BIN: &str = "--cni-bin-dir";
    let state_dir = absolute("--state-dir", state_dir, "give an absolute path such as /var/lib/heddle")?;
    let socket = socket("--cni-socket", at)?;
    let Some(conf_dir) = conf_dir else {
        return match bin_dir {
            None => Ok(None),
            Some(path) => {
                let problem = "is given without --cni-conf-dir";
                Err(ConfigError::new(BIN, path.to_string_lossy(), problem, "give both, or none"))
            }
        };
    };
    if places != PlacesBy::Node {
        let problem = "is given without --places node, so a pod that is asked about could not be found";
        return Err(ConfigError::new(CONF, conf_dir.to_string_lossy(), problem, "give both, or none"));
    }
    let conf_dir = absolute(CONF, conf_dir, "give an absolute path such as /etc/cni/net.d")?;
    let bin_dir = bin_dir.map(|path| absolute(BIN, path, "give an absolute path such as /opt/cni/bin")).transpose()?;
    Ok(Some(CniConfig { socket, state_dir, bin_dir, conf_dir }))
}

fn socket(flag: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    let path = absolute(flag, path, "give an absolute path such as /run/heddle/admin.sock")?;
    if path.as_os_str().len() > SOCKET_PATH {
        return Err(ConfigError::new(
            flag,
            path.to_string_lossy(),
            "is too long for a socket",
            "give a path of at most 96 bytes",
        ));
    }
    Ok(path)
}

fn workers(value: Option<String>) -> Result<usize, ConfigError> {
    let Some(value) = value else {
        return Ok(default_workers(std::thread::available_parallelism().map_or(1, NonZero::get)));
    };
    match value.parse() {
        Ok(workers @ 1..=1_024) => Ok(workers),
        Ok(_) => Err(ConfigError::new("--workers", value, "is out of range", "give 1 to 1024")),
        Err(error) => Err(ConfigError::new("--workers", value, error, "give a number from 1 to 1024")),
    }
}

/// A quarter of the cores: the node is for its pods. Two at least, so that one long task does not stop everything.
pub(super) fn default_workers(cores: usize) -> usize {
    cores.div_ceil(4).max(2)
}
