//! A little HTTP server for tests: what is called there, and what it answers.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::netns::Namespace;

/// A call that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its target.
    pub path: String,
    /// Its fields, names in lower case.
    pub fields: Vec<(String, String)>,
    /// Its body.
    pub body: String,
    /// The status that it was answered with; 0 for nothing.
    pub status: u16,
    /// When that was.
    pub answered: Instant,
}

impl Call {
    /// The value of a field.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }
}

/// What it answers to everything: a status, or (0) nothing at all.
#[derive(Debug)]
struct Shared {
    status: AtomicU16,
    stop: AtomicBool,
    calls: Mutex<VecDeque<Call>>,
}

/// A server in a namespace; it ends on drop.
#[derive(Debug)]
pub struct Called {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Called {
    /// Starts one on the namespace's loopback.
    ///
    /// # Panics
    /// It can't listen.
    #[track_caller]
    pub fn start(namespace: &Namespace, status: u16) -> Self {
        let listener =
            namespace.run(|| TcpListener::bind("127.0.0.1:0")).expect("a port on the loopback");
        let addr = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            status: AtomicU16::new(status),
            stop: AtomicBool::new(false),
            calls: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        listener.set_nonblocking(true).expect("a listener");
        let thread = thread::spawn(move || {
            // Connections that get no answer stay open.
            let mut held = Vec::new();
            while !theirs.stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => held.extend(theirs.serve(stream)),
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Self { addr, shared, thread: Some(thread) }
    }

    /// `http://ADDRESS:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// What it answers from now on; 0 for nothing.
    pub fn answer(&self, status: u16) {
        self.shared.status.store(status, Ordering::Relaxed);
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.calls.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl Shared {
    /// Reads a request and answers it. Returns a connection that is to hang.
    fn serve(&self, stream: TcpStream) -> Option<TcpStream> {
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let path = line.split(' ').nth(1)?.to_owned();
        let mut fields = Vec::new();
        loop {
            line.clear();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            fields.push((name.to_lowercase(), value.trim().to_owned()));
        }
        let length = fields.iter().find(|(name, _)| name == "content-length");
        let length: usize = length.and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length.min(1 << 20)];
        reader.read_exact(&mut body).ok()?;
        let body = String::from_utf8_lossy(&body).into_owned();
        let status = self.status.load(Ordering::Relaxed);
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.push_back(Call { path, fields, body, status, answered: Instant::now() });
        drop(calls);
        let mut stream = reader.into_inner();
        if status == 0 {
            return Some(stream);
        }
        let answer =
            format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        let _ = stream.write_all(answer.as_bytes());
        None
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
