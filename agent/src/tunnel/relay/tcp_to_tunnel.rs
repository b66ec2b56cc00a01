//! One direction: a socket's bytes into an HTTP/2 stream, no faster than the stream's windows allow.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::SendStream;
use tokio::net::{TcpStream, tcp::ReadHalf};

use super::{Broken, Turn, poll_reset, tcp_in::TcpIn};
use crate::tunnel::http2::{Stall, Stalls};

#[derive(Debug)]
pub(super) struct TcpToTunnel<'a> {
    input: TcpIn<'a>,
    /// Read and not yet sent.
    chunk: Bytes,
    send: &'a mut SendStream<Bytes>,
    counter: &'a AtomicU64,
    stalls: Option<&'a Stalls>,
    /// While the stream waits for room.
    stall: Option<Stall<'a>>,
    blocked: bool,
    pub done: bool,
}

impl<'a> TcpToTunnel<'a> {
    pub fn new(
        reader: ReadHalf<'a>,
        send: &'a mut SendStream<Bytes>,
        counter: &'a AtomicU64,
        stalls: Option<&'a Stalls>,
    ) -> Self {
        let input = TcpIn::new(reader);
        Self { input, chunk: Bytes::new(), send, counter, stalls, stall: None, blocked: false, done: false }
    }

    pub fn blocked(&self) -> bool {
        self.blocked
    }

    pub fn socket(&self) -> &TcpStream {
        self.input.socket()
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut turn = Turn::default();
        while !self.done {
            if self.chunk.is_empty() {
                match ready!(self.input.poll_chunk(cx)).map_err(Broken::Near)? {
                    Some(chunk) => {
                        self.send.reserve_capacity(chunk.len());
                        self.chunk = chunk;
                    }
                    None => {
                        self.send.send_data(Bytes::new(), true)?;
                        self.done = true;
                        break;
                    }
                }
            }
            let room = ready!(self.poll_room(cx))?;
            let piece = self.chunk.split_to(room.min(self.chunk.len()));
            let moved = piece.len();
            self.counter.fetch_add(moved as u64, Ordering::Relaxed);
            self.send.send_data(piece, false)?;
            if !self.chunk.is_empty() {
                self.send.reserve_capacity(self.chunk.len());
            }
            if turn.over(moved, cx) {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Bytes that the stream takes now, at least one.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Broken>> {
        loop {
            // Asked first: `poll_capacity` tells of increases only.
            let room = self.send.capacity();
            if room > 0 {
                self.blocked = false;
                self.stall = None;
                return Poll::Ready(Ok(room));
            }
            match self.send.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                Poll::Ready(None) => {
                    let broken = match poll_reset(self.send, cx) {
                        Poll::Ready(broken) => broken,
                        Poll::Pending => Broken::Lost("the stream takes no more data".into()),
                    };
                    return Poll::Ready(Err(broken));
                }
                Poll::Pending => {
                    self.blocked = true;
                    if self.stall.is_none() {
                        self.stall = self.stalls.map(Stalls::begin);
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Whether the other end has reset the stream.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        match poll_reset(self.send, cx) {
            Poll::Ready(broken) => Err(broken),
            Poll::Pending => Ok(()),
        }
    }
}
