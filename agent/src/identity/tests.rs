//! Claims about identity, tried against real sockets where a socket is part of the claim.

mod aliases;
mod handshake;
mod revocation;
mod rotation;
mod schedule;
mod spiffe;
pub mod support;
