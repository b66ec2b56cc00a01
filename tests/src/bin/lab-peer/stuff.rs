//! Connections that are filled until no byte more goes in, because nobody reads at the other end; or that ask for bytes
//! and never read them.

use std::{io, time::Duration};

use heddle_lab::hostile::Stuffed;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::{JoinSet, spawn_blocking},
    time::timeout,
};

use crate::{
    dial::{Dial, kind},
    tell,
};

/// A connection that took nothing for this long is full.
const FULL: Duration = Duration::from_millis(500);

/// `ask` is said first, to a server that then sends; without it the client sends. All stay open until the end of stdin.
pub async fn stuff(dial: &Dial, count: u64, ask: Option<&str>) -> anyhow::Result<()> {
    let mut stuffing = JoinSet::new();
    for _ in 0..count {
        let (dial, ask) = (dial.clone(), ask.map(str::to_owned));
        stuffing.spawn(async move {
            let mut stream = dial.connect().await?;
            let bytes = match ask {
                Some(ask) => {
                    stream.write_all(format!("{ask}\n").as_bytes()).await?;
                    tokio::time::sleep(FULL).await;
                    0
                }
                None => fill(&mut stream).await?,
            };
            Ok::<_, io::Error>((stream, bytes))
        });
    }
    let (mut streams, mut report) = (Vec::new(), Stuffed::default());
    while let Some(stuffed) = stuffing.join_next().await {
        match stuffed? {
            Ok((stream, bytes)) => {
                streams.push(stream);
                report.bytes += bytes;
            }
            // One whose bytes would take more room than there is may be reset.
            Err(error) if kind(&error) == "reset" => report.reset += 1,
            Err(error) => return Err(error.into()),
        }
    }
    report.connections = streams.len() as u64;
    tell(&report)?;
    let mut line = String::new();
    while spawn_blocking(move || io::stdin().read_line(&mut line)).await?? > 0 {
        line = String::new();
    }
    drop(streams);
    Ok(())
}

async fn fill(stream: &mut TcpStream) -> io::Result<u64> {
    let (buffer, mut bytes) = (vec![b'h'; 64 << 10], 0);
    loop {
        match timeout(FULL, stream.write(&buffer)).await {
            Ok(written) => bytes += written? as u64,
            Err(_) => return Ok(bytes),
        }
    }
}
