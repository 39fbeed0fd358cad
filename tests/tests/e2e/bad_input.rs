//! Whatever is wrong has its exit code and its message, and changes nothing.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use canary_agent::api::model::{ErrorBody, Events};
use canary_tests::{
    agent::{Agent, AgentOptions, Output},
    binary,
    control::Control,
    host,
    topology::Family,
};

use crate::support::{Bench, SHOP, Way, finish, settled};

/// Nobody.
const NOBODY: u32 = 65_534;

/// Versions of which a name is long enough to be nearly hit.
const VERSIONS: [(&str, u8); 3] = [("stable", 1), ("v2", 1), ("green", 1)];

/// What a row expects: exit code, and what the message says.
type Row<'a> = (&'a [&'a str], i32, &'a [&'a str]);

#[track_caller]
fn assert_refused(output: &Output, what: &str, code: i32, says: &[&str]) {
    assert_eq!(output.code, code, "{what}: {output:?}");
    let said = says.iter().all(|one| output.stderr.contains(one));
    assert!(said, "{what}: should say {says:?}: {}", output.stderr);
}

#[test]
fn splits_that_make_no_sense_are_refused() {
    if !host::ready("splits_that_make_no_sense_are_refused") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let agent = bench.agent("");
    agent.split(SHOP, "v2", "20%");
    let before = settled(&agent.status());
    let rows: &[Row<'_>] = &[
        (&["split", "shpo", "v2=5%"], 1, &["no service `shpo`", "did you mean `shop`?"]),
        (&["split", "nothing-like-it", "v2=5%"], 1, &["no service", "`shop`"]),
        (&["split", "shop", "gren=5%"], 1, &["no version `gren`", "did you mean `green`?"]),
        (&["split", "shop", "stable=50%"], 1, &["`stable` is the control version"]),
        (&["split", "shop", "green=90%"], 1, &["more than 100%", "v2=20%", "green=90%"]),
        (&["split", "shop", "v2=60%", "green=50%"], 1, &["more than 100%"]),
        (&["split", "shop", "v2=101%"], 2, &["101%"]),
        (&["split", "shop", "v2=-5%"], 2, &["-5%"]),
        (&["split", "shop", "v2=NaN%"], 2, &["NaN%"]),
        (&["split", "shop", "v2=inf%"], 2, &["inf%"]),
        (&["split", "shop", "v2=1e1%"], 2, &["1e1%"]),
        (&["split", "shop", "v2=5"], 2, &["5%"]),
        (&["split", "shop", "v2=0.05"], 2, &["v2"]),
        (&["split", "shop", "v2="], 2, &["v2"]),
        (&["split", "shop", "=5%"], 2, &["="]),
        (&["split", "shop", "v2"], 2, &["VERSION=SHARE"]),
        (&["split", "shop", "v2=1/0"], 2, &["1/0"]),
        (&["split", "shop", "v2=70000/65536"], 2, &["70000/65536"]),
        (&["split", "shop", "v2=5%", "v2=6%"], 2, &["`v2` is given two shares"]),
        (&["split"], 2, &["SERVICE"]),
        (&["status", "shpo"], 1, &["shpo", "shop"]),
        (&["explain", "shpo", "--from", "10.64.0.1"], 1, &["did you mean `shop`?"]),
        (&["explain", "shop"], 2, &["--from"]),
        (&["explain", "shop", "--from", "nonsense"], 2, &["nonsense"]),
        (&["explain", "shop", "--from", "10.64.0.1", "--to", "10.1.0.9:80"], 2, &["10.1.0.9:80"]),
        (&["frobnicate"], 2, &["frobnicate"]),
        (&["status", "--frobnicate"], 2, &["--frobnicate"]),
    ];
    for (args, code, says) in rows {
        let output = agent.cli(args);
        assert_refused(&output, &args.join(" "), *code, says);
        assert_eq!(output.stdout, "", "{args:?}");
        let json = agent.cli(&[args, &["--json"][..]].concat());
        assert_eq!((json.code, json.stderr.as_str()), (*code, ""), "{args:?}: {json:?}");
        let body: ErrorBody = json.json();
        assert_eq!(i32::from(body.error.exit_code), *code, "{args:?}: {body:?}");
        assert!(!body.error.code.is_empty() && !body.error.message.is_empty(), "{body:?}");
    }
    let dry = agent.cli(&["split", SHOP, "v2=50%", "--dry-run"]);
    assert_eq!(dry.code, 0, "{dry:?}");
    assert!(dry.stdout.contains("would move"), "{dry:?}");
    assert_eq!(settled(&agent.status()), before, "after all of it");
}

/// A folder that everybody can read, with the program in it.
struct Public(PathBuf);

impl Public {
    fn new(agent: &Agent<'_>) -> Self {
        let path = agent.folder().join("public");
        fs::create_dir_all(&path).expect("a folder");
        let program = path.join("canary-agent");
        fs::copy(binary::locate("canary-agent"), &program).expect("the program");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("the mode");
        fs::set_permissions(agent.folder(), fs::Permissions::from_mode(0o755)).expect("the mode");
        Self(program)
    }
}

/// Makes a command run as another user, after everything that needs root.
fn as_user(command: &mut Command, uid: u32, gid: u32) {
    as_member(command, uid, gid, []);
}

/// The same of one with more groups.
fn as_member<const N: usize>(command: &mut Command, uid: u32, gid: u32, groups: [u32; N]) {
    // SAFETY: plain system calls; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setgroups(&groups.map(Into::into))?;
            nix::unistd::setgid(gid.into())?;
            nix::unistd::setuid(uid.into())?;
            Ok(())
        });
    }
}

