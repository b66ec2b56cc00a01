//! Makes one large read of what rustls would ask of the kernel in steps of 4 KiB.
//!
//! Between the socket and TLS. The buffer follows the traffic: small for messages, large for bulk, and none while the connection
//! is idle. It adds nothing and keeps the order.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::{Wire, meter::Metered};
use crate::life::{budget::Held, limits};

#[derive(Debug)]
pub(crate) struct Buffered {
    tcp: Metered,
    /// Read and not yet handed on.
    buffer: BytesMut,
    /// Size of the next read.
    size: usize,
    /// What the connection holds of the budgets.
    _held: Option<Held>,
}

impl Buffered {
    /// `before` was read already.
    pub fn new(tcp: Metered, before: BytesMut, held: Option<Held>) -> Self {
        Self { tcp, buffer: before, size: limits::TLS_READ_MIN, _held: held }
    }

    /// What goes over it.
    pub fn wire(&self) -> &Arc<Wire> {
        self.tcp.wire()
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // Readiness first: it costs no system call, and nothing is allocated for a socket that has nothing.
        ready!(self.tcp.poll_read_ready(cx))?;
        let size = self.size;
        // The room that was handed on is used again.
        self.buffer.reserve(size);
        let read = ready!(pin!(self.tcp.read_buf(&mut self.buffer)).poll(cx))?;
        self.follow(read);
        Poll::Ready(Ok(read))
    }

    fn follow(&mut self, read: usize) {
        if read >= self.size {
            self.size = (self.size * 2).min(limits::TLS_READ);
        } else if read < self.size / 4 {
            self.size = (self.size / 2).max(limits::TLS_READ_MIN);
        }
    }
}

impl AsyncRead for Buffered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            if buf.remaining() >= self.size {
                let before = buf.filled().len();
                ready!(Pin::new(&mut self.tcp).poll_read(cx, buf))?;
                self.follow(buf.filled().len() - before);
                return Poll::Ready(Ok(()));
            }
            match self.poll_fill(cx) {
                Poll::Ready(read) => {
                    read?;
                }
                Poll::Pending => {
                    self.buffer = BytesMut::new();
                    return Poll::Pending;
                }
            }
        }
        let count = self.buffer.len().min(buf.remaining());
        buf.put_slice(self.buffer.get(..count).unwrap_or_default());
        self.buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Buffered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, pieces)
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
