//! Counts the HTTP/2 frames that a peer sends, between TLS and h2, and raises an alarm when it floods.
//!
//! h2 answers or drops every frame, however many come; this says how many are enough. It looks at frame headers alone and jumps
//! over what is between them, changes no byte, and takes no part in the protocol. Pure but for [`Frames`], the wrapper.

use std::{
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};

use crate::life::{budget::Bucket, limits};

/// `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n` (RFC 9113 §3.4), which the server's side reads first. h2 compares it.
const PREFACE: u32 = 24;
/// A frame header (RFC 9113 §4.1).
const HEADER: usize = 9;

/// Frame types (RFC 9113 §6).
mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// What a peer sent too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Flood {
    #[error("more PING frames than {} in a row and {} per second", limits::H2_PINGS.burst, limits::H2_PINGS.per_second)]
    Pings,
    #[error("more SETTINGS frames than {} in a row and {} per second", limits::H2_SETTINGS.burst, limits::H2_SETTINGS.per_second)]
    Settings,
    #[error("more RST_STREAM frames than streams")]
    Resets,
    #[error("more than {} CONTINUATION frames in a header block", limits::H2_CONTINUATIONS)]
    Continuations,
    #[error("a header block of more than {} encoded bytes", limits::H2_HEADER_BLOCK)]
    HeaderBlock,
    #[error("more WINDOW_UPDATE frames than there is data to answer")]
    Updates,
    #[error("more frames of other or unknown types than {} in a row and {} per second", limits::H2_OTHERS.burst, limits::H2_OTHERS.per_second)]
    Others,
    #[error("more than {} streams given up before they were answered within 10 s", limits::H2_GIVEN_UP.burst)]
    GivenUp,
}

/// Which end of the connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Server,
    Client,
}

/// One frame header, of what matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    kind: u8,
    length: u32,
}

/// Finds the frame headers in a stream of bytes that comes in pieces of any size.
#[derive(Debug)]
struct Scanner {
    /// Bytes to jump over before the next header.
    skip: u32,
    header: [u8; HEADER],
    have: usize,
}

impl Scanner {
    fn new(skip: u32) -> Self {
        Self { skip, header: [0; HEADER], have: 0 }
    }

    fn scan<E>(&mut self, mut bytes: &[u8], mut on: impl FnMut(Frame) -> Result<(), E>) -> Result<(), E> {
        loop {
            let skip = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= u32::try_from(skip).unwrap_or(self.skip);
            bytes = bytes.get(skip..).unwrap_or_default();
            let wanted = HEADER - self.have;
            let (Some(there), Some(rest)) = (bytes.get(..wanted), bytes.get(wanted..)) else {
                if let Some(place) = self.header.get_mut(self.have..self.have + bytes.len()) {
                    place.copy_from_slice(bytes);
                    self.have += bytes.len();
                }
                return Ok(());
            };
            if let Some(place) = self.header.get_mut(self.have..) {
                place.copy_from_slice(there);
            }
            (self.have, bytes) = (0, rest);
            let [high, middle, low, kind, ..] = self.header;
            let length = u32::from_be_bytes([0, high, middle, low]);
            self.skip = length;
            on(Frame { kind, length })?;
        }
    }
}

/// What a peer may still send, on one connection.
#[derive(Debug)]
pub(crate) struct Allowance {
    role: Role,
    scanner: Scanner,
    pings: Bucket,
    settings: Bucket,
    others: Bucket,
    resets: Bucket,
    updates: Bucket,
    /// Encoded bytes and CONTINUATION frames of the header block that is coming in.
    block: u32,
    continuations: u32,
    /// Bytes written that have not earned an update yet.
    written: usize,
}

impl Allowance {
    pub fn new(role: Role) -> Self {
        let preface = if role == Role::Server { PREFACE } else { 0 };
        Self {
            role,
            scanner: Scanner::new(preface),
            pings: Bucket::new(limits::H2_PINGS),
            settings: Bucket::new(limits::H2_SETTINGS),
            others: Bucket::new(limits::H2_OTHERS),
            resets: Bucket::new(limits::H2_RESETS),
            updates: Bucket::new(limits::H2_UPDATES),
            block: 0,
            continuations: 0,
            written: 0,
        }
    }

