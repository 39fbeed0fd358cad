//! The agent ends in the middle of a split change: whoever asked is told, and what
//! the next one brings about is the split as it was or the split as it was asked.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use canary_agent::api::model::{ChangeReport, Status};
use canary_ebpf_common::entry::Entry;
use canary_tests::{
    agent::{Agent, Output},
    control::Control,
    host,
    model::Random,
    tables::Tables,
    topology::Family,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, SHOP, Way, service, version};

/// Buckets of a table.
const BUCKETS: f64 = 65_536.0;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Heard {
    /// It was carried out, and said so.
    Done,
    /// An error.
    Error,
}

/// Asserts that the pinned tables, the ledger and the status say the same of v2.
#[track_caller]
fn assert_agrees(tables: &Tables, status: &Status, when: &str) {
    let v2 = version(status, SHOP, "v2");
    for family in Family::ALL {
        let place = tables.place(SHOP, family);
        let slot = place.versions.iter().position(|name| name == "v2").expect("v2's slot");
        let mut versions = BTreeMap::new();
        let entries: Vec<Entry> = tables.entries(&place).into_iter().map(Entry).collect();
        for entry in &entries {
            versions
                .entry(entry.current().get())
                .or_insert_with(|| usize::from(tables.backend(entry.current()).version));
        }
        let is_v2 = entries.iter().map(|entry| versions[&entry.current().get()] == slot);
        let is_owned = tables.ledger(&place).into_iter().map(|l| usize::from(l.owner()) == slot);
        let (mut steered, mut owned, mut both) = (0, 0, 0);
        for (is_v2, is_owned) in is_v2.zip(is_owned) {
            steered += u32::from(is_v2);
            owned += u32::from(is_owned);
            both += u32::from(is_v2 && is_owned);
        }
        let counts = (steered, owned, both);
        assert_eq!(counts, (v2.buckets, v2.buckets, v2.buckets), "{when}, {family:?}: {v2:?}");
    }
}

/// Asks for a split by the command line or by the socket alone.
fn call(
    mut command: Option<std::process::Command>,
    control: Control,
    body: &str,
) -> (Heard, String) {
    if let Some(command) = &mut command {
        let output = command.output().expect("a process");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (code, stdout) = (output.status.code().unwrap_or(-1), text(&output.stdout));
        let output = Output { code, stdout, stderr: text(&output.stderr) };
        if output.code == 0 {
            assert!(output.json::<ChangeReport>().applied, "{output:?}");
            return (Heard::Done, output.stdout);
        }
        // The daemon can't be reached any more, or says that it ends.
        assert!([1, 5].contains(&output.code), "{output:?}");
        assert!(output.stdout.contains("\"error\""), "with --json an error is one: {output:?}");
        return (Heard::Error, output.stdout);
    }
    let mut control = control;
    match control.ask("PUT", &format!("/v1/services/{SHOP}/split"), body.as_bytes()) {
        Ok(answer) if answer.status == 200 => {
            assert!(answer.json::<ChangeReport>().applied, "{answer:?}");
            (Heard::Done, String::new())
        }
        Ok(answer) => (Heard::Error, String::from_utf8_lossy(&answer.body).into_owned()),
        Err(error) => (Heard::Error, error.to_string()),
    }
}

fn exercise(test: &str, way: Way, signal: Signal) {
    if !host::ready(test) {
        return;
    }
    let rounds = if std::env::var_os("CANARY_LONG").is_some() { 100 } else { 12 };
    let mut random = Random::from_environment(test);
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let mut agent: Agent<'_> = bench.agent("");
    let tables = Tables::open(&agent.folder().join("bpffs/canary"));
    let mut pool = bench.connect(Family::V4, 0..20);
    pool.open.extend(bench.connect(Family::V6, 0..20).open);
    let mut share = 0;
    let mut seen: BTreeMap<(bool, Heard, bool), u32> = BTreeMap::new();
    let mut under_way = 0;
    for round in 0..rounds {
        let by_command = round % 2 == 0;
        let before = agent.status();
        let asked = (share + 1 + random.below(99)) % 100;
        let percent = format!("{asked}%");
        let body = format!("{{\"split\": {{\"v2\": \"{percent}\"}}}}");
        let command = || agent.command(&["split", SHOP, &format!("v2={percent}"), "--json"]);
        let control = Control::open(&agent.socket()).expect("the socket");
        // How long such a call takes here and now, by one that changes nothing.
        let begun = Instant::now();
        if by_command {
            command().arg("--dry-run").output().expect("a process");
        } else {
            let dry = body.replace("}}", "}, \"dry_run\": true}");
            let target = format!("/v1/services/{SHOP}/split");
            let mut control = Control::open(&agent.socket()).expect("the socket");
            let answer = control.ask("PUT", &target, dry.as_bytes()).expect("an answer");
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        let delay = random.between(Duration::ZERO, begun.elapsed() * 2);
        let command = by_command.then(command);
        let (heard, text) = thread::scope(|scope| {
            let caller = scope.spawn(|| call(command, control, &body));
            thread::sleep(delay);
            under_way += u32::from(!caller.is_finished());
            let end = agent.stop(signal);
            assert_eq!(end.code(), (signal == Signal::SIGTERM).then_some(0), "{signal}: {end}");
            caller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let when = format!("{test}, round {round}: {signal} {delay:?} into v2={percent}");
        pool.assert_where_they_were(&when);
        agent.run();
        let status = agent.wait_ready();
        let v2 = version(&status, SHOP, "v2");
        let done = v2.asked_text == percent;
        let was = &version(&before, SHOP, "v2").asked_text;
        assert!(done || v2.asked_text == *was, "{when}: {v2:?}, and {was} before");
        assert!(done || heard == Heard::Error, "{when}: it was done, and is not: {v2:?}");
        let revision = before.agent.revision + u64::from(done);
        assert_eq!(status.agent.revision, revision, "{when}: {heard:?} {text}");
        let now = if done { asked } else { share };
        let buckets = (now as f64 / 100.0 * BUCKETS).round();
        assert!((f64::from(v2.buckets) - buckets).abs() <= 1.0, "{when}: {v2:?}");
        assert_agrees(&tables, &status, &when);
        pool.assert_where_they_were(&format!("{when}, started again"));
        assert!(service(&status, SHOP).tracked_buckets == 0 || way == Way::Dsr);
        share = now;
        *seen.entry((by_command, heard, done)).or_default() += 1;
    }
    println!(
        "{test}: {under_way} of {rounds} calls were under way; \
         rounds by (by command, what was heard, whether it was done): {seen:?}"
    );
    assert!(under_way > 0, "no call was interrupted");
    let errors: u32 = seen.iter().filter(|((_, h, _), _)| *h == Heard::Error).map(|(_, n)| n).sum();
    // An agent that is asked to end may answer whoever has asked before; a killed one can't.
    assert!(signal == Signal::SIGTERM || errors > 0, "nobody heard of a kill: {seen:?}");
}

#[test]
fn a_kill_in_the_middle_of_a_split_leaves_one_split_or_the_other() {
    let test = "a_kill_in_the_middle_of_a_split_leaves_one_split_or_the_other";
    exercise(test, Way::Dsr, Signal::SIGKILL);
}

#[test]
fn an_end_in_the_middle_of_a_split_leaves_one_split_or_the_other() {
    let test = "an_end_in_the_middle_of_a_split_leaves_one_split_or_the_other";
    exercise(test, Way::NatTwoArmed, Signal::SIGTERM);
}
