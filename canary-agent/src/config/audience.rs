//! `[[audience]]`: a named set of client networks, and where they come from.
//!
//! Owns the keys, defaults and bounds of audiences. What their files say belongs to
//! [`crate::audience`]; here is what is said of it, and where.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    model::{Audience, Dynamic, Mmdb},
    outside::Outside,
    scalar::{self, Problem, quote},
    sink::Sink,
    source::Span,
    walk::{Fields, Node},
};
use crate::audience::{
    Networks,
    expression::{Expression, ExpressionError},
    file::{self, FileError, MAX_NETWORKS},
    members,
    mmdb::{Database, MmdbError},
    network,
};

/// Longest name of an audience.
pub(super) const MAX_NAME_BYTES: usize = 63;
const MAX_AUDIENCES: usize = 1024;
/// Members that an audience may have, unless it says otherwise.
const DEFAULT_MEMBERS: u32 = 100_000;
/// Bad lines of one file that are shown each; of more it is enough to know how many.
const SHOWN_LINES: usize = 100;

/// An audience and where its name is.
#[derive(Debug)]
pub(super) struct Placed {
    /// The audience. Where something could not be read, an error is known and a default stands in.
    pub audience: Audience,
    /// Where it begins.
    pub span: Span,
    name: Option<Span>,
}

/// Reports names that two audiences have, and more networks than an agent can hold.
pub(super) fn together(audiences: &[Placed], sink: &mut Sink) {
    let mut seen: HashMap<&str, Span> = HashMap::new();
    for placed in audiences {
        let Some(span) = placed.name else { continue };
        let name = placed.audience.name.as_str();
        if let Some(first) = seen.get(name) {
            sink.error(span, format!("two audiences are called `{name}`"))
                .also(*first, "the first is here");
        } else {
            seen.insert(name, span);
        }
    }
    if let Some(beyond) = audiences.get(MAX_AUDIENCES) {
        sink.error(
            beyond.span,
            format!("there are {} audiences; {MAX_AUDIENCES} is the most", audiences.len()),
        );
    }
    let mut total = 0;
    let mut members = 0;
    for placed in audiences {
        let before = total;
        let room = placed.audience.dynamic.as_ref().map_or(0, |dynamic| dynamic.max);
        members += room;
        total += placed.audience.networks.len() + room;
        if before <= MAX_NETWORKS && total > MAX_NETWORKS {
            let of_them = match members {
                0 => String::new(),
                members => format!(", counting {members} members that there may be"),
            };
            let finding = sink.error(
                placed.span,
                format!(
                    "the audiences up to this one have {total} networks{of_them}; {MAX_NETWORKS} is the \
                     most for all of them together"
                ),
            );
            if members > 0 {
                finding.help("`dynamic = { max = … }` says how many members an audience may have");
            }
        }
    }
}

/// Reads one `[[audience]]` of a file in the directory `beside`.
pub(super) fn read(
    node: &Node<'_>,
    beside: &Path,
    outside: &dyn Outside,
    sink: &mut Sink,
) -> Option<Placed> {
    let mut fields = node.table("audience", sink)?;
    let span = fields.span;
    let name_node = fields.take("name", sink);
    let name = match name_node {
        Some(node) => node.parse(sink, |text| scalar::name(text, "audience", MAX_NAME_BYTES)),
        None => {
            sink.absent(span, "this audience has no `name`");
            None
        }
    };
    let label = match &name {
        Some(name) => format!("audience `{name}`"),
        None => "this audience".to_owned(),
    };
    let (cidr_node, file_node) = (fields.take("cidr", sink), fields.take("file", sink));
    let (mmdb_node, dynamic_node) = (fields.take("mmdb", sink), fields.take("dynamic", sink));
    fields.finish(sink);
    if [cidr_node, file_node, mmdb_node, dynamic_node].iter().all(Option::is_none) {
        sink.absent(span, format!("{label} has no networks"))
            .help("give it `cidr`, `file` or `mmdb`, or members: `dynamic = { ttl = \"8h\" }`");
    }
    let dynamic = dynamic_node.and_then(|node| dynamic(&node, sink));
    let mut nets: Vec<IpNet> = Vec::new();
    if let Some(node) = cidr_node {
        let list = node.list(sink, |item, sink| {
            item.parse(sink, |text| {
                network::parse(text).map_err(|error| Problem::new(error.to_string()))
            })
        });
        list.distinct(sink, |net| format!("{net} is listed twice in {label}"));
        nets.extend(list.values());
    }
    let file = file_node.and_then(|node| {
        let path = located(&node, beside, sink)?;
        nets.extend(listed(&node, &path, outside, sink));
        Some(path)
    });
    let mut networks = Networks::new(nets);
    let mmdb = mmdb_node.and_then(|node| {
        let (mmdb, found) = mmdb(&node, beside, outside, &label, sink)?;
        networks = std::mem::take(&mut networks).with(found);
        Some(mmdb)
    });
    Some(Placed {
        span,
        name: name.is_some().then_some(name_node).flatten().map(|node| node.span),
        audience: Audience {
            name: name.unwrap_or_default(),
            networks: Arc::new(networks),
            file,
            mmdb,
            dynamic,
        },
    })
}

