//! Bad and good inputs as data, with what is said of them and where.
//!
//! The `*.toml` beside this file hold them. A case is a few lines:
//!
//! ```text
//! #! case a duration without its unit
//! #! in service
//! #! error 1:9 `30` has no unit
//! #! help a part of the help
//! drain = 30
//! ```
//!
//! - `case NAME` begins one; what follows, up to the next, is its main file.
//! - `in service`: the lines are keys of a service whose other needed keys are
//!   added around them; `[agent]` stands in another file.
//! - `plus agent`, `plus service`: a good `[agent]` or service stands in another file.
//! - `file NAME` begins a further file.
//! - `error LINE:COLUMN TEXT` or `warning …` is expected, in this order and no
//!   other; TEXT is a part of the message. Lines count from the first of the
//!   case, and other files' places are written `NAME:LINE:COLUMN`.
//! - `note PLACE TEXT` and `help TEXT` belong to the finding before.
//! - A case without errors must load.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use canary_agent::config::{Diagnostic, Place, load_bytes};

use super::support::{AGENT, Host, MAIN, SERVICE, check_places};

/// One case of a data file.
#[derive(Default)]
struct Case {
    name: String,
    at: String,
    in_service: bool,
    plus: Vec<(String, String)>,
    /// Name and text, the main one first.
    files: Vec<(String, String)>,
    expected: Vec<String>,
}

impl Case {
    /// The files as they are loaded, and how many lines stand before the main one's.
    fn files(&self) -> (Vec<(PathBuf, Vec<u8>)>, usize) {
        let mut files = self.files.clone();
        files.splice(1..1, self.plus.iter().cloned());
        let mut before = String::new();
        if self.in_service {
            let body = &files[0].1;
            let sets = |key: &str| {
                let mut lines = body.lines();
                lines.any(|line| line.split(['=', '.', ' ']).next() == Some(key))
            };
            before.push_str("[[service]]\n");
            for (key, value) in
                [("name", "\"shop\""), ("vip", "\"203.0.113.10\""), ("ports", "\"tcp/443\"")]
            {
                if !sets(key) {
                    let _ = writeln!(before, "{key} = {value}");
                }
            }
            let after = match sets("versions") || body.contains("[service.versions") {
                true => "",
                false => {
                    "[service.versions.stable]\nbackends = \"10.0.1.1:443\"\n\
                     [service.versions.v2]\nbackends = \"10.0.2.1:443\"\n"
                }
            };
            files[0].1 = format!("{before}{body}{after}");
            files.push(("conf.d/plus-agent.toml".into(), AGENT.into()));
        }
        let files = files
            .into_iter()
            .map(|(name, text)| (PathBuf::from(name), text.into_bytes()))
            .collect();
        (files, before.lines().count())
    }
}

fn cases() -> Vec<Case> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config");
    let mut paths: Vec<PathBuf> = fs::read_dir(&directory)
        .expect("the cases are there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    paths.sort();
    let mut cases: Vec<Case> = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).expect("readable");
        let file = path.file_name().expect("a name").to_string_lossy();
        let mut inside = false;
        for (index, line) in text.lines().enumerate() {
            let at = format!("{file}:{}", index + 1);
            let Some(directive) = line.strip_prefix("#! ") else {
                if inside {
                    let case = cases.last_mut().expect("a case");
                    let (_, text) = case.files.last_mut().expect("a file");
                    text.push_str(line);
                    text.push('\n');
                }
                continue;
            };
            let (word, rest) = directive.split_once(' ').expect("a word and more");
            if word == "case" {
                inside = true;
                cases.push(Case {
                    name: rest.to_owned(),
                    at,
                    files: vec![(MAIN.to_owned(), String::new())],
                    ..Case::default()
                });
                continue;
            }
            let case = cases.last_mut().expect("`#! case` comes first");
            match (word, rest) {
                ("in", "service") => case.in_service = true,
                ("plus", "agent") => {
                    case.plus.push(("conf.d/plus-agent.toml".into(), AGENT.into()));
                }
                ("plus", "service") => {
                    case.plus.push(("conf.d/plus-service.toml".into(), SERVICE.into()));
                }
                ("file", name) => case.files.push((name.to_owned(), String::new())),
                ("error" | "warning" | "help" | "note", _) => {
                    case.expected.push(directive.to_owned());
                }
                _ => panic!("{at}: unknown directive `{directive}`"),
            }
        }
        // The blank lines before the next case belong to no file.
        for case in &mut cases {
            for (_, text) in &mut case.files {
                text.truncate(text.trim_end_matches('\n').len());
                text.push('\n');
            }
        }
    }
    cases
}

fn place(place: &Place, lines_before: usize) -> String {
    let line = i64::from(place.line);
    match place.file.as_str() {
        MAIN => format!("{}:{}", line - lines_before as i64, place.column),
        file => format!("{file}:{line}:{}", place.column),
    }
}

fn lines_of(diagnostics: &[Diagnostic], lines_before: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for diagnostic in diagnostics {
        lines.push(format!(
            "{} {} {}",
            diagnostic.severity.name(),
            place(&diagnostic.place, lines_before),
            diagnostic.message
        ));
        for related in &diagnostic.related {
            lines.push(format!("note {} {}", place(&related.place, lines_before), related.message));
        }
        if let Some(help) = &diagnostic.help {
            lines.push(format!("help {help}"));
        }
    }
    lines
}

/// Whether `expected` begins as `actual` does, place included, and then says a part of it.
fn agrees(expected: &str, actual: &str) -> bool {
    let parts = |line: &str| -> (String, String) {
        let words = if line.starts_with("help ") { 1 } else { 2 };
        let at = line.match_indices(' ').nth(words - 1).map_or(line.len(), |(at, _)| at);
        (line[..at].to_owned(), line[at..].trim().to_owned())
    };
    let (expected, actual) = (parts(expected), parts(actual));
    expected.0 == actual.0 && actual.1.contains(&expected.1)
}

#[test]
fn every_case_says_what_it_should_where_it_should() {
    let cases = cases();
    assert!(cases.len() > 100, "only {} cases were found", cases.len());
    let mut failures = String::new();
    for case in &cases {
        let (files, lines_before) = case.files();
        let borrowed: Vec<(&Path, &[u8])> =
            files.iter().map(|(name, text)| (name.as_path(), text.as_slice())).collect();
        let (loads, diagnostics) = match load_bytes(&borrowed, &Host) {
            Ok(loaded) => (true, loaded.warnings),
            Err(diagnostics) => (false, diagnostics),
        };
        check_places(&borrowed, &diagnostics);
        let errors = case.expected.iter().any(|line| line.starts_with("error "));
        let actual = lines_of(&diagnostics, lines_before);
        // A case need not mention help; if it does, it must agree.
        let wants_help =
            |at: usize| case.expected.get(at).is_some_and(|line| line.starts_with("help "));
        let mut compared = Vec::new();
        for line in &actual {
            if !line.starts_with("help ") || wants_help(compared.len()) {
                compared.push(line);
            }
        }
        let same = compared.len() == case.expected.len()
            && case
                .expected
                .iter()
                .zip(&compared)
                .all(|(expected, actual)| agrees(expected, actual));
        if !same || loads == errors {
            let _ = writeln!(
                failures,
                "{}: {} (loads: {loads})\n  expected\n    {}\n  actual\n    {}\n",
                case.at,
                case.name,
                case.expected.join("\n    "),
                actual.join("\n    ")
            );
        }
    }
    assert!(failures.is_empty(), "\n{failures}");
}
