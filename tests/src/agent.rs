//! The agent and the CA as the real processes that they are, in their node's network namespace.

use std::{
    fmt, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    binaries, cgroup, http,
    logs::{self, Line},
    metrics::Scrape,
    netns::Netns,
    process::{Output, Place, Process},
    wait::until,
};

/// The lab's trust domain.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// How long a start may take on a machine that two labs share.
const START: Duration = Duration::from_secs(20);

/// A child process that can be ended and started again.
pub struct Daemon {
    name: String,
    args: Vec<String>,
    /// What runs it, such as `setpriv` with its arguments; empty where it runs by itself.
    wrapper: Vec<String>,
    place: Place,
    running: Mutex<Option<Process>>,
}

impl fmt::Debug for Daemon {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Daemon").field("name", &self.name).field("args", &self.args).finish_non_exhaustive()
    }
}

impl Daemon {
    /// `name` names its log files, and its cgroup below `cgroup`.
    pub fn new(name: &str, netns: &Netns, cgroup_root: &Path, logs: &Path, args: Vec<String>) -> Result<Self> {
        let folder = cgroup_root.join(name);
        cgroup::make(&folder)?;
        let place = Place { netns: Some(netns.path()), cgroup: Some(folder), logs: logs.to_owned(), files: None };
        Ok(Self { name: name.to_owned(), args, wrapper: Vec::new(), place, running: Mutex::new(None) })
    }

    fn running(&self) -> MutexGuard<'_, Option<Process>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts it, not waiting for anything.
    pub fn spawn(&self) -> Result<()> {
        let own = utf8(&binaries::heddle()?)?.to_owned();
        let line: Vec<String> = self.wrapper.iter().chain([&own]).chain(&self.args).cloned().collect();
        let (program, args) = line.split_first().context("no program")?;
        *self.running() = Some(Process::start(&self.place, &self.name, program, args)?);
        Ok(())
    }

    /// The same without a capability, such as `sys_ptrace`, and without a way to get it back.
    pub fn spawn_without(&self, capability: &str) -> Result<()> {
        let lacks = format!("-{capability}");
        let mut command = ["--bounding-set", &lacks, "--inh-caps", &lacks].map(str::to_owned).to_vec();
        command.push(utf8(&binaries::heddle()?)?.to_owned());
        command.extend(self.args.iter().cloned());
        *self.running() = Some(Process::start(&self.place, &self.name, "setpriv", &command)?);
        Ok(())
    }

    fn taken(&self) -> Result<Process> {
        self.running().take().with_context(|| format!("{} does not run", self.name))
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result<()> {
        self.taken()?.kill()
    }

    /// SIGTERM; how it ended.
    pub fn terminate(&self, deadline: Duration) -> Result<Output> {
        self.taken()?.terminate(deadline)
    }

    /// SIGTERM and SIGKILL where that takes too long; not running is well.
    pub fn stop(&self) {
        if let Ok(process) = self.taken() {
            // Dropping the process inside kills it when the deadline passes.
            let _ = process.terminate(Duration::from_secs(5));
        }
    }

    /// Whether it ended by itself.
    #[must_use]
    pub fn died(&self) -> bool {
        self.running().as_mut().is_some_and(|process| !process.running())
    }

    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.running().as_ref().map(Process::pid)
    }

    /// Its stderr since the lab began, over all restarts.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.place.logs.join(format!("{}.err", self.name))).unwrap_or_default()
    }

    fn wait_for(&self, what: &str, mut ready: impl FnMut() -> bool) -> Result<()> {
        until(START, &format!("{}: {what}", self.name), || (ready() || self.died()).then_some(()))?;
        anyhow::ensure!(!self.died(), "{} ended: {}", self.name, self.log());
        Ok(())
    }
}

/// `heddle ca`.
#[derive(Debug)]
pub struct Ca {
    pub daemon: Daemon,
    netns: Netns,
    pub address: SocketAddr,
    /// Where it publishes its root: what agents trust.
    pub root: PathBuf,
    pub token: PathBuf,
    /// Its signing key, in cert-manager's layout.
    pub root_dir: PathBuf,
}

