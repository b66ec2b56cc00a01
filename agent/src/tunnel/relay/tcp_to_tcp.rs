//! One direction between two sockets.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::AsyncWrite,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::{Broken, Turn, tcp_in::TcpIn};

/// Which end broke.
#[derive(Debug)]
pub(super) enum Side {
    Input(io::Error),
    Output(io::Error),
}

impl Side {
    pub fn by(self, input: impl Fn(io::Error) -> Broken, output: impl Fn(io::Error) -> Broken) -> Broken {
        match self {
            Self::Input(error) => input(error),
            Self::Output(error) => output(error),
        }
    }
}

#[derive(Debug)]
pub(super) struct TcpToTcp<'a, Count> {
    input: TcpIn<'a>,
    output: WriteHalf<'a>,
    chunk: Bytes,
    /// Told of bytes as they are handed on.
    count: Count,
    /// The output takes nothing now.
    pub blocked: bool,
    pub done: bool,
}

impl<'a, Count: Fn(u64)> TcpToTcp<'a, Count> {
    pub fn new(input: ReadHalf<'a>, output: WriteHalf<'a>, count: Count) -> Self {
        Self { input: TcpIn::new(input), output, chunk: Bytes::new(), count, blocked: false, done: false }
    }

    /// The socket that is read.
    pub fn socket(&self) -> &TcpStream {
        self.input.socket()
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Side>> {
        let mut turn = Turn::default();
        while !self.done {
            if self.chunk.is_empty() {
                match ready!(self.input.poll_chunk(cx)).map_err(Side::Input)? {
                    Some(chunk) => self.chunk = chunk,
                    None => {
                        ready!(Pin::new(&mut self.output).poll_shutdown(cx)).map_err(Side::Output)?;
                        self.done = true;
                        break;
                    }
                }
            }
            let written = Pin::new(&mut self.output).poll_write(cx, &self.chunk);
            self.blocked = written.is_pending();
            let written = ready!(written).map_err(Side::Output)?;
            (self.count)(written as u64);
            self.chunk.advance(written);
            if turn.over(written, cx) {
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }
}
