//! What is made before the agent compiles: the kernel programs' object is put beside its code, never one of other sources,
//! and the messages of the CA's API are generated.

#[path = "../ebpf/object/sources.rs"]
mod sources;

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    embed()?;
    proto()
}

/// Puts the committed object into `OUT_DIR/heddle.bpf.o`, after checking that it was built from the sources that are here.
fn embed() -> Result<(), Box<dyn Error>> {
    let root = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("..");
    for path in ["Cargo.lock", "ebpf/object", sources::OBJECT, sources::MANIFEST].iter().chain(&sources::INPUTS) {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let recorded = fs::read_to_string(root.join(sources::MANIFEST)).unwrap_or_default();
    let now = sources::manifest(&root)?;
    if let Some(difference) = sources::difference(&recorded, &now) {
        println!("cargo::error={} is stale: {difference}", sources::OBJECT);
        println!("cargo::error=rebuild it with `cargo xtask ebpf` and commit ebpf/object/");
        return Err("the kernel programs' object does not fit its sources".into());
    }
    fs::copy(root.join(sources::OBJECT), Path::new(&env::var("OUT_DIR")?).join("heddle.bpf.o"))?;
    Ok(())
}

/// The CA's gRPC messages, compiled without protoc.
fn proto() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/citadel.proto");
    let files = protox::compile(["proto/citadel.proto"], ["proto"])?;
    tonic_prost_build::configure().build_transport(false).emit_rerun_if_changed(false).compile_fds(files)?;
    Ok(())
}
