//! The little of HTTP/1.1 that a test client needs, and bytes that can be checked.
//!
//! The client is the bench's own, over a blocking socket, so that a test
//! decides about every connection itself. Answers have a length; the servers
//! here send no others.

use std::{
    io::{self, BufRead, Read, Write},
    sync::LazyLock,
};

/// Largest head of an answer, in bytes.
const HEAD_BYTES_MAX: u64 = 16 * 1024;

/// An answer's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Status code.
    pub status: u16,
    /// Length of the body in bytes.
    pub length: u64,
}

/// Sends a request: `GET` without a body, `POST` with one.
///
/// # Errors
/// The connection's.
pub fn send(mut to: impl Write, target: &str, body: Option<&[u8]>) -> io::Result<()> {
    let method = if body.is_some() { "POST" } else { "GET" };
    let body = body.unwrap_or_default();
    // One write for the small ones, so that a request is one segment.
    let mut request = format!(
        "{method} {target} HTTP/1.1\r\nHost: shop\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    to.write_all(&request)
}

/// Reads the head of an answer.
///
/// # Errors
/// The connection's; `UnexpectedEof` if it was closed; `InvalidData` if this is no answer.
pub fn read_head(from: &mut impl BufRead) -> io::Result<Head> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut from = from.take(HEAD_BYTES_MAX);
    let mut head = Head { status: 0, length: 0 };
    let mut line = String::new();
    loop {
        line.clear();
        if from.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the answer"));
        }
        let text = line.trim_end();
        if head.status == 0 {
            head.status = text
                .strip_prefix("HTTP/1.1 ")
                .and_then(|rest| rest.get(..3)?.parse().ok())
                .ok_or_else(|| invalid("not an HTTP/1.1 answer"))?;
        } else if text.is_empty() {
            return Ok(head);
        } else if let Some((name, value)) = text.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            head.length = value.trim().parse().map_err(|_| invalid("bad length"))?;
        }
    }
}

/// After so many bytes the bodies repeat: a prime, so that nothing that a network
/// loses or doubles is a multiple of it.
const PERIOD: usize = 65_521;

/// The bytes of every `/bytes/N` body: a mix of the offset, so that bytes that are
/// lost, doubled or out of order show.
///
/// Made once, because they are compared by the megabyte, in builds that are not optimised.
static BYTES: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    // Fibonacci hashing; its high bits vary with every offset.
    (0..PERIOD as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
});

/// The bytes from an offset on, as many of `length` as lie in one piece.
fn piece(offset: u64, length: usize) -> &'static [u8] {
    let rest = &BYTES[(offset % PERIOD as u64) as usize..];
    &rest[..rest.len().min(length)]
}

/// Fills a buffer with the body's bytes from an offset on.
pub fn fill(mut buffer: &mut [u8], mut offset: u64) {
    while !buffer.is_empty() {
        let piece = piece(offset, buffer.len());
        let (now, rest) = buffer.split_at_mut(piece.len());
        now.copy_from_slice(piece);
        offset += piece.len() as u64;
        buffer = rest;
    }
}

/// The first offset at which received bytes differ from the body's.
pub fn first_difference(mut bytes: &[u8], mut offset: u64) -> Option<u64> {
    while !bytes.is_empty() {
        let piece = piece(offset, bytes.len());
        let (now, rest) = bytes.split_at(piece.len());
        if now != piece {
            let at = now.iter().zip(piece).position(|(is, should)| is != should);
            return at.map(|at| offset + at as u64);
        }
        offset += piece.len() as u64;
        bytes = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_and_what_is_none_is_refused() {
        let mut text = &b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nx: y\r\n\r\nv2-1"[..];
        let head = read_head(&mut text).unwrap();
        assert_eq!((head.status, head.length), (200, 4));
        assert_eq!(text, b"v2-1");
        let kind = |mut text: &[u8]| read_head(&mut text).unwrap_err().kind();
        assert_eq!(kind(b""), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(b"HTTP/1.1 200 OK\r\n"), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(b"SSH-2.0\r\n\r\n"), io::ErrorKind::InvalidData);
        assert_eq!(
            kind(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn a_changed_byte_is_found() {
        let mut body = vec![0; 4096];
        fill(&mut body, 1000);
        assert_eq!(first_difference(&body, 1000), None);
        assert!(first_difference(&body, 1001).is_some());
        body[77] ^= 1;
        assert_eq!(first_difference(&body, 1000), Some(1077));
        // Across the end of the period as well.
        let start = 3 * PERIOD as u64 - 100;
        fill(&mut body, start);
        assert_eq!(first_difference(&body, start), None);
        assert!(first_difference(&body, start + 1).is_some());
        body[300] ^= 1;
        assert_eq!(first_difference(&body, start), Some(start + 300));
    }
}
