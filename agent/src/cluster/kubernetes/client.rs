//! The way to the API server: a kubeconfig, or what every pod has. Agent and CA have the same.

use std::{path::Path, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::life::limits;

/// Why there is no way to the API server. Says which file can't be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ClientError(String);

impl ClientError {
    /// Stable name: metric label and log key.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        "cluster"
    }
}

/// Reads the configuration; connects at the first request.
///
/// # Errors
/// Says which file can't be used and what to do about it.
pub async fn api_client(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    let mut config = match kubeconfig {
        Some(path) => {
            let failed =
                |error: &dyn ToString| ClientError(format!("--kubeconfig {}: {}", path.display(), error.to_string()));
            let file = Kubeconfig::read_from(path).map_err(|error| failed(&error))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(file, &options).await.map_err(|error| failed(&error))?
        }
        None => Config::incluster().map_err(|error| {
            ClientError(format!("no pod of a cluster ({error}); outside of one give --kubeconfig FILE"))
        })?,
    };
    config.connect_timeout = Some(limits::CONNECT_PEER);
    config.write_timeout = Some(limits::CA_AUTHORIZE);
    // A watch says nothing for as long as it lasts, or until a bookmark; after that, a connection is dead.
    config.read_timeout = Some(Duration::from_secs(limits::KUBE_WATCH.into()) + limits::CONNECT_PEER);
    config.reset_reader_on_write = true;
    // Who asks has a deadline, and knows better when to ask again.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| ClientError(error.to_string()))
}
