//! Rollouts with real servers, connections, hooks, commands and a real Prometheus: the healthy
//! one reaches 100 %, the failing one is gone again, and nobody's connection notices.

use std::{
    env, fs,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use canary_agent::{
    api::rollout::{RolloutHistory, RolloutReport, RolloutStatus, Rollouts},
    failpoint::{self, Failpoint},
    rollout::outlook::Outlook,
};
use canary_tests::{
    agent::{Agent, AgentOptions, Output},
    caller::Called,
    host,
    lacking::Mounts,
    netns::Namespace,
    spawn,
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, Pool, SHOP, Way, version};

const NAME: &str = "shop-v2";

/// Room for the state: a few changes, with owners that do not repeat.
const ROOM: u64 = 640 * 1024;

/// A gate that goes by `signals`, and a rollout of `steps`.
fn rollout(signals: &str, steps: &str, keys: &str) -> String {
    format!(
        "[[gate]]\nname = \"asked\"\nmin_duration = \"1s\"\ndeadline = \"2m\"\nsignals = [{signals}]\n\
         [[rollout]]\nname = {NAME:?}\nservice = {SHOP:?}\nto = \"v2\"\nsteps = [{steps}]\n{keys}\n"
    )
}

const STEPS: &str = "{ split = \"5%\", hold = \"1s\" }, { split = \"50%\", gate = \"asked\" }, { split = \"100%\" }";

/// How often is asked, so that a test is over soon.
const PACE: &str = "interval = \"200ms\", timeout = \"1s\", retries = 0, rise = 3, fall = 3";

#[track_caller]
fn state(agent: &Agent<'_>) -> RolloutStatus {
    agent.json::<Rollouts>(&["rollout", "status", NAME]).rollouts.remove(0)
}

#[track_caller]
fn start(agent: &Agent<'_>) -> RolloutStatus {
    agent.json::<RolloutReport>(&["rollout", "start", NAME, "--reason", "a test"]).rollout
}

#[track_caller]
fn wait_for(
    agent: &Agent<'_>,
    what: &str,
    holds: impl Fn(&RolloutStatus) -> bool,
) -> RolloutStatus {
    wait::until_within(wait::patience() * 3, what, || {
        let status = state(agent);
        if holds(&status) { Ok(status) } else { Err(format!("{status:?}")) }
    })
}

/// Waits for the end, as a script does.
#[track_caller]
fn ends(agent: &Agent<'_>) -> Output {
    agent.cli(&["rollout", "status", NAME, "--wait", "2m", "--json"])
}

#[track_caller]
fn share(agent: &Agent<'_>) -> String {
    version(&agent.status(), SHOP, "v2").asked_text.clone()
}

/// Connections that are open on both versions, of both families.
#[track_caller]
fn open(bench: &Bench, clients: std::ops::Range<u32>) -> Pool {
    let mut pool = bench.connect(Family::V4, clients.clone());
    pool.open.extend(bench.connect(Family::V6, clients).open);
    pool
}

#[test]
fn a_healthy_release_reaches_all_and_a_bad_one_none() {
    let test = "a_healthy_release_reaches_all_and_a_bad_one_none";
    if !host::ready(test) {
        return;
    }
    for way in [Way::NatTwoArmed, Way::Dsr] {
        let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
        let judge = Called::start(&bench.topology.balancer, 200);
        let hook = Called::start(&bench.topology.balancer, 200);
        let signals = format!("{{ webhook = \"{}/judge\", {PACE} }}", judge.url());
        let hooks = format!(
            "hooks = {{ confirm = \"{0}/ok\", event = \"{0}/events\", secret = \"0123456789abcdef\" }}",
            hook.url()
        );
        let services = bench.services("") + &rollout(&signals, STEPS, &hooks);
        let agent =
            Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
        bench.wait_answered();
        let mut pool = open(&bench, 0..20);
        start(&agent);
        let output = ends(&agent);
        assert_eq!(output.code, 0, "{output:?}");
        assert_eq!(output.json::<RolloutStatus>().state, "completed");
        assert_eq!(share(&agent), "100%");
        let new = open(&bench, 1_000..1_010);
        assert!(new.open.iter().all(|(_, name)| name.starts_with("v2")), "{way:?}");
        pool.open.extend(new.open);
        pool.assert_where_they_were("completed");
        wait::until("the hook's news", || {
            let calls = hook.calls();
            let told = |event: &str| {
                calls.iter().any(|c| c.body.contains(&format!("\"event\":\"{event}\"")))
            };
            match ["started", "step", "completed"].iter().find(|event| !told(event)) {
                Some(event) => Err(format!("{event} in {calls:?}")),
                None => Ok(()),
            }
        });
        let calls = hook.calls();
        assert_eq!(calls.iter().filter(|call| call.path == "/ok").count(), 3, "{calls:?}");
        let signed = |call: &canary_tests::caller::Call| {
            call.field("x-canary-signature").is_some_and(|sign| sign.starts_with("sha256="))
        };
        assert!(calls.iter().all(signed), "{calls:?}");

        // The next one is bad.
        agent.split(SHOP, "v2", "0");
        judge.answer(417);
        start(&agent);
        wait_for(&agent, "the bad half", |status| status.share.as_deref() == Some("50%"));
        pool.open.extend(open(&bench, 2_000..2_020).open);
        let output = ends(&agent);
        assert_eq!(output.code, 3, "{output:?}");
        let why = output.json::<RolloutStatus>().reason.expect("a reason");
        assert!(why.contains("status 417") || share(&agent) == "0%", "{why}");
        assert_eq!(share(&agent), "0%");
        let new = open(&bench, 3_000..3_010);
        assert!(new.open.iter().all(|(_, name)| name.starts_with("stable")), "{way:?}");
        pool.assert_where_they_were("aborted");
        let history: RolloutHistory = agent.json(&["rollout", "history", NAME, "--evidence"]);
        let runs: Vec<&str> = history.runs.iter().map(|run| run.state.as_str()).collect();
        assert_eq!(runs, ["aborted", "completed"]);
        assert!(history.runs[0].evidence.len() >= 3, "{history:?}");
    }
}

/// A program for a gate: what it exits with stands in a file.
fn program(folder: &Path) -> (PathBuf, PathBuf) {
    let (program, code) = (folder.join("judge"), folder.join("code"));
    let text = format!(
        "#!/bin/sh\n[ \"$CANARY_VERSION\" = v2 ] || exit 75\nexit $(cat {})\n",
        code.display()
    );
    fs::write(&program, text).expect("a program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a program");
    fs::write(&code, "75").expect("a code");
    (program, code)
}

#[test]
fn a_command_that_says_nothing_is_waited_for_and_one_that_fails_aborts() {
    let test = "a_command_that_says_nothing_is_waited_for_and_one_that_fails_aborts";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 1), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, "");
    let (program, code) = program(agent.folder());
    let signals = format!("{{ command = [{program:?}], {PACE} }}");
    agent.configure(&options, &(bench.services("") + &rollout(&signals, STEPS, "")));
    agent.run();
    agent.wait_ready();
    start(&agent);
    let probe = |status: &RolloutStatus| status.gate.as_ref().map(|gate| gate.probes[0].clone());
    let unanswered = |status: &RolloutStatus| probe(status).is_some_and(|one| one.unanswered >= 3);
    let waits = wait_for(&agent, "no answers", unanswered);
    assert_eq!((waits.state.as_str(), waits.step), ("watching", Some(2)));
    fs::write(&code, "1").expect("a code");
    let output = ends(&agent);
    assert_eq!(output.code, 3, "{output:?}");
    assert_eq!(share(&agent), "0%");
    fs::write(&code, "0").expect("a code");
    assert_eq!(agent.cli(&["rollout", "retry", NAME, "--wait", "2m"]).code, 0);
    assert_eq!(share(&agent), "100%");
}

