//! `cargo xtask test`: format, lints, the kernel object, unit and property tests, the lab; then a summary of all of it and
//! of what could not run here.

use std::{
    fs,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};

use crate::{
    console::{PACKAGES, cargo, catch_interrupts, follow, interrupted, is_root, show, target},
    ebpf,
    fuzz::{self, Fuzzed},
    kernels, setup, specification,
    steps::Tally,
};

#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// Only lab tests whose name (file::claim) contains this
    #[arg(long)]
    pub lab: Option<String>,
    /// The binaries and lab tests as they are shipped, with the figures of each: promises of time are held to them
    #[arg(long, requires = "lab")]
    pub release: bool,
    /// Only the claims that rest on the kernel, such as capture and mutual TLS, on Debian's kernels in qemu, and a table of what came of it
    #[arg(long, conflicts_with = "lab")]
    pub kernels: bool,
    /// Only the kernels of these Debian suites
    #[arg(long, value_name = "SUITE", value_delimiter = ',', requires = "kernels")]
    pub suite: Vec<String>,
}

/// Lab tests that load the machine: one at a time, as `.config/nextest.toml` has it.
const ALONE: [&str; 6] = ["abuse::", "churn::", "fairness::", "load::", "revocation::", "stalls::"];

impl Options {
    /// Cargo's arguments, and the folder of its output.
    fn profile(&self) -> (&'static [&'static str], &'static str) {
        if self.release { (&["--release"], "release") } else { (&[], "debug") }
    }
}

