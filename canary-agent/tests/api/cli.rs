//! The commands as processes, against real sockets. The loop behind the sockets
//! is scripted (see `support`).

use std::{
    fs::{self, Permissions},
    io,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Output,
};

use canary_agent::{
    api::{Limits, audience::MembersReport},
    config::model::Operators,
};
use serde_json::Value;

use crate::{
    process::{ask, code, command, json_error, run, stderr, stdout},
    support::Agent,
};

#[tokio::test(flavor = "multi_thread")]
async fn status_is_a_table_or_json() {
    let agent = Agent::start(Limits::default()).await;
    let table = ask(&agent, &["status"]);
    assert_eq!(code(&table), 0, "{table:?}");
    let text = stdout(&table);
    for line in [
        "canary-agent 0.1.0, up 1h 2m, pid 4711, revision 7",
        "ALERT: eth1 does not exist: the other interfaces work",
        "shop  203.0.113.10 2001:db8::10  tcp/443 udp/443  nat, by client, 65536 buckets, 3277 tracked",
        "  VERSION                 ASKED  IN FORCE  MEASURED  BUCKETS  CONNECTIONS  WEIGHT  STATE",
        "  stable (control)          95%       95%       95%    62259          100",
        "    10.0.1.1:8443                                      62259          100       1  up",
        "    [2001:db8:1::1]:8443                                   0            0       1  no-next-hop: no neighbour answers on eth1",
        "  v2                         5%        5%        5%     3277          100",
        "INTERFACE  MODE",
        "eth1       not attached  does not exist",
        "bad_ip_length  drop           3",
        "FLOWS_V4    10    262144  24.0 MiB",
        "memory of all maps: 24.0 MiB",
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
    }

    let one = ask(&agent, &["status", "shop"]);
    assert!(stdout(&one).starts_with("shop  "), "{one:?}");
    assert!(!stdout(&one).contains("INTERFACE"));

    for arguments in [&["status", "--json"][..], &["--json", "status", "shop"]] {
        let json = ask(&agent, arguments);
        let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
        assert_eq!(value["services"][0]["versions"][1]["asked"], 0.05);
        assert_eq!(stdout(&json).lines().count(), 1);
    }

    let unknown = ask(&agent, &["status", "shpo"]);
    assert_eq!(code(&unknown), 1);
    assert_eq!(
        stderr(&unknown),
        "error: there is no service `shpo`\n  help: did you mean `shop`?\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn options_stand_before_or_after_the_command() {
    let agent = Agent::start(Limits::default()).await;
    let socket = agent.socket();
    let socket = socket.to_str().expect("text");
    for arguments in [
        ["--socket", socket, "--json", "status", "shop"],
        ["status", "shop", "--json", "--socket", socket],
        ["--json", "status", "--socket", socket, "shop"],
    ] {
        let output = run(&arguments);
        assert_eq!(code(&output), 0, "{output:?}");
        let value: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(value["services"][0]["name"], "shop");
    }
    let from_environment = command(&["status"]).env("CANARY_SOCKET", socket).output();
    assert_eq!(code(&from_environment.expect("started")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_says_where_the_socket_is() {
    let agent = Agent::start(Limits::default()).await;
    let config = agent.dir().join("agent.toml");
    let text = format!("[agent]\nsocket = {:?}\n", agent.socket());
    fs::write(&config, text).expect("written");
    let config = config.to_str().expect("text");
    assert_eq!(code(&run(&["status", "--config", config])), 0);
    let from_environment = command(&["status"]).env("CANARY_CONFIG", config).output();
    assert_eq!(code(&from_environment.expect("started")), 0);
    // The command line has the last word.
    let elsewhere = run(&["status", "--config", config, "--socket", "/nonexistent/s"]);
    assert_eq!(code(&elsewhere), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn backends_are_listed_and_told() {
    let agent = Agent::start(Limits::default()).await;
    let shown = ask(&agent, &["backend", "list", "shop"]);
    assert_eq!(code(&shown), 0, "{shown:?}");
    for line in [
        "VERSION                 WEIGHT  BUCKETS  LEAVING  OPEN  STATE                     HEALTH",
        "stable (control)                  62259      123    40  2 backends still drain",
        "  [2001:db8:1::1]:8443       1        0      123    17  drain                     \
         no-next-hop: no neighbour answers on eth1",
        "  10.0.1.9:8443              0        0        0    17  removed                   unknown",
        "  10.0.2.1:8443              1     3277        0    17  ready, slow start at 25%  up",
    ] {
        assert!(stdout(&shown).lines().any(|shown| shown == line), "{line}\n{}", stdout(&shown));
    }
    for arguments in [
        &["backend", "list", "shop", "--json"][..],
        &["backend", "list", "shop", "10.0.2.1", "--json"],
    ] {
        let json = ask(&agent, arguments);
        let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
        let versions = value["versions"].as_array().expect("versions");
        let last = versions.last().expect("a version");
        assert_eq!(last["backends"][0]["addr"], "10.0.2.1:8443");
        assert_eq!(last["backends"][0]["open_connections"], 17);
        assert_eq!(versions.len(), if arguments.len() == 4 { 2 } else { 1 });
    }
    let nobody = ask(&agent, &["backend", "list", "shop", "10.0.2.7"]);
    assert_eq!(code(&nobody), 1);
    assert!(stderr(&nobody).contains("`canary-agent backend list shop` lists them"), "{nobody:?}");

    let told = ask(&agent, &["backend", "drain", "shop", "10.0.1.1:8443", "--reason", "disk"]);
    assert_eq!(
        stdout(&told),
        "shop: 10.0.1.1:8443 was `ready` and is `drain`; 31130 buckets moved; in force after \
         2.15ms (revision 9)\n\
         backends touched: 10.0.1.1:8443, 10.0.1.2:8443\n\
         about 17 open connections on it\n\
         3.3 new connections a second in the buckets that move\n\
         note: its open connections stay\n"
    );
    let tried =
        ask(&agent, &["backend", "maint", "shop", "[2001:db8:1::1]:8443", "--dry-run", "--force"]);
    assert!(stdout(&tried).contains("and would be `maint`; 31130 buckets would move"), "{tried:?}");
    assert!(stdout(&tried).ends_with("nothing was changed (--dry-run)\n"), "{tried:?}");
    let ready = ask(&agent, &["backend", "ready", "shop", "10.0.1.1:8443", "--json"]);
    let value: Value = serde_json::from_slice(&ready.stdout).expect("JSON");
    assert_eq!((&value["backend"], &value["applied"]), (&"10.0.1.1:8443".into(), &true.into()));
    {
        let told = agent.told.lock().expect("not poisoned");
        let states: Vec<_> = told.iter().map(|(_, request, _)| request.state.as_str()).collect();
        assert_eq!(states, ["drain", "maint", "ready"]);
        assert_eq!(told[0].1.reason.as_deref(), Some("disk"));
        assert!(told[1].1.dry_run && told[1].1.force && !told[0].1.dry_run && !told[0].1.force);
    }
    let unknown = ask(&agent, &["backend", "drain", "shop", "10.9.9.9:1", "--json"]);
    assert_eq!(json_error(&unknown).error.code, "unknown_backend");
    for wrong in [&["backend"][..], &["backend", "drain", "shop"], &["backend", "off", "shop", "a"]]
    {
        assert_eq!(code(&ask(&agent, wrong)), 2, "{wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn split_shows_changes_and_tries() {
    let agent = Agent::start(Limits::default()).await;
    let shown = ask(&agent, &["split", "shop"]);
    assert!(stdout(&shown).contains("v2                   5%        5%"), "{shown:?}");
    let shown = ask(&agent, &["split", "shop", "--json"]);
    let value: Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    assert_eq!(value["control"], "stable");

    let changed = ask(&agent, &["split", "shop", "v2=10%", "--reason", "ticket 7"]);
    assert_eq!(code(&changed), 0, "{changed:?}");
    assert_eq!(
        stdout(&changed),
        "shop: 3277 buckets moved; in force after 2.15ms (revision 8)\n\
         \n\
         \x20 VERSION  ASKED  FROM   TO\n\
         \x20 stable     90%   95%  90%\n\
         \x20 v2         10%    5%  10%\n\
         \n\
         backends touched: 10.0.1.1:8443, 10.0.2.1:8443\n\
         about 41 open connections in these buckets\n\
         12.5 new connections a second in the buckets that move\n\
         note: the buckets have been moved\n"
    );
    let tried = ask(&agent, &["split", "shop", "v2=0", "--dry-run"]);
    assert!(stdout(&tried).starts_with("shop: 3277 buckets would move\n"), "{tried:?}");
    assert!(stdout(&tried).ends_with("nothing was changed (--dry-run)\n"));
    {
        let asked = agent.asked.lock().expect("not poisoned");
        let requests: Vec<_> = asked.iter().map(|(_, request, _)| request).collect();
        assert_eq!(requests[0].split["v2"], "10%");
        assert_eq!(requests[0].reason.as_deref(), Some("ticket 7"));
        assert_eq!(requests[1].split["v2"], "0%");
        assert!(requests[1].dry_run && !requests[0].dry_run);
    }

    let learned = ask(&agent, &["split", "shop", "v2=5%", "--learn", "--dry-run"]);
    assert!(stdout(&learned).contains("they would be watched for 7s before\n"), "{learned:?}");
    assert!(agent.asked.lock().expect("not poisoned")[2].1.learn);

    let refused = ask(&agent, &["split", "shop", "v9=10%", "--json"]);
    assert_eq!(json_error(&refused).error.code, "unknown_version");
    for wrong in [
        &["split", "shop", "v2=5"][..],
        &["split", "shop", "v2=5%", "v2=6%"],
        &["split", "shop", "--reason", "x"],
        &["split"],
    ] {
        let output = ask(&agent, wrong);
        assert_eq!(code(&output), 2, "{output:?}");
        assert!(!output.stderr.is_empty());
        assert_eq!(stdout(&output), "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn audiences_are_shown_and_a_client_is_tested() {
    let agent = Agent::start(Limits::default()).await;
    let output = ask(&agent, &["audience", "list"]);
    let told = stdout(&output);
    assert!(told.contains("staff") && told.contains("256"), "{told}");
    let output = ask(&agent, &["audience", "show", "staff"]);
    let told = stdout(&output);
    for words in ["1 network, 256 addresses", "such as: 198.51.100.0/24", "`split shop@staff …`"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
    let output = ask(&agent, &["audience", "test", "192.0.2.7"]);
    let told = stdout(&output);
    assert_eq!(told, "192.0.2.7 is in no audience\n  shop: the service's own split\n");
    let unknown = ask(&agent, &["audience", "show", "crew", "--json"]);
    assert_eq!(json_error(&unknown).error.code, "unknown_audience");
    assert_eq!(code(&ask(&agent, &["audience", "test", "somebody"])), 2);
    let added = ask(&agent, &["audience", "add", "beta", "192.0.2.7", "--for", "8h"]);
    assert_eq!(stdout(&added), "beta: 1 added, for 8h\n  20000 of at most 30000 members\n");
    let dir = tempfile::tempdir().expect("a directory");
    let list = dir.path().join("list");
    let each = (0..10_005).map(|n| format!("10.0.{}.{}\n", n >> 8, n & 255));
    fs::write(&list, each.collect::<String>()).expect("a file");
    let list = list.to_str().expect("a path");
    let removed = ask(&agent, &["audience", "remove", "beta", "--from", list, "--json"]);
    let report: MembersReport = serde_json::from_slice(&removed.stdout).expect("JSON");
    assert_eq!((report.removed, report.members), (10_005, 20_000), "in two requests");
    let wrong = ask(&agent, &["audience", "add", "beta", "10.0.0.1/8"]);
    assert_eq!(code(&wrong), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_speaks_in_sentences() {
    let agent = Agent::start(Limits::default()).await;
    let told = ask(&agent, &["explain", "shop", "--from", "192.0.2.7:40000"]);
    assert_eq!(code(&told), 0, "{told:?}");
    assert!(stdout(&told).starts_with(
        "A new tcp connection from 192.0.2.7:40000 to 203.0.113.10:443 goes to 10.0.2.1:8443, version v2 of shop.\n"
    ));
    let arguments = [
        "explain",
        "shop",
        "--from",
        "2001:db8::7",
        "--to",
        "[2001:db8::10]:443",
        "--protocol",
        "udp",
        "--json",
    ];
    let value: Value = serde_json::from_slice(&ask(&agent, &arguments).stdout).expect("JSON");
    assert_eq!(value["from"], "2001:db8::7");
    assert_eq!(value["to"], "[2001:db8::10]:443");
    assert_eq!(value["protocol"], "udp");
    for key in ["audience", "bucket", "version", "backend", "tracked"] {
        assert!(value.get(key).is_some(), "{key}");
    }
    let wrong = ask(&agent, &["explain", "shop", "--from", "nowhere"]);
    assert_eq!(code(&wrong), 2);
    let unknown = ask(&agent, &["explain", "nope", "--from", "192.0.2.7", "--json"]);
    assert_eq!(json_error(&unknown).error.code, "unknown_service");
}

#[test]
fn an_agent_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("agent.sock");
    let socket = socket.to_str().expect("text");
    let output = run(&["--socket", socket, "status"]);
    assert_eq!(code(&output), 5);
    let text = stderr(&output);
    assert!(text.contains(socket) && text.contains("canary-agent run"), "{text}");
    let output = run(&["--socket", socket, "split", "shop", "v2=5%", "--json"]);
    assert_eq!(json_error(&output).error.code, "unreachable");
    // One that was killed leaves its socket behind.
    drop(std::os::unix::net::UnixListener::bind(socket).expect("bound"));
    assert_eq!(code(&run(&["--socket", socket, "status"])), 5);
}

#[test]
fn usage_errors_are_json_too() {
    for arguments in [
        &["--json", "frobnicate"][..],
        &["status", "--json", "--nonsense"],
        &["--json"],
        &["explain", "shop", "--json"],
    ] {
        let output = run(arguments);
        let body = json_error(&output);
        assert_eq!(body.error.code, "usage", "{arguments:?}");
        assert_eq!(code(&output), 2, "{arguments:?}");
        assert!(!body.error.message.is_empty());
    }
    let plain = run(&["frobnicate"]);
    assert_eq!(code(&plain), 2);
    assert!(stderr(&plain).contains("frobnicate"));
    assert_eq!(code(&run(&["rollout"])), 2, "it is not there yet");
    assert_eq!(code(&run(&["--help"])), 0);
    assert_eq!(
        stdout(&run(&["--version"])),
        concat!("canary-agent ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn a_bad_configuration_is_78() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("agent.toml");
    fs::write(&config, "[agent]\nnonsense = 1\n").expect("written");
    let config = config.to_str().expect("text");
    let output = run(&["check", "--config", config]);
    assert_eq!(code(&output), 78);
    assert!(stderr(&output).contains(config), "{output:?}");
    let output = run(&["check", "--config", config, "--json"]);
    assert_eq!(code(&output), 78);
    let list: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let first = &list[0];
    assert_eq!(first["file"], config);
    assert!(first["line"].is_u64() && first["column"].is_u64() && first["message"].is_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn detach_refuses_while_the_daemon_runs() {
    if !is_root() {
        return;
    }
    let mut agent = Agent::start(Limits::default()).await;
    let config = agent.dir().join("agent.toml");
    let pins = agent.dir().join("bpf");
    fs::create_dir_all(pins.join("links")).expect("made");
    fs::write(pins.join("links/eth0"), "").expect("written");
    let text = format!("[agent]\nsocket = {:?}\nbpffs = {pins:?}\n", agent.socket());
    fs::write(&config, text).expect("written");
    let config = config.to_str().expect("text");
    let refused = run(&["detach", "--config", config, "--json"]);
    assert_eq!(json_error(&refused).error.code, "agent_running");
    let tried = run(&["detach", "--config", config, "--dry-run", "--json"]);
    let value: Value = serde_json::from_slice(&tried.stdout).expect("JSON");
    assert_eq!(value["applied"], false);
    assert_eq!(value["pins"][0], pins.join("links/eth0").to_str().expect("text"));
    agent.stop().await;
    fs::remove_dir_all(&pins).expect("removed");
    let nothing = run(&["detach", "--config", config]);
    assert_eq!(code(&nothing), 0, "{nothing:?}");
    assert!(stdout(&nothing).starts_with("nothing is pinned under "));
    // Where the pins are must not be guessed.
    fs::write(config, "[agent\n").expect("written");
    assert_eq!(code(&run(&["detach", "--config", config])), 78);
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "on CI these tests need root");
    if !root {
        eprintln!("not run: only root can act as other users");
    }
    root
}

/// A user without a name, and groups nobody has.
const SOMEBODY: u32 = 54_321;
const GROUP: u32 = 54_322;
const OTHER_GROUP: u32 = 54_323;

/// Runs a command as somebody else.
fn run_as(uid: u32, gid: u32, groups: &'static [u32], arguments: &[&str]) -> Output {
    let mut command = command(arguments);
    // SAFETY: between fork and exec only async-signal-safe system calls are made
    // (setgroups, setgid and setuid of libc act on this single thread's process),
    // and `groups` outlives the child's use of it.
    unsafe {
        command.pre_exec(move || {
            let done = libc::setgroups(groups.len(), groups.as_ptr()) == 0
                && libc::setgid(gid) == 0
                && libc::setuid(uid) == 0;
            if done { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
    }
    command.output().expect("started")
}

/// Gives the socket to a group, as a package's set-up would.
fn give(socket: &Path, group: u32) {
    std::os::unix::fs::chown(socket, None, Some(group)).expect("given");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_read_and_who_may_change() {
    if !is_root() {
        return;
    }
    let agent = Agent::start(Limits::default()).await;
    let path = agent.socket();
    let socket = path.to_str().expect("text").to_owned();
    let mode = fs::metadata(&path).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let status = ["--socket", &socket, "--json", "status"];
    let split = ["--socket", &socket, "--json", "split", "shop", "v2=10%"];

    // Outside the socket's group: not even reading.
    let stranger = run_as(SOMEBODY, SOMEBODY, &[], &status);
    let error = json_error(&stranger).error;
    assert_eq!((error.code.as_str(), error.exit_code), ("not_permitted", 77));
    assert!(error.message.contains(&socket), "{error:?}");

    // In it: reading, but no change.
    give(&path, GROUP);
    assert_eq!(code(&run_as(SOMEBODY, SOMEBODY, &[GROUP], &status)), 0);
    let error = json_error(&run_as(SOMEBODY, SOMEBODY, &[GROUP], &split)).error;
    assert_eq!((error.code.as_str(), error.exit_code), ("not_permitted", 77));
    assert!(error.message.contains(&SOMEBODY.to_string()), "{error:?}");
    assert!(error.help.expect("the next step").contains("agent.operators"));
    assert!(agent.asked.lock().expect("not poisoned").is_empty());

    // A reload names the uid, the group, or a group it is in besides its own.
    let operators = |uids: &[u32], gids: &[u32]| {
        let (uids, gids) = (uids.to_vec(), gids.to_vec());
        agent.operators.send_replace(Operators { uids, gids });
    };
    operators(&[SOMEBODY], &[]);
    assert_eq!(code(&run_as(SOMEBODY, SOMEBODY, &[GROUP], &split)), 0);
    operators(&[], &[OTHER_GROUP]);
    assert_eq!(code(&run_as(SOMEBODY, SOMEBODY, &[GROUP], &split)), 77);
    assert_eq!(code(&run_as(SOMEBODY, OTHER_GROUP, &[GROUP], &split)), 0);
    assert_eq!(code(&run_as(SOMEBODY, SOMEBODY, &[GROUP, OTHER_GROUP], &split)), 0);
    operators(&[], &[]);
    assert_eq!(code(&run_as(SOMEBODY, SOMEBODY, &[GROUP, OTHER_GROUP], &split)), 77);
    assert_eq!(code(&run_as(0, 0, &[], &split)), 0);
    let asked = agent.asked.lock().expect("not poisoned");
    let uids: Vec<u32> = asked.iter().map(|(_, _, peer)| peer.uid).collect();
    assert_eq!(uids, [SOMEBODY, SOMEBODY, SOMEBODY, 0]);

    // Nor may they detach.
    assert_eq!(code(&run_as(SOMEBODY, SOMEBODY, &[GROUP], &["detach"])), 77);
}

#[test]
fn every_shell_gets_its_completions() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = run(&["completions", shell]);
        assert_eq!(code(&output), 0);
        for word in ["explain", "--dry-run", "--socket"] {
            assert!(stdout(&output).contains(word.trim_start_matches('-')), "{shell}: {word}");
        }
    }
    assert_eq!(code(&run(&["completions", "tcsh"])), 2);
}

const COMMANDS: [&str; 23] = [
    "run",
    "check",
    "doctor",
    "diff",
    "reload",
    "replay",
    "status",
    "split",
    "backend",
    "undo",
    "panic",
    "plan",
    "rollout",
    "confirm",
    "freeze",
    "unfreeze",
    "events",
    "audience",
    "explain",
    "decap",
    "detach",
    "completions",
    "man",
];

/// Commands of commands, which have pages of their own too.
const BELOW: [&str; 18] = [
    "audience-add",
    "audience-list",
    "audience-remove",
    "audience-show",
    "audience-test",
    "backend-list",
    "backend-ready",
    "backend-drain",
    "backend-maint",
    "rollout-start",
    "rollout-status",
    "rollout-pause",
    "rollout-resume",
    "rollout-promote",
    "rollout-abort",
    "rollout-retry",
    "rollout-history",
    "rollout-plan",
];

#[test]
fn the_manual_mentions_every_command() {
    let page = run(&["man"]);
    assert_eq!(code(&page), 0);
    let dir = tempfile::tempdir().expect("a directory");
    let pages = dir.path().join("man1");
    let written = run(&["man", "--dir", pages.to_str().expect("text")]);
    assert_eq!(code(&written), 0, "{written:?}");
    assert!(pages.join("canary-agent.1").exists());
    let documented = include_str!("../../../docs/cli.md");
    let help = run(&["--help"]);
    for name in COMMANDS {
        assert!(stdout(&page).contains(&format!("canary\\-agent\\-{name}(1)")), "{name}");
        let own = fs::read_to_string(pages.join(format!("canary-agent-{name}.1")));
        assert!(own.expect("a page").contains(name), "{name}");
        assert!(documented.contains(&format!("## `{name}`")), "{name} is not in docs/cli.md");
        assert!(stdout(&help).contains(&format!("\n  {name} ")), "{name} is not in the help");
    }
    for name in BELOW {
        assert!(pages.join(format!("canary-agent-{name}.1")).exists(), "{name}");
    }
    let written = fs::read_dir(&pages).expect("pages").count();
    assert_eq!(written, COMMANDS.len() + BELOW.len() + 1);
    assert!(stdout(&page).contains("77 not permitted"), "exit codes are told");
}

#[test]
fn a_socket_nobody_may_open_is_77() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("opened");
    let closed = dir.path().join("run");
    fs::create_dir(&closed).expect("made");
    fs::set_permissions(&closed, Permissions::from_mode(0o700)).expect("closed");
    let socket = closed.join("agent.sock");
    let socket = socket.to_str().expect("text");
    let output = run_as(SOMEBODY, SOMEBODY, &[], &["--socket", socket, "status"]);
    assert_eq!(code(&output), 77, "{output:?}");
}
