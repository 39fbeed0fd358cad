//! Which names the TCP listener answers to.
//!
//! A page on any site can make a browser resolve its own name to 127.0.0.1 (DNS
//! rebinding) and then read from the listener as if it were that site. It can't
//! choose the `Host` header, though: that says the site's name. So only hosts
//! that no stranger can own are served: addresses, `localhost`, and this
//! machine's own name.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::{HeaderMap, Uri, header};

/// Whether a request was meant for this listener: exactly one `Host`, and the
/// target's authority, where it has one, of a permitted name.
pub(super) fn permitted(uri: &Uri, headers: &HeaderMap, own_name: &str) -> bool {
    let mut hosts = headers.get_all(header::HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return false;
    };
    let host = host.to_str().is_ok_and(|host| is_own(host, own_name));
    let authority = uri.authority().is_none_or(|authority| is_own(authority.as_str(), own_name));
    host && authority
}

/// Whether `host`, with or without a port, is an address, `localhost` or `own_name`.
fn is_own(host: &str, own_name: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let Some((address, rest)) = rest.split_once(']') else {
                return false;
            };
            if address.parse::<Ipv6Addr>().is_err() {
                return false;
            }
            match rest {
                "" => return true,
                rest => (
                    address,
                    match rest.strip_prefix(':') {
                        Some(port) => Some(port),
                        None => return false,
                    },
                ),
            }
        }
        None => match host.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        },
    };
    let port_fits = port.is_none_or(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    let name_fits = name.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || (!own_name.is_empty() && name.eq_ignore_ascii_case(own_name));
    port_fits && name_fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_no_stranger_owns_are_served() {
        for (host, own) in [
            ("127.0.0.1", true),
            ("127.0.0.1:9109", true),
            ("[::1]", true),
            ("[::1]:9109", true),
            ("192.0.2.7:80", true),
            ("localhost", true),
            ("LocalHost:9109", true),
            ("lb1", true),
            ("LB1:9109", true),
            ("", false),
            (":9109", false),
            ("evil.example", false),
            ("evil.example:9109", false),
            ("localhost.evil.example", false),
            ("lb1.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("127.0.0.1:", false),
            ("127.0.0.1:port", false),
            ("127.0.0.1:+80", false),
            ("127.0.0.1:70000", false),
            ("[::1]9109", false),
            ("[::1", false),
            ("[localhost]", false),
            ("user@127.0.0.1", false),
        ] {
            assert_eq!(is_own(host, "lb1"), own, "{host:?}");
        }
        assert!(!is_own("", ""), "a host without a name has none of its own");
    }

    #[test]
    fn the_target_counts_as_well_as_the_header() {
        let check = |uri: &str, hosts: &[&str]| {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(header::HOST, host.parse().expect("a header"));
            }
            permitted(&uri.parse().expect("a target"), &headers, "lb1")
        };
        assert!(check("/metrics", &["127.0.0.1"]));
        assert!(check("http://127.0.0.1/metrics", &["127.0.0.1"]));
        assert!(!check("http://evil.example/metrics", &["127.0.0.1"]));
        assert!(!check("/metrics", &[]));
        assert!(!check("/metrics", &["127.0.0.1", "evil.example"]));
    }
}
