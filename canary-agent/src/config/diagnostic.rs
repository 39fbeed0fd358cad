//! What `check` says: errors and warnings, each with its place.
//!
//! Owns the form that leaves the process: JSON through serde, and the text for
//! people. A [`Diagnostic`] carries the source line that it points at, so it can
//! be shown where the files are not (a command that asked the daemon to reload).
//! Must not know what a configuration means.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whether a configuration with this finding may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It may not.
    Error,
    /// It may, but probably is not what was meant.
    Warning,
}

impl Severity {
    /// The word shown before the message.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// One finding about the configuration files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, in one line.
    pub message: String,
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Other places that take part, such as the first of two that collide.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub related: Vec<Related>,
}

/// A second place of a [`Diagnostic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Related {
    /// What is there.
    pub message: String,
    /// Where.
    #[serde(flatten)]
    pub place: Place,
}

/// A place in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// The file's path as it was given or found.
    pub file: String,
    /// Line, from 1. What concerns a file as a whole stands at 1.
    pub line: u32,
    /// Column in characters (Unicode scalar values), from 1.
    pub column: u32,
    /// The line itself; `None` when the file has no text (it could not be read).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excerpt: Option<Excerpt>,
}

/// A source line, or the part of a long one around the place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Excerpt {
    /// The text, without control characters.
    pub text: String,
    /// Characters of `text` before the place.
    pub offset: u32,
    /// Characters that the place covers, at least 1.
    pub width: u32,
}

/// Shows findings to people, compiler-style: message, place, source line with a
/// caret, help; at the end how many there are.
pub fn render(diagnostics: &[Diagnostic]) -> String {
    let mut out = String::new();
    for diagnostic in diagnostics {
        let Diagnostic { severity, message, place, help, related } = diagnostic;
        let gutter = related
            .iter()
            .map(|r| r.place.line)
            .chain([place.line])
            .max()
            .unwrap_or(1)
            .to_string()
            .len();
        // Writing to a String can't fail.
        let _ = writeln!(out, "{}: {message}", severity.name());
        render_place(&mut out, gutter, place, '^');
        for Related { message, place } in related {
            let _ = writeln!(out, "{:gutter$} = note: {message}", "");
            render_place(&mut out, gutter, place, '-');
        }
        if let Some(help) = help {
            let _ = writeln!(out, "{:gutter$} = help: {help}", "");
        }
        out.push('\n');
    }
    let count = |severity| diagnostics.iter().filter(|d| d.severity == severity).count();
    let words = |count: usize, word: &str| match count {
        1 => format!("1 {word}"),
        n => format!("{n} {word}s"),
    };
    match (count(Severity::Error), count(Severity::Warning)) {
        (0, 0) => {}
        (errors, 0) => {
            let _ = writeln!(out, "{}", words(errors, "error"));
        }
        (0, warnings) => {
            let _ = writeln!(out, "{}", words(warnings, "warning"));
        }
        (errors, warnings) => {
            let _ = writeln!(out, "{}, {}", words(errors, "error"), words(warnings, "warning"));
        }
    }
    out
}

fn render_place(out: &mut String, gutter: usize, place: &Place, mark: char) {
    let Place { file, line, column, excerpt } = place;
    let Some(Excerpt { text, offset, width }) = excerpt else {
        let _ = writeln!(out, "{:gutter$}--> {file}", "");
        return;
    };
    let _ = writeln!(out, "{:gutter$}--> {file}:{line}:{column}", "");
    let _ = writeln!(out, "{:gutter$} |", "");
    let _ = writeln!(out, "{line:gutter$} | {text}");
    let marks: String = std::iter::repeat_n(mark, *width as usize).collect();
    let _ = writeln!(out, "{:gutter$} | {:offset$}{marks}", "", "", offset = *offset as usize);
}

/// Makes `text` fit for one line of a terminal: control characters escaped, and
/// what is beyond `limit` characters left out.
pub(super) fn printable(text: &str, limit: usize) -> String {
    let mut out = String::with_capacity(text.len().min(limit * 4));
    for (count, c) in text.chars().enumerate() {
        if count == limit {
            out.push('…');
            break;
        }
        if is_unprintable(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Control characters, and those that reorder or hide what is around them.
pub(super) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(line: u32, column: u32, text: &str, offset: u32, width: u32) -> Place {
        Place {
            file: "agent.toml".to_owned(),
            line,
            column,
            excerpt: Some(Excerpt { text: text.to_owned(), offset, width }),
        }
    }

    #[test]
    fn a_finding_shows_line_caret_note_and_help() {
        let diagnostic = Diagnostic {
            severity: Severity::Error,
            message: "two services are called `shop`".to_owned(),
            place: place(12, 8, "name = \"shop\"", 7, 6),
            help: Some("give one of them another name".to_owned()),
            related: vec![Related {
                message: "the first is here".to_owned(),
                place: place(4, 8, "name = \"shop\"", 7, 6),
            }],
        };
        assert_eq!(
            render(&[diagnostic]),
            "\
error: two services are called `shop`
  --> agent.toml:12:8
   |
12 | name = \"shop\"
   |        ^^^^^^
   = note: the first is here
  --> agent.toml:4:8
   |
 4 | name = \"shop\"
   |        ------
   = help: give one of them another name

1 error
"
        );
    }

    #[test]
    fn a_file_without_text_shows_its_name_alone() {
        let diagnostic = Diagnostic {
            severity: Severity::Error,
            message: "can't be read".to_owned(),
            place: Place { file: "missing.toml".to_owned(), line: 1, column: 1, excerpt: None },
            help: None,
            related: Vec::new(),
        };
        let text = render(&[diagnostic]);
        assert_eq!(text, "error: can't be read\n --> missing.toml\n\n1 error\n");
    }

    #[test]
    fn json_is_flat_and_reads_back() {
        let diagnostic = Diagnostic {
            severity: Severity::Warning,
            message: "m".to_owned(),
            place: place(2, 3, "abc", 2, 1),
            help: None,
            related: Vec::new(),
        };
        let json = serde_json::to_value(&diagnostic).expect("serialisable");
        assert_eq!(json["severity"], "warning");
        assert_eq!(json["file"], "agent.toml");
        assert_eq!(json["line"], 2);
        assert_eq!(json["column"], 3);
        assert_eq!(serde_json::from_value::<Diagnostic>(json).expect("reads back"), diagnostic);
    }

    #[test]
    fn nothing_that_steers_a_terminal_is_shown() {
        assert_eq!(printable("a\u{1b}[31m\u{202e}b", 40), "a\\u{1b}[31m\\u{202e}b");
        assert_eq!(printable("abcdef", 3), "abc…");
    }
}