/// A Prometheus that scrapes the agent; killed on drop.
struct Prometheus {
    child: Child,
    _folder: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn prometheus(program: &Path, namespace: &Namespace, scrapes: &str) -> Prometheus {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("prometheus.yml");
    fs::write(
        &file,
        format!(
            "global: {{ scrape_interval: 200ms }}\nscrape_configs:\n  - job_name: canary\n    \
             static_configs: [{{ targets: ['{scrapes}'] }}]\n"
        ),
    )
    .expect("a file");
    let mut command = namespace.command(program);
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
        .arg("--web.listen-address=127.0.0.1:19090")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = spawn::spawn(command).unwrap_or_else(|error| panic!("prometheus: {error}"));
    Prometheus { child, _folder: folder }
}

#[test]
fn a_real_prometheus_is_asked() {
    let test = "a_real_prometheus_is_asked";
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join("prometheus")).find(|p| p.is_file());
    let Some(program) = found else {
        println!(
            "{test}: left out: there is no prometheus (apt-get install --no-install-recommends prometheus)"
        );
        return;
    };
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 1), ("v2", 1)]);
    let mut options = AgentOptions::native(&bench.topology);
    options.listen = "127.0.0.1:19109".to_owned();
    // What the agent itself says of its share, by way of Prometheus: over a half is bad.
    let asks = |query: &str| {
        format!(
            "{{ prometheus = \"http://127.0.0.1:19090\", query = {query:?}, above = 0.6, {PACE} }}"
        )
    };
    let share_of = "canary_version_share_asked_ratio{service=\"shop\",version=\"v2\"}";
    let steps = "{ split = \"50%\", gate = \"asked\" }, { split = \"80%\", gate = \"asked\" }";
    let services = bench.services("") + &rollout(&asks(share_of), steps, "");
    let agent = Agent::start(&bench.topology, &options, &services);
    // It is not there yet: nothing is known of the canary.
    start(&agent);
    let silent = |status: &RolloutStatus| {
        status.gate.as_ref().is_some_and(|gate| gate.probes[0].unanswered >= 2)
    };
    let waits = wait_for(&agent, "no answers", silent);
    assert_eq!(waits.state, "watching");
    let _prometheus = prometheus(&program, &bench.topology.balancer, "127.0.0.1:19109");
    wait_for(&agent, "the second step", |status| status.step == Some(2));
    let output = ends(&agent);
    assert_eq!(output.code, 3, "{output:?}");
    let why = output.json::<RolloutStatus>().reason.expect("a reason");
    assert!(why.contains("0.8, above 0.6"), "{why}");
    assert_eq!(share(&agent), "0%");
}