/// Takes every capability but those that root has over files for good.
fn without_capabilities(command: &mut Command) {
    // SAFETY: prctl is a plain system call; nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            // CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER come first
            // (linux/capability.h); numbers that the kernel does not know are refused.
            for capability in 4..64_u64 {
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            Ok(())
        });
    }
}

#[test]
fn who_may_not_is_told_so() {
    if !host::ready("who_may_not_is_told_so") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let mut options = AgentOptions::native(&bench.topology);
    options.extra =
        format!("operators = {{ users = [{}], groups = [{}] }}", NOBODY - 1, NOBODY - 2);
    let agent = Agent::start(&bench.topology, &options, &bench.services(""));
    let program = Public::new(&agent).0;
    let run = |args: &[&str], change: &dyn Fn(&mut Command)| {
        let mut command = bench.topology.balancer.command(&program);
        command.arg("--config").arg(agent.config()).args(args);
        change(&mut command);
        finish(command)
    };
    let before = settled(&agent.status());
    let nobody = |command: &mut Command| as_user(command, NOBODY, NOBODY);
    for args in [&["status"][..], &["split", SHOP, "v2=5%"], &["detach"]] {
        let says: &[&str] = if args == ["detach"] { &["root"] } else { &["agent.sock", "root"] };
        assert_refused(&run(args, &nobody), &args.join(" "), 77, says);
    }
    // The socket's group may look, and no more.
    let member = |command: &mut Command| as_user(command, NOBODY, 0);
    assert_eq!(run(&["status"], &member).code, 0);
    assert_refused(&run(&["split", SHOP, "v2=5%"], &member), "a member", 77, &["operators"]);
    assert_eq!(settled(&agent.status()), before);
    // Operators may.
    let operator = |command: &mut Command| as_user(command, NOBODY - 1, 0);
    let output = run(&["split", SHOP, "v2=5%"], &operator);
    assert_eq!(output.code, 0, "{output:?}");
    // So may whoever is in their group, as the kernel says, and nobody whose user has its number.
    let group =
        |gid: u32, more: u32| move |command: &mut Command| as_member(command, NOBODY, gid, [more]);
    for (share, change) in [("v2=6%", group(NOBODY - 2, 0)), ("v2=8%", group(0, NOBODY - 2))] {
        let output = run(&["split", SHOP, share], &change);
        assert_eq!(output.code, 0, "{share}: {output:?}");
    }
    let of_another = |command: &mut Command| as_user(command, NOBODY - 2, 0);
    let refused = run(&["split", SHOP, "v2=7%"], &of_another);
    assert_refused(&refused, "a user with the group's number", 77, &["operators"]);
    let events: Events = agent.json(&["events"]);
    let whose = events.events.iter().rev().find(|event| event.after.contains_key("v2"));
    assert_eq!(whose.and_then(|event| event.uid), Some(NOBODY), "{events:?}");
    agent.split(SHOP, "v2", "0");

    // The daemon itself, with places of its own.
    let own = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let daemon = |change: &dyn Fn(&mut Command)| {
        let mut command = bench.topology.balancer.command(&program);
        command.arg("--config").arg(own.config()).arg("run");
        change(&mut command);
        finish(command)
    };
    for folder in [own.folder().to_owned(), own.folder().join("bpffs")] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).expect("the mode");
    }
    let before = settled(&agent.status());
    assert_refused(&daemon(&nobody), "run as nobody", 77, &["CAP_BPF"]);
    assert_refused(&daemon(&without_capabilities), "run without capabilities", 77, &["CAP_BPF"]);
    assert_eq!(settled(&agent.status()), before);
    let pinned = own.folder().join("bpffs/canary/maps/TABLE");
    assert!(!pinned.exists(), "{} was made", pinned.display());
}

