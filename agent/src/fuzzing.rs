//! What fuzzing runs: one function for each parser that a peer, a manifest or another process feeds. Each takes any bytes
//! and panics where an invariant breaks.
//!
//! Compiled for `cargo xtask fuzz` (`cfg(fuzzing)`) and for tests, which run the committed corpus through it, so that what
//! fuzzing once found is looked for on every machine. It is no part of the agent: what it looks at is private everywhere
//! else, and stays so.

pub use crate::{
    capture::fuzzing::capture,
    cluster::fuzzing::manifests,
    cni::fuzzing::cni,
    identity::fuzzing::{
        bearer_token, ca_answer, certificate_request, peer_certificate, revocation_lists, spiffe, trust_bundle,
    },
    life::fuzzing::{admin_query, flags},
    policy::fuzzing::policies,
    telemetry::scrape::fuzzing::exposition,
    tunnel::fuzzing::{arrival, connect_target, frames, own_headers, proof_answer, request_headers},
};

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    type Target = fn(&[u8]);

    /// Name of a target, of its folder of the corpus, and what it runs.
    const TARGETS: [(&str, Target); 20] = [
        ("admin_query", super::admin_query),
        ("arrival", super::arrival),
        ("bearer_token", super::bearer_token),
        ("ca_answer", super::ca_answer),
        ("capture", super::capture),
        ("certificate_request", super::certificate_request),
        ("cni", super::cni),
        ("connect_target", super::connect_target),
        ("exposition", super::exposition),
        ("flags", super::flags),
        ("frames", super::frames),
        ("manifests", super::manifests),
        ("own_headers", super::own_headers),
        ("peer_certificate", super::peer_certificate),
        ("policies", super::policies),
        ("proof_answer", super::proof_answer),
        ("request_headers", super::request_headers),
        ("revocation_lists", super::revocation_lists),
        ("spiffe", super::spiffe),
        ("trust_bundle", super::trust_bundle),
    ];

    fn fuzz() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz"))
    }

    #[test]
    fn the_corpus_breaks_no_invariant() {
        for (name, run) in TARGETS {
            let inputs: Vec<_> = fs::read_dir(fuzz().join("corpus").join(name)).unwrap().flatten().collect();
            assert!(!inputs.is_empty(), "no corpus for {name}");
            for input in inputs {
                println!("{}", input.path().display());
                run(&fs::read(input.path()).unwrap());
            }
        }
    }

    #[test]
    fn every_target_is_a_program_and_runs_here_too() {
        let programs = fs::read_dir(fuzz().join("fuzz_targets")).unwrap().flatten();
        let mut programs: Vec<_> = programs.map(|entry| entry.path()).collect();
        programs.sort();
        let names: Vec<_> = programs.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, TARGETS.map(|(name, _)| name));
    }
}
