//! The sockets as a client meets them, over real connections. The loop behind
//! them is scripted (see `support`).

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use canary_agent::api::Limits;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::{sleep, timeout},
};

use crate::support::{Agent, Answer, short};

#[tokio::test(flavor = "multi_thread")]
async fn what_the_loop_says_is_answered() {
    let agent = Agent::start(Limits::default()).await;
    let status = agent.ask("GET", "/v1/status", None).await;
    assert_eq!(status.status, 200);
    assert!(status.head.contains("content-type: application/json"));
    assert_eq!(status.json()["services"][0]["versions"][1]["asked"], 0.05);

    let service = agent.ask("GET", "/v1/services/shop", None).await.json();
    assert_eq!(service["name"], "shop");

    let split = agent.ask("GET", "/v1/services/shop/split", None).await.json();
    assert_eq!(split["control"], "stable");
    assert_eq!(split["revision"], 7);
    assert_eq!(split["versions"][1]["asked_text"], "5%");
    assert_eq!(split["versions"][1]["buckets"], 3277);

    let target = "/v1/services/shop/explain?from=%5B2001:db8::7%5D:40000&protocol=udp";
    let explain = agent.ask("GET", target, None).await.json();
    assert_eq!(explain["from"], "[2001:db8::7]:40000");
    assert_eq!(explain["protocol"], "udp");
    assert_eq!(explain["version"], "v2");

    let health = agent.ask("GET", "/v1/health", None).await.json();
    assert_eq!(health["status"], "ok");

    let head = agent.ask("HEAD", "/v1/status", None).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_reaches_the_loop_with_who_asked() {
    let agent = Agent::start(Limits::default()).await;
    let body = r#"{"split": {"v2": "10%"}, "reason": "ticket 7", "dry_run": true}"#;
    let answer = agent.ask("PUT", "/v1/services/shop/split", Some(body)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["applied"], false);
    let asked = agent.asked.lock().expect("not poisoned");
    let (service, request, peer) = &asked[0];
    assert_eq!(service, "shop");
    assert_eq!(request.split["v2"], "10%");
    assert_eq!(request.reason.as_deref(), Some("ticket 7"));
    assert!(request.dry_run);
    assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
    assert_eq!(peer.pid, Some(std::process::id() as i32));
}

/// Method, target, body, status, code.
type Wrong = (&'static str, &'static str, Option<&'static str>, u16, &'static str);

#[tokio::test(flavor = "multi_thread")]
async fn every_error_is_an_error_body() {
    const SPLIT: &str = "/v1/services/shop/split";
    let agent = Agent::start(Limits::default()).await;
    let wrong: [Wrong; 24] = [
        ("GET", "/", None, 404, "unknown_route"),
        ("GET", "/v2/status", None, 404, "unknown_route"),
        ("GET", "/v1/status/", None, 404, "unknown_route"),
        ("POST", "/v1/status", Some("{}"), 405, "method_not_allowed"),
        ("DELETE", SPLIT, None, 405, "method_not_allowed"),
        ("BREW", SPLIT, None, 405, "method_not_allowed"),
        ("GET", "/v1/status?verbose=1", None, 400, "unknown_parameter"),
        ("GET", "/v1/services/shop/explain?from=1.2.3.4&form=x", None, 400, "unknown_parameter"),
        ("GET", "/v1/services/shop/explain?from=a&from=b", None, 400, "bad_query"),
        ("GET", "/v1/services/shop/explain", None, 400, "bad_query"),
        ("GET", "/v1/services/nope", None, 404, "unknown_service"),
        ("GET", "/v1/services/nope/explain?from=192.0.2.1", None, 404, "unknown_service"),
        ("GET", "/v1/services/%ff", None, 400, "bad_path"),
        ("PUT", SPLIT, Some("{"), 400, "malformed_json"),
        ("PUT", SPLIT, Some(r#"{"split": {"v2": "1%"}} x"#), 400, "malformed_json"),
        ("PUT", SPLIT, Some(r#"{"split": {}, "shares": {}}"#), 400, "bad_body"),
        // Not a change of which nothing is said.
        ("POST", "/v1/undo", Some(" []"), 400, "bad_body"),
        ("POST", "/v1/undo", Some("["), 400, "malformed_json"),
        ("POST", "/v1/undo", Some("null"), 400, "bad_body"),
        ("POST", "/v1/undo", Some(""), 400, "malformed_json"),
        ("PUT", SPLIT, Some(r#"{"split": {"v2": 5}}"#), 400, "bad_body"),
        ("PUT", SPLIT, Some("[]"), 400, "bad_body"),
        ("PUT", SPLIT, Some(r#"{"split": {"v9": "1%"}}"#), 422, "unknown_version"),
        ("PUT", "/v1/services/nope/split", Some(r#"{"split": {}}"#), 404, "unknown_service"),
    ];
    for (method, target, body, status, code) in wrong {
        let answer = agent.ask(method, target, body).await;
        assert_eq!(answer.status, status, "{method} {target} {body:?}: {answer:?}");
        assert_eq!(answer.error(), code, "{method} {target} {body:?}");
    }
    let answer = agent.ask("POST", SPLIT, Some("{}")).await;
    assert!(answer.head.contains("allow: get,head,put"), "{answer:?}");
    let answer = agent.ask("GET", "/v1/services/shpo", None).await;
    assert_eq!(answer.json()["error"]["help"], "did you mean `shop`?");
    assert!(agent.asked.lock().expect("not poisoned").len() <= 2, "only the well-formed ones");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_must_be_json_and_small() {
    let agent = Agent::start(Limits::default()).await;
    let send = async |head: &str, body: &[u8]| {
        let mut stream = UnixStream::connect(agent.socket()).await.expect("connected");
        let head = format!(
            "PUT /v1/services/shop/split HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{head}\r\n"
        );
        stream.write_all(head.as_bytes()).await.expect("sent");
        // The agent need not read what it refuses.
        let _ = stream.write_all(body).await;
        Answer::read(&mut stream).await.expect("an answer")
    };
    let form =
        send("content-type: application/x-www-form-urlencoded\r\ncontent-length: 2\r\n", b"{}")
            .await;
    assert_eq!((form.status, form.error().as_str()), (415, "not_json"));

    let huge = vec![b' '; 1024 * 1024 + 1];
    let declared = send("content-length: 1048577\r\n", &huge).await;
    assert_eq!((declared.status, declared.error().as_str()), (413, "body_too_large"));

    let mut chunk = b"100001\r\n".to_vec();
    chunk.extend_from_slice(&huge);
    chunk.extend_from_slice(b"\r\n0\r\n\r\n");
    let chunked = send("transfer-encoding: chunked\r\n", &chunk).await;
    assert_eq!((chunked.status, chunked.error().as_str()), (413, "body_too_large"));

    let mut fits = br#"{"split": {"v2": "10%"}}"#.to_vec();
    fits.resize(1024 * 1024, b' ');
    let largest = send("content-length: 1048576\r\n", &fits).await;
    assert_eq!(largest.status, 200, "{}", largest.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_slowly_is_cut_off() {
    let agent = Agent::start(short()).await;
    let begun = Instant::now();
    // The head, a byte at a time.
    let mut stream = UnixStream::connect(agent.socket()).await.expect("connected");
    for byte in b"GET /v1/status HTTP/1.1\r\nhost: slow" {
        if stream.write_all(&[*byte]).await.is_err() {
            break;
        }
        sleep(Duration::from_millis(30)).await;
    }
    let answer = Answer::read(&mut stream).await.expect("an answer");
    assert_eq!((answer.status, answer.error().as_str()), (408, "slow_request"));

    // The body.
    let mut stream = UnixStream::connect(agent.socket()).await.expect("connected");
    let head = "PUT /v1/services/shop/split HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.expect("sent");
    let answer = Answer::read(&mut stream).await.expect("an answer");
    assert_eq!((answer.status, answer.error().as_str()), (408, "slow_request"));

    // Nothing at all: the connection ends without a word.
    let mut stream = UnixStream::connect(agent.socket()).await.expect("connected");
    let mut nothing = Vec::new();
    timeout(Duration::from_secs(5), stream.read_to_end(&mut nothing))
        .await
        .expect("cut off")
        .expect("closed");
    assert_eq!(nothing, b"");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_cut_off() {
    let agent = Agent::start(short()).await;
    let mut stream = UnixStream::connect(agent.socket()).await.expect("connected");
    // Answers pile up until the socket takes no more; then so do the requests.
    let request = b"GET /v1/openapi.json HTTP/1.1\r\nhost: a\r\n\r\n";
    let flood = async { while stream.write_all(request).await.is_ok() {} };
    timeout(Duration::from_secs(10), flood).await.expect("cut off");
    assert_eq!(agent.ask("GET", "/v1/health", None).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_that_does_not_answer_is_no_reason_to_wait() {
    let agent = Agent::start(short()).await;
    let body = Some(r#"{"split": {"v2": "10%"}}"#);
    let answer = agent.ask("PUT", "/v1/services/stuck/split", body).await;
    assert_eq!((answer.status, answer.error().as_str()), (504, "timeout"));
    assert_eq!(agent.ask("GET", "/v1/status", None).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_are_served_or_told() {
    let limits = Limits { head: Duration::from_secs(2), ..Limits::default() };
    let agent = Agent::start(limits).await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(UnixStream::connect(agent.socket()).await.expect("connected"));
    }
    // All places are taken by connections that ask nothing.
    let mut told = 0;
    for stream in &mut idle[128..] {
        let read = timeout(Duration::from_secs(1), Answer::read(stream)).await;
        match read.expect("not left waiting") {
            Ok(answer) => {
                assert_eq!((answer.status, answer.error().as_str()), (503, "busy"));
                assert!(answer.head.contains("retry-after: 1"));
                told += 1;
            }
            // Beyond the number that is told, connections are just closed.
            Err(_) => continue,
        }
    }
    assert!(told >= 64, "{told}");
    // They are cut off, and then there is room again.
    sleep(limits.head + Duration::from_millis(500)).await;
    assert_eq!(agent.ask("GET", "/v1/health", None).await.status, 200);

    // The same number that do ask something.
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let socket = agent.socket();
        asking.spawn(async move {
            let mut stream = UnixStream::connect(socket).await?;
            let request = b"GET /v1/status HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await?;
            Answer::read(&mut stream).await
        });
    }
    let mut statuses = BTreeSet::new();
    let mut served = 0;
    while let Some(answer) = asking.join_next().await {
        if let Ok(answer) = answer.expect("no panic") {
            served += usize::from(answer.status == 200);
            statuses.insert(answer.status);
        }
    }
    assert!(served >= 128, "{served} of 200");
    assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_changed_over_tcp() {
    let agent = Agent::start(Limits::default()).await;
    for method in ["PUT", "POST", "DELETE", "OPTIONS", "PATCH"] {
        for target in ["/v1/services/shop/split", "/v1/status", "/", "/nowhere"] {
            let answer = agent.ask_tcp(method, target, "127.0.0.1").await;
            assert_eq!((answer.status, answer.error().as_str()), (403, "read_only"));
        }
    }
    assert!(agent.asked.lock().expect("not poisoned").is_empty());
    for target in ["/v1/status", "/v1/services/shop/split", "/metrics", "/v1/openapi.json", "/"] {
        let answer = agent.ask_tcp("GET", target, "localhost:9109").await;
        assert_eq!(answer.status, 200, "{target}");
        assert!(!answer.head.contains("access-control"), "{}", answer.head);
        assert!(answer.head.contains("x-content-type-options: nosniff"));
    }
    let answer = agent.ask_tcp("GET", "/v1/status", "evil.example").await;
    assert_eq!((answer.status, answer.error().as_str()), (403, "bad_host"));
    let answer = agent.ask_tcp("GET", "/nowhere", "[::1]:9109").await;
    assert_eq!((answer.status, answer.error().as_str()), (404, "unknown_route"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_for_people_needs_nobody_else() {
    let agent = Agent::start(Limits::default()).await;
    let page = agent.ask_tcp("GET", "/", "127.0.0.1").await;
    assert!(page.head.contains("content-type: text/html"));
    assert!(page.head.contains("content-security-policy: default-src 'none'"));
    let body = page.body.to_lowercase();
    for foreign in ["http://", "https://", "src=", "@import", "innerhtml", "//cdn"] {
        assert!(!body.contains(foreign), "{foreign}");
    }
    assert!(body.contains("/v1/status"));
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_finishes_what_is_open() {
    let mut agent = Agent::start(short()).await;
    let mut idle = UnixStream::connect(agent.socket()).await.expect("connected");
    let mut open = TcpStream::connect(agent.tcp).await.expect("connected");
    let request = b"GET /v1/status HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n";
    open.write_all(request).await.expect("sent");
    let mut first = [0; 12];
    open.read_exact(&mut first).await.expect("an answer begins");
    assert_eq!(&first, b"HTTP/1.1 200");
    let begun = Instant::now();
    agent.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(!agent.socket().exists());
    let mut rest = Vec::new();
    open.read_to_end(&mut rest).await.expect("ended in order");
    assert!(rest.ends_with(b"}"), "the whole answer came");
    assert_eq!(idle.read(&mut [0; 8]).await.expect("ended in order"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_in_the_manual() {
    let agent = Agent::start(Limits::default()).await;
    let description = agent.ask("GET", "/v1/openapi.json", None).await.json();
    let documented = include_str!("../../../docs/api.md");
    for (path, item) in description["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("methods").keys() {
            let row = format!("| `{} {path}` |", method.to_uppercase());
            assert!(documented.contains(&row), "{row}");
        }
    }
}
