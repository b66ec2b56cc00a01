//! One request to a tunnel's port, exactly as written: fields that no library would send, or HTTP/1.1.

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use heddle_lab::hostile::Asked;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::{
    dial::kind,
    frames::{self, DATA, END_HEADERS, GOAWAY, HEADERS, RST_STREAM, SETTINGS, frame},
    tls,
};

const PATIENCE: Duration = Duration::from_secs(5);

/// `fields` are the header fields in their order, `name=value`; `say` is sent at once after them.
pub async fn ask(
    to: SocketAddr,
    pair: Option<&(PathBuf, PathBuf)>,
    fields: &[String],
    say: &str,
    http1: Option<&str>,
) -> anyhow::Result<Asked> {
    let config = tls::client_from(pair)?;
    let mut report = Asked::default();
    let met = async {
        let mut stream = tls::connect(&config, to).await?;
        if let Some(text) = http1 {
            stream.write_all(text.replace("\\r\\n", "\r\n").as_bytes()).await?;
            let mut answer = Vec::new();
            let ended = stream.read_to_end(&mut answer).await;
            report.received = String::from_utf8_lossy(&answer).into_owned();
            return ended.and(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        let fields: Vec<_> = fields.iter().filter_map(|field| field.split_once('=')).collect();
        let mut out = frames::PREFACE.to_vec();
        frame(&mut out, SETTINGS, 0, 0, &[]);
        frame(&mut out, HEADERS, END_HEADERS, 1, &frames::block(&fields));
        frame(&mut out, DATA, 0, 1, say.as_bytes());
        stream.write_all(&out).await?;
        loop {
            let frame = frames::read(&mut stream).await?;
            match frame.kind {
                HEADERS if frame.stream == 1 => report.status = frames::status(&frame.payload),
                DATA => report.received.push_str(&String::from_utf8_lossy(&frame.payload)),
                RST_STREAM => report.reset = Some(last_byte(&frame.payload)),
                GOAWAY => report.goaway = Some(last_byte(frame.payload.get(4..8).unwrap_or_default())),
                _ => {}
            }
            if report.status.is_some_and(|status| status != 200) || report.reset.is_some() || report.goaway.is_some() {
                return Ok(());
            }
            if report.received.len() >= say.len() && report.status.is_some() {
                return Ok(());
            }
        }
    };
    report.error = match timeout(PATIENCE, met).await {
        Ok(met) => met.err().map(|error: io::Error| kind(&error)),
        Err(_) => Some("timeout".to_owned()),
    };
    Ok(report)
}

/// Error codes of HTTP/2 are small numbers in four bytes.
fn last_byte(code: &[u8]) -> u8 {
    code.last().copied().unwrap_or_default()
}
