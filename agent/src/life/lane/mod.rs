//! Who decides for the kernel lane: the policy engine, ahead of the connections that the kernel then lets pass by itself.
//!
//! ```text
//! a miss (tunnel) ─┐                     ┌ remove what may be wrong ─ rulebook in force ─ insert ─ end what is denied
//! a change ────────┼─► table (one lock) ─┤
//! a pod (keeper) ──┘                     └ the kernel's VERDICTS, DENIALS and SERVICES
//! ```
//!
//! It never leaves an entry in the kernel that the engine would not produce now, and never makes a connection wait: what has
//! no verdict goes through the agent.
//!
//! - [`kernel`]: the tables, as far as this needs them
//! - [`pairs`]: which pods have talked, and what the kernel holds of each pair
//! - [`eligible`]: whether a pair may take the lane, and what policy says of it
//! - [`paths`]: between which pods packets go straight
//! - [`table`]: the order in which all of it changes
//! - [`counters`]: the kernel's counts of denied connections, and whose they are
//! - [`services`]: which endpoints the kernel may choose itself
//! - [`revoke`]: which open connections are no longer allowed
//! - [`handle`]: the one lock; [`follow`]: the lane's own task; [`told`] and [`report`]: what others hear of it

mod counters;
mod eligible;
mod follow;
mod handle;
mod kernel;
mod pairs;
mod paths;
mod report;
mod revoke;
mod services;
mod table;
mod told;

pub use counters::Denied;
pub use eligible::Refused;
pub use handle::{Doomed, Lane};
pub use kernel::Kernel;
pub use report::{PathFault, Report, Switch};
pub use told::Told;

#[cfg(test)]
mod tests;
