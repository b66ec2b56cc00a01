//! The same story told by both ends of a connection, in any order of data, ends and resets: each end writes down what it
//! met, and whether a mesh lay between must not show.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use heddle_lab::{hostile::Scripted, reports::Event};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    dial::{Dial, kind},
    tell,
};

/// A wait of one end for the other.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Both send at the same time, and each reads all that the other sent (bytes).
    Exchange {
        client: usize,
        server: usize,
    },
    /// One byte there, then one back: afterwards both have read everything.
    PingPong(Side),
    /// One end closes its direction, the other sees that.
    Finish(Side),
    FinishBoth,
    /// One end resets.
    Reset(Side),
    /// One end closes with bytes unread, which resets too.
    CloseUnread(Side),
}

/// xorshift64*: the same seed tells both ends the same story.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn side(&mut self) -> Side {
        if self.below(2) == 0 { Side::Client } else { Side::Server }
    }

    /// Mostly a few bytes, sometimes more than any buffer on the way.
    fn bytes(&mut self) -> usize {
        let limit = [16, 1_500, 20_000, 120_000][usize::try_from(self.below(4)).unwrap_or_default()];
        usize::try_from(self.below(limit)).unwrap_or_default()
    }
}

/// The lower half of the seed tells which story; the upper half only marks it for whoever reads both ends' reports.
fn story(seed: u64) -> Vec<Step> {
    let mut dice = Dice(u64::from(seed as u32).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    dice.below(2);
    let (mut client_done, mut server_done) = (false, false);
    let mut steps = Vec::new();
    while !(client_done && server_done) {
        match dice.below(10) {
            0..=4 => steps.push(Step::Exchange {
                client: if client_done { 0 } else { dice.bytes() },
                server: if server_done { 0 } else { dice.bytes() },
            }),
            5..=6 => {
                let side = dice.side();
                let done = if side == Side::Client { &mut client_done } else { &mut server_done };
                if !std::mem::replace(done, true) {
                    steps.push(Step::Finish(side));
                }
            }
            7 if !client_done && !server_done => {
                steps.push(Step::FinishBoth);
                (client_done, server_done) = (true, true);
            }
            8 => {
                let side = dice.side();
                match (client_done, server_done) {
                    (false, false) => steps.push(Step::PingPong(side)),
                    // A byte from the end that still may, which it sends only when it has read the other's end.
                    (true, false) => steps.push(Step::Exchange { client: 0, server: 1 }),
                    _ => steps.push(Step::Exchange { client: 1, server: 0 }),
                }
                steps.push(Step::Reset(side));
                return steps;
            }
            9 if !client_done && !server_done => {
                let side = dice.side();
                steps.extend([Step::PingPong(side), Step::CloseUnread(side)]);
                return steps;
            }
            _ => {}
        }
    }
    steps
}

/// Tells one end's side of the story; what it met, step by step.
async fn play(mut stream: TcpStream, seed: u64, me: Side) -> String {
    let (mut met, mut sent, mut received) = (String::new(), 0, 0);
    let mut dice = Dice((seed << 1 | u64::from(me == Side::Client)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (mut mine_done, mut other_done) = (false, false);
    for step in story(seed) {
        // Ends that never keep step would meet the same interleaving again and again.
        if dice.below(4) == 0 {
            sleep(Duration::from_micros(dice.below(2_000))).await;
        }
        match step {
            Step::Exchange { client, server } => {
                let (out, incoming) = if me == Side::Client { (client, server) } else { (server, client) };
                let seen = exchange(&mut stream, seed, me, (&mut sent, out), (&mut received, incoming)).await;
                met.push_str(&seen);
            }
            Step::PingPong(first) => {
                let turns = if first == me { [(1, 0), (0, 1)] } else { [(0, 1), (1, 0)] };
                for (out, incoming) in turns {
                    met.push_str(&exchange(&mut stream, seed, me, (&mut sent, out), (&mut received, incoming)).await);
                }
            }
            Step::Finish(side) if side == me => {
                mine_done = true;
                met.push_str(if stream.shutdown().await.is_ok() { "fin " } else { "no-fin " });
            }
            Step::Finish(_) => {
                other_done = true;
                met.push_str(&end(&mut stream).await);
            }
            Step::FinishBoth => {
                (mine_done, other_done) = (true, true);
                met.push_str(if stream.shutdown().await.is_ok() { "fin " } else { "no-fin " });
                met.push_str(&end(&mut stream).await);
            }
            Step::Reset(side) if side == me => {
                if let Err(error) = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)) {
                    met.push_str(&kind(&error));
                }
                return met;
            }
            Step::Reset(_) if other_done => {
                // Its end was read before; that it is gone shows in what one sends.
                met.push_str(&refusal(&mut stream).await);
                return met;
            }
            Step::Reset(_) if mine_done => {
                // Bytes that were on their way may be lost with it, so what was read before is not the story's. A socket
                // tells of its reset once, perhaps in the step before.
                let last = end(&mut stream).await;
                return if met.contains("reset") { "reset ".to_owned() } else { last };
            }
            Step::Reset(_) => {
                met.push_str(&end(&mut stream).await);
                return met;
            }
            Step::CloseUnread(side) if side == me => {
                match timeout(PATIENCE, stream.peek(&mut [0])).await {
                    Ok(Ok(1..)) => met.push_str("unread "),
                    other => met.push_str(&format!("{other:?} ")),
                }
                return met;
            }
            Step::CloseUnread(_) => {
                met.push_str(if stream.write_all(b"unwanted").await.is_ok() { "wrote " } else { "no-write " });
                met.push_str(&end(&mut stream).await);
                return met;
            }
        }
    }
    met
}

/// The byte at this place of an end's bytes.
fn letter(seed: u64, side: Side, at: usize) -> u8 {
    let start = seed as u8 ^ if side == Side::Client { 0 } else { 0x5a };
    #[expect(clippy::cast_possible_truncation, reason = "a pattern of bytes")]
    start.wrapping_add((at % 251) as u8)
}

async fn exchange(
    stream: &mut TcpStream,
    seed: u64,
    me: Side,
    (sent, out): (&mut usize, usize),
    (received, incoming): (&mut usize, usize),
) -> String {
    let other = if me == Side::Client { Side::Server } else { Side::Client };
    let text: Vec<u8> = (*sent..*sent + out).map(|at| letter(seed, me, at)).collect();
    let mut got = vec![0; incoming];
    let (mut reader, mut writer) = stream.split();
    let both = async { tokio::try_join!(writer.write_all(&text), reader.read_exact(&mut got)) };
    let done = timeout(PATIENCE, both).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    if let Err(error) = done {
        return format!("{} ", kind(&error));
    }
    let right = got.iter().enumerate().all(|(at, byte)| *byte == letter(seed, other, *received + at));
    *sent += out;
    *received += incoming;
    if right { format!("{out}/{incoming} ") } else { "wrong ".to_owned() }
}

/// How the other end's direction ends.
async fn end(stream: &mut TcpStream) -> String {
    let mut buffer = [0; 4_096];
    loop {
        match timeout(PATIENCE, stream.read(&mut buffer)).await {
            Ok(Ok(0)) => return "end ".to_owned(),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return format!("{} ", kind(&error)),
            Err(_) => return "timeout ".to_owned(),
        }
    }
}

/// Sends until that fails.
async fn refusal(stream: &mut TcpStream) -> String {
    let trying = async {
        loop {
            if let Err(error) = stream.write_all(b"still there?").await {
                return format!("{} ", kind(&error));
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, trying).await.unwrap_or_else(|_| "still taken ".to_owned())
}

/// The server's end: the seed comes first.
pub async fn serve(mut stream: TcpStream) -> anyhow::Result<()> {
    let seed = timeout(PATIENCE, stream.read_u64()).await??;
    let met = play(stream, seed, Side::Server).await;
    tell(&Event::Told { seed, met })
}

/// The client's end of stories `first` to `first + count`, `concurrent` at a time.
pub async fn run(dial: &Dial, first: u64, count: u64, concurrent: u64) -> anyhow::Result<Scripted> {
    let next = Arc::new(AtomicU64::new(first));
    let mut clients = JoinSet::new();
    for _ in 0..concurrent {
        let (dial, next) = (dial.clone(), Arc::clone(&next));
        clients.spawn(async move {
            let mut met = BTreeMap::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + count {
                    return met;
                }
                let told = async {
                    let mut stream = dial.connect().await?;
                    stream.write_u64(seed).await?;
                    Ok::<_, io::Error>(play(stream, seed, Side::Client).await)
                };
                met.insert(seed, told.await.unwrap_or_else(|error| kind(&error)));
            }
        });
    }
    Ok(Scripted { met: clients.join_all().await.into_iter().flatten().collect() })
}
