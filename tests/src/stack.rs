//! What the network stack of a host counts, as `/proc/net` shows it.

use std::fs;

use crate::netns::Namespace;

/// A counter of `snmp` or `netstat`, such as `InSegs` of `Tcp`; of both families, unless it is IPv4's by its
/// nature. `None` where the kernel has not shown it so far.
///
/// # Panics
/// There is no such table.
#[track_caller]
pub fn counter(host: &Namespace, table: &str, name: &str) -> Option<u64> {
    let head = format!("{table}: ");
    let text = read(host, "snmp") + &read(host, "netstat");
    let mut rows = text.lines().filter_map(|line| line.strip_prefix(&head));
    let (names, values) = (rows.next(), rows.next());
    // The kernel shows no table of ICMP's types before the first message.
    let (Some(names), Some(values)) = (names, values) else {
        assert_eq!(table, "IcmpMsg", "there is no such table");
        return None;
    };
    let mut both = names.split_whitespace().zip(values.split_whitespace());
    both.find(|(one, _)| *one == name).map(|(_, value)| value.parse().expect("a number"))
}

/// A counter of `snmp6`, such as `Udp6InDatagrams`.
///
/// # Panics
/// There is none.
#[track_caller]
pub fn counter_v6(host: &Namespace, name: &str) -> u64 {
    let text = read(host, "snmp6");
    let mut rows = text.lines().map(str::split_whitespace);
    let value = rows.find_map(|mut row| (row.next() == Some(name)).then(|| row.next())).flatten();
    value.unwrap_or_else(|| panic!("no {name}")).parse().expect("a number")
}

/// Connections of a host that are not over, those at a port of its own where one is given.
#[track_caller]
pub fn open_sockets(host: &Namespace, port: Option<u16>) -> usize {
    const TIME_WAIT: &str = "06";
    const LISTEN: &str = "0A";
    let port = port.map(|port| format!("{port:04X}"));
    let open = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _, state) = (words.next(), words.next(), words.next());
        let its = local.and_then(|local| local.rsplit(':').next());
        state.is_some_and(|state| ![TIME_WAIT, LISTEN].contains(&state))
            && port.as_deref().is_none_or(|port| its == Some(port))
    };
    let count = |file: &str| read(host, file).lines().skip(1).filter(|line| open(line)).count();
    count("tcp") + count("tcp6")
}

/// `/proc/net` is the main thread's, whose namespace is another one.
#[track_caller]
fn read(host: &Namespace, file: &str) -> String {
    let path = format!("/proc/thread-self/net/{file}");
    host.run(|| fs::read_to_string(&path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}
