//! AuthorizationPolicy and PeerAuthentication, compiled and decided.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::policies(data));
