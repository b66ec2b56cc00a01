//! What an agent costs right now: memory, processor time, descriptors.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::agent::Agent;

/// One look at a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory (bytes).
    pub rss: u64,
    /// Processor time so far, user and system (resolution 10 ms).
    pub cpu: Duration,
    /// Open descriptors, and those of them that are sockets.
    pub files: usize,
    pub sockets: usize,
}

impl Usage {
    /// Of a running process.
    pub fn of(pid: u32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("stat without a name")?.1.split_whitespace().collect();
        // Fields 14 and 15 of proc(5), counted from the third; USER_HZ is 100 on every Linux.
        let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
        let cpu = Duration::from_millis(
            10 * ticks(14).zip(ticks(15)).map(|(user, system)| user + system).context("stat is short")?,
        );
        let (mut files, mut sockets) = (0, 0);
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            files += 1;
            // A descriptor that was closed in between is gone; it is counted as what it was, open.
            sockets +=
                usize::from(fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")));
        }
        Ok(Self { rss: rss(pid)?, cpu, files, sockets })
    }
}

fn rss(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(1_024 * line.trim().trim_end_matches(" kB").parse::<u64>()?)
}

/// Memory, looked at every 10 ms: the peak.
#[derive(Debug)]
pub struct Peak {
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    looking: Option<JoinHandle<()>>,
}

impl Peak {
    fn of(pid: u32) -> Self {
        let (most, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (shared, stopped) = (Arc::clone(&most), Arc::clone(&stop));
        let looking = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(now) = rss(pid) {
                    shared.fetch_max(now, Ordering::Relaxed);
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        Self { most, stop, looking: Some(looking) }
    }

    /// The most resident memory since it began (bytes).
    #[must_use]
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(looking) = self.looking.take() {
            // It only sleeps and reads; a panic of it would have been printed.
            let _ = looking.join();
        }
    }
}

impl Agent {
    /// What it costs right now.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.daemon.pid().context("the agent does not run")?)
    }

    /// Processor time of its threads so far, to the microsecond; without that of threads which have ended.
    pub fn busy(&self) -> Result<Duration> {
        let pid = self.daemon.pid().context("the agent does not run")?;
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // Documentation/scheduler/sched-stats.rst: time on the processor comes first.
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            nanoseconds += text.split_whitespace().next().and_then(|first| first.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// Watches its memory until the answer is dropped.
    pub fn peak(&self) -> Result<Peak> {
        Ok(Peak::of(self.daemon.pid().context("the agent does not run")?))
    }
}
