//! A real process inside the lab, its output in files, ended by its process id.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{sys, wait::until};

/// Where a process runs and where its output goes.
#[derive(Debug, Clone)]
pub struct Place {
    pub netns: Option<PathBuf>,
    pub cgroup: Option<PathBuf>,
    /// Folder of the output files.
    pub logs: PathBuf,
    /// Most open files (`RLIMIT_NOFILE`, soft and hard); as this process where absent.
    pub files: Option<u64>,
}

/// A running (or ended) process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: PathBuf,
    stderr: PathBuf,
    /// How much of stdout [`Process::next_line`] has handed out (bytes).
    read: usize,
}

/// What a process that ended left.
#[derive(Debug, Clone)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Its stdout, where it ended well.
    pub fn ok(self) -> Result<String> {
        ensure!(self.status.success(), "{}: {}{}", self.status, self.stdout, self.stderr);
        Ok(self.stdout)
    }
}

impl Process {
    /// Starts `program`; `name` names its output files, which are appended to.
    pub fn start<S: AsRef<OsStr>>(place: &Place, name: &str, program: impl AsRef<OsStr>, args: &[S]) -> Result<Self> {
        let stdout = place.logs.join(format!("{name}.out"));
        let stderr = place.logs.join(format!("{name}.err"));
        let append = |path: &Path| File::options().create(true).append(true).open(path);
        let read = fs::metadata(&stdout).map_or(0, |metadata| metadata.len());
        let mut command = Command::new(program.as_ref());
        command.args(args).stdin(Stdio::piped()).stdout(append(&stdout)?).stderr(append(&stderr)?);
        let mut child = sys::spawn_in(&mut command, place.netns.as_deref(), place.cgroup.as_deref(), place.files)
            .with_context(|| format!("starting {name} ({})", program.as_ref().to_string_lossy()))?;
        let stdin = child.stdin.take();
        Ok(Self { name: name.to_owned(), child, stdin, stdout, stderr, read: usize::try_from(read)? })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn stdout(&self) -> String {
        read_text(&self.stdout)
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        read_text(&self.stderr)
    }

    /// Still there?
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Writes one line to its stdin.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("stdin of {} is closed", self.name))?;
        writeln!(stdin, "{line}").with_context(|| format!("telling {} {line}", self.name))
    }

    /// The next full line of its stdout.
    pub fn next_line(&mut self, deadline: Duration) -> Result<String> {
        let what = format!("a line from {}", self.name);
        let line = until(deadline, &what, || {
            // Asked before the file is read, so that a last line of a process that ends in between is not missed.
            let ended = !matches!(self.child.try_wait(), Ok(None));
            match line_from(&self.stdout, self.read) {
                Some(line) => Some(Some(line)),
                None if ended => Some(None),
                None => None,
            }
        })
        .with_context(|| self.stderr())?;
        let Some(line) = line else { bail!("{} ended: {}{}", self.name, self.stdout(), self.stderr()) };
        self.read += line.len() + 1;
        Ok(line)
    }

    /// Closes stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end.
    pub fn wait(mut self, deadline: Duration) -> Result<Output> {
        let what = format!("end of {}", self.name);
        let status = until(deadline, &what, || self.child.try_wait().transpose())
            .with_context(|| format!("{}{}", self.stdout(), self.stderr()))??;
        Ok(Output { status, stdout: self.stdout(), stderr: self.stderr() })
    }

    /// SIGTERM, and waits for its end.
    pub fn terminate(mut self, deadline: Duration) -> Result<Output> {
        self.signal(Signal::SIGTERM)?;
        self.stdin = None;
        self.wait(deadline)
    }

    /// SIGKILL; returns when it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.running() {
            // It may end by itself in between; either way it is reaped.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

fn line_from(path: &Path, offset: usize) -> Option<String> {
    let text = fs::read(path).unwrap_or_default();
    let rest = text.get(offset..)?;
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    Some(String::from_utf8_lossy(&rest[..end]).into_owned())
}

fn read_text(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
