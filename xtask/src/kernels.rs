//! `cargo xtask test --kernels`: the claims that rest on the kernel, on kernels of several ages: Debian's, in qemu without KVM, on
//! this machine's root file system. A kernel that can't be had or started is told of as one that did not run.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::{
    console::{PACKAGES, cargo, follow, interrupted, is_root, quietly, root, show, target},
    debian::{Suite, newest},
    setup,
    steps::Tally,
};

/// Suites, and what their kernels stand for.
const SUITES: [(&str, &str); 4] = [
    ("bullseye", "the oldest on which heddle works"),
    ("bookworm", "a usual one"),
    ("trixie", "a usual one"),
    ("unstable", "the newest"),
];

/// What is shown on each, by the names of lab tests.
const CLAIMS: [(&str, &[&str]); 5] = [
    (
        "capture",
        &["clean::a_withdrawn_pod_is_as_it_was_before", "paths::the_app_sees_its_clients_address_through_the_tunnel"],
    ),
    ("mutual TLS", &["wire::no_byte_of_an_application_is_on_the_link_and_tls_1_3_is"]),
    (
        "policy",
        &["policy::ports_decide", "policy::a_policy_change_closes_the_live_connections_that_it_denies_and_no_other"],
    ),
    ("uninstall", &["clean::uninstall_removes_what_a_dead_agent_left"]),
    // One of them is asked for by old kernels alone.
    (
        "capabilities",
        &["deploy::capabilities::without_any_one_of_its_capabilities_an_agent_fails_and_its_log_says_at_what"],
    ),
];
/// Of a machine that emulates every instruction.
const MEMORY: &str = "4G";
/// The line that a claim's test ends with (libtest).
const GOOD: &str = "test result: ok. 1 passed";
const DEADLINE: &str = "900";

/// What came of one kernel.
#[derive(Debug, Default)]
struct Row {
    suite: &'static str,
    release: String,
    /// Whether each of [`CLAIMS`] holds; empty where the kernel did not run.
    held: Vec<bool>,
    seconds: u64,
    why_not: String,
}

/// Runs them all, and prints a table.
pub fn run(tally: &mut Tally, only: &[String]) -> Result<()> {
    ensure!(is_root(), "network namespaces and kernel programs need root: sudo -E cargo xtask …");
    for name in only {
        ensure!(SUITES.iter().any(|(suite, _)| suite == name), "{name} is none of the suites whose kernels are tried");
    }
    let tools = match setup::run_kernels() {
        Ok(tools) => tools,
        Err(error) => {
            tally.skipped.push(format!("kernels: {error:#}"));
            return Ok(());
        }
    };
    let lab = lab_binary()?;
    let mut rows = Vec::new();
    for (suite, what) in SUITES.iter().filter(|(suite, _)| only.is_empty() || only.iter().any(|name| name == suite)) {
        if interrupted() {
            break;
        }
        println!("\n== the kernel of {suite}, {what}");
        let began = Instant::now();
        let mut row = Row { suite, ..Row::default() };
        match Kernel::get(suite).and_then(|kernel| {
            row.release.clone_from(&kernel.release);
            kernel.try_all(&tools, &lab)
        }) {
            Ok(held) => row.held = held,
            Err(error) => row.why_not = format!("{error:#}"),
        }
        row.seconds = began.elapsed().as_secs();
        tell(tally, &row);
        rows.push(row);
    }
    println!("\n{}", table(&rows));
    Ok(())
}

fn tell(tally: &mut Tally, row: &Row) {
    if !row.why_not.is_empty() {
        tally.skipped.push(format!("kernel of {}: {}", row.suite, row.why_not));
    }
    for ((claim, _), held) in CLAIMS.iter().zip(&row.held) {
        tally.check(&format!("{claim} on Linux {}", row.release), *held);
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from("| suite | kernel |");
    for (claim, _) in CLAIMS {
        text.push_str(&format!(" {claim} |"));
    }
    text.push_str(" seconds |\n|---|---|");
    text.push_str(&"---|".repeat(CLAIMS.len() + 1));
    for row in rows {
        let release = if row.release.is_empty() { "?" } else { &row.release };
        text.push_str(&format!("\n| {} | {release} |", row.suite));
        for claim in 0..CLAIMS.len() {
            let word = match row.held.get(claim) {
                Some(true) => "passes",
                Some(false) => "FAILS",
                None => "did not run",
            };
            text.push_str(&format!(" {word} |"));
        }
        text.push_str(&format!(" {} |", row.seconds));
    }
    text.push('\n');
    text
}

/// The lab's test binary, built as cargo does.
fn lab_binary() -> Result<PathBuf> {
    ensure!(show(cargo(["build", "--bins"]).args(PACKAGES))?.success(), "the build failed");
    let args = ["test", "--test", "lab", "--no-run", "--message-format=json"];
    let told = quietly(cargo(args).args(PACKAGES))?;
    let path = told.lines().rev().find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        let (path, _) = rest.split_once('"')?;
        path.contains("/deps/lab-").then(|| PathBuf::from(path))
    });
    path.context("cargo names no test binary of the lab")
}

