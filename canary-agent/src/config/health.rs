//! `service.health`: how backends are checked.

use std::{path::Path, sync::Arc, time::Duration};

use tokio_rustls::rustls::{
    RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

use super::{
    model::{Ask, Check, Forward, Health, Http, Timing, Tls, Via},
    outside::Outside,
    scalar::{self, Problem, quote},
    sink::Sink,
    walk::{Fields, Node},
};

const DEFAULT_INTERVAL: Duration = Duration::from_secs(2);
const DEFAULT_JITTER: u8 = 10;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
const DEFAULT_RISE: u32 = 2;
const DEFAULT_FALL: u32 = 3;
/// With shorter ones the checks of a large configuration would be a flood.
const MIN_PERIOD: Duration = Duration::from_millis(10);
const MAX_PERIOD: Duration = Duration::from_secs(3600);
/// More than half an interval is no pace any more.
const MAX_JITTER: u8 = 50;
/// Most passes or failures in a row.
const MAX_COUNT: u32 = 1000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Tcp,
    Http,
    Https,
}

/// What a service gets that says nothing.
pub(super) fn default() -> Health {
    Health::Check(Check {
        ask: Ask::Tcp,
        via: Via::Backend,
        timing: Timing {
            interval: DEFAULT_INTERVAL,
            jitter_percent: DEFAULT_JITTER,
            timeout: DEFAULT_TIMEOUT,
            rise: DEFAULT_RISE,
            fall: DEFAULT_FALL,
        },
    })
}

/// Reads the table. `forward` is that of the service, if it could be read.
pub(super) fn read(
    node: &Node<'_>,
    forward: Option<Forward>,
    outside: &dyn Outside,
    sink: &mut Sink,
) -> Option<Health> {
    let mut fields = node.table("service.health", sink)?;
    let kind = match fields.take("type", sink) {
        Some(node) => node.choice(
            sink,
            &[
                ("tcp", Kind::Tcp),
                ("http", Kind::Http),
                ("https", Kind::Https),
                ("none", Kind::None),
            ],
        ),
        None => Some(Kind::Tcp),
    };
    let timing = timing(&mut fields, kind, sink);
    let via = via(&mut fields, kind, forward, sink);
    let http = http(&mut fields, kind, outside, sink);
    fields.finish(sink);
    let ask = match kind? {
        Kind::None => return Some(Health::None),
        Kind::Tcp => Ask::Tcp,
        Kind::Http | Kind::Https => Ask::Http(http),
    };
    Some(Health::Check(Check { ask, via, timing }))
}

fn of_no_use(node: &Node<'_>, sink: &mut Sink) {
    sink.error(node.span, format!("`{}` is of no use with `type = \"none\"`", node.name));
}

