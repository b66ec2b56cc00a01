//! A node with two pods, all in netns of their own: the agent of such a test runs in the node's, so links and routes between
//! pods are real and the machine's own netns is not touched.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use super::world::{World, ip};
use crate::{
    capture::{
        netns::{Netns, enter_for_good},
        *,
    },
    cluster::{Place, Unattended},
};

/// Addresses of the two pods.
pub const V4: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(10, 214, 7, 2)), IpAddr::V4(Ipv4Addr::new(10, 214, 7, 3))];
pub const V6: [IpAddr; 2] = [
    IpAddr::V6(Ipv6Addr::new(0xfd0d, 0x6865, 0, 0, 0, 0, 0, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd0d, 0x6865, 0, 0, 0, 0, 0, 3)),
];
pub const UIDS: [&str; 2] = ["default/a.1", "default/b.1"];

/// How the pods are linked.
#[derive(Debug, Clone, Copy)]
pub enum Wiring {
    /// Ports of a bridge, which is their gateway.
    Bridge,
    /// A point-to-point link and a route for each.
    Routes,
}

/// Node, pods, cgroups and bpffs folder; gone with this value.
pub struct Node {
    name: String,
    cgroups: [PathBuf; 2],
    bpffs: PathBuf,
}

impl Node {
    pub fn new(wiring: Wiring) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("hn-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mut mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = PathBuf::from(mount.find(|fields| fields[2] == "cgroup2").expect("a cgroup2 mount")[1]);
        let node = Self {
            cgroups: [root.join(format!("{name}-a")), root.join(format!("{name}-b"))],
            bpffs: Path::new("/sys/fs/bpf").join(&name),
            name,
        };
        for cgroup in &node.cgroups {
            fs::create_dir(cgroup).unwrap();
        }
        let host = node.host();
        ip(&format!("netns add {host}"));
        ip(&format!("-n {host} link set lo up"));
        ip(&format!("netns exec {host} sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1"));
        if let Wiring::Bridge = wiring {
            ip(&format!("-n {host} link add br0 type bridge"));
            ip(&format!("-n {host} addr add 10.214.7.1/24 dev br0"));
            ip(&format!("-n {host} addr add fd0d:6865::1/64 dev br0 nodad"));
            ip(&format!("-n {host} link set br0 up"));
        }
        for pod in [0, 1] {
            let (ns, v4, v6) = (node.ns(pod), V4[pod], V6[pod]);
            ip(&format!("netns add {ns}"));
            ip(&format!("-n {ns} link set lo up"));
            // The pods' devices have one index in every pod, as they mostly do.
            ip(&format!("-n {ns} link add eth0 type veth peer name veth{pod} netns {host}"));
            ip(&format!("-n {host} link set veth{pod} up"));
            match wiring {
                Wiring::Bridge => {
                    ip(&format!("-n {host} link set veth{pod} master br0"));
                    ip(&format!("-n {ns} addr add {v4}/24 dev eth0"));
                    ip(&format!("-n {ns} addr add {v6}/64 dev eth0 nodad"));
                    ip(&format!("-n {ns} link set eth0 up"));
                    ip(&format!("-n {ns} route add default via 10.214.7.1"));
                    ip(&format!("-n {ns} -6 route add default via fd0d:6865::1"));
                }
                Wiring::Routes => {
                    ip(&format!("-n {host} addr add 169.254.1.1/32 dev veth{pod}"));
                    ip(&format!("-n {host} addr add fe80::1/64 dev veth{pod} nodad"));
                    ip(&format!("-n {host} route add {v4} dev veth{pod}"));
                    ip(&format!("-n {host} -6 route add {v6} dev veth{pod}"));
                    ip(&format!("-n {ns} addr add {v4}/32 dev eth0"));
                    ip(&format!("-n {ns} addr add {v6}/128 dev eth0 nodad"));
                    ip(&format!("-n {ns} link set eth0 up"));
                    ip(&format!("-n {ns} route add default via 169.254.1.1 dev eth0 onlink"));
                    ip(&format!("-n {ns} -6 route add default via fe80::1 dev eth0"));
                }
            }
        }
        node
    }

    pub fn host(&self) -> String {
        format!("{}-node", self.name)
    }

    pub fn ns(&self, pod: usize) -> String {
        format!("{}-{}", self.name, ["a", "b"][pod])
    }

    /// For threads of [`Node::run`].
    pub fn netns(&self, pod: usize) -> Netns {
        World::netns(&self.ns(pod))
    }

    pub fn spec(&self, pod: usize) -> PodSpec {
        PodSpec {
            uid: UIDS[pod].into(),
            name: UIDS[pod].into(),
            addresses: vec![V4[pod], V6[pod]],
            place: Place {
                netns: Path::new("/var/run/netns").join(self.ns(pod)),
                cgroup: self.cgroups[pod].clone(),
                ..Place::default()
            },
            when_unattended: Unattended::Closed,
            probes: std::collections::BTreeSet::new(),
        }
    }

    /// Capture in the node's netns.
    pub async fn start(&self) -> Handle {
        Handle::start(CaptureConfig { bpffs: self.bpffs.clone(), probe: ProbeCommand::default() }).await.unwrap()
    }

    /// Runs `test` on a runtime of which every thread is in the node's netns.
    pub fn run(&self, test: impl Future<Output = ()> + Send) {
        let path = Path::new("/var/run/netns").join(self.host());
        let body = || {
            enter_for_good(&path).unwrap();
            let path = path.clone();
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            runtime.worker_threads(2).enable_all().on_thread_start(move || enter_for_good(&path).unwrap());
            runtime.build().unwrap().block_on(test);
        };
        if let Err(panic) = thread::scope(|scope| scope.spawn(body).join()) {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for ns in [self.ns(0), self.ns(1), self.host()] {
            let _gone = Command::new("ip").args(["netns", "del", &ns]).output();
        }
        let _gone = fs::remove_dir_all(&self.bpffs);
        for cgroup in &self.cgroups {
            for _ in 0..50 {
                if fs::remove_dir(cgroup).is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
