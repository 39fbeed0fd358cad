//! The commands' side of the control socket.
//!
//! One connection for one request: a command asks once, and `--watch` must notice
//! an agent that was restarted.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use super::failure::{Failure, exit};
use crate::api::model::ErrorBody;

/// Until a connection is there.
const CONNECT: Duration = Duration::from_secs(3);
/// Until the answer is there: longer than the agent takes to say that it is late.
const ANSWER: Duration = Duration::from_secs(15);
/// The same for a reload.
const LONG_ANSWER: Duration = Duration::from_secs(125);
/// The largest answer that is read.
const ANSWER_BYTES: usize = 256 * 1024 * 1024;

/// A way to the agent.
#[derive(Clone, Debug)]
pub(super) struct Client {
    socket: PathBuf,
    /// Why the socket may be the wrong one.
    doubt: Option<String>,
}

/// The JSON of an answer.
#[derive(Clone, Debug)]
pub(super) struct Answer(Bytes);

impl Answer {
    /// As it came, without a line's end.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim_end().to_owned()
    }

    /// Read as `T`.
    ///
    /// # Errors
    /// `bad_answer`: whoever answered is no agent of about this version.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_slice(&self.0).map_err(|error| {
            bad_answer(format!("the agent's answer can't be read: {error}"))
                .help("is the agent of another version? compare `canary-agent --version`")
        })
    }
}

impl Client {
    /// A client for the agent behind `socket`; `doubt` is told when nobody is there.
    pub(super) fn new(socket: PathBuf, doubt: Option<String>) -> Self {
        Self { socket, doubt }
    }

    /// Where it connects to.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Reads `target`.
    ///
    /// # Errors
    /// The agent's own, or that it can't be reached.
    pub(super) async fn get(&self, target: &str) -> Result<Answer, Failure> {
        self.ask(Method::GET, target, Bytes::new()).await
    }

