//! An honest client at a steady pace: what its neighbours do to it shows in its times.

use std::{
    io,
    time::{Duration, Instant},
};

use heddle_lab::reports::Churned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{interval, sleep, timeout},
};

use crate::{
    dial::{Dial, kind},
    one::{micros, quantile},
};

/// A request and its echo of `bytes` bytes, `rate` times a second for `time`: each on a connection of its own, or all on
/// one that is kept, which is opened `after` before it is used. Without a rate a kept or new connection after the other, as fast as they go.
pub async fn pace(
    dial: &Dial,
    rate: u64,
    time: Duration,
    kept: bool,
    bytes: usize,
    after: Duration,
) -> anyhow::Result<Churned> {
    let mut stream = if kept { Some(dial.connect().await?) } else { None };
    sleep(after).await;
    let start = Instant::now();
    let mut report = Churned::default();
    let mut times = Vec::new();
    let mut note = |met: io::Result<Duration>| match met {
        Ok(took) => {
            report.ok += 1;
            times.push(micros(took));
        }
        Err(error) => {
            report.failed += 1;
            *report.errors.entry(kind(&error)).or_default() += 1;
        }
    };
    let mut ticks = (rate > 0).then(|| interval(Duration::from_secs(1) / u32::try_from(rate).unwrap_or(u32::MAX)));
    let mut asking = JoinSet::new();
    while start.elapsed() < time {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        let asked = Instant::now();
        match &mut stream {
            Some(stream) => {
                let met = echo(stream, bytes, dial.patience()).await;
                let broken = met.is_err();
                note(met.map(|()| asked.elapsed()));
                if broken {
                    break;
                }
            }
            None => {
                let dial = dial.clone();
                let ask = async move {
                    echo(&mut dial.connect().await?, bytes, dial.patience()).await.map(|()| asked.elapsed())
                };
                if ticks.is_some() {
                    asking.spawn(ask);
                    while let Some(met) = asking.try_join_next() {
                        note(met?);
                    }
                } else {
                    note(ask.await);
                }
            }
        }
    }
    while let Some(met) = asking.join_next().await {
        note(met?);
    }
    times.sort_unstable();
    report.seconds = start.elapsed().as_secs_f64();
    report.p50_us = quantile(&times, 0.5);
    report.p99_us = quantile(&times, 0.99);
    Ok(report)
}

async fn echo(stream: &mut TcpStream, bytes: usize, patience: Duration) -> io::Result<()> {
    let asked = vec![b'x'; bytes];
    let mut answer = vec![0; bytes];
    let exchange = async {
        stream.write_all(&asked).await?;
        stream.read_exact(&mut answer).await
    };
    timeout(patience, exchange).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if answer == asked { Ok(()) } else { Err(io::Error::other("another answer than the echo")) }
}