impl Ca {
    /// Name in the CA's own server certificate.
    pub const NAME: &str = "ca.heddle.test";

    /// Prepares a CA on `address` that signs with the given root.
    pub fn new(
        netns: &Netns,
        address: SocketAddr,
        cgroup_root: &Path,
        dir: &Path,
        root_certificate: &Path,
        root_key: &Path,
    ) -> Result<Self> {
        let (root, token) = (dir.join("published-root.pem"), dir.join("token"));
        fs::write(&token, format!("lab-{}", fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim()))?;
        let root_dir = dir.join("ca-key");
        fs::create_dir_all(&root_dir)?;
        fs::copy(root_certificate, root_dir.join("tls.crt"))?;
        fs::copy(root_key, root_dir.join("tls.key"))?;
        let mut args: Vec<String> = ["ca", "--listen"].map(str::to_owned).into();
        args.push(address.to_string());
        for (flag, value) in [
            ("--trust-domain", TRUST_DOMAIN),
            ("--root-dir", utf8(&root_dir)?),
            ("--publish-root", utf8(&root)?),
            ("--token-file", utf8(&token)?),
            ("--name", Self::NAME),
            ("--max-lifetime", "1h"),
        ] {
            args.extend([flag.to_owned(), value.to_owned()]);
        }
        let daemon = Daemon::new("ca", netns, cgroup_root, &dir.join("logs"), args)?;
        Ok(Self { daemon, netns: netns.clone(), address, root, token, root_dir })
    }

    /// Starts it and waits until it listens and its root is published.
    pub fn start(&self) -> Result<()> {
        self.daemon.spawn()?;
        self.daemon.wait_for("listening", || {
            let connected = self.netns.inside(|| Ok(std::net::TcpStream::connect(self.address).is_ok()));
            self.root.is_file() && connected.unwrap_or(false)
        })
    }
}

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    pub certificate_lifetime: String,
    pub drain_grace: String,
    /// Most open files of the agent; as the lab's own where absent.
    pub files: Option<u64>,
    /// Follows the API server that this leads to, instead of the manifests.
    pub kubeconfig: Option<PathBuf>,
    /// More arguments; `{node}` stands for the node's name, `{dir}` for the lab's folder.
    pub extra: Vec<String>,
    /// What runs it, with arguments; it must become the agent, not be its parent.
    pub wrapper: Vec<String>,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            certificate_lifetime: "1h".to_owned(),
            drain_grace: "1s".to_owned(),
            files: None,
            kubeconfig: None,
            extra: Vec::new(),
            wrapper: Vec::new(),
        }
    }
}

/// `heddle agent` of one node.
#[derive(Debug)]
pub struct Agent {
    pub daemon: Daemon,
    netns: Netns,
    dir: PathBuf,
    admin: PathBuf,
    access_log: PathBuf,
    pub bpffs: PathBuf,
    /// What outlives it, where it follows an API server.
    pub state: PathBuf,
}

impl Agent {
    const METRICS: u16 = 15020;
    const READINESS: u16 = 15021;

