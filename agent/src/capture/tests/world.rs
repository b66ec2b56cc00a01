//! A pod, its neighbour and the agent on the running kernel: a netns pair, a cgroup and a bpffs folder for each test.

use std::{
    env, fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};

use crate::{
    capture::{
        netns::{Home, Netns},
        *,
    },
    cluster::{Place, Unattended},
};

pub const POD4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 213, 7, 2));
pub const POD6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd0c, 0x6865, 0, 0, 0, 0, 0, 2));
pub const OUT4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 213, 7, 1));
pub const OUT6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd0c, 0x6865, 0, 0, 0, 0, 0, 1));
/// Mesh addresses that nothing routes.
pub const SERVICE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));
pub const SERVICE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd0c, 0x96, 0, 0, 0, 0, 0, 0x10));
pub const FROM_AGENT: &[u8; 16] = b"from the agent!!";
pub const FROM_APP: &[u8; 16] = b"from the app!!!!";
pub const SOON: Duration = Duration::from_secs(5);

/// Whether the test can run; says so if not.
pub fn can_run(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIPPED (needs root): {test}");
    }
    root
}

/// A pod's netns and cgroup, a neighbour's netns, and a bpffs folder; gone with this value.
pub struct World {
    name: String,
    pub cgroup: PathBuf,
    pub bpffs: PathBuf,
    scripts: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("hc-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mut mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mount.find(|fields| fields[2] == "cgroup2").expect("a cgroup2 mount")[1].to_owned();
        let world = Self {
            cgroup: Path::new(&root).join(&name),
            bpffs: Path::new("/sys/fs/bpf").join(&name),
            scripts: tempfile::tempdir().unwrap(),
            name,
        };
        fs::create_dir(&world.cgroup).unwrap();
        let (pod, out) = (world.pod_ns(), world.out_ns());
        // The neighbour's end of the link is made in place, so that names never meet in the host's netns.
        ip(&format!("netns add {pod}"));
        ip(&format!("netns add {out}"));
        ip(&format!("-n {pod} link add eth0 type veth peer name eth0 netns {out}"));
        for (ns, v4, v6) in [(&pod, POD4, POD6), (&out, OUT4, OUT6)] {
            ip(&format!("-n {ns} link set lo up"));
            ip(&format!("-n {ns} addr add {v4}/24 dev eth0"));
            ip(&format!("-n {ns} addr add {v6}/64 dev eth0 nodad"));
            ip(&format!("-n {ns} link set eth0 up"));
        }
        ip(&format!("-n {pod} route add default via {OUT4}"));
        ip(&format!("-n {pod} -6 route add default via {OUT6}"));
        world
    }

    pub fn pod_ns(&self) -> String {
        format!("{}-pod", self.name)
    }

    pub fn out_ns(&self) -> String {
        format!("{}-out", self.name)
    }

    pub fn netns(name: &str) -> Netns {
        Netns::open(&Path::new("/var/run/netns").join(name), &Home::here().unwrap()).unwrap()
    }

    pub fn pod(&self) -> Netns {
        Self::netns(&self.pod_ns())
    }

    pub fn out(&self) -> Netns {
        Self::netns(&self.out_ns())
    }

    pub fn spec(&self) -> PodSpec {
        PodSpec {
            // Worst case of a manifest without a uid.
            uid: "default/web.1".into(),
            name: "default/web.1".into(),
            addresses: vec![POD4, POD6],
            place: Place {
                netns: Path::new("/var/run/netns").join(self.pod_ns()),
                cgroup: self.cgroup.clone(),
                ..Place::default()
            },
            when_unattended: Unattended::Closed,
            probes: std::collections::BTreeSet::new(),
        }
    }

