//! The lab's API server: the stand-in on a node's address, with threads of its own.

use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Runtime};

use crate::{apiserver::ApiServer, node::Node};

/// Port of the lab's API server.
const PORT: u16 = 6443;
/// Entries of a page: as many as agents ask for.
const PAGE: usize = 500;
/// Who the agents are.
const AGENT: &str = "agent";

/// A running API server; gone when dropped.
pub struct Kubernetes {
    // Before its threads, which drop with the last field.
    api: ApiServer,
    kubeconfig: PathBuf,
    _runtime: Runtime,
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Kubernetes").field("address", &self.api.address()).finish_non_exhaustive()
    }
}

impl Kubernetes {
    /// Listens inside the node.
    pub(crate) fn start(node: &Node, host: std::net::Ipv4Addr, dir: &Path) -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("api-server").enable_all().build()?;
        let listener = node.netns.inside(|| Ok(TcpListener::bind(SocketAddr::from((host, PORT)))?))?;
        let api = runtime.block_on(async { ApiServer::start_on(listener) })?;
        api.set_page(PAGE);
        let kubeconfig = dir.join("kubeconfig");
        api.write_kubeconfig_of(&kubeconfig, AGENT).context("writing a kubeconfig")?;
        Ok(Self { api, kubeconfig, _runtime: runtime })
    }

    #[must_use]
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }
}
