//! The agent's HTTP API over its control socket, without a process for each request.

use std::{
    io::{self, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde::de::DeserializeOwned;

use crate::http;

/// How long an answer may take: longer than any of the agent's own limits.
const PATIENCE: Duration = Duration::from_secs(30);

/// A keep-alive connection to the control socket.
#[derive(Debug)]
pub struct Control {
    stream: BufReader<UnixStream>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// It is none of this type.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}", String::from_utf8_lossy(&self.body)))
    }
}

impl Control {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn open(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// The connection itself.
    pub fn stream(&self) -> &UnixStream {
        self.stream.get_ref()
    }

    /// Sends bytes, just as they are.
    ///
    /// # Errors
    /// The connection's.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_ref().write_all(bytes)
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// The connection's, or this is no HTTP.
    pub fn answer(&mut self) -> io::Result<Answer> {
        let head = http::read_head(&mut self.stream)?;
        let mut body = vec![0; usize::try_from(head.length).map_err(io::Error::other)?];
        self.stream.read_exact(&mut body)?;
        Ok(Answer { status: head.status, body })
    }

    /// Sends a request with a JSON body and reads its answer.
    ///
    /// # Errors
    /// The connection's.
    pub fn ask(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Answer> {
        // One write, so that the agent is not made to wait for the rest.
        let mut request = format!(
            "{method} {target} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.send(&request)?;
        self.answer()
    }
}
