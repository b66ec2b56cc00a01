//! The kernel hands a pod's connection to the agent, and the agent hands one to the app.
//!
//! First and last stop of the journey, and the only code that touches BPF or enters a netns. The rest of the agent
//! talks to it through [`Handle`], which takes plain values and gives plain values and file descriptors, because it will
//! become a process of its own. It never decides whether a connection is allowed.

pub mod caller;
mod connect;
pub mod container;
mod destinations;
mod destroy;
mod enrol;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handle;
mod kernel;
mod kubelet;
mod lane;
pub mod leftovers;
mod load;
mod maps;
mod messages;
mod netns;
mod older;
mod own_routes;
mod path;
mod pin;
mod pod;
mod ports;
pub mod probe;
mod prove;
mod route;
mod socket;
pub mod survey;
mod sysctl;
#[cfg(test)]
mod tests;

pub use error::Step;
pub use handle::{
    Attached, AttachedProgram, Caller, CaptureConfig, CaptureError, Delivery, Handle, Occupied, PodSpec, PodState,
    PodStatus, ProbeCommand, ProbeToken,
};
pub use lane::{EndedRing, Lane, ResidentPod, WorkloadId};
pub use older::Older;
pub use path::LaneFault;
pub use socket::{TcpHealth, chosen, tcp_health};
