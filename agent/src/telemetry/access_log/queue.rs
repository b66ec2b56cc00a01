//! Lines that wait to be written, and the thread that writes them.
//!
//! Whoever has lines leaves them here and goes on: nothing waits for the disk or the reader of a pipe. Where those can't keep
//! up, lines are dropped and counted. Lines that come together are taken, copied and written together.

use std::{
    fmt,
    io::{self, Write},
    mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use crate::life::limits;

/// Whole lines.
#[derive(Debug, Default)]
pub(in crate::telemetry) struct Block {
    pub text: Vec<u8>,
    pub lines: u64,
}

impl Block {
    fn clear(&mut self) {
        self.text.clear();
        self.lines = 0;
    }
}

/// Where lines are left. Clones are the same queue.
#[derive(Clone)]
pub(super) struct Queue(Arc<Shared>);

struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Most bytes that wait.
    room: usize,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    block: Block,
    /// The thread has nothing to do and is to be woken.
    idle: bool,
    /// No more lines will come.
    closed: bool,
    /// The thread has ended.
    over: bool,
}

/// Writes what waits when it is dropped, as far as that is done in [`limits::LOG_FLUSH`].
#[must_use]
pub struct LogGuard(Arc<Shared>);

impl Queue {
    /// Starts the thread. At most `room` bytes wait, beside those that it writes.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub fn start(writer: impl Write + Send + 'static, room: usize) -> io::Result<(Self, LogGuard)> {
        let shared =
            Arc::new(Shared { waiting: Mutex::default(), changed: Condvar::new(), room, dropped: AtomicU64::new(0) });
        let of_thread = Arc::clone(&shared);
        thread::Builder::new().name("access-log".into()).spawn(move || of_thread.write(writer))?;
        Ok((Self(Arc::clone(&shared)), LogGuard(shared)))
    }

    /// Takes the lines, or drops and counts them. The block is empty afterwards.
    pub fn put(&self, block: &mut Block) {
        if block.lines == 0 {
            return;
        }
        let mut waiting = self.0.waiting();
        let there = &mut waiting.block;
        if there.text.len() + block.text.len() > self.0.room {
            self.0.give_up(block.lines);
        } else {
            if there.text.is_empty() && there.text.capacity() <= block.text.capacity() {
                mem::swap(&mut there.text, &mut block.text);
            } else {
                there.text.extend_from_slice(&block.text);
            }
            there.lines += block.lines;
        }
        block.clear();
        let wake = mem::take(&mut waiting.idle);
        drop(waiting);
        if wake {
            self.0.changed.notify_all();
        }
    }

    /// Lines dropped so far.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// A panic elsewhere leaves whole lines behind, so a poisoned lock is no reason to stop writing.
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_up(&self, lines: u64) {
        self.dropped.fetch_add(lines, Ordering::Relaxed);
    }

    /// Until the queue is closed and empty.
    fn write(&self, mut writer: impl Write) {
        let (mut taken, mut failing) = (Block::default(), false);
        while self.take(&mut taken) {
            match writer.write_all(&taken.text).and_then(|()| writer.flush()) {
                Ok(()) => failing = false,
                Err(error) => {
                    self.give_up(taken.lines);
                    if !mem::replace(&mut failing, true) {
                        tracing::error!(%error, reason = "access_log", "The access log can't be written");
                    }
                }
            }
            taken.clear();
            taken.text.shrink_to(limits::LOG_KEPT);
        }
    }

    /// Waits for lines. False when there will be none.
    fn take(&self, taken: &mut Block) -> bool {
        let mut waiting = self.waiting();
        while waiting.block.lines == 0 {
            if waiting.closed {
                waiting.over = true;
                self.changed.notify_all();
                return false;
            }
            waiting.idle = true;
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        mem::swap(&mut waiting.block, taken);
        true
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.closed = true;
        self.0.changed.notify_all();
        // Late, what still waits is lost with the process: its end does not wait for a reader that has stopped.
        let _late = self.0.changed.wait_timeout_while(waiting, limits::LOG_FLUSH, |waiting| !waiting.over);
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("room", &self.0.room).finish_non_exhaustive()
    }
}
