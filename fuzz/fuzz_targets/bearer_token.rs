//! A token that the CA is shown, and the API server's word on it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::bearer_token(data));
