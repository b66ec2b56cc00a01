//! The agent's own log: on stderr, filtered by `HEDDLE_LOG`, through a bounded queue so that a reader that can't keep up
//! never stops the agent.

use std::io;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

use super::limits;
use crate::telemetry::Format;

/// Environment variable that filters the log, such as `info,heddle::capture=debug`.
const FILTER: &str = "HEDDLE_LOG";

/// Sends the program's log to stderr. Dropping the guard writes what is queued.
///
/// # Errors
/// When the filter can't be read, or a log was set up before.
pub fn start(format: Format) -> io::Result<WorkerGuard> {
    let filter = match std::env::var(FILTER) {
        Ok(filter) => EnvFilter::try_new(&filter)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("{FILTER} {filter:?}: {error}")))?,
        Err(_) => EnvFilter::new("info"),
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(limits::OWN_LOG_LINES)
        .thread_name("log")
        .finish(io::stderr());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        Format::Text => registry.with(layer).try_init(),
        Format::Json => registry.with(layer.json()).try_init(),
    };
    started.map_err(io::Error::other)?;
    Ok(guard)
}
