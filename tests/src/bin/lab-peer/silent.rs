//! Clients of the tunnel's port that connect and say nothing, or one byte a second.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use heddle_lab::hostile::{Dripped, Silenced};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{interval, timeout_at},
};

use crate::{
    dial::{Dial, kind},
    one::{micros, quantile},
    tell,
};

/// Connections that are being opened at a time.
const AT_A_TIME: usize = 128;

/// Opens `count` connections, every other one dripping, and reports first that they are open and then when each was
/// closed. Those that still stand after `time` were not.
pub async fn silent(dial: &Dial, count: u64, time: Duration) -> anyhow::Result<()> {
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    let mut opening = JoinSet::new();
    for number in 0..count {
        let (dial, turns) = (dial.clone(), Arc::clone(&turns));
        opening.spawn(async move {
            let _turn = turns.acquire_owned().await;
            // Before the handshake: its end is seen here later than at the other side.
            let began = Instant::now();
            Ok::<_, io::Error>((number, dial.connect().await?, began))
        });
    }
    let mut report = Silenced::default();
    let end = Instant::now() + time;
    let mut waiting = JoinSet::new();
    while let Some(opened) = opening.join_next().await {
        match opened? {
            Ok((number, stream, at)) => {
                waiting.spawn(async move { outlast(stream, at, end, number % 2 == 1).await });
            }
            Err(error) => *report.refused.entry(kind(&error)).or_default() += 1,
        }
    }
    tell(&Dripped { open: waiting.len() as u64 })?;
    let mut times = Vec::new();
    while let Some(ended) = waiting.join_next().await {
        match ended? {
            Some((after, how)) => {
                times.push(micros(after) / 1_000);
                *report.endings.entry(how).or_default() += 1;
            }
            None => report.open += 1,
        }
    }
    times.sort_unstable();
    report.closed = times.len() as u64;
    report.at_once = times.iter().filter(|time| **time < 1_000).count() as u64;
    let later: Vec<_> = times.iter().copied().filter(|time| *time >= 1_000).collect();
    report.first_ms = later.first().copied().unwrap_or_default();
    report.p50_ms = quantile(&later, 0.5);
    report.last_ms = later.last().copied().unwrap_or_default();
    tell(&report)
}

/// When and how the other side ended the connection.
async fn outlast(mut stream: TcpStream, since: Instant, end: Instant, drips: bool) -> Option<(Duration, String)> {
    /// The beginning of a TLS handshake record: it says that 512 bytes follow.
    const RECORD: [u8; 5] = [0x16, 3, 1, 2, 0];
    let ended = async {
        let mut drops = interval(Duration::from_secs(1));
        let mut byte = [0];
        let mut sent = 0;
        loop {
            tokio::select! {
                read = stream.read(&mut byte) => match read {
                    Ok(0) => return "closed".to_owned(),
                    Ok(_) => {}
                    Err(error) => return kind(&error),
                },
                _ = drops.tick(), if drips => {
                    let next = RECORD.get(sent).copied().unwrap_or_default();
                    sent += 1;
                    if let Err(error) = stream.write_all(&[next]).await {
                        return kind(&error);
                    }
                }
            }
        }
    };
    timeout_at(end.into(), ended).await.ok().map(|how| (since.elapsed(), how))
}
