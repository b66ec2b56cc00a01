//! heddle: one agent per node that carries pods' connections in mutual TLS.
//!
//! The modules are the stops a byte makes, in order; each depends only on the ones before it:
//!
//! ```text
//! capture → cluster → identity → policy → tunnel → telemetry → life → cli
//! ```
//!
//! - [`capture`]: the kernel hands a pod's connection to the agent, and the agent hands one to the app
//! - [`cluster`]: who is at the other end: Kubernetes objects as one immutable snapshot
//! - [`identity`]: SPIFFE ids, keys in memory, certificates, the CA
//! - [`policy`]: may it? One pure function; only it can make the permit that forwarding needs
//! - [`tunnel`]: HBONE both ways, the pool, the relay
//! - [`telemetry`]: what happened: metrics and the access log
//! - [`life`]: start, enrolment, readiness, drain, limits
//! - [`cli`]: what an operator types
//!
//! Beside the journey: [`cni`], by which a container runtime asks before a pod starts.
#![deny(unsafe_code)]

pub mod capture;
mod causes;
pub mod cli;
pub mod cluster;
pub mod cni;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod identity;
pub mod life;
pub mod policy;
pub mod telemetry;
pub mod tunnel;