    /// Follows decrypted bytes that the peer sent.
    ///
    /// # Errors
    /// When the peer has sent too much of something.
    pub fn read(&mut self, bytes: &[u8], now: impl Fn() -> Instant) -> Result<(), Flood> {
        let Self { role, scanner, pings, settings, others, resets, updates, block, continuations, .. } = self;
        let enough = |there: bool, flood| if there { Ok(()) } else { Err(flood) };
        scanner.scan(bytes, |frame| match frame.kind {
            // h2 has budgets of its own for small and for empty ones.
            kind::DATA => Ok(()),
            kind::HEADERS => {
                (*block, *continuations) = (frame.length, 0);
                if *role == Role::Server {
                    // Each stream may be reset once.
                    resets.earn(1);
                }
                enough(frame.length <= limits::H2_HEADER_BLOCK, Flood::HeaderBlock)
            }
            kind::CONTINUATION => {
                *continuations += 1;
                *block = block.saturating_add(frame.length);
                enough(*continuations <= limits::H2_CONTINUATIONS, Flood::Continuations)?;
                enough(*block <= limits::H2_HEADER_BLOCK, Flood::HeaderBlock)
            }
            kind::RST_STREAM => enough(resets.take_lazily(&now), Flood::Resets),
            kind::WINDOW_UPDATE => enough(updates.take_lazily(&now), Flood::Updates),
            kind::PING => enough(pings.take_lazily(&now), Flood::Pings),
            kind::SETTINGS => enough(settings.take_lazily(&now), Flood::Settings),
            _ => enough(others.take_lazily(&now), Flood::Others),
        })
    }

    /// Follows how much was sent to the peer: it answers data with window updates, and may reset what it was asked for.
    pub fn wrote(&mut self, bytes: usize) {
        self.written += bytes;
        let earned = self.written / limits::H2_BYTES_PER_UPDATE;
        if earned > 0 {
            self.written %= limits::H2_BYTES_PER_UPDATE;
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.updates.earn(earned);
            if self.role == Role::Client {
                self.resets.earn(earned);
            }
        }
    }
}

/// Tells the one that drives a connection that its peer floods.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    flood: OnceLock<Flood>,
    raised: Notify,
}

impl Alarm {
    pub fn raise(&self, flood: Flood) {
        // The first reason is told.
        let _ = self.flood.set(flood);
        self.raised.notify_one();
    }

    /// Waits for the alarm.
    pub async fn raised(&self) -> Flood {
        loop {
            if let Some(flood) = self.flood.get() {
                return *flood;
            }
            self.raised.notified().await;
        }
    }
}

/// A connection whose incoming frames are counted. Once the alarm is raised it reads no more, and its driver ends it.
#[derive(Debug)]
pub(crate) struct Frames<T> {
    io: T,
    /// Bytes read and written since the task last waited.
    turn: usize,
    allowance: Allowance,
    alarm: Arc<Alarm>,
}

impl<T> Frames<T> {
    pub fn new(io: T, role: Role) -> (Self, Arc<Alarm>) {
        let alarm = Arc::<Alarm>::default();
        (Self { io, turn: 0, allowance: Allowance::new(role), alarm: Arc::clone(&alarm) }, alarm)
    }
}

impl<T> Frames<T> {
    /// A connection that never runs out of bytes would hold up all others of its thread.
    fn yields(&mut self, cx: &Context<'_>) -> bool {
        let over = self.turn >= limits::TURN;
        if over {
            self.turn = 0;
            cx.waker().wake_by_ref();
        }
        over
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Frames<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.alarm.flood.get().is_some() {
            // The driver, which the alarm has woken, ends the connection: nothing needs to wake this.
            return Poll::Pending;
        }
        if self.yields(cx) {
            return Poll::Pending;
        }
        let before = buf.filled().len();
        if Pin::new(&mut self.io).poll_read(cx, buf)?.is_pending() {
            self.turn = 0;
            return Poll::Pending;
        }
        self.turn += buf.filled().len() - before;
        let read = buf.filled().get(before..).unwrap_or_default();
        if let Err(flood) = self.allowance.read(read, Instant::now) {
            self.alarm.raise(flood);
            buf.set_filled(before);
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Frames<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.yields(cx) {
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.turn += written;
        self.allowance.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.yields(cx) {
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        self.turn += written;
        self.allowance.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
