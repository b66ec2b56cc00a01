//! A node's containerd with its CRI plugin, Debian's, and pods that it makes: the lab is their kubelet.
//!
//! Containers need cgroup v2 where runtimes look for it, and machines differ. So containerd runs in a mount namespace of its own with the
//! unified hierarchy mounted over `/sys/fs/cgroup`, and a wrapper of runc drops `linux.resources`, whose controllers may belong to
//! cgroup v1. Everything of it is below the lab's folder and cgroup, and goes with them.

mod cri;
mod image;
mod pod;
mod template;

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

pub use cri::Executed;
pub use pod::{ContainerPod, ContainerPodBuilder};

use crate::{
    Lab, binaries,
    node::Node,
    process::{Place, Process},
    wait::until,
};

/// Where Debian puts the plugins of containernetworking.
const PLUGINS: &str = "/usr/lib/cni";
/// The list that the runtime takes.
pub const LIST: &str = "10-lab.conflist";

/// A node's folders of CNI plugins and configuration.
#[derive(Debug, Clone)]
pub struct CniFolders {
    pub bin: PathBuf,
    pub conf: PathBuf,
    ipam: PathBuf,
}

impl CniFolders {
    /// Those of a node, below the lab's folder.
    #[must_use]
    pub fn of(dir: &Path, node: &str) -> Self {
        let folder = dir.join(format!("cni-{node}"));
        Self { bin: folder.join("bin"), conf: folder.join("net.d"), ipam: folder.join("ipam") }
    }

    /// What a node's CNI leaves there: its plugins, and a list of its own.
    pub fn write(&self, node: &Node) -> Result<()> {
        for folder in [&self.bin, &self.conf, &self.ipam] {
            fs::create_dir_all(folder)?;
        }
        for plugin in ["bridge", "host-local", "loopback"] {
            let from = Path::new(PLUGINS).join(plugin);
            ensure!(from.is_file(), "{} is missing (Debian package containernetworking-plugins)", from.display());
            symlink(from, self.bin.join(plugin))?;
        }
        self.write_list(node)
    }

    /// Writes the list as the node's CNI does, without knowing of anybody else.
    pub fn write_list(&self, node: &Node) -> Result<()> {
        let first = |host: u8| Ipv4Addr::new(10, 244, node.number, host);
        let list = json!({
            "cniVersion": "1.0.0", "name": "lab",
            "plugins": [{
                "type": "bridge", "bridge": "pods", "isDefaultGateway": true,
                "ipam": {
                    "type": "host-local", "dataDir": self.ipam,
                    "ranges": [[{
                        "subnet": format!("{}/24", first(0)), "rangeStart": first(100), "rangeEnd": first(249),
                        "gateway": node.gateway_v4(),
                    }]],
                },
            }],
        });
        let beside = self.conf.join(".list");
        fs::write(&beside, serde_json::to_string_pretty(&list)?)?;
        Ok(fs::rename(&beside, self.conf.join(LIST))?)
    }
}

/// What the agent of a node with containers is started with; `{node}` and `{dir}` are filled in.
pub const AGENT_ARGS: [&str; 10] = [
    "--places",
    "node",
    "--cni-conf-dir",
    "{dir}/cni-{node}/net.d",
    "--cni-bin-dir",
    "{dir}/cni-{node}/bin",
    "--cni-socket",
    "{dir}/cni-{node}.sock",
    "--state-dir",
    "{dir}/state-{node}",
];

/// A node's containerd. Dropping it ends it; its containers end with the lab's cgroup.
#[derive(Debug)]
pub struct Containerd {
    daemon: Option<Process>,
    place: Place,
    dir: PathBuf,
    name: String,
    cri: cri::Cri,
    folders: CniFolders,
    /// Folder of the kubelet's cgroups, from the root of the hierarchy.
    kubepods: String,
}

impl Containerd {
    /// Starts it on a node of a lab that was built for containers, imports the image, and waits until it can start pods.
    pub fn start(lab: &Lab, node: u8) -> Result<Self> {
        let host = lab.node(node)?;
        let dir = lab.dir().join(format!("containerd-{}", host.name()));
        fs::create_dir_all(&dir)?;
        let place = Place {
            netns: Some(host.netns.path()),
            cgroup: Some(lab.claim().cgroup.clone()),
            logs: lab.dir().join("logs"),
            files: None,
        };
        let folders = CniFolders::of(lab.dir(), &host.name());
        configure(&dir, &folders)?;
        let socket = dir.join("containerd.sock");
        let mut containerd = Self {
            daemon: None,
            place,
            name: format!("containerd-{}", host.name()),
            cri: cri::Cri::new(&socket)?,
            folders,
            kubepods: format!("/{}/{}/kubepods", lab.prefix(), host.name()),
            dir,
        };
        containerd.spawn()?;
        containerd.wait_answering()?;
        containerd.import()?;
        containerd.wait_ready()?;
        Ok(containerd)
    }

