//! Waits for a peer's first TLS record, so that a peer that says nothing costs a socket and next to no memory.
//!
//! Before TLS: it decides nothing about what it read, and hands every byte on.

use std::io;

use bytes::BytesMut;
use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::life::limits;

/// Record header (RFC 8446 §5.1), the type of a handshake record, and the longest record.
const HEADER: usize = 5;
const HANDSHAKE: u8 = 22;
const RECORD: usize = (16 << 10) + 256;

/// What the first bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    /// So many bytes are missing at least.
    Incomplete(usize),
    /// One whole handshake record: TLS can begin.
    Record,
    /// No TLS, which TLS will say.
    Other,
}

fn first(bytes: &[u8]) -> First {
    match *bytes {
        [kind, ..] if kind != HANDSHAKE => First::Other,
        [_, _, _, high, low, ..] => {
            let length = HEADER + usize::from(u16::from_be_bytes([high, low]));
            match length.checked_sub(bytes.len()) {
                _ if length > RECORD => First::Other,
                None | Some(0) => First::Record,
                Some(missing) => First::Incomplete(missing),
            }
        }
        _ => First::Incomplete(HEADER - bytes.len()),
    }
}

/// Reads until the peer has sent what a handshake begins with. Whatever was read is in `bytes`.
///
/// # Errors
/// When the connection ends before.
pub(super) async fn hello(tcp: &mut TcpStream, bytes: &mut BytesMut) -> io::Result<()> {
    while let First::Incomplete(missing) = first(bytes) {
        if bytes.is_empty() {
            // Nothing is allocated for a peer that sends nothing.
            tcp.readable().await?;
        }
        bytes.reserve(missing.max(limits::HELLO));
        if tcp.read_buf(bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_complete_when_all_of_it_is_there() {
        let record = [&[22, 3, 1, 0, 10][..], &[1; 10]].concat();
        assert_eq!(first(&[]), First::Incomplete(5));
        for length in 1..5 {
            assert_eq!(first(&record[..length]), First::Incomplete(5 - length), "{length}");
        }
        for length in 5..15 {
            assert_eq!(first(&record[..length]), First::Incomplete(15 - length), "{length}");
        }
        assert_eq!(first(&record), First::Record);
        assert_eq!(first(&[&record[..], b"more"].concat()), First::Record);
        assert_eq!(first(b"GET / HTTP/1.1"), First::Other);
        assert_eq!(first(b"\x16\x03\x01\xff\xff"), First::Other);
        assert_eq!(first(&[22, 3, 1, 0, 0]), First::Record);
    }
}
