//! Clients of many connections: those that come and go, and those that stay.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use heddle_lab::{
    hostile::Scanned,
    reports::{Churned, Held, Tallied},
};
use tokio::{
    net::TcpStream,
    sync::Mutex,
    task::{JoinSet, spawn_blocking},
};

use crate::{
    dial::{Dial, kind},
    one::{self, micros, ping, quantile},
    tell,
};

pub async fn churn(dial: &Dial, count: u64, concurrent: u64) -> Churned {
    let start = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let gathered = Arc::new(Mutex::new((Vec::new(), Churned::default())));
    let mut clients = JoinSet::new();
    for _ in 0..concurrent.clamp(1, count.max(1)) {
        let (dial, next, gathered) = (dial.clone(), Arc::clone(&next), Arc::clone(&gathered));
        clients.spawn(async move {
            while next.fetch_add(1, Ordering::Relaxed) < count {
                let asked = Instant::now();
                let met = async { ping(&mut dial.connect().await?, dial.patience()).await }.await;
                let took = micros(asked.elapsed());
                let mut gathered = gathered.lock().await;
                match met {
                    Ok(()) => {
                        gathered.0.push(took);
                        gathered.1.ok += 1;
                    }
                    Err(error) => {
                        gathered.1.failed += 1;
                        *gathered.1.errors.entry(kind(&error)).or_default() += 1;
                    }
                }
            }
        });
    }
    while let Some(joined) = clients.join_next().await {
        if let Err(error) = joined {
            gathered.lock().await.1.errors.insert(error.to_string(), 1);
        }
    }
    let (mut times, mut report) = std::mem::take(&mut *gathered.lock().await);
    times.sort_unstable();
    report.seconds = start.elapsed().as_secs_f64();
    report.p50_us = quantile(&times, 0.5);
    report.p99_us = quantile(&times, 0.99);
    report
}

/// Connections to `who` servers, `concurrent` at a time: who answered, and what each end saw of the other.
pub async fn tally(dial: &Dial, count: u64, concurrent: u64) -> anyhow::Result<Tallied> {
    let mut report = Tallied::default();
    let (mut asking, mut left) = (JoinSet::new(), 0..count);
    loop {
        while asking.len() < usize::try_from(concurrent)? {
            let Some(_) = left.next() else { break };
            let dial = dial.clone();
            asking.spawn(async move { one::connect(&dial, "", false, None, "").await });
        }
        let Some(asked) = asking.join_next().await else { return Ok(report) };
        let seen = asked?;
        let Ok(who) = seen.who() else {
            *report.errors.entry(seen.error.unwrap_or_else(|| "no answer".to_owned())).or_default() += 1;
            continue;
        };
        let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let local = seen.local.map(plain);
        report.strange_peer += u64::from(seen.peer.map(plain) != Some(dial.to));
        report.strange_client += u64::from(local.map(|local| local.ip()) != Some(plain(who.peer).ip()));
        if local == Some(plain(who.peer)) {
            *report.direct.entry(who.name.clone()).or_default() += 1;
        }
        *report.answers.entry(who.name).or_default() += 1;
    }
}

/// One connection with each of these marks, verified with an echoed byte.
pub async fn marks(dial: &Dial, marks: &[u32]) -> Scanned {
    let mut report = Scanned::default();
    for mark in marks {
        let dial = Dial { mark: Some(*mark), ..dial.clone() };
        let met = async { ping(&mut dial.connect().await?, dial.patience()).await }.await;
        *report.met.entry(met.map_or_else(|error| kind(&error), |()| "open".to_owned())).or_default() += 1;
    }
    report
}

/// Connections one after the other, all from one port: each verified with an echoed byte and reset, so that its tuple is
/// free at once.
pub async fn reuse(dial: &Dial, count: u64) -> Scanned {
    let mut report = Scanned::default();
    for _ in 0..count {
        let met = async {
            let mut stream = dial.connect().await?;
            ping(&mut stream, dial.patience()).await?;
            socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO))
        };
        *report.met.entry(met.await.map_or_else(|error| kind(&error), |()| "open".to_owned())).or_default() += 1;
    }
    report
}

pub async fn hold(dial: &Dial, count: u64) -> anyhow::Result<()> {
    /// Connections that are being opened at a time.
    const AT_A_TIME: usize = 64;
    let mut report = Held::default();
    let (mut opening, mut streams) = (JoinSet::new(), Vec::new());
    let mut left = count;
    while left > 0 || !opening.is_empty() {
        while left > 0 && opening.len() < AT_A_TIME {
            let dial = dial.clone();
            opening.spawn(async move { dial.connect().await });
            left -= 1;
        }
        match opening.join_next().await {
            Some(Ok(Ok(stream))) => streams.push(stream),
            Some(Ok(Err(error))) => fail(&mut report, &error),
            Some(Err(error)) => fail(&mut report, &io::Error::other(error)),
            None => {}
        }
    }
    check(dial, &mut streams, &mut report).await;
    tell(&report)?;
    loop {
        let mut line = String::new();
        let (count, line) =
            spawn_blocking(move || io::stdin().read_line(&mut line).map(|count| (count, line))).await??;
        if count == 0 {
            break;
        }
        if line.trim() == "check" {
            check(dial, &mut streams, &mut report).await;
            tell(&report)?;
        }
    }
    Ok(())
}

fn fail(report: &mut Held, error: &io::Error) {
    report.failed += 1;
    *report.errors.entry(kind(error)).or_default() += 1;
}

/// Pings every connection; those that don't answer are dropped and counted.
async fn check(dial: &Dial, streams: &mut Vec<TcpStream>, report: &mut Held) {
    let mut pings = JoinSet::new();
    for mut stream in streams.drain(..) {
        let patience = dial.patience();
        pings.spawn(async move { ping(&mut stream, patience).await.map(|()| stream) });
    }
    while let Some(joined) = pings.join_next().await {
        match joined.map_err(io::Error::other).flatten() {
            Ok(stream) => streams.push(stream),
            Err(error) => fail(report, &error),
        }
    }
    report.alive = streams.len() as u64;
}
