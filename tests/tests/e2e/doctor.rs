//! `doctor` on hosts that are made so: each situation turns its verdict.

use std::{
    fs,
    net::TcpListener,
    os::{
        fd::AsRawFd as _,
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::PathBuf,
    process::Command,
};

use canary_agent::{
    api::model::ErrorBody,
    config::Diagnostic,
    doctor::{Check, Name, Report, Verdict},
};
use canary_tests::{
    agent::{Agent, AgentOptions, Output},
    binary, host,
    lacking::{self, Mounts},
    netns::Namespace,
    topology::Topology,
    unprivileged,
    xdp_pass::{Offload, XdpPass, offload},
};
use nix::sys::signal::Signal;

use crate::support::{Bench, Way, finish};

/// Nobody.
const NOBODY: u32 = 65_534;

fn look(agent: &Agent<'_>) -> Report {
    look_with(agent, |_| {})
}

#[track_caller]
fn look_with(agent: &Agent<'_>, change: impl FnOnce(&mut Command)) -> Report {
    let mut command = agent.command(&["doctor", "--json"]);
    change(&mut command);
    report(&finish(command))
}

/// The report, which must agree with itself and with the exit code.
#[track_caller]
fn report(output: &Output) -> Report {
    let report: Report = output.json();
    let failed = report.checks.iter().any(|check| check.verdict == Verdict::Failed);
    assert_eq!((report.ready, output.code), (!failed, i32::from(failed)), "{output:?}");
    for check in &report.checks {
        assert!(!check.found.is_empty() && !check.evidence.is_empty(), "{check:?}");
        let bad = matches!(check.verdict, Verdict::Warning | Verdict::Failed);
        assert!(!bad || check.remedy.is_some(), "{check:?}");
    }
    report
}

/// A check, of a certain interface, VIP or backend where that is said.
#[track_caller]
fn check<'r>(report: &'r Report, name: Name, about: &str) -> &'r Check {
    let mut checks = report.checks.iter().filter(|check| check.name == name);
    let found = match about {
        "" => checks.next(),
        about => checks.find(|check| check.about.as_deref() == Some(about)),
    };
    found.unwrap_or_else(|| panic!("no {name:?} of `{about}` in {report:#?}"))
}

#[track_caller]
fn expect(report: &Report, name: Name, about: &str, verdict: Verdict, says: &str) {
    let found = check(report, name, about);
    assert_eq!(found.verdict, verdict, "{found:#?}");
    let text = format!("{} {}", found.found, found.remedy.as_deref().unwrap_or_default());
    assert!(text.contains(says), "should say `{says}`: {found:#?}");
}

fn bench() -> Bench {
    Bench::new(Way::NatTwoArmed, &[("stable", 2)])
}

