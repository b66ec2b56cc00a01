//! Where the programs are that the lab starts: beside the test that runs, in the same target directory.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// The `heddle` binary: `HEDDLE_BIN`, or what was built in this profile.
pub fn heddle() -> Result<PathBuf> {
    match env::var_os("HEDDLE_BIN") {
        Some(path) => Ok(path.into()),
        None => beside("heddle"),
    }
}

/// The workload of the lab's pods.
pub fn lab_peer() -> Result<PathBuf> {
    beside("lab-peer")
}

/// Python with the stock OpenTelemetry protobufs, in a folder that `cargo xtask test` makes in the target directory;
/// `None` where that was not possible.
#[must_use]
pub fn otlp_python() -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    own.ancestors().map(|folder| folder.join("otlp/bin/python3")).find(|path| path.is_file())
}

/// Python with stock gRPC and its compiler, in a folder of the same kind.
#[must_use]
pub fn grpc_python() -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    own.ancestors().map(|folder| folder.join("grpc/bin/python3")).find(|path| path.is_file())
}

/// The client of the CA that it runs.
#[must_use]
pub fn ca_client() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ca/client.py")
}

/// What the CA's API is published as.
#[must_use]
pub fn ca_proto() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent/proto/citadel.proto")
}

/// The receiver of spans that it runs.
#[must_use]
pub fn otlp_receiver() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("otlp/receiver.py")
}

fn beside(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("own path")?;
    // Tests live in target/<profile>/deps, binaries one folder up.
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built beside {}: cargo build --bin {name}", own.display()))
}
