//! Headers of our own CONNECT, made of names from manifests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::own_headers(data));
