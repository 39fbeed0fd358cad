//! Hosts that lack what the agent needs: it makes do, or says what is missing and
//! leaves everything as it was.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use canary_agent::{api::model::ErrorBody, datapath};
use canary_tests::{
    agent::{Agent, AgentOptions, Output},
    client, host,
    lacking::{self, Mounts},
    server::ECHO_PORT,
    topology::Family,
};

use crate::support::{Bench, Way, finish};

/// How the daemon must end: exit code, word for programs, and what the message says.
type Ending<'a> = (i32, &'a str, &'a [&'a str]);

/// Where a BPF file system usually is.
const USUAL: &str = "/sys/fs/bpf";

/// A directory of pins there.
fn usual(agent: &Agent<'_>) -> PathBuf {
    Path::new(USUAL).join(agent.folder().file_name().expect("a name"))
}

fn bench() -> Bench {
    Bench::new(Way::NatTwoArmed, &[("stable", 2)])
}

/// An agent that is not started, with its pins at a place of the test's choice.
fn prepare<'a>(bench: &'a Bench, pins: impl Fn(&Agent<'a>) -> PathBuf) -> Agent<'a> {
    let options = AgentOptions::native(&bench.topology);
    let agent = Agent::prepare(&bench.topology.balancer, &options, &bench.services(""));
    let text = fs::read_to_string(agent.config()).expect("the configuration");
    let line = text.lines().find(|line| line.starts_with("bpffs = ")).expect("the key");
    let text = text.replace(line, &format!("bpffs = {:?}", pins(&agent)));
    fs::write(agent.config(), text).expect("the configuration");
    agent
}

fn usual_mounts() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    mounts.lines().filter(|line| line.contains(USUAL)).map(str::to_owned).collect()
}

/// Starts it on a host with a change, and asks the service from a few clients.
#[track_caller]
fn works(bench: &Bench, agent: &mut Agent<'_>, change: impl FnOnce(&mut Command)) {
    agent.run_with(change);
    agent.wait_ready();
    for family in Family::ALL {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        let from = |index| SocketAddr::new(family.client(index), 0);
        let names = bench
            .client()
            .run(|| (0..4).map(|index| client::tcp_name(from(index), to)).collect::<Vec<_>>());
        assert!(names.iter().all(Result::is_ok), "{names:?}");
    }
}

#[test]
fn a_missing_bpf_file_system_is_mounted() {
    if !host::ready("a_missing_bpf_file_system_is_mounted") {
        return;
    }
    let bench = bench();
    let mut agent = prepare(&bench, usual);
    let before = usual_mounts();
    works(&bench, &mut agent, |command| Mounts::default().without(USUAL).apply(command));
    let log = agent.log();
    assert!(log.contains("has been mounted") && log.contains(USUAL), "{log}");
    assert_eq!(usual_mounts(), before, "the host's own mounts");
}

#[test]
fn type_information_of_the_kernel_is_not_needed() {
    if !host::ready("type_information_of_the_kernel_is_not_needed") {
        return;
    }
    let bench = bench();
    let mut agent = prepare(&bench, |agent| agent.folder().join("bpffs/canary"));
    works(&bench, &mut agent, |command| Mounts::default().hidden("/sys/kernel/btf").apply(command));
}

