//! What a captured connection is, from addresses alone.
//!
//! The first thing that the tunnel decides. Pure; it trusts nothing that a peer wrote, only what the kernel says of the
//! socket. What is neither to nor from the pod is refused, never guessed.

use std::net::{IpAddr, SocketAddr};

/// Port that carries the tunnel (HBONE).
pub(super) const HBONE_PORT: u16 = 15_008;
/// Port of the pod's listener itself; nothing may address it.
pub(super) const LISTENER_PORT: u16 = 15_001;
/// Ports that no tunnel may ask for: the mesh's own (`hbone` self-calls), and none.
pub(crate) const REFUSED_TARGETS: [u16; 4] = [0, LISTENER_PORT, 15_006, HBONE_PORT];

/// What a captured connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Capture asks whether this listener is served.
    Probe,
    /// The pod's app connects to `destination`.
    Outbound { destination: SocketAddr },
    /// A mesh peer connects to the pod's port 15008.
    Hbone,
    /// Somebody connects to the app at `app` without the mesh.
    Plaintext { app: SocketAddr },
    /// Neither side is the pod's.
    Stray,
}

/// IPv4 as IPv4, also where a dual-stack socket shows it as `::ffff:a.b.c.d`.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// `local` is the accepted socket's local address, that is the original destination. Both addresses are canonical.
pub(super) fn classify(
    local: SocketAddr,
    peer: SocketAddr,
    own: &[IpAddr],
    is_probe: impl Fn(SocketAddr, SocketAddr) -> bool,
) -> Arrival {
    if is_probe(local, peer) {
        return Arrival::Probe;
    }
    if own.contains(&local.ip()) {
        return match local.port() {
            HBONE_PORT => Arrival::Hbone,
            LISTENER_PORT | 0 => Arrival::Stray,
            _ => Arrival::Plaintext { app: local },
        };
    }
    if own.contains(&peer.ip()) { Arrival::Outbound { destination: local } } else { Arrival::Stray }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        canonical(text.parse().unwrap())
    }

    #[test]
    fn a_connection_is_what_its_addresses_say() {
        let own: Vec<IpAddr> = ["10.0.0.5", "fd00::5"].iter().map(|a| a.parse().unwrap()).collect();
        let never = |_, _| false;
        let cases = [
            ("10.0.0.9:80", "10.0.0.5:4000", Arrival::Outbound { destination: at("10.0.0.9:80") }),
            ("[::ffff:10.0.0.9]:80", "[::ffff:10.0.0.5]:4000", Arrival::Outbound { destination: at("10.0.0.9:80") }),
            ("[fd00::9]:15008", "[fd00::5]:4000", Arrival::Outbound { destination: at("[fd00::9]:15008") }),
            ("10.0.0.5:15008", "10.0.0.9:4000", Arrival::Hbone),
            ("[::ffff:10.0.0.5]:15008", "[::ffff:10.0.0.9]:4000", Arrival::Hbone),
            ("[fd00::5]:8080", "[fd00::9]:4000", Arrival::Plaintext { app: at("[fd00::5]:8080") }),
            ("10.0.0.5:8080", "10.0.0.5:4000", Arrival::Plaintext { app: at("10.0.0.5:8080") }),
            ("10.0.0.5:15001", "10.0.0.9:4000", Arrival::Stray),
            ("10.0.0.9:80", "10.0.0.8:4000", Arrival::Stray),
            ("127.0.0.1:80", "127.0.0.1:4000", Arrival::Stray),
        ];
        for (local, peer, expected) in cases {
            assert_eq!(classify(at(local), at(peer), &own, never), expected, "{peer} -> {local}");
        }
    }

    #[test]
    fn a_probe_is_a_probe_before_anything_else() {
        let own = ["10.0.0.5".parse().unwrap()];
        assert_eq!(classify(at("10.0.0.5:15001"), at("10.0.0.9:1"), &own, |_, _| true), Arrival::Probe);
    }
}
