//! The Debian package, in a Debian of its own under systemd: installed, configured, started,
//! reloaded, hung, stopped, upgraded, removed and purged while clients hold connections.
//!
//! `cargo xtask test` and `cargo xtask package --test` build the package and the Debian.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use canary_agent::api::model::Status;
use canary_tests::{
    agent::Output,
    client::Connection,
    host,
    machine::Machine,
    server::HTTP_PORT,
    topology::Family,
    unprivileged::{CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON},
    wait,
};

use crate::support::{Bench, Pool, SHOP, Way};

const UNIT: &str = "canary-agent.service";
const CONFIG: &str = "/etc/canary/agent.toml";

/// Changes to the unit: a hung agent is found out sooner.
const DROP_IN: (&str, &str) =
    ("/etc/systemd/system/canary-agent.service.d/test.conf", "[Service]\nWatchdogSec=6s\n");

/// Set by xtask.
const PACKAGE: &str = "CANARY_PACKAGE";
/// Set by xtask.
const DEBIAN: &str = "CANARY_DEBIAN";
/// Whether tests may take minutes.
const LONG: &str = "CANARY_LONG";

/// A balancer that is a Debian, with a package to install.
struct Host<'a> {
    bench: &'a Bench,
    machine: Machine,
    package: PathBuf,
}

/// Package and Debian, unless the test can't run here.
fn parts(test: &str) -> Option<(PathBuf, PathBuf)> {
    if !host::ready(test) {
        return None;
    }
    match (env::var_os(PACKAGE), env::var_os(DEBIAN)) {
        (Some(package), Some(debian)) => Some((package.into(), debian.into())),
        _ => {
            host::skip(test, "`cargo xtask test packaged` builds what it takes, on Debian");
            None
        }
    }
}

impl<'a> Host<'a> {
    fn boot(bench: &'a Bench, (package, debian): (PathBuf, PathBuf)) -> Self {
        let machine = Machine::boot(&bench.topology.balancer, &debian);
        machine.write(DROP_IN.0, DROP_IN.1);
        Self { bench, machine, package }
    }

    fn install(&self, package: &Path) -> Output {
        let bytes = fs::read(package).expect("the package");
        self.machine.write("/tmp/canary-agent.deb", bytes);
        let output = self.machine.run(&["dpkg", "--install", "/tmp/canary-agent.deb"]);
        assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
        output
    }

