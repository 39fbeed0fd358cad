//! Progress lines: what is being done, and how long it has been going on.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

/// Time between two lines about the same step where they can't replace each other.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Characters of a detail that fit behind step and time.
const DETAIL_CHARS: usize = 48;

/// Prints the steps of a longer task to stderr, each with the seconds since the start.
#[derive(Debug)]
pub(crate) struct Progress {
    started: Instant,
    terminal: bool,
    last: Instant,
    open_line: bool,
}

impl Progress {
    /// Starts the clock.
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            terminal: std::io::stderr().is_terminal(),
            last: now,
            open_line: false,
        }
    }

    /// A line of its own.
    pub(crate) fn step(&mut self, text: &str) {
        self.clear();
        eprintln!("{} {text}", self.stamp());
        self.last = Instant::now();
    }

    /// What a running step is at: replaces the previous detail on a terminal,
    /// elsewhere one line every ten seconds.
    pub(crate) fn detail(&mut self, text: &str) {
        let text: String = text.trim().chars().take(DETAIL_CHARS).collect();
        if self.terminal {
            eprint!("\r\x1b[K{}   {text}", self.stamp());
            // Progress that can't be shown is no reason to stop.
            let _ = std::io::stderr().flush();
            self.open_line = true;
        } else if self.last.elapsed() >= PLAIN_INTERVAL {
            eprintln!("{}   {text}", self.stamp());
            self.last = Instant::now();
        }
    }

    /// Takes an unfinished detail off the terminal.
    pub(crate) fn clear(&mut self) {
        if self.open_line {
            eprint!("\r\x1b[K");
            self.open_line = false;
        }
    }

    fn stamp(&self) -> String {
        format!("[{:6.1}s]", self.started.elapsed().as_secs_f64())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
