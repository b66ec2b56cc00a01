//! The machine: what it is, who uses its CPU, and waiting until nobody else does.

use std::{
    collections::HashMap,
    fs,
    process::{self, Command},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{time::ClockId, unistd::Pid};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Foreign CPU use below which the machine is quiet (cores).
pub const QUIET: f64 = 0.06;
/// How long it is looked at for that.
const WINDOW: Duration = Duration::from_millis(500);
/// USER_HZ of every Linux architecture that Rust's standard library runs on: the unit of /proc/PID/stat.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds since boot.
#[derive(Debug, Clone)]
pub struct Clock {
    at: Instant,
    /// Of processes that are not the bench's, by pid and start time.
    foreign: HashMap<(u32, u64), f64>,
    /// Taken by other guests of the host.
    stolen: f64,
    /// Of everything on this machine.
    busy: f64,
}

impl Clock {
    /// `prefix`: that of the lab, whose processes are the bench's own.
    pub fn read(prefix: &str) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
        let line = stat.lines().next().context("/proc/stat is empty")?;
        let fields: Vec<f64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal
        let of = |index: usize| fields.get(index).copied().unwrap_or(0.0) / TICKS_PER_SECOND;
        let busy = [0, 1, 2, 5, 6].into_iter().map(of).sum();
        Ok(Self { at: Instant::now(), foreign: foreign(prefix), stolen: of(7), busy })
    }

    /// Cores that others used since `earlier`, on average. What started and ended in between is not seen.
    pub fn foreign_since(&self, earlier: &Self) -> f64 {
        let used: f64 = self
            .foreign
            .iter()
            .map(|(process, now)| (now - earlier.foreign.get(process).copied().unwrap_or(0.0)).max(0.0))
            .sum();
        (used + self.stolen - earlier.stolen) / self.seconds_since(earlier).max(0.001)
    }

    /// CPU seconds of the whole machine since `earlier`, interrupts included.
    pub fn busy_since(&self, earlier: &Self) -> f64 {
        self.busy - earlier.busy
    }

    fn seconds_since(&self, earlier: &Self) -> f64 {
        self.at.duration_since(earlier.at).as_secs_f64()
    }

    pub fn was_quiet_since(&self, earlier: &Self) -> bool {
        self.foreign_since(earlier) < QUIET
    }
}

/// Waits until the machine is quiet, but no longer than there is patience for the whole run.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
}

impl Patience {
    pub fn new(whole: Duration) -> Self {
        Self { left: whole }
    }

    /// Whether it became quiet.
    pub fn wait_quiet(&mut self, prefix: &str) -> Result<bool> {
        let (start, mut told) = (Instant::now(), false);
        loop {
            let before = Clock::read(prefix)?;
            sleep(WINDOW);
            let now = Clock::read(prefix)?;
            if now.was_quiet_since(&before) {
                self.left = self.left.saturating_sub(start.elapsed().saturating_sub(WINDOW));
                return Ok(true);
            }
            if start.elapsed() > self.left {
                self.left = Duration::ZERO;
                return Ok(false);
            }
            if !told {
                println!("    waiting: others use {:.2} cores", now.foreign_since(&before));
                told = true;
            }
        }
    }
}

/// CPU seconds of every process that is neither the kernel's, nor the lab's, nor this one or its parent.
fn foreign(prefix: &str) -> HashMap<(u32, u64), f64> {
    /// Parent of the kernel's threads, which do our packets' work too.
    const KTHREADD: u32 = 2;
    let own = [process::id(), std::os::unix::process::parent_id(), KTHREADD];
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let stat = Stat::read(pid)?;
            if own.contains(&pid) || stat.parent == KTHREADD {
                return None;
            }
            let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
            (!cgroups.contains(&format!("/{prefix}"))).then_some(((pid, stat.started), stat.cpu))
        })
        .collect()
}

/// Some fields of `/proc/PID/stat`.
struct Stat {
    parent: u32,
    /// User and system time (seconds).
    cpu: f64,
    /// Clock ticks since boot: a pid alone is given again.
    started: u64,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        // proc(5) counts from 1, and two fields are gone.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let ticks = u32::try_from(field(14)? + field(15)?).ok()?;
        Some(Self {
            parent: u32::try_from(field(4)?).ok()?,
            cpu: f64::from(ticks) / TICKS_PER_SECOND,
            started: field(22)?,
        })
    }
}

/// User and system time of a process (seconds), by its own clock: `/proc` counts in hundredths of a second, as much as an agent
/// that carries nothing uses in one measurement.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(i32::try_from(pid)?));
    let used = clock.and_then(ClockId::now).with_context(|| format!("process {pid} is gone"))?;
    Ok(Duration::from(used).as_secs_f64())
}

/// Resident memory of a process, all of it and the anonymous part (MiB).
pub fn memory(pid: u32) -> Result<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let field = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        let kib: f64 = line.split_whitespace().next().context("no value")?.parse()?;
        Ok(kib / 1_024.0)
    };
    Ok((field("VmRSS:")?, field("RssAnon:")?))
}

/// What figures depend on.
pub fn describe(congestion_control: &str, mtu: &str) -> Result<Value> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(": "));
    let memory = read("/proc/meminfo");
    let memory = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(json!({
        "date": OffsetDateTime::now_utc().replace_nanosecond(0)?.format(&Rfc3339)?,
        "commit": first_line("git".as_ref(), &["describe", "--always", "--dirty"]),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpu": model.map_or("unknown", |(_, name)| name),
        "cores": std::thread::available_parallelism()?.get(),
        "memory_mib": memory.map(|kib| kib >> 10),
        "congestion_control": congestion_control,
        "mtu": mtu,
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "versions": {
            "heddle": first_line(heddle_lab::binaries::heddle()?.as_os_str(), &["--version"]),
            "iperf3": first_line("iperf3".as_ref(), &["--version"]),
            "wrk": first_line("wrk".as_ref(), &["--version"]),
            "nginx": first_line("nginx".as_ref(), &["-v"]),
        },
    }))
}

/// The first line that a program prints, on either output: wrk prints its version and fails.
fn first_line(program: &std::ffi::OsStr, args: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(args).output() else { return "unknown".to_owned() };
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).lines().next().unwrap_or("unknown").trim().to_owned()
}