pub fn run(options: &Options) -> Result<ExitCode> {
    catch_interrupts()?;
    let mut tally = Tally::default();
    setup::run()?;
    title("build");
    let built = show(cargo(["build"]).args(PACKAGES).args(options.profile().0))?;
    ensure!(built.success(), "the build failed");
    if options.kernels {
        kernels::run(&mut tally, &options.suite)?;
        println!("{}", tally.summary());
        return Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if options.lab.is_none() {
        checks(&mut tally)?;
        unit_tests(&mut tally)?;
        fuzzing(&mut tally)?;
    }
    if !interrupted() {
        lab_tests(&mut tally, options)?;
    }
    leave_nothing(&mut tally, options)?;
    println!();
    if interrupted() {
        tally.check("the run was interrupted", false);
    }
    println!("{}", tally.summary());
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn title(name: &str) {
    println!("\n== {name}");
}

/// What needs no test harness.
fn checks(tally: &mut Tally) -> Result<()> {
    title("format");
    if has("fmt") {
        tally.check("cargo fmt --check", show(&mut cargo(["fmt", "--all", "--check"]))?.success());
    } else {
        tally.skipped.push("cargo fmt --check: rustfmt is not installed (rustup component add rustfmt)".to_owned());
    }
    title("lints");
    if has("clippy") {
        let linted = show(cargo(["clippy", "--all-targets"]).args(PACKAGES).args(["--", "-D", "warnings"]))?;
        tally.check("cargo clippy", linted.success());
    } else {
        tally.skipped.push("cargo clippy: not installed (rustup component add clippy)".to_owned());
    }
    title("promises");
    match specification::check() {
        Ok(promises) => {
            println!("{promises} promises, each with a test or a row of the bench that is there");
            tally.check("SPECIFICATION.md", true);
        }
        Err(error) => {
            eprintln!("{error:#}");
            tally.check("SPECIFICATION.md", false);
        }
    }
    title("kernel object");
    match ebpf::run(true) {
        Ok(()) => tally.check("cargo xtask ebpf --check", true),
        Err(error) => {
            eprintln!("{error:#}");
            tally.check("cargo xtask ebpf --check", false);
        }
    }
    Ok(())
}

fn unit_tests(tally: &mut Tally) -> Result<()> {
    title("unit and property tests");
    let before = tally.failed;
    let done = if has("nextest") {
        let only = ["--no-fail-fast", "-E", "not (package(heddle-lab) & kind(test))"];
        follow(cargo(["nextest", "run"]).args(PACKAGES).args(only), |line| tally.read(line))?
    } else {
        follow(cargo(["test", "--lib", "--bins", "--no-fail-fast"]).args(PACKAGES), |line| tally.read(line))?
    };
    settle(tally, before, done.success(), "unit tests");
    title("examples in the documentation");
    let before = tally.failed;
    let done = follow(cargo(["test", "--doc"]).args(PACKAGES), |line| tally.read(line))?;
    settle(tally, before, done.success(), "documentation tests");
    Ok(())
}

fn fuzzing(tally: &mut Tally) -> Result<()> {
    title("fuzzing");
    match fuzz::fuzz(&fuzz::Options::default())? {
        Fuzzed::Done { good, crashed } => {
            tally.passed += good;
            crashed.iter().for_each(|crash| tally.check(crash, false));
        }
        Fuzzed::Skipped(why) => tally.skipped.push(format!("fuzzing: {why}")),
    }
    Ok(())
}

fn lab_tests(tally: &mut Tally, options: &Options) -> Result<()> {
    title("the lab");
    let (only, (profile, _)) = (options.lab.as_deref(), options.profile());
    let skips = target().join("lab-skips.txt");
    // Notes of an earlier run are not ours; there may be none.
    let _ = fs::remove_file(&skips);
    let before = tally.failed;
    let mut good = true;
    let mut run = |command: &mut Command, tally: &mut Tally| -> Result<()> {
        let done = follow(command.env("HEDDLE_SKIPS", &skips), |line| tally.read(line))?;
        good &= done.success();
        Ok(())
    };
    if has("nextest") {
        let mut filter = "package(heddle-lab) & kind(test)".to_owned();
        if let Some(only) = only {
            filter.push_str(&format!(" & test({only})"));
        }
        let mut command = cargo(["nextest", "run", "--no-fail-fast", "--test", "lab", "-E", &filter]);
        if options.release {
            command.args(["--success-output", "immediate"]);
        }
        run(command.args(PACKAGES).args(profile), tally)?;
    } else {
        let name = only.unwrap_or_default();
        let mut harness = |args: &[&str]| {
            let mut command = cargo(["test", "--no-fail-fast", "--test", "lab"]);
            run(command.args(PACKAGES).args(profile).arg("--").args(args), tally)
        };
        let skipped = ALONE.iter().flat_map(|module| ["--skip", module]);
        harness(&[name, "--test-threads=2"].into_iter().chain(skipped).collect::<Vec<_>>())?;
        for module in ALONE {
            // A harness takes one filter: a test of this module by its name, or all of the module.
            let filter = if name.starts_with(module) { name } else { module };
            if only.is_none_or(|only| filter.contains(only)) {
                harness(&[filter, "--test-threads=1"])?;
            }
        }
    }
    settle(tally, before, good, "lab tests");
    let notes = fs::read_to_string(&skips).unwrap_or_default();
    tally.skip_passed(notes.lines().map(str::to_owned));
    Ok(())
}

/// A harness that failed without a failed test: it didn't compile, or was ended.
fn settle(tally: &mut Tally, before: u64, good: bool, name: &str) {
    if !good && tally.failed == before {
        tally.check(name, false);
    }
}

/// Takes away what killed tests left, and fails for what is there then: a lab removes itself.
fn leave_nothing(tally: &mut Tally, options: &Options) -> Result<()> {
    if !is_root() {
        return Ok(());
    }
    title("left behind");
    let broom = target().join(options.profile().1).join("heddle-lab");
    let swept = Command::new(&broom).arg("sweep").output().context("running heddle-lab sweep")?;
    print!("{}", String::from_utf8_lossy(&swept.stdout));
    // Only labs of processes that were killed are left to be swept: after an interrupt that is in order.
    let nothing_swept = swept.stdout.is_empty() || interrupted();
    tally.check("every lab removed itself", swept.status.success() && nothing_swept);
    tally.check("nothing is left behind", show(Command::new(&broom).arg("leftovers"))?.success());
    Ok(())
}

/// Whether cargo has the subcommand.
fn has(subcommand: &str) -> bool {
    cargo([subcommand, "--version"]).output().is_ok_and(|output| output.status.success())
}
