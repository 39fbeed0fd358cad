//! Text → validated model, with every error's place.
//!
//! [`load`] reads the main file and `conf.d/*.toml` beside it, and gives a
//! [`Config`] in which names are unique, references resolve and families meet,
//! or every reason why there is none. `docs/configuration.md` describes the
//! keys; it changes together with this module.
//!
//! The way of a file: `source` reads it, the `toml` crate parses it into a
//! document with spans, `agent`, `service`, `route`, `versions`, `health`, `audience`, `gate` and
//! `rollout` walk that with
//! the combinators of `walk` and the texts of `scalar`, `across` compares
//! services, `rollout` finds the service and the gates that it names, and `sink` collects what they find into [`Diagnostic`]s.
//!
//! Must not know the data plane, nor the host beyond files, accounts and certificates:
//! whether an interface exists or an address answers is `doctor`'s question.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use toml::de::DeTable;

mod across;
mod agent;
mod audience;
pub mod derived;
mod diagnostic;
pub mod difference;
mod gate;
mod health;
pub mod model;
mod opening;
mod outside;
mod rollout;
mod route;
mod scalar;
mod service;
mod sink;
mod source;
mod tunnel;
mod unsupported;
mod versions;
mod walk;

pub use diagnostic::{Diagnostic, Excerpt, Place, Related, Severity, render};
pub use model::Config;
pub use opening::Opening;
pub use outside::{Nothing, Outside, ThisHost};

use sink::Sink;
use source::{Sources, Span};
use walk::{Fields, Node};

/// Files up to this size are read on after a syntax error; a larger one that is
/// no TOML at all would make millions of errors.
const RECOVER_BYTES: usize = 256 << 10;
/// Most syntax errors that are kept of one file.
const MAX_SYNTAX_ERRORS: usize = 100;

/// A configuration that may be used.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What it says.
    pub config: Config,
    /// What is strange about it.
    pub warnings: Vec<Diagnostic>,
    /// The files it was read from, the main one first.
    pub files: Vec<PathBuf>,
}

/// A duration as the configuration writes it: `90s`, `1h30m`.
///
/// # Errors
/// What is wrong with the text.
pub fn duration(text: &str) -> Result<std::time::Duration, String> {
    scalar::duration(text).map_err(|problem| problem.message)
}

/// The candidate that a misspelt `word` was probably meant to be.
pub(crate) fn nearest_word<'c>(
    word: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<&'c str> {
    scalar::nearest(word, candidates)
}

/// Reads the configuration whose main file is `path`.
///
/// `conf.d/*.toml` beside it follow in the order of their names; hidden files
/// are left out. The services of all files count together; the keys of
/// `[agent]` may be spread over files, but each is set once.
///
/// # Errors
/// Everything that is wrong with all the files, and warnings, ordered by place.
pub fn load(path: &Path) -> Result<Loaded, Vec<Diagnostic>> {
    let mut sink = Sink::default();
    let sources = Sources::read(path, &mut sink);
    build(&sources, sink, &ThisHost)
}

/// Reads one file's `text` as the whole configuration, without touching the
/// disk; `name` stands for its path. Users, groups and other files are not there.
///
/// ```
/// use canary_agent::config::{Severity, load_str};
///
/// let text = r#"
///     [agent]
///     interfaces = ["eth0"]
///     xdp_mod = "auto"
/// "#;
/// let errors = load_str("agent.toml", text).unwrap_err();
/// let error = errors.iter().find(|e| e.severity == Severity::Error).unwrap();
/// assert_eq!((error.place.line, error.place.column), (4, 5));
/// assert_eq!(error.help.as_deref(), Some("did you mean `xdp_mode`?"));
/// ```
///
/// # Errors
/// As [`load`].
pub fn load_str(name: &str, text: &str) -> Result<Loaded, Vec<Diagnostic>> {
    load_bytes(&[(Path::new(name), text.as_bytes())], &Nothing)
}

/// Reads `files` (path and content, the main file first) without touching the disk.
///
/// # Errors
/// As [`load`].
pub fn load_bytes(
    files: &[(&Path, &[u8])],
    outside: &dyn Outside,
) -> Result<Loaded, Vec<Diagnostic>> {
    let mut sink = Sink::default();
    let mut sources = Sources::default();
    for (path, bytes) in files {
        sources.add(path, bytes.to_vec(), &mut sink);
    }
    build(&sources, sink, outside)
}

/// Reads the gates alone of the configuration whose main file is `path`: whatever else is in
/// its files may be wrong, or not be there.
///
/// # Errors
/// What is wrong with the gates, or why they can't be read.
pub fn load_gates(path: &Path) -> Result<Vec<model::Gate>, Vec<Diagnostic>> {
    let mut sink = Sink::default();
    let sources = Sources::read(path, &mut sink);
    let documents = parse_all(&sources, &mut sink);
    let mut gates = Vec::new();
    for (file, document) in &documents {
        let mut root = Fields::new("", Span::whole(*file));
        root.add(*file, document);
        read_gates(&mut root, &mut gates, &mut sink);
    }
    gate::distinct(&gates, &mut sink);
    match sink.failed() {
        true => Err(sink.finish(&sources)),
        false => Ok(gates.into_iter().map(|placed| placed.gate).collect()),
    }
}