#[test]
fn a_daemon_that_is_not_there_is_unreachable() {
    if !host::ready("a_daemon_that_is_not_there_is_unreachable") {
        return;
    }
    let bench = Bench::new(Way::Dsr, &VERSIONS);
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    for args in [
        &["status"][..],
        &["split", SHOP],
        &["split", SHOP, "v2=5%"],
        &["explain", SHOP, "--from", "::1"],
    ] {
        let says = ["agent.sock", "canary-agent run"];
        assert_refused(&agent.cli(args), &args.join(" "), 5, &says);
        let json = agent.cli(&[args, &["--json"]].concat());
        let body: ErrorBody = json.json();
        assert_eq!((json.code, body.error.code.as_str()), (5, "unreachable"), "{json:?}");
    }
    // What needs no daemon works without one.
    assert_eq!(agent.cli(&["check"]).code, 0);
}

/// Runs the daemon with a configuration that it refuses.
#[track_caller]
fn refused_start(bench: &Bench, change: impl Fn(&str, &Path) -> Vec<u8>) -> (Output, Output) {
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let text = fs::read_to_string(agent.config()).expect("the configuration");
    fs::write(agent.config(), change(&text, agent.folder())).expect("the configuration");
    let outputs = (finish(agent.command(&["run"])), finish(agent.command(&["check"])));
    assert!(!agent.folder().join("bpffs/canary").exists(), "pins were made: {outputs:?}");
    assert!(!agent.socket().exists(), "a socket is left: {outputs:?}");
    outputs
}

#[test]
fn a_bad_configuration_is_refused_at_start() {
    if !host::ready("a_bad_configuration_is_refused_at_start") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &VERSIONS);
    let vip = Family::V4.vip().to_string();
    let rows: [(&str, &str, &str, &[&str]); 12] = [
        ("an unknown key", "control =", "contrl =", &["contrl", "control"]),
        ("port 0", "tcp/80", "tcp/0", &["tcp/0"]),
        ("port 65536", "tcp/80", "tcp/65536", &["tcp/65536"]),
        ("a VIP twice", "vip = [", &format!("vip = [\"{vip}\", "), &["10.1.0.100"]),
        ("services that overlap", "tcp/80", "tcp/7", &["`shop`", "`echo`", "tcp/7"]),
        ("an unknown control", "control = \"stable\"", "control = \"stabl\"", &["stabl", "stable"]),
        (
            "an unknown version in the split",
            "control =",
            "split = { v3 = \"5%\" }\ncontrol =",
            &["v3"],
        ),
        (
            "shares over 100 %",
            "control =",
            "split = { v2 = \"60%\", green = \"50%\" }\ncontrol =",
            &["100%"],
        ),
        ("a share without a unit", "control =", "split = { v2 = \"5\" }\ncontrol =", &["5%"]),
        ("a backend without a port", "10.2.1.1:80", "10.2.1.1", &["10.2.1.1"]),
        ("no interface", "interfaces = [\"eth0\", \"eth1\"]", "interfaces = []", &["interfaces"]),
        ("no TOML", "[[service]]", "[[service", &["agent.toml:"]),
    ];
    for (what, from, to, says) in rows {
        let (run, check) = refused_start(&bench, |text, _| {
            assert!(text.contains(from), "{what}: nothing to change");
            text.replacen(from, to, 1).into_bytes()
        });
        assert_refused(&run, what, 78, says);
        assert_eq!(check.code, 78, "{what}: {check:?}");
        let report = check.stdout.clone() + &check.stderr;
        for say in says {
            assert!(report.contains(say), "{what}: check should say {say}: {report}");
        }
        // With its place: file, line and column.
        let placed = report.lines().any(|line| {
            let place = line.split("agent.toml:").nth(1).unwrap_or_default();
            place.split(':').take(2).filter(|n| n.trim().parse::<u32>().is_ok()).count() == 2
        });
        assert!(placed, "{what}: no place in {report}");
    }
    let (run, check) = refused_start(&bench, |_, _| b"[agent]\ninterfaces = [\"\xff\"]".to_vec());
    assert_refused(&run, "not UTF-8", 78, &["UTF-8"]);
    assert_eq!(check.code, 78, "{check:?}");
    let (run, check) = refused_start(&bench, |text, _| {
        let mut text = text.as_bytes().to_vec();
        text.extend(std::iter::repeat_n(&b"# a long comment\n"[..], 650_000).flatten());
        text
    });
    assert_refused(&run, "a file of 10 MB", 78, &["agent.toml"]);
    assert_eq!(check.code, 78, "{check:?}");
    let (run, _) = refused_start(&bench, |text, folder| {
        // A folder, but of no BPF file system.
        let place = folder.join("elsewhere/pins");
        let line = text.lines().find(|line| line.starts_with("bpffs = ")).expect("the key");
        text.replace(line, &format!("bpffs = {place:?}")).into_bytes()
    });
    assert_refused(&run, "no bpffs", 1, &["mount -t bpf", "agent.bpffs"]);
}

