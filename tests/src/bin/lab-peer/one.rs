//! Clients of one connection: what was met on it, bytes both ways, how fast.

use std::{
    io,
    time::{Duration, Instant},
};

use heddle_lab::{
    reports::{Connected, Measured, Transferred},
    sys,
};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::dial::{Dial, kind};

pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// `sha256` as lower-case hex.
pub fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The value at this share (0 to 1) of the sorted values.
pub fn quantile(sorted: &[u64], share: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index"
    )]
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

pub async fn connect(
    dial: &Dial,
    say: &str,
    half_close: bool,
    expect: Option<usize>,
    say_after_end: &str,
) -> Connected {
    let start = Instant::now();
    let mut report = Connected::default();
    let met = async {
        let mut stream = dial.connect().await?;
        report.connected = true;
        report.connect_us = micros(start.elapsed());
        report.local = stream.local_addr().ok();
        report.peer = stream.peer_addr().ok();
        stream.write_all(say.as_bytes()).await?;
        if half_close {
            stream.shutdown().await?;
        }
        let mut received = Vec::new();
        let wanted = expect.unwrap_or(usize::MAX);
        let mut buffer = vec![0; 16 << 10];
        while received.len() < wanted {
            let count = timeout(dial.patience(), stream.read(&mut buffer))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            if count == 0 {
                break;
            }
            report.first_byte_us.get_or_insert_with(|| micros(start.elapsed()));
            received.extend_from_slice(&buffer[..count]);
            report.received = String::from_utf8_lossy(&received).into_owned();
        }
        report.mptcp = sys::is_mptcp(&stream);
        // With Fast Open these are known only now.
        report.local = stream.local_addr().ok().or(report.local);
        report.peer = stream.peer_addr().ok().or(report.peer);
        if expect.is_some_and(|wanted| received.len() < wanted) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        if !say_after_end.is_empty() {
            stream.write_all(say_after_end.as_bytes()).await?;
            stream.shutdown().await?;
        }
        Ok::<_, io::Error>(())
    }
    .await;
    if let Err(error) = met {
        report.error = Some(kind(&error));
    }
    report.total_us = micros(start.elapsed());
    if !report.connected {
        report.connect_us = report.total_us;
    }
    report
}

pub async fn transfer(dial: &Dial, bytes: u64) -> Transferred {
    let start = Instant::now();
    let mut report = Transferred::default();
    let met = async {
        let stream = dial.connect().await?;
        let (mut reader, mut writer) = stream.into_split();
        let sending = async {
            let (mut digest, mut left, mut seed) = (Sha256::new(), bytes, 0x9e37_79b9_7f4a_7c15_u64);
            let mut buffer = vec![0_u8; 64 << 10];
            while left > 0 {
                // xorshift: bytes that neither repeat nor compress.
                for chunk in buffer.chunks_exact_mut(8) {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    chunk.copy_from_slice(&seed.to_le_bytes());
                }
                let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                digest.update(&buffer[..count]);
                writer.write_all(&buffer[..count]).await?;
                left -= count as u64;
            }
            writer.shutdown().await?;
            Ok::<_, io::Error>(hex(digest))
        };
        let receiving = async {
            let (mut digest, mut total) = (Sha256::new(), 0_u64);
            let mut buffer = vec![0_u8; 64 << 10];
            loop {
                let count = timeout(dial.patience(), reader.read(&mut buffer))
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                if count == 0 {
                    return Ok::<_, io::Error>((hex(digest), total));
                }
                digest.update(&buffer[..count]);
                total += count as u64;
            }
        };
        let (sent_sha256, (received_sha256, received)) = tokio::try_join!(sending, receiving)?;
        report.sent = bytes;
        report.received = received;
        report.sent_sha256 = sent_sha256;
        report.received_sha256 = received_sha256;
        Ok::<_, io::Error>(())
    }
    .await;
    report.error = met.err().map(|error| kind(&error));
    report.seconds = start.elapsed().as_secs_f64();
    report
}

/// One byte there and back.
pub async fn ping(stream: &mut TcpStream, patience: Duration) -> io::Result<()> {
    stream.write_all(b"x").await?;
    let mut byte = [0];
    timeout(patience, stream.read_exact(&mut byte)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    if byte == *b"x" { Ok(()) } else { Err(io::Error::other("wrong byte echoed")) }
}

pub async fn latency(dial: &Dial, count: u64) -> Measured {
    let mut times = Vec::new();
    let start = Instant::now();
    let met = async {
        let mut stream = dial.connect().await?;
        for _ in 0..count {
            let asked = Instant::now();
            ping(&mut stream, dial.patience()).await?;
            times.push(micros(asked.elapsed()));
        }
        Ok::<_, io::Error>(())
    }
    .await;
    times.sort_unstable();
    Measured {
        count: times.len() as u64,
        seconds: start.elapsed().as_secs_f64(),
        p50_us: quantile(&times, 0.5),
        p99_us: quantile(&times, 0.99),
        error: met.err().map(|error| kind(&error)),
    }
}

pub async fn throughput(dial: &Dial, time: Duration) -> Measured {
    let (mut count, start) = (0, Instant::now());
    let met = async {
        let mut stream = dial.connect().await?;
        let buffer = vec![b'h'; 256 << 10];
        while start.elapsed() < time {
            timeout(dial.patience(), stream.write_all(&buffer))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            count += buffer.len() as u64;
        }
        stream.shutdown().await?;
        // The sink closes when it has everything: only then do the bytes count.
        timeout(dial.patience(), stream.read(&mut [0]))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok::<_, io::Error>(())
    }
    .await;
    Measured {
        count,
        seconds: start.elapsed().as_secs_f64(),
        error: met.err().map(|error| kind(&error)),
        ..Measured::default()
    }
}