    pub fn new(
        node: &crate::Node,
        ca: &Ca,
        manifests: &Path,
        cgroup_root: &Path,
        dir: &Path,
        bpffs: &Path,
        options: &AgentOptions,
    ) -> Result<Self> {
        let name = node.name();
        let (admin, access_log) = (dir.join(format!("{name}.sock")), dir.join(format!("logs/access-{name}.log")));
        let bpffs = bpffs.join(&name);
        let (ca_address, local) = (format!("https://{}", ca.address), |port| format!("127.0.0.1:{port}"));
        let mut args = vec!["agent".to_owned()];
        for (flag, value) in [
            ("--node", name.as_str()),
            ("--trust-domain", TRUST_DOMAIN),
            ("--ca-address", &ca_address),
            ("--ca-name", Ca::NAME),
            ("--ca-root", utf8(&ca.root)?),
            ("--ca-token-file", utf8(&ca.token)?),
            ("--certificate-lifetime", &options.certificate_lifetime),
            ("--bpffs", utf8(&bpffs)?),
            ("--admin-socket", utf8(&admin)?),
            // Asked from the other node too.
            ("--metrics-listen", &format!("0.0.0.0:{}", Self::METRICS)),
            ("--readiness-listen", &local(Self::READINESS)),
            ("--log-format", "json"),
            ("--access-log", utf8(&access_log)?),
            ("--drain-grace", &options.drain_grace),
        ] {
            args.extend([flag.to_owned(), value.to_owned()]);
        }
        let state = dir.join(format!("state-{name}"));
        let source = match &options.kubeconfig {
            None => vec!["--manifests", utf8(manifests)?],
            Some(kubeconfig) => {
                let mut source = vec!["--kubernetes", "--kubeconfig", utf8(kubeconfig)?];
                if !options.extra.iter().any(|arg| arg == "--places") {
                    // No runtime made the lab's pods.
                    source.extend(["--places", "annotated"]);
                }
                if !options.extra.iter().any(|arg| arg == "--state-dir") {
                    source.extend(["--state-dir", utf8(&state)?]);
                }
                source
            }
        };
        args.extend(source.into_iter().map(str::to_owned));
        let here = |arg: &String| arg.replace("{node}", &name).replace("{dir}", &dir.display().to_string());
        args.extend(options.extra.iter().map(here));
        let mut daemon = Daemon::new(&format!("agent-{name}"), &node.netns, cgroup_root, &dir.join("logs"), args)?;
        daemon.place.files = options.files;
        daemon.wrapper.clone_from(&options.wrapper);
        Ok(Self { daemon, netns: node.netns.clone(), dir: dir.to_owned(), admin, access_log, bpffs, state })
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<()> {
        self.daemon.spawn()?;
        self.daemon.wait_for("ready", || self.ready())
    }

    /// What its readiness endpoint says.
    #[must_use]
    pub fn ready(&self) -> bool {
        let address = (Ipv4Addr::LOCALHOST, Self::READINESS).into();
        http::get(&self.netns, address, "/healthz/ready").is_ok_and(|(status, _)| status == 200)
    }

    pub fn metrics(&self) -> Result<Scrape> {
        Ok(Scrape::parse(&self.metrics_text()?))
    }

    /// What `/metrics` answers.
    pub fn metrics_text(&self) -> Result<String> {
        let address = (Ipv4Addr::LOCALHOST, Self::METRICS).into();
        let (status, text) = http::get(&self.netns, address, "/metrics")?;
        anyhow::ensure!(status == 200, "/metrics: {status}");
        Ok(text)
    }

    /// Connections that it opened and that carry these labels.
    pub fn opened(&self, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.metrics()?.sum("istio_tcp_connections_opened_total", labels))
    }

    /// `heddle status --json`.
    pub fn status(&self) -> Result<Value> {
        let output = self.heddle(&["status", "--admin-socket", utf8(&self.admin)?, "--json"])?;
        serde_json::from_str(&output.stdout).with_context(|| format!("heddle status --json: {output:?}"))
    }

    /// Serial number (hex) of the certificate that it holds for an identity, waited for.
    pub fn serial(&self, identity: &str) -> Result<String> {
        until(START, &format!("a certificate for {identity}"), || {
            let (_, list) = self.ask_json(&["certs"]).ok()?;
            let found = list.as_array()?.iter().find(|line| line["identity"] == identity)?;
            found["serial"].as_str().filter(|serial| !serial.is_empty()).map(str::to_owned)
        })
    }

    /// How many connections it carries, as `heddle connections --json` lists them.
    pub fn connections(&self) -> Result<usize> {
        let output = self.heddle(&["connections", "--admin-socket", utf8(&self.admin)?, "--json"])?;
        let list: Vec<Value> = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        Ok(list.len())
    }

    /// `heddle status`, as a person reads it. Its exit status tells whether every pod is captured.
    pub fn status_text(&self) -> Result<Output> {
        self.heddle(&["status", "--admin-socket", utf8(&self.admin)?])
    }

