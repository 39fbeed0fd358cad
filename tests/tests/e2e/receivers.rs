//! Backends that unwrap with what Linux has (`ipip`, `sit`, `ip6tnl`, `fou`), set up as docs/hosts.md
//! says, and networks that lose, delay and reorder packets, or carry them in VLANs, or whose driver
//! is a virtual machine's. Transfers go on all the time, each byte compared, while clients move from
//! one version to the other and back.

use std::{
    fs, io,
    net::SocketAddr,
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use canary_tests::{
    agent::{Agent, AgentOptions},
    client::{self, Connection},
    host, http,
    netns::Namespace,
    server::{ECHO_PORT, HTTP_PORT, Server},
    stack,
    topology::{Family, Host, Options},
    wait,
};

use crate::support::{Bench, SHOP, Way};

const VERSIONS: [(&str, u8); 2] = [("stable", 2), ("v2", 1)];

/// The devices that Linux unwraps with.
const TUNNELS: [&str; 3] = ["tunl0", "sit0", "ip6tnl0"];

/// What is in the way in either direction. One packet of ten is not delayed, and overtakes others.
const NETEM: &str = "delay 20ms loss 1% reorder 10%";
const DELAY: Duration = Duration::from_millis(20);

/// Connections of each family that carry bytes.
const CONNECTIONS: u32 = 4;
/// Bytes of a connection's first transfer and of its last, each way.
const BYTES: usize = 150_000;
/// Bytes of those in between, several packets' worth, and the time between two of them.
const SMALL_BYTES: usize = 10_000;
const PAUSE: Duration = Duration::from_millis(200);

/// Whether this kernel has all that these tests use; if not, they are left to the virtual machine's.
fn ready(test: &str) -> bool {
    if !host::ready(test) {
        return false;
    }
    let namespace = Namespace::new("kernel");
    // A device is there from the first where its module is. None is loaded here: it would stay.
    for command in [
        "ip link show tunl0",
        "ip link show sit0",
        "ip link show ip6tnl0",
        "ip fou add port 6080 gue",
        "ip -6 fou add port 6080 gue",
        "ip link add below type veth peer name other",
        "ip link add link below name v type vlan id 7",
        "tc qdisc replace dev below root netem delay 1ms",
    ] {
        if let Err(error) = namespace.ask(command) {
            host::leave_to_vm(test, &format!("`{command}`: {}", error.trim_end()));
            return false;
        }
    }
    true
}

/// Sets every backend up to unwrap, with these ports of `fou`.
#[track_caller]
fn unwrap(bench: &Bench, ports: &[&str]) {
    for Host { name, namespace, .. } in &bench.topology.backends {
        let mut commands = vec!["ip -6 tunnel change ip6tnl0 mode any".to_owned()];
        commands.extend(TUNNELS.map(|tunnel| format!("ip link set {tunnel} up")));
        for port in ports {
            commands.extend([format!("ip fou add {port}"), format!("ip -6 fou add {port}")]);
        }
        for command in commands {
            namespace.ask(&command).unwrap_or_else(|error| panic!("{name}: {command}: {error}"));
        }
        namespace.sysctl("net/ipv4/conf/all/rp_filter", "0");
        namespace.sysctl("net/ipv4/conf/tunl0/rp_filter", "0");
    }
}

/// Packets that a device of the backends has unwrapped.
#[track_caller]
fn unwrapped_by(bench: &Bench, tunnel: &str) -> u64 {
    let command = format!("ip -statistics -json link show {tunnel}");
    let of = |host: &Host| {
        let said =
            host.namespace.ask(&command).unwrap_or_else(|error| panic!("{command}: {error}"));
        let told: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        told[0]["stats64"]["rx"]["packets"].as_u64().unwrap_or_else(|| panic!("{said}"))
    };
    bench.topology.backends.iter().map(of).sum()
}

/// TCP segments that have come to a host out of order.
#[track_caller]
fn out_of_order(host: &Host) -> u64 {
    stack::counter(&host.namespace, "TcpExt", "TCPOFOQueue").expect("a counter")
}

/// The service's address of each family.
fn vips(port: u16) -> [SocketAddr; 2] {
    Family::ALL.map(|family| SocketAddr::new(family.vip(), port))
}

/// Opens a connection. Always from the same port, so that a client has the same bucket in each run.
fn open(bench: &Bench, to: SocketAddr, index: u32) -> io::Result<Connection> {
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let source = SocketAddr::new(family.client(index), 20_000);
    bench
        .client()
        .run(|| client::connect_within(wait::patience(), source, to))
        .map(Connection::from)
}

/// What those who carry bytes are told.
#[derive(Default)]
struct Word {
    enough: Mutex<bool>,
    said: Condvar,
}

impl Word {
    /// Rests between two transfers; whether the next one is the last.
    fn rest(&self) -> bool {
        let enough = self.enough.lock().unwrap_or_else(PoisonError::into_inner);
        let rested = self.said.wait_timeout_while(enough, PAUSE, |enough| !*enough);
        *rested.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Says that it is enough, however its scope ends.
struct Enough<'a>(&'a Word);

impl Drop for Enough<'_> {
    fn drop(&mut self) {
        *self.0.enough.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.said.notify_all();
    }
}

/// One connection's transfers, up through the balancer and down again.
fn transfers(mut connection: Connection, begun: &AtomicU32, word: &Word) -> io::Result<()> {
    let mut body = vec![0; BYTES];
    http::fill(&mut body, 0);
    let name = connection.name()?;
    let mut transfer = |body: &[u8]| {
        if connection.post("/", body)? != body {
            return Err(io::Error::other("other bytes came back"));
        }
        match connection.name()? {
            now if now == name => Ok(()),
            now => Err(io::Error::other(format!("{name} has become {now}"))),
        }
    };
    transfer(&body)?;
    begun.fetch_add(1, Ordering::Relaxed);
    while !word.rest() {
        transfer(&body[..SMALL_BYTES])?;
    }
    transfer(&body)
}

/// Has connections carry bytes as long as `during` lasts and a little longer, and none break.
#[track_caller]
fn carry(bench: &Bench, during: impl FnOnce()) {
    let (begun, word) = (AtomicU32::new(0), Word::default());
    let one = |to: SocketAddr, index: u32| {
        open(bench, to, index)
            .and_then(|connection| transfers(connection, &begun, &word))
            .unwrap_or_else(|error| panic!("client {index} of {to}: {error}"));
    };
    thread::scope(|scope| {
        let (one, enough) = (&one, Enough(&word));
        let mut workers = Vec::new();
        for to in vips(HTTP_PORT) {
            workers.extend((0..CONNECTIONS).map(|index| scope.spawn(move || one(to, index))));
        }
        wait::until("bytes on every connection", || {
            let ended = workers.iter().any(thread::ScopedJoinHandle::is_finished);
            let count = begun.load(Ordering::Relaxed) as usize;
            let ready = ended || count == workers.len();
            ready.then_some(()).ok_or_else(|| format!("{count} of {}", workers.len()))
        });
        during();
        drop(enough);
        for worker in workers {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

/// Moves new clients to `v2` and back, by splits that are each seen to be in force.
#[track_caller]
fn there_and_back(bench: &Bench, agent: &Agent<'_>) {
    const NEW: u32 = 4;
    for (nth, (share, wanted)) in (1..).zip([("100%", "v2"), ("50%", ""), ("0%", "stable")]) {
        agent.split(SHOP, "v2", share);
        for to in vips(HTTP_PORT) {
            for index in 100 * nth..100 * nth + NEW {
                let name = open(bench, to, index).and_then(|mut connection| connection.name());
                let name = name.unwrap_or_else(|error| panic!("{to} at {share}: {error}"));
                assert!(name.starts_with(wanted), "{to} at {share}: {name}");
            }
        }
    }
}

/// A service whose backends go by addresses of both families.
fn service(bench: &Bench, name: &str, vips: &[Family], port: u16, keys: &str) -> String {
    let vips: Vec<String> = vips.iter().map(|family| family.vip().to_string()).collect();
    format!(
        "[[service]]\nname = {name:?}\nvip = {vips:?}\nports = [\"tcp/{port}\"]\n\
         control = \"stable\"\nhealth = {{ type = \"none\" }}\n{keys}\n{}\n",
        bench.topology.versions_toml(&Family::ALL, port)
    )
}

/// The agent, with the shop and these services besides.
#[track_caller]
fn agent<'a>(bench: &'a Bench, keys: &str, more: &str) -> Agent<'a> {
    let services = service(bench, SHOP, &Family::ALL, HTTP_PORT, keys) + more;
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::start(&bench.topology, &options, &services);
    bench.wait_answered();
    agent
}

/// Clients of the shop change versions while netem is in their way.
#[track_caller]
fn exercise_impaired(bench: &Bench, agent: &Agent<'_>) {
    bench.topology.impair(NETEM);
    let began = Instant::now();
    drop(open(bench, vips(HTTP_PORT)[0], 50).expect("a connection"));
    assert!(began.elapsed() >= DELAY, "{:?}", began.elapsed());
    carry(bench, || there_and_back(bench, agent));
    let lost = bench.topology.lost();
    assert!(lost.iter().all(|packets| *packets > 0), "{lost:?}");
    let overtaken: u64 = bench.topology.backends.iter().map(out_of_order).sum();
    assert!(overtaken > 0, "nothing came out of order");
    println!("{lost:?} packets were lost, {overtaken} came out of order");
}

/// Linux has unwrapped with each of the devices, and the agent has dropped nothing.
#[track_caller]
fn assert_unwrapped(bench: &Bench, agent: &Agent<'_>) {
    for tunnel in TUNNELS {
        let packets = unwrapped_by(bench, tunnel);
        println!("{tunnel}: {packets} packets");
        assert!(packets > 0, "{tunnel} has unwrapped nothing");
    }
    assert_nothing_dropped(agent);
}

/// The echo service sends clients their bytes back.
#[track_caller]
fn assert_echoed(bench: &Bench) {
    let mut payload = vec![0; BYTES];
    http::fill(&mut payload, 0);
    for to in vips(ECHO_PORT) {
        for index in 0..4 {
            let connection = open(bench, to, index).expect("a connection");
            let stream = connection.stream().try_clone().expect("a socket");
            let name = client::tcp_echo(stream, &payload);
            let name = name.unwrap_or_else(|error| panic!("client {index} of {to}: {error}"));
            assert!(name.starts_with("stable"), "{name}");
        }
    }
}

#[track_caller]
fn assert_nothing_dropped(agent: &Agent<'_>) {
    for reason in agent.status().reasons.iter().filter(|reason| reason.verdict == "drop") {
        assert_eq!(reason.packets, 0, "{reason:?}");
    }
}

#[test]
fn linux_unwraps_ipip() {
    if !ready("linux_unwraps_ipip") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    unwrap(&bench, &[]);
    let agent = agent(&bench, "forward = \"ipip\"", "");
    carry(&bench, || there_and_back(&bench, &agent));
    assert_unwrapped(&bench, &agent);
}

#[test]
fn linux_unwraps_ipip_in_vlans_that_lose_packets() {
    if !ready("linux_unwraps_ipip_in_vlans_that_lose_packets") {
        return;
    }
    let bench = Bench::of(Way::Dsr, &Options::one_armed_dsr(&VERSIONS).tagged(), Server::start);
    unwrap(&bench, &[]);
    let agent = agent(&bench, "forward = \"ipip\"", "");
    exercise_impaired(&bench, &agent);
    assert_unwrapped(&bench, &agent);
}

/// Ports for `gue`, and ports for one protocol each, which is all that plain `fou` knows.
#[test]
fn linux_unwraps_gue_from_networks_that_lose_packets() {
    if !ready("linux_unwraps_gue_from_networks_that_lose_packets") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    unwrap(&bench, &["port 6080 gue", "port 5554 ipproto 4", "port 5556 ipproto 41"]);
    let plain = |name: &str, family: Family, port: u16| {
        let keys = format!("forward = \"gue\"\ngue_port = {port}");
        service(&bench, name, &[family], ECHO_PORT, &keys)
    };
    let more = plain("echo4", Family::V4, 5554) + &plain("echo6", Family::V6, 5556);
    let agent = agent(&bench, "forward = \"gue\"", &more);
    exercise_impaired(&bench, &agent);
    assert_unwrapped(&bench, &agent);
    assert_echoed(&bench);
    assert_nothing_dropped(&agent);
}

#[test]
fn translated_connections_stay_whole_on_networks_that_lose_packets() {
    if !ready("translated_connections_stay_whole_on_networks_that_lose_packets") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &VERSIONS);
    let agent = agent(&bench, "forward = \"nat\"", "");
    exercise_impaired(&bench, &agent);
    assert_nothing_dropped(&agent);
}

/// The interfaces of a virtual machine, which are on one wire.
fn virtio_interfaces() -> Vec<String> {
    let all = fs::read_dir("/sys/class/net").expect("interfaces");
    let is_virtio = |name: &String| {
        let driver = fs::read_link(format!("/sys/class/net/{name}/device/driver"));
        driver.is_ok_and(|driver| driver.ends_with("virtio_net"))
    };
    let names = all.map(|entry| entry.expect("an interface").file_name());
    let mut found: Vec<String> =
        names.filter_map(|name| name.into_string().ok()).filter(is_virtio).collect();
    found.sort();
    found
}

/// All other tests' interfaces are veth pairs; here the balancer's driver is one that has rings of
/// its own, and the other end of its wire another device.
#[test]
fn connections_go_through_virtio_interfaces_in_native_mode() {
    let test = "connections_go_through_virtio_interfaces_in_native_mode";
    if !ready(test) {
        return;
    }
    if !host::in_vm() {
        // A host's own are how somebody works on it.
        host::leave_to_vm(test, "it takes the host's own interfaces");
        return;
    }
    let found = virtio_interfaces();
    let uplink = found.try_into().unwrap_or_else(|found| panic!("not two, but {found:?}"));
    let options = Options::one_armed_dsr(&VERSIONS).with_uplink(uplink);
    let bench = Bench::of(Way::NatOneArmed, &options, Server::start);
    let by_mac = service(&bench, "echo", &Family::ALL, ECHO_PORT, "forward = \"dsr\"");
    let agent = agent(&bench, "forward = \"nat\"", &by_mac);
    let interfaces = agent.status().interfaces;
    assert!(interfaces.iter().all(|one| one.mode.as_deref() == Some("native")), "{interfaces:?}");
    carry(&bench, || there_and_back(&bench, &agent));
    assert_echoed(&bench);
    assert_nothing_dropped(&agent);
}
