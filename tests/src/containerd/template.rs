//! The one container of a workload's pod template, as kubelet hands it to a runtime: image, arguments, environment, user,
//! capabilities, and an `/etc/hosts` of its own.

use std::{fmt::Write, fs, net::Ipv4Addr, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::cri::{Capability, ContainerConfig, ImageSpec, Int64Value, KeyValue, Mount};

/// What a pod of a workload is.
#[derive(Debug, Clone)]
pub(super) struct Template {
    pub account: String,
    pub labels: Value,
    /// The container as it stands in the pod's object.
    pub object: Value,
    hosts: Vec<(String, Ipv4Addr)>,
}

impl Template {
    /// Reads `spec.template` of a Deployment.
    pub fn read(template: &Value, hosts: &[(&str, Ipv4Addr)]) -> Result<Self> {
        let spec = &template["spec"];
        let containers = spec["containers"].as_array().context("a template without containers")?;
        ensure!(containers.len() == 1 && spec["initContainers"].is_null(), "the lab's pods have one container: {spec}");
        ensure!(spec["volumes"].is_null(), "the lab's pods have no volumes: {spec}");
        Ok(Self {
            account: spec["serviceAccountName"].as_str().context("a template without service account")?.to_owned(),
            labels: template["metadata"]["labels"].clone(),
            object: containers[0].clone(),
            hosts: hosts.iter().map(|(name, address)| ((*name).to_owned(), *address)).collect(),
        })
    }

    /// Completes what the runtime is told of the container. What is mounted into it is written to `folder`.
    pub fn container(&self, own: ContainerConfig, folder: &Path, address: Ipv4Addr) -> Result<ContainerConfig> {
        let texts = |field: &Value| -> Vec<String> {
            field.as_array().into_iter().flatten().filter_map(|one| one.as_str().map(str::to_owned)).collect()
        };
        let env = self.object["env"].as_array().into_iter().flatten().map(|one| {
            let text = |key: &str| one[key].as_str().map(str::to_owned).with_context(|| format!("no {key}: {one}"));
            Ok(KeyValue { key: text("name")?, value: text("value")? })
        });
        let mut linux = own.linux.unwrap_or_default();
        let mut rights = linux.security_context.unwrap_or_default();
        let wanted = &self.object["securityContext"];
        rights.run_as_user = wanted["runAsUser"].as_i64().map(|value| Int64Value { value });
        rights.no_new_privs = wanted["allowPrivilegeEscalation"] == false;
        rights.capabilities = Some(Capability {
            add_capabilities: texts(&wanted["capabilities"]["add"]),
            drop_capabilities: texts(&wanted["capabilities"]["drop"]),
        });
        linux.security_context = Some(rights);
        Ok(ContainerConfig {
            image: Some(ImageSpec { image: self.object["image"].as_str().context("no image")?.to_owned() }),
            command: texts(&self.object["command"]),
            args: texts(&self.object["args"]),
            envs: env.collect::<Result<_>>()?,
            mounts: vec![self.hosts(folder, address)?],
            linux: Some(linux),
            ..own
        })
    }

    /// Writes `/etc/hosts`, which kubelet writes for every pod.
    fn hosts(&self, folder: &Path, address: Ipv4Addr) -> Result<Mount> {
        let mut text = format!("127.0.0.1 localhost\n{address} pod\n");
        for (name, address) in &self.hosts {
            writeln!(text, "{address} {name}")?;
        }
        fs::create_dir_all(folder)?;
        let path = folder.join("etc-hosts");
        fs::write(&path, text)?;
        Ok(Mount { container_path: "/etc/hosts".to_owned(), host_path: path.display().to_string() })
    }
}