    /// The same package as another version, as the next release would be.
    fn next(&self, number: u32) -> PathBuf {
        let folder = tempfile::tempdir().expect("a folder");
        let tree = folder.path().join("tree");
        let package = self.machine.path(&format!("/tmp/next-{number}.deb"));
        let run = |command: &mut Command| {
            let output = command.output().expect("dpkg-deb");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        run(Command::new("dpkg-deb").arg("--raw-extract").arg(&self.package).arg(&tree));
        let control = tree.join("DEBIAN/control");
        let text = fs::read_to_string(&control).expect("its control file");
        let changed = |line: &str| match line.strip_prefix("Version: ") {
            Some(version) => format!("Version: {version}+next{number}\n"),
            None => format!("{line}\n"),
        };
        fs::write(&control, text.lines().map(changed).collect::<String>()).expect("written");
        run(Command::new("dpkg-deb").args(["-Znone", "--build"]).arg(&tree).arg(&package));
        package
    }

    fn configure(&self, services: &str) {
        let interfaces = self.bench.topology.interfaces();
        let text =
            format!("[agent]\ninterfaces = {interfaces:?}\nxdp_mode = \"native\"\n{services}");
        self.machine.write(CONFIG, text);
    }

    /// A property of the unit.
    fn property(&self, name: &str) -> String {
        let text = self.machine.ok(&["systemctl", "show", "--value", "--property", name, UNIT]);
        text.trim().to_owned()
    }

    /// The agent's process, as the machine numbers it; "0" for none.
    fn pid(&self) -> String {
        self.property("MainPID")
    }

    fn active(&self) -> String {
        self.property("ActiveState")
    }

    fn status(&self) -> Status {
        let text = self.machine.ok(&["canary-agent", "status", "--json"]);
        serde_json::from_str(&text).expect("a status")
    }

    /// Whether a program is on the first interface.
    fn attached(&self) -> bool {
        self.machine.ok(&["ip", "link", "show", "dev", "eth0"]).contains("xdp")
    }

    /// What the journal has of the unit, from these priorities on.
    fn journal(&self, priority: &str) -> String {
        let unit = format!("--unit={UNIT}");
        self.machine.ok(&["journalctl", "--no-pager", &unit, "--priority", priority])
    }

    fn connect(&self) -> Pool {
        let mut pool = self.bench.connect(Family::V4, 0..10);
        pool.open.extend(self.bench.connect(Family::V6, 0..10).open);
        pool
    }

    /// Runs something while held connections are asked all the time and new ones are made.
    fn under_traffic<T: Send>(
        &self,
        pool: &mut Pool,
        when: &str,
        work: impl FnOnce() -> T + Send,
    ) -> T {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let result = work();
                done.store(true, Ordering::SeqCst);
                result
            });
            let mut client = 1_000;
            while !done.load(Ordering::SeqCst) && !worker.is_finished() {
                pool.assert_where_they_were(when);
                for family in Family::ALL {
                    drop(self.bench.connect(family, client..client + 1));
                }
                client += 1;
            }
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Every restriction of the unit holds for the agent's process.
    #[track_caller]
    fn assert_restricted(&self) {
        let pid = self.pid();
        let read = |file: &str| self.machine.ok(&["cat", &format!("/proc/{pid}/{file}")]);
        let status = read("status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
        };
        let user = self.machine.ok(&["id", "--user", "canary"]);
        assert_eq!(field("Uid:").split_whitespace().next(), Some(user.trim()));
        let mask = [CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON, CAP_BPF];
        let mask = mask.iter().fold(0_u64, |mask, one| mask | 1 << one);
        for set in ["CapEff:", "CapPrm:", "CapBnd:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(mask), "{set}");
        }
        assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
        // It has mounts of its own, which it can't write to.
        let here = self.machine.ok(&["readlink", "/proc/1/ns/mnt"]);
        assert_ne!(self.machine.ok(&["readlink", &format!("/proc/{pid}/ns/mnt")]), here);
        for path in ["/usr/bin/x", "/etc/canary/x", "/var/x"] {
            let touch = ["nsenter", "--target", &pid, "--mount", "--", "touch", path];
            let output = self.machine.run(&touch);
            assert!(output.stderr.contains("Read-only file system"), "{path}: {output:?}");
        }
        let devices = ["nsenter", "--target", &pid, "--mount", "--", "ls", "/dev/shm", "/tmp"];
        assert_eq!(self.machine.ok(&devices).trim(), "/dev/shm:\n\n/tmp:");
        // The flow tables' thread could put itself behind the others.
        let nice = format!(
            "for task in /proc/{pid}/task/*; do if grep -qx flows $task/comm; then \
             sed 's/.*) //' $task/stat | cut -d ' ' -f 17; fi; done"
        );
        assert_eq!(self.machine.ok(&["sh", "-c", &nice]).trim(), "10");
        // systemd says what it leaves out of a unit.
        let journal = self.machine.ok(&["journalctl", "--no-pager", "_PID=1"]);
        let ignored = |line: &&str| line.contains(UNIT) && line.contains("gnoring");
        for line in journal.lines().filter(ignored) {
            assert!(line.contains("notify-reload"), "{line}");
        }
    }

    /// The file that the agent's process runs.
    fn program(&self) -> String {
        self.machine.ok(&["readlink", &format!("/proc/{}/exe", self.pid())]).trim().to_owned()
    }
}

