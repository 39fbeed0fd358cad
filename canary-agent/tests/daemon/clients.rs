//! Several clients at once over the real socket, sending whatever comes to mind: nothing
//! panics, no change is lost, and the audit trail has each of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use canary_agent::{
    api::{self, Api, ControlSocket},
    config::model::Operators,
    daemon::{Event, Handle, Request},
    plan::Adopted,
    store::{Change, Split, SqliteStore, StateStore},
    telemetry::Metrics,
};
use canary_ebpf_common::compile;
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    plan_support::{config, service},
    rollout::{step, with},
    support::{Agent, Shared},
};

/// Clients that ask at the same time.
const CLIENTS: usize = 4;
/// Most that each of them asks.
const CALLS: usize = 24;

/// A request: method, target and body. `REVISION` in the body is the last revision that the
/// client has seen, `REASON` a text of its own.
type Call = (&'static str, String, String);

fn names() -> impl Strategy<Value = &'static str> {
    prop_oneof![6 => Just("shop"), 3 => Just("api"), 1 => Just("shpo")]
}

/// Fields that say on what terms, of which some are no good.
fn terms() -> impl Strategy<Value = String> {
    let revision = prop_oneof![
        5 => Just(""),
        4 => Just(r#", "if_revision": REVISION"#),
        1 => Just(r#", "if_revision": 1"#),
        1 => Just(r#", "if_revision": 99999"#),
        1 => Just(r#", "if_revision": -1"#),
    ];
    let confirm = prop_oneof![
        8 => Just(""),
        2 => Just(r#", "confirm": "1s""#),
        1 => Just(r#", "confirm": "1h""#),
        1 => Just(r#", "confirm": "0s""#),
    ];
    let rest = prop_oneof![
        12 => Just(""),
        2 => Just(r#", "dry_run": true"#),
        1 => Just(r#", "nonsense": 1"#),
    ];
    (revision, confirm, rest).prop_map(|(a, b, c)| format!(r#""reason": "REASON"{a}{b}{c}"#))
}

fn calls() -> impl Strategy<Value = Call> {
    let share = prop_oneof![
        Just("0"),
        Just("5%"),
        Just("0.1%"),
        Just("33%"),
        Just("60%"),
        Just("64/4096"),
        Just("101%"),
        Just("lots"),
    ];
    let version =
        prop_oneof![6 => Just("v2"), 3 => Just("v3"), 1 => Just("stable"), 1 => Just("v9")];
    let split = (names(), version, share, terms()).prop_map(|(service, version, share, terms)| {
        let body = format!(r#"{{"split": {{"{version}": "{share}"}}, {terms}}}"#);
        ("PUT", format!("/v1/services/{service}/split"), body)
    });
    let addr = prop_oneof![
        4 => Just("10.0.1.1:443"), 2 => Just("10.0.1.2:443"), 2 => Just("10.0.2.1"),
        1 => Just("10.9.9.9:1"), 1 => Just("%00"),
    ];
    let word = prop_oneof![Just("ready"), Just("drain"), Just("maint"), Just("asleep")];
    let backend = (names(), addr, word, any::<bool>(), terms()).prop_map(
        |(service, addr, word, force, terms)| {
            let body = format!(r#"{{"state": "{word}", "force": {force}, {terms}}}"#);
            ("PUT", format!("/v1/services/{service}/backends/{addr}"), body)
        },
    );
    let scope = prop_oneof![
        4 => Just(""), 3 => Just(r#""service": "shop", "#), 2 => Just(r#""service": "api", "#),
        1 => Just(r#""service": "shpo", "#),
    ];
    let to = prop_oneof![
        4 => Just(String::new()),
        1 => Just(r#""to": REVISION, "#.to_owned()),
        3 => (0..40_u64).prop_map(|to| format!(r#""to": {to}, "#)),
    ];
    let undo = (scope.clone(), to, any::<bool>(), terms()).prop_map(|(scope, to, force, terms)| {
        ("POST", "/v1/undo".to_owned(), format!(r#"{{{scope}{to}"force": {force}, {terms}}}"#))
    });
    let which = prop_oneof![
        4 => Just(String::new()),
        1 => (0..40_u64).prop_map(|revision| format!(r#""revision": {revision}, "#)),
    ];
    let confirm = which.prop_map(|which| {
        ("POST", "/v1/confirm".to_owned(), format!(r#"{{{which}"reason": "REASON"}}"#))
    });
    let rest = prop_oneof![
        6 => Just(""), 1 => Just(r#""move": true, "#), 1 => Just(r#""dry_run": true, "#),
        1 => Just(r#""id": 7, "#), 1 => Just(r#""confirm": "1s", "#),
    ];
    let panic = (scope.clone(), rest).prop_map(|(scope, rest)| {
        ("POST", "/v1/panic".to_owned(), format!(r#"{{{scope}{rest}"reason": "REASON"}}"#))
    });
    let name = prop_oneof![6 => Just("shop-v2"), 1 => Just("shop-v9")];
    let action = prop_oneof![
        4 => Just("start"), 1 => Just("pause"), 2 => Just("resume"), 4 => Just("promote"),
        1 => Just("abort"), 1 => Just("hurry"),
    ];
    let rest = prop_oneof![
        6 => Just(""), 1 => Just(r#""full": true, "#), 1 => Just(r#""dry_run": true, "#),
        1 => Just(r#""if_revision": REVISION, "#),
    ];
    let rollout = (name, action, rest).prop_map(|(name, action, rest)| {
        let target = format!("/v1/rollouts/{name}/{action}");
        ("POST", target, format!(r#"{{{rest}"reason": "REASON"}}"#))
    });
    let freeze = (scope, any::<bool>(), terms()).prop_map(|(scope, freezes, terms)| {
        let route = if freezes { "/v1/freeze" } else { "/v1/unfreeze" };
        ("POST", route.to_owned(), format!("{{{scope}{terms}}}"))
    });
    let query = prop_oneof![
        Just("limit=5"),
        Just("after=3&limit=2"),
        Just("since=1h&service=shop"),
        Just("since=soon"),
        Just("after=x"),
        Just("service=shpo"),
        Just("limit=0"),
        Just("after=18446744073709551615"),
    ];
    let events = query.prop_map(|query| ("GET", format!("/v1/events?{query}"), String::new()));
    let read = prop_oneof![
        Just("/v1/status"),
        Just("/v1/services/shop/backends"),
        Just("/v1/services/api/split"),
        Just("/v1/services/shop/explain?from=192.0.2.7:40000"),
        Just("/v1/nothing"),
    ];
    let read = read.prop_map(|target| ("GET", target.to_owned(), String::new()));
    let method = prop_oneof![Just("PUT"), Just("POST"), Just("DELETE"), Just("GET")];
    let route = prop_oneof![
        Just("/v1/undo"),
        Just("/v1/confirm"),
        Just("/v1/freeze"),
        Just("/v1/panic"),
        Just("/v1/services/shop/split"),
        Just("/v1/events"),
    ];
    let body = prop_oneof![
        Just("{"),
        Just("[]"),
        Just("null"),
        Just(r#"{"split": 5}"#),
        Just(r#"{"to": "x"}"#),
        Just(r#"{"confirm": {}}"#),
        Just("\u{0}"),
        Just(r#"{"reason": 5}"#),
    ];
    let garbage = (method, route, body)
        .prop_map(|(method, route, body)| (method, route.to_owned(), body.to_owned()));
    prop_oneof![
        8 => split, 4 => backend, 3 => undo, 2 => confirm, 2 => freeze, 1 => panic, 2 => rollout,
        1 => events, 1 => read, 1 => garbage,
    ]
}

/// What a client got.
struct Answered {
    reason: String,
    /// What `REVISION` was.
    seen: u64,
    body: String,
    status: u16,
    answer: Value,
}

fn ask(socket: &Path, (method, target, body): &Call) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).expect("connected");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    let length = body.len();
    let request = format!(
        "{method} {target} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let value = serde_json::from_str(body);
    (status, value.unwrap_or_else(|error| panic!("{method} {target}: {error}: {answer}")))
}

/// One client: asks, one call after the other.
fn client(socket: &Path, who: usize, calls: &[Call]) -> Vec<Answered> {
    let mut seen = 0;
    let mut answers = Vec::new();
    for (n, (method, target, body)) in calls.iter().enumerate() {
        let reason = format!("client {who}, call {n}");
        let body = body.replace("REVISION", &seen.to_string()).replace("REASON", &reason);
        let (status, answer) = ask(socket, &(*method, target.clone(), body.clone()));
        let revision = answer["revision"].as_u64().or(answer["agent"]["revision"].as_u64());
        let before = seen;
        seen = revision.unwrap_or(seen);
        answers.push(Answered { reason, seen: before, body, status, answer });
    }
    answers
}

/// The loop over a state without a kernel; each request takes a while of its clock.
fn serve(mut agent: Agent, mut requests: mpsc::Receiver<Request>) -> Agent {
    while let Some(request) = requests.blocking_recv() {
        agent.boot_ms += 40;
        let due = agent.event(Event::Request { request, arrived: Instant::now() });
        if due.is_some_and(|due| due <= agent.boot_ms) {
            agent.event(Event::Wakeup);
        }
        if agent.boot_ms % 1_000 < 40 {
            agent.event(Event::Tick);
        }
    }
    agent
}

/// Which rows say what the split was and became.
fn has_split(change: &Change) -> bool {
    !matches!(change.action.as_str(), "freeze" | "unfreeze" | "confirm")
        && change.freeze.is_none()
        && (change.action != "undo" || !change.slots.is_empty())
}

/// Everything that has to hold when all is over.
fn check(
    dir: &Path,
    answers: &[Answered],
    status: &Value,
    agent: &Agent,
) -> Result<(), TestCaseError> {
    let mut store = SqliteStore::new(dir);
    let trail = store.changes(0, 100_000).expect("the trail");
    let last = status["agent"]["revision"].as_u64().expect("a revision");
    let numbers: Vec<u64> = trail.iter().map(|(revision, _)| *revision).collect();
    prop_assert_eq!(&numbers, &(1..=last).collect::<Vec<_>>());

    // Each follows on what was before it, and the last is in force.
    let mut asked: BTreeMap<&str, &Split> = BTreeMap::new();
    for (revision, change) in trail.iter().filter(|(_, change)| has_split(change)) {
        if let Some(before) = asked.insert(&change.service, &change.after) {
            prop_assert_eq!(before, &change.before, "revision {}", revision);
        }
    }
    let snapshot = store.load().expect("the state");
    for record in &snapshot.services {
        prop_assert_eq!(asked[record.name.as_str()], &record.split);
        let owners = compile::decode_owners(&record.owners).expect("owners");
        let plane = agent.state.plane();
        let table = plane.services.iter().find(|table| table.name == record.name).expect("a table");
        let planned: Vec<u8> = table.ledger.iter().map(|entry| entry.owner()).collect();
        prop_assert!(owners == planned, "the owners of {}", record.name);
        let service = status["services"].as_array().into_iter().flatten();
        let service =
            service.into_iter().find(|one| one["name"] == record.name[..]).expect("shown");
        for version in service["versions"].as_array().into_iter().flatten().skip(1) {
            let name = version["name"].as_str().unwrap_or_default();
            let stored = record.split.get(name).map_or("0%".to_owned(), ToString::to_string);
            prop_assert_eq!(&version["asked_text"], &json!(stored));
        }
    }
    prop_assert_eq!(status["pending"].as_array().map(Vec::len), Some(snapshot.pending.len()));

    // Nothing in the trail that nobody has asked for, and nothing done that is not in it.
    let done: BTreeSet<&str> = answers
        .iter()
        .filter(|one| one.status == 200 && one.answer["applied"] == true)
        .map(|one| one.reason.as_str())
        .collect();
    // A rollout was told to, and makes its own steps.
    let asked = |change: &Change| change.uid.is_some() && change.action != "rollout";
    for (revision, change) in trail.iter().filter(|(_, change)| asked(change)) {
        let reason = change.reason.as_deref().unwrap_or_default();
        let reason = reason.strip_prefix("shop-v2: ").unwrap_or(reason);
        prop_assert!(done.contains(reason), "revision {}: {}", revision, reason);
    }
    for one in answers.iter().filter(|one| done.contains(one.reason.as_str())) {
        let Answered { reason, seen, body, answer, .. } = one;
        let of_it = |change: &&(u64, Change)| change.1.reason.as_ref() == Some(reason);
        let rows: Vec<&(u64, Change)> = trail.iter().filter(of_it).collect();
        let changes = answer["buckets_moved"].as_u64().unwrap_or(0) > 0
            || answer["undone"].is_array()
            || answer["confirmed"].is_array()
            || answer["before"] != answer["state"];
        prop_assert!(!rows.is_empty() || !changes, "{}: {} is not in the trail", reason, answer);
        let Some((revision, change)) = rows.last() else { continue };
        prop_assert_eq!(answer["revision"].as_u64(), Some(*revision));
        if body.contains(&format!(r#""if_revision": {seen}"#)) && rows.len() == 1 {
            let between = trail.iter().filter(|(number, other)| {
                number > seen
                    && number < revision
                    && (other.service == change.service || other.service.is_empty())
            });
            prop_assert_eq!(between.count(), 0, "{}: an update was lost", reason);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn whatever_clients_ask_nothing_is_lost(
        calls in prop::collection::vec(prop::collection::vec(calls(), 1..CALLS), CLIENTS)
    ) {
        let dir = tempfile::tempdir().expect("a directory");
        let versions: &[(&str, &[(&str, u32)])] = &[
            ("stable", &[("10.0.1.1:443", 1), ("10.0.1.2:443", 1)]),
            ("v2", &[("10.0.2.1:443", 1)]),
            ("v3", &[("10.0.3.1:443", 1)]),
        ];
        let mut config = config(vec![service("shop", versions), service("api", versions)]);
        config.rollouts = with(vec![step("10%", 1), step("50%", 0), step("100%", 0)]).rollouts;
        let agent = Agent::start(dir.path(), &config, Shared::default(), Adopted::default());
        let (handle, requests) = Handle::channel(64);
        let served = thread::spawn(move || serve(agent, requests));
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let socket: PathBuf = dir.path().join("agent.sock");
        let (_operators, operators) = watch::channel(Operators::default());
        let (stop, stopped) = oneshot::channel::<()>();
        let listening = {
            let _inside = runtime.enter();
            let api = Api::new(handle, operators, Metrics::new());
            let listener = ControlSocket::bind(&socket).expect("a socket");
            runtime.spawn(api::serve_control(listener, api, async { stopped.await.unwrap_or_default() }))
        };
        let asked = AtomicU64::new(0);
        let answers: Vec<Answered> = thread::scope(|scope| {
            let clients: Vec<_> = calls
                .iter()
                .enumerate()
                .map(|(who, calls)| {
                    let (socket, asked) = (&socket, &asked);
                    scope.spawn(move || {
                        asked.fetch_add(calls.len() as u64, Ordering::Relaxed);
                        client(socket, who, calls)
                    })
                })
                .collect();
            clients.into_iter().flat_map(|client| client.join().expect("no panic")).collect()
        });
        prop_assert_eq!(answers.len() as u64, asked.load(Ordering::Relaxed));
        for Answered { status, answer, body, .. } in &answers {
            let fine = [200, 400, 404, 405, 409, 422];
            prop_assert!(fine.contains(status), "{}: {}: {}", body, status, answer);
            prop_assert!(*status == 200 || answer["error"]["message"].is_string(), "{}", answer);
        }
        drop(stop);
        runtime.block_on(listening).expect("no panic");
        let mut agent = served.join().expect("no panic");
        // At the moment of the last request: nothing is due that was not then.
        let status = serde_json::to_value(agent.status()).expect("JSON");
        check(dir.path(), &answers, &status, &agent)?;
    }
}
