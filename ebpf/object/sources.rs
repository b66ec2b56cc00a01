//! What the committed object was built from: the manifest `SOURCES.sha256`.
//!
//! Included by path into the agent's build script, which refuses a stale object, and into `cargo xtask ebpf`, which
//! writes it, so that there is one way to compute it. It must depend on nothing but the files it names.
//!
//! The manifest is text that `sha256sum --check ebpf/object/SOURCES.sha256` understands at the root of the repository:
//!
//! 1. a `#` line per build flag, in order;
//! 2. a `#` line per crate of [`CRATES`], in order: name, version and checksum as `Cargo.lock` has them;
//! 3. a line `<sha256>  <path>` per file of [`INPUTS`], and per `.rs` file below a folder of it, sorted by path;
//! 4. such a line for the object itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// The object, from the root of the repository.
pub const OBJECT: &str = "ebpf/object/heddle.bpf.o";
/// The manifest, from the root of the repository.
pub const MANIFEST: &str = "ebpf/object/SOURCES.sha256";
/// Files, and folders of Rust files, that the object is built from.
pub const INPUTS: [&str; 4] = ["agent-common/Cargo.toml", "agent-common/src", "ebpf/Cargo.toml", "ebpf/src"];
/// Crates in the object.
pub const CRATES: [&str; 7] = [
    "aya-ebpf",
    "aya-ebpf-bindings",
    "aya-ebpf-cty",
    "aya-ebpf-macros",
    "aya-log-common",
    "aya-log-ebpf",
    "aya-log-ebpf-macros",
];
/// Flags of the compiler that shape the object. The bindings' architecture matters to `pt_regs` only, which nothing
/// here uses: the object is the same for x86-64 and AArch64.
pub const FLAGS: [&str; 3] = ["--cfg=bpf_target_arch=\"x86_64\"", "-Cdebuginfo=2", "-Clink-arg=--btf"];

/// The manifest of the files at `root` as they are now.
///
/// # Errors
/// A file that can't be read, or a crate that `Cargo.lock` does not have.
pub fn manifest(root: &Path) -> io::Result<String> {
    let mut text =
        String::from("# Written by `cargo xtask ebpf`; `cargo build` refuses an object that does not fit.\n");
    for flag in FLAGS {
        text.push_str(&format!("# flag {flag}\n"));
    }
    let lock = fs::read_to_string(root.join("Cargo.lock"))?;
    for name in CRATES {
        text.push_str(&format!("# crate {}\n", locked(&lock, name)?));
    }
    for path in files(root)? {
        text.push_str(&line(root, &path)?);
    }
    text.push_str(&line(root, OBJECT)?);
    Ok(text)
}

/// The first difference of two manifests, as a sentence; `None` if there is none.
pub fn difference(committed: &str, now: &str) -> Option<String> {
    let (mut committed, mut now) = (committed.lines(), now.lines());
    loop {
        match (committed.next(), now.next()) {
            (None, None) => return None,
            (left, right) if left == right => {}
            (left, right) => {
                let show = |line: Option<&str>| line.map_or_else(|| "nothing".to_owned(), |line| format!("`{line}`"));
                return Some(format!("recorded {}, found {}", show(left), show(right)));
            }
        }
    }
}

/// Paths of the input files from the root, with `/`, sorted.
fn files(root: &Path) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut open: Vec<PathBuf> = INPUTS.iter().map(PathBuf::from).collect();
    while let Some(path) = open.pop() {
        if fs::metadata(root.join(&path))?.is_dir() {
            for entry in fs::read_dir(root.join(&path))? {
                let entry = entry?;
                let name = path.join(entry.file_name());
                if entry.file_type()?.is_dir() || name.extension().is_some_and(|extension| extension == "rs") {
                    open.push(name);
                }
            }
        } else {
            let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
            files.push(parts.join("/"));
        }
    }
    files.sort();
    Ok(files)
}

/// A line of `sha256sum`.
fn line(root: &Path, path: &str) -> io::Result<String> {
    let bytes = fs::read(root.join(path)).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
    Ok(format!("{:x}  {path}\n", Sha256::digest(bytes)))
}

/// Name, version and checksum of a package in a `Cargo.lock`.
fn locked(lock: &str, name: &str) -> io::Result<String> {
    let value = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
        line.map(|quoted| quoted.trim_matches('"').to_owned())
    };
    let mut found = lock.split("[[package]]").filter(|block| value(block, "name").as_deref() == Some(name));
    match (found.next(), found.next()) {
        (Some(block), None) => {
            let version = value(block, "version").unwrap_or_default();
            Ok(format!("{name} {version} {}", value(block, "checksum").unwrap_or_default()))
        }
        (None, _) => Err(io::Error::new(io::ErrorKind::NotFound, format!("Cargo.lock has no {name}"))),
        (Some(_), Some(_)) => Err(io::Error::other(format!("Cargo.lock has more than one {name}"))),
    }
}
