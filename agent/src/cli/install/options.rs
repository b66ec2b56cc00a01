//! What an operator can change ([`Options`], as typed) and what it means ([`Wanted`]).

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::{
    life::config::{ConfigError, ROOT_NAMESPACE, TRUST_DOMAIN, named, trust_domain},
    telemetry::Format,
};

/// The image that the manifests name unless told otherwise.
pub(super) const IMAGE: &str = concat!("heddle:", env!("CARGO_PKG_VERSION"));
/// What `deploy/` itself says.
pub(super) const CLUSTER_ID: &str = "Kubernetes";
pub(super) const AUDIENCE: &str = "istio-ca";
pub(super) const CNI_BIN_DIR: &str = "/opt/cni/bin";
pub(super) const CNI_CONF_DIR: &str = "/etc/cni/net.d";
/// What a ConfigMap with a trust bundle calls it, as Istio does.
const ROOT_KEY: &str = "root-cert.pem";

/// How the manifests are changed.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "What is installed")]
pub(in crate::cli) struct Options {
    /// Namespace of the agents and the CA.
    #[arg(long, default_value = ROOT_NAMESPACE, value_name = "NAME")]
    pub namespace: String,
    /// Image with the heddle binaries.
    #[arg(long, default_value = IMAGE, value_name = "IMAGE")]
    pub image: String,
    /// Secret with which the image is pulled; may be given again.
    #[arg(long, value_name = "NAME")]
    pub image_pull_secret: Vec<String>,
    /// SPIFFE trust domain of the mesh.
    #[arg(long, default_value = TRUST_DOMAIN, value_name = "NAME")]
    pub trust_domain: String,
    /// Name of the cluster in metrics and to the CA.
    #[arg(long, default_value = CLUSTER_ID, value_name = "NAME")]
    pub cluster_id: String,
    /// Where the node keeps its CNI plugins.
    #[arg(long, default_value = CNI_BIN_DIR, value_name = "DIR")]
    pub cni_bin_dir: PathBuf,
    /// Where the node keeps its CNI configuration.
    #[arg(long, default_value = CNI_CONF_DIR, value_name = "DIR")]
    pub cni_conf_dir: PathBuf,
    /// Leave the node's CNI alone: pods are captured only when the agent has found them, moments after they start.
    #[arg(long, conflicts_with_all = ["cni_bin_dir", "cni_conf_dir"])]
    pub no_cni: bool,
    /// CPU that each agent reserves [default: 100m].
    #[arg(long, value_name = "QUANTITY")]
    pub cpu: Option<String>,
    /// Most CPU of an agent [default: no limit].
    #[arg(long, value_name = "QUANTITY")]
    pub cpu_limit: Option<String>,
    /// Memory that each agent reserves [default: 128Mi].
    #[arg(long, value_name = "QUANTITY")]
    pub memory: Option<String>,
    /// Most memory of an agent, which it divides among its pods [default: 1Gi].
    #[arg(long, value_name = "QUANTITY")]
    pub memory_limit: Option<String>,
    /// How two pods of one node talk where neither says it.
    #[arg(long, value_enum, default_value = "kernel", value_name = "HOW")]
    pub same_node: SameNode,
    /// Where certificates come from.
    #[arg(long, value_enum, default_value = "built-in", value_name = "WHAT")]
    pub ca: Ca,
    /// Secret with the CA's intermediate (tls.crt, tls.key, ca.crt, as cert-manager writes them).
    #[arg(long, required_if_eq("ca", "secret"), value_name = "NAME")]
    pub ca_secret: Option<String>,
    /// The CA, https://HOST:PORT.
    #[arg(long, required_if_eq("ca", "external"), value_name = "URL")]
    pub ca_address: Option<String>,
    /// Audience of the agents' tokens.
    #[arg(long, default_value = AUDIENCE, value_name = "NAME")]
    pub ca_audience: String,
    /// ConfigMap of the namespace with the roots to trust.
    #[arg(long, required_if_eq("ca", "external"), value_name = "NAME[/KEY]")]
    pub ca_root: Option<String>,
    /// Let the agents take the taint heddle.dev/not-ready off nodes on which capture works.
    #[arg(long)]
    pub taint: bool,
    /// Form of the logs.
    #[arg(long, value_enum, default_value = "json", value_name = "FORMAT")]
    pub log_format: Format,
    /// One more flag of `heddle agent`, such as --agent-arg=--drain-grace=60s; may be given again.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub agent_arg: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum SameNode {
    /// Without the agent: the kernel attests who connects, nothing is encrypted.
    Kernel,
    /// In mutual TLS, as between nodes.
    Mtls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Ca {
    /// heddle's own, under a root that it makes once.
    BuiltIn,
    /// heddle's own, under the intermediate of --ca-secret.
    Secret,
    /// Another server of Istio's CA API: --ca-address, --ca-root.
    External,
}

/// Options that can work.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub options: Options,
    pub ca: CaWanted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CaWanted {
    BuiltIn,
    Secret { name: String },
    External { address: String, config_map: String, key: String },
}

impl Options {
    /// # Errors
    /// The first flag whose value can't work.
    pub(super) fn validate(&self) -> Result<Wanted, ConfigError> {
        name("--namespace", &self.namespace)?;
        image(&self.image)?;
        trust_domain(&self.trust_domain)?;
        named("--cluster-id", self.cluster_id.clone(), "give a name such as Kubernetes")?;
        named("--ca-audience", self.ca_audience.clone(), "give a name such as istio-ca")?;
        for secret in &self.image_pull_secret {
            name("--image-pull-secret", secret)?;
        }
        absolute("--cni-bin-dir", &self.cni_bin_dir)?;
        absolute("--cni-conf-dir", &self.cni_conf_dir)?;
        for (flag, value) in [
            ("--cpu", &self.cpu),
            ("--cpu-limit", &self.cpu_limit),
            ("--memory", &self.memory),
            ("--memory-limit", &self.memory_limit),
        ] {
            value.as_deref().map_or(Ok(()), |value| quantity(flag, value))?;
        }
        for flag in &self.agent_arg {
            if !flag.starts_with("--") {
                let fix = "give a flag of `heddle agent`, such as --drain-grace=60s";
                return Err(wrong("--agent-arg", flag, "is no flag", fix));
            }
        }
        Ok(Wanted { ca: self.ca()?, options: self.clone() })
    }

