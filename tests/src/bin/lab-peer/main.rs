//! The workload of the lab's pods: servers with known answers, clients that report what they met as one JSON line, and
//! adversaries: HBONE with any certificate, and every way to abuse a port, a handshake or a stream.

mod ask;
mod dial;
mod first;
mod flood;
mod forge;
mod frames;
mod hbone;
mod hostile;
mod load;
mod many;
mod one;
mod outlive;
mod pace;
mod paced;
mod packet;
mod pause;
mod scan;
mod script;
mod serve;
mod shakes;
mod silent;
mod storm;
mod stuff;
mod tls;
mod udp;

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use tokio::task::spawn_blocking;

use crate::dial::Dial;

#[derive(Debug, Parser)]
#[command(about = "Workload of the heddle lab")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serve until killed: `kind[+flag…]:port`, kinds echo, reply, banner, who, digest, farewell, sink, source, http,
    /// deaf, script; flags mptcp, fastopen, v4, v6.
    Serve {
        #[arg(long, default_value = "lab-peer")]
        name: String,
        servers: Vec<serve::Spec>,
    },
    /// One connection: say something, read to the end (or `--expect` bytes).
    Connect {
        #[command(flatten)]
        dial: Dial,
        #[arg(long, default_value = "")]
        say: String,
        /// Closes the sending direction after `--say`.
        #[arg(long)]
        half_close: bool,
        /// Bytes to read; to the end where absent.
        #[arg(long)]
        expect: Option<usize>,
        /// After the end of the server's direction, say this.
        #[arg(long, default_value = "")]
        say_after_end: String,
    },
    /// Many short connections, each verified with one echoed byte.
    Churn {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
        #[arg(long, default_value_t = 1)]
        concurrent: u64,
    },
    /// Connections to a `who` server: which one answered, and over which way.
    Tally {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
        #[arg(long, default_value_t = 1)]
        concurrent: u64,
    },
    /// Connections that stay open; `check` on stdin echoes a byte on each, the end of stdin closes them.
    Hold {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
    },
    /// Bytes to an echo server and back at the same time.
    Transfer {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        bytes: u64,
    },
    /// One byte there and back on one connection.
    Latency {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
    },
    /// Bytes to a sink for a while.
    Throughput {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        seconds: u64,
    },
    /// Datagrams to a UDP echo server, each answered before the next.
    Udp {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        count: u64,
        /// Connects the socket first.
        #[arg(long)]
        connected: bool,
    },
    /// Answer datagrams until killed.
    UdpEcho {
        #[arg(long)]
        port: u16,
    },
    /// Short connections for a time, by clients that cost little: connect, one byte there and back, close.
    Storm {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        concurrent: usize,
        #[arg(long)]
        seconds: u64,
    },
    /// Tries again and again until one connection is carried: says when that was.
    First {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        seconds: u64,
    },
    /// Requests at a fixed rate on some connections; latency counts from when each was due.
    Paced {
        #[command(flatten)]
        dial: Dial,
        #[command(flatten)]
        pace: paced::Pace,
    },
    /// HBONE by hand, as a client.
    Hbone {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        authority: String,
        /// Certificate chain and key; without them no certificate is presented.
        #[arg(long, requires = "key")]
        cert: Option<std::path::PathBuf>,
        #[arg(long)]
        key: Option<std::path::PathBuf>,
        #[arg(long, default_value = "")]
        say: String,
    },
    /// HBONE by hand, as a server that echoes.
    HboneServer {
        #[arg(long)]
        port: u16,
        #[arg(long)]
        cert: std::path::PathBuf,
        #[arg(long)]
        key: std::path::PathBuf,
    },
    /// Do nothing until told to end: what holds a pod's namespaces.
    Pause,
    /// Drop `linux.resources` of an OCI bundle's configuration.
    WithoutResources { config: std::path::PathBuf },
    #[command(flatten)]
    Hostile(hostile::Verb),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(run(cli.verb)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Serve { name, servers } => serve::run(name, servers).await,
        Verb::Connect { dial, say, half_close, expect, say_after_end } => {
            tell(&one::connect(&dial, &say, half_close, expect, &say_after_end).await)
        }
        Verb::Churn { dial, count, concurrent } => tell(&load::churn(&dial, count, concurrent).await),
        Verb::Tally { dial, count, concurrent } => tell(&load::tally(&dial, count, concurrent).await?),
        Verb::Hold { dial, count } => load::hold(&dial, count).await,
        Verb::Transfer { dial, bytes } => tell(&one::transfer(&dial, bytes).await),
        Verb::Latency { dial, count } => tell(&one::latency(&dial, count).await),
        Verb::Throughput { dial, seconds } => tell(&one::throughput(&dial, Duration::from_secs(seconds)).await),
        Verb::Udp { to, count, connected } => tell(&udp::send(to, count, connected).await),
        Verb::UdpEcho { port } => udp::echo(port).await,
        // Threads that block: not for the runtime's own.
        Verb::Storm { dial, concurrent, seconds } => {
            let time = Duration::from_secs(seconds);
            tell(&spawn_blocking(move || storm::run(&dial, concurrent, time)).await?)
        }
        Verb::First { dial, seconds } => {
            spawn_blocking(move || first::run(&dial, Duration::from_secs(seconds))).await?
        }
        Verb::Paced { dial, pace } => tell(&spawn_blocking(move || paced::run(&dial, pace)).await??),
        Verb::Hbone { to, authority, cert, key, say } => {
            tell(&hbone::client(to, &authority, cert.zip(key), &say).await)
        }
        Verb::HboneServer { port, cert, key } => hbone::server(port, &cert, &key).await,
        Verb::Pause => pause::run().await,
        Verb::WithoutResources { config } => pause::without_resources(&config),
        Verb::Hostile(verb) => hostile::run(verb).await,
    }
}

/// One JSON line on stdout.
pub fn tell(report: &impl serde::Serialize) -> anyhow::Result<()> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, report)?;
    writeln!(stdout)?;
    Ok(stdout.flush()?)
}
