//! dig and dnsmasq: DNS over UDP and TCP, and an answer in fragments.

use canary_tests::{
    agent::{Agent, AgentOptions},
    topology::{Family, Host},
};

use super::{
    Came, Client, KEYS, Mode, Running, assert_only, clients, in_every_mode, option, ready, run,
    wait_served,
};
use crate::support::Bench;

/// Port of DNS.
const PORT: u16 = 53;
const SERVICE: &str = "dns";

/// Strings of the large record, and their length: more than two packets of 1,500 bytes.
const STRINGS: usize = 14;
const STRING_BYTES: usize = 250;

/// What a server says of itself under `who.test`, and in the large record before all that makes it
/// large.
fn large(name: &str) -> Vec<String> {
    let filler = (0..STRINGS).map(|nth| format!("{nth:02}").repeat(STRING_BYTES / 2));
    std::iter::once(name.to_owned()).chain(filler).collect()
}

#[track_caller]
fn serve(host: &Host) -> Running {
    let addrs = Mode::served(host);
    let listen: String = addrs.iter().map(|addr| format!(" --listen-address={addr}")).collect();
    // It changes neither user nor group so, and thereby ends with this process.
    let line = format!(
        "dnsmasq --no-daemon --no-resolv --no-hosts --conf-file=/dev/null --pid-file= --bind-interfaces --edns-packet-max=4096 --txt-record=who.test,{} \
         --txt-record=large.test,{}{listen}",
        host.name,
        large(&host.name).join(",")
    );
    Running::start(host, &line, &addrs, PORT)
}

/// The strings of a record, asked for by a client, and what was said of the exchange.
#[track_caller]
fn dig(
    bench: &Bench,
    family: Family,
    client: &Client,
    options: &str,
    name: &str,
) -> (Vec<String>, String) {
    let line = format!(
        "dig {} -b {} +tries=1 +time=5 +noall +answer +stats +bufsize=4096 {options} @{} {name} TXT",
        option(family),
        client.addr,
        family.vip()
    );
    let said = run(bench.client(), &line);
    let (stats, answer): (Vec<&str>, Vec<&str>) =
        said.lines().filter(|line| !line.is_empty()).partition(|line| line.starts_with(";"));
    let [answer] = answer[..] else { panic!("{line}: {said}") };
    // Strings stand between quotation marks, of which there are none in them.
    let strings = answer.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    (strings, stats.join("\n"))
}

#[track_caller]
fn exercise(test: &str, mode: Mode) {
    if !ready(test, &["dig", "dnsmasq"]) {
        return;
    }
    let bench = mode.bench();
    let _servers: Vec<Running> = bench.topology.backends.iter().map(serve).collect();
    let services = bench.service(SERVICE, PORT, &["tcp", "udp"], KEYS);
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    wait_served(&bench, PORT);
    for family in Family::ALL {
        for client in clients(&bench, &agent, SERVICE, family, 0) {
            let before = Came::to_all_at_rest(&bench);
            for (options, transport) in [("+notcp +ignore", "(UDP)"), ("+tcp", "(TCP)")] {
                let what = format!("{test} {} {transport}", client.addr);
                let (strings, stats) = dig(&bench, family, &client, options, "who.test");
                assert_eq!(strings, [client.backend.as_str()], "{what}");
                assert!(stats.contains(transport), "{what}: {stats}");
                let (strings, stats) = dig(&bench, family, &client, options, "large.test");
                assert_eq!(strings, large(&client.backend), "{what}");
                assert!(stats.contains(transport), "{what}: {stats}");
            }
            assert_only(&bench, &before, &client.backend, test);
        }
    }
}

in_every_mode!(exercise:
    dig_and_dnsmasq_understand_each_other_through_nat,
    dig_and_dnsmasq_understand_each_other_through_one_armed_nat,
    dig_and_dnsmasq_understand_each_other_through_dsr,
    dig_and_dnsmasq_understand_each_other_through_ipip,
    dig_and_dnsmasq_understand_each_other_through_gue
);
