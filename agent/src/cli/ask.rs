//! Asks the running agent over its Unix socket.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, time::timeout};

use crate::life::{config::ADMIN_SOCKET, limits};

/// Which agent to ask, and how to print.
#[derive(Debug, clap::Args)]
pub(super) struct Ask {
    /// The agent's admin socket.
    #[arg(long, env = "HEDDLE_ADMIN_SOCKET", default_value = ADMIN_SOCKET, value_name = "FILE")]
    pub admin_socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

impl Ask {
    /// What the agent answers at `path`.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.send(Method::GET, path, limits::ADMIN_ANSWER_WAIT)
    }

    /// Has the agent do what `path` names; gives what came of it.
    pub fn post<T: DeserializeOwned>(&self, path: &str, wait: Duration) -> anyhow::Result<T> {
        self.send(Method::POST, path, wait)
    }

    fn send<T: DeserializeOwned>(&self, method: Method, path: &str, wait: Duration) -> anyhow::Result<T> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start the runtime")?;
        let body = runtime.block_on(fetch(&self.admin_socket, method, path, wait))?;
        serde_json::from_slice(&body).context("the agent's answer can't be read: is it of another version?")
    }
}

async fn fetch(socket: &Path, method: Method, path: &str, wait: Duration) -> anyhow::Result<Bytes> {
    let asking = async {
        let stream = UnixStream::connect(socket).await.with_context(|| {
            format!("no agent answers at {}: does it run, and with this --admin-socket?", socket.display())
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request =
            Request::builder().method(method).uri(path).header("host", "localhost").body(Empty::<Bytes>::new())?;
        let response =
            sender.send_request(request).await.context("the agent refuses: only root and its own user may ask")?;
        let status = response.status();
        let body = Limited::new(response.into_body(), limits::ADMIN_ANSWER).collect().await;
        driver.abort();
        let body = body
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| anyhow::anyhow!("the agent's answer broke off: {error}"))?;
        match status {
            StatusCode::OK => Ok(body),
            StatusCode::BAD_REQUEST => bail!("{}", String::from_utf8_lossy(&body).trim_end()),
            StatusCode::NOT_FOUND => bail!("the agent knows no {path}: is it of another version?"),
            other => bail!("the agent answers {other}"),
        }
    };
    timeout(wait, asking)
        .await
        .with_context(|| format!("the agent at {} gave no answer in {wait:?}", socket.display()))?
}

/// A path with a query; parts without a value are left out.
pub(super) fn query(path: &str, parts: &[(&str, Option<&str>)]) -> String {
    let mut text = path.to_owned();
    let given = parts.iter().filter_map(|(key, value)| Some((key, (*value)?)));
    for (index, (key, value)) in given.enumerate() {
        text.push(if index == 0 { '?' } else { '&' });
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                    text.push(char::from(byte));
                }
                // Writing to a String can't fail.
                _ => drop(write!(text, "%{byte:02X}")),
            }
        }
    }
    text
}

/// Writes to stdout. A reader that closed it early (`| head`) has seen what it wanted.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    use std::io::{ErrorKind, Write};
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("can't write to stdout"),
        _ => Ok(()),
    }
}

/// JSON for people and programs, with a line feed.
pub(super) fn json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let mut text = serde_json::to_string_pretty(value)?;
    writeln!(text)?;
    Ok(text)
}
