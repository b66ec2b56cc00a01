//! `cargo xtask`: what a contributor types. One file per verb; it needs nothing but Rust, and installs the rest.

mod bench;
mod ci;
mod console;
mod debian;
mod demo;
mod ebpf;
mod fuzz;
mod kernels;
mod lab;
mod setup;
mod specification;
mod steps;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "heddle: demonstrate, test, measure, build", disable_version_flag = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Two nodes, six pods of real software, and everything heddle does, shown on real traffic
    Demo(demo::Options),
    /// Every check and test, and a list of what could not run here
    Test(test::Options),
    /// What the mesh costs: throughput, connections, requests, CPU and memory, with it and without
    Bench(bench::Options),
    /// Rebuild the kernel programs' object
    Ebpf {
        /// Only compare with the committed one
        #[arg(long)]
        check: bool,
    },
    /// Every parser that something outside feeds, 20 seconds each
    Fuzz(fuzz::Options),
    /// The demonstration's nodes and pods, to look around in
    Lab(lab::Options),
    /// What continuous integration runs
    Ci,
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Demo(options) => demo::run(&options),
        Verb::Test(options) => test::run(&options),
        Verb::Bench(options) => bench::run(&options),
        Verb::Ebpf { check } => ebpf::run(check).map(|()| ExitCode::SUCCESS),
        Verb::Fuzz(options) => fuzz::run(&options),
        Verb::Lab(options) => lab::run(&options),
        Verb::Ci => ci::run(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
