//! TCP segments made by hand, as only a raw socket sends them.

use std::net::{IpAddr, SocketAddr};

/// What a segment says (RFC 9293 §3.1), beside its addresses.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    pub sequence: u32,
    pub acknowledgement: u32,
    /// Bits of SYN, ACK, PSH, RST.
    pub flags: u8,
    pub payload: &'a [u8],
}

pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;

impl Segment<'_> {
    pub const SYN: Segment<'static> = Segment { sequence: 0, acknowledgement: 0, flags: SYN, payload: &[] };

    /// The whole packet: an IPv4 header, whose checksum the kernel fills in, or an IPv6 one; both addresses must be of one
    /// family.
    pub fn packet(&self, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(20 + self.payload.len());
        tcp.extend_from_slice(&from.port().to_be_bytes());
        tcp.extend_from_slice(&to.port().to_be_bytes());
        tcp.extend_from_slice(&self.sequence.to_be_bytes());
        tcp.extend_from_slice(&self.acknowledgement.to_be_bytes());
        // 5 words of header; flags; window; checksum to come; no urgent data.
        tcp.extend_from_slice(&[5 << 4, self.flags, 0xfa, 0xf0, 0, 0, 0, 0]);
        tcp.extend_from_slice(self.payload);
        let length = u16::try_from(tcp.len()).unwrap_or(u16::MAX).to_be_bytes();
        let (mut pseudo, mut packet) = match (from.ip(), to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let addresses = [from.octets(), to.octets()].concat();
                let whole = u16::try_from(20 + tcp.len()).unwrap_or(u16::MAX).to_be_bytes();
                let mut header = vec![0x45, 0, whole[0], whole[1], 0, 0, 0x40, 0, 64, 6, 0, 0];
                header.extend_from_slice(&addresses);
                ([addresses, vec![0, 6, length[0], length[1]]].concat(), header)
            }
            (from, to) => {
                let six = |address: IpAddr| match address {
                    IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
                    IpAddr::V6(address) => address.octets(),
                };
                let addresses = [six(from), six(to)].concat();
                let mut header = vec![0x60, 0, 0, 0, length[0], length[1], 6, 64];
                header.extend_from_slice(&addresses);
                ([addresses, vec![0, 0, length[0], length[1], 0, 0, 0, 6]].concat(), header)
            }
        };
        pseudo.extend_from_slice(&tcp);
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
        packet.append(&mut tcp);
        packet
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits")]
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::{Segment, checksum};

    #[test]
    fn a_checksum_over_the_whole_is_zero() -> anyhow::Result<()> {
        let segment = Segment { payload: b"odd", ..Segment::SYN };
        for (from, to, header) in [("10.0.0.1:5", "10.0.0.2:6", 20), ("[fd00::1]:5", "[fd00::2]:6", 40)] {
            let packet = segment.packet(from.parse()?, to.parse()?);
            let (ip, tcp) = packet.split_at(header);
            let addresses = if header == 20 { &ip[12..20] } else { &ip[8..40] };
            let pseudo = [addresses, &[0, 6, 0, 23], tcp].concat();
            assert_eq!((tcp.len(), checksum(&pseudo)), (23, 0), "{from}");
        }
        Ok(())
    }
}