#[test]
fn nothing_is_in_the_way_of_an_abort() {
    let test = "nothing_is_in_the_way_of_an_abort";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 2), ("v3", 1)]);
    // Whoever is called never answers.
    let silent = Called::start(&bench.topology.balancer, 0);
    let judge = Called::start(&bench.topology.balancer, 200);
    let signals = format!("{{ webhook = \"{}/judge\", {PACE} }}", judge.url());
    let hooks = format!("hooks = {{ event = \"{}/events\", timeout = \"1m\" }}", silent.url());
    let steps = "{ split = \"50%\", gate = \"asked\", hold = \"1h\" }, { split = \"90%\" }";
    let services = bench.services("") + &rollout(&signals, steps, &hooks);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let folder = agent.folder().join("state");
    fs::create_dir_all(&folder).expect("a folder");
    agent.run_with(|command| Mounts::default().small(&folder, ROOM).apply(command));
    agent.wait_ready();
    bench.wait_answered();
    // Somebody else has a share, too, and keeps it.
    agent.split(SHOP, "v3", "10%");
    start(&agent);
    wait_for(&agent, "the first step", |status| status.share.as_deref() == Some("50%"));
    let mut pool = open(&bench, 0..20);
    // The disk is full from now on.
    let pid = agent.pid().expect("it runs");
    let inside = PathBuf::from(format!("/proc/{pid}/root{}", folder.display()));
    let filler = inside.join("filler");
    let full = fs::write(&filler, vec![1; ROOM as usize]).expect_err("it is full then");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    judge.answer(417);
    let begun = Instant::now();
    let output = ends(&agent);
    assert_eq!(output.code, 3, "{output:?}");
    let took = agent.gave_back_within().expect("a time");
    println!(
        "{test}: the third bad answer came {:.2?} after the first could, and the share was back {took:.1?} later",
        begun.elapsed()
    );
    // Unoptimised builds promise nothing.
    assert!(cfg!(debug_assertions) || took < Duration::from_millis(100), "{took:?}");
    assert_eq!(share(&agent), "0%");
    pool.assert_where_they_were("aborted");
    let new = open(&bench, 1_000..1_010);
    assert!(new.open.iter().all(|(_, name)| !name.starts_with("v2")));
    // The next agent finds the state as it was stored last, and room for more.
    let files: Vec<_> =
        fs::read_dir(&inside).expect("a folder").map(|e| e.expect("a file")).collect();
    for file in files.iter().filter(|file| file.file_name() != "filler") {
        fs::copy(file.path(), folder.join(file.file_name())).expect("a copy");
    }
    agent.stop(Signal::SIGKILL);
    pool.assert_where_they_were("killed");
    agent.run();
    agent.wait_ready();
    assert_eq!(share(&agent), "0%", "{}", agent.log());
    assert_eq!(version(&agent.status(), SHOP, "v3").asked_text, "10%");
    let ended = state(&agent);
    assert_eq!(ended.state, "aborted", "{ended:?}");
    pool.assert_where_they_were("started again");
}

