//! The files: reading them within limits, and turning byte offsets into places.
//!
//! The only part of the configuration that touches the disk. Must not know TOML.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    diagnostic::{Excerpt, Place, is_unprintable, printable},
    sink::Sink,
};

/// Largest size of one file.
const MAX_FILE_BYTES: usize = 4 << 20;
/// Largest size of all files together.
const MAX_TOTAL_BYTES: usize = 32 << 20;
/// Longest excerpt of a line, and the most of it that stands before the place.
const EXCERPT_CHARS: usize = 120;
const EXCERPT_LEAD: usize = 60;
/// Directory of further files, beside the main one.
const DROP_IN: &str = "conf.d";

/// A part of one file, in bytes of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Span {
    /// Index into [`Sources`].
    pub file: usize,
    /// First byte.
    pub start: usize,
    /// Byte after the last.
    pub end: usize,
}

impl Span {
    /// `range` of `file`.
    pub(super) fn new(file: usize, range: Range<usize>) -> Self {
        Self { file, start: range.start, end: range.end }
    }

    /// `file` as a whole.
    pub(super) fn whole(file: usize) -> Self {
        Self::new(file, 0..0)
    }
}

/// A value and where it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At<T> {
    /// The value.
    pub value: T,
    /// Where.
    pub span: Span,
}

/// One file that was named or found.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    /// Without a byte order mark; `None` if there is nothing that can be shown.
    text: Option<String>,
    /// Whether `text` is what the file says (and not a replacement of it).
    usable: bool,
    /// Byte offset of each line's first byte.
    lines: Vec<usize>,
}

/// Every file of a configuration, in the order in which they count.
#[derive(Debug, Default)]
pub(super) struct Sources {
    files: Vec<Source>,
    bytes: usize,
}

impl Sources {
    /// Reads `main` and what lies in `conf.d` beside it.
    pub(super) fn read(main: &Path, sink: &mut Sink) -> Self {
        let mut sources = Self::default();
        sources.read_file(main, false, sink);
        let directory = main.parent().unwrap_or(Path::new("")).join(DROP_IN);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return sources,
            // What `main` lies in is no directory (`/dev/null/x`): said for `main` already.
            Err(_) if !directory.exists() => return sources,
            Err(error) => {
                sources.add_unreadable(&directory, &reason(&error), sink);
                return sources;
            }
        };
        let mut paths = Vec::new();
        for entry in entries {
            match entry {
                Ok(entry) => paths.push(entry.path()),
                Err(error) => sources.add_unreadable(&directory, &reason(&error), sink),
            }
        }
        paths.retain(|path| is_drop_in(path));
        paths.sort();
        for path in paths {
            sources.read_file(&path, true, sink);
        }
        sources
    }

    /// Reads one file; only a `regular` one cannot block.
    fn read_file(&mut self, path: &Path, regular: bool, sink: &mut Sink) {
        let read = || -> Result<Vec<u8>, String> {
            let kind = fs::metadata(path).map_err(|e| reason(&e))?;
            if kind.is_dir() {
                return Err("it is a directory".to_owned());
            }
            if regular && !kind.is_file() {
                return Err("it is not a regular file".to_owned());
            }
            let mut bytes = Vec::new();
            File::open(path)
                .and_then(|file| file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes))
                .map_err(|e| reason(&e))?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => self.add(path, bytes, sink),
            Err(reason) => self.add_unreadable(path, &reason, sink),
        }
    }

    fn add_unreadable(&mut self, path: &Path, reason: &str, sink: &mut Sink) {
        let shown = printable(&path.display().to_string(), 200);
        sink.error(Span::whole(self.files.len()), format!("can't read `{shown}`: {reason}"));
        self.push(path, None, false, sink);
    }

    /// Takes `bytes` as what `path` holds; what is wrong with them goes to `sink`.
    pub(super) fn add(&mut self, path: &Path, bytes: Vec<u8>, sink: &mut Sink) {
        let file = self.files.len();
        self.bytes = self.bytes.saturating_add(bytes.len());
        if bytes.len() > MAX_FILE_BYTES {
            let limit = MAX_FILE_BYTES >> 20;
            sink.error(
                Span::whole(file),
                format!("the file is larger than {limit} MiB, the most that is read"),
            )
            .help("spread the services over several files in `conf.d`");
            return self.push(path, None, false, sink);
        }
        if self.bytes > MAX_TOTAL_BYTES {
            let limit = MAX_TOTAL_BYTES >> 20;
            sink.error(
                Span::whole(file),
                format!(
                    "with this file the configuration is larger than {limit} MiB, the most that is read"
                ),
            );
            return self.push(path, None, false, sink);
        }
        match String::from_utf8(bytes) {
            Ok(text) => match text.strip_prefix('\u{feff}') {
                Some(rest) => self.push(path, Some(rest.to_owned()), true, sink),
                None => self.push(path, Some(text), true, sink),
            },
            Err(error) => {
                // The lossy text is the file's up to the first bad byte, which is
                // three bytes of U+FFFD in it.
                let at = error.utf8_error().valid_up_to();
                let span = Span::new(file, at..at + '\u{fffd}'.len_utf8());
                let bytes = error.as_bytes();
                let finding = sink.error(
                    span,
                    format!("the file is not UTF-8: byte 0x{:02x} at offset {at}", bytes[at]),
                );
                if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
                    finding.help("it looks like UTF-16: save it as UTF-8");
                }
                let text = String::from_utf8_lossy(bytes).into_owned();
                self.push(path, Some(text), false, sink);
            }
        }
    }

    fn push(&mut self, path: &Path, text: Option<String>, usable: bool, sink: &mut Sink) {
        if !usable {
            sink.set_broken(self.files.len());
        }
        let lines = text.as_deref().map_or_else(Vec::new, |text| {
            std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect()
        });
        self.files.push(Source { path: path.to_owned(), text, usable, lines });
    }

    /// The texts that can be parsed, by index of their file.
    pub(super) fn texts(&self) -> impl Iterator<Item = (usize, &str)> {
        self.files
            .iter()
            .enumerate()
            .filter(|(_, source)| source.usable)
            .filter_map(|(file, source)| Some((file, source.text.as_deref()?)))
    }

    /// The paths of all files.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|source| source.path.as_path())
    }

    /// Line of `span`'s first byte, from 0.
    pub(super) fn line(&self, span: Span) -> usize {
        self.files.get(span.file).map_or(0, |source| source.line(span.start))
    }

    /// Where `span` is, for people.
    pub(super) fn place(&self, span: Span) -> Place {
        let Some(source) = self.files.get(span.file) else {
            return Place { file: String::new(), line: 1, column: 1, excerpt: None };
        };
        let file = source.path.display().to_string();
        let Some(text) = source.text.as_deref() else {
            return Place { file, line: 1, column: 1, excerpt: None };
        };
        let line = source.line(span.start);
        let first = source.lines.get(line).copied().unwrap_or(0);
        let next = source.lines.get(line + 1).map_or(text.len(), |next| next - 1);
        let row = text.get(first..next).unwrap_or_default();
        let row = row.strip_suffix('\r').unwrap_or(row);
        let start = char_boundary(row, span.start.saturating_sub(first));
        let end = char_boundary(row, span.end.saturating_sub(first)).max(start);
        Place {
            file,
            line: count(line + 1),
            column: count(row[..start].chars().count() + 1),
            excerpt: Some(excerpt(row, start, end)),
        }
    }
}

