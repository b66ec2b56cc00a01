//! A process that connects as a pod's app would, when it is told to: what `heddle proof` calls with.
//!
//! Like an outbound probe it is started in a cgroup below the pod's and enters the pod's netns, so that the pod's own `connect`
//! programs run; unlike one it goes wherever it is sent. It binds first and names its port, so that the connection is known
//! before it is made. It ends with its caller: its stdin is its lifeline.

use std::{
    fs,
    io::{self, BufRead, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use super::{CaptureError, ProbeCommand, netns, probe::remove_folder};
use crate::life::limits;

/// Folder below the pod's cgroup, beside the probes'.
pub const CGROUP: &str = "heddle-proof";

/// A process in a pod that has bound its socket and waits for the word.
#[derive(Debug)]
pub struct Caller {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    folder: PathBuf,
    port: u16,
}

impl Caller {
    /// Starts the process: the program with its arguments, then `--netns FILE --cgroup FOLDER --to ADDRESS:PORT --call --say TEXT`.
    ///
    /// # Errors
    /// When it does not come so far as to have a port.
    pub(super) async fn start(
        command: &ProbeCommand,
        netns: &Path,
        cgroup: &Path,
        to: SocketAddr,
        say: &str,
    ) -> Result<Self, CaptureError> {
        let folder = cgroup.join(CGROUP);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(CaptureError::Probe(error)),
            _ => {}
        }
        let spawned = Command::new(&command.program)
            .args(&command.arguments)
            .arg("--netns")
            .arg(netns)
            .arg("--cgroup")
            .arg(&folder)
            .args(["--to", &to.to_string(), "--call", "--say", say])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = spawned.map_err(CaptureError::Probe)?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(CaptureError::Probe(io::Error::other("its pipes are missing")));
        };
        let mut caller = Self { child, stdin, lines: BufReader::new(stdout).lines(), folder, port: 0 };
        let line = caller.line().await?;
        let port = line.strip_prefix("port ").and_then(|port| port.parse().ok());
        caller.port = port.ok_or_else(|| CaptureError::Probe(io::Error::other(line.clone())))?;
        Ok(caller)
    }

    /// The port that the connection will come from.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Has it connect. Inside: how that went for the app, in the words of the system.
    ///
    /// # Errors
    /// When the process does not say how it went.
    pub async fn connect(&mut self) -> Result<Result<(), String>, CaptureError> {
        self.stdin.write_all(b"go\n").await.map_err(CaptureError::Probe)?;
        let line = self.line().await?;
        match line.strip_prefix("failed ") {
            Some(error) => Ok(Err(error.to_owned())),
            None if line == "connected" => Ok(Ok(())),
            None => Err(CaptureError::Probe(io::Error::other(line))),
        }
    }

    /// Bytes that came back after it said something; for one that was given something to say.
    ///
    /// # Errors
    /// When the process does not say so in time.
    pub async fn heard(&mut self) -> Result<usize, CaptureError> {
        let line = self.line().await?;
        let count = line.strip_prefix("heard ").and_then(|count| count.parse().ok());
        count.ok_or_else(|| CaptureError::Probe(io::Error::other(line)))
    }

    /// Ends it and removes its cgroup.
    pub async fn end(self) {
        let Self { mut child, stdin, folder, .. } = self;
        drop(stdin);
        if timeout(limits::PROBE_START, child.wait()).await.is_err() {
            tracing::warn!("A process that connected for a proof did not end by itself");
            let _it_may_have_ended_now = child.kill().await;
        }
        remove_folder(&folder).await;
    }

    async fn line(&mut self) -> Result<String, CaptureError> {
        match timeout(limits::PROBE + limits::PROBE_START, self.lines.next_line()).await {
            Ok(Ok(Some(line))) => Ok(line),
            Ok(Ok(None)) => Err(CaptureError::Probe(io::ErrorKind::UnexpectedEof.into())),
            Ok(Err(error)) => Err(CaptureError::Probe(error)),
            Err(_) => Err(CaptureError::Probe(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// The body of `heddle probe --call`: what [`Caller`] talks to.
///
/// # Errors
/// When it can't get into its place; a connection that fails is no error, but told.
pub fn run(netns: &Path, cgroup: &Path, to: SocketAddr, say: &str) -> Result<(), CaptureError> {
    call(netns, cgroup, to, say).map_err(CaptureError::Probe)
}

fn call(netns: &Path, cgroup: &Path, to: SocketAddr, say: &str) -> io::Result<()> {
    // Zero names the process that writes.
    fs::write(cgroup.join("cgroup.procs"), "0")?;
    netns::enter_for_good(netns)?;
    let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(any, 0).into())?;
    let port = socket.local_addr()?.as_socket().map(|local| local.port()).unwrap_or_default();
    tell(&format!("port {port}"))?;
    let mut stdin = io::stdin().lock();
    if stdin.read_line(&mut String::new())? == 0 {
        return Ok(());
    }
    let mut stream = match socket.connect_timeout(&to.into(), limits::PROBE) {
        Ok(()) => TcpStream::from(socket),
        Err(error) => return tell(&format!("failed {error}")),
    };
    tell("connected")?;
    if !say.is_empty() {
        stream.set_read_timeout(Some(limits::PROOF_ECHO))?;
        let mut buffer = vec![0; 64 << 10];
        let heard = stream.write_all(say.as_bytes()).and_then(|()| stream.read(&mut buffer)).unwrap_or_default();
        tell(&format!("heard {heard}"))?;
    }
    // Until the caller has seen enough.
    stdin.read_line(&mut String::new())?;
    Ok(())
}

fn tell(line: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}
