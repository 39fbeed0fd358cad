//! Frame → notation, for those who read what went wrong.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
};

use super::build::{checksum, named};
use crate::names::{Host, Mac};

/// Letters of TCP's flags, from the lowest bit on.
pub(super) const TCP_FLAGS: &str = "FSRPAUEC";

/// The notation of a frame: as far as it can be read, and bytes from there on.
/// What it says of lengths, header lengths and checksums that are not right
/// makes the same frame again.
pub fn decode(frame: &[u8]) -> String {
    let mut text = String::new();
    let Some((eth, rest)) = frame.split_at_checked(14) else {
        return format!("hex {}", hex(frame));
    };
    let mac = |bytes: &[u8]| {
        let mac: Mac = bytes.try_into().expect("six bytes");
        Host::with_mac(mac).map_or_else(|| mac.map(|b| format!("{b:02x}")).join(":"), Host::name)
    };
    put(&mut text, &format!("eth {} > {}", mac(&eth[6..12]), mac(&eth[..6])));
    let ethertype = be16(eth, 12);
    let read = match ethertype {
        0x0800 => ipv4(&mut text, rest),
        0x86dd => ipv6(&mut text, rest),
        _ => None,
    };
    if read.is_none() {
        put(&mut text, &format!(" type={ethertype:#06x}"));
        if !rest.is_empty() {
            put(&mut text, &format!(" / hex {}", hex(rest)));
        }
    }
    text
}

/// Writing into a string does not fail.
fn put(text: &mut String, more: &str) {
    text.push_str(more);
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn ipv4(text: &mut String, bytes: &[u8]) -> Option<()> {
    let ihl = usize::from(bytes.first()? & 0xf);
    if bytes[0] >> 4 != 4 || ihl < 5 || bytes.len() < ihl * 4 {
        return None;
    }
    let header = &bytes[..ihl * 4];
    let addr = |at: usize| named(Ipv4Addr::from(be32(header, at)).into());
    put(text, &format!(" / ip {} > {}", addr(12), addr(16)));
    let total = usize::from(be16(header, 2));
    // Bytes behind the packet are padding if there can be such.
    let (body, pad) = match bytes.len().checked_sub(total) {
        Some(_) if total >= header.len() => (&bytes[header.len()..total], &bytes[total..]),
        _ => {
            put(text, &format!(" len={total}"));
            (&bytes[header.len()..], &bytes[bytes.len()..])
        }
    };
    field(text, "ttl", header[8].into(), 64);
    field(text, "tos", header[1].into(), 0);
    field(text, "id", be16(header, 4).into(), 0);
    let fragment = be16(header, 6);
    field(text, "frag", u32::from(fragment & 0x1fff) * 8, 0);
    for (bit, word) in [(14, " df"), (13, " mf")] {
        if fragment & 1 << bit != 0 {
            put(text, word);
        }
    }
    if ihl > 5 {
        put(text, &format!(" options={}", hex(&header[20..])));
    }
    sum(text, checksum(&[header]), be16(header, 10));
    let mut pseudo = header[12..20].to_vec();
    pseudo.extend([0, header[9]]);
    pseudo.extend((body.len() as u16).to_be_bytes());
    transport(text, header[9], fragment & 0x1fff != 0, &pseudo, body, 253, "proto");
    padding(text, pad);
    Some(())
}

fn ipv6(text: &mut String, bytes: &[u8]) -> Option<()> {
    if bytes.len() < 40 || bytes[0] >> 4 != 6 {
        return None;
    }
    let header = &bytes[..40];
    let addr = |at: usize| {
        let octets: [u8; 16] = header[at..at + 16].try_into().expect("16 bytes");
        named(Ipv6Addr::from(octets).into())
    };
    put(text, &format!(" / ip6 {} > {}", addr(8), addr(24)));
    let length = usize::from(be16(header, 4));
    let (body, pad) = match bytes.get(40 + length..) {
        Some(pad) => (&bytes[40..40 + length], pad),
        None => {
            put(text, &format!(" len={length}"));
            (&bytes[40..], &bytes[bytes.len()..])
        }
    };
    field(text, "hop", header[7].into(), 64);
    field(text, "class", be32(header, 0) >> 20 & 0xff, 0);
    field(text, "flow", be32(header, 0) & 0xf_ffff, 0);
    let mut pseudo = header[8..40].to_vec();
    pseudo.extend([0, header[6]]);
    pseudo.extend((body.len() as u16).to_be_bytes());
    transport(text, header[6], false, &pseudo, body, 59, "next");
    padding(text, pad);
    Some(())
}

/// The transport header and what it carries.
fn transport(
    text: &mut String,
    protocol: u8,
    fragment: bool,
    pseudo: &[u8],
    body: &[u8],
    none: u8,
    key: &str,
) {
    // A packet in a packet, as far as it can be read; else its bytes.
    let nested = match protocol {
        4 if !fragment => ipv4(text, body),
        41 if !fragment => ipv6(text, body),
        _ => None,
    };
    if nested.is_some() {
        return;
    }
    let read = match protocol {
        _ if fragment => None,
        6 => tcp(text, pseudo, body),
        17 => udp(text, pseudo, body),
        _ => None,
    };
    let payload = read.unwrap_or_else(|| {
        if protocol != none {
            put(text, &format!(" {key}={protocol}"));
        }
        body
    });
    if payload.is_empty() {
        return;
    }
    let plain = payload.iter().all(|b| (0x20..0x7f).contains(b) && *b != b'"');
    match std::str::from_utf8(payload) {
        Ok(words) if plain => put(text, &format!(" / \"{words}\"")),
        _ => put(text, &format!(" / hex {}", hex(payload))),
    }
}

fn tcp<'a>(text: &mut String, pseudo: &[u8], body: &'a [u8]) -> Option<&'a [u8]> {
    if body.len() < 20 {
        return None;
    }
    let flags: String = TCP_FLAGS
        .chars()
        .enumerate()
        .filter(|(bit, _)| body[13] & 1 << bit != 0)
        .map(|(_, letter)| letter)
        .collect();
    let flags = if flags.is_empty() { "-" } else { &flags };
    put(text, &format!(" / tcp {} > {} {flags}", be16(body, 0), be16(body, 2)));
    put(text, &format!(" seq={}", be32(body, 4)));
    field(text, "ack", be32(body, 8), 0);
    field(text, "win", be16(body, 14).into(), 65_535);
    field(text, "urg", be16(body, 18).into(), 0);
    let offset = usize::from(body[12] >> 4);
    let header_bytes = match offset * 4 {
        fits if (20..=body.len()).contains(&fits) => fits,
        _ => {
            put(text, &format!(" offset={offset}"));
            20
        }
    };
    if header_bytes > 20 {
        put(text, &format!(" options={}", hex(&body[20..header_bytes])));
    }
    sum(text, checksum(&[pseudo, body]), be16(body, 16));
    Some(&body[header_bytes..])
}

