//! Mutual TLS connections at a steady pace, each with one CONNECT: how new peers are let in.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use heddle_lab::reports::Churned;
use tokio::{
    task::JoinSet,
    time::{interval, timeout},
};

use crate::{
    dial::kind,
    many::request,
    one::{micros, quantile},
    tls,
};

const PATIENCE: Duration = Duration::from_secs(5);
/// Attempts under way at most: a hog that is made to wait goes on, with this many.
const AT_A_TIME: usize = 256;

pub async fn run(
    to: SocketAddr,
    authority: &str,
    pair: &(PathBuf, PathBuf),
    rate: u64,
    time: Duration,
) -> anyhow::Result<Churned> {
    let config = tls::client_from(Some(pair))?;
    let authority: Arc<str> = authority.into();
    let (start, mut report, mut times) = (Instant::now(), Churned::default(), Vec::new());
    let mut ticks = interval(Duration::from_secs(1) / u32::try_from(rate.max(1))?);
    let mut trying = JoinSet::new();
    loop {
        let going = start.elapsed() < time;
        if going {
            ticks.tick().await;
            let (config, authority) = (Arc::clone(&config), Arc::clone(&authority));
            trying.spawn(async move {
                let asked = Instant::now();
                let met = async {
                    let mut stream = tls::connect(&config, to).await?;
                    request(&mut stream, &[(":method", "CONNECT"), (":authority", &authority)]).await
                };
                match timeout(PATIENCE, met).await {
                    Ok(Ok(200)) => Ok(asked.elapsed()),
                    Ok(Ok(status)) => Err(io::Error::other(status.to_string())),
                    Ok(Err(error)) => Err(error),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                }
            });
        }
        while trying.len() > if going { AT_A_TIME } else { 0 } {
            let Some(met) = trying.join_next().await else { break };
            match met? {
                Ok(took) => {
                    report.ok += 1;
                    times.push(micros(took));
                }
                Err(error) => {
                    report.failed += 1;
                    *report.errors.entry(kind(&error)).or_default() += 1;
                }
            }
        }
        if !going {
            break;
        }
    }
    times.sort_unstable();
    report.seconds = start.elapsed().as_secs_f64();
    report.p50_us = quantile(&times, 0.5);
    report.p99_us = quantile(&times, 0.99);
    Ok(report)
}
