//! Trust bundle files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::trust_bundle(data));
