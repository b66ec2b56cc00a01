//! Tests that can't run here say so: Rust's harness has no word for it, so they are noted in a file that
//! `cargo xtask test` prints.

use std::{env, fs::OpenOptions, io::Write, path::Path};

/// Ends the test that it stands in, with a note, where the lab can't run.
#[macro_export]
macro_rules! needs_root {
    () => {
        if let Some(why) = $crate::cannot_run() {
            fn here() {}
            $crate::skip(std::any::type_name_of_val(&here).trim_end_matches("::here"), &why);
            return Ok(());
        }
    };
}

/// Ends the test that it stands in, with a note, where a program is not installed.
#[macro_export]
macro_rules! needs_program {
    ($program:expr) => {
        if let Some(why) = $crate::not_installed($program) {
            fn here() {}
            $crate::skip(std::any::type_name_of_val(&here).trim_end_matches("::here"), &why);
            return Ok(());
        }
    };
}

/// Why no lab can run here, where that is so.
#[must_use]
pub fn cannot_run() -> Option<String> {
    (!nix::unistd::geteuid().is_root()).then(|| "needs root".to_owned())
}

/// That a program is not among those of `PATH`, where that is so.
#[must_use]
pub fn not_installed(program: &str) -> Option<String> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders).any(|folder| folder.join(program).is_file());
    (!found).then(|| format!("needs {program}, which `cargo xtask test` installs"))
}

/// Notes that `test` did not run: on stdout, and in the file that `HEDDLE_SKIPS` names.
pub fn skip(test: &str, why: &str) {
    println!("SKIPPED: {test}: {why}");
    let Some(file) = env::var_os("HEDDLE_SKIPS") else { return };
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(Path::new(&file))
        .and_then(|mut file| writeln!(file, "{test}: {why}"));
    if let Err(error) = written {
        // A skip that nobody hears of would look like a pass.
        panic!("{}: {error}", Path::new(&file).display());
    }
}