impl Source {
    /// Line of a byte, from 0.
    fn line(&self, byte: usize) -> usize {
        self.lines.partition_point(|&first| first <= byte).saturating_sub(1)
    }
}

/// Whether an entry of `conf.d` is read: `*.toml`, and not hidden (editors put
/// lock and swap files beside what they edit).
fn is_drop_in(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "toml")
        && path.file_name().is_some_and(|name| !name.as_encoded_bytes().starts_with(b"."))
}

fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => "there is no such file".to_owned(),
        ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The last boundary of a character at or before `at`.
fn char_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The part of `row` around `start..end`, one column a character.
fn excerpt(row: &str, start: usize, end: usize) -> Excerpt {
    let lead: Vec<char> = row[..start].chars().rev().take(EXCERPT_LEAD + 1).collect();
    let cut = lead.len() > EXCERPT_LEAD;
    let mut text = String::new();
    let mut offset = lead.len().min(EXCERPT_LEAD);
    if cut {
        text.push('…');
        offset += 1;
    }
    let lead = lead.iter().take(EXCERPT_LEAD).rev().copied();
    let room = EXCERPT_CHARS - offset;
    text.extend(lead.chain(row[start..].chars().take(room)).map(|c| match c {
        '\t' => ' ',
        c if is_unprintable(c) => '\u{fffd}',
        c => c,
    }));
    if row[start..].chars().nth(room).is_some() {
        text.push('…');
    }
    let width = row[start..end].chars().take(room).count().max(1);
    Excerpt { text, offset: count(offset), width: count(width) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(text: &str) -> Sources {
        let mut sources = Sources::default();
        let mut sink = Sink::default();
        sources.add(Path::new("a.toml"), text.as_bytes().to_vec(), &mut sink);
        sources
    }

    fn place(text: &str, range: Range<usize>) -> (u32, u32, String, u32, u32) {
        let place = sources(text).place(Span::new(0, range));
        let excerpt = place.excerpt.expect("there is a text");
        (place.line, place.column, excerpt.text, excerpt.offset, excerpt.width)
    }

    #[test]
    fn lines_and_columns_count_from_one_in_characters() {
        assert_eq!(place("a = 1\nb = 2\n", 6..7), (2, 1, "b = 2".into(), 0, 1));
        assert_eq!(place("a = 1\r\n", 4..7), (1, 5, "a = 1".into(), 4, 1));
        assert_eq!(place("é = \"ü\"", 5..9), (1, 5, "é = \"ü\"".into(), 4, 3));
        assert_eq!(place("\ta = 1", 1..2), (1, 2, " a = 1".into(), 1, 1));
    }

    #[test]
    fn the_end_and_what_lies_beyond_it_are_in_the_last_line() {
        assert_eq!(place("", 0..0), (1, 1, String::new(), 0, 1));
        assert_eq!(place("a", 1..1), (1, 2, "a".into(), 1, 1));
        assert_eq!(place("a\n", 2..2), (2, 1, String::new(), 0, 1));
        assert_eq!(place("a", 9..12), (1, 2, "a".into(), 1, 1));
    }

    #[test]
    fn a_long_line_is_shown_around_the_place() {
        let text = format!("{}X{}", "a".repeat(500), "b".repeat(500));
        let (line, column, shown, offset, width) = place(&text, 500..501);
        assert_eq!((line, column, offset, width), (1, 501, 61, 1));
        assert_eq!(shown.chars().nth(61), Some('X'));
        assert!(shown.starts_with('…') && shown.ends_with('…'));
        assert!(shown.chars().count() <= EXCERPT_CHARS + 1);
    }
}
