//! One line per connection, at its end: who talked to whom, how it was protected, how much, and why it ended.
//!
//! Lines go through a bounded queue to a thread of their own. A reader that can't keep up costs lines, which are
//! counted, never traffic; connections that carried nothing are told of so many times a second, for each pod.

mod outline;
mod queue;
mod record;

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

pub use queue::LogGuard;
use queue::Queue;
pub use record::{Record, response_flags};
pub(super) use {
    outline::{Outline, Particulars, Printed},
    queue::Block,
    record::denied,
};

use super::suppress::Suppress;
use crate::life::limits;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// `time TAB level TAB target TAB message TAB key=value …`.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    Stdout,
    /// Appended to, so that a log rotation that truncates works.
    File(PathBuf),
}

/// The access log.
#[derive(Debug, Clone)]
pub struct AccessLog {
    format: Format,
    queue: Queue,
    suppress: Arc<Suppress>,
}

impl AccessLog {
    /// Opens the destination. Dropping the guard writes what is queued.
    ///
    /// # Errors
    /// When the file can't be opened for appending, or there is no thread to write it.
    pub fn open(destination: &Destination, format: Format) -> io::Result<(Self, LogGuard)> {
        match destination {
            Destination::Stdout => Self::to(io::stdout(), format, limits::LOG_QUEUE),
            Destination::File(path) => {
                Self::to(OpenOptions::new().append(true).create(true).open(path)?, format, limits::LOG_QUEUE)
            }
        }
    }

    /// A log that writes to `writer` on a thread of its own and queues at most `room` bytes.
    pub(super) fn to(writer: impl Write + Send + 'static, format: Format, room: usize) -> io::Result<(Self, LogGuard)> {
        let (queue, guard) = Queue::start(writer, room)?;
        Ok((Self { format, queue, suppress: Arc::default() }, guard))
    }

    /// Queues a connection's line, or drops it and counts that. False where the pod had enough of its kind in this second.
    pub fn write(&self, record: &Record<'_>) -> bool {
        self.write_for(record, 1)
    }

    /// The same for `count` connections that are told of in one line.
    pub fn write_for(&self, record: &Record<'_>, count: u64) -> bool {
        let mut block = Block::default();
        let admitted = self.append(record, count, &mut block);
        if admitted {
            self.queue(&mut block);
        }
        admitted
    }

    /// Appends the line to those that are to be queued together. False where the pod had enough of its kind in this second.
    pub(super) fn append(&self, record: &Record<'_>, count: u64, block: &mut Block) -> bool {
        let before = match record.carried {
            Some(_) => Some(count.saturating_sub(1)),
            None => self.suppress.admit(record.flow, record.end, count, Instant::now()),
        };
        let Some(before) = before else { return false };
        record.append(before, self.format, &mut block.text);
        block.lines += 1;
        true
    }

    /// The outline of a line like this one.
    pub(super) fn outline(&self, record: &Record<'_>) -> Outline {
        record.outline(0, self.format)
    }

    /// Queues lines, or drops and counts them. The block is empty afterwards.
    pub(super) fn queue(&self, block: &mut Block) {
        self.queue.put(block);
    }

    /// Lines dropped so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }
}
