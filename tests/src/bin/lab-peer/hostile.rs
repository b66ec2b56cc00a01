//! The verbs of peers that misbehave, and of honest ones that live beside them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};

use crate::{
    ask,
    dial::Dial,
    flood::{self, Attack, Flood},
    forge, load, many, outlive, pace, scan, script, shakes, silent, stuff, tell,
};

/// Where a client with a good certificate goes, and what it asks for.
#[derive(Debug, Args)]
pub struct Aim {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    authority: String,
    #[arg(long)]
    cert: PathBuf,
    #[arg(long)]
    key: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// HTTP/2 abuse with a good certificate.
    Flood {
        #[command(flatten)]
        aim: Aim,
        #[arg(long)]
        attack: Attack,
        #[arg(long, default_value_t = 1)]
        connections: u64,
        #[arg(long, default_value_t = 64)]
        streams: u32,
        #[arg(long, default_value_t = 4)]
        seconds: u64,
    },
    /// One HBONE request, its header fields (`name=value`) exactly as given.
    Ask {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, requires = "key")]
        cert: Option<PathBuf>,
        #[arg(long)]
        key: Option<PathBuf>,
        #[arg(long)]
        field: Vec<String>,
        #[arg(long, default_value = "")]
        say: String,
        /// This text instead of HTTP/2.
        #[arg(long)]
        http1: Option<String>,
    },
    /// Connections that never end their handshake, every other one with a byte a second.
    Silent {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        seconds: u64,
    },
    /// A request and its echo at a steady pace.
    Pace {
        #[command(flatten)]
        dial: Dial,
        /// Requests a second; 0 for one after the other.
        #[arg(long)]
        rate: u64,
        #[arg(long)]
        seconds: u64,
        /// All on one connection.
        #[arg(long)]
        kept: bool,
        #[arg(long, default_value_t = 1)]
        bytes: usize,
        /// Seconds from connecting to the first request.
        #[arg(long, default_value_t = 0)]
        after: u64,
    },
    /// Connections that tell when they were ended.
    Outlive {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        seconds: u64,
    },
    /// Connections that are filled, or ask and don't read, and stay until the end of stdin.
    Stuff {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        ask: Option<String>,
    },
    /// The client's end of stories, to a `script` server.
    Script {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        first: u64,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        concurrent: u64,
    },
    /// Connects to many ports.
    Ports {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u16,
    },
    /// SYNs from addresses of a /24 that answer nothing.
    Syns {
        #[arg(long)]
        to: std::net::SocketAddrV4,
        #[arg(long)]
        sources: std::net::Ipv4Addr,
        #[arg(long)]
        rate: u64,
        #[arg(long)]
        seconds: u64,
    },
    /// Segments with another's address.
    Forge(forge::Forge),
    /// A connection with each of these marks.
    Marks {
        #[command(flatten)]
        dial: Dial,
        #[arg(long, value_delimiter = ',')]
        marks: Vec<u32>,
    },
    /// Connections from one port, one right after the other.
    Reuse {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
    },
    /// Connections that end badly.
    Aborts {
        #[command(flatten)]
        dial: Dial,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        concurrent: u64,
    },
    /// New mutual TLS connections at a steady pace, each with one request that is answered and ended.
    Shakes {
        #[command(flatten)]
        aim: Aim,
        #[arg(long)]
        rate: u64,
        #[arg(long)]
        seconds: u64,
    },
    /// Many identities, signed with the mesh's own root, each with one request.
    Many {
        #[arg(long)]
        to: Vec<SocketAddr>,
        /// Port of the app that is asked for.
        #[arg(long)]
        port: u16,
        #[arg(long)]
        cert: PathBuf,
        #[arg(long)]
        key: PathBuf,
        #[arg(long)]
        count: usize,
    },
}

pub async fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Flood { aim: Aim { to, authority, cert, key }, attack, connections, streams, seconds } => {
            let time = Duration::from_secs(seconds);
            tell(&flood::run(&Flood { to, authority, pair: (cert, key), attack, connections, streams, time }).await?)
        }
        Verb::Ask { to, cert, key, field, say, http1 } => {
            tell(&ask::ask(to, cert.zip(key).as_ref(), &field, &say, http1.as_deref()).await?)
        }
        Verb::Silent { dial, count, seconds } => silent::silent(&dial, count, Duration::from_secs(seconds)).await,
        Verb::Pace { dial, rate, seconds, kept, bytes, after } => {
            let after = Duration::from_secs(after);
            tell(&pace::pace(&dial, rate, Duration::from_secs(seconds), kept, bytes, after).await?)
        }
        Verb::Outlive { dial, count, seconds } => outlive::outlive(&dial, count, Duration::from_secs(seconds)).await,
        Verb::Stuff { dial, count, ask } => stuff::stuff(&dial, count, ask.as_deref()).await,
        Verb::Script { dial, first, count, concurrent } => tell(&script::run(&dial, first, count, concurrent).await?),
        Verb::Ports { dial, count } => tell(&scan::ports(&dial, count).await?),
        Verb::Syns { to, sources, rate, seconds } => {
            tell(&scan::syns(to, sources, rate, Duration::from_secs(seconds))?)
        }
        Verb::Forge(forge) => tell(&forge::run(&forge)?),
        Verb::Marks { dial, marks } => tell(&load::marks(&dial, &marks).await),
        Verb::Reuse { dial, count } => tell(&load::reuse(&dial, count).await),
        Verb::Aborts { dial, count, concurrent } => tell(&scan::aborts(&dial, count, concurrent).await?),
        Verb::Shakes { aim: Aim { to, authority, cert, key }, rate, seconds } => {
            tell(&shakes::run(to, &authority, &(cert, key), rate, Duration::from_secs(seconds)).await?)
        }
        Verb::Many { to, port, cert, key, count } => tell(&many::run(&to, port, &(cert, key), count).await?),
    }
}
