//! Lines of the log that say again what was just said.
//!
//! What goes wrong every second would fill a disk and hide the rest. A warning or an error
//! that is word for word one of the last ten seconds is counted in place of being written;
//! [`Repeats::take`] says what was counted, so that it can be told in one line.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, Subscriber, field::Visit};
use tracing_subscriber::layer::{Context, Filter};

/// For so long a line is not written again.
pub(super) const WINDOW: Duration = Duration::from_secs(10);
/// Different lines that are remembered at a time. Those beyond are written.
const MOST: usize = 1024;
/// Of a repeated line, so much is told.
const TOLD_BYTES: usize = 200;

/// A line that has been written.
#[derive(Debug)]
struct Line {
    since: Instant,
    repeated: u64,
    text: String,
}

/// Lines of the last seconds. Clones are about the same lines.
#[derive(Clone, Debug, Default)]
pub(super) struct Repeats(Arc<Mutex<HashMap<u64, Line>>>, RandomState);

impl Repeats {
    fn lines(&self) -> MutexGuard<'_, HashMap<u64, Line>> {
        // Every change under the lock leaves the lines whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a line is to be written.
    fn is_news(&self, text: String, now: Instant) -> bool {
        let key = self.1.hash_one(&text);
        let mut lines = self.lines();
        match lines.get_mut(&key) {
            Some(line) if now.duration_since(line.since) < WINDOW => {
                line.repeated += 1;
                false
            }
            // Its repetitions are told first.
            Some(line) if line.repeated > 0 => {
                line.repeated += 1;
                false
            }
            Some(line) => {
                line.since = now;
                true
            }
            None => {
                if lines.len() < MOST {
                    lines.insert(key, Line { since: now, repeated: 0, text });
                }
                true
            }
        }
    }

    /// What was repeated and how often, of the lines whose time is over; forgets them.
    pub(super) fn take(&self, now: Instant) -> Vec<(String, u64)> {
        let mut told = Vec::new();
        self.lines().retain(|_, line| {
            let over = now.duration_since(line.since) >= WINDOW;
            if over && line.repeated > 0 {
                told.push((std::mem::take(&mut line.text), line.repeated));
            }
            !over
        });
        told
    }
}

impl<S: Subscriber> Filter<S> for Repeats {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        if *event.metadata().level() > Level::WARN {
            return true;
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.is_news(text.0, Instant::now())
    }
}

/// An event's message and fields.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        // Writing to a String can't fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}

/// The beginning of a line.
pub(super) fn shortened(text: &str) -> &str {
    let end = (0..=text.len().min(TOLD_BYTES)).rev().find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_written_once_in_its_window_and_its_repetitions_are_told() {
        let repeats = Repeats::default();
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let says = |text: &str, seconds| repeats.is_news(text.to_owned(), at(seconds));
        assert!(says("a", 0) && says("b", 0));
        assert!(!says("a", 1) && !says("a", 9));
        assert_eq!(repeats.take(at(9)), []);
        assert_eq!(repeats.take(at(10)), [("a".to_owned(), 2)]);
        assert!(says("a", 11) && says("b", 11), "forgotten");
        assert_eq!(repeats.take(at(30)), [], "nothing was repeated");
        assert!(says("a", 31) && !says("a", 32));
        assert!(!says("a", 60), "what was repeated is told first");
        assert_eq!(repeats.take(at(60)), [("a".to_owned(), 2)]);
    }

    #[test]
    fn many_different_lines_are_all_written() {
        let repeats = Repeats::default();
        let now = Instant::now();
        assert!((0..2 * MOST).all(|n| repeats.is_news(n.to_string(), now)));
        assert!(repeats.lines().len() <= MOST);
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let text = "é".repeat(TOLD_BYTES);
        assert_eq!(shortened(&text).len(), TOLD_BYTES);
        assert_eq!(shortened("xé "), "xé");
        assert_eq!(shortened(&format!("x{text}")).len(), TOLD_BYTES - 1);
    }
}
