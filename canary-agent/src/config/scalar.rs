//! Texts of single values: names, durations, addresses, ports.
//!
//! Pure functions from text to value or [`Problem`]. Must not know where the
//! text stands nor what the value is for.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use super::{
    diagnostic::printable,
    model::{Port, Protocol},
};

/// Why a text is no such value, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: Option<String>,
}

impl Problem {
    /// Without help.
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
    }

    /// With help.
    pub(super) fn with(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: Some(help.into()) }
    }
}

/// Longest duration; what should last longer is better said with a word.
const MAX_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// `text` as it is shown in messages.
pub(super) fn quote(text: &str) -> String {
    format!("`{}`", printable(text, 60))
}

/// The candidate that `text` was probably meant to be.
pub(super) fn nearest<'c>(
    text: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<&'c str> {
    // Longer texts are no misspelt names, and the distance takes quadratic space.
    if text.is_empty() || text.len() > 64 {
        return None;
    }
    let folded = text.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .map(|candidate| {
            let word = candidate.to_lowercase().replace('-', "_");
            let begins = |long: &str, short: &str| short.len() > 2 && long.starts_with(short);
            // `address` for `addr`: far apart by letters, yet plain.
            let distance = match begins(&folded, &word) || begins(&word, &folded) {
                true => 1,
                false => strsim::damerau_levenshtein(&folded, &word),
            };
            (distance, candidate)
        })
        .filter(|(distance, candidate)| {
            *distance <= (candidate.len().max(text.len()) / 3).max(1) && *distance < candidate.len()
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The name of a `what`: at most `limit` letters, digits, `.`, `_` and `-`.
pub(super) fn name(text: &str, what: &str, limit: usize) -> Result<String, Problem> {
    if text.is_empty() {
        return Err(Problem::new(format!("the name of a {what} can't be empty")));
    }
    if text.len() > limit {
        return Err(Problem::new(format!(
            "the name of a {what} has at most {limit} bytes; {} has {}",
            quote(text),
            text.len()
        )));
    }
    let odd = text.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-'));
    match odd {
        Some(odd) => Err(Problem::with(
            format!(
                "the name of a {what} can't have the character {}, as {} does",
                quote(&odd.to_string()),
                quote(text)
            ),
            "letters, digits, `.`, `_` and `-` can be used",
        )),
        None => Ok(text.to_owned()),
    }
}

/// The name of a network interface, as the kernel has them (`dev_valid_name`).
pub(super) fn interface(text: &str) -> Result<String, Problem> {
    const MAX: usize = 15;
    if text.is_empty() {
        return Err(Problem::new("the name of an interface can't be empty"));
    }
    if text.len() > MAX {
        return Err(Problem::new(format!(
            "{} can't be an interface: names have at most {MAX} bytes, this one has {}",
            quote(text),
            text.len()
        )));
    }
    let odd = text.chars().find(|c| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':'));
    if let Some(odd) = odd {
        return Err(Problem::new(format!(
            "{} can't be an interface: names have no {}",
            quote(text),
            match odd {
                c if c.is_whitespace() => "white space".to_owned(),
                c => quote(&c.to_string()),
            }
        )));
    }
    if matches!(text, "." | "..") {
        return Err(Problem::new(format!("{} can't be an interface", quote(text))));
    }
    Ok(text.to_owned())
}

/// A duration: whole numbers with units, one after the other.
///
/// Stricter than other notations on purpose: where `M` is a month, a slip makes
/// a drain of minutes one of months.
pub(super) fn duration(text: &str) -> Result<Duration, Problem> {
    const UNITS: [(&str, u64); 5] =
        [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
    let bad = || {
        Problem::with(
            format!("{} is not a duration", quote(text)),
            "write whole numbers with the units `ms`, `s`, `m`, `h` and `d`, such as `30s` or `1h30m`",
        )
    };
    let trimmed = text.trim();
    if trimmed.starts_with('-') {
        return Err(Problem::new(format!("{} is negative: a duration can't be", quote(text))));
    }
    if !trimmed.is_empty() && trimmed.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(match trimmed {
            "0" => Problem::new("`0` has no unit: write `0s`"),
            _ if trimmed.contains('.') || trimmed.len() > 9 => bad(),
            _ => Problem::new(format!(
                "`{trimmed}` has no unit: write `{trimmed}s` for seconds, or `{trimmed}m` for minutes"
            )),
        });
    }
    let mut total: u64 = 0;
    let mut rest = trimmed;
    if rest.is_empty() {
        return Err(bad());
    }
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_alphabetic()).len();
        let (unit, tail) = tail.split_at(letters);
        let Some((_, scale)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(bad());
        };
        // An empty number is no number; one too large is caught below.
        if number.is_empty() {
            return Err(bad());
        }
        total = number
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(*scale))
            .and_then(|n| total.checked_add(n))
            .unwrap_or(u64::MAX);
        if total == u64::MAX {
            break;
        }
        rest = tail.trim_start();
    }
    let duration = Duration::from_millis(total);
    if duration > MAX_DURATION {
        return Err(Problem::new(format!(
            "{} is too long: a duration is at most 365 days",
            quote(text)
        )));
    }
    Ok(duration)
}

