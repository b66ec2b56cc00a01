//! A peer's certificate and the SPIFFE id in it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::peer_certificate(data));