/// A kernel of Debian's, unpacked below the target directory.
struct Kernel {
    release: String,
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    fn get(suite: &str) -> Result<Self> {
        let work = target().join("kernels").join(suite);
        let unpacked = work.join("unpacked");
        if !unpacked.is_dir() {
            let archive = Suite::open(suite, &work)?;
            let package = archive.dependency("linux-image-amd64", "linux-image-")?;
            println!("fetching {package}");
            let half = work.join("half");
            archive.unpack(&package, &half)?;
            if !half.join("boot").is_dir() {
                // From 2026 on the package is a name for two, and the image lies with the modules.
                for start in ["linux-binary-", "linux-modules-"] {
                    archive.unpack(&archive.dependency(&package, start)?, &half)?;
                }
            }
            fs::rename(&half, &unpacked).with_context(|| unpacked.display().to_string())?;
        }
        let folders = [unpacked.join("lib/modules"), unpacked.join("usr/lib/modules")];
        let folder = folders.iter().find(|folder| folder.is_dir()).context("no modules in the package")?;
        let modules = newest(folder, |_| true)?.context("no modules in the package")?;
        let release = modules.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let images = [unpacked.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let image = images.into_iter().find(|image| image.is_file()).context("no kernel image in the package")?;
        if !modules.join("modules.dep").is_file() {
            // depmod looks for lib/modules below its base, and a newer package has usr/lib/modules.
            if !unpacked.join("lib").exists() {
                symlink("usr/lib", unpacked.join("lib"))?;
            }
            quietly(Command::new("depmod").arg("-b").arg(&unpacked).arg(&release))?;
        }
        Ok(Self { release, image, modules })
    }

    /// Tries every claim in a machine of its own: what one leaves behind can't help another.
    fn try_all(&self, tools: &Path, lab: &Path) -> Result<Vec<bool>> {
        let link = Path::new("/lib/modules").join(&self.release);
        let _linked = Linked::new(&self.modules, &link)?;
        let mut held = Vec::new();
        for (claim, tests) in CLAIMS {
            let mut good = true;
            for test in tests {
                println!("-- {claim}: {test}");
                good &= self.boot(tools, lab, test)?;
            }
            held.push(good);
        }
        Ok(held)
    }

    /// Boots, runs one test, and ends. Whether it passed.
    fn boot(&self, tools: &Path, lab: &Path, test: &str) -> Result<bool> {
        let inside = format!(
            "cd {root} && mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null; mount -t bpf bpf /sys/fs/bpf 2>/dev/null; \
             mkdir -p /run/netns; uname -r; HEDDLE_LAB_PATIENCE=10 timeout {DEADLINE} {lab} --exact {test} --test-threads=1 --nocapture",
            root = root().join("tests").display(),
            lab = lab.display(),
        );
        let mut command = Command::new("timeout");
        command.args([DEADLINE]).arg(tools.join("bin/vng"));
        // Without a device of its own the script's output comes over the console, which --verbose shows.
        command.args(["--verbose", "--run"]).arg(&self.image).args([
            "--disable-kvm",
            "--force-9p",
            "--cpus",
            "2",
            "--memory",
            MEMORY,
        ]);
        command.arg("--user").arg("root").arg(format!("--rwdir={}", target().display()));
        command.arg("--overlay-rwdir=/run").args(["--", &inside]);
        // It starts programs beside it by their names.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", tools.join("bin").display())).current_dir(root());
        let (mut good, mut booted) = (false, false);
        follow(&mut command, |line| {
            good |= line.starts_with(GOOD);
            booted |= line.trim() == self.release;
        })?;
        ensure!(booted, "Linux {} did not start", self.release);
        Ok(good)
    }
}

/// A symbolic link that goes with this value.
struct Linked(PathBuf);

impl Linked {
    fn new(to: &Path, at: &Path) -> Result<Self> {
        if fs::symlink_metadata(at).is_ok_and(|there| there.is_symlink()) {
            fs::remove_file(at)?;
        }
        ensure!(!at.exists(), "{} is there: this machine has the kernel's modules itself", at.display());
        fs::create_dir_all("/lib/modules")?;
        symlink(to, at).with_context(|| at.display().to_string())?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Linked {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{CLAIMS, Row, table, tell};
    use crate::steps::Tally;

    #[test]
    fn a_kernel_that_did_not_run_is_no_pass() {
        let mut tally = Tally::default();
        let ran = Row {
            suite: "a",
            release: "6.1".into(),
            held: vec![true, true, false, true, true],
            seconds: 9,
            ..Row::default()
        };
        let absent = Row { suite: "b", why_not: "no network".into(), ..Row::default() };
        tell(&mut tally, &ran);
        tell(&mut tally, &absent);
        assert_eq!((tally.passed, tally.failed, tally.skipped.len()), (4, 1, 1));
        let text = table(&[ran, absent]);
        assert!(text.contains("| a | 6.1 | passes | passes | FAILS | passes | passes | 9 |"), "{text}");
        assert_eq!(text.matches("did not run").count(), CLAIMS.len());
    }
}