/// A port of a service: `tcp/443`.
pub(super) fn port(text: &str) -> Result<Port, Problem> {
    let Some((protocol, number)) = text.split_once('/') else {
        return Err(match port_number(text) {
            Ok(_) => Problem::new(format!(
                "{} has no protocol: write `tcp/{text}` or `udp/{text}`",
                quote(text)
            )),
            Err(_) => Problem::with(
                format!("{} is not a port", quote(text)),
                "write the protocol and the number, such as `tcp/443`",
            ),
        });
    };
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => {
            let message = format!("{} is not a protocol", quote(protocol));
            return Err(match number {
                "tcp" | "udp" => Problem::with(
                    message,
                    format!("the protocol comes first: `{number}/{}`", printable(protocol, 10)),
                ),
                _ => match nearest(protocol, ["tcp", "udp"]) {
                    Some(word) => Problem::with(message, format!("did you mean `{word}`?")),
                    None => Problem::with(message, "it is `tcp` or `udp`"),
                },
            });
        }
    };
    let port = port_number(number)?;
    Ok(Port { protocol, port })
}

/// A port's number, from 1 to 65535.
fn port_number(text: &str) -> Result<u16, Problem> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(number) if digits && number > 0 => Ok(number),
        _ if digits => Err(Problem::new(format!(
            "port {} does not exist: ports are from 1 to 65535",
            printable(text, 20)
        ))),
        _ => Err(Problem::new(format!("{} is not a port number", quote(text)))),
    }
}

/// An address that packets can be sent to from anywhere: a VIP, a source.
pub(super) fn address(text: &str) -> Result<IpAddr, Problem> {
    let Ok(addr) = text.parse::<IpAddr>() else {
        let message = format!("{} is not an IP address", quote(text));
        return Err(if text.parse::<SocketAddr>().is_ok() {
            Problem::with(message, "it has a port: write the address alone")
        } else if text.contains('/') {
            Problem::with(message, "it has a prefix length: write each address alone")
        } else if text.contains('%') {
            Problem::with(message, "addresses that need an interface can't be used")
        } else if text.starts_with('[') {
            Problem::with(message, "write it without brackets")
        } else {
            Problem::with(
                message,
                "write it as `203.0.113.10` or `2001:db8::10`; names are not looked up",
            )
        });
    };
    unicast(addr, text)?;
    Ok(addr)
}

/// A backend's address and port: `10.0.1.1:443`, `[2001:db8::1]:443`.
pub(super) fn backend(text: &str) -> Result<SocketAddr, Problem> {
    let Ok(addr) = text.parse::<SocketAddr>() else {
        let message = format!("{} is not an address and port", quote(text));
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Err(Problem::with(
                format!("{} has no port", quote(text)),
                match ip {
                    IpAddr::V4(ip) => format!("write `{ip}:443`, for instance"),
                    IpAddr::V6(ip) => {
                        format!("write `[{ip}]:443`, for instance: the address stands in brackets")
                    }
                },
            ));
        }
        let port = text.rsplit_once(':').map(|(_, port)| port);
        if let Some(Err(problem)) = port
            .filter(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
            .map(port_number)
        {
            return Err(problem);
        }
        return Err(Problem::with(
            message,
            "write it as `10.0.1.1:443` or `[2001:db8::1]:443`; names are not looked up",
        ));
    };
    if addr.port() == 0 {
        return Err(Problem::new(format!(
            "port 0 of {} does not exist: ports are from 1 to 65535",
            quote(text)
        )));
    }
    if let SocketAddr::V6(v6) = addr
        && v6.scope_id() != 0
    {
        return Err(Problem::new(format!(
            "{} has an interface: addresses that need one can't be used",
            quote(text)
        )));
    }
    unicast(addr.ip(), text)?;
    Ok(addr)
}

/// Refuses addresses that no server can be reached at.
fn unicast(addr: IpAddr, text: &str) -> Result<(), Problem> {
    let refused = |why: &str| Err(Problem::new(format!("{} can't be used: {why}", quote(text))));
    match addr {
        IpAddr::V4(v4) => {
            if v4.octets()[0] == 0 {
                refused("it is an unspecified address")
            } else if v4.is_loopback() {
                refused("it is a loopback address")
            } else if v4.is_broadcast() {
                refused("it is the broadcast address")
            } else if v4.is_multicast() {
                refused("it is a multicast address")
            } else {
                Ok(())
            }
        }
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                Err(Problem::with(
                    format!("{} can't be used: it is an IPv4-mapped address", quote(text)),
                    format!("write `{v4}`"),
                ))
            } else if v6.is_unspecified() {
                refused("it is an unspecified address")
            } else if v6 == Ipv6Addr::LOCALHOST {
                refused("it is a loopback address")
            } else if v6.is_multicast() {
                refused("it is a multicast address")
            } else if v6.is_unicast_link_local() {
                refused("it is a link-local address, which needs an interface")
            } else {
                Ok(())
            }
        }
    }
}

