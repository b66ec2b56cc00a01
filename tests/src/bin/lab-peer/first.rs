//! A client that wants in: it tries again and again until one connection is carried, and says when that was.

use std::{thread::sleep, time::Duration};

use anyhow::bail;
use heddle_lab::{
    hostile::now,
    reports::{Arrived, Event},
};

use crate::{dial::Dial, storm::once, tell};

/// Between two tries that failed.
const PAUSE: Duration = Duration::from_millis(1);

/// Says that it is ready, and then when the first connection had its byte echoed.
pub fn run(dial: &Dial, time: Duration) -> anyhow::Result<()> {
    tell(&Event::Ready)?;
    let (start, mut tries) = (std::time::Instant::now(), 0);
    while start.elapsed() < time {
        tries += 1;
        if once(dial).is_ok() {
            return tell(&Arrived { at_us: now(), tries });
        }
        sleep(PAUSE);
    }
    bail!("no connection was carried in {tries} tries")
}