/// Whoever may do anything but mount.
fn may_not_mount(command: &mut Command) {
    use std::os::unix::process::CommandExt as _;
    /// linux/capability.h
    const CAP_SYS_ADMIN: u64 = 21;
    // SAFETY: prctl is a plain system call; nothing is allocated.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// Runs the daemon, which must refuse with this code and these words, and nothing may
/// be left of it.
#[track_caller]
fn refused(
    bench: &Bench,
    what: &str,
    pins: impl Fn(&Agent<'_>) -> PathBuf,
    change: impl Fn(&Agent<'_>, &mut Command),
    (code, word, says): Ending<'_>,
) {
    let agent = prepare(bench, &pins);
    let left = |agent: &Agent<'_>| {
        let mut names = Vec::new();
        let mut folders = vec![agent.folder().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a folder").flatten() {
                let is_folder = entry.file_type().expect("a type").is_dir();
                names.push(entry.path());
                folders.extend(is_folder.then(|| entry.path()));
            }
        }
        names.sort();
        let on = ["eth0", "eth1"].map(|interface| {
            bench.topology.balancer.run(|| datapath::program_on(interface).expect("a link"))
        });
        (names, on, usual_mounts())
    };
    let before = left(&agent);
    let run = |args: &[&str]| -> Output {
        let mut command = agent.command(args);
        change(&agent, &mut command);
        finish(command)
    };
    let output = run(&["run"]);
    assert_eq!(output.code, code, "{what}: {output:?}");
    let said = says.iter().all(|one| output.stderr.contains(one));
    assert!(said, "{what}: should say {says:?}: {}", output.stderr);
    let json = run(&["--json", "run"]);
    let body: ErrorBody = json.json();
    assert_eq!((body.error.code.as_str(), json.code), (word, code), "{what}: {json:?}");
    assert!(body.error.help.is_some(), "{what}: {body:?}");
    let after = left(&agent);
    // The lock stays: whoever deletes one that another has just opened breaks it.
    let lock = [agent.folder().join("state"), agent.folder().join("state/agent.lock")];
    let names: Vec<_> = after.0.into_iter().filter(|path| !lock.contains(path)).collect();
    assert_eq!((names, after.1, after.2), before, "{what}");
}

#[test]
fn without_a_place_for_pins_it_says_how_to_make_one() {
    if !host::ready("without_a_place_for_pins_it_says_how_to_make_one") {
        return;
    }
    let bench = bench();
    let own = |agent: &Agent<'_>| agent.folder().join("bpffs/canary");
    let unchanged = |_: &Agent<'_>, _: &mut Command| {};
    let hint = "mount -t bpf bpf /sys/fs/bpf";
    refused(
        &bench,
        "a regular file",
        |agent| agent.config().join("pins"),
        unchanged,
        (1, "no_bpffs", &["agent.toml/pins", "is not a directory", hint, "agent.bpffs"]),
    );
    refused(
        &bench,
        "another file system",
        |agent| agent.folder().join("deep/pins"),
        unchanged,
        (1, "no_bpffs", &["deep/pins", "not on a BPF file system", hint, "agent.bpffs"]),
    );
    refused(
        &bench,
        "read-only",
        own,
        |agent, command| Mounts::default().read_only(agent.folder().join("bpffs")).apply(command),
        (1, "no_bpffs", &["bpffs/canary", "Read-only file system", hint]),
    );
    refused(
        &bench,
        "no mount point",
        usual,
        |_, command| Mounts::default().hidden("/sys").apply(command),
        (1, "no_bpffs", &[USUAL, "mounting", "ENOENT", hint]),
    );
    refused(
        &bench,
        "no right to mount",
        usual,
        |_, command| {
            Mounts::default().without(USUAL).apply(command);
            may_not_mount(command);
        },
        (77, "not_permitted", &[USUAL, "mounting", "EPERM", hint, "root"]),
    );
}

#[test]
fn an_old_kernel_is_refused_by_name() {
    if !host::ready("an_old_kernel_is_refused_by_name") {
        return;
    }
    let bench = bench();
    refused(
        &bench,
        "Linux 2.6",
        |agent| agent.folder().join("bpffs/canary"),
        |_, command| lacking::recent_kernel(command),
        (1, "old_kernel", &["this host runs Linux 2.6.", "6.1 or newer is needed"]),
    );
}

#[test]
fn a_map_that_the_kernel_refuses_is_named() {
    if !host::ready("a_map_that_the_kernel_refuses_is_named") {
        return;
    }
    let bench = bench();
    let release = nix::sys::utsname::uname().expect("uname");
    let release = format!("Linux {}", release.release().to_string_lossy());
    let rows: [(u32, i32, Ending<'_>); 2] = [
        (
            lacking::BPF_MAP_CREATE,
            libc::ENOMEM,
            (1, "refused_by_kernel", &[&release, "map `", "os error 12", "agent.capacity"]),
        ),
        (
            lacking::BPF_MAP_CREATE,
            libc::EPERM,
            (77, "not_permitted", &["map `", "os error 1", "CAP_BPF"]),
        ),
    ];
    for (number, errno, expected) in rows {
        refused(
            &bench,
            &format!("bpf({number}) fails with {errno}"),
            |agent| agent.folder().join("bpffs/canary"),
            |_, command| lacking::bpf_command(command, number, errno),
            expected,
        );
    }
}
