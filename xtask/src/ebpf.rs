//! `cargo xtask ebpf`: rebuilds the kernel programs' object, reproducibly, and records what it was built from.
//!
//! The object is committed because its toolchain (nightly Rust, the sources of `core`, bpf-linker) can't be had
//! everywhere. `--check` rebuilds and compares; it must never call an object good that it could not compare, nor bad
//! because another toolchain made other bytes.

#[path = "../../ebpf/object/sources.rs"]
mod sources;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{
    console::quietly,
    debian::{Suite, newest},
};

/// Built against rustc's own LLVM; later versions want one of the system.
const LINKER_VERSION: &str = "0.10.4";
const TARGET: &str = "bpfel-unknown-none";
const PACKAGE: &str = "heddle-ebpf";
/// What made the committed object, from the root of the repository.
const TOOLCHAIN: &str = "ebpf/object/TOOLCHAIN";

/// Rebuilds the object and its records; with `check` compares with the committed ones and changes nothing.
///
/// # Errors
/// Stale sources, other bytes from the same toolchain, a failed build; without `check` also a toolchain that can't be
/// had.
pub fn run(check: bool) -> Result<()> {
    let root = fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))?;
    if check {
        let recorded = fs::read_to_string(root.join(sources::MANIFEST)).context(sources::MANIFEST)?;
        if let Some(difference) = sources::difference(&recorded, &sources::manifest(&root)?) {
            bail!("{} is stale: {difference}; rebuild it with `cargo xtask ebpf`", sources::OBJECT);
        }
    }
    let toolchain = match Toolchain::find(&root) {
        Ok(toolchain) => toolchain,
        Err(error) if check => {
            println!("SKIPPED: the object fits its sources, but can't be rebuilt and compared here: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let object = toolchain.build(&root)?;
    let described = toolchain.describe()?;
    if check {
        return compare(&root, &object, &described);
    }
    fs::create_dir_all(root.join("ebpf/object"))?;
    fs::write(root.join(sources::OBJECT), &object)?;
    fs::write(root.join(TOOLCHAIN), &described)?;
    fs::write(root.join(sources::MANIFEST), sources::manifest(&root)?)?;
    println!("{}: {} bytes, sha256 {:x}", sources::OBJECT, object.len(), Sha256::digest(&object));
    Ok(())
}

/// Tells equal bytes, other bytes by another toolchain, and other bytes by the same one apart.
fn compare(root: &Path, object: &[u8], described: &str) -> Result<()> {
    if fs::read(root.join(sources::OBJECT))? == object {
        println!("{}: the same, byte for byte", sources::OBJECT);
        return Ok(());
    }
    let recorded = fs::read_to_string(root.join(TOOLCHAIN)).context(TOOLCHAIN)?;
    ensure!(recorded != described, "{} differs from what the same toolchain builds of its sources", sources::OBJECT);
    println!(
        "SKIPPED: not comparable, the bytes differ and so do the toolchains.\nrecorded:\n{recorded}here:\n{described}"
    );
    Ok(())
}

/// Nightly Rust with the sources of `core`, and bpf-linker.
struct Toolchain {
    sysroot: PathBuf,
    linker: PathBuf,
}

impl Toolchain {
    /// Finds the toolchain, and fetches what is missing where that is possible.
    fn find(root: &Path) -> Result<Self> {
        let work = root.join("target/ebpf");
        fs::create_dir_all(&work)?;
        let sysroot = sysroot().or_else(|_| {
            quietly(Command::new("rustup").args(["toolchain", "install", "nightly", "--profile", "minimal"]))?;
            sysroot()
        });
        let sysroot = PathBuf::from(sysroot.context("no nightly toolchain")?);
        core_sources(&sysroot, &work).context("no sources of core")?;
        let linker = linker(&work).context("no bpf-linker")?;
        Ok(Self { sysroot, linker })
    }

    /// Builds the object. What is in its bytes depends on the sources and on this toolchain, not on where either lies:
    /// the paths are remapped, the names of local symbols (which the compiler derives from paths) are left out, and no
    /// profile or flag of the caller counts.
    fn build(&self, root: &Path) -> Result<Vec<u8>> {
        let directory = root.join("target/ebpf/build");
        let mut flags: Vec<OsString> = sources::FLAGS.iter().map(OsString::from).collect();
        flags.push(concat_os("-Clinker=", &self.linker));
        // A path relative to the root lets the linker find the lines of the sources for the verifier's log.
        let mut remaps = vec![(root.to_owned(), "."), (self.sysroot.join("lib/rustlib/src/rust"), "/rust")];
        if let Ok(registries) = fs::read_dir(cargo_home()?.join("registry/src")) {
            for registry in registries {
                remaps.push((registry?.path(), "/registry"));
            }
        }
        for (from, to) in remaps {
            let mut flag = concat_os("--remap-path-prefix=", &from);
            flag.push(format!("={to}"));
            flags.push(flag);
        }
        let mut cargo = nightly("cargo");
        cargo.current_dir(root).args(["build", "--release", "--locked", "-Z", "build-std=core"]);
        cargo.args(["--target", TARGET, "--package", PACKAGE, "--target-dir"]).arg(&directory);
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join(OsString::from("\x1f").as_os_str()));
        for (key, value) in [
            ("CODEGEN_UNITS", "1"),
            ("DEBUG", "2"),
            ("DEBUG_ASSERTIONS", "false"),
            ("INCREMENTAL", "false"),
            ("LTO", "off"),
            ("OPT_LEVEL", "3"),
            ("OVERFLOW_CHECKS", "false"),
            ("STRIP", "none"),
        ] {
            cargo.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
        }
        ensure!(cargo.status().context("cargo")?.success(), "the kernel programs do not build");
        let built = directory.join(TARGET).join("release").join(PACKAGE);
        let stripped = directory.join("heddle.bpf.o");
        // DWARF is not for the kernel, which reads BTF.
        let mut strip = Command::new(self.host_tool("rust-objcopy")?);
        strip.env("LD_LIBRARY_PATH", self.sysroot.join("lib")).args(["--strip-debug", "--discard-all"]);
        quietly(strip.arg(&built).arg(&stripped))?;
        Ok(fs::read(stripped)?)
    }

    /// Everything that the bytes depend on besides the sources, one per line.
    fn describe(&self) -> Result<String> {
        let rustc = quietly(nightly("rustc").arg("-vV"))?;
        let mut text = String::new();
        for line in rustc.lines().filter(|line| !line.starts_with("host") && !line.starts_with("binary")) {
            text.push_str(&format!("rustc {line}\n"));
        }
        text.push_str(&format!("{}\n", quietly(Command::new(&self.linker).arg("--version"))?.trim()));
        let library = self.sysroot.join("lib/rustlib/src/rust/library");
        for part in ["core/src", "compiler-builtins/compiler-builtins/src"] {
            text.push_str(&format!("library/{part} sha256 {}\n", tree(&library.join(part))?));
        }
        Ok(text)
    }

    /// A program that rustc brings along for the host.
    fn host_tool(&self, name: &str) -> Result<PathBuf> {
        let version = quietly(nightly("rustc").arg("-vV"))?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
        let tool = self.sysroot.join("lib/rustlib").join(host).join("bin").join(name);
        ensure!(tool.exists(), "the nightly toolchain has no {name}");
        Ok(tool)
    }
}

/// Makes sure that the nightly toolchain has the sources of `core`: by rustup, else from Debian's package.
fn core_sources(sysroot: &Path, work: &Path) -> Result<()> {
    let place = sysroot.join("lib/rustlib/src/rust");
    if place.join("library/core/src/lib.rs").exists() {
        return Ok(());
    }
    let rustup = quietly(Command::new("rustup").args(["component", "add", "rust-src", "--toolchain", "nightly"]));
    if place.join("library/core/src/lib.rs").exists() {
        return Ok(());
    }
    let Err(rustup) = rustup else { bail!("rustup added rust-src, but {} is not there", place.display()) };
    let debian = debian_sources(&work.join("rust-src"));
    let found = debian.with_context(|| format!("neither by rustup ({rustup:#}) nor from Debian's package rust-src"))?;
    fs::create_dir_all(&place)?;
    quietly(Command::new("cp").arg("-r").arg(found).arg(&place))?;
    Ok(())
}

/// Unpacks the package `rust-src` of Debian's unstable suite.
fn debian_sources(work: &Path) -> Result<PathBuf> {
    let unpacked = work.join("unpacked");
    Suite::open("unstable", work)?.unpack("rust-src", &unpacked)?;
    let release = newest(&unpacked.join("usr/src"), |name| name.starts_with("rustc-"))?;
    Ok(release.context("no rustc-… in the package rust-src")?.join("library"))
}

/// bpf-linker of the one right version: the installed one, else one of our own under `target/`.
fn linker(work: &Path) -> Result<PathBuf> {
    let own = work.join("tools");
    let right = |path: &Path| {
        let version = quietly(Command::new(path).arg("--version")).unwrap_or_default();
        version.split_whitespace().last() == Some(LINKER_VERSION)
    };
    for candidate in [cargo_home()?.join("bin/bpf-linker"), own.join("bin/bpf-linker")] {
        if right(&candidate) {
            return Ok(candidate);
        }
    }
    let mut install = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    install.args(["install", "--quiet", "--locked", "--version", LINKER_VERSION, "bpf-linker", "--root"]).arg(&own);
    quietly(&mut install)?;
    Ok(own.join("bin/bpf-linker"))
}

/// A program of the nightly toolchain, free of what cargo and the caller set for the stable one.
fn nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    for (key, _) in env::vars_os() {
        let name = key.to_string_lossy();
        let ours = matches!(&*name, "CARGO_HOME" | "CARGO_HTTP_CAINFO" | "CARGO_HTTP_PROXY" | "CARGO_NET_OFFLINE");
        if (name.starts_with("CARGO") || name.starts_with("RUST")) && !name.starts_with("RUSTUP_HOME") && !ours {
            command.env_remove(&key);
        }
    }
    command
}

/// Where the nightly toolchain lies.
fn sysroot() -> Result<String> {
    Ok(quietly(nightly("rustc").args(["--print", "sysroot"]))?.trim().to_owned())
}

fn cargo_home() -> Result<PathBuf> {
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home).context("neither CARGO_HOME nor HOME is set")
}

/// One hash over a folder of files: of their sorted paths, lengths and contents.
fn tree(folder: &Path) -> Result<String> {
    let (mut open, mut files) = (vec![folder.to_owned()], Vec::new());
    while let Some(path) = open.pop() {
        if path.is_dir() {
            for entry in fs::read_dir(&path).with_context(|| path.display().to_string())? {
                open.push(entry?.path());
            }
        } else {
            files.push(path);
        }
    }
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        let content = fs::read(&path)?;
        hash.update(path.strip_prefix(folder)?.as_os_str().as_encoded_bytes());
        hash.update([0]);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    Ok(format!("{:x}", hash.finalize()))
}

fn concat_os(prefix: &str, path: &Path) -> OsString {
    let mut text = OsString::from(prefix);
    text.push(path);
    text
}
