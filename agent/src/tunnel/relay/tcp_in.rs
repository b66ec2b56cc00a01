//! Reads a socket in steps that follow its traffic: no buffer while idle, a small one for messages, large ones for bulk.

use std::{
    future::Future,
    io,
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt,
    net::{TcpStream, tcp::ReadHalf},
};

use crate::life::limits;

#[derive(Debug)]
pub(super) struct TcpIn<'a> {
    half: ReadHalf<'a>,
    /// Size of the next read.
    size: usize,
    buffer: BytesMut,
}

impl<'a> TcpIn<'a> {
    pub fn new(half: ReadHalf<'a>) -> Self {
        Self { half, size: limits::RELAY_BUFFER_MIN, buffer: BytesMut::new() }
    }

    pub fn socket(&self) -> &TcpStream {
        self.half.as_ref()
    }

    /// The next bytes; `None` at the end.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let read = match self.poll_read(cx) {
            Poll::Ready(read) => read?,
            Poll::Pending => {
                // An idle connection holds no buffer.
                self.buffer = BytesMut::new();
                return Poll::Pending;
            }
        };
        if read == 0 {
            return Poll::Ready(Ok(None));
        }
        if read == self.size {
            self.size = (self.size * 2).min(limits::RELAY_BUFFER_MAX);
        } else if read < self.size / 4 {
            self.size = (self.size / 2).max(limits::RELAY_BUFFER_MIN);
        }
        if read <= limits::RELAY_COPY {
            let chunk = Bytes::copy_from_slice(&self.buffer);
            self.buffer.clear();
            return Poll::Ready(Ok(Some(chunk)));
        }
        Poll::Ready(Ok(Some(self.buffer.split().freeze())))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // Readiness first: it costs no system call, and nothing is allocated for a socket that has nothing.
        ready!(self.socket().poll_read_ready(cx))?;
        if self.buffer.capacity() < self.size {
            self.buffer = BytesMut::with_capacity(self.size);
        }
        pin!(self.half.read_buf(&mut self.buffer)).poll(cx)
    }
}