/// A package that is installed and configured, with the agent started and connections held.
#[track_caller]
fn started<'a>(bench: &'a Bench, parts: (PathBuf, PathBuf), services: &str) -> (Host<'a>, Pool) {
    let host = Host::boot(bench, parts);
    let said = host.install(&host.package);
    assert!(said.stdout.contains("systemctl enable --now canary-agent"), "{said:?}");
    // It steers nothing, and is not started at the next boot either.
    assert_eq!((host.active(), host.attached()), ("inactive".to_owned(), false));
    assert_eq!(host.machine.run(&["systemctl", "is-enabled", UNIT]).stdout.trim(), "disabled");
    let checked = host.machine.run(&["canary-agent", "check"]);
    assert_eq!(checked.code, 0, "{checked:?}");
    host.configure(services);
    host.machine.ok(&["systemctl", "enable", "--now", UNIT]);
    // That has waited until traffic is steered.
    assert_eq!((host.active(), host.attached()), ("active".to_owned(), true));
    assert!(host.property("StatusText").starts_with("steering"), "{}", host.property("StatusText"));
    bench.wait_answered();
    let pool = host.connect();
    (host, pool)
}

#[test]
fn an_installed_agent_is_served_by_systemd_upgraded_removed_and_purged() {
    let name = "an_installed_agent_is_served_by_systemd_upgraded_removed_and_purged";
    let Some(parts) = parts(name) else { return };
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 1)]);
    let services = bench.services("drain = \"5m\"");
    let (host, mut pool) = started(&bench, parts, &services);
    let machine = &host.machine;
    host.assert_restricted();

    machine.ok(&["canary-agent", "split", SHOP, "v2=100%", "--reason", "a test"]);
    pool.assert_where_they_were("after a split");
    pool.open.extend(bench.connect(Family::V4, 20..30).open);

    reloads(&host, &mut pool, &services);
    watchdog(&host, &mut pool);

    machine.ok(&["systemctl", "stop", UNIT]);
    assert_eq!((host.active(), host.attached()), ("inactive".to_owned(), true));
    // Nothing about that is worth a warning.
    let warnings = host.journal("warning");
    assert!(!warnings.contains("any more"), "{warnings}");
    pool.assert_where_they_were("with the agent stopped");
    drop(host.connect());
    host.under_traffic(&mut pool, "while it starts", || machine.ok(&["systemctl", "start", UNIT]));

    upgrades(&host, &mut pool, &services);

    let asked = host.status().services[0].versions[1].asked;
    assert!((asked - 1.0).abs() < 1e-9, "the split has been kept: {asked}");
    pool.assert_where_they_were("before the removal");
    removes(&host);
}

/// `systemctl reload` does it, or fails and says why.
fn reloads(host: &Host<'_>, pool: &mut Pool, services: &str) {
    let machine = &host.machine;
    let version = machine.ok(&["systemctl", "--version"]);
    let version: u32 = version.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    let expected = if version >= 253 { "notify-reload" } else { "notify" };
    assert_eq!(host.property("Type"), expected);

    host.configure(&host.bench.service(SHOP, HTTP_PORT, &["tcp"], "drain = \"7m\""));
    machine.ok(&["systemctl", "reload", UNIT]);
    assert_eq!(host.property("StatusText"), "steering 1 service");
    assert_eq!(host.status().services.len(), 1);
    pool.assert_where_they_were("after a reload");
    let pid = host.pid();

    machine.write(CONFIG, "nonsense");
    let refused = machine.run(&["systemctl", "reload", UNIT]);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(host.property("StatusText").starts_with("the last reload was refused"));
    assert_eq!((host.active(), host.pid()), ("active".to_owned(), pid));
    pool.assert_where_they_were("after a reload that was refused");
    // Levels are the journal's priorities.
    assert!(host.journal("warning").contains("agent.toml"), "{}", host.journal("info"));
    assert!(!host.journal("warning").contains("the data plane is open"));
    assert!(host.journal("info").contains("the data plane is open"));
    host.configure(services);
    machine.ok(&["systemctl", "reload", UNIT]);
}

