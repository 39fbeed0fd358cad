//! `[[gate]]`: a decision on evidence, its thresholds and its signals.
//!
//! Owns the keys, defaults and bounds of gates. Must not know how evidence is weighed.

use std::{collections::HashMap, time::Duration};

use http::Uri;

use super::{
    model::{Gate, KernelSignal, Probe, ProbeAsk, Signal, SignalKind},
    scalar::{self, Problem, nearest, quote},
    sink::Sink,
    source::Span,
    walk::{Fields, List, Node},
};
use crate::rollout::outlook::undecided;

const DEFAULT_ALPHA: f64 = 0.01;
const DEFAULT_BETA: f64 = 0.05;
/// Below this, evidence for a decision takes longer than any rollout lasts.
const MIN_RISK: f64 = 1e-9;
/// Above this a toss of a coin decides better.
const MAX_RISK: f64 = 0.5;
const DEFAULT_MIN_DURATION: Duration = Duration::from_secs(5 * 60);
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60 * 60);
const DEFAULT_TOLERATE: f64 = 1.2;
/// `pass_below` where it is not set, in multiples of `tolerate`.
const DEFAULT_PASS_RATIO: f64 = 2.5;
const MAX_TOLERATE: f64 = 100.0;
const MAX_PASS_BELOW: f64 = 1000.0;
/// Nearer together, the two questions can't be told apart in any sensible time.
const MIN_PASS_RATIO: f64 = 1.01;
const DEFAULT_QUANTILE_PERMILLE: u16 = 950;
/// Each signal takes its part of `alpha`.
const MAX_SIGNALS: usize = 32;
const MAX_NAME_BYTES: usize = 63;
const MAX_QUERY_BYTES: usize = 8 << 10;
const MAX_URL_BYTES: usize = 2 << 10;
const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
const DEFAULT_RETRIES: u32 = 2;
const DEFAULT_RISE: u32 = 2;
const DEFAULT_FALL: u32 = 3;
/// Shorter, and whoever is asked has nothing else to do.
const MIN_PERIOD: Duration = Duration::from_millis(100);
const MAX_PERIOD: Duration = Duration::from_secs(60 * 60);
const MAX_RETRIES: u32 = 10;
const MAX_IN_A_ROW: u32 = 1000;
/// What a program can be given is limited by the system, too.
const MAX_WORDS: usize = 64;

/// A gate and where its name is.
#[derive(Debug)]
pub(super) struct Placed {
    /// The gate. Where something could not be read, an error is known and a default stands in.
    pub gate: Gate,
    name: Option<Span>,
}

/// Reports names that two gates have.
pub(super) fn distinct(gates: &[Placed], sink: &mut Sink) {
    let mut seen: HashMap<&str, Span> = HashMap::new();
    for placed in gates {
        let Some(span) = placed.name else { continue };
        let name = placed.gate.name.as_str();
        if let Some(first) = seen.get(name) {
            sink.error(span, format!("two gates are called `{name}`"))
                .also(*first, "the first is here");
        } else {
            seen.insert(name, span);
        }
    }
}

/// Reads one `[[gate]]`.
pub(super) fn read(node: &Node<'_>, sink: &mut Sink) -> Option<Placed> {
    let mut fields = node.table("gate", sink)?;
    let span = fields.span;
    let name_node = fields.take("name", sink);
    let name = match name_node {
        Some(node) => node.parse(sink, |text| scalar::name(text, "gate", MAX_NAME_BYTES)),
        None => {
            sink.absent(span, "this gate has no `name`");
            None
        }
    };
    let label = match &name {
        Some(name) => format!("gate `{name}`"),
        None => "this gate".to_owned(),
    };
    let alpha = risk(&mut fields, "alpha", sink).unwrap_or(DEFAULT_ALPHA);
    let beta = risk(&mut fields, "beta", sink).unwrap_or(DEFAULT_BETA);
    let (min_duration, deadline) = times(&mut fields, sink);
    let signals = match fields.take("signals", sink) {
        Some(node) => signals(&node, &label, sink),
        None => {
            sink.absent(span, format!("{label} has no `signals`"))
                .help("such as `signals = [{ name = \"connect_failed\" }]`");
            Vec::new()
        }
    };
    fields.finish(sink);
    let gate =
        Gate { name: name.unwrap_or_default(), alpha, beta, min_duration, deadline, signals };
    for why in undecided(&gate) {
        sink.warning(span, format!("{label} {why}"))
            .help("ask more often, for fewer answers in a row, or set a later `deadline`");
    }
    Some(Placed { name: name_node.filter(|_| !gate.name.is_empty()).map(|node| node.span), gate })
}

