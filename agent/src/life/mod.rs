//! The agent's own life: start, enrolment of this node's pods, readiness, drain, limits.
//!
//! It moves the other stages and never touches a connection's bytes.
//!
//! - [`config`]: what was typed, and what it means
//! - [`start`]: makes the stages in journey order and runs them until a signal
//! - [`enrol`] follows the snapshot; [`keeper`] keeps one pod captured, served and proven
//! - `kubelet`: whose probes the kernel lets through
//! - `crl`: what revocation does to readiness and to what peers have open
//! - [`readiness`], [`admin`]: what is told of it, over [`http`]
//! - [`cni`]: answers the CNI plugin before a pod starts
//! - [`proof`]: one connection that is made to show how a pair of pods is protected
//! - [`records`]: what the kernel says of its lane's connections, for telemetry
//! - `scrape`: the metrics of this node's pods, for those who ask
//! - [`node`]: the node's startup taint, and events on pods that stay uncaptured
//! - [`drain`]: how it ends
//! - [`ca`]: the life of the CA, which is a process of its own; `policy_status`: what it writes into policies' status

pub mod admin;
pub mod budget;
pub mod ca;
pub mod cni;
pub mod config;
mod crl;
pub mod drain;
pub mod enrol;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod http;
mod keeper;
mod kubelet;
pub mod lane;
pub mod limits;
pub mod log;
pub mod node;
mod policy_status;
pub mod proof;
pub mod readiness;
mod records;
mod scrape;
pub mod start;

#[cfg(test)]
mod tests;
