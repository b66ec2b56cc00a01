//! What a pod answers a scrape with.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::exposition(data));