    pub fn config(&self) -> CaptureConfig {
        // Stands for `heddle probe`: this test program, run for one test.
        let script = self.scripts.path().join("probe");
        let test = format!("{}::the_pods_process", module_path!().split_once("::").unwrap().1);
        let this = env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nHC_NETNS=$2 HC_CGROUP=$4 HC_TO=$6 exec '{}' --exact {test} --nocapture\n",
            this.display()
        );
        if !script.exists() {
            fs::write(&script, text).unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        }
        CaptureConfig {
            bpffs: self.bpffs.clone(),
            probe: ProbeCommand { program: "/bin/sh".into(), arguments: vec![script.into()] },
        }
    }

    pub async fn start(&self) -> Handle {
        Handle::start(self.config()).await.unwrap()
    }

    /// A process of the pod, in its cgroup and netns, connects and reads 16 bytes.
    pub async fn pod_connects(&self, to: SocketAddr) -> Result<[u8; 16], String> {
        let probe = self.config().probe;
        let output = tokio::process::Command::new(probe.program)
            .args(probe.arguments)
            .arg("--netns")
            .arg(Path::new("/var/run/netns").join(self.pod_ns()))
            .arg("--cgroup")
            .arg(&self.cgroup)
            .arg("--to")
            .arg(to.to_string())
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = said.lines().map(str::trim).find(|line| line.len() == 32 && u128::from_str_radix(line, 16).is_ok());
        match line {
            Some(line) => Ok(u128::from_str_radix(line, 16).unwrap().to_be_bytes()),
            None => Err(said + &String::from_utf8_lossy(&output.stderr)),
        }
    }

    pub fn ids(&self) -> Vec<u32> {
        let folder = pin::Pins::open(&self.bpffs).unwrap().pod("default/web.1");
        let read = |(name, _): &(&str, kernel::Hook)| {
            let link = kernel::open_pin(&folder.join(name)).unwrap();
            kernel::link_info(&link).unwrap().program
        };
        load::PROGRAMS.iter().map(read).collect()
    }

    pub fn rules_and_routes(&self) -> String {
        let ns = self.pod_ns();
        let table = heddle_common::ROUTE_TABLE;
        let mut all = String::new();
        for family in ["-4", "-6"] {
            let rules = ip(&format!("-n {ns} {family} rule show"));
            all.extend(rules.lines().filter(|line| line.starts_with(&format!("{}:", heddle_common::RULE_PREFERENCE))));
            // A table that never held a route does not exist.
            let routes = Command::new("ip")
                .args(["-n", &ns, family, "route", "show", "table", &table.to_string()])
                .output()
                .unwrap();
            all.push_str(&String::from_utf8_lossy(&routes.stdout));
        }
        all
    }

    /// The switches that are off.
    pub fn off(&self) -> usize {
        sysctl::off(&self.pod()).unwrap().len()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for ns in [self.pod_ns(), self.out_ns()] {
            let _gone = Command::new("ip").args(["netns", "del", &ns]).output();
        }
        let _gone = fs::remove_dir_all(&self.bpffs);
        let _gone = fs::remove_dir(self.cgroup.join("heddle-probe"));
        // A process that has just ended keeps it busy for a moment.
        for _ in 0..50 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A blocking connection whose socket belongs to `netns`.
pub fn connect_in(netns: &Netns, from: Option<SocketAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = netns.within(|| Socket::new(domain, Type::STREAM, None))?;
    if let Some(from) = from {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    socket.connect_timeout(&to.into(), Duration::from_secs(2))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

pub fn greeting(stream: &mut TcpStream) -> io::Result<[u8; 16]> {
    let mut greeting = [0; 16];
    stream.read_exact(&mut greeting)?;
    Ok(greeting)
}

/// An app in `netns` that greets, then echoes; tells its clients' addresses. Ends when the receiver goes and one more comes.
pub fn app(netns: &Netns, at: SocketAddr) -> std::sync::mpsc::Receiver<SocketAddr> {
    let domain = if at.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = netns.within(|| Socket::new(domain, Type::STREAM, None)).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&at.into()).unwrap();
    socket.listen(1_024).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for stream in TcpListener::from(socket).incoming() {
            let Ok(mut stream) = stream else { return };
            if sender.send(stream.peer_addr().unwrap()).is_err() {
                return;
            }
            thread::spawn(move || -> io::Result<()> {
                stream.write_all(FROM_APP)?;
                let mut reader = stream.try_clone()?;
                io::copy(&mut reader, &mut stream).map(drop)
            });
        }
    });
    receiver
}

/// Serves a pod as the tunnel would: answers probes, greets the rest and tells original destination and client.
pub fn serve(attached: Attached) -> (mpsc::UnboundedReceiver<(SocketAddr, SocketAddr)>, tokio::task::JoinHandle<()>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let Attached { listener, token } = attached;
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let task = tokio::spawn(async move {
        loop {
            let (mut stream, peer) = listener.accept().await.unwrap();
            let to = stream.local_addr().unwrap();
            if Handle::is_probe(to, peer) {
                let _told = stream.write_all(&token.0).await;
                continue;
            }
            let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            let _told = sender.send((canonical(to), canonical(peer)));
            tokio::spawn(async move {
                let _told = stream.write_all(FROM_AGENT).await;
                let _ended = stream.read(&mut [0]).await;
            });
        }
    });
    (receiver, task)
}

pub async fn next<T>(receiver: &mut mpsc::UnboundedReceiver<T>) -> T {
    timeout(SOON, receiver.recv()).await.expect("nothing came").unwrap()
}

/// Runs blocking test code beside the runtime.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

/// Not a test by itself: the body of processes that tests start in a pod.
#[test]
fn the_pods_process() {
    let Ok(to) = env::var("HC_TO") else { return };
    let (netns, cgroup) = (env::var("HC_NETNS").unwrap(), env::var("HC_CGROUP").unwrap());
    match probe::run(Path::new(&netns), Path::new(&cgroup), to.parse().unwrap()) {
        Ok(token) => println!("\n{}", probe::token_line(&token)),
        Err(error) => panic!("{error}"),
    }
}