    fn spawn(&mut self) -> Result<()> {
        let script = format!(
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup && mkdir -p /run/netns && mount -t tmpfs netns /run/netns && \
             exec containerd --config {}",
            self.dir.join("config.toml").display()
        );
        let args = ["--mount", "--propagation", "private", "sh", "-c", &script];
        self.daemon = Some(Process::start(&self.place, &self.name, "unshare", &args)?);
        Ok(())
    }

    fn wait_answering(&self) -> Result<()> {
        until(Duration::from_secs(30), "containerd answering", || self.cri.unready().ok())
            .with_context(|| self.log())?;
        Ok(())
    }

    /// Waits until it can start pods: the CNI's list is there.
    pub fn wait_ready(&self) -> Result<()> {
        until(Duration::from_secs(30), "containerd ready", || {
            self.cri.unready().is_ok_and(|unready| unready.is_empty()).then_some(())
        })
        .with_context(|| self.log())
    }

    fn import(&self) -> Result<()> {
        let archive = self.dir.join("image.tar");
        let scratch = tempfile::tempdir_in(&self.dir)?;
        image::write(scratch.path(), &archive)?;
        self.import_archive(&archive)?;
        Ok(fs::remove_file(archive)?)
    }

    /// Takes the images of an OCI archive.
    pub fn import_archive(&self, archive: &Path) -> Result<()> {
        let (socket, archive) = (self.dir.join("containerd.sock"), archive.display().to_string());
        let socket = socket.display().to_string();
        let args = ["-a", &socket, "-n", "k8s.io", "images", "import", "--no-unpack", &archive];
        Process::start(&self.place, "import", "ctr", &args)?.wait(Duration::from_secs(60))?.ok().context("ctr")?;
        Ok(())
    }

    /// Its own log.
    #[must_use]
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.place.logs.join(format!("{}.err", self.name))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n")
    }

    /// Ends it with SIGTERM and starts it again; its containers run on.
    pub fn restart(&mut self) -> Result<()> {
        let daemon = self.daemon.take().context("containerd does not run")?;
        daemon.terminate(Duration::from_secs(30))?;
        self.spawn()?;
        self.wait_answering()?;
        self.wait_ready()
    }

    /// The next pod gets the lowest address that is free, also one that was just given back.
    pub fn give_addresses_again(&self) -> Result<()> {
        let last = self.folders.ipam.join("lab/last_reserved_ip.0");
        fs::remove_file(&last).with_context(|| last.display().to_string())
    }

    /// Describes a pod of this node, enrolled, whose container runs `lab-peer` with these arguments.
    pub fn pod<'a>(&'a self, lab: &'a Lab, namespace: &str, name: &str, args: &[&str]) -> ContainerPodBuilder<'a> {
        ContainerPodBuilder::new(lab, self, namespace, name, args)
    }

    fn node(&self) -> &str {
        self.name.trim_start_matches("containerd-")
    }
}

/// Writes containerd's configuration, and the wrapper of runc.
fn configure(dir: &Path, folders: &CniFolders) -> Result<()> {
    let wrapper = dir.join("runc");
    let peer = binaries::lab_peer()?;
    let script = format!(
        "#!/bin/sh\nfor argument; do\n  [ \"$previous\" = --bundle ] && '{}' without-resources \"$argument/config.json\"\n  \
         previous=$argument\ndone\nexec /usr/sbin/runc \"$@\"\n",
        peer.display()
    );
    fs::write(&wrapper, script)?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let config = format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{dir}/containerd.sock"
[ttrpc]
  address = "{dir}/containerd.ttrpc"
[debug]
  level = "info"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{conf}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{wrapper}"
        Root = "{dir}/runc-state"
        SystemdCgroup = false
"#,
        dir = dir.display(),
        image = image::NAME,
        bin = folders.bin.display(),
        conf = folders.conf.display(),
        wrapper = wrapper.display(),
    );
    Ok(fs::write(dir.join("config.toml"), config)?)
}

/// An address with a port, for arguments.
fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}
