//! How a container runtime asks for a pod's capture before anything of the pod runs.
//!
//! ```text
//! kubelet ── runtime ── CNI list: bridge, …, heddle-cni ──(socket)──► agent: found, attached, proven ──► the sandbox starts
//! ```
//!
//! The plugin is a program of its own, started for each pod by the runtime. It is small and decides little: what the agent says holds;
//! where no agent answers in time, only a pod that is known not to be in the mesh passes. Nothing of a pod runs before its ADD has
//! succeeded, so an ADD that fails is the gate: it is closed whatever the node's kernel, CNI or agent do, and kubelet tries again.
//!
//! - [`plugin`]: what `heddle-cni` does with a call
//! - [`protocol`]: what plugin and agent say to each other
//! - [`known`]: who is in the mesh, as the agent leaves it on disk for the plugin
//! - [`list`]: the plugin's entry in a CNI list, as a pure function over its text
//! - [`install`]: keeps plugin and entry where the runtime looks for them, and takes them away

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod install;
pub mod known;
pub mod list;
pub mod plugin;
pub mod protocol;

pub use install::{InstallError, remove};

/// Name of the plugin: its file, and the `type` of its entry.
pub const PLUGIN: &str = "heddle-cni";
/// Where the agent answers the plugin unless configured otherwise.
pub const SOCKET: &str = "/run/heddle/cni.sock";
/// Where the agent keeps its state unless configured otherwise.
pub const STATE_DIR: &str = "/var/lib/heddle";
