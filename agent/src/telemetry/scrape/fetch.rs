//! One pod's answer over a connection that is open: asked for once, read up to a cap.
//!
//! The pod is not trusted: how long it takes and how much it says is bounded by the caller and the caps; redirects are not followed.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{ScrapeError, exposition::Format};
use crate::{cluster::ScrapeTarget, life::limits};

/// Prometheus' own header: how long the asker waits.
pub const TIMEOUT: &str = "x-prometheus-scrape-timeout-seconds";
const ACCEPT: &str = "text/plain;version=0.0.4;q=1,*/*;q=0.1";

/// Asks for the target's metrics. `host` is what the request names, `patience` what is left of the deadline, `all` how many bytes all
/// pods of the scrape have answered with; those of an answer that is of no use don't count.
pub async fn fetch(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    host: &str,
    target: &ScrapeTarget,
    patience: Duration,
    all: &AtomicUsize,
) -> Result<(String, Format), ScrapeError> {
    let failed = |error: hyper::Error| ScrapeError::Http(error.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .max_headers(limits::HEADER_FIELDS)
        .max_buf_size(limits::SCRAPE_HEAD)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    let request = Request::get(&*target.path)
        .header(header::HOST, host)
        .header(header::ACCEPT, ACCEPT)
        .header(header::USER_AGENT, concat!("heddle/", env!("CARGO_PKG_VERSION")))
        .header(TIMEOUT, format!("{:.3}", patience.as_secs_f64()))
        .body(Empty::<Bytes>::new())
        .map_err(|error| ScrapeError::Http(error.to_string()))?;
    let asking = async {
        let answer = sender.send_request(request).await.map_err(failed)?;
        if answer.status() != StatusCode::OK {
            return Err(ScrapeError::Status(answer.status()));
        }
        let says = |name| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let format = Format::of(says(header::CONTENT_TYPE));
        if !matches!(says(header::CONTENT_ENCODING), "" | "identity") {
            return Err(ScrapeError::Encoding);
        }
        let mut body = answer.into_body();
        let (mut bytes, mut counted) = (Vec::new(), Counted { all, bytes: 0 });
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(failed)?.into_data() else { continue };
            if bytes.len() + data.len() > limits::SCRAPE_BYTES_PER_POD {
                return Err(ScrapeError::TooLarge);
            }
            if !counted.add(data.len()) {
                return Err(ScrapeError::TotalTooLarge);
            }
            bytes.extend_from_slice(&data);
        }
        let text = String::from_utf8(bytes).map_err(|_| ScrapeError::Text)?;
        counted.keep();
        Ok((text, format))
    };
    // The connection is driven here, so that it ends with the answer.
    tokio::pin!(asking, connection);
    let mut driven = false;
    loop {
        tokio::select! {
            answer = &mut asking => return answer,
            _ended = &mut connection, if !driven => driven = true,
        }
    }
}

/// Bytes of one answer among those of all; given back with this value, unless it is kept.
struct Counted<'a> {
    all: &'a AtomicUsize,
    bytes: usize,
}

impl Counted<'_> {
    /// Whether there is room for so many more.
    fn add(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        self.all.fetch_add(bytes, Ordering::Relaxed) + bytes <= limits::SCRAPE_BYTES
    }

    fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
