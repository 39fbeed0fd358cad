//! Notation → frame.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, bail, ensure};

use super::Context;
use crate::names::{Host, Mac};

/// The frame that `text` stands for.
///
/// # Errors
/// When it is not well written, or a placeholder can't be bound.
pub fn frame(text: &str, context: &mut Context<'_>) -> Result<Vec<u8>> {
    let layers = split(text);
    let mut builder = Builder { bytes: Vec::new(), placed: Vec::new(), context };
    let mut end = None;
    for (i, layer) in layers.iter().enumerate() {
        let next = layers.get(i + 1).map(|l| kind(l));
        builder
            .layer(layer, next.unwrap_or_default(), &mut end)
            .with_context(|| format!("in layer `{layer}`"))?;
    }
    let end = end.unwrap_or(builder.bytes.len());
    builder.finish(end.min(builder.bytes.len()))?;
    Ok(builder.bytes)
}

/// The Internet checksum (RFC 1071) of some pieces, all but the last of even length.
pub fn checksum(pieces: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for piece in pieces {
        for pair in piece.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The layers of a packet: parts between ` / ` outside quotes.
fn split(text: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut quoted = false;
    for c in text.chars() {
        match c {
            '/' if !quoted => layers.push(String::new()),
            _ => {
                quoted ^= c == '"';
                layers.last_mut().expect("never empty").push(c);
            }
        }
    }
    layers.iter().map(|l| l.trim().to_owned()).collect()
}

fn kind(layer: &str) -> &str {
    if layer.starts_with('"') { "text" } else { layer.split_whitespace().next().unwrap_or("") }
}

/// What announces a layer behind an Ethernet header or a tag.
fn ethertype(next: &str) -> u32 {
    match next {
        "ip" => 0x0800,
        "ip6" => 0x86dd,
        "vlan" => 0x8100,
        "svlan" => 0x88a8,
        // For local experiments (IEEE 802).
        _ => 0x88b5,
    }
}

/// What announces a layer behind an IPv6 header or an extension header.
fn next_header(next: &str) -> u32 {
    match next {
        "tcp" => 6,
        "udp" => 17,
        "icmp6" => 58,
        "ip" => 4,
        "ip6" => 41,
        "hbh" => 0,
        "route" => 43,
        "frag" => 44,
        "auth" => 51,
        "dst" => 60,
        _ => 59,
    }
}

/// A number, decimal or hexadecimal.
pub(super) fn number(text: &str) -> Result<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .with_context(|| format!("`{text}` is no number"))
}

fn from_hex(text: &str) -> Result<Vec<u8>> {
    let digits: String = text.chars().filter(|c| !c.is_whitespace() && *c != ':').collect();
    ensure!(digits.is_ascii() && digits.len().is_multiple_of(2), "`{text}` is no row of bytes");
    (0..digits.len())
        .step_by(2)
        .map(|i| {
            u8::from_str_radix(&digits[i..i + 2], 16)
                .with_context(|| format!("`{text}` is no row of bytes"))
        })
        .collect()
}

/// A variable-length integer in so many bytes (RFC 9000, 16).
fn varint(value: usize, bytes: u32) -> Result<Vec<u8>> {
    let prefix = match bytes {
        1 | 2 | 4 | 8 => u64::from(bytes.trailing_zeros()) << (8 * bytes - 2),
        _ => bail!("an integer has 1, 2, 4 or 8 bytes"),
    };
    ensure!((value as u64) < 1 << (8 * bytes - 2), "{value} needs more than {bytes} bytes");
    Ok((prefix | value as u64).to_be_bytes()[8 - bytes as usize..].to_vec())
}

/// `key=value` and bare words of a layer.
struct Fields<'a> {
    words: Vec<&'a str>,
}

