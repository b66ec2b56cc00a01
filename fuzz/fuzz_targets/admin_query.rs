//! Queries on the admin socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::admin_query(data));
