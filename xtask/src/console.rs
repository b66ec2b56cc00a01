//! Running other programs: their output shown as it comes and read at the same time, Ctrl-C passed on and survived.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};

/// Root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

/// Where cargo puts what it builds.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |folder| root().join(folder))
}

/// Set by Ctrl-C and SIGTERM. The terminal sends Ctrl-C to the programs that run as well: they end by themselves, and
/// this process stays to clean up after them.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// From here on Ctrl-C doesn't end this process.
pub fn catch_interrupts() -> Result<()> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&INTERRUPTED)).context("catching signals")?;
    }
    Ok(())
}

#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// `cargo`, in the repository.
#[must_use]
pub fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Packages that stable Rust builds: one selection everywhere, or cargo would compile dependencies twice for another set
/// of features.
pub const PACKAGES: [&str; 3] = ["--workspace", "--exclude", "heddle-ebpf"];

/// Runs to the end, output on the terminal.
pub fn show(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("running {}", command.get_program().to_string_lossy()))
}

/// Runs a command to its end and gives its output; what it complained of becomes the error.
pub fn quietly(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("{program} does not run"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}: {}", output.status, complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs to the end; output goes to the terminal as it comes, and every line of it, without colours, to `line`.
pub fn follow(command: &mut Command, mut line: impl FnMut(&str) + Send) -> Result<ExitStatus> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {}", command.get_program().to_string_lossy()))?;
    let (stdout, stderr) = (child.stdout.take().context("no stdout")?, child.stderr.take().context("no stderr")?);
    let (sender, receiver) = std::sync::mpsc::channel::<String>();
    thread::scope(|scope| -> Result<ExitStatus> {
        let errors = sender.clone();
        scope.spawn(move || forward(stdout, &sender, |text| println!("{text}")));
        scope.spawn(move || forward(stderr, &errors, |text| eprintln!("{text}")));
        for text in receiver {
            line(&plain(&text));
        }
        child.wait().map_err(|error| anyhow!(error))
    })
}

fn forward(output: impl std::io::Read, lines: &std::sync::mpsc::Sender<String>, print: impl Fn(&str)) {
    let mut reader = BufReader::new(output);
    let mut bytes = Vec::new();
    while reader.read_until(b'\n', &mut bytes).is_ok_and(|count| count > 0) {
        let text = String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned();
        print(&text);
        if lines.send(text).is_err() {
            return;
        }
        bytes.clear();
    }
}

/// A line without escape sequences.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter == '\x1b' {
            letters.by_ref().find(|letter| letter.is_ascii_alphabetic());
        } else {
            out.push(letter);
        }
    }
    out
}

/// Whether this process may make network namespaces and load programs into the kernel.
#[must_use]
pub fn is_root() -> bool {
    // Owner of our own process folder: no libc for one question.
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn colours_are_taken_out() {
        assert_eq!(plain("\x1b[1;32mPASS\x1b[0m [ 1s ]"), "PASS [ 1s ]");
    }
}
