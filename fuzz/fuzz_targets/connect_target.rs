//! `:authority` of a CONNECT.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::connect_target(data));