/// Two numbers with a hyphen: `1024-32767`.
pub(super) fn port_range(text: &str) -> Result<(u16, u16), Problem> {
    let ends = text
        .split_once('-')
        .and_then(|(a, b)| Some((port_number(a.trim()).ok()?, port_number(b.trim()).ok()?)));
    ends.ok_or_else(|| {
        Problem::with(
            format!("{} is not a range of ports", quote(text)),
            "write the first and the last port, such as `1024-32767`",
        )
    })
}

/// 32 hexadecimal digits, the first 16 the first key.
pub(super) fn hash_key(text: &str) -> Result<[u64; 2], Problem> {
    let good = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let keys = good.then(|| {
        let (first, second) = text.split_at(16);
        let key = |part| u64::from_str_radix(part, 16).ok();
        Some([key(first)?, key(second)?])
    });
    keys.flatten().ok_or_else(|| {
        Problem::with(
            format!(
                "a hash key has 32 hexadecimal digits; this one has {} characters{}",
                text.chars().count(),
                match text.chars().find(|c| !c.is_ascii_hexdigit()) {
                    Some(odd) => format!(", {} among them", quote(&odd.to_string())),
                    None => String::new(),
                }
            ),
            "make one with `openssl rand -hex 16`",
        )
    })
}

/// The keys of a service that sets none: a function of its name alone, so that
/// every host and every release has the same. Changing this moves every client
/// of every such service.
pub(super) fn derived_hash_key(name: &str) -> [u64; 2] {
    // The seeds are the first digits of π, which nobody chose.
    [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344].map(|seed: u64| {
        let mut state = splitmix(seed ^ name.len() as u64);
        for byte in name.bytes() {
            state = splitmix(state ^ u64::from(byte));
        }
        splitmix(state)
    })
}

/// One step of splitmix64 (Steele, Lea, Flood: *Fast splittable pseudorandom
/// number generators*, OOPSLA 2014).
const fn splitmix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_whole_numbers_with_units() {
        for (text, ms) in [
            ("30s", 30_000),
            ("10m", 600_000),
            ("1h30m", 5_400_000),
            ("1h 30m", 5_400_000),
            ("500ms", 500),
            ("2d", 172_800_000),
            ("0s", 0),
            ("365d", 31_536_000_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for (text, error) in [
            ("30", "`30` has no unit: write `30s`"),
            ("0", "write `0s`"),
            ("-5s", "negative"),
            ("1.5h", "not a duration"),
            ("1.5", "not a duration"),
            ("5M", "not a duration"),
            ("5min", "not a duration"),
            ("s", "not a duration"),
            ("", "not a duration"),
            (" ", "not a duration"),
            ("5s!", "not a duration"),
            ("5s3", "not a duration"),
            ("5é", "not a duration"),
            ("366d", "too long"),
            ("99999999999999999999999s", "too long"),
            ("18446744073709551615ms1ms", "too long"),
        ] {
            let problem = duration(text).expect_err(text);
            assert!(problem.message.contains(error), "{text}: {problem:?}");
        }
    }

    #[test]
    fn a_misspelt_word_finds_its_neighbour() {
        let keys = ["stickiness", "prefix", "ports", "vip", "udp_idle"];
        for (text, expected) in [
            ("stickyness", Some("stickiness")),
            ("port", Some("ports")),
            ("sticky_prefix", None),
            ("stick", Some("stickiness")),
            ("vips", Some("vip")),
            ("udp-idle", Some("udp_idle")),
            ("UDP_IDLE", Some("udp_idle")),
            ("colour", None),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(nearest(text, keys), expected, "{text}");
        }
        assert_eq!(nearest(&"a".repeat(1 << 20), keys), None);
    }

    #[test]
    fn derived_keys_never_change() {
        assert_eq!(derived_hash_key("shop"), [0xe805_75b2_df58_91cc, 0x3c66_d278_8a39_b581]);
        assert_ne!(derived_hash_key("a"), derived_hash_key("b"));
        assert_ne!(derived_hash_key("a"), derived_hash_key("aa"));
    }

    #[test]
    fn hash_keys_read_left_to_right() {
        assert_eq!(
            hash_key("000102030405060708090a0B0c0d0e0f"),
            Ok([0x0001_0203_0405_0607, 0x0809_0a0b_0c0d_0e0f])
        );
    }
}
