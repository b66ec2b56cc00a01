//! What the lab and the demonstration need besides Rust, installed by name, only what is missing: Debian packages, and
//! some of Python.

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};

use crate::console::{is_root, show, target};

/// A program, or its whole path where it is in no folder of `PATH`, and the Debian package that has it.
type Program = (&'static str, &'static str);

const PROGRAMS: [Program; 18] = [
    ("ip", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("bpftool", "bpftool"),
    ("promtool", "prometheus"),
    ("strace", "strace"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    // Manifests and the image. The package's kubectl is too old to render overlays, and the tests say so.
    ("kubectl", "kubernetes-client"),
    ("buildah", "buildah"),
    ("busybox", "busybox-static"),
    ("readelf", "binutils"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
];
/// What only the kernels need.
const KERNELS: [Program; 2] = [("qemu-system-x86_64", "qemu-system-x86"), ("depmod", "kmod")];
/// What starts them, by PyPI's name.
const KERNEL_PACKAGES: [&str; 1] = ["virtme-ng"];
/// What only the bench needs.
const BENCH: [Program; 2] = [("iperf3", "iperf3"), ("wrk", "wrk")];

/// Python packages of the program that receives spans in the lab, by PyPI's names: OpenTelemetry's own protobufs.
const OTLP_PACKAGES: [&str; 2] = ["opentelemetry-proto", "grpcio"];

/// The same of the program that asks the CA: stock gRPC with its compiler.
const GRPC_PACKAGES: [&str; 1] = ["grpcio-tools"];

/// Makes sure that every program is there. As another user than root it only says what is missing.
pub fn run() -> Result<()> {
    install(&PROGRAMS)?;
    for (folder, packages) in [("otlp", &OTLP_PACKAGES[..]), ("grpc", &GRPC_PACKAGES)] {
        if let Err(error) = python(folder, packages) {
            println!("no Python with {}, so a test is skipped: {error:#}", packages.join(", "));
        }
    }
    Ok(())
}

/// The same for the programs of the bench.
pub fn run_bench() -> Result<()> {
    install(&BENCH)
}

/// The same for what boots kernels; gives the program that does.
pub fn run_kernels() -> Result<PathBuf> {
    install(&KERNELS)?;
    python("vng", &KERNEL_PACKAGES)?;
    Ok(target().join("vng"))
}

/// A Python environment of its own below the target directory, with these packages.
fn python(folder: &str, packages: &[&str]) -> Result<()> {
    let place = target().join(folder);
    // The last file to be made. Its scripts name the folder, so it can't be made elsewhere and moved.
    let whole = place.join("whole");
    if whole.is_file() {
        return Ok(());
    }
    println!("installing {} for Python into {}", packages.join(", "), place.display());
    let made = show(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&place))?;
    ensure!(made.success(), "python3 -m venv failed");
    let mut install = Command::new(place.join("bin/python3"));
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(packages);
    ensure!(show(&mut install)?.success(), "pip install {} failed", packages.join(" "));
    fs::write(&whole, "").with_context(|| whole.display().to_string())
}

fn install(programs: &[Program]) -> Result<()> {
    let missing: Vec<&str> =
        programs.iter().filter(|(program, _)| !found(program)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() {
        println!("not installed: {}", missing.join(", "));
        return Ok(());
    }
    println!("installing {}", missing.join(", "));
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    let context = "this machine has no apt-get; install these programs by hand and start again";
    ensure!(show(&mut apt(&["update", "-qq"])).context(context)?.success(), "apt-get update failed");
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
    // The lab runs its own nginx and Prometheus: the packages must not start a service. SysV reads the
    // run level; systemd can't start a unit that was not unpacked.
    for option in [
        "Dpkg::Options::=--path-exclude=/lib/systemd/system/prometheus*",
        "Dpkg::Options::=--path-exclude=/usr/lib/systemd/system/prometheus*",
    ] {
        args.extend(["-o", option]);
    }
    args.extend(&missing);
    let installed = show(apt(&args).env("RUNLEVEL", "1"))?;
    ensure!(installed.success(), "apt-get install {} failed", missing.join(" "));
    Ok(())
}

fn found(program: &str) -> bool {
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into);
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain(usual)
        .any(|folder: std::path::PathBuf| folder.join(program).is_file())
}
