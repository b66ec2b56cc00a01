//! Durations, addresses and names on the command line.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::flags(data));
