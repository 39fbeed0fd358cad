//! Files of networks: one a line, `#` before comments.

use ipnet::IpNet;

use super::{
    members::{self, MemberError},
    network::{self, NetworkError},
};

/// Most networks of one file, and of all audiences together.
pub const MAX_NETWORKS: usize = 1_000_000;
/// Largest file: what so many networks take with the longest of comments.
const MAX_BYTES: usize = 128 << 20;

/// A line that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {error}")]
pub struct BadLine {
    /// Its number, from 1.
    pub line: usize,
    /// Where in it the text stands, in characters from 1.
    pub column: usize,
    /// What is wrong.
    pub error: MemberError,
}

/// Why a file of networks can't be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("can't be read: {0}")]
    Unreadable(#[from] std::io::Error),
    /// It is larger than any list of networks.
    #[error("it is larger than {} MiB: is it a list of networks?", MAX_BYTES >> 20)]
    TooLarge,
    /// It has more networks than an agent can hold.
    #[error(
        "it has more than {MAX_NETWORKS} networks, from line {line} on: that is the most for all audiences together"
    )]
    TooMany {
        /// The first line beyond.
        line: usize,
    },
    /// Some lines are no networks: all of them.
    #[error("{} of its lines are no networks, the first of them {}", .0.len(), .0.first().map_or(0, |bad| bad.line))]
    Lines(Vec<BadLine>),
}

/// Reads networks from the content of a file.
///
/// ```
/// use canary_agent::audience::file::{FileError, parse};
///
/// let nets = parse(b"# offices\n198.51.100.0/24  # Ames\n\n2001:db8:aa::/48\n").unwrap();
/// assert_eq!(nets.len(), 2);
/// let Err(FileError::Lines(bad)) = parse(b"198.51.100.0/24\n198.51.100/24\n") else { panic!() };
/// assert_eq!(bad[0].line, 2);
/// ```
///
/// # Errors
/// Every line that is wrong; there are too many.
pub fn parse(bytes: &[u8]) -> Result<Vec<IpNet>, FileError> {
    read(bytes, |text| network::parse(text).map_err(MemberError::from))
}

/// The same of members with a lifetime.
///
/// # Errors
/// Every line that is wrong; there are too many.
pub fn parse_members(bytes: &[u8]) -> Result<Vec<IpNet>, FileError> {
    read(bytes, members::member)
}

fn read(
    bytes: &[u8],
    one: impl Fn(&str) -> Result<IpNet, MemberError>,
) -> Result<Vec<IpNet>, FileError> {
    if bytes.len() > MAX_BYTES {
        return Err(FileError::TooLarge);
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let (mut nets, mut bad) = (Vec::new(), Vec::new());
    for (line, raw) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let code = raw.split(|byte| *byte == b'#').next().unwrap_or_default();
        let text = code.trim_ascii();
        if text.is_empty() {
            continue;
        }
        let parsed = match std::str::from_utf8(text) {
            Ok(text) => one(text),
            Err(_) => {
                let shown = text.iter().take(64).flat_map(|b| b.escape_ascii()).map(char::from);
                Err(NetworkError::NotANetwork(shown.collect()).into())
            }
        };
        match parsed {
            Ok(_) if nets.len() == MAX_NETWORKS => return Err(FileError::TooMany { line }),
            Ok(net) => nets.push(net),
            Err(error) => {
                let indent = code.len() - code.trim_ascii_start().len();
                bad.push(BadLine { line, column: indent + 1, error });
            }
        }
    }
    match bad.is_empty() {
        true => Ok(nets),
        false => Err(FileError::Lines(bad)),
    }
}

#[cfg(test)]
mod tests {
    use std::{fmt::Write as _, time::Instant};

    use super::*;

    #[test]
    fn every_bad_line_is_named() {
        let text = b"\xef\xbb\xbf198.51.100.0/24\r\n  office\n# 1\n\n10.0.0.1/8 # host bits\n\xff\xfe\n::1";
        let Err(FileError::Lines(bad)) = parse(text) else { panic!("accepted") };
        let places: Vec<_> = bad.iter().map(|bad| (bad.line, bad.column)).collect();
        assert_eq!(places, [(2, 3), (5, 1), (6, 1)]);
        assert_eq!(parse(b"").unwrap(), []);
        assert_eq!(parse(b"#\n \t\n").unwrap(), []);
    }

    #[test]
    fn a_million_lines_and_not_one_more() {
        let mut text = String::new();
        for at in 0..MAX_NETWORKS {
            let _ = writeln!(text, "10.{}.{}.{}", at >> 16, at >> 8 & 255, at & 255);
        }
        let begun = Instant::now();
        assert_eq!(parse(text.as_bytes()).unwrap().len(), MAX_NETWORKS);
        // The bound is that of a release build; an unoptimised one has no business with it.
        if !cfg!(debug_assertions) {
            assert!(begun.elapsed().as_secs_f64() < 2.0, "{:?}", begun.elapsed());
        }
        text.push_str("192.0.2.1\n");
        let error = parse(text.as_bytes()).unwrap_err();
        assert!(matches!(error, FileError::TooMany { line: 1_000_001 }), "{error}");
    }
}
