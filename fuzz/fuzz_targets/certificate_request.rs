//! CreateCertificate and its CSR, as the built-in CA gets them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| heddle::fuzzing::certificate_request(data));
