//! A pod of containerd: its object, its cgroup, its sandbox and one container, made in the order in which kubelet makes them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    Containerd, at,
    cri::{
        ContainerConfig, ContainerMetadata, DnsConfig, Executed, ImageSpec, LinuxContainerConfig,
        LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
        PodSandboxConfig, PodSandboxMetadata,
    },
    image,
    template::Template,
};
use crate::{Lab, cgroup, reports::Connected};

/// A pod that is being described.
#[must_use = "a pod exists once it is started"]
#[derive(Debug)]
pub struct ContainerPodBuilder<'a> {
    lab: &'a Lab,
    containerd: &'a Containerd,
    namespace: String,
    name: String,
    args: Vec<String>,
    template: Option<Template>,
    mesh: Option<&'static str>,
    tries: Duration,
}

/// A pod that runs.
#[derive(Debug)]
pub struct ContainerPod<'a> {
    lab: &'a Lab,
    containerd: &'a Containerd,
    namespace: String,
    name: String,
    uid: String,
    template: Option<Template>,
    mesh: Option<&'static str>,
    cgroup: PathBuf,
    config: PodSandboxConfig,
    sandbox: String,
    container: String,
    address: Ipv4Addr,
    /// Sandboxes that did not start, before this one did.
    pub refusals: Vec<String>,
    /// How long its sandbox took, refusals included.
    pub took: Duration,
}

impl<'a> ContainerPodBuilder<'a> {
    pub(super) fn new(lab: &'a Lab, containerd: &'a Containerd, namespace: &str, name: &str, args: &[&str]) -> Self {
        Self {
            lab,
            containerd,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            template: None,
            mesh: None,
            tries: Duration::from_secs(120),
        }
    }

    /// Runs what a workload's pod template says instead of `lab-peer`; names are those of `/etc/hosts` alone.
    pub fn template(mut self, template: &Value, hosts: &[(&str, Ipv4Addr)]) -> Result<Self> {
        self.template = Some(Template::read(template, hosts)?);
        Ok(self)
    }

    /// Its own mesh label.
    pub fn mesh(mut self, label: &'static str) -> Self {
        self.mesh = Some(label);
        self
    }

    /// How long its sandbox is tried to be started.
    pub fn tries(mut self, for_so_long: Duration) -> Self {
        self.tries = for_so_long;
        self
    }

    /// Starts it. A sandbox that does not start is tried again, as kubelet does.
    pub fn start(self) -> Result<ContainerPod<'a>> {
        let Self { lab, containerd, namespace, name, args, template, mesh, tries } = self;
        lab.need_namespace(&namespace)?;
        let uid = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
        let parent = format!("{}/burstable/pod{uid}", containerd.kubepods);
        let folder = cgroup::mount()?.join(parent.trim_start_matches('/'));
        let mut pod = ContainerPod {
            lab,
            containerd,
            config: config(&namespace, &name, &uid, &parent, &containerd.dir),
            namespace,
            name,
            uid,
            template,
            mesh,
            cgroup: folder,
            sandbox: String::new(),
            container: String::new(),
            address: Ipv4Addr::UNSPECIFIED,
            refusals: Vec::new(),
            took: Duration::ZERO,
        };
        pod.apply()?;
        cgroup::make(&pod.cgroup)?;
        let began = Instant::now();
        loop {
            match containerd.cri.run_sandbox(&pod.config) {
                Ok(sandbox) => {
                    pod.sandbox = sandbox;
                    break;
                }
                Err(error) => pod.refusals.push(format!("{error:#}")),
            }
            if began.elapsed() > tries {
                bail!("sandbox of {} does not start: {}", pod.full_name(), pod.refusals.join("\n"));
            }
            if let Some(metadata) = &mut pod.config.metadata {
                metadata.attempt += 1;
            }
            thread::sleep(Duration::from_millis(500));
        }
        pod.took = began.elapsed();
        let addresses = containerd.cri.addresses(&pod.sandbox)?;
        pod.address = addresses.iter().find_map(|address| address.parse().ok()).context("no IPv4 address")?;
        let own = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "app".to_owned(), attempt: 0 }),
            log_path: "app.log".to_owned(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        };
        let container = match &pod.template {
            Some(template) => template.container(own, &pod.folder(), pod.address)?,
            None => ContainerConfig {
                image: Some(ImageSpec { image: image::NAME.to_owned() }),
                command: [vec!["/lab-peer".to_owned()], args].concat(),
                ..own
            },
        };
        pod.container = containerd.cri.run_container(&pod.sandbox, &pod.config, container)?;
        pod.apply()?;
        Ok(pod)
    }
}