/// How members live that are added while the agent runs.
fn dynamic(node: &Node<'_>, sink: &mut Sink) -> Option<Dynamic> {
    let mut fields = node.table("audience.dynamic", sink)?;
    let help = "such as `dynamic = { ttl = \"8h\" }`: how long a member stays that is not renewed";
    let ttl_node = required(&mut fields, "dynamic", "ttl", help, sink);
    let max_node = fields.take("max", sink);
    fields.finish(sink);
    let ttl = ttl_node.and_then(|node| node.parse_loose(sink, lifetime));
    let most = MAX_NETWORKS as u32;
    let max = max_node.map_or(Some(DEFAULT_MEMBERS), |node| node.integer(sink, 1..=most));
    Some(Dynamic { ttl: ttl?, max: max? as usize })
}

fn lifetime(text: &str) -> Result<Duration, Problem> {
    let ttl = scalar::duration(text)?;
    members::lifetime_ms(ttl).map(|_| ttl).map_err(|error| Problem::new(error.to_string()))
}

/// The file that a key names; a relative one lies beside the configuration that names it.
fn located(node: &Node<'_>, beside: &Path, sink: &mut Sink) -> Option<PathBuf> {
    node.parse(sink, |text| match text {
        "" => Err(Problem::new(format!("`{}` names no file", node.name))),
        text => Ok(beside.join(text)),
    })
}

/// The networks of a file, one a line.
fn listed(node: &Node<'_>, path: &Path, outside: &dyn Outside, sink: &mut Sink) -> Vec<IpNet> {
    let shown = quote(&path.display().to_string());
    let read = outside.file(path).map_err(FileError::from).and_then(|bytes| file::parse(&bytes));
    match read {
        Ok(nets) => {
            if nets.is_empty() {
                sink.warning(node.span, format!("{shown} has no networks"));
            }
            nets
        }
        Err(FileError::Lines(bad)) => {
            for line in bad.iter().take(SHOWN_LINES) {
                sink.error(
                    node.span,
                    format!("{shown}, line {}, column {}: {}", line.line, line.column, line.error),
                );
            }
            if let Some(more) = bad.get(SHOWN_LINES..).filter(|more| !more.is_empty()) {
                let lines: Vec<String> =
                    more.iter().take(50).map(|line| line.line.to_string()).collect();
                let rest = if more.len() > lines.len() { " …" } else { "" };
                sink.error(
                    node.span,
                    format!(
                        "{shown}: {} more lines are no networks: {}{rest}",
                        more.len(),
                        lines.join(", ")
                    ),
                );
            }
            Vec::new()
        }
        Err(error @ FileError::Unreadable(_)) => {
            sink.error(node.span, format!("{shown} {error}"))
                .help("it has one network a line, and `#` before comments");
            Vec::new()
        }
        Err(error) => {
            sink.error(node.span, format!("{shown}: {error}"));
            Vec::new()
        }
    }
}

fn mmdb(
    node: &Node<'_>,
    beside: &Path,
    outside: &dyn Outside,
    label: &str,
    sink: &mut Sink,
) -> Option<(Mmdb, Networks)> {
    let mut fields = node.table("audience.mmdb", sink)?;
    let file_node =
        required(&mut fields, "mmdb", "file", "`mmdb = { file = \"/…/City.mmdb\", … }`", sink);
    let where_node = required(
        &mut fields,
        "mmdb",
        "where",
        "such as `where = 'country.iso_code == \"US\"'`",
        sink,
    );
    fields.finish(sink);
    let file = file_node.and_then(|node| located(&node, beside, sink));
    let filter = where_node.and_then(|node| {
        let text = node.string(sink)?;
        let read = Expression::parse(text);
        read.map_err(|error| misread(&node, text, &error, sink)).ok()
    });
    let (path, filter, file_node, where_node) = (file?, filter?, file_node?, where_node?);
    let shown = quote(&path.display().to_string());
    let name =
        path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let database = outside
        .file(&path)
        .map_err(MmdbError::from)
        .and_then(|bytes| Database::from_bytes(name, bytes));
    let selected = database.and_then(|database| database.select(&filter));
    match selected {
        Ok(selected) => {
            if selected.networks.is_empty() {
                sink.warning(
                    where_node.span,
                    format!("no record of {shown} answers the `where` of {label}"),
                );
            }
            Some((Mmdb { file: path, filter }, selected.networks))
        }
        Err(MmdbError::Expression(error)) => {
            misread(&where_node, filter.text(), &error, sink);
            None
        }
        Err(error) => {
            sink.error(file_node.span, format!("{shown} {error}"));
            None
        }
    }
}

fn required<'a>(
    fields: &mut Fields<'a>,
    of: &str,
    key: &'static str,
    help: &str,
    sink: &mut Sink,
) -> Option<Node<'a>> {
    let node = fields.take(key, sink);
    if node.is_none() {
        sink.absent(fields.span, format!("`{of}` has no `{key}`")).help(help);
    }
    node
}

/// Says what is wrong with an expression, at its place where that can be known: in a text without
/// escapes each byte stands for itself.
fn misread(node: &Node<'_>, text: &str, error: &ExpressionError, sink: &mut Sink) {
    let whole = node.span;
    let quotes = (whole.end - whole.start).saturating_sub(text.len());
    let span = match quotes {
        2 | 6 => {
            let first = whole.start + quotes / 2;
            Span { start: first + error.span.start, end: first + error.span.end, ..whole }
        }
        _ => whole,
    };
    let finding = sink.error(span, format!("`{}`: {error}", node.name));
    if let Some(help) = &error.help {
        finding.help(help.clone());
    }
}