#[test]
fn a_host_that_is_ready_is_said_to_be() {
    if !host::ready("a_host_that_is_ready_is_said_to_be") {
        return;
    }
    let bench = bench();
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let before = look(&agent);
    assert!(before.ready, "{before:#?}");
    assert_eq!(before.agent_pid, None);
    for interface in ["eth0", "eth1"] {
        expect(&before, Name::Mode, interface, Verdict::Ok, "veth");
        expect(&before, Name::Program, interface, Verdict::Ok, "no XDP program");
        expect(&before, Name::Mtu, interface, Verdict::Ok, "1500");
        expect(&before, Name::TxChecksum, interface, Verdict::NotChecked, "another network");
    }
    expect(&before, Name::KernelBpf, "", Verdict::Ok, "all");
    expect(&before, Name::Redirect, "eth1", Verdict::Ok, "");
    expect(&before, Name::NatInterfaces, "", Verdict::Ok, "");
    expect(&before, Name::Pins, "", Verdict::Ok, "nothing");
    expect(&before, Name::Vip, "10.1.0.100", Verdict::Ok, "a start puts it there");
    for host in &bench.topology.backends {
        expect(&before, Name::Backend, &host.v4.to_string(), Verdict::Ok, "next hop is");
        expect(&before, Name::Backend, &host.v6.to_string(), Verdict::Ok, "next hop is");
    }
    assert!(!agent.folder().join("bpffs/canary").exists(), "nothing is made");

    agent.run();
    agent.wait_ready();
    let running = look(&agent);
    assert!(running.ready, "{running:#?}");
    assert_eq!(running.agent_pid, agent.pid());
    expect(&running, Name::Agent, "", Verdict::Ok, "pid");
    expect(&running, Name::Program, "eth0", Verdict::Ok, "own program");
    expect(&running, Name::Mode, "eth0", Verdict::Ok, "native");
    expect(&running, Name::Vip, "10.1.0.100", Verdict::Ok, "on eth0, the agent's");
    expect(&running, Name::NatPorts, "", Verdict::Ok, "kept");
    expect(&running, Name::Pins, "", Verdict::Ok, "eth0, eth1");

    // For people: the same verdicts, and what to do.
    let text = agent.cli(&["doctor"]);
    assert_eq!(text.code, 0, "{text:?}");
    assert!(text.stdout.contains("\nready: 0 failed"), "{text:?}");
    assert!(text.stdout.contains("interface.mode eth0"), "{text:?}");

    // What is pinned outlives the agent; other sizes, and what is not gone on with, are said
    // beforehand.
    agent.stop(Signal::SIGTERM);
    expect(&look(&agent), Name::Pins, "", Verdict::Ok, "a start takes them over");
    let mut options = options;
    options.extra = "capacity = { flows = 4096 }".to_owned();
    agent.configure(&options, &bench.services(""));
    expect(&look(&agent), Name::Pins, "", Verdict::Ok, "carries them over");
    fs::remove_file(agent.folder().join("bpffs/canary/maps/META")).expect("removed");
    expect(&look(&agent), Name::Pins, "", Verdict::Failed, "--rebuild");
}

