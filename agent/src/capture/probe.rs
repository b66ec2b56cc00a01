//! Probe connections: how the agent learns, by connecting, that a pod's traffic reaches its listener.
//!
//! Inbound: from the pod's netns, as a client whose address nobody has. Outbound: from a short-lived process in a cgroup below
//! the pod's, so that the pod's own `connect` programs run. Both must be answered with the pod's token, which only the agent's
//! listener knows. The addresses are reserved for documentation (RFC 5737, RFC 3849), so no workload has them.

use std::{
    ffi::OsString,
    fs,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use heddle_common::HBONE_PORT;
use tokio::{
    io::AsyncReadExt,
    net::TcpSocket,
    process::Command,
    time::{sleep, timeout},
};

use super::{CaptureError, ProbeToken, netns, netns::Netns, socket};
use crate::life::limits;

/// Where inbound probes come from.
const SOURCES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 86)), IpAddr::V6(Ipv6Addr::new(0x2001, 0x0db8, 0x6865, 0, 0, 0, 0, 1))];
/// Where outbound probes go to.
pub const DESTINATIONS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 87)), IpAddr::V6(Ipv6Addr::new(0x2001, 0x0db8, 0x6865, 0, 0, 0, 0, 2))];
/// Any port would do.
const PORT: u16 = HBONE_PORT;
/// Folder below the pod's cgroup: processes may not be in a cgroup that distributes resources to children.
pub(super) const CGROUP: &str = "heddle-probe";

/// How to start a process that calls [`run`] and prints the token as 32 hexadecimal digits on a line: the program with
/// `arguments`, then `--netns FILE --cgroup FOLDER --to ADDRESS:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

impl Default for ProbeCommand {
    /// `heddle probe`, of the running program.
    fn default() -> Self {
        // The link stays good while the program's file is replaced.
        Self { program: PathBuf::from("/proc/self/exe"), arguments: vec![OsString::from("probe")] }
    }
}

/// Whether an accepted connection is a probe.
#[must_use]
pub fn is_probe(original_destination: SocketAddr, peer: SocketAddr) -> bool {
    DESTINATIONS.contains(&original_destination.ip().to_canonical()) || SOURCES.contains(&peer.ip().to_canonical())
}

/// Connects to the pod's own address as a client from outside.
pub async fn inbound(netns: &Netns, own: IpAddr, token: ProbeToken) -> Result<(), String> {
    let from = if own.is_ipv4() { SOURCES[0] } else { SOURCES[1] };
    let to = SocketAddr::new(own, PORT);
    let answer = async {
        let socket = TcpSocket::from_std_stream(socket::prober(netns, from)?.into());
        let mut stream = socket.connect(to).await?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).await?;
        io::Result::Ok(answer)
    };
    match timeout(limits::PROBE, answer).await {
        Err(_) => Err(format!("inbound probe to {to}: no answer in {:?}", limits::PROBE)),
        Ok(Err(error)) => Err(format!("inbound probe to {to}: {error}")),
        Ok(Ok(answer)) if answer == token.0 => Ok(()),
        Ok(Ok(_)) => Err(format!("inbound probe to {to}: answered by something else than the pod's listener")),
    }
}

/// Connects to a mesh destination as a process of the pod would.
pub async fn outbound(
    command: &ProbeCommand,
    netns: &Path,
    cgroup: &Path,
    v6: bool,
    token: ProbeToken,
) -> Result<(), String> {
    let to = SocketAddr::new(if v6 { DESTINATIONS[1] } else { DESTINATIONS[0] }, PORT);
    let folder = cgroup.join(CGROUP);
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(format!("outbound probe: {}: {error}", folder.display()));
        }
        _ => {}
    }
    let run = Command::new(&command.program)
        .args(&command.arguments)
        .arg("--netns")
        .arg(netns)
        .arg("--cgroup")
        .arg(&folder)
        .arg("--to")
        .arg(to.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    // Its own deadlines, and the time to start.
    let result = timeout(limits::PROBE + limits::PROBE_START, run).await;
    remove_folder(&folder).await;
    match result {
        Err(_) => Err(format!("outbound probe to {to}: no answer in {:?}", limits::PROBE)),
        Ok(Err(error)) => Err(format!("outbound probe: {}: {error}", command.program.display())),
        Ok(Ok(output)) => match String::from_utf8_lossy(&output.stdout).lines().find_map(parse_token) {
            Some(answer) if answer == token.0 => Ok(()),
            Some(_) => Err(format!("outbound probe to {to}: answered by something else than the pod's listener")),
            None => {
                let said = String::from_utf8_lossy(&output.stderr);
                let said = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
                Err(format!("outbound probe to {to}: {}: {said}", output.status))
            }
        },
    }
}

/// Removes the cgroups that probes and proofs leave below a pod's.
pub async fn remove_cgroups(cgroup: &Path) {
    for name in [CGROUP, super::caller::CGROUP] {
        remove_folder(&cgroup.join(name)).await;
    }
}

/// Removes a cgroup, which stays busy for a moment after its last process.
pub(super) async fn remove_folder(folder: &Path) {
    for _ in 0..20 {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => sleep(Duration::from_millis(5)).await,
            _ => return,
        }
    }
    tracing::debug!(folder = %folder.display(), "the probes' cgroup is still busy; the next probe uses it again");
}

/// The body of `heddle probe`: puts this process into the cgroup and this thread into the netns, for good, connects and gives
/// what is answered.
pub fn run(netns: &Path, cgroup: &Path, to: SocketAddr) -> Result<[u8; 16], CaptureError> {
    let probe = || -> io::Result<[u8; 16]> {
        // Zero names the process that writes.
        fs::write(cgroup.join("cgroup.procs"), "0")?;
        netns::enter_for_good(netns)?;
        let mut stream = TcpStream::connect_timeout(&to, limits::PROBE)?;
        stream.set_read_timeout(Some(limits::PROBE))?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    };
    probe().map_err(CaptureError::Probe)
}

/// The line that [`outbound`] expects.
#[must_use]
pub fn token_line(token: &[u8; 16]) -> String {
    token.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn parse_token(line: &str) -> Option<[u8; 16]> {
    let line = line.trim();
    if line.len() != 32 || !line.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(line, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_token_is_read_back_and_other_lines_are_not() {
        let token = *b"0123456789abcde\xff";
        assert_eq!(parse_token(&token_line(&token)), Some(token));
        assert_eq!(parse_token(&format!("  {}\n", token_line(&token))), Some(token));
        for wrong in
            ["", "running 1 test", "+0000000000000000000000000000001", "0011", "zz112233445566778899aabbccddeeff"]
        {
            assert_eq!(parse_token(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn probes_are_known_by_either_address_also_when_mapped() {
        let pod = "10.0.0.1:80".parse().unwrap();
        assert!(is_probe("192.0.2.87:15008".parse().unwrap(), pod));
        assert!(is_probe("[::ffff:192.0.2.87]:15008".parse().unwrap(), pod));
        assert!(is_probe(pod, "[::ffff:192.0.2.86]:4000".parse().unwrap()));
        assert!(is_probe(pod, "[2001:db8:6865::1]:4000".parse().unwrap()));
        assert!(is_probe("[2001:db8:6865::2]:15008".parse().unwrap(), pod));
        assert!(!is_probe(pod, "10.0.0.2:4000".parse().unwrap()));
        assert!(!is_probe("192.0.2.86:15008".parse().unwrap(), pod));
    }
}
