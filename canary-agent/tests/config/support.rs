//! What the other modules share.

use std::{io, path::Path};

use canary_agent::config::{Loaded, Outside, load_str, render};
use tokio_rustls::rustls::pki_types::CertificateDer;

pub(crate) use super::places::check_places;

pub(crate) const MAIN: &str = "agent.toml";
pub(crate) const AGENT: &str = "[agent]\ninterfaces = [\"eth0\"]\n";
pub(crate) const SERVICE: &str = "[[service]]\nname = \"other\"\nvip = \"192.0.2.99\"\nports = \"tcp/9\"\n\
                       versions.stable.backends = \"10.9.9.9:9\"\n";

/// What the contract's example says of agent, services, versions and gates.
pub(crate) const EXAMPLE: &str = r#"
[agent]
interfaces = ["eth0", "eth1"]     # the program is attached to each; with `nat` those towards the backends too
xdp_mode   = "auto"

[[service]]
name       = "shop"
vip        = ["203.0.113.10", "2001:db8::10"]
ports      = ["tcp/443", "udp/443"]
forward    = "nat"
nat_source = ["10.0.0.1"]
stickiness = "client"
prefix     = { v4 = 24, v6 = 56 }
control    = "stable"
existing   = "pin"
drain      = "30m"
udp_idle   = "30s"
fallback   = "control"
split      = { v2 = "5%" }
health     = { type = "tcp", interval = "2s", timeout = "1s", rise = 2, fall = 3 }

[service.versions.stable]
backends = ["10.0.1.1:8443", { addr = "10.0.1.2:8443", weight = 2 }, "[2001:db8:1::1]:8443"]

[service.versions.v2]
backends = ["10.0.2.1:8443"]

[[gate]]
name         = "l4"
alpha        = 0.01
beta         = 0.05
min_duration = "5m"
deadline     = "1h"
signals = [
  { name = "connect_failed",  tolerate = 1.2, pass_below = 3.0 },
  { name = "slow_handshake",  over = "control:p95", tolerate = 1.2, pass_below = 1.5 },
  { name = "server_reset",    tolerate = 1.5, observe = true },
  { prometheus = "http://127.0.0.1:9090", query = "…", above = 0.01 },
]
"#;

/// A certificate of an authority, as a PEM file.
pub(crate) fn authority() -> String {
    rcgen::generate_simple_self_signed(["ca.example".to_owned()]).expect("one").cert.pem()
}

/// A host with the users, groups and files that the cases name.
pub(crate) struct Host;

impl Outside for Host {
    fn uid(&self, name: &str) -> Option<u32> {
        (name == "alice").then_some(1000)
    }

    fn gid(&self, name: &str) -> Option<u32> {
        (name == "ops").then_some(2000)
    }

    fn file(&self, path: &Path) -> io::Result<Vec<u8>> {
        match path.to_str() {
            Some("/etc/canary/ca.pem") => Ok(authority().into_bytes()),
            Some("/etc/canary/key.pem") => {
                Ok(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n".into())
            }
            Some("/etc/canary/odd.pem") => {
                Ok(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into())
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn authorities(&self) -> Vec<CertificateDer<'static>> {
        Vec::new()
    }
}

/// Loads `text`, which must be good.
pub(crate) fn good(text: &str) -> Loaded {
    load_str(MAIN, text).unwrap_or_else(|errors| panic!("{}", render(&errors)))
}
