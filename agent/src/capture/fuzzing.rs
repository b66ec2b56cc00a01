//! Fuzzing of what capture reads back from the kernel and from its own helper process: see [`crate::fuzzing`].

use std::net::{IpAddr, Ipv6Addr};

use super::{maps, pin, ports, probe};

/// Port ranges, records of pinned pods, tokens of probes, addresses of maps.
pub fn capture(data: &[u8]) {
    if let Some(octets) = data.first_chunk::<16>() {
        let address = IpAddr::V6(Ipv6Addr::from(*octets));
        let key = maps::key(address);
        assert_eq!(IpAddr::V6(Ipv6Addr::from(key.octets)).to_canonical(), address.to_canonical());
        assert_eq!(probe::parse_token(&probe::token_line(octets)), Some(*octets));
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(ephemeral) = ports::parse_ephemeral(text) {
        let range = ports::range(&ephemeral);
        assert!(!range.is_empty() && *range.start() >= 1_024, "{range:?}");
        let apart = range.end() < ephemeral.start() || range.start() > ephemeral.end();
        assert!(apart || *ephemeral.end() == u16::MAX || *ephemeral.start() <= 1_024, "{range:?} of {ephemeral:?}");
    }
    if let Ok(record) = serde_json::from_str::<pin::Record>(text) {
        let again = serde_json::to_string(&record).ok().and_then(|text| serde_json::from_str(&text).ok());
        assert_eq!(again, Some(record));
    }
    if let Some(token) = probe::parse_token(text) {
        assert_eq!(probe::token_line(&token), text.trim().to_ascii_lowercase());
    }
}
