//! The socket of a tunnel, between TCP and TLS: counts the bytes that really go over the wire, and looks at TCP's health.
//!
//! Telemetry reads the counts while the tunnel lives. On the byte path it adds to a number that nobody else writes; it must
//! never hold up a read or a write, and never fail one.

use std::{
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Instant,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{Direction, Observer};
use crate::{
    capture::{self, TcpHealth},
    life::limits,
};

/// What went over one tunnel's TCP connection: TLS records, so handshakes and HTTP/2 frames too.
#[derive(Debug)]
pub struct Wire {
    pub id: u64,
    pub direction: Direction,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Wire {
    /// A wire on which nothing was carried yet.
    #[must_use]
    pub fn new(direction: Direction) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { id, direction, sent: AtomicU64::new(0), received: AtomicU64::new(0) }
    }

    /// Bytes sent and received so far.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }

    pub(crate) fn sent(&self, bytes: usize) {
        add(&self.sent, bytes);
    }

    pub(crate) fn received(&self, bytes: usize) {
        add(&self.received, bytes);
    }
}

/// One task writes each counter, so this needs no locked instruction.
fn add(counter: &AtomicU64, bytes: usize) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(bytes as u64), Ordering::Relaxed);
}

/// A tunnel's TCP connection. The observer is told of its start, its health once in a while, and its end.
#[derive(Debug)]
pub(crate) struct Metered {
    tcp: TcpStream,
    wire: Arc<Wire>,
    observer: Arc<dyn Observer>,
    looked: Instant,
}

impl Metered {
    pub fn new(tcp: TcpStream, direction: Direction, observer: Arc<dyn Observer>) -> Self {
        let wire = Arc::new(Wire::new(direction));
        observer.wire_opened(&wire);
        Self { tcp, wire, observer, looked: Instant::now() }
    }

    /// Counts bytes that were read before it was wrapped.
    pub fn read_before(&self, bytes: usize) {
        self.wire.received(bytes);
    }

    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.poll_read_ready(cx)
    }

    pub fn wire(&self) -> &Arc<Wire> {
        &self.wire
    }

    /// TCP's state, at most once per [`limits::TCP_HEALTH`] and only while there is traffic, pings included.
    fn look_if_due(&mut self) {
        if self.looked.elapsed() >= limits::TCP_HEALTH {
            self.looked = Instant::now();
            self.observer.wire_health(&self.wire, self.health());
        }
    }

    fn health(&self) -> Option<TcpHealth> {
        // A socket that can't be asked is broken, and says so when used.
        capture::tcp_health(self.tcp.as_fd()).ok()
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.observer.wire_closed(&self.wire, self.health());
    }
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buffer))?;
        self.wire.received(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))?;
        self.wire.sent(written);
        self.look_if_due();
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, pieces))?;
        self.wire.sent(written);
        self.look_if_due();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
