//! What is made before the lab compiles: a client of the CA's API, from the text that the agent publishes.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../agent/proto/citadel.proto");
    let files = protox::compile(["../agent/proto/citadel.proto"], ["../agent/proto"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .emit_rerun_if_changed(false)
        .compile_fds(files)?;
    Ok(())
}
