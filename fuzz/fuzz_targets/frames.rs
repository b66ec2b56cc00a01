//! HTTP/2 frames between TLS and h2.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::frames(data));
