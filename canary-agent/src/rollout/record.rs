//! Windows that were written down: CSV, read as a stream.
//!
//! Owns the format, and what is said of a line that isn't in it. A file of any size takes
//! the memory of one window. Must not know which gate will see the windows, but for the
//! names of its signals.
//!
//! The header is `window,signal,share,control,canary,connections`, of which the last may be left
//! out. `window` is a time in seconds, or a number that counts windows; lines of one window stand
//! together, in the order of time.

use std::{
    io::{self, BufRead, BufReader, Read},
    str,
    time::Duration,
};

use super::gate::Counts;
use crate::config::model::SignalKind;

/// What the first line must be; it may end after [`LEAST`].
pub const HEADER: [&str; 6] = ["window", "signal", "share", "control", "canary", "connections"];
/// Fields that each line has. The last of [`HEADER`] is of use where much of control is bad.
const LEAST: usize = 5;

/// Longest line: what is longer is no recording, and would be held in memory whole.
const MAX_LINE_BYTES: usize = 4096;
/// What some programs begin a file of UTF-8 with.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
/// Problems that are kept; then reading ends.
const MAX_PROBLEMS: usize = 100;
/// Characters of a field that are shown.
const SHOWN_CHARS: usize = 40;

/// A line that can't be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its number, from 1.
    pub line: u64,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// Its number, from 1.
    pub number: u64,
    /// The signal.
    pub signal: SignalKind,
    /// Its counts.
    pub counts: Counts,
}

/// The lines of one window.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// `window`, as a time in seconds.
    pub window: Duration,
    /// In the order of the file; each signal at most once.
    pub lines: Vec<Line>,
}

/// Reads windows, and remembers what is wrong with the others.
pub struct Reader<R> {
    input: BufReader<R>,
    signals: Vec<SignalKind>,
    /// The line that was read last, and its number.
    line: Vec<u8>,
    number: u64,
    /// How many fields the header has; none before it was read.
    columns: Option<usize>,
    ended: bool,
    /// The first line of the next window.
    next: Option<(Duration, Line)>,
    /// The window of the last line.
    last: Option<Duration>,
    problems: Vec<Problem>,
}

impl<R: Read> Reader<R> {
    /// Reads `input`, of which lines may be about `signals`.
    pub fn new(input: R, signals: Vec<SignalKind>) -> Self {
        Self {
            input: BufReader::new(input),
            signals,
            line: Vec::new(),
            number: 0,
            columns: None,
            ended: false,
            next: None,
            last: None,
            problems: Vec::new(),
        }
    }

    /// What is wrong with the lines so far.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The next window, of those of its lines that can be used; `None` at the end.
    ///
    /// # Errors
    /// The input can't be read.
    pub fn next_window(&mut self) -> io::Result<Option<Recorded>> {
        let (window, first) = match self.next.take() {
            Some(first) => first,
            None => match self.next_line()? {
                Some(first) => first,
                None => return Ok(None),
            },
        };
        let mut lines = vec![first];
        while let Some((other, line)) = self.next_line()? {
            if other != window {
                self.next = Some((other, line));
                break;
            }
            match lines.iter().find(|one| one.signal == line.signal) {
                Some(earlier) => {
                    let message = format!(
                        "`{}` stands twice in this window; first in line {}",
                        line.signal.name(),
                        earlier.number
                    );
                    self.object(Problem { line: line.number, message, help: None });
                }
                // At most as many as there are signals.
                None => lines.push(line),
            }
        }
        Ok(Some(Recorded { window, lines }))
    }

    /// The next line that can be used.
    fn next_line(&mut self) -> io::Result<Option<(Duration, Line)>> {
        while !self.ended {
            if !self.read_line()? {
                self.ended = true;
                if self.columns.is_none() {
                    let message = "the file is empty".to_owned();
                    self.object(Problem { line: 1, message, help: Some(header_help()) });
                }
                break;
            }
            let number = self.number;
            let Some(columns) = self.columns else {
                self.columns = Some(fields(&self.line).count());
                if !is_header(&self.line) {
                    let message = format!("the header is {}", shown(&self.line));
                    self.object(Problem { line: number, message, help: Some(header_help()) });
                    // Whatever the columns are, they are not known.
                    self.ended = true;
                }
                continue;
            };
            let parsed = parse(&self.line, number, columns, &self.signals);
            match parsed.and_then(|line| self.in_order(line)) {
                Ok(line) => return Ok(Some(line)),
                Err(problem) => self.object(problem),
            }
        }
        Ok(None)
    }