/// A client that the socket's limits are for.
fn trickle(socket: &Path, seconds: u64) -> io::Result<()> {
    let control = Control::open(socket)?;
    let until = Instant::now() + Duration::from_secs(seconds);
    let head = b"PUT /v1/services/shop/split HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n";
    for byte in head.iter().chain(std::iter::repeat(&b' ')) {
        if Instant::now() > until {
            break;
        }
        // The agent closes it in the end.
        if control.stream().write_all(&[*byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn the_socket_takes_anything_and_traffic_goes_on() {
    if !host::ready("the_socket_takes_anything_and_traffic_goes_on") {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &VERSIONS);
    let agent = bench.agent("");
    agent.split(SHOP, "v2", "20%");
    let mut pool = bench.connect(Family::V4, 0..20);
    let before = settled(&agent.status());
    let target = "/v1/services/shop/split";
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    let huge = [&b"{\"split\": {\"v2\": \""[..], &b"5".repeat(3 << 20), b"%\"}}"].concat();
    let rows: [(&str, &str, &[u8], u16, &str); 13] = [
        ("PUT", target, b"{\"split\": {\"v2\": \"5%\"}", 400, "malformed_json"),
        ("PUT", target, b"", 400, "malformed_json"),
        ("PUT", target, b"\xff\xfe\x00", 400, "malformed_json"),
        ("PUT", target, &deep, 400, "bad_body"),
        ("PUT", target, b"[1, 2]", 400, "bad_body"),
        ("PUT", target, b"{\"split\": {\"v2\": 5}}", 400, "bad_body"),
        ("PUT", target, b"{\"split\": {}, \"force\": true}", 400, "bad_body"),
        ("PUT", target, b"{\"split\": {\"v2\": \"5\"}}", 0, "bad_share"),
        ("PUT", target, b"{\"split\": {\"v2\": \"NaN%\"}}", 0, "bad_share"),
        ("PUT", "/v1/services/no/split", b"{\"split\": {\"v2\": \"5%\"}}", 404, "unknown_service"),
        ("PUT", "/v1/nowhere", b"{}", 404, "unknown_route"),
        ("DELETE", target, b"", 405, "method_not_allowed"),
        ("PUT", target, &huge, 413, "body_too_large"),
    ];
    for (method, target, body, status, code) in rows {
        let mut control = Control::open(&agent.socket()).expect("the socket");
        let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        // A body that is refused unread may end the connection before it is sent.
        let head = format!(
            "{method} {target} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        control.send(head.as_bytes()).expect("sent");
        let _ = control.send(body);
        let answer = control.answer().unwrap_or_else(|error| panic!("{start}: {error}"));
        let error: ErrorBody = answer.json();
        assert_eq!(error.error.code, code, "{method} {target} {start}: {error:?}");
        if status == 0 {
            assert!((400..500).contains(&answer.status), "{start}: {}", answer.status);
        } else {
            assert_eq!(answer.status, status, "{method} {target} {start}");
        }
    }
    for garbage in [&b"\x00\x01\x02\r\n\r\n"[..], b"GET\r\n\r\n", &b"x".repeat(100_000)] {
        let mut control = Control::open(&agent.socket()).expect("the socket");
        let _ = control.send(garbage);
        // Refused, or just closed.
        if let Ok(answer) = control.answer() {
            assert!((400..500).contains(&answer.status), "{}", answer.status);
        }
    }
    pool.assert_where_they_were("after bad requests");
    assert_eq!(settled(&agent.status()), before, "after bad requests");
    thread::scope(|scope| {
        let socket = agent.socket();
        for _ in 0..100 {
            let socket = socket.clone();
            scope.spawn(move || trickle(&socket, 3));
        }
        for call in 0..20 {
            let called = Instant::now();
            let output = agent.cli(&["status"]);
            assert_eq!(output.code, 0, "beside a hundred slow clients: {output:?}");
            let took = called.elapsed();
            assert!(took < Duration::from_secs(2), "call {call} took {took:?}");
            pool.assert_where_they_were("beside a hundred slow clients");
        }
        assert_eq!(settled(&agent.status()), before, "beside a hundred slow clients");
        let share = agent.split(SHOP, "v2", "20%");
        assert_eq!(share.buckets_moved, 0);
    });
    pool.open.extend(bench.connect(Family::V6, 0..5).open);
    pool.assert_where_they_were("after slow clients");
    assert_eq!(settled(&agent.status()), before, "after slow clients");
}
