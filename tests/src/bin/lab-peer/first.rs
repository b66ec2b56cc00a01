//! A client that wants in: it tries again and again until one connection is carried, and says when that was.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::bail;
use heddle_lab::{
    hostile::now,
    reports::{Arrived, Event},
};

use crate::{dial::Dial, one::micros, storm::once, tell};

/// Between two tries that failed.
const PAUSE: Duration = Duration::from_millis(1);

/// Says that it is ready, and then when the first connection had its byte echoed.
pub fn run(dial: &Dial, time: Duration) -> anyhow::Result<()> {
    tell(&Event::Ready)?;
    let (start, mut tries, mut longest) = (Instant::now(), 0, (0, 0));
    while start.elapsed() < time {
        tries += 1;
        let began = Instant::now();
        let done = once(dial);
        let took = micros(began.elapsed());
        if took > longest.1 {
            longest = (tries, took);
        }
        if done.is_ok() {
            return tell(&Arrived { at_us: now(), tries, longest });
        }
        sleep(PAUSE);
    }
    bail!("no connection was carried in {tries} tries")
}
