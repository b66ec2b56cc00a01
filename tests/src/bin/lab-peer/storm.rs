//! Short connections as fast as a few clients can make them, for a time: connect, one byte there and back, close.
//!
//! Threads that block, because that costs a client the least: what is measured is the way to the server, not the client.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use heddle_lab::reports::{Churned, Storm};

use crate::{
    dial::{Dial, kind},
    one::{micros, quantile},
};

/// What one client met.
#[derive(Default)]
struct Client {
    /// Connect to the byte's return (microseconds).
    times: Vec<u64>,
    churned: Churned,
}

/// `concurrent` clients that make one connection after the other until `time` has passed.
pub fn run(dial: &Dial, concurrent: usize, time: Duration) -> Storm {
    let per_second: Vec<AtomicU64> = (0..time.as_secs().max(1)).map(|_| AtomicU64::new(0)).collect();
    let start = Instant::now();
    let clients: Vec<Client> = thread::scope(|scope| {
        let handles: Vec<_> =
            (0..concurrent.max(1)).map(|_| scope.spawn(|| client(dial, start, time, &per_second))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or_default()).collect()
    });
    let mut whole = Churned { seconds: start.elapsed().as_secs_f64(), ..Churned::default() };
    let mut times = Vec::new();
    for client in clients {
        times.extend(client.times);
        whole.failed += client.churned.failed;
        for (kind, count) in client.churned.errors {
            *whole.errors.entry(kind).or_default() += count;
        }
    }
    times.sort_unstable();
    whole.ok = times.len() as u64;
    whole.p50_us = quantile(&times, 0.5);
    whole.p99_us = quantile(&times, 0.99);
    Storm { churned: whole, per_second: per_second.into_iter().map(AtomicU64::into_inner).collect() }
}

fn client(dial: &Dial, start: Instant, time: Duration, per_second: &[AtomicU64]) -> Client {
    let mut own = Client::default();
    while start.elapsed() < time {
        let asked = Instant::now();
        match once(dial) {
            Ok(()) => {
                own.times.push(micros(asked.elapsed()));
                let second = usize::try_from(start.elapsed().as_secs()).unwrap_or(usize::MAX);
                if let Some(count) = per_second.get(second) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(error) => {
                own.churned.failed += 1;
                *own.churned.errors.entry(kind(&error)).or_default() += 1;
            }
        }
    }
    own
}

/// One connection, one byte there and back.
pub fn once(dial: &Dial) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&dial.to, dial.patience())?;
    stream.set_read_timeout(Some(dial.patience()))?;
    stream.write_all(b"x")?;
    let mut byte = [0];
    match stream.read_exact(&mut byte) {
        // A blocking read that times out says so in this way.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        other => other,
    }
}
