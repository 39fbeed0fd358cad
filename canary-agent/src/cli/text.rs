//! Numbers and tables for people.

/// How a column's cells stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table with aligned columns.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty one.
    pub(super) fn new<const N: usize>(columns: [(&'static str, Align); N]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; cells that are left out are empty.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| plain(&cell)).collect());
    }

    /// The lines, each behind `indent`.
    pub(super) fn render(&self, indent: &str) -> String {
        let width = |index: usize, title: &str| {
            let cells = self.rows.iter().filter_map(|row| row.get(index));
            let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
            widest.max(title.chars().count())
        };
        let columns: Vec<(usize, Align)> = self
            .columns
            .iter()
            .enumerate()
            .map(|(index, (title, align))| (width(index, title), *align))
            .collect();
        let titles: Vec<String> = self.columns.iter().map(|(t, _)| (*t).to_owned()).collect();
        let mut out = String::new();
        for row in std::iter::once(&titles).chain(&self.rows) {
            let mut line = indent.to_owned();
            for (index, (width, align)) in columns.iter().enumerate() {
                let cell = row.get(index).map_or("", String::as_str);
                let gap = if index == 0 { "" } else { "  " };
                match align {
                    Align::Left => line.push_str(&format!("{gap}{cell:<width$}")),
                    Align::Right => line.push_str(&format!("{gap}{cell:>width$}")),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Text without what a terminal would obey.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A fraction as percent: at most three digits after the point, more where a
/// share would otherwise look like none or all.
pub(super) fn percent(fraction: f64) -> String {
    let value = fraction * 100.0;
    for digits in 3..=9 {
        let shown = format!("{value:.digits$}");
        let trimmed = shown.trim_end_matches('0').trim_end_matches('.');
        let lies = (fraction > 0.0 && trimmed == "0") || (fraction < 1.0 && trimmed == "100");
        if !lies {
            return format!("{trimmed}%");
        }
    }
    format!("{value}%")
}

/// A share that may not be known.
pub(super) fn maybe_percent(fraction: Option<f64>) -> String {
    fraction.map_or_else(|| "-".to_owned(), percent)
}

/// Bytes with a unit.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// Seconds as days, hours, minutes: the two largest that count.
pub(super) fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (days, hours) = (seconds / 86_400, seconds / 3_600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// A noun with its number.
pub(super) fn counted(count: u64, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_say_no_more_and_no_less_than_is_meant() {
        for (fraction, text) in [
            (0.0, "0%"),
            (1.0, "100%"),
            (0.001, "0.1%"),
            (0.05, "5%"),
            (0.049_98, "4.998%"),
            (0.125, "12.5%"),
            (0.1, "10%"),
            (3_277.0 / 65_536.0, "5%"),
            (66.0 / 65_536.0, "0.101%"),
            (1.0 / 65_536.0, "0.002%"),
            (1.0 / 1_048_576.0, "0.0001%"),
            (1_048_575.0 / 1_048_576.0, "99.9999%"),
        ] {
            assert_eq!(percent(fraction), text, "{fraction}");
        }
    }

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(25_165_824), "24.0 MiB");
        assert_eq!(age(7.9), "7s");
        assert_eq!(age(3_725.5), "1h 2m");
        assert_eq!(age(200_000.0), "2d 7h");
        assert_eq!(counted(1, "bucket"), "1 bucket");
        assert_eq!(counted(0, "bucket"), "0 buckets");
    }

    #[test]
    fn columns_are_aligned_and_tame() {
        let mut table = Table::new([("NAME", Align::Left), ("N", Align::Right), ("", Align::Left)]);
        table.row(["a".to_owned(), "1".to_owned()]);
        table.row(["lönger".to_owned(), "12".to_owned(), "\x1b[2Jx".to_owned()]);
        assert_eq!(table.render("  "), "  NAME     N\n  a        1\n  lönger  12  \u{fffd}[2Jx\n");
    }
}
