//! What a CONNECT asks for: `:authority`, checked before anything is done for it. Pure.
//!
//! Only the pod's own address, only a port of the app. Names are for gateways and waypoints; a pod is asked by address.

use std::net::{IpAddr, SocketAddr};

use crate::tunnel::classify::{REFUSED_TARGETS, canonical};

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TargetError {
    #[error("the authority is not an address and a port")]
    Malformed,
    #[error("the authority is not the address that was connected to")]
    OtherAddress,
    #[error("the port is not an app's")]
    RefusedPort,
}

impl TargetError {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Malformed => "bad_authority",
            Self::OtherAddress => "address_mismatch",
            Self::RefusedPort => "refused_port",
        }
    }
}

/// The app's address that `authority` means on a connection to `own`.
pub(crate) fn target(authority: &str, own: IpAddr) -> Result<SocketAddr, TargetError> {
    // The standard parser takes zone ids (`[fe80::1%1]:80`) and leading zeros of ports; nobody means well with them.
    let port = authority.rsplit_once(':').map(|(_, port)| port).unwrap_or_default();
    if authority.contains('%') || (port.len() > 1 && port.starts_with('0')) {
        return Err(TargetError::Malformed);
    }
    let target = canonical(authority.parse().map_err(|_| TargetError::Malformed)?);
    if target.ip() != own {
        return Err(TargetError::OtherAddress);
    }
    if REFUSED_TARGETS.contains(&target.port()) {
        return Err(TargetError::RefusedPort);
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_own_address_and_an_apps_port_are_targets() {
        use TargetError::{Malformed, OtherAddress, RefusedPort};
        let four: IpAddr = "10.0.0.5".parse().unwrap();
        let six: IpAddr = "fd00::5".parse().unwrap();
        let cases = [
            ("10.0.0.5:80", four, Ok("10.0.0.5:80")),
            ("10.0.0.5:65535", four, Ok("10.0.0.5:65535")),
            ("[fd00::5]:80", six, Ok("[fd00::5]:80")),
            ("[fd00:0:0::5]:80", six, Ok("[fd00::5]:80")),
            ("[::ffff:10.0.0.5]:80", four, Ok("10.0.0.5:80")),
            ("10.0.0.5:0", four, Err(RefusedPort)),
            ("10.0.0.5:15001", four, Err(RefusedPort)),
            ("10.0.0.5:15006", four, Err(RefusedPort)),
            ("[fd00::5]:15008", six, Err(RefusedPort)),
            ("10.0.0.6:80", four, Err(OtherAddress)),
            ("127.0.0.1:80", four, Err(OtherAddress)),
            ("0.0.0.0:80", four, Err(OtherAddress)),
            ("169.254.169.254:80", four, Err(OtherAddress)),
            ("[::1]:80", six, Err(OtherAddress)),
            ("[::]:80", six, Err(OtherAddress)),
            ("[::10.0.0.5]:80", four, Err(OtherAddress)),
            ("10.0.0.5:80", six, Err(OtherAddress)),
            ("10.0.0.5:65536", four, Err(Malformed)),
            ("10.0.0.5:080", four, Err(Malformed)),
            ("10.0.0.5:+80", four, Err(Malformed)),
            ("10.0.0.5:-1", four, Err(Malformed)),
            ("10.0.0.5:", four, Err(Malformed)),
            ("10.0.0.5", four, Err(Malformed)),
            ("fd00::5:80", six, Err(Malformed)),
            ("[fd00::5]", six, Err(Malformed)),
            ("[fd00::5%1]:80", six, Err(Malformed)),
            ("010.0.0.5:80", four, Err(Malformed)),
            ("167772165:80", four, Err(Malformed)),
            ("0x0a000005:80", four, Err(Malformed)),
            ("10.0.0.5.:80", four, Err(Malformed)),
            ("user@10.0.0.5:80", four, Err(Malformed)),
            ("10.0.0.5:80@10.0.0.6:80", four, Err(Malformed)),
            (" 10.0.0.5:80", four, Err(Malformed)),
            ("localhost:80", four, Err(Malformed)),
            ("web.shop.svc.cluster.local:80", four, Err(Malformed)),
            (":80", four, Err(Malformed)),
            ("", four, Err(Malformed)),
        ];
        for (authority, own, expected) in cases {
            assert_eq!(target(authority, own), expected.map(|text| text.parse().unwrap()), "{authority:?}");
        }
    }
}
