//! Fuzzing of what is typed: see [`crate::fuzzing`].

use super::config::{duration, lifetime, listen, trust_domain};

/// Durations, addresses and names of flags: what is accepted means what it prints, and what is refused says what to write.
pub fn flags(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match duration("--drain-grace", text) {
        Ok(meant) => {
            let printed = humantime::format_duration(meant).to_string();
            assert_eq!(duration("--drain-grace", &printed).as_ref(), Ok(&meant), "{text}");
            assert_eq!(lifetime("--certificate-lifetime", text).is_ok(), meant.as_secs() >= 2, "{text}");
        }
        Err(error) => assert!(error.to_string().contains("--drain-grace") && !error.fix.is_empty()),
    }
    if let Ok(address) = listen("--metrics-listen", text) {
        assert_eq!(listen("--metrics-listen", &address.to_string()), Ok(address));
    }
    if let Ok(domain) = trust_domain(text) {
        assert_eq!(domain.as_str(), text);
    }
}
