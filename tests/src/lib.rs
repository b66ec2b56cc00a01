//! The lab: nodes and pods as network namespaces with real processes, a real CA and real agents between them.
//!
//! A test reads like a story:
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use heddle_lab::Lab;
//!
//! let lab = Lab::two_nodes()?;
//! let server = lab.pod("shop", "server").on(2).serves(&["who:7000"]).start()?;
//! let client = lab.pod("shop", "client").service_account("client").start()?;
//! let seen = client.connect(server.at(7000)).run()?;
//! assert_eq!(seen.peer, Some(server.at(7000)));
//! # Ok(()) }
//! ```
//!
//! It needs root, `ip` and `tcpdump`. What it makes carries the prefix of its process and is removed when [`Lab`] is
//! dropped; [`state::sweep`] removes what a killed process left.

pub mod agent;
pub mod apiserver;
pub mod binaries;
pub mod call;
pub mod capture;
pub mod certificates;
pub mod cgroup;
pub mod containerd;
pub mod hostile;
pub mod http;
pub mod kernel;
pub mod kubelet;
pub mod kubernetes;
pub mod lab;
pub mod logs;
pub mod manifests;
pub mod memory;
pub mod metrics;
pub mod netns;
pub mod node;
pub mod pod;
pub mod process;
pub mod reports;
pub mod service;
mod skip;
pub mod state;
pub mod sys;
pub mod usage;
pub mod wait;

pub use agent::TRUST_DOMAIN;
pub use kubelet::Kubelet;
pub use lab::{Lab, LabBuilder};
pub use netns::Netns;
pub use node::Node;
pub use pod::Pod;
pub use reports::Who;
pub use service::{Backend, Service};
pub use skip::{cannot_run, not_installed, skip};
pub use state::{leftovers, sweep, sweep_kept};
pub use wait::until;

/// What a lab test returns.
pub type Result<T = ()> = anyhow::Result<T>;
