//! The trust bundle on its way to the nodes: certificates only, to a file and to ConfigMaps, written where it differs.
//!
//! Of several replicas the Lease's holder writes ConfigMaps. A bundle is never published half: files are renamed into place.

mod config_maps;
mod lease;

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{CaError, source::Keys};
use crate::{identity::roots::read_capped, life::limits};

/// Where the bundle goes.
pub(super) struct Publisher {
    keys: Arc<Keys>,
    file: Option<PathBuf>,
    cluster: Option<Cluster>,
    failing: bool,
}

/// The ConfigMaps, and the right to write them.
struct Cluster {
    maps: config_maps::ConfigMaps,
    lease: lease::Lease,
    /// When all of them are looked at again.
    due: Instant,
    client: kube::Client,
    /// Whether the Lease is ours.
    holds: watch::Sender<bool>,
}

impl Publisher {
    /// Publishes the file at once: who reads it can connect. `namespace` is the CA's own.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn new(keys: Arc<Keys>, file: Option<PathBuf>, cluster: Option<(kube::Client, &str)>) -> Result<Self, CaError> {
        let cluster = cluster.map(|(client, namespace)| Cluster {
            maps: config_maps::ConfigMaps::new(client.clone(), namespace),
            lease: lease::Lease::new(client.clone(), namespace),
            client,
            due: Instant::now(),
            holds: watch::Sender::new(false),
        });
        let publisher = Self { keys, file, cluster, failing: false };
        publisher.write()?;
        Ok(publisher)
    }

    /// The way to the cluster, and whether this replica is the one that writes there; `None` without one.
    pub fn publishing(&self) -> Option<(kube::Client, watch::Receiver<bool>)> {
        self.cluster.as_ref().map(|cluster| (cluster.client.clone(), cluster.holds.subscribe()))
    }

    /// Publishes until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.keys.changes();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(limits::PUBLISH_LOOK) => {}
                Ok(()) = changes.changed() => self.hurry(),
            }
            let written = self.write();
            if let Err(error) = &written
                && !self.failing
            {
                tracing::error!(reason = error.reason(), %error, "Trust bundle not published; trying again.");
            }
            self.failing = written.is_err();
            if let Some(cluster) = &mut self.cluster {
                cluster.turn(&self.keys).await;
            }
        }
        if let Some(cluster) = &mut self.cluster {
            cluster.holds.send_replace(false);
            cluster.lease.release().await;
        }
    }

    fn hurry(&mut self) {
        if let Some(cluster) = &mut self.cluster {
            cluster.due = Instant::now();
        }
    }

    fn write(&self) -> Result<(), CaError> {
        let Some(path) = &self.file else { return Ok(()) };
        let bundle = self.keys.current().bundle_pem();
        if read_capped(path, limits::BUNDLE_BYTES).is_ok_and(|there| there == bundle.as_bytes()) {
            return Ok(());
        }
        replace(path, bundle.as_bytes(), None).map_err(|error| CaError::Publish(path.clone(), error))
    }
}

impl Cluster {
    async fn turn(&mut self, keys: &Keys) {
        let held = self.lease.hold().await;
        self.holds.send_if_modified(|before| std::mem::replace(before, held) != held);
        if !held || Instant::now() < self.due {
            return;
        }
        if self.maps.publish(&keys.current().bundle_pem()).await {
            self.due = Instant::now() + limits::CONFIG_MAP_LOOK;
        }
    }
}

/// Writes beside `path` and renames, so that no reader sees half of it. A file with a secret gets the owner and mode of `like`
/// where that exists, and is otherwise its owner's alone.
pub(super) fn replace(path: &Path, bytes: &[u8], like: Option<&Path>) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let mut options = fs::File::options();
    options.write(true).create(true).truncate(true);
    if like.is_some() {
        options.mode(0o600);
    }
    let mut file = options.open(&temporary)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| like.map_or(Ok(()), |like| as_readable_as(&file, like)))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn as_readable_as(file: &fs::File, like: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::metadata(like) else { return Ok(()) };
    let own = file.metadata()?;
    if (own.uid(), own.gid()) != (metadata.uid(), metadata.gid()) {
        fchown(file, Some(metadata.uid()), Some(metadata.gid()))?;
    }
    file.set_permissions(metadata.permissions())
}

#[cfg(test)]
mod tests;