/// An agent that hangs is ended, and another one goes on.
fn watchdog(host: &Host<'_>, pool: &mut Pool) {
    let hung = host.pid();
    host.machine.ok(&["systemctl", "kill", "--signal=SIGSTOP", UNIT]);
    wait::until_within(wait::patience() * 6, "another agent", || {
        pool.assert_where_they_were("while the agent hangs");
        let (pid, state) = (host.pid(), host.active());
        let another = pid != hung && pid != "0" && state == "active";
        another.then_some(()).ok_or_else(|| format!("{pid} is {state}"))
    });
    assert!(host.journal("info").contains("Watchdog timeout"), "{}", host.journal("info"));
    pool.assert_where_they_were("after another start");
}

/// The package gives way to another under traffic.
fn upgrades(host: &Host<'_>, pool: &mut Pool, services: &str) {
    let times = if env::var_os(LONG).is_some() { 20 } else { 1 };
    for number in 1..=times {
        let (next, before) = (host.next(number), host.pid());
        host.under_traffic(pool, "during an upgrade", || host.install(&next));
        assert_ne!(host.pid(), before, "the new one runs");
        assert_eq!(
            (host.active().as_str(), host.program().as_str()),
            ("active", "/usr/bin/canary-agent")
        );
    }
    let version =
        host.machine.ok(&["dpkg-query", "--show", "--showformat=${Version}", "canary-agent"]);
    assert!(version.ends_with(&format!("+next{times}")), "{version}");
    host.assert_restricted();

    // An agent that would not start does not take the place of one that runs.
    let pid = host.pid();
    host.machine.write(CONFIG, "nonsense");
    let said = host.install(&host.next(times + 1));
    assert!(said.stderr.contains("does not accept the configuration"), "{said:?}");
    assert_eq!((host.active(), host.pid()), ("active".to_owned(), pid));
    assert!(host.program().ends_with("(deleted)"), "{}", host.program());
    pool.assert_where_they_were("after an upgrade with a bad configuration");
    host.configure(services);
    host.under_traffic(pool, "during a restart", || {
        host.machine.ok(&["systemctl", "restart", UNIT])
    });
}

/// Without the package nothing steers; purged, its state is gone too.
fn removes(host: &Host<'_>) {
    let machine = &host.machine;
    let exists = |path: &str| machine.path(path).exists();
    let user = machine.ok(&["id", "--user", "canary"]);
    machine.ok(&["dpkg", "--remove", "canary-agent"]);
    assert!(!host.attached(), "traffic is not steered any more");
    let to = (Family::V4.vip(), HTTP_PORT).into();
    let source = Family::V4.client(0);
    let open = host.bench.client().run(|| Connection::open_here(source, to).is_ok());
    assert!(!open, "nobody has the VIP");
    assert!(!exists("/usr/bin/canary-agent") && !exists("/sys/fs/bpf/canary"));
    assert!(exists(CONFIG) && exists("/var/lib/canary/state.db"), "these are for a purge");

    // What comes back is as it was configured.
    let said = host.install(&host.package);
    assert_eq!(host.active(), "inactive", "{said:?}");
    assert_eq!(machine.run(&["systemctl", "is-enabled", UNIT]).stdout.trim(), "enabled");
    machine.ok(&["canary-agent", "check"]);

    machine.ok(&["dpkg", "--purge", "canary-agent"]);
    for path in
        [CONFIG, "/etc/canary/conf.d", "/var/lib/canary", "/run/canary", "/usr/bin/canary-agent"]
    {
        assert!(!exists(path), "{path}");
    }
    let left = machine.ok(&["find", "/etc/systemd/system", "-name", "canary-agent.service"]);
    assert_eq!(left, "");
    assert_eq!(machine.ok(&["id", "--user", "canary"]), user, "its number may be that of files");
}

