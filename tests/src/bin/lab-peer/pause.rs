//! What the lab's containers need that does no networking: a process that only is there, and a bundle that runs on any machine.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

/// Waits for SIGTERM: process 1 of a container has no handler but its own.
pub async fn run() -> Result<()> {
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}

/// Takes the limits of an OCI bundle away, and its devices with them.
pub fn without_resources(config: &Path) -> Result<()> {
    let mut bundle: Value = serde_json::from_slice(&fs::read(config)?).context(config.display().to_string())?;
    if let Some(linux) = bundle["linux"].as_object_mut() {
        linux.remove("resources");
    }
    Ok(fs::write(config, serde_json::to_vec(&bundle)?)?)
}
