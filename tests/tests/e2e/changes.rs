//! Changes on an operator's terms, from the command line to the tables that packets meet: tried,
//! refused when stale or frozen, taken back to any revision, kept only if confirmed; and all of it
//! told.

use canary_agent::api::model::{ChangeReport, ErrorBody, Events, UndoReport};
use canary_ebpf_common::abi::LedgerEntry;
use canary_tests::{
    agent::{Agent, Output},
    host,
    topology::Family,
    wait,
};

use crate::{
    sound::{assert_sound, tables},
    support::{Bench, SHOP, Way, version},
};

/// Who owns each bucket, as the maps say it.
#[track_caller]
fn owners(agent: &Agent<'_>) -> Vec<u8> {
    let tables = tables(agent);
    let place = tables.place(SHOP, Family::V4);
    tables.ledger(&place).into_iter().map(LedgerEntry::owner).collect()
}

/// What a command is refused with.
#[track_caller]
fn refused(agent: &Agent<'_>, args: &[&str]) -> (String, String) {
    let before = (agent.status().agent.revision, owners(agent));
    let output: Output = agent.cli(&[args, &["--json"]].concat());
    assert_eq!(output.code, 1, "{args:?}: {output:?}");
    assert_eq!((agent.status().agent.revision, owners(agent)), before, "{args:?}");
    let error = output.json::<ErrorBody>().error;
    (error.code, format!("{} {}", error.message, error.help.unwrap_or_default()))
}

#[track_caller]
fn done(agent: &Agent<'_>, args: &[&str]) {
    let output = agent.cli(args);
    assert_eq!(output.code, 0, "{args:?}: {output:?}");
}

fn asked(agent: &Agent<'_>) -> String {
    version(&agent.status(), SHOP, "v2").asked_text.clone()
}

#[test]
fn changes_are_made_on_the_terms_of_who_asks() {
    let test = "changes_are_made_on_the_terms_of_who_asks";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 2), ("v2", 2)]);
    let agent = bench.agent("buckets = 4096");
    bench.wait_answered();
    let mut known = Vec::new();
    for (share, reason) in [("v2=10%", "ticket 1"), ("v2=30%", "ticket 2"), ("v2=60%", "ticket 3")]
    {
        let report: ChangeReport = agent.json(&["split", SHOP, share, "--reason", reason]);
        known.push((report.revision, owners(&agent)));
    }
    let mut pool = bench.connect(Family::V4, 0..12);
    pool.open.extend(bench.connect(Family::V6, 0..12).open);

    // Tried: the same answer, and nothing of it.
    let tried: ChangeReport = agent.json(&["split", SHOP, "v2=1%", "--dry-run"]);
    assert!(!tried.applied && tried.buckets_moved > 2_000, "{tried:?}");
    assert_eq!(owners(&agent), known[2].1);

    // Back to a revision that was not the last, with exactly its buckets; and forth again.
    let to = known[0].0.to_string();
    let undone: UndoReport = agent.json(&["undo", "--to", &to, "--dry-run"]);
    assert!(!undone.applied && owners(&agent) == known[2].1, "{undone:?}");
    let undone: UndoReport = agent.json(&["undo", "--to", &to, "--reason", "too early"]);
    assert_eq!((undone.undone.len(), asked(&agent).as_str()), (2, "10%"), "{undone:?}");
    assert_eq!(owners(&agent), known[0].1);
    assert_eq!(refused(&agent, &["undo", SHOP]).0, "undone_already");
    done(&agent, &["undo", SHOP, "--to", &known[2].0.to_string()]);
    assert_eq!((owners(&agent), asked(&agent).as_str()), (known[2].1.clone(), "60%"));
    assert_sound(&agent, &agent.status(), test);

    // Whoever has not seen the last change is told who made it.
    let stale = known[1].0.to_string();
    let (code, text) = refused(&agent, &["split", SHOP, "v2=5%", "--if-revision", &stale]);
    assert_eq!(code, "stale_revision", "{text}");
    assert!(text.contains("undo"), "{text}");
    let now = agent.status().agent.revision.to_string();
    done(&agent, &["split", SHOP, "v2=50%", "--if-revision", &now]);
    let half = owners(&agent);

    // Frozen: towards control only.
    done(&agent, &["freeze", "--reason", "holidays"]);
    let (code, text) = refused(&agent, &["split", SHOP, "v2=70%"]);
    assert!(code == "frozen" && text.contains("holidays"), "{code}: {text}");
    assert_eq!(refused(&agent, &["undo", SHOP]).0, "frozen", "it would give v2 more");
    done(&agent, &["split", SHOP, "v2=20%"]);
    done(&agent, &["unfreeze"]);
    done(&agent, &["split", SHOP, "v2=50%"]);
    assert_eq!(owners(&agent), half, "a share that comes back has its buckets");

    // Nobody confirms: it is taken back. Somebody does: it stays.
    done(&agent, &["split", SHOP, "v2=90%", "--confirm", "2s"]);
    assert_eq!(refused(&agent, &["split", SHOP, "v2=1%"]).0, "confirmation_pending");
    wait::until("the split to be taken back", || match asked(&agent).as_str() {
        "50%" => Ok(()),
        other => Err(other.to_owned()),
    });
    assert_eq!(owners(&agent), half);
    done(&agent, &["split", SHOP, "v2=55%", "--confirm", "1h"]);
    done(&agent, &["confirm", "--reason", "it is good"]);
    assert!(agent.status().pending.is_empty());
    assert_eq!(asked(&agent), "55%");

    // All of it is told: who, when, what and why.
    let events: Events = agent.json(&["events", "--limit", "1000"]);
    let changes: Vec<_> = events.events.iter().filter(|event| event.uid.is_some()).collect();
    let kinds: Vec<&str> = changes.iter().map(|event| event.kind.as_str()).collect();
    let expected =
        "split split split undo undo split freeze split unfreeze split split split confirm";
    assert_eq!(kinds.join(" "), expected);
    assert!(changes.iter().all(|event| event.uid == Some(0) && event.unix_ms > 0), "{changes:#?}");
    let reasons: Vec<&str> = changes.iter().filter_map(|event| event.reason.as_deref()).collect();
    let given = ["ticket 1", "ticket 2", "ticket 3", "too early", "holidays", "it is good"];
    assert_eq!(reasons, given);
    assert_sound(&agent, &agent.status(), test);
    pool.assert_where_they_were(test);
}
