//! `service.health`: how backends are checked.

use std::time::Duration;

use super::{
    model::{Health, Timing},
    scalar::{self, Problem, quote},
    sink::Sink,
    walk::{Fields, Node},
};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(2);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
const DEFAULT_RISE: u32 = 2;
const DEFAULT_FALL: u32 = 3;
/// With shorter ones the checks of a large configuration would be a flood.
const MIN_PERIOD: Duration = Duration::from_millis(10);
const MAX_PERIOD: Duration = Duration::from_secs(3600);
/// Most passes or failures in a row.
const MAX_COUNT: u32 = 1000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Tcp,
    Http,
}

/// What a service gets that says nothing.
pub(super) fn default() -> Health {
    Health::Tcp(Timing {
        interval: DEFAULT_INTERVAL,
        timeout: DEFAULT_TIMEOUT,
        rise: DEFAULT_RISE,
        fall: DEFAULT_FALL,
    })
}

/// Reads the table.
pub(super) fn read(node: &Node<'_>, sink: &mut Sink) -> Option<Health> {
    let mut fields = node.table("service.health", sink)?;
    let kind = match fields.take("type", sink) {
        Some(node) => {
            node.choice(sink, &[("tcp", Kind::Tcp), ("http", Kind::Http), ("none", Kind::None)])
        }
        None => Some(Kind::Tcp),
    };
    let timing = timing(&mut fields, kind, sink);
    let path = fields.take("path", sink);
    let expect = fields.take("expect", sink);
    for node in [path, expect].into_iter().flatten() {
        if matches!(kind, Some(Kind::Tcp | Kind::None)) {
            sink.error(node.span, format!("`{}` is of use with `type = \"http\"` only", node.name));
        }
    }
    let path = path.and_then(|node| node.parse(sink, request_target));
    let expect = expect.map(|node| {
        let list = node.list(sink, |item, sink| item.integer(sink, 100..=599));
        if list.complete && list.items.is_empty() {
            sink.error(node.span, "`expect` is empty: no answer could pass");
        }
        list.distinct(sink, |status| format!("status {status} is listed twice"));
        list.values().into_iter().filter_map(|status| u16::try_from(status).ok()).collect()
    });
    fields.finish(sink);
    Some(match kind? {
        Kind::None => Health::None,
        Kind::Tcp => Health::Tcp(timing),
        Kind::Http => Health::Http {
            path: path.unwrap_or_else(|| "/".to_owned()),
            expect: expect.unwrap_or_else(|| vec![200]),
            timing,
        },
    })
}

fn timing(fields: &mut Fields<'_>, kind: Option<Kind>, sink: &mut Sink) -> Timing {
    let interval = fields.take("interval", sink);
    let timeout = fields.take("timeout", sink);
    let rise = fields.take("rise", sink);
    let fall = fields.take("fall", sink);
    if kind == Some(Kind::None) {
        for node in [interval, timeout, rise, fall].into_iter().flatten() {
            sink.error(node.span, format!("`{}` is of no use with `type = \"none\"`", node.name));
        }
    }
    let timeout_span = timeout.map(|node| node.span);
    let interval = interval
        .and_then(|node| node.parse_loose(sink, |text| period("interval", text)))
        .unwrap_or(DEFAULT_INTERVAL);
    let timeout = timeout
        .and_then(|node| node.parse_loose(sink, |text| period("timeout", text)))
        .unwrap_or(DEFAULT_TIMEOUT.min(interval));
    if let Some(span) = timeout_span
        && timeout > interval
    {
        sink.warning(
            span,
            "`timeout` is longer than `interval`: a backend that does not answer is checked less often",
        );
    }
    let mut times = |node: Option<Node<'_>>, default| {
        node.and_then(|node| node.integer(sink, 1..=MAX_COUNT)).unwrap_or(default)
    };
    Timing { interval, timeout, rise: times(rise, DEFAULT_RISE), fall: times(fall, DEFAULT_FALL) }
}

fn period(key: &str, text: &str) -> Result<Duration, Problem> {
    let duration = scalar::duration(text)?;
    if (MIN_PERIOD..=MAX_PERIOD).contains(&duration) {
        return Ok(duration);
    }
    Err(Problem::new(format!(
        "`{key}` must be from {} to {}, not {}",
        humantime::format_duration(MIN_PERIOD),
        humantime::format_duration(MAX_PERIOD),
        quote(text)
    )))
}

/// A request target in origin form (RFC 9112, section 3.2.1).
fn request_target(text: &str) -> Result<String, Problem> {
    const MAX: usize = 2048;
    if !text.starts_with('/') {
        return Err(Problem::new(format!("`path` must begin with `/`, not be {}", quote(text))));
    }
    if text.len() > MAX {
        return Err(Problem::new(format!("`path` has at most {MAX} bytes")));
    }
    // Nor what RFC 3986 has no place for: servers refuse it, and the check could not be sent.
    let odd = |c: &char| !c.is_ascii_graphic() || "#\"<>\\^`{|}".contains(*c);
    match text.chars().find(odd) {
        Some(odd) => Err(Problem::with(
            format!("`path` can't have the character {}", quote(&odd.to_string())),
            "write it percent-encoded, such as `%20` for a blank",
        )),
        None => Ok(text.to_owned()),
    }
}
