//! Waiting for something that another process does, always with a deadline and a name.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How many times longer everything may take: on a machine that emulates its processors.
const PATIENCE: &str = "HEDDLE_LAB_PATIENCE";

/// Asks `look` every few milliseconds until it gives something; fails with `what` after `deadline`.
pub fn until<T>(deadline: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let patience = std::env::var(PATIENCE).ok().and_then(|times| times.parse::<u32>().ok()).unwrap_or(1);
    let end = Instant::now() + deadline * patience;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(seen) = look() {
            return Ok(seen);
        }
        if Instant::now() >= end {
            bail!("not within {deadline:?}: {what}");
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
