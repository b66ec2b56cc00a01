//! Revocation lists, as PEM and as DER.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::revocation_lists(data));
