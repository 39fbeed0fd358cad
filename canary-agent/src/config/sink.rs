//! Collects findings while the files are read.
//!
//! Owns which findings are left out: those that only follow from a syntax error,
//! and those beyond a limit. Must not know what a configuration means.

use std::collections::BTreeSet;

use super::{
    diagnostic::{Diagnostic, Related, Severity, printable},
    source::{Sources, Span},
};

/// Most findings that are kept: a file that isn't meant for the agent would make millions.
const MAX_FINDINGS: usize = 1000;
/// Longest message, in characters.
const MESSAGE_CHARS: usize = 500;

/// Whether a finding says that something is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Absence {
    /// It does not.
    No,
    /// From its file.
    InFile,
    /// From all files.
    Anywhere,
}

/// One finding, before its place is looked up.
#[derive(Debug)]
pub(super) struct Finding {
    severity: Severity,
    span: Span,
    message: String,
    help: Option<String>,
    related: Vec<(Span, String)>,
    absence: Absence,
    syntax: bool,
}

impl Finding {
    /// Says what to do about it.
    pub(super) fn help(&mut self, help: impl Into<String>) -> &mut Self {
        self.help = Some(help.into());
        self
    }

    /// Names a second place.
    pub(super) fn also(&mut self, span: Span, message: impl Into<String>) -> &mut Self {
        self.related.push((span, message.into()));
        self
    }
}

/// Findings so far.
#[derive(Debug, Default)]
pub(super) struct Sink {
    findings: Vec<Finding>,
    /// How many there were beyond [`MAX_FINDINGS`]; the last of them is in `beyond`.
    left_out: usize,
    beyond: Option<Finding>,
    broken: BTreeSet<usize>,
    failed: bool,
}

impl Sink {
    /// Something is wrong at `span`.
    pub(super) fn error(&mut self, span: Span, message: impl Into<String>) -> &mut Finding {
        self.push(Severity::Error, span, message.into(), Absence::No)
    }

    /// Something is strange at `span`.
    pub(super) fn warning(&mut self, span: Span, message: impl Into<String>) -> &mut Finding {
        self.push(Severity::Warning, span, message.into(), Absence::No)
    }

    /// Something is missing that should stand in the file of `span`; left out if
    /// that file is broken, for then it may well be there.
    pub(super) fn absent(&mut self, span: Span, message: impl Into<String>) -> &mut Finding {
        self.push(Severity::Error, span, message.into(), Absence::InFile)
    }

    /// Something is missing that may stand in any file; left out if any is broken.
    pub(super) fn absent_anywhere(
        &mut self,
        severity: Severity,
        span: Span,
        message: impl Into<String>,
    ) -> &mut Finding {
        self.push(severity, span, message.into(), Absence::Anywhere)
    }

    /// The file of `span` is no TOML there. The file is broken from now on.
    pub(super) fn syntax(&mut self, span: Span, message: impl Into<String>) -> &mut Finding {
        self.set_broken(span.file);
        let finding = self.push(Severity::Error, span, message.into(), Absence::No);
        finding.syntax = true;
        finding
    }

    /// Not all of `file` could be read.
    pub(super) fn set_broken(&mut self, file: usize) {
        self.broken.insert(file);
    }

    /// Whether there was an error.
    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    fn push(
        &mut self,
        severity: Severity,
        span: Span,
        message: String,
        absence: Absence,
    ) -> &mut Finding {
        self.failed |= severity == Severity::Error;
        let finding = Finding {
            severity,
            span,
            message,
            help: None,
            related: Vec::new(),
            absence,
            syntax: false,
        };
        if self.findings.len() >= MAX_FINDINGS {
            self.left_out += 1;
            return self.beyond.insert(finding);
        }
        let last = self.findings.len();
        self.findings.push(finding);
        &mut self.findings[last]
    }

    /// The findings in the order of their places.
    pub(super) fn finish(self, sources: &Sources) -> Vec<Diagnostic> {
        let Self { mut findings, left_out, beyond: _, broken, failed } = self;
        let bad_lines: BTreeSet<(usize, usize)> = findings
            .iter()
            .filter(|f| f.syntax)
            .map(|f| (f.span.file, sources.line(f.span)))
            .collect();
        findings.sort_by_key(|f| (f.span.file, f.span.start));
        let mut shown_lines = BTreeSet::new();
        findings.retain(|finding| {
            let line = (finding.span.file, sources.line(finding.span));
            if finding.syntax {
                // One slip makes several: the first tells the most.
                return shown_lines.insert(line);
            }
            match finding.absence {
                Absence::No => !bad_lines.contains(&line),
                Absence::InFile => !broken.contains(&finding.span.file),
                Absence::Anywhere => broken.is_empty(),
            }
        });
        let end = findings.last().map_or(Span::whole(0), |f| f.span);
        if left_out > 0 {
            findings.push(Finding {
                severity: match failed {
                    true => Severity::Error,
                    false => Severity::Warning,
                },
                span: end,
                message: format!("{left_out} more findings are not shown"),
                help: None,
                related: Vec::new(),
                absence: Absence::No,
                syntax: false,
            });
        }
        findings
            .into_iter()
            .map(|finding| {
                let Finding { severity, span, message, help, related, absence: _, syntax: _ } =
                    finding;
                Diagnostic {
                    severity,
                    message: printable(&message, MESSAGE_CHARS),
                    place: sources.place(span),
                    help: help.map(|help| printable(&help, MESSAGE_CHARS)),
                    related: related
                        .into_iter()
                        .map(|(span, message)| Related {
                            message: printable(&message, MESSAGE_CHARS),
                            place: sources.place(span),
                        })
                        .collect(),
                }
            })
            .collect()
    }
}
