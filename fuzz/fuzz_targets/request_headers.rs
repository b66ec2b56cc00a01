//! Headers of a peer's CONNECT.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::request_headers(data));
