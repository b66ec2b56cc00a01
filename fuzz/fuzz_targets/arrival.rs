//! What a captured connection is, by its addresses.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::arrival(data));
