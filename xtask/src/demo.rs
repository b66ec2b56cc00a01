//! `cargo xtask demo`: sets the machine up, builds, and starts the demonstration, which lives with the lab in `tests/`.

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Result, ensure};

use crate::{
    console::{PACKAGES, cargo, catch_interrupts, interrupted, is_root, show, target},
    setup,
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Leave it running, and say how to look around and how to remove it
    #[arg(long)]
    keep: bool,
    /// Also write what is shown as a page, with a picture of the topology and its flows
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let mut args = vec!["demo".into()];
    if options.keep {
        args.push("--keep".into());
    }
    if let Some(file) = &options.html {
        args.extend(["--html".into(), file.clone().into_os_string()]);
    }
    with_lab(&args)
}

/// Sets up, builds, runs `heddle-lab` with these arguments, and sweeps, whatever came of it.
pub fn with_lab(args: &[std::ffi::OsString]) -> Result<ExitCode> {
    ensure!(is_root(), "network namespaces and kernel programs need root: sudo -E cargo xtask …");
    catch_interrupts()?;
    setup::run()?;
    println!("building");
    ensure!(show(cargo(["build", "--bins"]).args(PACKAGES))?.success(), "the build failed");
    let lab = target().join("debug/heddle-lab");
    let done = show(Command::new(&lab).args(args));
    let swept = show(Command::new(&lab).arg("sweep"))?;
    let good = done?.success() && swept.success() && !interrupted();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