#[test]
fn an_agent_that_has_just_begun_goes_on_and_aborts_with_everybody_silent() {
    let test = "an_agent_that_has_just_begun_goes_on_and_aborts_with_everybody_silent";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 1), ("v2", 1)]);
    // Prometheus takes questions and answers none, and so does the hook; the command hangs.
    let silent = Called::start(&bench.topology.balancer, 0);
    let pace = "interval = \"200ms\", timeout = \"1m\"";
    let signals = format!(
        "{{ prometheus = {0:?}, query = \"up\", above = 1, {pace} }}, {{ command = [\"/bin/sleep\", \"600\"], {pace} }}",
        silent.url()
    );
    let hooks = format!("hooks = {{ event = \"{}/events\", timeout = \"1m\" }}", silent.url());
    let steps = "{ split = \"50%\", gate = \"asked\" }, { split = \"100%\" }";
    let services = bench.services("") + &rollout(&signals, steps, &hooks);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::start(&bench.topology, &options, &services);
    bench.wait_answered();
    start(&agent);
    wait_for(&agent, "the first step", |status| status.share.as_deref() == Some("50%"));
    let mut pool = open(&bench, 0..10);
    // By a kill, by another build, and both ways once more.
    for (round, (signal, build)) in
        [(Signal::SIGKILL, "canary-agent"), (Signal::SIGTERM, "canary-agent-next")]
            .into_iter()
            .enumerate()
    {
        agent.stop(signal);
        agent.upgrade(build);
        agent.run();
        agent.wait_ready();
        let stands = state(&agent);
        assert_eq!((stands.state.as_str(), stands.run), ("watching", Some(1)), "{stands:?}");
        pool.assert_where_they_were(build);
        pool.open.extend(open(&bench, 100 * (round as u32 + 1)..100 * (round as u32 + 1) + 5).open);
    }
    let begun = Instant::now();
    assert_eq!(agent.cli(&["rollout", "abort", NAME]).code, 0);
    let took = begun.elapsed();
    println!("{test}: aborted after {took:.2?}, the command's own time included");
    // Unoptimised builds promise nothing.
    assert!(cfg!(debug_assertions) || took < Duration::from_millis(500), "{took:?}");
    assert_eq!(share(&agent), "0%");
    assert_eq!(ends(&agent).code, 3);
    pool.assert_where_they_were("aborted");
}

