//! What was changed when, and where the buckets of the held connections led
//! meanwhile: what somebody needs who looks into a connection that broke.

use std::{collections::HashMap, fmt::Write as _, net::SocketAddr, time::Instant};

use canary_agent::api::model::Explain;
use canary_ebpf_common::entry::Entry;
use canary_tests::{
    agent::Agent,
    control::Control,
    hold::{Fault, Kind, Record, State},
    tables::{Place, Tables},
    topology::Family,
};

use super::seconds;
use crate::support::{ECHO, SHOP};

/// Faulty connections that are told of in full.
const TOLD: usize = 5;

/// Changes and what followed from them.
pub(super) struct History {
    started: Instant,
    tables: Tables,
    places: HashMap<(&'static str, Family), Place>,
    steps: Vec<(Instant, String)>,
    /// By connection.
    ways: HashMap<usize, Way>,
}

/// Where the bucket of a connection has led.
struct Way {
    bucket: u32,
    /// Its entry, after the steps that changed it.
    led: Vec<(usize, Entry)>,
}

/// The service that a connection is to.
pub(super) fn service(kind: Kind) -> &'static str {
    match kind {
        Kind::Udp => ECHO,
        _ => SHOP,
    }
}

/// An address and port as a part of a request's target.
pub(super) fn encoded(addr: SocketAddr) -> String {
    let mut text = String::new();
    for byte in addr.to_string().bytes() {
        let _ = write!(text, "%{byte:02x}");
    }
    text
}

/// The query for where a connection goes.
fn explain_target(record: &Record) -> String {
    let from = encoded(record.from);
    let protocol = if record.kind == Kind::Udp { "udp" } else { "tcp" };
    format!("/v1/services/{}/explain?from={from}&protocol={protocol}", service(record.kind))
}

impl History {
    pub(super) fn new(started: Instant, agent: &Agent<'_>) -> Self {
        let tables = Tables::open(&agent.folder().join("bpffs/canary"));
        let all = [SHOP, ECHO].into_iter().flat_map(|name| Family::ALL.map(|f| (name, f)));
        let places = all.map(|(name, f)| ((name, f), tables.place(name, f))).collect();
        Self { started, tables, places, steps: Vec::new(), ways: HashMap::new() }
    }

    /// A step was taken: looks where the buckets of open connections lead now.
    /// Without an agent to ask, new connections have no bucket yet.
    pub(super) fn note(&mut self, what: String, records: &[Record], control: Option<&mut Control>) {
        let step = self.steps.len();
        self.steps.push((Instant::now(), what));
        if let Some(control) = control {
            for (id, record) in records.iter().enumerate() {
                if record.state == State::Open && !self.ways.contains_key(&id) {
                    let answer = control.ask("GET", &explain_target(record), b"");
                    let explain: Explain = answer.expect("an explanation").json();
                    let bucket = explain.bucket.expect("a bucket");
                    self.ways.insert(id, Way { bucket, led: Vec::new() });
                }
            }
        }
        let entries: HashMap<_, _> =
            self.places.iter().map(|(key, place)| (*key, self.tables.entries(place))).collect();
        for (id, Way { bucket, led }) in &mut self.ways {
            let record = &records[*id];
            let table = &entries[&(service(record.kind), record.family)];
            let entry = Entry(table[*bucket as usize]);
            if record.state == State::Open && led.last().is_none_or(|(_, last)| *last != entry) {
                led.push((step, entry));
            }
        }
    }

    /// How many connections had their bucket moved while they were open.
    pub(super) fn elsewhere(&self) -> usize {
        let moved = |way: &&Way| way.led.iter().any(|(_, e)| e.current() != way.led[0].1.current());
        self.ways.values().filter(moved).count()
    }

    /// All changes.
    pub(super) fn changes(&self) -> String {
        let line = |(number, (at, what)): (usize, &(Instant, String))| {
            format!("{} step {number}: {what}\n", seconds(at.duration_since(self.started)))
        };
        self.steps.iter().enumerate().map(line).collect()
    }

    /// What is known of the faults, in the order of time.
    pub(super) fn blame(&self, agent: &Agent<'_>, records: &[Record]) -> String {
        let mut faulty: Vec<(usize, &Record)> =
            records.iter().enumerate().filter(|(_, record)| !record.faults.is_empty()).collect();
        faulty.sort_by_key(|(_, record)| record.faults[0].at);
        let mut text = format!("{} connections have noticed something\n", faulty.len());
        for (id, record) in faulty.iter().take(TOLD) {
            self.tell(&mut text, agent, *id, record);
        }
        for (id, record) in faulty.iter().skip(TOLD) {
            let Fault { cause, what, .. } = &record.faults[0];
            let _ =
                writeln!(text, "{:?} {id} from {}: {cause:?}: {what}", record.kind, record.from);
        }
        text + "\nthe steps:\n" + &self.changes()
    }

    fn tell(&self, text: &mut String, agent: &Agent<'_>, id: usize, record: &Record) {
        let Record { kind, from, to, server, begun, bytes, .. } = record;
        let since = |at: Instant| seconds(at.duration_since(self.started));
        let _ = writeln!(
            text,
            "\n{kind:?} connection {id} from {from} to {to}, on {}, begun at {}, {bytes} bytes:",
            server.as_deref().unwrap_or("nobody"),
            since(*begun)
        );
        for Fault { at, cause, what } in &record.faults {
            let last = self.steps.iter().rposition(|(step, _)| step <= at);
            let last = last.map_or("before the first step".to_owned(), |n| {
                format!("after step {n}: {}", self.steps[n].1)
            });
            let _ = writeln!(text, "  {} {cause:?}: {what} ({last})", since(*at));
        }
        if let Some(Way { bucket, led }) = self.ways.get(&id) {
            let _ = writeln!(text, "  bucket {bucket} led");
            let addr = |index| {
                let addr: Option<SocketAddr> = self.tables.addr(index);
                addr.map_or("nobody".to_owned(), |addr| addr.to_string())
            };
            for (step, entry) in led {
                let _ = write!(
                    text,
                    "  {} after step {step} to {}",
                    since(self.steps[*step].0),
                    addr(entry.current())
                );
                let _ = match (entry.tracked(), entry.learning()) {
                    (false, _) => writeln!(text),
                    (true, learning) => {
                        let learning = if learning { ", learning" } else { "" };
                        writeln!(text, ", tracked, before to {}{learning}", addr(entry.previous()))
                    }
                };
            }
        }
        let protocol = if *kind == Kind::Udp { "udp" } else { "tcp" };
        let from = from.to_string();
        let explain =
            ["explain", service(*kind), "--from", &from, "--protocol", protocol, "--json"];
        let output = agent.cli(&explain);
        let _ = writeln!(text, "  {}{}", output.stdout, output.stderr);
    }
}
