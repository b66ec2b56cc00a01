//! Fuzzing of what arrives at the tunnel: see [`crate::fuzzing`].

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Instant,
};

pub use super::{
    answer::fuzzing::{connect_target, request_headers},
    offer::fuzzing::own_headers,
    proof::fuzz as proof_answer,
};
use super::{
    classify::{Arrival, HBONE_PORT, LISTENER_PORT, canonical, classify},
    frames::{Allowance, Role},
};
use crate::life::limits;

/// Frames are counted the same however they are cut into pieces, and more CONTINUATION frames than a header block may have
/// are never let through.
pub fn frames(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let role = if first & 1 == 0 { Role::Client } else { Role::Server };
    let piece = usize::from(first >> 1).max(1);
    // Time stands still, so that no budget fills up again in between.
    let now = Instant::now();
    let whole = Allowance::new(role).read(rest, || now);
    let mut cut = Allowance::new(role);
    let cut = rest.chunks(piece).try_for_each(|piece| cut.read(piece, || now));
    assert_eq!(whole, cut);
    if let Some(longest) = longest_continuation(rest, role)
        && longest > limits::H2_CONTINUATIONS
    {
        assert!(whole.is_err(), "{longest} CONTINUATION frames in a block");
    }
}

/// Most CONTINUATION frames of a header block among the whole frames of `bytes`.
fn longest_continuation(bytes: &[u8], role: Role) -> Option<u32> {
    const PREFACE: usize = 24;
    let mut rest = if role == Role::Server { bytes.get(PREFACE..)? } else { bytes };
    let (mut longest, mut now) = (0, 0);
    while let Some((&[high, middle, low, kind, ..], after)) = rest.split_first_chunk::<9>() {
        now = match kind {
            // HEADERS and CONTINUATION of RFC 9113 §6.
            1 => 0,
            9 => now + 1,
            _ => now,
        };
        longest = longest.max(now);
        let length = u32::from_be_bytes([0, high, middle, low]);
        rest = after.get(usize::try_from(length).ok()?..).unwrap_or_default();
    }
    Some(longest)
}

/// Whatever addresses a connection has: the agent never dials its own pod as if it were another, and nothing is taken for
/// the app's that is the mesh's own.
pub fn arrival(data: &[u8]) {
    let Some((addresses, own)) = data.split_first_chunk::<36>() else { return };
    let (local, peer) = (address(addresses, 0), address(addresses, 18));
    let own: Vec<IpAddr> = own.chunks_exact(16).filter_map(|octets| Some(ip(octets.try_into().ok()?))).collect();
    match classify(local, peer, &own, |_, _| false) {
        Arrival::Probe => unreachable!("nothing was a probe"),
        Arrival::Outbound { destination } => {
            assert!(destination == local && !own.contains(&destination.ip()) && own.contains(&peer.ip()));
        }
        Arrival::Hbone => assert!(own.contains(&local.ip()) && local.port() == HBONE_PORT),
        Arrival::Plaintext { app } => {
            assert!(own.contains(&app.ip()) && ![0, HBONE_PORT, LISTENER_PORT].contains(&app.port()));
        }
        Arrival::Stray => assert!(!own.contains(&local.ip()) || [0, LISTENER_PORT].contains(&local.port())),
    }
}

fn address(bytes: &[u8; 36], at: usize) -> SocketAddr {
    let octets: [u8; 18] = std::array::from_fn(|index| bytes.get(at + index).copied().unwrap_or_default());
    let [address @ .., high, low] = octets;
    canonical(SocketAddr::new(ip(address), u16::from_be_bytes([high, low])))
}

fn ip(octets: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
}
