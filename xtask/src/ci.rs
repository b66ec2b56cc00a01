//! `cargo xtask ci`: the same as `.ci/run`, which is the same as `cargo xtask test`. There is one list of checks.

use std::process::ExitCode;

use anyhow::Result;

use crate::test;

pub fn run() -> Result<ExitCode> {
    test::run(&test::Options::default())
}