impl<'a> Fields<'a> {
    fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self
            .words
            .iter()
            .position(|w| w.strip_prefix(key).is_some_and(|rest| rest.starts_with('=')))?;
        Some(&self.words.remove(at)[key.len() + 1..])
    }

    fn number(&mut self, key: &str, default: u32) -> Result<u32> {
        self.take(key).map_or(Ok(default), number)
    }

    fn flag(&mut self, word: &str) -> bool {
        let at = self.words.iter().position(|w| *w == word);
        at.is_some_and(|at| {
            self.words.remove(at);
            true
        })
    }

    fn bytes(&mut self, key: &str) -> Result<Vec<u8>> {
        self.take(key).map_or(Ok(Vec::new()), from_hex)
    }

    fn empty(&self) -> Result<()> {
        ensure!(self.words.is_empty(), "`{}` means nothing here", self.words.join(" "));
        Ok(())
    }
}

/// A field that is right by default.
#[derive(Clone, Copy)]
enum Field {
    Right,
    Off(i32),
    Fixed(u16),
    Bad,
}

impl Field {
    fn read(text: Option<&str>) -> Result<Self> {
        Ok(match text {
            None => Self::Right,
            Some("bad") => Self::Bad,
            Some(t) if t.starts_with(['+', '-']) => Self::Off(t.parse()?),
            Some(t) => Self::Fixed(u16::try_from(number(t)?)?),
        })
    }

    /// The field's value where `right` is the right one.
    fn value(self, right: u16) -> u16 {
        match self {
            Self::Right => right,
            Self::Off(by) => (i32::from(right) + by) as u16,
            Self::Fixed(value) => value,
            // One more in one's complement: an incremental update keeps it wrong by as much.
            Self::Bad => right.checked_add(1).unwrap_or(1),
        }
    }
}

/// A header that waits for its length and checksum.
#[derive(Clone, Copy)]
struct Placed {
    kind: &'static str,
    start: usize,
    header_bytes: usize,
    len: Field,
    csum: Field,
}

struct Builder<'a, 'b> {
    bytes: Vec<u8>,
    placed: Vec<Placed>,
    context: &'a mut Context<'b>,
}

impl Builder<'_, '_> {
    fn layer(&mut self, layer: &str, next: &str, end: &mut Option<usize>) -> Result<()> {
        let mut fields = Fields { words: layer.split_whitespace().skip(1).collect() };
        let rest = || layer.split_once(' ').map_or("", |(_, rest)| rest);
        match kind(layer) {
            "text" => {
                let text = layer.strip_suffix('"').context("the text has no end")?;
                self.bytes.extend(&text.as_bytes()[1..]);
                return Ok(());
            }
            "hex" => {
                self.bytes.extend(from_hex(rest())?);
                return Ok(());
            }
            "zeros" => {
                self.bytes.extend(vec![0; number(rest())? as usize]);
                return Ok(());
            }
            "pad" => {
                end.get_or_insert(self.bytes.len());
                self.bytes.extend(vec![0; number(rest())? as usize]);
                return Ok(());
            }
            "cut" => {
                let end = end.unwrap_or(self.bytes.len());
                self.finish(end)?;
                self.placed.clear();
                let to = number(rest())? as usize;
                ensure!(to <= self.bytes.len(), "the frame has {} bytes", self.bytes.len());
                self.bytes.truncate(to);
                return Ok(());
            }
            "same" => {
                let input = self.context.input.context("there is no packet to be the same as")?;
                let from = self.bytes.len();
                self.bytes.extend(input.get(from..).context("longer than the packet")?);
                return Ok(());
            }
            "quoted" => {
                let input = self.context.input.context("there is no packet to quote")?;
                let bytes = input.get(14..14 + number(rest())? as usize);
                self.bytes.extend(bytes.context("longer than the packet")?);
                return Ok(());
            }
            "eth" => self.eth(&mut fields, next)?,
            "vlan" | "svlan" => self.tag(&mut fields, next)?,
            "hbh" | "dst" | "route" | "auth" | "frag" => {
                self.extension(kind(layer), &mut fields, next)?;
            }
            "ip" => self.ip(&mut fields, next)?,
            "ip6" => self.ip6(&mut fields, next)?,
            "tcp" => self.tcp(&mut fields)?,
            "udp" => self.udp(&mut fields)?,
            "quic" => self.quic(&mut fields)?,
            "icmp" | "icmp6" => self.icmp(kind(layer) == "icmp6", &mut fields)?,
            other => bail!("`{other}` is no layer"),
        }
        fields.empty()
    }

