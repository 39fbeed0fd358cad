//! Combinators over the parsed document: each reads one kind of value, and says
//! to the [`Sink`] what it found instead, with the place.
//!
//! Owns the wording of type errors, of keys that are set twice, unknown, or of a
//! later release. Must not know which keys there are.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    ops::RangeInclusive,
};

use toml::de::{DeTable, DeValue};

use super::{
    scalar::{Problem, nearest, quote},
    sink::Sink,
    source::{At, Span},
};

/// One value, its place, and the key it was found under.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node<'a> {
    /// The key, for messages; that of the list for one of its items.
    pub name: &'static str,
    /// Where the value is.
    pub span: Span,
    value: &'a DeValue<'a>,
}

/// A list, and whether all of it could be read.
#[derive(Clone, Debug)]
pub(super) struct List<T> {
    /// What could be read.
    pub items: Vec<T>,
    /// Whether that is all: checks that count or compare make no sense otherwise.
    pub complete: bool,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { items: Vec::new(), complete: true }
    }
}

impl<T> List<T> {
    /// Adds what could be read, or remembers that it couldn't.
    pub(super) fn push(&mut self, item: Option<T>) {
        match item {
            Some(item) => self.items.push(item),
            None => self.complete = false,
        }
    }
}

impl<T: Copy + Eq + Hash> List<At<T>> {
    /// Reports what stands in the list more than once.
    pub(super) fn distinct(&self, sink: &mut Sink, message: impl Fn(T) -> String) {
        let mut seen: HashMap<T, Span> = HashMap::new();
        for At { value, span } in &self.items {
            if let Some(first) = seen.get(value) {
                sink.error(*span, message(*value)).also(*first, "it is here first");
            } else {
                seen.insert(*value, *span);
            }
        }
    }

    /// The values alone.
    pub(super) fn values(&self) -> Vec<T> {
        self.items.iter().map(|item| item.value).collect()
    }
}

/// `an integer`, `a table` …: the kind of a value in a sentence.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

impl<'a> Node<'a> {
    /// Says that the value should have been `expected`.
    pub(super) fn mismatch<'s>(
        &self,
        expected: &str,
        sink: &'s mut Sink,
    ) -> &'s mut super::sink::Finding {
        sink.error(
            self.span,
            format!("`{}` must be {expected}, not {}", self.name, kind(self.value)),
        )
    }

    /// The text, if it is a string.
    pub(super) fn as_str(&self) -> Option<&'a str> {
        match self.value {
            DeValue::String(text) => Some(text.as_ref()),
            _ => None,
        }
    }

    /// The number as it is written, if it is one.
    pub(super) fn number(&self) -> Option<String> {
        match self.value {
            DeValue::Integer(number) => Some(number.to_string()),
            DeValue::Float(number) => Some(number.as_str().to_owned()),
            _ => None,
        }
    }

    /// Whether it is a table.
    pub(super) fn is_table(&self) -> bool {
        matches!(self.value, DeValue::Table(_))
    }

    /// Whether it is `true` or `false`.
    pub(super) fn is_boolean(&self) -> bool {
        matches!(self.value, DeValue::Boolean(_))
    }

    /// Whether it is a list.
    pub(super) fn is_list(&self) -> bool {
        matches!(self.value, DeValue::Array(_))
    }

    /// A string.
    pub(super) fn string(&self, sink: &mut Sink) -> Option<&'a str> {
        let text = self.as_str();
        if text.is_none() {
            self.mismatch("a string", sink);
        }
        text
    }

    /// A string that `parse` understands.
    pub(super) fn parse<T>(
        &self,
        sink: &mut Sink,
        parse: impl FnOnce(&str) -> Result<T, Problem>,
    ) -> Option<T> {
        let text = self.string(sink)?;
        self.check(parse(text), sink)
    }

    /// A string, or a number in its place, that `parse` understands: for what
    /// people write without its unit or protocol.
    pub(super) fn parse_loose<T>(
        &self,
        sink: &mut Sink,
        parse: impl FnOnce(&str) -> Result<T, Problem>,
    ) -> Option<T> {
        match self.number() {
            Some(number) => self.check(parse(&number), sink),
            None => self.parse(sink, parse),
        }
    }

    /// Reports the problem, if it is one.
    pub(super) fn check<T>(&self, result: Result<T, Problem>, sink: &mut Sink) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(Problem { message, help }) => {
                let finding = sink.error(self.span, message);
                if let Some(help) = help {
                    finding.help(help);
                }
                None
            }
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&self, sink: &mut Sink, choices: &[(&str, T)]) -> Option<T> {
        let text = self.string(sink)?;
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<String> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        let finding = sink.error(self.span, format!("`{}` can't be {}", self.name, quote(text)));
        match nearest(text, choices.iter().map(|(word, _)| *word)) {
            Some(word) => finding.help(format!("did you mean \"{word}\"?")),
            None => finding.help(format!("it is one of {}", words.join(", "))),
        };
        None
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self, sink: &mut Sink) -> Option<bool> {
        match self.value {
            DeValue::Boolean(value) => Some(*value),
            _ => {
                self.mismatch("true or false", sink);
                None
            }
        }
    }

    /// A whole number in `range`.
    pub(super) fn integer(&self, sink: &mut Sink, range: RangeInclusive<u32>) -> Option<u32> {
        let DeValue::Integer(number) = self.value else {
            self.mismatch("a whole number", sink);
            return None;
        };
        let value = i128::from_str_radix(number.as_str(), number.radix())
            .ok()
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| range.contains(n));
        if value.is_none() {
            sink.error(
                self.span,
                format!(
                    "`{}` must be from {} to {}, not {number}",
                    self.name,
                    range.start(),
                    range.end()
                ),
            );
        }
        value
    }

    /// A number, whole or not, that is finite.
    pub(super) fn float(&self, sink: &mut Sink) -> Option<f64> {
        let value = match self.value {
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .ok()
                .map(|number| number as f64),
            DeValue::Float(number) => number.as_str().parse::<f64>().ok(),
            DeValue::String(text) => {
                let finding = self.mismatch("a number", sink);
                let percent = text.strip_suffix('%').map(str::trim_end);
                if let Some(percent) = percent.and_then(|text| text.parse::<f64>().ok()) {
                    finding.help(format!("write `{}`", percent / 100.0));
                }
                return None;
            }
            _ => {
                self.mismatch("a number", sink);
                return None;
            }
        };
        let finite = value.filter(|value| value.is_finite());
        if finite.is_none() {
            sink.error(self.span, format!("`{}` must be a finite number", self.name));
        }
        finite
    }

    /// The items of a list; anything else stands for a list of itself.
    pub(super) fn items(&self) -> Vec<Node<'a>> {
        match self.value {
            DeValue::Array(items) => items
                .iter()
                .map(|item| Node {
                    name: self.name,
                    span: Span::new(self.span.file, item.span()),
                    value: item.get_ref(),
                })
                .collect(),
            _ => vec![*self],
        }
    }

    /// The items of a list, each through `read`.
    pub(super) fn list<T>(
        &self,
        sink: &mut Sink,
        mut read: impl FnMut(&Node<'a>, &mut Sink) -> Option<T>,
    ) -> List<At<T>> {
        let mut list = List::default();
        for item in self.items() {
            let value = read(&item, sink);
            list.push(value.map(|value| At { value, span: item.span }));
        }
        list
    }

    /// A table, whose keys are at `path`.
    pub(super) fn table(&self, path: impl Into<String>, sink: &mut Sink) -> Option<Fields<'a>> {
        match self.value {
            DeValue::Table(table) => {
                let mut fields = Fields::new(path, self.span);
                fields.add(self.span.file, table);
                Some(fields)
            }
            _ => {
                self.mismatch("a table", sink);
                None
            }
        }
    }
}

