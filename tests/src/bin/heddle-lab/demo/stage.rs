//! The demonstration's cast: nginx on both nodes behind one Service, a TCP server that speaks first, curl in three pods.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use heddle_lab::{Lab, Pod, Service, until};

use super::report::Report;

/// Port of nginx in its pods.
pub const WEB: u16 = 8080;
/// Port of the server that speaks first.
pub const QUOTES: u16 = 2525;
/// Port of the same pod that echoes: for connections that stay open.
pub const ECHO: u16 = 7000;
pub const NAMESPACE: &str = "shop";

/// The lab and everyone in it.
pub struct Stage {
    pub lab: Lab,
    pub web: [Pod; 2],
    pub quotes: Pod,
    pub shopper: Pod,
    pub visitor: Pod,
    /// Stays outside the mesh.
    pub legacy: Pod,
    pub service: Service,
}

/// A pod as the picture shows it.
pub struct Actor {
    pub name: String,
    pub software: &'static str,
    pub node: u8,
    pub address: String,
    pub identity: String,
    pub meshed: bool,
}

impl Stage {
    /// Builds everything, nobody enrolled yet.
    pub fn build(report: &mut Report) -> Result<Self> {
        report.scene("Two nodes, a CA, an agent on each node, six pods");
        let mut lab = Lab::two_nodes()?;
        lab.hush();
        let web = [web_pod(&lab, "web-1", 1)?, web_pod(&lab, "web-2", 2)?];
        let quotes =
            lab.pod(NAMESPACE, "quotes").on(2).serves(&["banner:2525", "echo:7000"]).outside_the_mesh().start()?;
        let shopper = lab.pod(NAMESPACE, "shopper").on(1).outside_the_mesh().start()?;
        let visitor = lab.pod(NAMESPACE, "visitor").on(1).outside_the_mesh().start()?;
        let legacy = lab.pod(NAMESPACE, "legacy").on(1).outside_the_mesh().start()?;
        let service = lab.service(NAMESPACE, "web", (80, WEB), &[&web[0], &web[1]])?;
        let stage = Self { lab, web, quotes, shopper, visitor, legacy, service };
        for pod in &stage.web {
            let url = format!("http://{}/", pod.at(WEB));
            until(Duration::from_secs(10), "nginx", || stage.shopper.output("curl", &["-sf", &url]).ok())?;
        }
        report.quote(
            stage
                .topology()
                .iter()
                .map(|actor| format!("node{}  {:<8} {:<22} {}", actor.node, actor.name, actor.software, actor.address))
                .collect(),
        );
        Ok(stage)
    }

    /// Those that join the mesh.
    pub fn members(&self) -> [&Pod; 5] {
        [&self.web[0], &self.web[1], &self.quotes, &self.shopper, &self.visitor]
    }

    pub fn enrol(&self) -> Result<()> {
        self.members().into_iter().try_for_each(Pod::enrol)
    }

    pub fn topology(&self) -> Vec<Actor> {
        let actor = |pod: &Pod, software: &'static str, meshed: bool| Actor {
            name: pod.name().to_owned(),
            software,
            node: pod.node(),
            address: format!("{}  {}", pod.v4(), pod.v6()),
            identity: if meshed { pod.identity() } else { String::new() },
            meshed,
        };
        vec![
            actor(&self.shopper, "curl", true),
            actor(&self.visitor, "curl", true),
            actor(&self.legacy, "curl, outside the mesh", false),
            actor(&self.web[0], "nginx", true),
            actor(&self.web[1], "nginx", true),
            actor(&self.quotes, "TCP, server speaks first", true),
        ]
    }

    /// How to look around in a lab that is running.
    pub fn look_around(&self) {
        let prefix = self.lab.prefix();
        let dir = self.lab.dir().display();
        println!("\nLook around (as root):");
        println!("  a shell in a pod's network:   nsenter --net=/run/netns/{prefix}-{NAMESPACE}-shopper bash");
        println!("  a connection into the mesh:   join its cgroup first, as every process of the pod does:");
        println!("                                echo $$ > {}/cgroup.procs", self.cgroup_of("shopper").display());
        println!("                                curl http://{}/", self.service.at());
        println!("  what the agent says:          heddle status --admin-socket {dir}/node1.sock");
        println!(
            "  metrics:                      nsenter --net=/run/netns/{prefix}-node1 curl -s 127.0.0.1:15020/metrics"
        );
        println!("  access log:                   tail -f {dir}/logs/access-node2.log");
        println!("  the cluster, as YAML:         ls {}", self.lab.manifests().dir().display());
        println!("  packets between the nodes:    nsenter --net=/run/netns/{prefix}-node1 tcpdump -ni link0");
    }

    fn cgroup_of(&self, pod: &str) -> std::path::PathBuf {
        self.lab.claim().cgroup.join(format!("pod-{NAMESPACE}-{pod}"))
    }

    /// Leaves it running when this process ends.
    pub fn keep(mut self, report: &mut Report) -> Result<()> {
        report.scene("Left running");
        self.look_around();
        report.note("remove it with: cargo xtask lab --remove");
        self.lab.keep()?;
        // Its processes live on: nothing of the stage may be dropped.
        std::mem::forget(self);
        Ok(())
    }
}

/// A pod with nginx that says its own name.
fn web_pod(lab: &Lab, name: &str, node: u8) -> Result<Pod> {
    let pod = lab.pod(NAMESPACE, name).on(node).label("version", "v1").outside_the_mesh().start()?;
    let folder = lab.dir().join(name);
    let config = folder.join("nginx.conf");
    fs::create_dir_all(folder.join("www"))?;
    fs::write(folder.join("www/index.html"), format!("<h1>Good morning from {name}</h1>\n"))?;
    fs::write(&config, nginx_config(&folder))?;
    let config = config.to_str().context("path is not UTF-8")?.to_owned();
    pod.runs("nginx", "nginx", &["-c", &config, "-e", "stderr"])?;
    Ok(pod)
}

/// nginx in the foreground, every file of it in the lab's folder.
fn nginx_config(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {folder}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 512; }}\n\
         http {{\n\
         \x20 access_log {folder}/access.log;\n\
         \x20 client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;\n\
         \x20 uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
         \x20 server {{ listen {WEB}; listen [::]:{WEB}; root {folder}/www; add_header X-Client $remote_addr; }}\n\
         }}\n"
    )
}