    /// Bytes of the packet that was seen, at the place that is written next and `skip` further.
    fn seen<const N: usize>(&self, skip: usize) -> Result<[u8; N]> {
        let at = self.bytes.len() + skip;
        let seen = self.context.seen.and_then(|s| s.get(at..at + N));
        let seen = seen.context("nothing was seen that the placeholder could stand for")?;
        Ok(seen.try_into().expect("the slice is N long"))
    }

    /// The two sides of `A > B`.
    fn sides<'a>(&self, fields: &mut Fields<'a>) -> Result<[&'a str; 2]> {
        ensure!(
            fields.words.len() >= 3 && fields.words[1] == ">",
            "source and destination are missing"
        );
        let sides = [fields.words[0], fields.words[2]];
        fields.words.drain(..3);
        Ok(sides)
    }

    /// The host behind a placeholder, or `None` if `text` is not one.
    fn placeholder(
        &mut self,
        text: &str,
        seen: impl FnOnce(&Self) -> Result<Option<Host>>,
    ) -> Result<Option<Host>> {
        let Some(name) = text.strip_prefix('$') else { return Ok(Host::named(text)) };
        if let Some(host) = self.context.bound.hosts.get(name) {
            return Ok(Some(*host));
        }
        let host = seen(self)?.with_context(|| format!("what was seen for {text} is nobody's"))?;
        self.context.bound.hosts.insert(name.to_owned(), host);
        Ok(Some(host))
    }

    fn mac(&mut self, text: &str, skip: usize) -> Result<Mac> {
        if let Some(host) = self.placeholder(text, |b| Ok(Host::with_mac(b.seen(skip)?)))? {
            return Ok(host.mac());
        }
        from_hex(text)?.try_into().map_err(|_| anyhow::anyhow!("`{text}` is no MAC address"))
    }

    fn v4(&mut self, text: &str, skip: usize) -> Result<Ipv4Addr> {
        let seen = |b: &Self| Ok(Host::with_addr(Ipv4Addr::from(b.seen::<4>(skip)?).into()));
        match self.placeholder(text, seen)? {
            Some(host) => Ok(host.v4()),
            None => text.parse().with_context(|| format!("`{text}` is no IPv4 address")),
        }
    }

    fn v6(&mut self, text: &str, skip: usize) -> Result<Ipv6Addr> {
        let seen = |b: &Self| Ok(Host::with_addr(Ipv6Addr::from(b.seen::<16>(skip)?).into()));
        match self.placeholder(text, seen)? {
            Some(host) => Ok(host.v6()),
            None => text.parse().with_context(|| format!("`{text}` is no IPv6 address")),
        }
    }

    fn port(&mut self, text: &str, skip: usize) -> Result<u16> {
        let Some(name) = text.strip_prefix('$') else { return Ok(u16::try_from(number(text)?)?) };
        if let Some(port) = self.context.bound.ports.get(name) {
            return Ok(*port);
        }
        let port = u16::from_be_bytes(self.seen(skip)?);
        self.context.bound.ports.insert(name.to_owned(), port);
        Ok(port)
    }

    /// The flow label of the IPv6 header that comes next.
    fn label(&mut self, fields: &mut Fields<'_>) -> Result<u32> {
        let Some(text) = fields.take("flow") else { return Ok(0) };
        let Some(name) = text.strip_prefix('$') else { return number(text) };
        if let Some(label) = self.context.bound.labels.get(name) {
            return Ok(*label);
        }
        let label = u32::from_be_bytes(self.seen(0)?) & 0xf_ffff;
        self.context.bound.labels.insert(name.to_owned(), label);
        Ok(label)
    }

    fn eth(&mut self, fields: &mut Fields<'_>, next: &str) -> Result<()> {
        let [from, to] = self.sides(fields)?;
        let (to, from) = (self.mac(to, 0)?, self.mac(from, 6)?);
        // After `same` the type is the input's.
        if next == "same" {
            self.bytes.extend(to);
            self.bytes.extend(from);
            return Ok(());
        }
        let ethertype = fields.number("type", ethertype(next))? as u16;
        self.bytes.extend(to);
        self.bytes.extend(from);
        self.bytes.extend(ethertype.to_be_bytes());
        Ok(())
    }

    fn ip(&mut self, fields: &mut Fields<'_>, next: &str) -> Result<()> {
        let [from, to] = self.sides(fields)?;
        let (src, dst) = (self.v4(from, 12)?, self.v4(to, 16)?);
        let mut options = fields.bytes("options")?;
        options.resize(options.len().next_multiple_of(4), 0);
        let protocol = match next {
            "tcp" => 6,
            "udp" => 17,
            "icmp" => 1,
            "ip" => 4,
            "ip6" => 41,
            _ => 253,
        };
        let header_bytes = 20 + options.len();
        let version = fields.number("version", 4)? as u8;
        let ihl = fields.number("ihl", header_bytes as u32 / 4)? as u8;
        let frag = fields.number("frag", 0)?;
        ensure!(frag % 8 == 0, "a fragment starts at a multiple of 8 bytes");
        let mut flags = (frag / 8) as u16;
        flags |= u16::from(fields.flag("df")) << 14 | u16::from(fields.flag("mf")) << 13;
        let start = self.bytes.len();
        self.bytes.extend([version << 4 | ihl, fields.number("tos", 0)? as u8, 0, 0]);
        self.bytes.extend((fields.number("id", 0)? as u16).to_be_bytes());
        self.bytes.extend(flags.to_be_bytes());
        let ttl = fields.number("ttl", 64)? as u8;
        self.bytes.extend([ttl, fields.number("proto", protocol)? as u8, 0, 0]);
        self.bytes.extend(src.octets());
        self.bytes.extend(dst.octets());
        self.bytes.extend(options);
        self.place("ip", start, header_bytes, fields)
    }

    fn ip6(&mut self, fields: &mut Fields<'_>, next: &str) -> Result<()> {
        let [from, to] = self.sides(fields)?;
        let (src, dst) = (self.v6(from, 8)?, self.v6(to, 24)?);
        let start = self.bytes.len();
        let first = fields.number("version", 6)? << 28
            | fields.number("class", 0)? << 20
            | self.label(fields)?;
        self.bytes.extend(first.to_be_bytes());
        self.bytes.extend([0, 0, fields.number("next", next_header(next))? as u8]);
        self.bytes.push(match fields.take("ttl") {
            Some(ttl) => number(ttl),
            None => fields.number("hop", 64),
        }? as u8);
        self.bytes.extend(src.octets());
        self.bytes.extend(dst.octets());
        self.place("ip6", start, 40, fields)
    }

    /// A VLAN tag behind the EtherType that announces it.
    fn tag(&mut self, fields: &mut Fields<'_>, next: &str) -> Result<()> {
        ensure!(!fields.words.is_empty(), "the VLAN is missing");
        let id = number(fields.words.remove(0))?;
        let tci = fields.number("pcp", 0)? << 13 | u32::from(fields.flag("dei")) << 12 | id;
        self.bytes.extend((tci as u16).to_be_bytes());
        self.bytes.extend((fields.number("type", ethertype(next))? as u16).to_be_bytes());
        Ok(())
    }

    /// An IPv6 extension header of so many bytes.
    fn extension(&mut self, kind: &str, fields: &mut Fields<'_>, next: &str) -> Result<()> {
        self.bytes.push(fields.number("next", next_header(next))? as u8);
        if kind == "frag" {
            let offset = fields.number("at", 0)?;
            ensure!(offset % 8 == 0, "a fragment starts at a multiple of 8 bytes");
            self.bytes.push(0);
            self.bytes.extend((offset as u16 | u16::from(fields.flag("mf"))).to_be_bytes());
            self.bytes.extend(fields.number("id", 0)?.to_be_bytes());
            return Ok(());
        }
        let bytes = fields.number("bytes", 8)? as usize;
        let units = if kind == "auth" { bytes / 4 - 2 } else { bytes / 8 - 1 };
        self.bytes.push(fields.number("len", units as u32)? as u8);
        let end = self.bytes.len() + bytes - 2;
        self.bytes.extend([0, fields.number("left", 0)? as u8]);
        self.bytes.resize(end, 0);
        Ok(())
    }

    fn tcp(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        let [from, to] = self.sides(fields)?;
        let (from, to) = (self.port(from, 0)?, self.port(to, 2)?);
        ensure!(!fields.words.is_empty(), "the flags are missing");
        let letters = fields.words.remove(0);
        let mut flags = 0_u8;
        for letter in letters.chars().filter(|l| *l != '-') {
            let bit = super::decode::TCP_FLAGS.find(letter);
            flags |= 1 << bit.with_context(|| format!("`{letters}` are no TCP flags"))?;
        }
        let mut options = fields.bytes("options")?;
        options.resize(options.len().next_multiple_of(4), 0);
        let header_bytes = 20 + options.len();
        let start = self.bytes.len();
        self.bytes.extend(from.to_be_bytes());
        self.bytes.extend(to.to_be_bytes());
        self.bytes.extend(fields.number("seq", 1000)?.to_be_bytes());
        if fields.flag("short") {
            return Ok(());
        }
        self.bytes.extend(fields.number("ack", 0)?.to_be_bytes());
        self.bytes.push((fields.number("offset", header_bytes as u32 / 4)? << 4) as u8);
        self.bytes.push(flags);
        self.bytes.extend((fields.number("win", 65_535)? as u16).to_be_bytes());
        self.bytes.extend([0, 0]);
        self.bytes.extend((fields.number("urg", 0)? as u16).to_be_bytes());
        self.bytes.extend(options);
        self.place("tcp", start, header_bytes, fields)
    }

    fn udp(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        let [from, to] = self.sides(fields)?;
        let (from, to) = (self.port(from, 0)?, self.port(to, 2)?);
        let start = self.bytes.len();
        self.bytes.extend(from.to_be_bytes());
        self.bytes.extend(to.to_be_bytes());
        self.bytes.extend([0; 4]);
        self.place("udp", start, 8, fields)
    }

    /// A QUIC packet (RFC 9000, 17; RFC 9369, 3.2). Its payload, and the packet number in it, are
    /// zeros: nothing on the way can read them.
    fn quic(&mut self, fields: &mut Fields<'_>) -> Result<()> {
        ensure!(!fields.words.is_empty(), "the type is missing");
        let word = fields.words.remove(0);
        let fixed = if fields.flag("greased") { 0 } else { 0x40 };
        let version = fields.number("version", 1)?;
        let (dcid, scid) = (fields.bytes("dcid")?, fields.bytes("scid")?);
        let dcid_bytes = fields.number("dcidlen", dcid.len() as u32)? as u8;
        let token = fields.bytes("token")?;
        let width = fields.number("width", 2)?;
        let datagram = self.placed.iter().rfind(|p| p.kind == "udp");
        let start = datagram.context("QUIC is in UDP")?.start + 8;
        let kind = match word {
            "initial" => Some(0),
            "0rtt" => Some(1),
            "handshake" => Some(2),
            "retry" => Some(3),
            "short" => None,
            _ => bail!("`{word}` is no type of a QUIC packet"),
        };
        let to = start + fields.number("to", if word == "initial" { 1200 } else { 60 })? as usize;
        let Some(kind) = kind else {
            self.bytes.push(fixed);
            self.bytes.extend(dcid);
            ensure!(to >= self.bytes.len(), "longer than it is to be");
            self.bytes.resize(to, 0);
            return Ok(());
        };
        let shift = if version == 0x6b33_43cf { 1 } else { 0 };
        self.bytes.push(0x80 | fixed | ((kind + shift) & 3) << 4);
        self.bytes.extend(version.to_be_bytes());
        self.bytes.push(dcid_bytes);
        self.bytes.extend(dcid);
        self.bytes.push(fields.number("scidlen", scid.len() as u32)? as u8);
        self.bytes.extend(scid);
        if kind == 0 {
            self.bytes.extend(varint(token.len(), width)?);
            self.bytes.extend(token);
        }
        let rest = to.checked_sub(self.bytes.len() + width as usize);
        self.bytes.extend(varint(rest.context("longer than it is to be")?, width)?);
        self.bytes.resize(to, 0);
        Ok(())
    }

    fn icmp(&mut self, v6: bool, fields: &mut Fields<'_>) -> Result<()> {
        let start = self.bytes.len();
        let kind = match (fields.take("type").unwrap_or("echo"), v6) {
            ("echo", false) => 8,
            ("echo", true) => 128,
            ("reply", false) => 0,
            ("reply", true) => 129,
            ("unreachable" | "toobig", false) => 3,
            ("unreachable", true) => 1,
            ("toobig", true) => 2,
            ("exceeded", false) => 11,
            ("exceeded", true) => 3,
            ("parameter", false) => 12,
            ("parameter", true) => 4,
            (other, _) => number(other)? as u8,
        };
        let code = fields.number("code", 0)? as u8;
        self.bytes.extend([kind, code, 0, 0]);
        self.bytes.extend(fields.number("rest", 0)?.to_be_bytes());
        self.place(if v6 { "icmp6" } else { "icmp" }, start, 8, fields)
    }

    fn place(
        &mut self,
        kind: &'static str,
        start: usize,
        header_bytes: usize,
        fields: &mut Fields<'_>,
    ) -> Result<()> {
        let (len, csum) = (Field::read(fields.take("len"))?, Field::read(fields.take("csum"))?);
        self.placed.push(Placed { kind, start, header_bytes, len, csum });
        Ok(())
    }

    /// Fills in lengths and checksums, from the inside out; the IP packet ends at `end`.
    fn finish(&mut self, end: usize) -> Result<()> {
        for i in (0..self.placed.len()).rev() {
            let Placed { kind, start, header_bytes, len, csum } = self.placed[i];
            let length = u16::try_from(end - start).context("longer than 65,535 bytes")?;
            let mut put = |at: usize, value: u16| {
                self.bytes[start + at..start + at + 2].copy_from_slice(&value.to_be_bytes());
            };
            match kind {
                "ip" => {
                    put(2, len.value(length));
                    let right = checksum(&[&self.bytes[start..start + header_bytes]]);
                    self.bytes[start + 10..start + 12]
                        .copy_from_slice(&csum.value(right).to_be_bytes());
                }
                "ip6" => put(4, len.value(length - 40)),
                _ => {
                    let at = match kind {
                        "tcp" => 16,
                        "udp" => 6,
                        _ => 2,
                    };
                    if kind == "udp" {
                        put(4, len.value(length));
                    }
                    let pseudo = self.pseudo_header(i, length);
                    let right = match checksum(&[&pseudo, &self.bytes[start..end]]) {
                        0 if kind == "udp" => 0xffff,
                        sum => sum,
                    };
                    self.bytes[start + at..start + at + 2]
                        .copy_from_slice(&csum.value(right).to_be_bytes());
                }
            }
        }
        Ok(())
    }

    /// The pseudo-header of the transport header that was placed as number `i` (RFC 9293, 3.1;
    /// RFC 8200, 8.1).
    fn pseudo_header(&self, i: usize, length: u16) -> Vec<u8> {
        let kind = self.placed[i].kind;
        let number = match kind {
            "tcp" => 6,
            "udp" => 17,
            "icmp6" => 58,
            _ => return Vec::new(),
        };
        let outer = self.placed[..i].iter().rev().find(|p| p.kind.starts_with("ip"));
        let mut pseudo = match outer {
            Some(ip) if ip.kind == "ip" => self.bytes[ip.start + 12..ip.start + 20].to_vec(),
            Some(ip) => self.bytes[ip.start + 8..ip.start + 40].to_vec(),
            None => Vec::new(),
        };
        pseudo.extend([0, number]);
        pseudo.extend(length.to_be_bytes());
        pseudo
    }
}

/// An address of either family, with a name where it has one.
pub(super) fn named(addr: IpAddr) -> String {
    Host::with_addr(addr).map_or_else(|| addr.to_string(), Host::name)
}
