//! Claims about identity, tried against real sockets where a socket is part of the claim.

mod handshake;
mod rotation;
mod schedule;
mod spiffe;
pub mod support;
