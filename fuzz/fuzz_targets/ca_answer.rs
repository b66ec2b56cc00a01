//! The chain that a CA answers with.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::ca_answer(data));
