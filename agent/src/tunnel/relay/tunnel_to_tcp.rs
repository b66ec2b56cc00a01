//! One direction: an HTTP/2 stream's bytes to a socket.
//!
//! While the socket takes nothing, frames are still taken from the connection, up to the stream's window, and small ones are
//! put together: left where they are, many small frames would use up the connection's budget and end it for all its
//! streams (h2's `data_frame_budget`). Window is given back only for bytes that the socket has taken.

use std::{
    collections::VecDeque,
    io::IoSlice,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use h2::RecvStream;
use tokio::{io::AsyncWrite, net::tcp::WriteHalf};

use super::{Broken, Turn};
use crate::life::{budget::Buffers, limits};

#[derive(Debug)]
pub(super) struct TunnelToTcp<'a> {
    receive: &'a mut RecvStream,
    output: WriteHalf<'a>,
    counter: &'a AtomicU64,
    queue: Queue,
    /// Room for the queue while it waits.
    buffers: Buffers,
    ended: bool,
    /// The socket takes nothing now.
    pub blocked: bool,
    pub done: bool,
}

impl<'a> TunnelToTcp<'a> {
    pub fn new(receive: &'a mut RecvStream, output: WriteHalf<'a>, counter: &'a AtomicU64, buffers: Buffers) -> Self {
        let queue = Queue::default();
        Self { receive, output, counter, queue, buffers, ended: false, blocked: false, done: false }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut turn = Turn::default();
        while !self.done {
            self.gather(cx)?;
            if !self.queue.is_empty() {
                let written = self.poll_write(cx);
                self.blocked = written.is_pending();
                if self.blocked {
                    self.buffers.hold(self.queue.len())?;
                }
                let written = ready!(written)?;
                if self.queue.is_empty() {
                    self.buffers.release();
                }
                self.counter.fetch_add(written as u64, Ordering::Relaxed);
                // Fails only when the stream has just ended, and then there is no window to give back.
                let _ = self.receive.flow_control().release_capacity(written);
                if turn.over(written, cx) {
                    return Poll::Pending;
                }
            } else if self.ended {
                ready!(Pin::new(&mut self.output).poll_shutdown(cx)).map_err(Broken::Near)?;
                self.done = true;
            } else {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes what has arrived. The stream's window bounds it, because none is given back here.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        while !self.ended && (self.blocked || self.queue.len() < limits::RELAY_BUFFER_MAX) {
            match self.receive.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => self.queue.push(data),
                Poll::Ready(Some(Err(error))) => return Err(error.into()),
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Broken>> {
        let output = Pin::new(&mut self.output);
        let written = match self.queue.only() {
            Some(piece) => ready!(output.poll_write(cx, piece)),
            None => {
                let mut slices = [IoSlice::new(&[]); limits::RELAY_PIECES];
                let count = self.queue.slices(&mut slices);
                ready!(output.poll_write_vectored(cx, slices.get(..count).unwrap_or_default()))
            }
        };
        let written = written.map_err(Broken::Near)?;
        self.queue.advance(written);
        Poll::Ready(Ok(written))
    }
}

/// Received pieces in order; small ones that have to wait are put together in `tail`.
#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
    bytes: usize,
}

impl Queue {
    fn len(&self) -> usize {
        self.bytes
    }

    fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        let waits = self.bytes > 0;
        self.bytes += data.len();
        if waits && data.len() <= limits::RELAY_COPY {
            self.tail.extend_from_slice(&data);
            if self.tail.len() >= limits::RELAY_BUFFER_MIN {
                self.seal();
            }
            return;
        }
        self.seal();
        self.pieces.push_back(data);
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
    }

    /// The only piece, if there is but one.
    fn only(&self) -> Option<&[u8]> {
        match (self.pieces.len(), self.tail.is_empty()) {
            (1, true) => self.pieces.front().map(|piece| piece.as_ref()),
            (0, false) => Some(&self.tail),
            _ => None,
        }
    }

    fn slices<'s>(&'s self, slices: &mut [IoSlice<'s>]) -> usize {
        let all = self.pieces.iter().map(|piece| piece.as_ref()).chain(Some(self.tail.as_ref()));
        slices.iter_mut().zip(all).map(|(slot, piece)| *slot = IoSlice::new(piece)).count()
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes = self.bytes.saturating_sub(count);
        while let Some(front) = self.pieces.front_mut() {
            if front.len() > count {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
        self.tail.advance(count.min(self.tail.len()));
        if self.bytes == 0 {
            // An idle connection holds no buffer.
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_leave_in_the_order_in_which_they_came() {
        let mut queue = Queue::default();
        let mut expected = Vec::new();
        let mut seen = Vec::new();
        for step in 0..200_usize {
            let data = vec![(step % 251) as u8; [1, 100, 5_000, 0, 2_048][step % 5]];
            expected.extend_from_slice(&data);
            queue.push(data.into());
            if step % 3 == 0 {
                let take = (step * 37) % (queue.len() + 1);
                let mut slices = [IoSlice::new(&[]); limits::RELAY_PIECES];
                let count = queue.slices(&mut slices);
                let all: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
                let take = take.min(all.len());
                seen.extend_from_slice(&all[..take]);
                queue.advance(take);
            }
        }
        while !queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); limits::RELAY_PIECES];
            let count = queue.slices(&mut slices);
            let all: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
            seen.extend_from_slice(&all);
            queue.advance(all.len());
        }
        assert!(seen == expected, "{} bytes in, {} bytes out", expected.len(), seen.len());
    }
}