fn timing(fields: &mut Fields<'_>, kind: Option<Kind>, sink: &mut Sink) -> Timing {
    let interval = fields.take("interval", sink);
    let jitter = fields.take("jitter", sink);
    let timeout = fields.take("timeout", sink);
    let rise = fields.take("rise", sink);
    let fall = fields.take("fall", sink);
    if kind == Some(Kind::None) {
        for node in [interval, jitter, timeout, rise, fall].into_iter().flatten() {
            of_no_use(&node, sink);
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
    let (rise, fall) = (times(rise, DEFAULT_RISE), times(fall, DEFAULT_FALL));
    let jitter_percent =
        jitter.and_then(|node| node.parse_loose(sink, jitter_percent)).unwrap_or(DEFAULT_JITTER);
    Timing { interval, jitter_percent, timeout, rise, fall }
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

fn jitter_percent(text: &str) -> Result<u8, Problem> {
    let number = text.strip_suffix('%').map(str::trim_end);
    let percent = number.filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
    match percent.and_then(|n| n.parse().ok()).filter(|percent| *percent <= MAX_JITTER) {
        Some(percent) => Ok(percent),
        None => Err(Problem::with(
            format!(
                "`jitter` must be a whole percentage of the interval from 0% to {MAX_JITTER}%, not {}",
                quote(text)
            ),
            format!("the default is \"{DEFAULT_JITTER}%\""),
        )),
    }
}

fn via(
    fields: &mut Fields<'_>,
    kind: Option<Kind>,
    forward: Option<Forward>,
    sink: &mut Sink,
) -> Via {
    let Some(node) = fields.take("via", sink) else {
        return Via::Backend;
    };
    if kind == Some(Kind::None) {
        of_no_use(&node, sink);
    }
    let via = node.choice(sink, &[("backend", Via::Backend), ("vip", Via::Vip)]);
    if via == Some(Via::Vip) && forward.is_some_and(Forward::translates) {
        sink.error(node.span, "`via = \"vip\"` can't be had with `forward = \"nat\"`").help(
            "backends behind `nat` don't hold the VIP, and are sent to at their own address: \
             `via = \"backend\"`, the default, checks just that",
        );
    }
    via.unwrap_or(Via::Backend)
}

/// The keys of HTTP and HTTPS, with defaults where they are missing.
fn http(
    fields: &mut Fields<'_>,
    kind: Option<Kind>,
    outside: &dyn Outside,
    sink: &mut Sink,
) -> Http {
    let path = fields.take("path", sink);
    let expect = fields.take("expect", sink);
    let host = fields.take("host", sink);
    let verify = fields.take("verify", sink);
    for node in [path, expect, host].into_iter().flatten() {
        if matches!(kind, Some(Kind::Tcp | Kind::None)) {
            sink.error(
                node.span,
                format!("`{}` is of use with `type = \"http\"` or `\"https\"` only", node.name),
            );
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
    let host = host.and_then(|node| node.parse(sink, host_name));
    let tls = verify.and_then(|node| match kind {
        Some(Kind::Https) | None => verification(&node, outside, sink),
        Some(Kind::Tcp | Kind::None | Kind::Http) => {
            sink.error(node.span, "`verify` is of use with `type = \"https\"` only");
            None
        }
    });
    Http {
        path: path.unwrap_or_else(|| "/".to_owned()),
        expect: expect.unwrap_or_else(|| vec![200]),
        host,
        tls: (kind == Some(Kind::Https)).then(|| tls.unwrap_or(Tls::Unverified)),
    }
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

fn host_name(text: &str) -> Result<String, Problem> {
    match ServerName::try_from(text) {
        Ok(ServerName::DnsName(_)) => Ok(text.to_owned()),
        _ => Err(Problem::with(
            format!("`host` must be a name such as `shop.example`, not {}", quote(text)),
            "without `host` the address is asked for that the check connects to",
        )),
    }
}

fn verification(node: &Node<'_>, outside: &dyn Outside, sink: &mut Sink) -> Option<Tls> {
    if node.as_str().is_some() {
        return node.parse(sink, |text| authorities(text, outside));
    }
    if node.is_boolean() {
        if !node.boolean(sink)? {
            return Some(Tls::Unverified);
        }
        let trusted: Arc<[_]> = outside.authorities().into();
        if trusted.is_empty() {
            sink.error(node.span, "this host trusts no certificate authority").help(
                "install `ca-certificates`, or name a file: `verify = \"/etc/canary/ca.pem\"`",
            );
            return None;
        }
        return Some(Tls::Verified(trusted));
    }
    node.mismatch("true, false or the path of a PEM file", sink);
    None
}

/// The certificates in a PEM file (RFC 7468).
fn authorities(text: &str, outside: &dyn Outside) -> Result<Tls, Problem> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err(Problem::with(
            format!("`verify` must be an absolute path, not {}", quote(text)),
            format!("such as \"/etc/canary/{}\"", "ca.pem"),
        ));
    }
    let bytes = outside.file(path).map_err(|error| {
        Problem::with(
            format!("{} can't be read: {error}", quote(text)),
            "`verify` names a PEM file with the certificates of the authorities to trust",
        )
    })?;
    let unusable = |why: String| {
        Problem::with(
            format!("{} has no usable certificate: {why}", quote(text)),
            "a certificate begins with `-----BEGIN CERTIFICATE-----`",
        )
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| unusable(error.to_string()))?;
    if found.is_empty() {
        return Err(unusable("there is none in it".to_owned()));
    }
    let mut roots = RootCertStore::empty();
    for certificate in &found {
        roots.add(certificate.clone()).map_err(|error| unusable(error.to_string()))?;
    }
    Ok(Tls::Verified(found.into()))
}
