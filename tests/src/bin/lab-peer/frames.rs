//! HTTP/2 frames by hand (RFC 9113 §4, RFC 7541): what no library would send.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a client says first (RFC 9113 §3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
/// A type that no extension uses.
pub const UNKNOWN: u8 = 0xfe;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub const CANCEL: [u8; 4] = 8_u32.to_be_bytes();

/// Appends one frame.
pub fn frame(into: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    into.extend_from_slice(&length[1..]);
    into.extend_from_slice(&[kind, flags]);
    into.extend_from_slice(&stream.to_be_bytes());
    into.extend_from_slice(payload);
}

/// One entry of SETTINGS.
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    [id.to_be_bytes().as_slice(), &value.to_be_bytes()].concat()
}

/// An integer with a prefix of `bits` (RFC 7541 §5.1); `first` holds the bits above the prefix.
fn integer(into: &mut Vec<u8>, first: u8, bits: u32, mut value: usize) {
    let limit = (1_usize << bits) - 1;
    #[expect(clippy::cast_possible_truncation, reason = "smaller than a byte")]
    if value < limit {
        into.push(first | value as u8);
    } else {
        into.push(first | limit as u8);
        value -= limit;
        while value >= 128 {
            into.push((value % 128) as u8 | 128);
            value /= 128;
        }
        into.push(value as u8);
    }
}

fn text(into: &mut Vec<u8>, text: &[u8]) {
    integer(into, 0, 7, text.len());
    into.extend_from_slice(text);
}

/// A literal field with a literal name, not indexed (RFC 7541 §6.2.2), or remembered in the dynamic table (§6.2.1).
pub fn literal(into: &mut Vec<u8>, name: &str, value: &[u8], remember: bool) {
    into.push(if remember { 0x40 } else { 0 });
    text(into, name.as_bytes());
    text(into, value);
}

/// A header block of literals.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        literal(&mut block, name, value.as_bytes(), false);
    }
    block
}

/// A frame that came.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// Reads one frame.
pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    from.read_exact(&mut head).await?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let mut payload = vec![0; length];
    from.read_exact(&mut payload).await?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & !(1 << 31);
    Ok(Frame { kind: head[3], stream, payload })
}

/// The `:status` that a response's header block begins with: from the static table, or as a literal.
pub fn status(mut block: &[u8]) -> Option<u16> {
    const INDEXED: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    // Changes of the table's size come first (RFC 7541 §6.3).
    while let [0x20..=0x3f, rest @ ..] = block {
        block = rest;
    }
    let (first, rest) = block.split_first()?;
    if let 0x88..=0x8e = first {
        return INDEXED.get(usize::from(first - 0x88)).copied();
    }
    // A literal whose name is one of the static table's `:status` (8 to 14).
    if !matches!(first, 0x48..=0x4e | 0x08..=0x0e | 0x18..=0x1e) {
        return None;
    }
    let (length, rest) = rest.split_first()?;
    let value = rest.get(..usize::from(length & 0x7f))?;
    let digits = if length & 0x80 == 0 { String::from_utf8_lossy(value).into_owned() } else { huffman_digits(value) };
    digits.parse().ok().filter(|status| (100..1_000).contains(status))
}

/// Digits of RFC 7541's Huffman code (appendix B): 0 to 2 have five bits, 3 to 9 six.
fn huffman_digits(coded: &[u8]) -> String {
    let bits: Vec<u8> = coded.iter().flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1)).collect();
    let number = |bits: &[u8]| bits.iter().fold(0_u8, |number, bit| number << 1 | bit);
    let (mut rest, mut digits) = (bits.as_slice(), String::new());
    loop {
        match (rest.get(..5).map(number), rest.get(..6).map(number)) {
            (Some(code @ 0..=2), _) => {
                digits.push(char::from(b'0' + code));
                rest = &rest[5..];
            }
            (_, Some(code @ 0x19..=0x1f)) => {
                digits.push(char::from(b'3' + code - 0x19));
                rest = &rest[6..];
            }
            _ => return digits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::status;

    #[test]
    fn a_status_is_read_however_it_is_coded() {
        assert_eq!(status(&[0x88]), Some(200));
        assert_eq!(status(&[0x20, 0x8c]), Some(400));
        assert_eq!(status(&[0x48, 3, b'4', b'0', b'1']), Some(401));
        // 401 by Huffman: 011010 00000 00001, filled with ones.
        assert_eq!(status(&[0x48, 0x82, 0b0110_1000, 0b0000_0001]), Some(401));
        assert_eq!(status(&[0x48, 3, b'4']), None);
        assert_eq!(status(&[0x10, 1, b'x', 1, b'y']), None);
        assert_eq!(status(&[]), None);
    }
}
