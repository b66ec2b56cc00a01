//! Servers with known answers.

use std::{io, net::SocketAddr, str::FromStr, sync::Arc};

use anyhow::{Context, Result, bail};
use heddle_lab::{
    reports::{Event, Who},
    sys,
};
use sha2::{Digest, Sha256};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::{one::hex, script, tell};

/// What one port answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// What comes goes back.
    Echo,
    /// As echo, with a small buffer: for many connections with little on each.
    Reply,
    /// Speaks first, then echoes.
    Banner,
    /// Tells the addresses that it sees, as JSON, and closes.
    Who,
    /// Reads to the end, then answers with the SHA-256.
    Digest,
    /// Says `bye`, closes its own direction, and reads on to the end.
    Farewell,
    /// Reads to the end and closes.
    Sink,
    /// Reads a number and sends so many bytes.
    Source,
    /// Answers every HTTP/1.1 request with its name.
    Http,
    /// Accepts and never reads.
    Deaf,
    /// Plays the server's end of a story.
    Script,
}

/// `kind[+flag…]:port`.
#[derive(Debug, Clone)]
pub struct Spec {
    kind: Kind,
    port: u16,
    mptcp: bool,
    fastopen: bool,
    v4: bool,
    v6_only: bool,
}

impl FromStr for Spec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (what, port) = text.split_once(':').context("kind[+flag…]:port")?;
        let mut words = what.split('+');
        let kind = match words.next() {
            Some("echo") => Kind::Echo,
            Some("reply") => Kind::Reply,
            Some("banner") => Kind::Banner,
            Some("who") => Kind::Who,
            Some("digest") => Kind::Digest,
            Some("farewell") => Kind::Farewell,
            Some("sink") => Kind::Sink,
            Some("source") => Kind::Source,
            Some("http") => Kind::Http,
            Some("deaf") => Kind::Deaf,
            Some("script") => Kind::Script,
            other => bail!("no server of kind {other:?}"),
        };
        let mut spec = Self { kind, port: port.parse()?, mptcp: false, fastopen: false, v4: false, v6_only: false };
        for flag in words {
            match flag {
                "mptcp" => spec.mptcp = true,
                "fastopen" => spec.fastopen = true,
                "v4" => spec.v4 = true,
                "v6" => spec.v6_only = true,
                other => bail!("no flag {other}"),
            }
        }
        Ok(spec)
    }
}

impl Spec {
    fn listen(&self) -> io::Result<TcpListener> {
        const BACKLOG: i32 = 4_096;
        let protocol = if self.mptcp { Protocol::MPTCP } else { Protocol::TCP };
        let domain = if self.v4 { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM, Some(protocol))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        let any: SocketAddr = if self.v4 {
            ([0, 0, 0, 0], self.port).into()
        } else {
            socket.set_only_v6(self.v6_only)?;
            ([0_u16; 8], self.port).into()
        };
        socket.bind(&any.into())?;
        if self.fastopen {
            sys::set_fastopen_listen(&socket, 256)?;
        }
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    }
}

pub async fn run(name: String, specs: Vec<Spec>) -> Result<()> {
    let name: Arc<str> = name.into();
    let mut servers = JoinSet::new();
    for spec in specs {
        let listener = spec.listen().with_context(|| format!("listening on {}", spec.port))?;
        let name = Arc::clone(&name);
        servers.spawn(async move {
            loop {
                let (stream, peer) = listener.accept().await?;
                let name = Arc::clone(&name);
                tokio::spawn(async move {
                    // What a client does to its connection is the client's to report.
                    let _ = answer(spec.kind, stream, peer, &name).await;
                });
            }
            #[expect(unreachable_code, reason = "gives the task its type")]
            Ok::<(), io::Error>(())
        });
    }
    tell(&Event::Ready)?;
    while let Some(ended) = servers.join_next().await {
        ended??;
    }
    Ok(())
}

async fn answer(kind: Kind, mut stream: TcpStream, peer: SocketAddr, name: &str) -> Result<()> {
    // MPTCP sockets of old kernels don't know the option; the lab's messages are single writes anyway.
    let _ = stream.set_nodelay(true);
    match kind {
        Kind::Echo => echo(&mut stream).await,
        Kind::Reply => {
            let mut buffer = [0; 512];
            loop {
                let count = stream.read(&mut buffer).await?;
                if count == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..count]).await?;
            }
        }
        Kind::Banner => {
            stream.write_all(format!("220 {name} ready\r\n").as_bytes()).await?;
            echo(&mut stream).await
        }
        Kind::Who => {
            let who = Who { name: name.to_owned(), peer, local: stream.local_addr()? };
            stream.write_all(format!("{}\n", serde_json::to_string(&who)?).as_bytes()).await?;
            stream.shutdown().await?;
            drain(&mut stream).await.map(drop)
        }
        Kind::Digest => {
            let (mut digest, mut buffer) = (Sha256::new(), vec![0; 64 << 10]);
            loop {
                let count = stream.read(&mut buffer).await?;
                if count == 0 {
                    break;
                }
                digest.update(&buffer[..count]);
            }
            stream.write_all(hex(digest).as_bytes()).await?;
            Ok(stream.shutdown().await?)
        }
        Kind::Farewell => {
            stream.write_all(b"bye\n").await?;
            stream.shutdown().await?;
            let mut text = Vec::new();
            (&mut stream).take(4_096).read_to_end(&mut text).await?;
            let received = text.len() as u64 + drain(&mut stream).await?;
            tell(&Event::Farewell { received, text: String::from_utf8_lossy(&text).into_owned() })
        }
        Kind::Sink => {
            let bytes = drain(&mut stream).await?;
            tell(&Event::Sunk { bytes, peer })
        }
        Kind::Source => {
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).await?;
            let (mut left, buffer) = (line.trim().parse::<usize>()?, vec![b'h'; 64 << 10]);
            while left > 0 {
                let count = left.min(buffer.len());
                stream.write_all(&buffer[..count]).await?;
                left -= count;
            }
            Ok(stream.shutdown().await?)
        }
        Kind::Http => http(stream, name).await,
        Kind::Deaf => {
            // Until the other side resets it, or the server ends.
            stream.ready(tokio::io::Interest::ERROR).await?;
            Ok(())
        }
        Kind::Script => script::serve(stream).await,
    }
}

async fn echo(stream: &mut TcpStream) -> Result<()> {
    let (mut reader, mut writer) = stream.split();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            return Ok(writer.shutdown().await?);
        }
        writer.write_all(&buffer[..count]).await?;
    }
}

/// Reads to the end; how many bytes came.
async fn drain(stream: &mut TcpStream) -> Result<u64> {
    let (mut total, mut buffer) = (0, vec![0; 256 << 10]);
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(total);
        }
        total += count as u64;
    }
}

async fn http(stream: TcpStream, name: &str) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if (&mut stream).take(16 << 10).read_line(&mut head).await? == 0 {
                return Ok(());
            }
        }
        let close = head.to_ascii_lowercase().contains("connection: close");
        let body = format!("{name}\n");
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.get_mut().write_all(answer.as_bytes()).await?;
        if close {
            return Ok(stream.get_mut().shutdown().await?);
        }
    }
}
