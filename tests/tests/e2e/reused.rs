//! A client that uses its port again opens a new connection, wherever the last one was.

use std::{
    io::{self, Read as _},
    net::{Shutdown, SocketAddr},
    os::fd::AsRawFd as _,
};

use canary_tests::{
    client::{self, Connection},
    host,
    server::HTTP_PORT,
    topology::Family,
};
use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};

use crate::support::{Bench, SHOP, Way, service};

/// Clients of each family.
const CLIENTS: u32 = 30;

/// How a client ends its connection.
#[derive(Clone, Copy, Debug)]
enum End {
    /// With a FIN.
    Fin,
    /// With a FIN that comes with its last request.
    FinWithRequest,
    /// With a RST.
    Reset,
}

const ENDS: [End; 3] = [End::Fin, End::FinWithRequest, End::Reset];

/// Opens a connection, asks who answers, and ends it in good order: both sides have, when it
/// returns.
fn visit(source: SocketAddr, to: SocketAddr, end: End) -> io::Result<String> {
    let mut connection = Connection::from(client::connect(source, to)?);
    let name = connection.name()?;
    let mut stream = connection.stream();
    match end {
        End::Fin => {}
        End::FinWithRequest => {
            let request = b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n";
            // It waits for more, and goes with the FIN.
            let sent =
                send(stream.as_raw_fd(), request, MsgFlags::from_bits_retain(libc::MSG_MORE))?;
            assert_eq!(sent, request.len());
        }
        End::Reset => {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&stream, sockopt::Linger, &linger)?;
            return Ok(name);
        }
    }
    stream.shutdown(Shutdown::Write)?;
    // Whatever it still says: the server closes, too.
    stream.read_to_end(&mut Vec::new())?;
    Ok(name)
}

#[track_caller]
fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    // Ports are free again as soon as both sides have closed.
    bench.client().sysctl("net/ipv4/tcp_max_tw_buckets", "0");
    let agent = bench.agent("");
    bench.wait_answered();
    for (step, want) in [("100%", "v2"), ("0", "stable"), ("100%", "v2")] {
        agent.split(SHOP, "v2", step);
        let tracked = service(&agent.status(), SHOP).tracked_buckets;
        assert_eq!(tracked > 0, way == Way::Dsr, "{tracked} buckets are tracked");
        for family in Family::ALL {
            let to = SocketAddr::new(family.vip(), HTTP_PORT);
            bench.client().run(|| {
                for (client, end) in (0..CLIENTS).zip(ENDS.into_iter().cycle()) {
                    // From one port, at each step.
                    let source = SocketAddr::new(family.client(client), 20_000);
                    let name = visit(source, to, end)
                        .unwrap_or_else(|error| panic!("{test}: {source}, {end:?}: {error}"));
                    assert!(
                        name.starts_with(want),
                        "{test}, at {step}: {source} is on {name}; it ended with {end:?}"
                    );
                }
            });
        }
    }
}

#[test]
fn a_port_that_is_used_again_is_a_new_connection_in_dsr() {
    exercise("a_port_that_is_used_again_is_a_new_connection_in_dsr", Way::Dsr);
}

#[test]
fn a_port_that_is_used_again_is_a_new_connection_in_nat() {
    exercise("a_port_that_is_used_again_is_a_new_connection_in_nat", Way::NatTwoArmed);
}