/// An agent in a namespace with a veth pair of its own, both of whose ends can be seen.
fn pair(topology: &Topology, mode: &str) -> (AgentOptions, String) {
    topology.balancer.ip("link add pair0 type veth peer name pair1
link set pair0 up
link set pair1 up
address add 10.9.0.1/24 dev pair0");
    let options = AgentOptions {
        interfaces: vec!["eth0".to_owned(), "pair0".to_owned()],
        xdp_mode: mode.to_owned(),
        ..AgentOptions::native(topology)
    };
    let service = "[[service]]\nname = \"pair\"\nvip = [\"10.1.0.200\"]\nports = [\"tcp/80\"]\n\
                   health = { type = \"none\" }\n[service.versions.stable]\nbackends = [\"10.9.0.2:80\"]\n";
    (options, service.to_owned())
}

#[test]
fn drivers_and_offloads_turn_their_verdicts() {
    if !host::ready("drivers_and_offloads_turn_their_verdicts") {
        return;
    }
    let topology = Topology::new(&canary_tests::topology::Options::two_armed(&[("stable", 1)]));
    let balancer = &topology.balancer;
    let (mut options, service) = pair(&topology, "native");
    let agent = Agent::prepare(balancer, &options, &service);

    // The backend is nobody: asked for, and silent.
    let report = look(&agent);
    expect(&report, Name::Backend, "10.9.0.2", Verdict::Warning, "pair0");
    // Checksums that the peer leaves out.
    expect(&report, Name::TxChecksum, "pair0", Verdict::Warning, "ethtool -K pair1 tx off");
    offload(balancer, "pair1", Offload::TxChecksum, false);
    // No program on the peer: nothing can be handed to it.
    expect(&report, Name::Redirect, "pair0", Verdict::Warning, "peer");
    let pass = XdpPass::attach(balancer, "pair1");
    let report = look(&agent);
    expect(&report, Name::TxChecksum, "pair0", Verdict::Ok, "pair1");
    expect(&report, Name::Redirect, "pair0", Verdict::Ok, "");
    drop(pass);

    // Packets that are too large for one buffer.
    balancer.ip("link set pair0 mtu 9000\nlink set pair1 mtu 9000");
    expect(&look(&agent), Name::Mtu, "pair0", Verdict::Failed, "ip link set pair0 mtu");
    options.xdp_mode = "auto".to_owned();
    agent.configure(&options, &service);
    expect(&look(&agent), Name::Mtu, "pair0", Verdict::Warning, "refuses native mode");
    balancer.ip("link set pair0 mtu 1400\nlink set pair1 mtu 1400");
    let report = look(&agent);
    expect(&report, Name::Mtu, "pair0", Verdict::Ok, "1400");
    expect(&report, Name::BackendMtu, "pair by pair0", Verdict::Warning, "1400");
    balancer.ip("link set pair0 mtu 1500\nlink set pair1 mtu 1500");
    expect(&look(&agent), Name::BackendMtu, "pair by pair0", Verdict::Ok, "1500");

    // Merged packets matter in generic mode.
    offload(balancer, "pair0", Offload::Gro, true);
    expect(&look(&agent), Name::Gro, "pair0", Verdict::Ok, "native");
    options.xdp_mode = "generic".to_owned();
    agent.configure(&options, &service);
    expect(&look(&agent), Name::Gro, "pair0", Verdict::Warning, "ethtool -K pair0 gro off");
    offload(balancer, "pair0", Offload::Gro, false);
    expect(&look(&agent), Name::Gro, "pair0", Verdict::Ok, "off");

    // Somebody else's program: named, and the start says the same.
    let other = XdpPass::attach(balancer, "pair0");
    let report = look(&agent);
    expect(&report, Name::Program, "pair0", Verdict::Failed, "--replace");
    let id = balancer.run(|| canary_agent::datapath::program_on("pair0")).expect("a link");
    let id = id.expect("a program");
    expect(&report, Name::Program, "pair0", Verdict::Failed, &format!("id {id}"));
    let start = finish(agent.command(&["run"]));
    assert_eq!(start.code, 1, "{start:?}");
    assert!(start.stderr.contains("interface.program pair0"), "{start:?}");
    assert!(start.stderr.contains("--replace"), "{start:?}");
    drop(other);

    // Down; missing; misspelt.
    balancer.ip("link set pair1 down");
    expect(&look(&agent), Name::Link, "pair0", Verdict::Warning, "no carrier");
    balancer.ip("link set pair1 up\nlink set pair0 down");
    expect(&look(&agent), Name::Link, "pair0", Verdict::Warning, "ip link set pair0 up");
    balancer.ip("link set pair0 up");
    options.interfaces = vec!["eth0".to_owned(), "piar0".to_owned()];
    agent.configure(&options, &service);
    expect(&look(&agent), Name::Link, "piar0", Verdict::Failed, "`pair0`");

    // Left out, although answers come in there: `check` says so too.
    options.interfaces = vec!["eth0".to_owned()];
    agent.configure(&options, &service);
    expect(&look(&agent), Name::NatInterfaces, "", Verdict::Failed, "[\"eth0\", \"pair0\"]");
    let findings: Vec<Diagnostic> = agent.json(&["check"]);
    assert!(findings.iter().any(|one| one.message.contains("pair0")), "{findings:?}");
}

/// Makes the host translate addresses, as far as the kernel goes: the table is there once
/// somebody has asked for it.
fn ask_for_iptables_nat(namespace: &Namespace) -> bool {
    const IPT_SO_GET_INFO: libc::c_int = 64;
    /// `struct ipt_getinfo`
    const LEN: usize = 84;
    namespace.run(|| {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None);
        let Ok(raw) = raw else { return false };
        let mut info = [0_u8; LEN];
        info[..3].copy_from_slice(b"nat");
        let mut len = LEN as libc::socklen_t;
        // SAFETY: `info` owns `len` writable bytes; the kernel writes at most as many.
        let result = unsafe {
            let at = info.as_mut_ptr().cast();
            libc::getsockopt(raw.as_raw_fd(), libc::SOL_IP, IPT_SO_GET_INFO, at, &raw mut len)
        };
        result == 0
    })
}

