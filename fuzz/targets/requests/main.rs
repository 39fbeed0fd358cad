//! Requests, of any bytes, over a real control socket to the agent's real state: every one is
//! answered, with JSON that says what is wrong, and one that is refused has changed nothing.
//!
//! Requests are separated by a byte of 0. Each is a line with method and target, and behind it the
//! body; what begins with `RAW` and the end of a line is sent as it is.
#![no_main]

mod store;
mod world;

use std::{
    cell::RefCell, fs::OpenOptions, os::fd::AsRawFd as _, os::unix::fs::OpenOptionsExt as _,
};

use canary_agent::{
    api::{self, Api, ControlSocket, Limits, Rate},
    config::model::Operators,
    daemon::{Handle, Request},
    telemetry::Metrics,
};
use libfuzzer_sys::{Corpus, fuzz_target};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    runtime::Runtime,
    sync::{mpsc, watch},
};
use world::World;

/// Requests of one input.
const MOST_REQUESTS: usize = 8;
/// Largest answer: the description of the API is the largest there is.
const MOST_BYTES: usize = 1 << 20;

/// Sockets, and the agent behind them.
struct Agent {
    runtime: Runtime,
    /// The path of the listening socket, whose file is gone.
    socket: String,
    requests: mpsc::Receiver<Request>,
    world: World,
    _operators: watch::Sender<Operators>,
}

impl Agent {
    fn start() -> Self {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().expect("a runtime");
        let (operators, seen) = watch::channel(Operators::default());
        let (handle, requests) = Handle::channel(64);
        let rate = Rate { per_second: 1e9, burst: 1e9 };
        let limits = Limits { readers: rate, operators: rate, ..Limits::default() };
        let socket = {
            let _inside = runtime.enter();
            let dir = tempfile::tempdir().expect("a directory");
            let path = dir.path().join("agent.sock");
            let api = Api::new(handle, seen, Metrics::new()).with_limits(limits);
            let listener = ControlSocket::bind(&path).expect("a socket");
            runtime.spawn(api::serve_control(listener, api, std::future::pending()));
            // A fuzzer ends anywhere: nothing of it may stay. The socket is found by its descriptor.
            let by_itself = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path);
            let by_itself = std::mem::ManuallyDrop::new(by_itself.expect("it is there"));
            dir.close().expect("removed");
            format!("/proc/self/fd/{}", by_itself.as_raw_fd())
        };
        Self { runtime, socket, requests, world: World::begin(), _operators: operators }
    }

    /// What comes back for these bytes.
    fn exchange(&mut self, bytes: &[u8]) -> Vec<u8> {
        let Self { runtime, socket, requests, world, .. } = self;
        runtime.block_on(async {
            let mut client = std::pin::pin!(ask(socket, bytes));
            loop {
                tokio::select! {
                    biased;
                    Some(request) = requests.recv() => world.serve(request),
                    answer = &mut client => break answer,
                }
            }
        })
    }
}

async fn ask(socket: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).await.expect("connected");
    // The agent need not read what it refuses.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    while stream.read_buf(&mut answer).await.is_ok_and(|read| read > 0) {
        assert!(answer.len() < MOST_BYTES, "an answer without an end");
        // Events that are followed have none.
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap_or(0);
        if answer[..head].windows(8).any(|part| part == b"x-ndjson") {
            break;
        }
    }
    answer
}

/// An answer to a whole request: what it has to be.
fn check(line: &str, answer: &[u8], changed: bool) {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        assert!(answer.is_empty(), "{line}: {text}");
        return;
    };
    let status = head.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok());
    let status = status.unwrap_or_else(|| panic!("{line}: {head}"));
    match status {
        200 => {
            if head.contains("application/json") && !line.starts_with("HEAD ") {
                let json: Value = serde_json::from_str(body)
                    .unwrap_or_else(|error| panic!("{line}: {error}: {body}"));
                assert!(json["applied"] != Value::Bool(false) || !changed, "{line}: a dry run");
            }
        }
        // What is no HTTP is refused before there is anybody to say why.
        400 | 414 | 431 if body.is_empty() => assert!(!changed, "{line}: {head}"),
        // There is nobody here who makes reloads.
        400 | 404 | 405 | 409 | 413 | 422 | 503 => {
            assert!(!changed, "{line}: refused, and done: {text}");
            assert!(status != 503 || body.contains("\"stopping\""), "{line}: {text}");
            let json: Value = serde_json::from_str(body).unwrap_or_default();
            let said = json["error"]["message"].as_str().is_some_and(|said| !said.is_empty());
            assert!(said || line.starts_with("HEAD "), "{line}: {text}");
        }
        _ => panic!("{line}: {text}"),
    }
}

thread_local! {
    static AGENT: RefCell<Agent> = RefCell::new(Agent::start());
}

fuzz_target!(|bytes: &[u8]| -> Corpus {
    if bytes.split(|byte| *byte == 0).count() > MOST_REQUESTS {
        return Corpus::Reject;
    }
    AGENT.with_borrow_mut(|agent| {
        for request in bytes.split(|byte| *byte == 0) {
            if let Some(raw) = request.strip_prefix(b"RAW\n") {
                agent.exchange(raw);
                continue;
            }
            let mut parts = request.splitn(2, |byte| *byte == b'\n');
            let (line, body) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let mut whole = line.to_vec();
            let length = body.len();
            let head = format!(
                " HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
            );
            whole.extend_from_slice(head.as_bytes());
            whole.extend_from_slice(body);
            agent.world.changed = false;
            let answer = agent.exchange(&whole);
            check(&String::from_utf8_lossy(line), &answer, agent.world.changed);
        }
        if agent.world.is_used() {
            agent.world = World::begin();
        }
    });
    Corpus::Keep
});
