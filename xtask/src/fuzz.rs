//! `cargo xtask fuzz`: every parser that a peer, a manifest or another process feeds, each for 20 seconds (`--long`: for
//! hours), with the targets of `fuzz/`. What they look for is in `agent/src/fuzzing.rs`.

use std::{
    fs,
    path::PathBuf,
    process::{Command, ExitCode},
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result, ensure};

use crate::console::{cargo, catch_interrupts, interrupted, root, show, target};

/// How long one target runs (seconds).
const SHORT: u64 = 20;
const LONG: u64 = 3_600;
/// Targets that run at a time.
const AT_A_TIME: usize = 2;
/// Memory of one target (MiB), and time for one input (seconds), past which it counts as a crash.
const MEMORY: u32 = 1_024;
const INPUT: u32 = 10;

#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// An hour for each target, and new inputs are kept in the corpus
    #[arg(long)]
    long: bool,
    /// Only these targets
    targets: Vec<String>,
}

/// What came of it.
pub enum Fuzzed {
    /// Targets that ran well, and what was wrong with the others.
    Done { good: u64, crashed: Vec<String> },
    /// Why nothing can be fuzzed here.
    Skipped(String),
}

pub fn run(options: &Options) -> Result<ExitCode> {
    catch_interrupts()?;
    match fuzz(options)? {
        Fuzzed::Skipped(why) => {
            println!("nothing was fuzzed: {why}");
            Ok(ExitCode::FAILURE)
        }
        Fuzzed::Done { good, crashed } => {
            println!("\n{good} targets ran well, {} crashed", crashed.len());
            crashed.iter().for_each(|crash| println!("  {crash}"));
            Ok(if crashed.is_empty() && !interrupted() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// Builds the targets and runs them.
pub fn fuzz(options: &Options) -> Result<Fuzzed> {
    if !nightly(&["--version"]).output().is_ok_and(|output| output.status.success()) {
        return Ok(Fuzzed::Skipped("it needs a nightly toolchain (rustup toolchain install nightly)".to_owned()));
    }
    let Some(cargo_fuzz) = cargo_fuzz()? else {
        return Ok(Fuzzed::Skipped("cargo-fuzz is not installed and can't be (cargo install cargo-fuzz)".to_owned()));
    };
    let known = targets()?;
    for wanted in &options.targets {
        ensure!(known.contains(wanted), "no target {wanted}; there are {}", known.join(", "));
    }
    let chosen: Vec<String> =
        known.into_iter().filter(|name| options.targets.is_empty() || options.targets.contains(name)).collect();
    let program = |arguments: &[&str]| {
        let mut command = Command::new(&cargo_fuzz);
        // Debug assertions and overflow checks, and no sanitizer: heddle's own code has no unsafe block that these reach.
        command.args(["fuzz"]).args(arguments).current_dir(root()).env("RUSTUP_TOOLCHAIN", "nightly");
        // Set by the cargo that runs this, which is stable's.
        command.env_remove("CARGO");
        command
    };
    let folder = target().join("fuzz");
    let folder = folder.to_str().context("the target folder is not UTF-8")?.to_owned();
    println!("building {} targets", chosen.len());
    let mut build = program(&["build", "--dev", "--sanitizer", "none", "--fuzz-dir", "fuzz", "--target-dir", &folder]);
    ensure!(show(&mut build)?.success(), "the fuzz targets don't build");
    let seconds = if options.long { LONG } else { SHORT };
    let (queue, done) = (Mutex::new(chosen), Mutex::new((0, Vec::new())));
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(name) = next(&queue).filter(|_| !interrupted()) {
                    let ended = run_target(&name, seconds, options.long);
                    let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    match ended {
                        Ok(()) => done.0 += 1,
                        Err(error) => done.1.push(format!("{error:#}")),
                    }
                }
            });
        }
    });
    let (good, crashed) = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(Fuzzed::Done { good, crashed })
}

fn next(queue: &Mutex<Vec<String>>) -> Option<String> {
    queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop()
}

/// Runs one target; an input that breaks it stays in `target/fuzz/artifacts`.
fn run_target(name: &str, seconds: u64, keep: bool) -> Result<()> {
    let corpus = root().join("fuzz/corpus").join(name);
    let fresh = target().join("fuzz/corpus").join(name);
    let crashes = target().join("fuzz/artifacts").join(name);
    for folder in [&fresh, &crashes] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let mut command = Command::new(built(name)?);
    // libFuzzer writes what is new into the first folder, and reads all.
    if keep {
        command.arg(&corpus);
    }
    let output = command
        .args([&fresh, &corpus])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg("-max_len=4096")
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .output()
        .with_context(|| format!("running {name}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let stat = |label: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(label));
        line.map_or_else(|| "?".to_owned(), |value| value.trim().to_owned())
    };
    if output.status.success() {
        println!(
            "{name}: {} inputs in {seconds} s, {} MiB",
            stat("stat::number_of_executed_units:"),
            stat("stat::peak_rss_mb:")
        );
        return Ok(());
    }
    let end: Vec<&str> = text.lines().rev().take(40).collect();
    end.into_iter().rev().for_each(|line| eprintln!("{name}: {line}"));
    let panic = text.lines().find(|line| line.contains("panicked at")).unwrap_or("no panic was seen");
    let input = text.lines().find_map(|line| line.split_once("Test unit written to "));
    anyhow::bail!("{name}: {panic}; input: {}", input.map_or("not kept", |(_, path)| path.trim()))
}

/// Where cargo-fuzz puts a target's program.
fn built(name: &str) -> Result<PathBuf> {
    let folders = fs::read_dir(target().join("fuzz")).context("target/fuzz")?.flatten();
    let mut programs = folders.map(|folder| folder.path().join("debug").join(name));
    programs.find(|program| program.is_file()).with_context(|| format!("{name} was not built"))
}

/// Names of the targets, as their files are called.
fn targets() -> Result<Vec<String>> {
    let entries = fs::read_dir(root().join("fuzz/fuzz_targets")).context("fuzz/fuzz_targets")?.flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

fn nightly(arguments: &[&str]) -> Command {
    let mut command = Command::new("rustc");
    command.args(arguments).env("RUSTUP_TOOLCHAIN", "nightly");
    command
}

/// The program; installed below `target/` where the machine has none.
fn cargo_fuzz() -> Result<Option<PathBuf>> {
    let own = target().join("tools");
    let installed = own.join("bin/cargo-fuzz");
    let works = |program: &PathBuf| {
        Command::new(program).args(["fuzz", "--version"]).output().is_ok_and(|output| output.status.success())
    };
    for program in [PathBuf::from("cargo-fuzz"), installed.clone()] {
        if works(&program) {
            return Ok(Some(program));
        }
    }
    println!("installing cargo-fuzz");
    let done = show(cargo(["install", "cargo-fuzz", "--quiet", "--root"]).arg(&own))?;
    Ok((done.success() && works(&installed)).then_some(installed))
}
