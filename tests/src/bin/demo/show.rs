//! What the demo prints: a row for each step while it runs, and the summary.

use std::io::{IsTerminal as _, Write as _};

use canary_tests::stats::binomial_interval;

/// Confidence of the summary's verdict: one honest demo in 100,000 fails by chance.
const CONFIDENCE: f64 = 0.999_999;

/// One step in numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Row {
    /// The share as it was asked for.
    pub(crate) asked: String,
    /// The share of buckets, a fraction of 1.
    pub(crate) in_force: f64,
    /// Answered requests.
    pub(crate) answered: u64,
    /// Those that the canary answered.
    pub(crate) canary: u64,
    /// Requests without an answer.
    pub(crate) errors: u64,
}

impl Row {
    fn measured(&self) -> String {
        if self.answered == 0 {
            return "-".to_owned();
        }
        percent(self.canary as f64 / self.answered as f64)
    }

    /// Whether there were answers, no errors, and a share that chance explains.
    pub(crate) fn good(&self) -> bool {
        let (low, high) = binomial_interval(self.canary, self.answered, CONFIDENCE);
        self.errors == 0 && self.answered > 0 && (low..=high).contains(&self.in_force)
    }
}

/// The connections that stay open, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HeldRow {
    /// Opened so far.
    pub(crate) opened: u64,
    /// Open now.
    pub(crate) open: u64,
    /// Broken.
    pub(crate) broken: u64,
    /// Bytes of downloads that were compared.
    pub(crate) bytes_checked: u64,
}

/// The live rows: redrawn in place on a terminal, plain lines otherwise.
#[derive(Debug)]
pub(crate) struct Live {
    terminal: bool,
}

impl Live {
    /// Prints the head of the table.
    pub(crate) fn new() -> Self {
        println!(
            "\n{:>8} {:>9} {:>9} {:>9} {:>11} {:>6} {:>7} {:>10}",
            "asked", "in force", "measured", "requests", "requests/s", "held", "broken", "checked"
        );
        Self { terminal: std::io::stdout().is_terminal() }
    }

    /// Whether rows replace each other.
    pub(crate) fn in_place(&self) -> bool {
        self.terminal
    }

    /// Shows the running step; `last` when it is over.
    pub(crate) fn row(&self, row: &Row, per_second: f64, held: HeldRow, last: bool) {
        let line = format!(
            "{:>8} {:>9} {:>9} {:>9} {:>11.0} {:>6} {:>7} {:>10}",
            row.asked,
            percent(row.in_force),
            row.measured(),
            thousands(row.answered),
            per_second,
            held.open,
            held.broken,
            megabytes(held.bytes_checked),
        );
        if !self.terminal {
            println!("{line}");
        } else if last {
            println!("\r\x1b[K{line}");
        } else {
            print!("\r\x1b[K{line}");
        }
        // A reader that has gone away does not stop the demo from cleaning up.
        let _ = std::io::stdout().flush();
    }
}

/// Prints the summary; returns whether all was good.
pub(crate) fn summary(
    rows: &[Row],
    held: HeldRow,
    held_still_open: u64,
    other_errors: u64,
    reasons: &[String],
) -> bool {
    println!("\nThe new version v2 was given a share of all new connections, step by step:\n");
    println!(
        "{:>11} {:>16} {:>18} {:>10} {:>8}   ",
        "asked for", "in the table", "seen by clients", "requests", "errors"
    );
    for row in rows {
        println!(
            "{:>11} {:>16} {:>18} {:>10} {:>8}   {}",
            row.asked,
            percent(row.in_force),
            row.measured(),
            thousands(row.answered),
            thousands(row.errors),
            if row.good() { "ok" } else { "NOT AS ASKED" }
        );
    }
    println!(
        "\nConnections held open through all of it: {} opened, {} still open at the end, {} broken.",
        held.opened, held_still_open, held.broken
    );
    println!("Their downloads brought {}; every byte was checked.", megabytes(held.bytes_checked));
    if other_errors > 0 {
        println!("Errors at the very moment of a change: {other_errors}.");
    }
    for reason in reasons {
        println!("  {reason}");
    }
    let good = rows.iter().all(Row::good)
        && held.broken == 0
        && held_still_open == held.opened
        && other_errors == 0;
    println!(
        "\n{}",
        if good {
            "Result: every share was met and nothing broke."
        } else {
            "Result: NOT everything went as it should."
        }
    );
    good
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A number with a comma after every three digits.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(percent(0.05), "5.00 %");
    }

    #[test]
    fn a_step_without_answers_with_errors_or_with_another_share_is_not_good() {
        let row =
            Row { asked: "5%".to_owned(), in_force: 0.05, answered: 2000, canary: 103, errors: 0 };
        assert!(row.good());
        let bad = |change: fn(&mut Row)| {
            let mut row = row.clone();
            change(&mut row);
            row.good()
        };
        assert!(!bad(|row| row.canary = 300));
        assert!(!bad(|row| row.errors = 1));
        assert!(!bad(|row| (row.answered, row.canary) = (0, 0)));
    }
}
