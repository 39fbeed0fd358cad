//! The little of HTTP/1.1 that a test client needs, and bytes that can be checked.
//!
//! The client is the bench's own, over a blocking socket, so that a test
//! decides about every connection itself. Answers have a length; the servers
//! here send no others.

use std::io::{self, BufRead, Read, Write};

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

/// The byte at an offset of every `/bytes/N` body: a mix of the offset, so that
/// bytes that are lost, doubled or out of order show.
pub fn byte_at(offset: u64) -> u8 {
    // Fibonacci hashing; its high bits vary with every offset.
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Fills a buffer with the body's bytes from an offset on.
pub fn fill(buffer: &mut [u8], offset: u64) {
    for (byte, at) in buffer.iter_mut().zip(offset..) {
        *byte = byte_at(at);
    }
}

/// The first offset at which received bytes differ from the body's.
pub fn first_difference(bytes: &[u8], offset: u64) -> Option<u64> {
    bytes.iter().zip(offset..).find_map(|(byte, at)| (*byte != byte_at(at)).then_some(at))
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
    }
}
