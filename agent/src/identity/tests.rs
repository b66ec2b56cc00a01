//! Claims about identity, tried against real sockets where a socket is part of the claim.

mod aliases;
mod answers;
mod dial;
mod handshake;
mod memory;
mod outage;
mod revocation;
mod rotation;
mod schedule;
mod spiffe;
pub mod support;
