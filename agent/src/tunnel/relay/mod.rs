//! Carries bytes between two ends until both have finished, or one breaks.
//!
//! The last stop before the wire or the app: one task per connection, both directions polled in it. Each direction ends by
//! itself (FIN ↔ END_STREAM); what breaks one breaks both (RST ↔ RST_STREAM). It knows no address and no identity, and it
//! never holds more than the peer's window and its own buffer.

mod tcp_in;
mod tcp_to_tcp;
mod tcp_to_tunnel;
mod tunnel_to_tcp;

use std::{
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use tokio::{
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

use self::{tcp_to_tcp::TcpToTcp, tcp_to_tunnel::TcpToTunnel, tunnel_to_tcp::TunnelToTcp};
use super::http2::Stalls;
use crate::life::{
    budget::{Buffers, Refusal},
    limits,
};

/// What ended a relay before both sides had finished.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The socket given first.
    #[error("{0}")]
    Near(io::Error),
    /// The socket given second.
    #[error("{0}")]
    Far(io::Error),
    /// The other end of the tunnel reset its stream.
    #[error("stream reset: {0}")]
    Reset(Reason),
    /// The connection that carried the stream is gone.
    #[error("tunnel lost: {0}")]
    Lost(String),
    /// There is no room for what one end sends and the other does not take.
    #[error(transparent)]
    Budget(#[from] Refusal),
    #[error("closed by the agent")]
    Cancelled,
}

impl From<h2::Error> for Broken {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Lost(error.to_string()),
        }
    }
}

/// Where bytes are counted, as they are handed on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counters<'a> {
    /// Read from the first end.
    pub from_near: &'a AtomicU64,
    /// Written to the first end.
    pub to_near: &'a AtomicU64,
}

/// Carries a socket's bytes in an HTTP/2 stream.
///
/// # Errors
/// When it did not end by both sides' finishing. Then both sides have been reset.
pub(super) async fn tunnel(
    mut tcp: TcpStream,
    mut send: SendStream<Bytes>,
    mut receive: RecvStream,
    counters: Counters<'_>,
    buffers: Buffers,
    cancel: &CancellationToken,
    stalls: Option<&Stalls>,
) -> Result<(), Broken> {
    let result = {
        let (reader, writer) = tcp.split();
        let mut up = TcpToTunnel::new(reader, &mut send, counters.from_near, stalls);
        let mut down = TunnelToTcp::new(&mut receive, writer, counters.to_near, buffers);
        let mut cancelled = pin!(cancel.cancelled());
        let mut look = Look::default();
        poll_fn(|cx| {
            if cancelled.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(Broken::Cancelled));
            }
            if let Poll::Ready(Err(broken)) = up.poll(cx) {
                return Poll::Ready(Err(broken));
            }
            if let Poll::Ready(Err(broken)) = down.poll(cx) {
                return Poll::Ready(Err(broken));
            }
            if up.done && down.done {
                return Poll::Ready(Ok(()));
            }
            // A reset shows itself where bytes are awaited. Where none are, it has to be looked for.
            if down.done || down.blocked {
                up.poll_reset(cx)?;
            }
            if up.done || up.blocked() {
                look.poll(cx, up.socket()).map_err(Broken::Near)?;
            } else {
                look.stop();
            }
            Poll::Pending
        })
        .await
    };
    if result.is_err() {
        send.send_reset(Reason::CANCEL);
        reset(tcp);
    }
    result
}

/// Carries bytes between two sockets, until `cancelled`. Bytes are counted in each of the counters.
///
/// # Errors
/// When it did not end by both sides' finishing. Then both sides have been reset.
pub(super) async fn direct(
    mut near: TcpStream,
    mut far: TcpStream,
    counters: &[Counters<'_>],
    cancelled: impl Future<Output = ()>,
) -> Result<(), Broken> {
    let result = {
        let (near_reader, near_writer) = near.split();
        let (far_reader, far_writer) = far.split();
        let count = |which: for<'a> fn(&Counters<'a>) -> &'a AtomicU64| {
            move |moved| counters.iter().for_each(|counters| _ = which(counters).fetch_add(moved, Ordering::Relaxed))
        };
        let mut up = TcpToTcp::new(near_reader, far_writer, count(|counters| counters.from_near));
        let mut down = TcpToTcp::new(far_reader, near_writer, count(|counters| counters.to_near));
        let mut cancelled = pin!(cancelled);
        let (mut look_near, mut look_far) = (Look::default(), Look::default());
        poll_fn(|cx| {
            if cancelled.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(Broken::Cancelled));
            }
            if let Poll::Ready(Err(broken)) = up.poll(cx) {
                return Poll::Ready(Err(broken.by(Broken::Near, Broken::Far)));
            }
            if let Poll::Ready(Err(broken)) = down.poll(cx) {
                return Poll::Ready(Err(broken.by(Broken::Far, Broken::Near)));
            }
            if up.done && down.done {
                return Poll::Ready(Ok(()));
            }
            for (still, socket, look, side) in [
                (up.done || up.blocked, up.socket(), &mut look_near, Broken::Near as fn(io::Error) -> Broken),
                (down.done || down.blocked, down.socket(), &mut look_far, Broken::Far as fn(io::Error) -> Broken),
            ] {
                if still { look.poll(cx, socket).map_err(side)? } else { look.stop() }
            }
            Poll::Pending
        })
        .await
    };
    if result.is_err() {
        reset(near);
        reset(far);
    }
    result
}

/// What one direction has moved in this turn.
#[derive(Debug, Default)]
struct Turn {
    moved: usize,
}

impl Turn {
    /// Whether it is others' turn now; then this direction is polled again after them.
    fn over(&mut self, moved: usize, cx: &Context<'_>) -> bool {
        self.moved += moved;
        let over = self.moved >= limits::TURN;
        if over {
            cx.waker().wake_by_ref();
        }
        over
    }
}

/// Closes a socket so that its peer sees a reset, not an end.
pub(super) fn reset(tcp: TcpStream) {
    // A socket that is gone already needs none.
    let _ = tcp.set_zero_linger();
    drop(tcp);
}

/// Looks now and then whether a socket that nobody reads was reset.
#[derive(Debug, Default)]
struct Look {
    timer: Option<Pin<Box<Sleep>>>,
}

impl Look {
    fn poll(&mut self, cx: &mut Context<'_>, socket: &TcpStream) -> io::Result<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limits::RELAY_LOOK)));
        while timer.as_mut().poll(cx).is_ready() {
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            timer.as_mut().reset(Instant::now() + limits::RELAY_LOOK);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.timer = None;
    }
}

/// Whether a stream was reset by its other end, for the side that only sends.
fn poll_reset(send: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Broken> {
    match ready!(send.poll_reset(cx)) {
        Ok(reason) => Poll::Ready(Broken::Reset(reason)),
        Err(error) => Poll::Ready(error.into()),
    }
}