fn risk(fields: &mut Fields<'_>, key: &'static str, sink: &mut Sink) -> Option<f64> {
    let node = fields.take(key, sink)?;
    let value = node.float(sink)?;
    if (MIN_RISK..=MAX_RISK).contains(&value) {
        return Some(value);
    }
    let why = match value {
        value if value > MAX_RISK => "above 0.5 a toss of a coin decides better",
        value if value <= 0.0 => "without any risk of being wrong nothing is ever decided",
        _ => "with less nothing is decided before the deadline",
    };
    sink.error(node.span, format!("`{key}` must be from {MIN_RISK} to {MAX_RISK}, not {value}"))
        .help(format!("{why}; 0.01 is one wrong verdict in a hundred"));
    None
}

fn times(fields: &mut Fields<'_>, sink: &mut Sink) -> (Duration, Duration) {
    let min_node = fields.take("min_duration", sink);
    let deadline_node = fields.take("deadline", sink);
    let min_duration = min_node
        .and_then(|node| node.parse_loose(sink, scalar::duration))
        .unwrap_or(DEFAULT_MIN_DURATION);
    let deadline = deadline_node
        .and_then(|node| node.parse_loose(sink, scalar::duration))
        .unwrap_or(DEFAULT_DEADLINE);
    if let Some(node) = deadline_node.or(min_node)
        && deadline <= min_duration
    {
        let unset = |node: Option<Node<'_>>| if node.is_none() { ", the default" } else { "" };
        sink.error(
            node.span,
            format!(
                "`deadline` ({}{}) must be later than `min_duration` ({}{}): the gate could \
                 never pass",
                humantime::format_duration(deadline),
                unset(deadline_node),
                humantime::format_duration(min_duration),
                unset(min_node),
            ),
        );
    }
    (min_duration, deadline)
}

fn signals(node: &Node<'_>, label: &str, sink: &mut Sink) -> Vec<Signal> {
    let mut list: List<Signal> = List::default();
    let mut seen: HashMap<SignalKind, Span> = HashMap::new();
    for item in node.items() {
        let signal = signal(&item, sink);
        if let Some(Signal::Kernel(KernelSignal { kind, .. })) = &signal {
            if let Some(first) = seen.get(kind) {
                sink.error(item.span, format!("`{}` is listed twice in {label}", kind.name()))
                    .also(*first, "it is here first");
            } else {
                seen.insert(*kind, item.span);
            }
        }
        list.push(signal);
    }
    if list.items.len() > MAX_SIGNALS {
        sink.error(
            node.span,
            format!(
                "a gate has at most {MAX_SIGNALS} signals, this one has {}: each takes its part \
                 of `alpha`",
                list.items.len()
            ),
        );
    }
    let observed = |signal: &Signal| match signal {
        Signal::Kernel(signal) => signal.observe,
        Signal::Probe(probe) => probe.observe,
    };
    if list.complete && list.items.iter().all(observed) {
        let why = match list.items.is_empty() {
            true => "is empty",
            false => "are all `observe = true`",
        };
        sink.error(node.span, format!("`signals` of {label} {why}: nothing would decide"));
    }
    list.items
}