#[test]
fn the_network_turns_its_verdicts() {
    if !host::ready("the_network_turns_its_verdicts") {
        return;
    }
    let bench = bench();
    let balancer = &bench.topology.balancer;
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::prepare(balancer, &options, &bench.services(""));

    for (value, verdict) in [("1", Verdict::Warning), ("2", Verdict::Ok)] {
        balancer.sysctl("net/ipv4/conf/all/rp_filter", value);
        expect(&look(&agent), Name::RpFilter, "", verdict, "");
    }
    balancer.sysctl("net/ipv4/ip_forward", "0");
    expect(&look(&agent), Name::Forwarding, "", Verdict::Ok, "IPv4 off");
    balancer.sysctl("net/ipv4/ip_forward", "1");

    expect(&look(&agent), Name::Firewall, "", Verdict::Ok, "no firewall");
    if ask_for_iptables_nat(balancer) {
        expect(&look(&agent), Name::Firewall, "", Verdict::Warning, "iptables nat");
    }

    // A backend without a way.
    let address = bench.topology.backends[0].v4.to_string();
    balancer.ip(&format!("route add blackhole {address}"));
    expect(&look(&agent), Name::Backend, &address, Verdict::Failed, "blackhole");
    balancer.ip(&format!("route del blackhole {address}"));
    balancer.ip(&format!("route add unreachable {address}"));
    expect(&look(&agent), Name::Backend, &address, Verdict::Failed, "unreachable");
    balancer.ip(&format!("route del unreachable {address}"));
    balancer.ip("address del 10.2.0.2/16 dev eth1");
    expect(&look(&agent), Name::Backend, &address, Verdict::Failed, "ip route add");
    balancer.ip("address add 10.2.0.2/16 dev eth1");

    // Another host has the VIP.
    bench.client().ip("address add 10.1.0.100/16 dev eth0");
    expect(&look(&agent), Name::Vip, "10.1.0.100", Verdict::Warning, "another host");
    bench.client().ip("address del 10.1.0.100/16 dev eth0");

    // It is here, and ARP for it is not answered.
    balancer.ip("address add 10.1.0.100/32 dev lo");
    expect(&look(&agent), Name::Vip, "10.1.0.100", Verdict::Ok, "somebody else's");
    balancer.sysctl("net/ipv4/conf/all/arp_ignore", "1");
    expect(&look(&agent), Name::Vip, "10.1.0.100", Verdict::Warning, "arp_ignore=0");
}