/// A key and its value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    /// The key.
    pub key: &'a str,
    /// Where the key is.
    pub span: Span,
    value: &'a DeValue<'a>,
    value_span: Span,
}

impl<'a> Entry<'a> {
    /// The value, called `name` in messages.
    pub(super) fn node(&self, name: &'static str) -> Node<'a> {
        Node { name, span: self.value_span, value: self.value }
    }
}

/// The keys of a table, or of one that is spread over files. What is not taken
/// is unknown.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    /// Where the table begins.
    pub span: Span,
    path: String,
    entries: BTreeMap<&'a str, Vec<Entry<'a>>>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// An empty table at `span`, its keys at `path` (`service.health`; empty for the document).
    pub(super) fn new(path: impl Into<String>, span: Span) -> Self {
        Self { span, path: path.into(), entries: BTreeMap::new(), known: Vec::new() }
    }

    /// Adds the keys of `table`.
    pub(super) fn add(&mut self, file: usize, table: &'a DeTable<'a>) {
        for (key, value) in table {
            let entry = Entry {
                key: key.get_ref().as_ref(),
                span: Span::new(file, key.span()),
                value: value.get_ref(),
                value_span: Span::new(file, value.span()),
            };
            self.entries.entry(entry.key).or_default().push(entry);
        }
    }

    /// Adds the keys of the table that `node` is.
    pub(super) fn merge(&mut self, node: &Node<'a>, sink: &mut Sink) {
        match node.value {
            DeValue::Table(table) => self.add(node.span.file, table),
            _ => {
                node.mismatch("a table", sink);
            }
        }
    }

    /// All values of `key`, one for each file that sets it.
    pub(super) fn take_all(&mut self, key: &'static str) -> Vec<Node<'a>> {
        self.known.push(key);
        let entries = self.entries.remove(key).unwrap_or_default();
        entries.iter().map(|entry| entry.node(key)).collect()
    }

    /// The value of `key`; a second one in another file is an error.
    pub(super) fn take(&mut self, key: &'static str, sink: &mut Sink) -> Option<Node<'a>> {
        self.known.push(key);
        let entries = self.entries.remove(key)?;
        let mut entries = entries.into_iter();
        let first = entries.next()?;
        for second in entries {
            let path = self.path_of(key);
            sink.error(second.span, format!("`{path}` is set twice"))
                .also(first.span, "it is set here first");
        }
        Some(first.node(key))
    }

    /// Every key with its value, in the order of the files: for tables whose
    /// keys are names.
    pub(super) fn take_names(&mut self) -> Vec<Entry<'a>> {
        let mut entries: Vec<Entry<'a>> =
            std::mem::take(&mut self.entries).into_values().flatten().collect();
        entries.sort_by_key(|entry| entry.span);
        entries
    }

    /// Reports what is left: unknown keys.
    pub(super) fn finish(self, sink: &mut Sink) {
        for entry in self.entries.values().flatten() {
            let path = self.path_of(entry.key);
            let finding = sink.error(entry.span, format!("unknown key {}", quote(&path)));
            match nearest(entry.key, self.known.iter().copied()) {
                Some(key) => finding.help(format!("did you mean `{key}`?")),
                None => finding.help(format!(
                    "known keys here: {}",
                    self.known.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
                )),
            };
        }
    }

    fn path_of(&self, key: &str) -> String {
        match self.path.as_str() {
            "" => key.to_owned(),
            path => format!("{path}.{key}"),
        }
    }
}
