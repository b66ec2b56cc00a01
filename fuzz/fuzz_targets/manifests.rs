//! Manifest files: YAML to objects to a snapshot.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::manifests(data));
