//! A named network namespace, set up with `ip -batch` and entered by threads.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

/// Where iproute2 keeps the names.
const NAMED: &str = "/run/netns";

/// One network namespace. It is removed by [`crate::Lab`], not by dropping this.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it, with loopback up, addresses that work at once, and the congestion control that the lab measures with.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let netns = Self { name: name.to_owned() };
        netns.batch(&["link set lo up"])?;
        netns.sysctl(&[
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/all/disable_ipv6", "0"),
            ("net/ipv6/conf/default/disable_ipv6", "0"),
            ("net/ipv4/tcp_congestion_control", "cubic"),
            // Client and server side, with data in the first SYN and no cookie needed: the lab tests Fast Open.
            ("net/ipv4/tcp_fastopen", "519"),
            ("net/mptcp/enabled", "1"),
        ])?;
        Ok(netns)
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that opens it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NAMED).join(&self.name)
    }

    /// Runs lines of `ip` inside it, all in one process.
    pub fn batch<S: AsRef<str>>(&self, lines: &[S]) -> Result<()> {
        let text = lines.iter().map(AsRef::as_ref).collect::<Vec<_>>().join("\n");
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("running ip (Debian package iproute2)")?;
        child.stdin.take().context("ip has no stdin")?.write_all(text.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "ip -n {} -batch: {}\n{text}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// What `ip -n <name> <args>` prints.
    pub fn show(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["-n", &self.name];
        all.extend(args);
        ip(&all)
    }

    /// Writes values below /proc/sys. A key that this kernel doesn't have is passed over.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.inside(|| {
            for (key, value) in settings {
                let file = Path::new("/proc/sys").join(key);
                if file.exists() {
                    fs::write(&file, value).with_context(|| format!("writing {value} to {}", file.display()))?;
                }
            }
            Ok(())
        })
    }

    /// Reads a value below /proc/sys.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let file = Path::new("/proc/sys").join(key);
        self.inside(|| fs::read_to_string(&file).map(|text| text.trim().to_owned()).context(file.display().to_string()))
    }

    /// Runs `work` on a thread of its own that has entered the namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("opening netns {}", self.name))?;
        thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(&file, CloneFlags::CLONE_NEWNET).context("setns")?;
                    work()
                })
                .join()
                .map_err(|_| anyhow!("a thread in netns {} panicked", self.name))?
        })
    }

    /// Removes the name; the namespace goes when its last process and socket do.
    pub fn delete(name: &str) -> Result<()> {
        if Path::new(NAMED).join(name).exists() {
            ip(&["netns", "del", name])?;
        }
        Ok(())
    }

    /// Names that begin with `prefix`.
    #[must_use]
    pub fn named(prefix: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(NAMED) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        names
    }
}

/// Runs `ip` in the namespace of this process and gives what it printed.
pub fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(args).output().context("running ip (Debian package iproute2)")?;
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