fn signal(item: &Node<'_>, sink: &mut Sink) -> Option<Signal> {
    if let Some(name) = item.as_str() {
        let finding = item.mismatch("tables `{ name, tolerate, pass_below }`", sink);
        if let Some(kind) = SignalKind::ALL.iter().find(|kind| kind.name() == name) {
            finding.help(format!("write `{{ name = \"{}\" }}`", kind.name()));
        }
        return None;
    }
    let mut fields = item.table("gate.signals", sink)?;
    let observe_node = fields.take("observe", sink);
    let observe = observe_node.and_then(|node| node.boolean(sink)).unwrap_or(false);
    let name = fields.take("name", sink);
    let kernel_keys = ["over", "tolerate", "pass_below"].map(|key| fields.take(key, sink));
    let asked = ["prometheus", "command", "webhook"].map(|key| fields.take(key, sink));
    let query_keys = ["query", "above"].map(|key| fields.take(key, sink));
    let pace_keys = ["interval", "timeout", "retries", "rise", "fall"];
    let pace_keys = pace_keys.map(|key| fields.take(key, sink));
    fields.finish(sink);
    let mut kinds_given = name.iter().chain(asked.iter().flatten());
    let Some(first) = kinds_given.next() else {
        sink.absent(item.span, "this signal has no `name`").help(format!(
            "it is one of {}, or has a `prometheus`, a `command` or a `webhook`",
            kinds()
        ));
        return None;
    };
    if let Some(second) = kinds_given.next() {
        sink.error(
            second.span,
            format!("a signal has a `{}` or a `{}`, not both", first.name, second.name),
        )
        .help(
            "`name` is what connections do, counted by the agent; `prometheus`, `command` and \
             `webhook` ask somebody else",
        );
        return None;
    }
    let misplaced = |nodes: &[Option<Node<'_>>], with: &str, sink: &mut Sink| {
        for node in nodes.iter().flatten() {
            sink.error(node.span, format!("`{}` is of use with {with} only", node.name));
        }
    };
    if let Some(name) = name {
        misplaced(&query_keys, "`prometheus`", sink);
        misplaced(&pace_keys, "`prometheus`, `command` and `webhook`", sink);
        return kernel(&name, kernel_keys, observe, sink).map(Signal::Kernel);
    }
    misplaced(&kernel_keys, "`name`", sink);
    let [server, command, webhook] = asked;
    let ask = match (server, command, webhook) {
        (Some(server), ..) => prometheus(&server, query_keys, item.span, sink),
        (_, command, webhook) => {
            misplaced(&query_keys, "`prometheus`", sink);
            match (command, webhook) {
                (Some(node), _) => words(&node, sink).map(ProbeAsk::Command),
                (_, Some(node)) => node.parse(sink, web_address).map(ProbeAsk::Webhook),
                (None, None) => None,
            }
        }
    };
    probe(ask, pace_keys, observe, sink).map(Signal::Probe)
}

/// When and how often somebody is asked.
fn probe(
    ask: Option<ProbeAsk>,
    [interval, timeout, retries, rise, fall]: [Option<Node<'_>>; 5],
    observe: bool,
    sink: &mut Sink,
) -> Option<Probe> {
    let mut time = |node: Option<Node<'_>>, default| {
        node.and_then(|node| node.parse_loose(sink, |text| period(node.name, text)))
            .unwrap_or(default)
    };
    let (interval, timeout) = (time(interval, DEFAULT_INTERVAL), time(timeout, DEFAULT_TIMEOUT));
    let mut count = |node: Option<Node<'_>>, range, default| {
        node.and_then(|node| node.integer(sink, range)).unwrap_or(default)
    };
    Some(Probe {
        interval,
        timeout,
        retries: count(retries, 0..=MAX_RETRIES, DEFAULT_RETRIES),
        rise: count(rise, 1..=MAX_IN_A_ROW, DEFAULT_RISE),
        fall: count(fall, 1..=MAX_IN_A_ROW, DEFAULT_FALL),
        observe,
        ask: ask?,
    })
}

fn period(key: &str, text: &str) -> Result<Duration, Problem> {
    let duration = scalar::duration(text)?;
    match (MIN_PERIOD..=MAX_PERIOD).contains(&duration) {
        true => Ok(duration),
        false => Err(Problem::new(format!(
            "`{key}` must be from {} to {}, not {}",
            humantime::format_duration(MIN_PERIOD),
            humantime::format_duration(MAX_PERIOD),
            quote(text)
        ))),
    }
}

