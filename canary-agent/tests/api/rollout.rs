//! `rollout` as a process: what it prints, and how it ends.

use canary_agent::api::Limits;
use serde_json::Value;

use crate::{
    process::{ask, code, json_error, stderr, stdout},
    support::Agent,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_is_drawn_or_json() {
    let agent = Agent::start(Limits::default()).await;
    let shown = ask(&agent, &["rollout", "status", "shop-v2"]);
    let text = stdout(&shown);
    assert_eq!(code(&shown), 0, "{shown:?}");
    for line in [
        "◌ rollout shop-v2 (run 4): shop to v2, watching, step 2 of 3",
        "  waits for gate `l4`",
        "  begun 2023-11-14T22:13:20Z, this step watched for 1m 1s, 8m 59s to hold",
        "  v2 (canary)          5%        5%        5%",
        "  ▶     2     5%  hold 10m, gate l4",
        "  gate l4: undecided after 1m 1s; passes after 5m 0s at the earliest, decides until 1h 0m",
        "    connect_failed       3       40  [####······] 2.3 of 4.6  [··········] -0.5 of 3.0",
    ] {
        assert!(
            text.lines().any(|shown| shown.trim_end() == line || shown.starts_with(line)),
            "{line}\n{text}"
        );
    }
    assert!(!text.contains("shop-v3"));
    let all = ask(&agent, &["rollout", "status"]);
    let all = stdout(&all);
    assert!(all.contains("✖ rollout shop-v3 (run 3)") && all.contains("it was too slow"), "{all}");
    let of_service = ask(&agent, &["status", "shop"]);
    let of_service = stdout(&of_service);
    assert!(of_service.contains("rollout shop-v2") && !of_service.contains("shop-v3"));
    let json = ask(&agent, &["rollout", "status", "shop-v2", "--json"]);
    let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(value["rollouts"][0]["gate"]["signals"][0]["canary_events"], 3);
    assert_eq!(value["rollouts"].as_array().expect("a list").len(), 1);
    let unknown = ask(&agent, &["rollout", "status", "shop-v9"]);
    assert_eq!(code(&unknown), 1);
    assert!(stderr(&unknown).contains("there is no rollout `shop-v9`"), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_is_told_and_waited_for() {
    let agent = Agent::start(Limits::default()).await;
    for (arguments, line) in [
        (&["rollout", "start", "shop-v2"][..], "rollout `shop-v2` at step 2: start"),
        (&["rollout", "pause", "shop-v2", "--reason", "x"], "rollout `shop-v2` at step 2: pause"),
        (&["rollout", "promote", "shop-v2", "--full"], "rollout `shop-v2` at step 2: promote"),
        (&["rollout", "abort", "shop-v2", "--dry-run"], "nothing was changed (--dry-run)"),
    ] {
        let told = ask(&agent, arguments);
        assert_eq!(code(&told), 0, "{told:?}");
        assert!(stdout(&told).lines().any(|shown| shown == line), "{told:?}");
    }
    // What it would move is told as of a split, if its share would be another.
    let tried = ask(&agent, &["rollout", "abort", "shop-v2", "--dry-run"]);
    for part in ["buckets would move", "backends touched"] {
        assert!(stdout(&tried).contains(part), "{tried:?}");
    }
    let tried = ask(&agent, &["rollout", "abort", "shop-v2", "--dry-run", "--json"]);
    let tried: Value = serde_json::from_str(stdout(&tried)).expect("JSON");
    assert_eq!((&tried["share"], &tried["change"]["applied"]), (&"0%".into(), &false.into()));
    let tried = ask(&agent, &["rollout", "pause", "shop-v2", "--dry-run"]);
    assert!(!stdout(&tried).contains("would move"), "{tried:?}");
    let unknown = ask(&agent, &["rollout", "resume", "shop-v9", "--json"]);
    assert_eq!(json_error(&unknown).error.code, "unknown_rollout");
    // It is under way for longer than anybody waits, and the other was aborted.
    for (arguments, ends) in [
        (&["rollout", "status", "shop-v2", "--wait", "10ms"][..], 1),
        (&["rollout", "start", "shop-v2", "--wait", "10ms"], 1),
        (&["rollout", "status", "shop-v3", "--wait", "1m"], 3),
        (&["status", "other", "--wait", "1m"], 3),
        (&["status", "none", "--wait", "1m"], 1),
        // The same, shown as it goes.
        (&["rollout", "status", "shop-v2", "--watch", "--wait", "10ms"], 1),
        (&["rollout", "status", "shop-v3", "--watch", "--wait", "1m"], 3),
        (&["status", "shop", "--watch", "--wait", "10ms", "--json"], 1),
    ] {
        let waited = ask(&agent, arguments);
        assert_eq!(code(&waited), ends, "{arguments:?}: {waited:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_a_rollout_is_told() {
    let agent = Agent::start(Limits::default()).await;
    let shown = ask(&agent, &["rollout", "history", "shop-v2", "--evidence"]);
    let shown = stdout(&shown);
    for part in [
        "run 3: aborted at step 1, from 2023-11-14T22:13:20Z until 2023-11-14T22:23:20Z",
        "  because it was too slow",
        "connect_failed     5%        7       2",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
    let json = ask(&agent, &["rollout", "history", "shop-v2", "--json"]);
    let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(value["runs"][0]["state"], "aborted");
    assert_eq!(value["runs"][0]["evidence"].as_array().expect("a list").len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_gates_would_find_is_drawn_or_json() {
    let agent = Agent::start(Limits::default()).await;
    let shown = ask(&agent, &["plan", "shop-v2"]);
    assert_eq!(code(&shown), 0, "{shown:?}");
    let text = stdout(&shown);
    for line in [
        "rollout shop-v2: shop to v2, at 2000 new connections a second (counted)",
        "step 2: 5%, gate l4; passes after 5m 0s at the earliest, decides until 1h 0m",
        "  100 connections a second of the canary, 1900 of control; 100 and 1900 of them are watched",
        "  a canary as good as control passes in time with a chance of",
        "  connect_failed, of 0.2% of control's connections (counted): finds ×2",
        "    SIGNAL          FAULT",
        "warning: step 1: gate `l4` lets a canary that is as good as control pass by its deadline of 1h in",
    ] {
        assert!(text.lines().any(|shown| shown.starts_with(line)), "{line}\n{text}");
    }
    // `rollout plan` is the same, and so is the same question.
    assert_eq!(stdout(&ask(&agent, &["rollout", "plan", "shop-v2"])), text);
    let json = ask(
        &agent,
        &["plan", "shop-v2", "--json", "--rate", "0.5", "--usual", "connect_failed=1%"],
    );
    let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(value["connections_per_second"], 0.5);
    assert_eq!(value["rate_source"], "asked");
    let signal = &value["steps"][1]["signals"][0];
    assert_eq!((&signal["usual_rate"], &signal["usual_source"]), (&0.01.into(), &"asked".into()));
    // Who is asked needs no connections.
    let probes = ask(&agent, &["plan", "asked"]);
    let probes = stdout(&probes);
    assert!(probes.contains("command /bin/true           10s          20s"), "{probes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_reckoned_says_what_to_do() {
    let agent = Agent::start(Limits::default()).await;
    for (arguments, ends, word, help) in [
        (&["plan", "shop-v9", "--json"][..], 1, "unknown_rollout", "there are `shop-v2`"),
        (&["plan", "shop-v3", "--json"], 1, "no_traffic", "plan shop-v3 --rate 200"),
        (&["plan", "shop-v2", "--rate", "0", "--json"], 2, "bad_query", "for instance `200`"),
        (&["plan", "shop-v2", "--rate", "nan", "--json"], 2, "bad_query", "for instance `200`"),
        (&["plan", "shop-v2", "--rate", "1e99", "--json"], 2, "bad_query", "for instance `200`"),
        (
            &["plan", "shop-v2", "--usual", "connect_failed", "--json"],
            2,
            "bad_query",
            "connect_failed=0.2%",
        ),
        (
            &["plan", "shop-v2", "--usual", "connects=1%", "--json"],
            2,
            "bad_query",
            "there are connect_failed, ",
        ),
        (
            &["plan", "shop-v2", "--usual", "short_flow=0%", "--json"],
            2,
            "bad_query",
            "a share above 0",
        ),
        (
            &["plan", "shop-v2", "--usual", "short_flow=2", "--json"],
            2,
            "bad_query",
            "of the connections",
        ),
        (
            &["plan", "shop-v2", "--usual", "short_flow=1%", "--usual", "short_flow=2%", "--json"],
            2,
            "bad_query",
            "once",
        ),
    ] {
        let refused = ask(&agent, arguments);
        assert_eq!(code(&refused), ends, "{arguments:?}: {refused:?}");
        let error = json_error(&refused).error;
        assert_eq!(error.code, word, "{arguments:?}: {refused:?}");
        assert!(
            error.help.as_ref().is_some_and(|text| text.contains(help)),
            "{arguments:?}: {error:?}"
        );
    }
    let of_tcp = agent.ask_tcp("GET", "/v1/rollouts/shop-v2/plan", "localhost").await;
    assert_eq!(of_tcp.status, 403, "{of_tcp:?}");
    let unknown = agent.ask("GET", "/v1/rollouts/shop-v2/plan?speed=3", None).await;
    assert_eq!(unknown.status, 400, "{unknown:?}");
    // What is begun says the same.
    let begun = ask(&agent, &["rollout", "start", "shop-v2"]);
    let text = stdout(&begun);
    assert!(text.contains("\nwarning: step 1: gate `l4` lets a canary"), "{text}");
    let json = ask(&agent, &["rollout", "start", "shop-v2", "--dry-run", "--json"]);
    let value: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(value["warnings"].as_array().expect("a list").len(), 1, "{value}");
    let paused = ask(&agent, &["rollout", "pause", "shop-v2"]);
    assert!(!stdout(&paused).contains("warning"), "{paused:?}");
}