#[test]
fn the_agents_places_turn_their_verdicts() {
    if !host::ready("the_agents_places_turn_their_verdicts") {
        return;
    }
    let bench = bench();
    let balancer = &bench.topology.balancer;
    let mut options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(balancer, &options, &bench.services(""));

    // A port that somebody has.
    let taken = balancer.run(|| TcpListener::bind("127.0.0.1:0")).expect("a port");
    options.listen = taken.local_addr().expect("its address").to_string();
    agent.configure(&options, &bench.services(""));
    expect(&look(&agent), Name::Listen, "", Verdict::Failed, "ss -ltnp");
    drop(taken);
    expect(&look(&agent), Name::Listen, "", Verdict::Ok, "free");

    // Disks.
    let state = agent.folder().join("state");
    fs::create_dir(&state).expect("a folder");
    let with = |mounts: Mounts| look_with(&agent, |command| mounts.apply(command));
    let read_only = with(Mounts::default().read_only(&state));
    expect(&read_only, Name::StateDir, "", Verdict::Failed, "Read-only");
    let small = with(Mounts::default().small(&state, 1 << 20));
    expect(&small, Name::StateDir, "", Verdict::Warning, "in memory");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).expect("the mode");
    expect(&look(&agent), Name::StateDir, "", Verdict::Warning, "chmod");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o750)).expect("the mode");

    // Something that is no socket.
    fs::write(agent.socket(), "precious").expect("written");
    expect(&look(&agent), Name::Socket, "", Verdict::Failed, "is no socket");
    fs::remove_file(agent.socket()).expect("removed");

    // Pins elsewhere; an old kernel; a kernel that may not be asked.
    let text = fs::read_to_string(agent.config()).expect("the configuration");
    let pins = format!("{:?}", agent.folder().join("bpffs/canary"));
    let elsewhere = text.replace(&pins, &format!("{:?}", agent.folder().join("pins")));
    fs::write(agent.config(), &elsewhere).expect("the configuration");
    expect(&look(&agent), Name::Bpffs, "", Verdict::Failed, "no BPF file system");
    fs::write(agent.config(), &text).expect("the configuration");
    let old = look_with(&agent, lacking::recent_kernel);
    expect(&old, Name::KernelRelease, "", Verdict::Failed, "6.1");
    let refused = look_with(&agent, |command| {
        lacking::bpf_command(command, lacking::BPF_PROG_LOAD, libc::EPERM);
    });
    expect(&refused, Name::KernelBpf, "", Verdict::NotChecked, "not permitted");

    // An ordinary user. The file system of the pins is anybody's when it has just been mounted.
    let pins = agent.folder().join("bpffs");
    fs::set_permissions(pins, fs::Permissions::from_mode(0o700)).expect("the mode");
    let nobody = ordinary(&agent, NOBODY);
    expect(&nobody, Name::Capabilities, "", Verdict::Failed, "CAP_BPF");
    expect(&nobody, Name::KernelBpf, "", Verdict::NotChecked, "sudo");
    expect(&nobody, Name::Bpffs, "", Verdict::Failed, "can't write");
    expect(&nobody, Name::StateDir, "", Verdict::Failed, "can't be written to");

    // What the agent makes is closed to others, whatever the umask.
    agent.run_with(|command| {
        // SAFETY: a plain system call.
        unsafe {
            command.pre_exec(|| {
                libc::umask(0);
                Ok(())
            });
        }
    });
    agent.wait_ready();
    let running = look(&agent);
    for name in [Name::Pins, Name::StateDir, Name::Socket] {
        expect(&running, name, "", Verdict::Ok, "");
    }

    // Another agent in the same places.
    let socket = agent.folder().join("other.sock");
    let mut command = balancer.command(agent.binary());
    command.arg("--config").arg(agent.config()).arg("--socket").arg(&socket);
    command.args(["doctor", "--json"]);
    let other = report(&finish(command));
    expect(&other, Name::Agent, "", Verdict::Failed, "agent.state_dir");
    // One that may not be asked.
    let nobody = ordinary(&agent, NOBODY);
    expect(&nobody, Name::Agent, "", Verdict::NotChecked, "member of the socket's group");
}

/// What an ordinary user is told.
#[track_caller]
fn ordinary(agent: &Agent<'_>, user: u32) -> Report {
    let program: PathBuf = agent.folder().join("canary-agent");
    if !program.exists() {
        fs::copy(binary::locate("canary-agent"), &program).expect("the program");
        for path in [&program, &agent.folder().to_owned()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("the mode");
        }
    }
    let mut command = Command::new(&program);
    // In the test's own network namespace, which no verdict here is about.
    command.args(["--json", "doctor", "--config"]).arg(agent.config());
    command.arg("--socket").arg(agent.socket());
    unprivileged::become_user(&mut command, user, &[]);
    report(&finish(command))
}

#[test]
fn a_bad_configuration_ends_it() {
    if !host::ready("a_bad_configuration_ends_it") {
        return;
    }
    let bench = bench();
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::prepare(&bench.topology.balancer, &options, "[[service]]\nname = 7\n");
    let output = agent.cli(&["doctor", "--json"]);
    assert_eq!(output.code, 78, "{output:?}");
    let body: ErrorBody = output.json();
    assert_eq!(body.error.code, "bad_config");
    assert!(!body.error.diagnostics.is_empty(), "{body:?}");
    let output = agent.cli(&["doctor"]);
    assert_eq!(output.code, 78, "{output:?}");
    assert!(output.stderr.contains("agent.toml:"), "{output:?}");
}

#[test]
fn a_start_says_what_the_host_is_not_ready_for() {
    if !host::ready("a_start_says_what_the_host_is_not_ready_for") {
        return;
    }
    let bench = bench();
    bench.topology.balancer.sysctl("net/ipv4/conf/all/rp_filter", "1");
    let agent = bench.agent("");
    let log = agent.log();
    assert!(log.contains("network.rp_filter: strict on eth0, eth1"), "{log}");
    assert!(log.contains("net.ipv4.conf.eth0.rp_filter=2"), "{log}");
}