#[test]
fn an_installed_agent_steers_in_dsr_under_every_restriction_of_its_unit() {
    let name = "an_installed_agent_steers_in_dsr_under_every_restriction_of_its_unit";
    let Some(parts) = parts(name) else { return };
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 1)]);
    let health = "health = { type = \"tcp\", interval = \"200ms\", via = \"vip\" }";
    let services = bench.service_with(&Family::ALL, SHOP, HTTP_PORT, &["tcp"], health);
    let (host, mut pool) = started(&bench, parts, &services);
    host.assert_restricted();
    host.machine.ok(&["canary-agent", "split", SHOP, "v2=50%"]);
    wait::until("checks", || {
        let status = host.status();
        let mut all = status.services[0].versions.iter().flat_map(|v| &v.backends);
        let passed = all.all(|b| b.check.as_ref().is_some_and(|check| check.passes > 0));
        passed.then_some(()).ok_or_else(|| format!("{status:#?}"))
    });
    assert_eq!(host.status().alerts, Vec::<String>::new());
    pool.assert_where_they_were("after a split");

    // What is not detached by its owner stays: here somebody has started an agent by hand.
    let machine = &host.machine;
    machine.ok(&["systemctl", "stop", UNIT]);
    machine.ok(&["systemd-run", "--unit=by-hand", "--property=Type=notify", "canary-agent", "run"]);
    let kept = machine.run(&["dpkg", "--remove", "canary-agent"]);
    assert_ne!(kept.code, 0, "{kept:?}");
    assert!(kept.stderr.contains("the agent is running"), "{kept:?}");
    pool.assert_where_they_were("after a removal that was refused");
    machine.ok(&["systemctl", "stop", "by-hand"]);
    machine.ok(&["dpkg", "--purge", "canary-agent"]);
    assert!(!host.attached() && !machine.path("/var/lib/canary").exists());
}

#[test]
fn what_is_packaged_steers_nothing_where_it_is_started_unconfigured() {
    let name = "what_is_packaged_steers_nothing_where_it_is_started_unconfigured";
    let Some(parts) = parts(name) else { return };
    let bench = Bench::new(Way::Dsr, &[("stable", 1)]);
    let host = Host::boot(&bench, parts);
    host.install(&host.package);
    // Ready means that all is steered that is configured: nothing.
    host.machine.ok(&["systemctl", "start", UNIT]);
    assert_eq!(host.property("StatusText"), "steering 0 services");
    assert!(!host.attached());
    // Shell completions and manual pages of every command are where they are looked for.
    let files = host.machine.ok(&["dpkg", "--listfiles", "canary-agent"]);
    for file in [
        "/usr/share/bash-completion/completions/canary-agent",
        "/usr/share/fish/vendor_completions.d/canary-agent.fish",
        "/usr/share/zsh/vendor-completions/_canary-agent",
        "/usr/share/man/man1/canary-agent.1.gz",
        "/usr/share/man/man1/canary-agent-split.1.gz",
        "/usr/share/man/man1/canary-agent-backend-drain.1.gz",
    ] {
        assert!(files.lines().any(|line| line == file), "{file} is not among {files}");
    }
    let verified = host.machine.run(&["systemd-analyze", "verify", "--man=no", UNIT]);
    let said = verified.stdout + &verified.stderr;
    // What systemd before 253 does not know.
    assert!(said.lines().all(|line| line.contains("notify-reload")), "{said}");
    // A reload takes it from there.
    let service = bench.service(SHOP, HTTP_PORT, &["tcp"], "");
    host.machine.write(CONFIG, format!("[agent]\ninterfaces = [\"eth0\"]\n{service}"));
    host.machine.ok(&["systemctl", "reload", UNIT]);
    assert!(host.attached());
    bench.wait_answered();
    host.machine.ok(&["dpkg", "--purge", "canary-agent"]);
    assert!(!host.attached());
}