/// A program and what it is given.
fn words(node: &Node<'_>, sink: &mut Sink) -> Option<Vec<String>> {
    if node.as_str().is_some() {
        node.mismatch("a list of words", sink)
            .help("no shell reads it: `[\"/usr/local/bin/check\", \"--fast\"]`");
        return None;
    }
    let list = node.list(sink, |item, sink| {
        let word = item.string(sink)?;
        if word.contains('\0') {
            sink.error(item.span, "a word of a command can't have a zero byte");
            return None;
        }
        Some(word.to_owned())
    });
    let program = list.items.first()?;
    if !program.value.starts_with('/') {
        sink.error(
            program.span,
            format!("{} is no absolute path of a program", quote(&program.value)),
        )
        .help("which program is run must not depend on where the agent was started");
        return None;
    }
    if list.items.len() > MAX_WORDS {
        sink.error(node.span, format!("a command has at most {MAX_WORDS} words"));
        return None;
    }
    list.complete.then(|| list.items.into_iter().map(|item| item.value).collect())
}

fn kinds() -> String {
    SignalKind::ALL.map(|kind| format!("\"{}\"", kind.name())).join(", ")
}

fn kernel(
    name: &Node<'_>,
    [over, tolerate, pass_below]: [Option<Node<'_>>; 3],
    observe: bool,
    sink: &mut Sink,
) -> Option<KernelSignal> {
    let kind = name.choice(sink, &SignalKind::ALL.map(|kind| (kind.name(), kind)));
    let quantile_permille = match (kind, over) {
        (Some(SignalKind::SlowHandshake) | None, Some(node)) => {
            node.parse(sink, quantile).or(Some(DEFAULT_QUANTILE_PERMILLE))
        }
        (Some(SignalKind::SlowHandshake), None) => Some(DEFAULT_QUANTILE_PERMILLE),
        (Some(_), Some(node)) => {
            sink.error(node.span, "`over` is of use with `name = \"slow_handshake\"` only");
            None
        }
        (_, None) => None,
    };
    let tolerate_value = tolerate.and_then(|node| {
        let value = node.float(sink)?;
        if (1.0..=MAX_TOLERATE).contains(&value) {
            return Some(value);
        }
        let finding = sink
            .error(node.span, format!("`tolerate` must be from 1 to {MAX_TOLERATE}, not {value}"));
        if value < 1.0 {
            finding.help("below 1 a canary would fail that is just as good as control");
        }
        None
    });
    // What can't be read has an error: no second one because of it.
    let known = tolerate.is_none() || tolerate_value.is_some();
    let tolerate = tolerate_value.unwrap_or(DEFAULT_TOLERATE);
    let least = tolerate * MIN_PASS_RATIO;
    let pass_below = pass_below.and_then(|node| {
        let value = node.float(sink)?;
        if known && value < least {
            sink.error(
                node.span,
                format!(
                    "`pass_below` must be above `tolerate` ({tolerate}), not {value}: a canary \
                     between the two could fail and pass"
                ),
            )
            .help(format!("at least {least}; the nearer, the longer it takes to pass"));
            return None;
        }
        if value > MAX_PASS_BELOW || value <= 0.0 {
            sink.error(
                node.span,
                format!("`pass_below` must be at most {MAX_PASS_BELOW} and more than `tolerate`, not {value}"),
            );
            return None;
        }
        Some(value)
    });
    let pass_below = pass_below.unwrap_or(tolerate * DEFAULT_PASS_RATIO);
    if let Some(permille) = quantile_permille.filter(|_| !observe) {
        let usual_permille = 1_000 - permille;
        let most = 1_000.0 / f64::from(usual_permille);
        if pass_below >= most {
            sink.warning(
                name.span,
                format!(
                    "this signal never lets a canary pass: {} % of control's handshakes are slow \
                     by definition, and no canary has {pass_below} times as many",
                    f64::from(usual_permille) / 10.0
                ),
            )
            .help(format!("a `pass_below` under {}, or a higher part in `over`", most.floor()));
        }
    }
    Some(KernelSignal { kind: kind?, quantile_permille, tolerate, pass_below, observe })
}

/// `control:p95`, in thousandths.
fn quantile(text: &str) -> Result<u16, Problem> {
    let bad = || {
        Problem::with(
            format!("{} is not a part of control's handshakes", quote(text)),
            "write `control:p95`: longer than 95 % of control's when the rollout began",
        )
    };
    let Some((version, part)) = text.split_once(':') else {
        return Err(bad());
    };
    if version != "control" {
        let problem = bad();
        return Err(match nearest(version, ["control"]) {
            Some(word) => Problem::with(problem.message, format!("did you mean `{word}:{part}`?")),
            None => problem,
        });
    }
    let number = part.strip_prefix('p').ok_or_else(bad)?;
    let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str, most: usize| {
        (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit())
    };
    if !digits(whole, 2) || !digits(tenth, 1) {
        return Err(bad());
    }
    let permille = whole.parse::<u16>().ok().zip(tenth.parse::<u16>().ok());
    match permille.map(|(whole, tenth)| whole * 10 + tenth) {
        Some(permille) if permille >= 500 => Ok(permille),
        _ => Err(Problem::with(
            format!("{} is less than half of control's handshakes", quote(text)),
            "from `control:p50` to `control:p99.9`: what is slow is the exception",
        )),
    }
}

fn prometheus(
    server: &Node<'_>,
    [query_node, above_node]: [Option<Node<'_>>; 2],
    span: Span,
    sink: &mut Sink,
) -> Option<ProbeAsk> {
    let url = server.parse(sink, url);
    let mut missing = |key: &str| {
        sink.absent(span, format!("this signal has no `{key}`"))
            .help("write `{ prometheus = \"http://ADDRESS:9090\", query = \"…\", above = 0.01 }`");
    };
    if query_node.is_none() {
        missing("query");
    }
    if above_node.is_none() {
        missing("above");
    }
    let query = query_node.and_then(|node| {
        node.parse(sink, |text| {
            if text.trim().is_empty() {
                return Err(Problem::new("`query` is empty"));
            }
            if text.len() > MAX_QUERY_BYTES {
                return Err(Problem::new(format!(
                    "`query` has at most {MAX_QUERY_BYTES} bytes, this one has {}",
                    text.len()
                )));
            }
            Ok(text.to_owned())
        })
    });
    let above = above_node.and_then(|node| node.float(sink));
    Some(ProbeAsk::Prometheus { url: url?, query: query?, above: above? })
}

/// The address of a server: `http://127.0.0.1:9090`, with a path if it has a prefix.
fn url(text: &str) -> Result<String, Problem> {
    let bad = |why: &str| {
        Err(Problem::with(
            format!("{} is not the address of a Prometheus server: {why}", quote(text)),
            "write it as `http://127.0.0.1:9090`",
        ))
    };
    if let Err(why) = address(text) {
        return bad(why);
    }
    if text.contains('?') || text.contains('#') {
        return bad("it has a query of its own, which belongs into `query`");
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// The address that something is sent to: `https://deploy.example/canary?team=shop`.
pub(super) fn web_address(text: &str) -> Result<String, Problem> {
    let bad = |why: &str| {
        Err(Problem::with(
            format!("{} is nothing that can be called: {why}", quote(text)),
            "write it as `http://127.0.0.1:8080/ok`",
        ))
    };
    if text.len() > MAX_URL_BYTES {
        return bad("it is too long");
    }
    match address(text) {
        Err(why) => bad(why),
        Ok(()) if text.contains('#') => bad("a part of a page can't be called"),
        Ok(()) => Ok(text.to_owned()),
    }
}

fn address(text: &str) -> Result<(), &'static str> {
    let Ok(uri) = text.parse::<Uri>() else {
        return Err("it is no URL");
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err("it begins neither with `http://` nor `https://`");
    }
    match uri.authority() {
        Some(authority) if authority.as_str().contains('@') => {
            Err("a name and password can't stand in it")
        }
        Some(authority) if !authority.host().is_empty() => Ok(()),
        _ => Err("it names no host"),
    }
}
