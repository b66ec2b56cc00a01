//! `cargo xtask bench`: sets the machine up, builds everything for release, and starts the bench, which lives with the lab
//! in `tests/`.

use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};

use crate::{
    console::{PACKAGES, cargo, catch_interrupts, interrupted, is_root, root, show, target},
    setup,
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only these rows, such as cross_node/throughput_1, 'connect_*' or 'same_node/*'
    #[arg(long, num_args = 1.., value_name = "PATTERN")]
    rows: Vec<String>,
    /// Repetitions of each measurement, of which the median counts [default: 3]
    #[arg(long)]
    rounds: Option<u8>,
    /// One round of a second each: shows that it works, the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Measures what each hook of the kernel lane costs by itself, and nothing else
    #[arg(long)]
    hooks: bool,
    /// Prints the names of all rows and measures nothing
    #[arg(long)]
    list: bool,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(is_root(), "network namespaces and kernel programs need root: sudo -E cargo xtask …");
    catch_interrupts()?;
    setup::run()?;
    setup::run_bench()?;
    println!("building for release");
    ensure!(show(cargo(["build", "--release", "--bins"]).args(PACKAGES))?.success(), "the build failed");
    let lab = target().join("release/heddle-lab");
    let mut bench = Command::new(&lab);
    bench.arg("bench").arg("--out").arg(target().join("bench")).current_dir(root());
    if let Some(rounds) = options.rounds {
        bench.args(["--rounds", &rounds.to_string()]);
    }
    bench.args(options.quick.then_some("--quick")).args(options.list.then_some("--list"));
    bench.args(options.hooks.then_some("--hooks"));
    if !options.rows.is_empty() {
        bench.arg("--rows").args(&options.rows);
    }
    let done = show(&mut bench);
    let swept = show(Command::new(&lab).arg("sweep"))?;
    let good = done?.success() && swept.success() && !interrupted();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
