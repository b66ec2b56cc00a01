//! Connections that wait for their end, and tell when it came.

use std::{
    io,
    time::{Duration, SystemTime},
};

use heddle_lab::{hostile::Fates, reports::Held};
use tokio::{io::AsyncReadExt, net::TcpStream, task::JoinSet, time::timeout};

use crate::{
    dial::{Dial, kind},
    one::{micros, ping, quantile},
    tell,
};

/// Connections that are being opened at a time.
const AT_A_TIME: usize = 64;

/// Opens `count` connections, verifies each with a byte, says so, and then how and when each ended; those that still
/// stand after `time` did not.
pub async fn outlive(dial: &Dial, count: u64, time: Duration) -> anyhow::Result<()> {
    let mut held = Held::default();
    let (mut opening, mut streams) = (JoinSet::new(), Vec::new());
    let mut left = count;
    while left > 0 || !opening.is_empty() {
        while left > 0 && opening.len() < AT_A_TIME {
            let dial = dial.clone();
            opening.spawn(async move {
                let mut stream = dial.connect().await?;
                ping(&mut stream, dial.patience()).await?;
                Ok::<_, io::Error>(stream)
            });
            left -= 1;
        }
        match opening.join_next().await {
            Some(Ok(Ok(stream))) => streams.push(stream),
            Some(Ok(Err(error))) => {
                held.failed += 1;
                *held.errors.entry(kind(&error)).or_default() += 1;
            }
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
    held.alive = streams.len() as u64;
    let mut ending: JoinSet<_> = streams.into_iter().map(|stream| timeout(time, end_of(stream))).collect();
    tell(&held)?;
    let mut fates = Fates::default();
    let mut times = Vec::new();
    while let Some(ended) = ending.join_next().await {
        match ended? {
            Ok((how, at)) => {
                *fates.endings.entry(how).or_default() += 1;
                times.push(at);
            }
            Err(_) => fates.open += 1,
        }
    }
    times.sort_unstable();
    fates.first_us = quantile(&times, 0.0);
    fates.p50_us = quantile(&times, 0.5);
    fates.p99_us = quantile(&times, 0.99);
    fates.last_us = quantile(&times, 1.0);
    tell(&fates)
}

/// How the connection ended, and when (microseconds since the epoch, the clock that the test reads too).
async fn end_of(mut stream: TcpStream) -> (String, u64) {
    let mut byte = [0];
    let how = loop {
        match stream.read(&mut byte).await {
            Ok(0) => break "closed".to_owned(),
            Ok(_) => {}
            Err(error) => break kind(&error),
        }
    };
    (how, micros(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()))
}
