//! The way to the API server for a verb that runs on an operator's machine or in a pod: as kubectl finds it. Each question has
//! a deadline, and none is asked twice.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig as File},
};
use tokio::time::timeout;

use crate::life::limits;

/// Where every pod has its service account's token.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Which cluster is asked.
#[derive(Debug, Clone)]
pub(super) enum Kubeconfig {
    File(Box<File>),
    InCluster,
}

impl Kubeconfig {
    /// The file that is named, else that of `KUBECONFIG`, else `~/.kube/config`, else the pod's own way; `None` where there is
    /// none of these.
    ///
    /// # Errors
    /// A file that is there, or was named, and can't be used.
    pub fn find(named: Option<&Path>) -> anyhow::Result<Option<Self>> {
        if let Some(path) = named {
            let file = File::read_from(path).with_context(|| format!("--kubeconfig {}", path.display()))?;
            return Ok(Some(Self::File(Box::new(file))));
        }
        if let Some(file) = File::from_env().context("KUBECONFIG")? {
            return Ok(Some(Self::File(Box::new(file))));
        }
        let usual = env::var_os("HOME").map(|home| PathBuf::from(home).join(".kube/config"));
        if let Some(path) = usual.filter(|path| path.is_file()) {
            let file = File::read_from(&path).with_context(|| path.display().to_string())?;
            return Ok(Some(Self::File(Box::new(file))));
        }
        Ok(Path::new(TOKEN).is_file().then_some(Self::InCluster))
    }

    /// How to connect.
    ///
    /// # Errors
    /// What the configuration names and can't be used.
    pub async fn config(&self) -> anyhow::Result<Config> {
        let mut config = match self {
            Self::File(file) => {
                Config::from_custom_kubeconfig(File::clone(file), &KubeConfigOptions::default()).await?
            }
            Self::InCluster => Config::incluster()?,
        };
        config.connect_timeout = Some(limits::CONNECT_PEER);
        config.default_retry = false;
        Ok(config)
    }

    /// Asks.
    ///
    /// # Errors
    /// When there is no answer within `patience`.
    pub fn ask<T>(
        &self,
        patience: Duration,
        question: impl AsyncFnOnce(Client) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start the runtime")?;
        let asking = async {
            let client = Client::try_from(self.config().await?)?;
            question(client).await
        };
        runtime.block_on(async {
            timeout(patience, asking).await.with_context(|| format!("the API server gave no answer in {patience:?}"))?
        })
    }
}