    /// Sends `body` to `target`.
    ///
    /// # Errors
    /// The agent's own, or that it can't be reached.
    pub(super) async fn put(&self, target: &str, body: &impl Serialize) -> Result<Answer, Failure> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
        self.ask(Method::PUT, target, body.into()).await
    }

    /// The same, as a request for something to be done.
    ///
    /// # Errors
    /// The agent's own, or that it can't be reached.
    pub(super) async fn post(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<Answer, Failure> {
        self.post_within(ANSWER, target, body).await
    }

    /// The same of something that may take its time.
    ///
    /// # Errors
    /// The agent's own, or that it can't be reached.
    pub(super) async fn post_long(
        &self,
        target: &str,
        body: &impl Serialize,
    ) -> Result<Answer, Failure> {
        self.post_within(LONG_ANSWER, target, body).await
    }

    async fn post_within(
        &self,
        limit: Duration,
        target: &str,
        body: &impl Serialize,
    ) -> Result<Answer, Failure> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
        self.ask_within(limit, Method::POST, target, body.into()).await
    }

    /// Reads `target`, whose answer goes on, and hands each line to `take`. Returns when the
    /// agent ends the answer.
    ///
    /// # Errors
    /// The agent's own, that it can't be reached or has gone, and those of `take`.
    pub(super) async fn lines(
        &self,
        target: &str,
        mut take: impl FnMut(&str) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let stream = self.connect().await?;
        let late = || {
            let socket = self.socket.display();
            let message = format!("the agent at {socket} has not answered within {ANSWER:?}");
            Failure::new("timeout", exit::UNREACHABLE, message)
        };
        let begun = timeout(ANSWER, self.begin(stream, Method::GET, target, Bytes::new())).await;
        let (status, mut body) = begun.map_err(|_| late())??;
        let mut line = Vec::new();
        if !status.is_success() {
            while let Some(Ok(frame)) = body.frame().await {
                line.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
            }
            return Err(self.error(status, &line));
        }
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.lost(&error))?;
            let Some(data) = frame.data_ref() else { continue };
            for part in data.split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(part);
                if line.ends_with(b"\n") {
                    take(String::from_utf8_lossy(&line).trim_end())?;
                    line.clear();
                }
            }
        }
        Ok(())
    }

    /// Whether anybody listens on the socket; in doubt, somebody does.
    pub(super) async fn is_anybody_there(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        match UnixStream::connect(&self.socket).await {
            Ok(_) => true,
            Err(error) => !matches!(error.kind(), ConnectionRefused | NotFound),
        }
    }

    async fn connect(&self) -> Result<UnixStream, Failure> {
        let connecting = async {
            loop {
                match UnixStream::connect(&self.socket).await {
                    // The agent's queue of new connections is full.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        sleep(Duration::from_millis(20)).await;
                    }
                    result => break result,
                }
            }
        };
        let result = timeout(CONNECT, connecting).await;
        let result = result.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        result.map_err(|error| self.unreachable(&error))
    }

    async fn ask(&self, method: Method, target: &str, body: Bytes) -> Result<Answer, Failure> {
        self.ask_within(ANSWER, method, target, body).await
    }

    async fn ask_within(
        &self,
        limit: Duration,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let stream = self.connect().await?;
        timeout(limit, self.exchange(stream, method, target, body)).await.unwrap_or_else(|_| {
            let message =
                format!("the agent at {} has not answered within {limit:?}", self.socket.display());
            Err(Failure::new("timeout", exit::UNREACHABLE, message)
                .help("a change that was asked for may still be carried out"))
        })
    }

    async fn exchange(
        &self,
        stream: UnixStream,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let (status, body) = self.begin(stream, method, target, body).await?;
        let body = Limited::new(body, ANSWER_BYTES)
            .collect()
            .await
            .map_err(|error| self.lost(&error))?
            .to_bytes();
        match status.is_success() {
            true => Ok(Answer(body)),
            false => Err(self.error(status, &body)),
        }
    }

    /// Asks, and returns when the answer begins.
    async fn begin(
        &self,
        stream: UnixStream,
        method: Method,
        target: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Incoming), Failure> {
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(&error))?;
        // It ends with the answer.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| self.lost(&error))?;
        Ok((response.status(), response.into_body()))
    }

    fn lost(&self, error: &dyn std::fmt::Display) -> Failure {
        let socket = self.socket.display();
        let message = format!("the connection to the agent at {socket} was lost: {error}");
        Failure::new("unreachable", exit::UNREACHABLE, message)
    }

    /// What an answer says that is an error.
    fn error(&self, status: StatusCode, body: &[u8]) -> Failure {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { error }) => error.into(),
            Err(_) => bad_answer(format!(
                "{} answers with {status} and no reason: it is no agent",
                self.socket.display()
            )),
        }
    }

    fn unreachable(&self, error: &io::Error) -> Failure {
        let socket = self.socket.display();
        if error.kind() == io::ErrorKind::PermissionDenied {
            let message = format!("you may not open the agent's socket {socket}: {error}");
            return Failure::new("not_permitted", exit::NOT_PERMITTED, message)
                .help("run this as root or as a member of the socket's group");
        }
        let message = format!("the agent can't be reached at {socket}: {error}");
        let doubt = self.doubt.as_deref().unwrap_or_default();
        Failure::new("unreachable", exit::UNREACHABLE, message).help(format!(
            "start it with `canary-agent run`, or name its socket with --socket{doubt}"
        ))
    }
}

fn bad_answer(message: String) -> Failure {
    Failure::new("bad_answer", exit::FAILED, message)
}

/// Text as a part of a target: everything but unreserved characters (RFC 3986
/// section 2.3) is percent-encoded.
pub(super) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_holds_any_name() {
        assert_eq!(encoded("shop-2.a_b~"), "shop-2.a_b~");
        assert_eq!(encoded("[::1]:80"), "%5B%3A%3A1%5D%3A80");
        assert_eq!(encoded("a/b?c ä"), "a%2Fb%3Fc%20%C3%A4");
    }
}
