//! The image of the lab's pods: the workload of the lab and the C library that it needs, as an OCI archive that the runtime imports.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::binaries;

/// Its name; never pulled from anywhere.
pub const NAME: &str = "heddle.dev/lab:1";

/// Writes the archive to `into`. `folder` is scratch.
pub fn write(folder: &Path, into: &Path) -> Result<()> {
    let (root, layout) = (folder.join("root"), folder.join("layout"));
    let program = binaries::lab_peer()?;
    fs::create_dir_all(&root)?;
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    place(&program, &root.join("lab-peer"))?;
    for library in libraries(&program)? {
        place(Path::new(&library), &root.join(library.trim_start_matches('/')))?;
    }
    let layer = folder.join("layer.tar");
    tar(&root, &layer)?;
    let (layer_digest, layer_size) = blob(&layout, &fs::read(&layer)?)?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": { "Entrypoint": ["/lab-peer", "pause"] },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] },
    });
    let (config_digest, config_size) = blob(&layout, config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config_size),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer_digest, layer_size)],
    });
    let (manifest_digest, manifest_size) = blob(&layout, manifest.to_string().as_bytes())?;
    let mut named = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest_digest, manifest_size);
    named["annotations"] = json!({ "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "1" });
    fs::write(layout.join("index.json"), json!({ "schemaVersion": 2, "manifests": [named] }).to_string())?;
    fs::write(layout.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    tar(&layout, into)
}

fn descriptor(kind: &str, digest: &str, size: usize) -> Value {
    json!({ "mediaType": kind, "digest": digest, "size": size })
}

/// Puts bytes into the archive; gives digest and size.
fn blob(layout: &Path, bytes: &[u8]) -> Result<(String, usize)> {
    let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(layout.join("blobs/sha256").join(&digest), bytes)?;
    Ok((format!("sha256:{digest}"), bytes.len()))
}

fn place(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    Ok(())
}

fn tar(folder: &Path, into: &Path) -> Result<()> {
    let packed =
        Command::new("tar").arg("-C").arg(folder).arg("-cf").arg(into).arg(".").status().context("running tar")?;
    ensure!(packed.success(), "tar: {packed}");
    Ok(())
}

/// The files that the dynamic linker would load, the linker itself among them.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    ensure!(output.status.success(), "ldd: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}