fn namespaces() -> NamespaceOption {
    // As kubelet has it: processes of a container see their own.
    NamespaceOption { network: 0, pid: 1, ipc: 0 }
}

fn config(namespace: &str, name: &str, uid: &str, parent: &str, dir: &std::path::Path) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: dir.join("pods").join(uid).display().to_string(),
        // Nobody answers there, at once.
        dns_config: Some(DnsConfig { servers: vec!["127.0.0.1".to_owned()] }),
        labels: [("io.kubernetes.pod.uid", uid), ("io.kubernetes.pod.name", name)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: parent.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext { namespace_options: Some(namespaces()) }),
        }),
    }
}

impl ContainerPod<'_> {
    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its address with this port.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        at(self.address, port)
    }

    /// Its identity in the lab's trust domain.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("spiffe://{}/ns/{}/sa/{}", crate::TRUST_DOMAIN, self.namespace, self.account())
    }

    fn account(&self) -> &str {
        self.template.as_ref().map_or(&self.name, |template| &template.account)
    }

    /// Its node's name.
    #[must_use]
    pub fn node(&self) -> &str {
        self.containerd.node()
    }

    /// Folder of its log, and of what is mounted into its container.
    fn folder(&self) -> PathBuf {
        PathBuf::from(&self.config.log_directory)
    }

    /// What its container has said so far: the lines of its stdout.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder().join("app.log")).unwrap_or_default();
        text.lines().filter_map(|line| line.split_once(" stdout F ").map(|(_, said)| said.to_owned())).collect()
    }

    /// Runs `lab-peer` in its container, and gives what it reports.
    pub fn run<T: DeserializeOwned>(&self, args: &[String]) -> Result<T> {
        let command = [&["/lab-peer".to_owned()], args].concat();
        let Executed { stdout, stderr, exit_code } = self.execute(&command)?;
        ensure!(exit_code == 0, "{command:?}: {exit_code}: {}", String::from_utf8_lossy(&stderr));
        let last = String::from_utf8(stdout)?;
        serde_json::from_str(last.lines().last().unwrap_or_default()).with_context(|| last.clone())
    }

    /// Runs any command in its container to its end.
    pub fn execute(&self, command: &[String]) -> Result<Executed> {
        self.containerd.cri.execute(&self.container, command, Duration::from_secs(60))
    }

    /// One connection that says `text` to an echo server.
    pub fn connect(&self, to: SocketAddr, text: &str) -> Result<Connected> {
        let args = ["connect", "--to", &to.to_string(), "--say", text, "--expect", &text.len().to_string()];
        self.run(&args.map(str::to_owned))
    }

    /// Waits until the agent of its node has proven its capture.
    pub fn wait_captured(&self) -> Result<()> {
        let node = self.containerd.node().trim_start_matches("node").parse()?;
        self.lab.agent(node)?.wait_state(&self.full_name(), "captured").map(drop)
    }

    /// Deletes it: its object, its sandbox, its cgroup.
    pub fn delete(self) -> Result<()> {
        self.lab.manifests().delete(&self.manifest())?;
        self.containerd.cri.remove_sandbox(&self.sandbox)?;
        cgroup::remove(&self.cgroup)
    }

    fn container_object(&self) -> Value {
        match &self.template {
            Some(template) => template.object.clone(),
            None => json!({ "name": "app", "image": image::NAME }),
        }
    }

    /// Writes its manifest: without an address until it has one.
    fn apply(&self) -> Result<()> {
        self.lab.manifests().apply(&self.manifest())
    }

    fn manifest(&self) -> Value {
        let mut labels = match &self.template {
            Some(template) => template.labels.clone(),
            None => json!({ "app": self.name }),
        };
        if let Some(mesh) = self.mesh {
            labels["heddle.dev/mesh"] = mesh.into();
        }
        let status = if self.address.is_unspecified() {
            json!({ "phase": "Pending" })
        } else {
            json!({
                "phase": "Running", "podIP": self.address, "podIPs": [{ "ip": self.address }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            })
        };
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": self.name, "namespace": self.namespace, "uid": self.uid, "labels": labels },
            "spec": {
                "nodeName": self.containerd.node(), "serviceAccountName": self.account(),
                "containers": [self.container_object()],
            },
            "status": status,
        })
    }
}