fn udp<'a>(text: &mut String, pseudo: &[u8], body: &'a [u8]) -> Option<&'a [u8]> {
    if body.len() < 8 {
        return None;
    }
    put(text, &format!(" / udp {} > {}", be16(body, 0), be16(body, 2)));
    field(text, "len", be16(body, 4).into(), body.len() as u32);
    match be16(body, 6) {
        0 => put(text, " csum=0"),
        // Ones stand for a sum of zero (RFC 768).
        stored => sum(text, checksum(&[pseudo, body]), stored),
    }
    Some(&body[8..])
}

fn field(text: &mut String, key: &str, value: u32, default: u32) {
    if value != default {
        put(text, &format!(" {key}={value}"));
    }
}

/// Says what stands in a checksum field if `left`, the sum over all with the field in it, is not
/// zero.
fn sum(text: &mut String, left: u16, stored: u16) {
    if left != 0 {
        put(text, &format!(" csum={stored:#06x}"));
    }
}

fn padding(text: &mut String, pad: &[u8]) {
    if !pad.is_empty() {
        put(text, &format!(" / pad {}", pad.len()));
    }
}

/// Bytes as a row of digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut row, b| {
        _ = write!(row, "{b:02x}");
        row
    })
}

/// Two frames in rows of 16 bytes, with a mark under each byte that differs.
pub fn hex_difference(expected: &[u8], seen: &[u8]) -> String {
    let mut text = String::new();
    let length = expected.len().max(seen.len());
    for at in (0..length).step_by(16) {
        let row = |bytes: &[u8]| -> String {
            let cell = |i| bytes.get(i).map_or_else(|| "   ".to_owned(), |b| format!("{b:02x} "));
            (at..length.min(at + 16)).map(cell).collect()
        };
        let marks: String = (at..length.min(at + 16))
            .map(|i| if expected.get(i) == seen.get(i) { "   " } else { "^^ " })
            .collect();
        _ = writeln!(text, "  {at:04x} expected {}", row(expected).trim_end());
        if marks.trim().is_empty() {
            continue;
        }
        _ = writeln!(text, "       seen     {}", row(seen).trim_end());
        _ = writeln!(text, "                {}", marks.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    const PACKETS: [&str; 11] = [
        r#"eth client > us / ip client > vip / tcp 40000 > 80 S seq=1000 / "hello""#,
        "eth client > us / ip 10.77.0.1 > vip ttl=3 tos=1 id=77 df options=01010100 / tcp 1 > 2 FSRPAUEC seq=4000000000 ack=1 win=2 urg=3 options=02040108 / hex 00ff",
        "eth gw > b2 / ip6 client > vip hop=9 class=3 flow=7 / udp 40000 > 80 / \"a\"",
        "eth gw > 02:03:04:05:06:07 / ip client > vip / udp 1 > 2 csum=0 / pad 9",
        "eth gw > us / ip client > vip csum=0x0001 / udp 1 > 2 csum=0x0001",
        "eth gw > us / ip client > vip mf / udp 1 > 2 len=99 csum=0x0002 / \"x\"",
        "eth gw > us / ip client > vip frag=16 mf proto=6 / \"some bytes of a later fragment\"",
        "eth gw > us / ip client > vip len=99 / tcp 1 > 2 - seq=1 offset=4",
        "eth gw > us / ip6 client > vip len=99 / tcp 1 > 2 - seq=1 offset=15",
        "eth gw > us / ip6 client > vip next=0 / hex 0600000000000000",
        "eth gw > all type=0x0806 / hex 0001",
    ];

    #[test]
    fn a_frame_decodes_to_the_notation_that_made_it() {
        for text in PACKETS {
            assert_eq!(decode(&parse(text).unwrap()), text);
        }
    }

    #[test]
    fn checksums_and_lengths_are_those_of_an_independent_builder() {
        let mut theirs = Vec::new();
        let builder = etherparse::PacketBuilder::ethernet2(Host::Client(1).mac(), Host::Us.mac());
        builder
            .ipv4(Host::Client(1).v4().octets(), Host::Vip(1).v4().octets(), 64)
            .udp(40_000, 80)
            .write(&mut theirs, b"odd")
            .unwrap();
        // Theirs sets "don't fragment".
        let ours =
            parse("eth client > us / ip client > vip df / udp 40000 > 80 / \"odd\"").unwrap();
        assert_eq!(hex(&ours), hex(&theirs));
        let mut theirs = Vec::new();
        let builder = etherparse::PacketBuilder::ethernet2(Host::Client(1).mac(), Host::Us.mac());
        builder
            .ipv6(Host::Client(1).v6().octets(), Host::Vip(1).v6().octets(), 64)
            .tcp(40_000, 80, 7, 65_535)
            .syn()
            .write(&mut theirs, b"odd")
            .unwrap();
        let ours = parse("eth client > us / ip6 client > vip / tcp 40000 > 80 S seq=7 / \"odd\"");
        assert_eq!(hex(&ours.unwrap()), hex(&theirs));
    }

    #[test]
    fn what_is_not_well_written_is_refused_with_the_place() {
        for (text, needle) in [
            ("eth client > us / ip nobody > vip", "`nobody` is no IPv4 address"),
            ("eth client > us / ip client > vip colour=3 / tcp 1 > 2 S", "colour=3"),
            ("eth client > us / ip client > vip / tcp 1 > 2 Z", "no TCP flags"),
            ("eth client > us / ip client > vip / tcp $p > 2 S", "placeholder"),
            ("eth client > us / spam", "no layer"),
            ("eth client us", "source and destination"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(needle), "{text}: {error}");
            assert!(error.contains("in layer"), "{text}: {error}");
        }
    }
}
