//! The binary: parse, run, exit.

use std::process::ExitCode;

use clap::Parser;
use heddle::cli::{Cli, exit_code, parse_exit_code};

/// Relay buffers come and go by hundreds of KiB: the C library maps and unmaps each, page by page.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // To stderr, or to stdout for --help: where that is closed there is nobody to tell.
            let _nobody_to_tell = error.print();
            return parse_exit_code(&error);
        }
    };
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("heddle: {error:#}");
            exit_code(&error)
        }
    }
}
