//! The Debian packages that the lab and the demonstration need, installed by name, only those that are missing.

use std::{env, process::Command};

use anyhow::{Context, Result, ensure};

use crate::console::{is_root, show};

/// A program and the Debian package that has it.
const PROGRAMS: [(&str, &str); 7] = [
    ("ip", "iproute2"),
    ("tcpdump", "tcpdump"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("curl", "curl"),
    ("bpftool", "bpftool"),
    ("promtool", "prometheus"),
];

/// Makes sure that every program is there. As another user than root it only says what is missing.
pub fn run() -> Result<()> {
    let missing: Vec<&str> =
        PROGRAMS.iter().filter(|(program, _)| !found(program)).map(|(_, package)| *package).collect();
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
    args.extend(&missing);
    // The demonstration runs its own nginx; the package must not start one.
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
