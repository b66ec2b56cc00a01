//! A process that plays the kubelet: called so, in a cgroup of its own, in its node's network namespace.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    Lab, Pod,
    call::Call,
    cgroup,
    process::{Place, Process},
    reports::Connected,
};

/// Runs as long as this lives.
#[derive(Debug)]
pub struct Kubelet {
    cgroup: PathBuf,
    process: Process,
}

impl Lab {
    /// Starts one on a node, in a cgroup of this name.
    pub fn kubelet(&self, node: u8, cgroup: &str) -> Result<Kubelet> {
        let folder = self.claim().cgroup.join(cgroup);
        cgroup::make(&folder)?;
        // The kernel names a process for the file that it was started from.
        let program = self.dir().join("kubelet");
        if fs::symlink_metadata(&program).is_err() {
            symlink("/bin/sleep", &program).context("naming a program kubelet")?;
        }
        let place = Place {
            netns: Some(self.node(node)?.netns.path()),
            cgroup: Some(folder.clone()),
            logs: self.dir().join("logs"),
            files: None,
        };
        let process = Process::start(&place, "kubelet", &program, &["600"])?;
        Ok(Kubelet { cgroup: folder, process })
    }
}

impl Kubelet {
    /// Folder of its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Folder of a cgroup below its own, made if absent.
    pub fn child(&self, name: &str) -> Result<PathBuf> {
        let folder = self.cgroup.join(name);
        cgroup::make(&folder)?;
        Ok(folder)
    }

    /// A connection that it makes to a pod of its node; the pod only lends its name.
    pub fn probe<'pod>(&self, lab: &Lab, pod: &'pod Pod, port: u16) -> Result<Call<'pod, Connected>> {
        pod.connect(pod.at(port)).on_the_host_in(lab, &self.cgroup)
    }

    /// Ends it; its cgroup stays.
    pub fn stop(self) -> Result<PathBuf> {
        self.process.kill()?;
        Ok(self.cgroup)
    }
}
