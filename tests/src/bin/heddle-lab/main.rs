//! What `cargo xtask` runs of the lab: the demonstration, the bench, a lab to look around in, and the broom.

mod bench;
mod demo;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use heddle_lab::state;

#[derive(Debug, Parser)]
#[command(about = "heddle's lab")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// The demonstration
    Demo {
        #[arg(long)]
        keep: bool,
        #[arg(long)]
        html: Option<PathBuf>,
    },
    /// The demonstration's topology with the mesh running, until Enter or Ctrl-C
    Up,
    /// What the mesh costs: throughput, connections, requests, CPU and memory, with it and without
    Bench(bench::Options),
    /// Removes what labs left whose process is gone
    Sweep,
    /// Removes labs that were kept, too
    Remove,
    /// Lists what is left of labs; fails where there is something
    Leftovers,
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Demo { keep, html } => demo::run(keep, html.as_deref()),
        Verb::Up => demo::up(),
        Verb::Bench(options) => bench::run(&options),
        Verb::Sweep => said(&state::sweep()?),
        Verb::Remove => said(&state::sweep_kept()?),
        Verb::Leftovers => {
            let left = state::leftovers()?;
            left.iter().for_each(|line| println!("left behind: {line}"));
            Ok(if left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn said(removed: &[String]) -> Result<ExitCode> {
    removed.iter().for_each(|prefix| println!("removed {prefix}"));
    Ok(ExitCode::SUCCESS)
}
