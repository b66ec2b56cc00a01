//! What a far agent says of a connection that is asked to prove itself.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::proof_answer(data));
