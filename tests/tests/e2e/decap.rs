//! `canary-agent decap` on a backend: what comes wrapped is served, however it is wrapped.
//!
//! Here the wrapped packets are made by hand, as any balancer would make them.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    process::Stdio,
    time::Duration,
};

use canary_tests::{
    agent::Output,
    binary, host,
    netns::Namespace,
    notation,
    server::ECHO_PORT,
    spawn,
    topology::{BALANCER_V4, BALANCER_V6, Family, Host},
    wait, wire,
    workdir::Workdir,
    xdp_pass::XdpPass,
};
use serde_json::{Value, json};

use crate::support::{Bench, Way};

/// A backend that `canary-agent decap` is run on.
struct Backend<'a> {
    bench: &'a Bench,
    host: &'a Host,
    workdir: Workdir,
}

impl<'a> Backend<'a> {
    fn new(bench: &'a Bench) -> Self {
        Self { bench, host: &bench.topology.backends[0], workdir: Workdir::new("decap") }
    }

    /// Runs the command there.
    fn decap(&self, args: &[&str]) -> Output {
        let mut command = self.host.namespace.command(binary::locate("canary-agent"));
        command.arg("decap").args(args).arg("--pins").arg(self.workdir.bpffs().join("decap"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = spawn::spawn(command).expect("the command starts");
        let output = child.wait_with_output().expect("the command ends");
        Output {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    fn done(&self, args: &[&str]) -> Value {
        let output = self.decap(&[args, &["--json"]].concat());
        assert_eq!(output.code, 0, "{args:?}: {}{}", output.stdout, output.stderr);
        output.json()
    }

    /// Packets that an outcome is counted for.
    #[track_caller]
    fn counted(&self, outcome: &str) -> u64 {
        self.done(&["--status"])["packets"][outcome].as_u64().expect("a count")
    }

    /// The server answers a client whose datagram to the VIP is wrapped for the backend. Returns how
    /// many it took.
    #[track_caller]
    fn serves(&self, outer: Family, gue: bool, inner: Family, client: u32) -> u64 {
        let asked = self.client(outer, gue, inner, client);
        // Neighbours are asked for on the way back, and a datagram may be lost to that.
        let mut sent = 0;
        wait::until("an answer", || {
            asked.send();
            sent += 1;
            if asked.answered() {
                return Ok(());
            }
            let status = self.decap(&["--status"]);
            Err(format!("{inner:?} in {outer:?}, gue {gue}: {status:?}"))
        });
        sent
    }

    /// Nothing unwraps what is sent so: nobody answers. Where one is named, that outcome is counted.
    #[track_caller]
    fn serves_not(&self, gue: bool, client: u32, outcome: Option<&str>) {
        let asked = self.client(Family::V4, gue, Family::V4, client);
        let before = outcome.map(|outcome| self.counted(outcome));
        asked.send();
        if let (Some(outcome), Some(before)) = (outcome, before) {
            wait::until("the packet", || match self.counted(outcome) {
                now if now > before => Ok(()),
                now => Err(format!("{outcome}: {now}")),
            });
        }
        assert!(!asked.answered(), "client {client} was answered");
        for _ in 1..5 {
            asked.send();
            assert!(!asked.answered(), "client {client} was answered");
        }
    }

    /// A client with a socket, and a datagram of its to the VIP, wrapped for the backend.
    #[track_caller]
    fn client(&self, outer: Family, gue: bool, inner: Family, client: u32) -> Asked<'a> {
        let namespace = self.bench.client();
        let source = inner.client(client);
        let socket = namespace.run(|| {
            let socket = UdpSocket::bind(SocketAddr::new(source, 0)).expect("a socket");
            socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a limit");
            socket
        });
        let port = socket.local_addr().expect("bound").port();
        let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let eth = format!(
            "eth {} > {}",
            mac(wire::mac(namespace, "eth0")),
            mac(wire::mac(&self.host.namespace, "eth0"))
        );
        let (balancer, backend): (IpAddr, IpAddr) = match outer {
            Family::V4 => (BALANCER_V4.into(), self.host.v4.into()),
            Family::V6 => (BALANCER_V6.into(), self.host.v6.into()),
        };
        let word = |family: Family| if family == Family::V4 { "ip" } else { "ip6" };
        let udp = if gue { " / udp 50000 > 6080 csum=0" } else { "" };
        let text = format!(
            "{eth} / {} {balancer} > {backend}{udp} / {} {source} > {} / udp {port} > {ECHO_PORT} / \"hello\"",
            word(outer),
            word(inner),
            inner.vip(),
        );
        let frame = notation::parse(&text).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        Asked { namespace, socket, frame, to: SocketAddr::new(inner.vip(), ECHO_PORT) }
    }
}

/// A client that asks the server of a backend, its question wrapped.
struct Asked<'a> {
    namespace: &'a Namespace,
    socket: UdpSocket,
    frame: Vec<u8>,
    to: SocketAddr,
}

impl Asked<'_> {
    #[track_caller]
    fn send(&self) {
        wire::send(self.namespace, "eth0", &self.frame);
    }

    /// Whether the server's answer comes, within 300 ms.
    #[track_caller]
    fn answered(&self) -> bool {
        let mut room = [0; 100];
        match wait::uninterrupted(|| self.socket.recv_from(&mut room)) {
            Ok((bytes, from)) => {
                assert_eq!(from, self.to);
                assert_eq!(&room[..bytes], b"stable-1\nhello");
                true
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                false
            }
            Err(error) => panic!("{}: {error}", self.to),
        }
    }
}

#[track_caller]
fn exercise(test: &str, mode: &str) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1)]);
    let backend = Backend::new(&bench);
    let from = ["--from", "10.1.0.2", "--from", "fd00:1::/64"];
    let report = backend.done(&[&["eth0", "--xdp-mode", mode], &from[..]].concat());
    assert_eq!(report["interfaces"], json!([{"name": "eth0", "mode": mode}]), "{report}");
    assert_eq!(report["addresses"], json!([backend.host.v4, backend.host.v6]), "{report}");
    let mut client = 1;
    for outer in Family::ALL {
        for inner in Family::ALL {
            for gue in [false, true] {
                backend.serves(outer, gue, inner, client);
                client += 1;
            }
        }
    }
    let status = backend.done(&["--status"]);
    assert_eq!(status["interfaces"], json!([{"name": "eth0", "mode": mode}]), "{status}");
    for outcome in ["unwrapped_ipip", "unwrapped_gue"] {
        assert!(status["packets"][outcome].as_u64() >= Some(4), "{status}");
    }
}

