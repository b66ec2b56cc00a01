//! Where the programs are that the lab starts: beside the test that runs, in the same target directory.

use std::{env, path::PathBuf};

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