    /// Reads the next line that is not blank; `false` at the end.
    fn read_line(&mut self) -> io::Result<bool> {
        loop {
            self.line.clear();
            let limit = MAX_LINE_BYTES as u64 + 1;
            let read = (&mut self.input).take(limit).read_until(b'\n', &mut self.line)?;
            if read == 0 {
                return Ok(false);
            }
            self.number += 1;
            if read > MAX_LINE_BYTES && self.line.last() != Some(&b'\n') {
                let message = format!("it is longer than {MAX_LINE_BYTES} bytes");
                self.columns.get_or_insert(0);
                self.object(Problem { line: self.number, message, help: None });
                return Ok(false);
            }
            if self.number == 1 && self.line.starts_with(BYTE_ORDER_MARK) {
                self.line.drain(..BYTE_ORDER_MARK.len());
            }
            self.line.truncate(self.line.trim_ascii_end().len());
            if !self.line.is_empty() {
                return Ok(true);
            }
        }
    }

    fn in_order(&mut self, (window, line): (Duration, Line)) -> Result<(Duration, Line), Problem> {
        if let Some(last) = self.last
            && window < last
        {
            return Err(Problem {
                line: line.number,
                message: format!("window {} comes after window {}", seconds(window), seconds(last)),
                help: Some("sort the lines by window".to_owned()),
            });
        }
        self.last = Some(window);
        Ok((window, line))
    }

    fn object(&mut self, problem: Problem) {
        if self.problems.len() == MAX_PROBLEMS {
            self.ended = true;
            let message = "what follows was not read".to_owned();
            self.problems.push(Problem { line: problem.line, message, help: None });
        } else if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }
}

/// A time in seconds as it is written: without a point where it has no part of a second.
pub fn seconds(window: Duration) -> String {
    let (whole, nanos) = (window.as_secs(), window.subsec_nanos());
    match nanos {
        0 => whole.to_string(),
        _ => format!("{whole}.{nanos:09}").trim_end_matches('0').to_owned(),
    }
}

fn header_help() -> String {
    let (least, all) = (HEADER[..LEAST].join(","), HEADER.join(","));
    format!("the first line must be `{least}` or `{all}`")
}

/// Fields hold neither commas nor line ends, so that quotes around them hide none.
fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b',').map(bare)
}

/// A field without what may stand around its text.
fn bare(field: &[u8]) -> &[u8] {
    let field = field.trim_ascii();
    let inner = field.strip_prefix(b"\"").and_then(|field| field.strip_suffix(b"\""));
    inner.map_or(field, <[u8]>::trim_ascii)
}

fn is_header(line: &[u8]) -> bool {
    let is = |columns: usize| fields(line).eq(HEADER[..columns].iter().map(|name| name.as_bytes()));
    is(LEAST) || is(HEADER.len())
}

/// Bytes of the file as they can be shown.
fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut short: String = text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN_CHARS).is_some() {
        short.push('…');
    }
    format!("`{short}`")
}

fn parse(
    line: &[u8],
    number: u64,
    columns: usize,
    signals: &[SignalKind],
) -> Result<(Duration, Line), Problem> {
    let problem = |message: String| Problem { line: number, message, help: None };
    let count = fields(line).count();
    if count != columns {
        return Err(Problem {
            line: number,
            message: format!("it has {count} fields, not {columns}"),
            help: Some(format!("they are {}", HEADER[..columns.min(HEADER.len())].join(","))),
        });
    }
    let mut texts = [""; HEADER.len()];
    for ((text, bytes), name) in texts.iter_mut().zip(fields(line)).zip(HEADER) {
        *text = str::from_utf8(bytes)
            .map_err(|_| problem(format!("`{name}` is not UTF-8: {}", shown(bytes))))?;
    }
    let [window, signal, share, control, canary, connections] = texts;
    let window = time(window).ok_or_else(|| Problem {
        line: number,
        message: format!("{} is not a window", shown(window.as_bytes())),
        help: Some(
            "it is a time in seconds, or the number of a window: `12`, `1767225600.5`".to_owned(),
        ),
    })?;
    let kind = signals.iter().find(|kind| kind.name() == signal).ok_or_else(|| Problem {
        line: number,
        message: format!("{} is no signal of this gate", shown(signal.as_bytes())),
        help: Some(format!(
            "it has {}",
            signals.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
        )),
    })?;
    let fraction = share.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
    let share = fraction.ok_or_else(|| Problem {
        line: number,
        message: format!("share {} is not from 0 to 1", shown(share.as_bytes())),
        help: Some("it is a fraction: `0.05` for 5 %".to_owned()),
    })?;
    let count = |name: &str, text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let count = digits.then(|| text.parse::<u64>().ok()).flatten();
        count.ok_or_else(|| Problem {
            line: number,
            message: format!("{name} {} is not a number", shown(text.as_bytes())),
            help: Some(format!("it is a whole number from 0 to {}", u64::MAX)),
        })
    };
    let counts = Counts {
        share,
        control_events: count("control", control)?,
        canary_events: count("canary", canary)?,
        control_connections: match connections {
            "" => None,
            connections => Some(count("connections", connections)?),
        },
    };
    Ok((window, Line { number, signal: *kind, counts }))
}

/// Seconds with at most nine digits after the point.
fn time(text: &str) -> Option<Duration> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 9 {
        return None;
    }
    let nanos = format!("{part:0<9}").parse().ok()?;
    Some(Duration::new(whole.parse().ok()?, nanos))
}