#[test]
fn wrapped_packets_are_unwrapped_in_native_mode() {
    exercise("wrapped_packets_are_unwrapped_in_native_mode", "native");
}

#[test]
fn wrapped_packets_are_unwrapped_in_generic_mode() {
    exercise("wrapped_packets_are_unwrapped_in_generic_mode", "generic");
}

#[test]
fn unwrapping_is_changed_shown_and_taken_off() {
    if !host::ready("unwrapping_is_changed_shown_and_taken_off") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1)]);
    let backend = Backend::new(&bench);
    let refused = |args: &[&str], code: i32, words: &[&str]| {
        let output = backend.decap(args);
        assert_eq!(output.code, code, "{args:?}: {output:?}");
        for word in words {
            assert!(output.stderr.contains(word), "{args:?}: {output:?}");
        }
    };
    let nothing = |status: &Value| assert_eq!(status["interfaces"], json!([]), "{status}");
    nothing(&backend.done(&["--status"]));
    nothing(&backend.done(&["--detach"]));
    refused(&[], 2, &["INTERFACE"]);
    refused(&["eth7"], 1, &["eth7 does not exist"]);
    refused(&["lo", "--address", "10.0.0.1", "--from", "10.0.0.0/33"], 2, &["10.0.0.0/24"]);
    refused(&["--detach", "eth0"], 1, &["no packets are unwrapped on eth0"]);
    let dry = backend.done(&["eth0", "--dry-run"]);
    assert_eq!((&dry["applied"], &dry["from"]), (&json!(false), &json!([])), "{dry}");
    assert!(dry["warnings"][0].as_str().is_some_and(|w| w.contains("--from")), "{dry}");
    nothing(&backend.done(&["--status"]));
    backend.serves_not(false, 1, None);

    // Somebody else's program is not touched, and of two interfaces neither has ours then.
    let passes = XdpPass::attach(&backend.host.namespace, "eth0");
    refused(&["lo", "eth0", "--address", "10.0.0.1"], 1, &["another XDP program", "--replace"]);
    nothing(&backend.done(&["--status"]));
    drop(passes);
    wait::until("the interface without a program", || {
        let output = backend.decap(&["eth0", "--from", "10.1.0.2"]);
        (output.code == 0).then_some(()).ok_or(output.stderr)
    });
    let sent = backend.serves(Family::V4, false, Family::V4, 2);
    // An answer may come when another was asked for already.
    wait::until("all that was sent", || match backend.counted("unwrapped_ipip") {
        now if now == sent => Ok(()),
        now => Err(format!("{now} of {sent}")),
    });

    // Run again it takes up what has changed; what was counted stays.
    backend.done(&["eth0", "--from", "10.5.0.0/16", "--gue-port", "5555"]);
    // From nobody that was named.
    backend.serves_not(false, 3, Some("pass_sender"));
    assert_eq!(backend.counted("unwrapped_ipip"), sent);
    backend.done(&["eth0", "--address", "10.5.0.1"]);
    // To an address that was not named.
    backend.serves_not(true, 4, Some("pass_address"));

    let dry = backend.done(&["--detach", "--dry-run"]);
    assert_eq!(dry, json!({"applied": false, "interfaces": ["eth0"]}));
    let gone = backend.done(&["--detach", "eth0"]);
    assert_eq!(gone, json!({"applied": true, "interfaces": ["eth0"]}));
    nothing(&backend.done(&["--status"]));
    assert!(!backend.workdir.bpffs().join("decap").exists(), "pins are left");
    backend.serves_not(false, 5, None);
}
