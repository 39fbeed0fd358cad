//! Lines for systemd's journal: each begins with its priority (sd-daemon(3)), so that
//! `journalctl --priority warning` shows what it should.

use std::io::{self, Write};

use nix::sys::stat::fstat;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Device and inode of the journal's stream (systemd.exec(5)).
const STREAM: &str = "JOURNAL_STREAM";

/// Whether what is written to stderr goes to the journal. The variable alone does not say so:
/// children have it too, wherever their output goes.
pub(super) fn is_stderr() -> bool {
    let Ok(stream) = std::env::var(STREAM) else { return false };
    fstat(io::stderr()).is_ok_and(|stat| is_stream(&stream, stat.st_dev, stat.st_ino))
}

fn is_stream(stream: &str, device: u64, inode: u64) -> bool {
    let numbers = stream.split_once(':');
    numbers.is_some_and(|(a, b)| a.parse() == Ok(device) && b.parse() == Ok(inode))
}

/// Makes writers that put each line's priority before it.
pub(super) struct Prioritised<M>(pub(super) M);

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for Prioritised<M> {
    type Writer = Line<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Line { priority: Some(priority(Level::INFO)), out: self.0.make_writer() }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        Line { priority: Some(priority(*meta.level())), out: self.0.make_writer_for(meta) }
    }
}

/// Levels as syslog(3) numbers them.
fn priority(level: Level) -> &'static [u8] {
    match level {
        Level::ERROR => b"<3>",
        Level::WARN => b"<4>",
        Level::INFO => b"<6>",
        Level::DEBUG | Level::TRACE => b"<7>",
    }
}

/// Writes one line.
pub(super) struct Line<W> {
    /// What has yet to be written before the rest.
    priority: Option<&'static [u8]>,
    out: W,
}

impl<W: Write> Write for Line<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(priority) = self.priority.take() else {
            return self.out.write(bytes);
        };
        // In one piece: lines of several threads must not mix.
        self.out.write_all(&[priority, bytes].concat())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_known_by_device_and_inode() {
        assert!(is_stream("8:12", 8, 12));
        for other in ["8:13", "9:12", "8", "", "8:12:1", "a:b"] {
            assert!(!is_stream(other, 8, 12), "{other}");
        }
    }

    #[test]
    fn a_line_has_its_priority_once() {
        let mut line = Line { priority: Some(priority(Level::WARN)), out: Vec::new() };
        line.write_all(b"one ").expect("memory");
        line.write_all(b"two\n").expect("memory");
        assert_eq!(line.out, b"<4>one two\n");
    }
}
