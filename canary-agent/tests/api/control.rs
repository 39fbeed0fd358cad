//! The commands of change control, and events that go on.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
};

use canary_agent::api::{
    Limits,
    model::{Event, Events},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::{
    process::{self, ask, code, stderr},
    support::{Agent, short},
};

fn stdout(output: &Output) -> String {
    process::stdout(output).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_taken_back_and_confirmed_and_say_so() {
    let agent = Agent::start(Limits::default()).await;
    let split = ask(&agent, &["split", "shop", "v2=10%", "--confirm", "5m", "--if-revision", "7"]);
    assert_eq!(code(&split), 0, "{split:?}");
    assert!(stdout(&split).contains("taken back in 5m unless `canary-agent confirm` follows"));
    let (_, request, _) = agent.asked.lock().expect("not poisoned").pop().expect("asked");
    assert_eq!((request.confirm.as_deref(), request.if_revision), (Some("5m"), Some(7)));

    let undone = ask(&agent, &["undo", "shop", "--reason", "no good"]);
    assert_eq!(code(&undone), 0, "{undone:?}");
    let text = stdout(&undone);
    for part in [
        "taken back: revision 7, shop: v2 5% to 10%, by root at 2023-11-14T22:13:20.000Z (ticket 7)",
        "3277 buckets moved; in force after 2.15ms (revision 8)",
        "10.0.1.1:8443: `drain`, then `ready`",
        "about 41 open connections in these buckets",
        "note: the freeze of revision 6 stays",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let tried = ask(&agent, &["undo", "--to", "3", "--dry-run"]);
    assert!(stdout(&tried).contains("would be taken back: revision 7"));
    assert!(stdout(&tried).contains("nothing was changed (--dry-run)"));
    let json: Value =
        serde_json::from_str(&stdout(&ask(&agent, &["undo", "--json"]))).expect("JSON");
    assert_eq!((&json["revision"], &json["undone"][0]["user"]), (&8.into(), &"root".into()));
    let unknown = ask(&agent, &["undo", "shpo"]);
    assert_eq!(code(&unknown), 1);
    assert!(stderr(&unknown).contains("did you mean `shop`?"));

    // One of the services was left as it is.
    let panic = ask(&agent, &["panic", "--agent-timeout", "20s", "--reason", "bad"]);
    assert_eq!(code(&panic), 1, "{panic:?}");
    for part in [
        "3277 buckets moved to control; in force after 2.15ms (revision 8)",
        "not mail: service `mail`: nobody is left",
        "about 41 open connections in these buckets",
    ] {
        assert!(stdout(&panic).contains(part), "{part}: {}", stdout(&panic));
    }
    // Where nothing is pinned that could be changed instead, the agent is waited for.
    let late = ask(&agent, &["panic", "--agent-timeout", "0s", "--reason", "bad"]);
    assert_eq!(stdout(&late), stdout(&panic), "{late:?}");
    let unknown = ask(&agent, &["panic", "shpo", "--agent-timeout", "20s"]);
    assert!(stderr(&unknown).contains("did you mean `shop`?"), "{unknown:?}");

    let confirmed = ask(&agent, &["confirm"]);
    assert!(stdout(&confirmed).ends_with("confirmed (revision 8)\n"), "{confirmed:?}");
    let frozen = ask(&agent, &["freeze", "shop", "--reason", "peace"]);
    assert!(stdout(&frozen).contains("service shop: frozen"), "{frozen:?}");
    let ended = ask(&agent, &["unfreeze"]);
    let text = "all services: not frozen any more (it was: the night before) (revision 8)\n";
    assert_eq!(stdout(&ended), text);

    let status = stdout(&ask(&agent, &["status"]));
    for part in [
        "WAITS: revision 7 (shop: v2 5% to 10%) is taken back in 1m 2s unless it is confirmed",
        "FROZEN: shop, by uid 1000 since revision 6: the night before",
    ] {
        assert!(status.contains(part), "{part}: {status}");
    }
    // There is no change to make on these terms.
    assert_eq!(code(&ask(&agent, &["split", "shop", "--if-revision", "7"])), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_a_page_after_the_other() {
    let agent = Agent::start(Limits::default()).await;
    let text = stdout(&ask(&agent, &["events", "--limit", "2"]));
    let line = "2023-11-14T22:13:20.000Z  revision 19  root  split  shop: v2 5% to 10%, 3277 buckets moved \
                (ticket 7)";
    assert_eq!(text.lines().next(), Some(line));
    assert_eq!(text.lines().count(), 2);
    let json: Events =
        serde_json::from_str(&stdout(&ask(&agent, &["events", "--json"]))).expect("JSON");
    assert_eq!((json.events.len(), json.last), (7, 20));
    assert_eq!(json.events[0].user.as_deref(), Some("root"));
    let unknown = ask(&agent, &["events", "--service", "shpo", "--follow"]);
    assert_eq!(code(&unknown), 1);
    assert!(stderr(&unknown).contains("did you mean `shop`?"));
    for (query, code) in [
        ("follow=perhaps", "bad_query"),
        ("after=-1", "bad_query"),
        ("limit=many", "bad_query"),
        ("before=2", "unknown_parameter"),
    ] {
        let answer = agent.ask("GET", &format!("/v1/events?{query}"), None).await;
        assert_eq!((answer.status, answer.error().as_str()), (400, code), "{query}");
    }
}

/// The numbers of the events in the lines; empty lines are none.
async fn numbers(
    lines: &mut tokio::io::Lines<impl AsyncBufReadExt + Unpin>,
    until: u64,
) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.last() != Some(&until) {
        let line = lines.next_line().await.expect("read").expect("not the end");
        // Lengths of chunks stand between them.
        if let Ok(event) = serde_json::from_str::<Event>(&line) {
            numbers.push(event.id);
        }
    }
    numbers
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_is_told_of_everything_once_and_ends_with_the_agent() {
    let mut agent = Agent::start(short()).await;
    let mut stream = UnixStream::connect(agent.socket()).await.expect("connected");
    let request = "GET /v1/events?after=12&follow=true HTTP/1.1\r\nhost: agent\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("sent");
    let (reader, _writer) = stream.split();
    let mut lines = tokio::io::BufReader::new(reader).lines();
    // More than fit into one answer of the loop, and than the limits of an ordinary one last.
    assert_eq!(numbers(&mut lines, 20).await, (13..=20).collect::<Vec<_>>());
    agent.happened.send_replace(50);
    assert_eq!(numbers(&mut lines, 50).await, (21..=50).collect::<Vec<_>>());
    tokio::time::sleep(short().request * 2).await;
    agent.happened.send_replace(51);
    assert_eq!(numbers(&mut lines, 51).await, [51]);
    // Another file, whose numbers begin again.
    agent.happened.send_replace(2);
    assert_eq!(numbers(&mut lines, 2).await, [1, 2]);

    let mut command = Command::new(env!("CARGO_BIN_EXE_canary-agent"))
        .args(["events", "-f", "--limit", "1", "--socket"])
        .arg(agent.socket())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a command");
    let output = command.stdout.take().expect("its output");
    let happened = agent.happened.clone();
    let read = tokio::task::spawn_blocking(move || {
        let mut read = BufReader::new(output).lines().map(|line| line.expect("text"));
        assert!(read.next().expect("a line").contains("revision 2 "));
        happened.send_replace(3);
        assert!(read.next().expect("a line").contains("revision 3 "));
        read.count()
    });
    // Not before it has been read, and then at once: nobody waits for a follower.
    let mut news = agent.happened.subscribe();
    news.wait_for(|last| *last == 3).await.expect("it is sent");
    assert_eq!(numbers(&mut lines, 3).await, [3]);
    let stopping = std::time::Instant::now();
    agent.stop().await;
    assert!(stopping.elapsed() < short().stop, "{:?}", stopping.elapsed());
    read.await.expect("no panic");
    assert_eq!(command.wait().expect("an end").code(), Some(0));
}
