//! CNI lists, calls of the plugin, and its messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::cni(data));