fn read_gates(root: &mut Fields<'_>, gates: &mut Vec<gate::Placed>, sink: &mut Sink) {
    for node in root.take_all("gate") {
        if node.is_table() {
            sink.error(node.span, "gates are a list, not one table")
                .help("write `[[gate]]`, with two brackets on each side");
        }
        for item in node.items() {
            gates.extend(gate::read(&item, sink));
        }
    }
}

fn build(
    sources: &Sources,
    mut sink: Sink,
    outside: &dyn Outside,
) -> Result<Loaded, Vec<Diagnostic>> {
    let documents = parse_all(sources, &mut sink);
    let main = Span::whole(0);

    let mut agents: Vec<Node<'_>> = Vec::new();
    let mut services = Vec::new();
    let mut gates = Vec::new();
    let mut rollouts = Vec::new();
    let mut audiences = Vec::new();
    let mut no_service = true;
    for (file, document) in &documents {
        let mut root = Fields::new("", Span::whole(*file));
        root.add(*file, document);
        agents.extend(root.take_all("agent"));
        for node in root.take_all("service") {
            no_service = false;
            if node.is_table() {
                sink.error(node.span, "services are a list, not one table")
                    .help("write `[[service]]`, with two brackets on each side");
            }
            for item in node.items() {
                services.extend(service::read(&item, outside, &mut sink));
            }
        }
        let path = sources.paths().nth(*file).unwrap_or(Path::new(""));
        let beside = path.parent().unwrap_or(Path::new(""));
        for node in root.take_all("audience") {
            if node.is_table() {
                sink.error(node.span, "audiences are a list, not one table")
                    .help("write `[[audience]]`, with two brackets on each side");
            }
            for item in node.items() {
                audiences.extend(audience::read(&item, beside, outside, &mut sink));
            }
        }
        read_gates(&mut root, &mut gates, &mut sink);
        for node in root.take_all("rollout") {
            if node.is_table() {
                sink.error(node.span, "rollouts are a list, not one table")
                    .help("write `[[rollout]]`, with two brackets on each side");
            }
            for item in node.items() {
                rollouts.extend(rollout::read(&item, outside, &mut sink));
            }
        }
        root.finish(&mut sink);
    }
    let agent = agent::read(&agents, main, no_service, outside, &mut sink);
    if no_service {
        sink.absent_anywhere(
            Severity::Warning,
            main,
            "there is no service: every packet passes to the host",
        );
    }
    gate::distinct(&gates, &mut sink);
    let samples = agent.agent.capacity.samples;
    // Before services are counted: audiences of rollouts have tables, too.
    let rollouts =
        rollout::resolve(rollouts, &mut services, &gates, &audiences, samples, &mut sink);
    across::check(&agent, &services, &mut sink);
    across::routes(&services, &audiences, &mut sink);
    audience::together(&audiences, &mut sink);

    let failed = sink.failed();
    let diagnostics = sink.finish(sources);
    if failed {
        return Err(diagnostics);
    }
    Ok(Loaded {
        config: Config {
            agent: agent.agent,
            services: derived::all(services.into_iter().map(|placed| placed.service)),
            audiences: audiences.into_iter().map(|placed| placed.audience).collect(),
            gates: gates.into_iter().map(|placed| placed.gate).collect(),
            rollouts: rollouts.into_iter().map(Arc::new).collect(),
        },
        warnings: diagnostics,
        files: sources.paths().map(Path::to_owned).collect(),
    })
}

/// The document of each file that can be read.
fn parse_all<'t>(sources: &'t Sources, sink: &mut Sink) -> Vec<(usize, DeTable<'t>)> {
    let texts = sources.texts();
    texts.filter_map(|(file, text)| Some((file, parse(file, text, sink)?))).collect()
}

/// The document, or as much of it as a syntax error leaves.
fn parse<'t>(file: usize, text: &'t str, sink: &mut Sink) -> Option<DeTable<'t>> {
    let (document, errors) = if text.len() <= RECOVER_BYTES {
        let (document, errors) = DeTable::parse_recoverable(text);
        (Some(document), errors)
    } else {
        match DeTable::parse(text) {
            Ok(document) => (Some(document), Vec::new()),
            Err(error) => (None, vec![error]),
        }
    };
    for error in errors.into_iter().take(MAX_SYNTAX_ERRORS) {
        let range = error.span().unwrap_or(0..0);
        let finding = sink.syntax(Span::new(file, range), error.message());
        if document.is_none() {
            finding.help("the rest of so large a file is not checked before this is mended");
        }
    }
    document.map(toml::Spanned::into_inner)
}