    fn ca(&self) -> Result<CaWanted, ConfigError> {
        let unused = |flag, value: &Option<String>, only| match value {
            Some(value) => Err(wrong(flag, value, "is not asked for by this --ca", only)),
            None => Ok(()),
        };
        match self.ca {
            Ca::BuiltIn => {
                unused("--ca-secret", &self.ca_secret, "say --ca=secret, or leave it out")?;
                unused("--ca-address", &self.ca_address, "say --ca=external, or leave it out")?;
                unused("--ca-root", &self.ca_root, "say --ca=external, or leave it out")?;
                Ok(CaWanted::BuiltIn)
            }
            Ca::Secret => {
                unused("--ca-address", &self.ca_address, "say --ca=external, or leave it out")?;
                unused("--ca-root", &self.ca_root, "say --ca=external, or leave it out")?;
                let secret = self.ca_secret.clone().unwrap_or_default();
                name("--ca-secret", &secret)?;
                Ok(CaWanted::Secret { name: secret })
            }
            Ca::External => {
                unused("--ca-secret", &self.ca_secret, "say --ca=secret, or leave it out")?;
                let root = self.ca_root.clone().unwrap_or_default();
                let (config_map, key) = root.split_once('/').unwrap_or((&root, ROOT_KEY));
                name("--ca-root", config_map)?;
                let key =
                    named("--ca-root", key.to_owned(), "give NAME/KEY, such as istio-ca-root-cert/root-cert.pem")?;
                let address = self.ca_address.clone().unwrap_or_default();
                Ok(CaWanted::External { address, config_map: config_map.to_owned(), key })
            }
        }
    }
}

fn wrong(flag: &'static str, value: &str, problem: impl ToString, fix: &'static str) -> ConfigError {
    ConfigError { flag, value: value.to_owned(), problem: problem.to_string(), fix }
}

/// A name of Kubernetes that is also a DNS label (RFC 1123).
fn name(flag: &'static str, value: &str) -> Result<(), ConfigError> {
    let letters = value.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if letters && (1..=63).contains(&value.len()) && !value.starts_with('-') && !value.ends_with('-') {
        return Ok(());
    }
    Err(wrong(
        flag,
        value,
        "is no name of Kubernetes",
        "give at most 63 lower-case letters, digits and dashes, such as heddle-system",
    ))
}

fn image(value: &str) -> Result<(), ConfigError> {
    if value.is_empty() || value.chars().any(|letter| letter.is_whitespace() || letter.is_control()) {
        return Err(wrong("--image", value, "is no image", "give one such as registry.example/heddle:0.1.0"));
    }
    Ok(())
}

fn absolute(flag: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() && path.to_str().is_some() {
        return Ok(());
    }
    Err(wrong(flag, &path.to_string_lossy(), "is no absolute path", "give a path of the node such as /opt/cni/bin"))
}

/// A decimal number with one of the suffixes of `k8s.io/apimachinery/pkg/api/resource`.
fn quantity(flag: &'static str, value: &str) -> Result<(), ConfigError> {
    const SUFFIXES: [&str; 13] = ["", "m", "k", "M", "G", "T", "P", "Ki", "Mi", "Gi", "Ti", "Pi", "E"];
    let end = value.find(|letter: char| letter.is_ascii_alphabetic()).unwrap_or(value.len());
    let (number, suffix) = value.split_at(end);
    let digits = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if digits && number.parse::<f64>().is_ok_and(|number| number > 0.0) && SUFFIXES.contains(&suffix) {
        return Ok(());
    }
    Err(wrong(flag, value, "is no quantity", "give one such as 250m or 256Mi"))
}
