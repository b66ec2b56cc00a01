//! Requests at a fixed rate, whatever the answers do (open loop): latency counts from when a request was due, so that a
//! stall is paid by every request that it delayed.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use heddle_lab::reports::Measured;

use crate::{
    dial::{Dial, kind},
    one::{micros, quantile},
};

/// What is asked for.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Pace {
    /// Requests per second, over all connections.
    #[arg(long)]
    rate: u32,
    #[arg(long)]
    connections: u32,
    /// Request and echoed answer (bytes).
    #[arg(long)]
    size: usize,
    #[arg(long)]
    seconds: u64,
}

/// Runs to the end; an error of any connection is reported beside what the others measured.
pub fn run(dial: &Dial, pace: Pace) -> Result<Measured> {
    let connections = pace.connections.max(1);
    let streams: Vec<TcpStream> = (0..connections).map(|_| open(dial)).collect::<io::Result<_>>()?;
    let interval = Duration::from_secs(1) / pace.rate.max(1);
    let each = u32::try_from(pace.seconds * u64::from(pace.rate) / u64::from(connections)).context("too long")?;
    // Everybody is set up before the first request is due.
    let start = Instant::now() + Duration::from_millis(50);
    let done: Vec<(Vec<u64>, Option<io::Error>)> = thread::scope(|scope| {
        let readers: Vec<_> = (0_u32..)
            .zip(&streams)
            .map(|(number, stream)| {
                let due = move |turn: u32| start + interval * (turn * connections + number);
                scope.spawn(move || write(stream, pace.size, each, due));
                scope.spawn(move || read(stream, pace.size, each, due))
            })
            .collect();
        readers.into_iter().map(|reader| reader.join().unwrap_or_default()).collect()
    });
    let mut times: Vec<u64> = done.iter().flat_map(|(times, _)| times).copied().collect();
    times.sort_unstable();
    Ok(Measured {
        count: times.len() as u64,
        seconds: start.elapsed().as_secs_f64(),
        p50_us: quantile(&times, 0.5),
        p99_us: quantile(&times, 0.99),
        error: done.iter().find_map(|(_, error)| error.as_ref()).map(kind),
    })
}

fn open(dial: &Dial) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&dial.to, dial.patience())?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(dial.patience()))?;
    stream.set_write_timeout(Some(dial.patience()))?;
    Ok(stream)
}

/// Sends each request when it is due. Its error shows at the reader, whose answers stop.
fn write(mut stream: &TcpStream, size: usize, count: u32, due: impl Fn(u32) -> Instant) {
    // A sleeping thread is woken up to 50 µs late otherwise, which would be half of what is measured.
    let _where_refused_the_usual_slack = nix::sys::prctl::set_timerslack(1);
    let request = vec![b'h'; size];
    for turn in 0..count {
        thread::sleep(due(turn).saturating_duration_since(Instant::now()));
        if stream.write_all(&request).is_err() {
            return;
        }
    }
}

fn read(
    mut stream: &TcpStream,
    size: usize,
    count: u32,
    due: impl Fn(u32) -> Instant,
) -> (Vec<u64>, Option<io::Error>) {
    let (mut times, mut answer) = (Vec::new(), vec![0; size]);
    for turn in 0..count {
        if let Err(error) = stream.read_exact(&mut answer) {
            return (times, Some(error));
        }
        times.push(micros(due(turn).elapsed()));
    }
    (times, None)
}