    /// What `heddle status` says of a pod (`namespace/name`): its state, and the reason where there is one.
    pub fn pod_state(&self, pod: &str) -> Result<Option<(String, String)>> {
        Ok(find_pod(&self.status()?, pod))
    }

    /// Waits until the pod is in this state.
    pub fn wait_state(&self, pod: &str, wanted: &str) -> Result<String> {
        let mut last = String::new();
        until(START, "", || match self.pod_state(pod) {
            Ok(Some((state, reason))) if state == wanted => Some(reason),
            other => {
                last = format!("{other:?}");
                None
            }
        })
        .with_context(|| format!("pod {pod} is not {wanted} but {last}"))
    }

    /// Runs a verb that asks this agent over its admin socket.
    pub fn ask(&self, args: &[&str]) -> Result<Output> {
        self.heddle(&[args, &["--admin-socket", utf8(&self.admin)?]].concat())
    }

    /// The same with `--json`: the exit status and the answer.
    pub fn ask_json(&self, args: &[&str]) -> Result<(Option<i32>, Value)> {
        let output = self.ask(&[args, &["--json"]].concat())?;
        let answer = serde_json::from_str(&output.stdout).with_context(|| format!("{args:?}: {output:?}"))?;
        Ok((output.status.code(), answer))
    }

    /// Runs another verb of the binary where the agent runs.
    pub fn heddle(&self, args: &[&str]) -> Result<Output> {
        // Asked for often and not to be kept: output goes to a folder of its own.
        let logs = tempfile::tempdir_in(&self.dir)?;
        let place = Place { logs: logs.path().to_owned(), ..self.daemon.place.clone() };
        Process::start(&place, "heddle", binaries::heddle()?, args)?.wait(Duration::from_secs(20))
    }

    /// Lines of the access log so far.
    #[must_use]
    pub fn access_log(&self) -> Vec<Line> {
        logs::parse(&fs::read_to_string(&self.access_log).unwrap_or_default())
    }

    /// Empties the access log, as a rotation that truncates does.
    pub fn forget_access_log(&self) -> Result<()> {
        let opened = fs::OpenOptions::new().write(true).truncate(true).open(&self.access_log);
        opened.map(drop).with_context(|| self.access_log.display().to_string())
    }

    /// Waits for a line of the access log that fits.
    pub fn wait_access(&self, what: &str, fits: impl Fn(&Line) -> bool) -> Result<Line> {
        until(Duration::from_secs(10), what, || self.access_log().into_iter().find(|line| fits(line)))
            .with_context(|| fs::read_to_string(&self.access_log).unwrap_or_default())
    }

    /// Waits until its own log holds `text`.
    pub fn wait_log(&self, text: &str) -> Result<()> {
        until(Duration::from_secs(10), &format!("{text} in the log"), || self.daemon.log().contains(text).then_some(()))
            .with_context(|| self.daemon.log())
    }

    /// Every pin below its folder, sorted.
    #[must_use]
    pub fn pins(&self) -> Vec<PathBuf> {
        fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    walk(&path, into);
                }
                into.push(path);
            }
        }
        let mut pins = Vec::new();
        walk(&self.bpffs, &mut pins);
        pins.sort();
        pins
    }

    /// SIGTERM, wait, start again.
    pub fn restart(&self) -> Result<()> {
        self.daemon.terminate(Duration::from_secs(20))?;
        self.start()
    }
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// Looks anywhere in the document for an object that names the pod and has a `state`.
fn find_pod(value: &Value, pod: &str) -> Option<(String, String)> {
    match value {
        Value::Object(members) => {
            let text = |key: &str| members.get(key).and_then(Value::as_str).unwrap_or_default();
            let joined = format!("{}/{}", text("namespace"), text("name"));
            if [text("name"), text("pod"), joined.as_str()].contains(&pod) {
                let state = text("state").to_ascii_lowercase();
                if !state.is_empty() {
                    return Some((state, text("reason").to_owned()));
                }
            }
            members.values().find_map(|member| find_pod(member, pod))
        }
        Value::Array(items) => items.iter().find_map(|item| find_pod(item, pod)),
        _ => None,
    }
}