#[test]
fn a_kill_in_the_middle_of_each_step_is_gone_on_from() {
    let test = "a_kill_in_the_middle_of_each_step_is_gone_on_from";
    if !host::ready(test) {
        return;
    }
    let points = [
        Failpoint::BeforeStore,
        Failpoint::BeforeCommit,
        Failpoint::Committed,
        Failpoint::BeforePlan,
        Failpoint::BeforeMaps,
        Failpoint::TableHalfWritten,
        Failpoint::InForce,
        Failpoint::RolloutWritten,
    ];
    let bench = Bench::new(Way::NatTwoArmed, &[("stable", 2), ("v2", 2)]);
    let shares: Vec<String> = (1..=points.len()).map(|n| format!("{}%", n * 10)).collect();
    let steps: Vec<String> =
        shares.iter().map(|share| format!("{{ split = {share:?}, pause = true }}")).collect();
    let services = bench.services("")
        + &rollout(
            "{ command = [\"/bin/true\"] }",
            &format!("{}, {{ split = \"100%\" }}", steps.join(", ")),
            "",
        );
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services);
    let choice = agent.folder().join("failpoint");
    let run = |agent: &mut Agent<'_>| {
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
    };
    run(&mut agent);
    agent.wait_ready();
    bench.wait_answered();
    start(&agent);
    let mut pool = Pool::default();
    for (at, point) in points.iter().enumerate() {
        let when = format!("{test}, {}", point.name());
        wait_for(&agent, &when, |status| {
            status.share.as_deref() == Some(&*shares[at]) && status.needs_operator
        });
        let clients = 100 * (at as u32 + 1);
        pool.open.extend(open(&bench, clients..clients + 5).open);
        // It dies while it sets the next share.
        fs::write(&choice, point.name()).expect("a choice");
        let _ = agent.cli(&["rollout", "resume", NAME]);
        wait::until("the end of the agent", || agent.ended().ok_or_else(|| "it runs".to_owned()));
        assert_eq!(agent.stop(Signal::SIGTERM).signal(), Some(9), "{when}");
        fs::remove_file(&choice).expect("a choice");
        pool.assert_where_they_were(&when);
        run(&mut agent);
        agent.wait_ready();
        // What it was told may have got lost with it: then it is told again.
        let next = shares.get(at + 1).cloned().unwrap_or_else(|| "100%".to_owned());
        wait::until_within(wait::patience() * 3, &when, || {
            let status = state(&agent);
            if status.share.as_deref() == Some(&*next) {
                return Ok(());
            }
            if status.needs_operator && status.share.as_deref() == Some(&*shares[at]) {
                let _ = agent.cli(&["rollout", "resume", NAME]);
            }
            thread::sleep(Duration::from_millis(50));
            Err(format!("{status:?}"))
        });
        pool.assert_where_they_were(&format!("{when}, started again"));
    }
    assert_eq!(ends(&agent).code, 0);
    assert_eq!(share(&agent), "100%");
    pool.assert_where_they_were("completed");
}

#[test]
fn an_operator_is_waited_for_and_may_send_it_on() {
    let test = "an_operator_is_waited_for_and_may_send_it_on";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1), ("v2", 1)]);
    let steps = "{ split = \"5%\", hold = \"1h\" }, { split = \"50%\", pause = true }, { split = \"100%\" }";
    let services = bench.services("") + &rollout("{ command = [\"/bin/true\"] }", steps, "");
    let agent = Agent::start(&bench.topology, &AgentOptions::native(&bench.topology), &services);
    let outlook: Outlook = agent.json(&["plan", NAME]);
    assert_eq!(outlook.steps, []);
    assert!(outlook.warnings[0].starts_with("no step has a gate"), "{outlook:?}");
    start(&agent);
    wait_for(&agent, "the first step", |status| status.share.as_deref() == Some("5%"));
    // A script that waits is told that somebody is needed.
    assert_eq!(agent.cli(&["rollout", "pause", NAME]).code, 0);
    assert_eq!(ends(&agent).code, 4);
    assert_eq!(agent.cli(&["rollout", "resume", NAME]).code, 0);
    assert_eq!(agent.cli(&["rollout", "promote", NAME]).code, 0);
    wait_for(&agent, "the pause", |status| status.needs_operator && status.step == Some(2));
    agent.split(SHOP, "v2", "7%");
    let stands = wait_for(&agent, "somebody else's split", |status| status.state == "paused");
    assert!(stands.reason.expect("a reason").contains("7%"));
    let shown = agent.cli(&["status", SHOP]).stdout;
    assert!(shown.contains("rollout shop-v2") && shown.contains("somebody else"), "{shown}");
    assert_eq!(agent.cli(&["rollout", "promote", NAME, "--full"]).code, 0);
    assert_eq!(ends(&agent).code, 0);
    assert_eq!(share(&agent), "100%");
}
