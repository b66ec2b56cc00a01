//! What capture reads back: port ranges, records of pins, tokens of probes, addresses in maps.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::capture(data));
