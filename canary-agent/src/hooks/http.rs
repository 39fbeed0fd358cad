//! Requests to others: one connection each, HTTP/1.1, with TLS where the address says so.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Uri,
    client::conn::http1,
    header::{CONNECTION, CONTENT_TYPE, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use ring::hmac;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::OnceCell,
};
use tokio_rustls::rustls::pki_types::ServerName;

use crate::{
    config::model::{Secret, Tls},
    health::Secure,
};

const NAME: &str = concat!("canary-agent/", env!("CARGO_PKG_VERSION"), " (rollout)");
/// The header that carries the signature of a body.
pub(super) const SIGNATURE: &str = "x-canary-signature";
/// An answer is read no further than this.
const ANSWER_BYTES: usize = 1 << 20;

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Failure(String);

impl Failure {
    pub(super) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }

    pub(super) fn late(limit: Duration) -> Self {
        Self(format!("no answer within {}", humantime::format_duration(limit)))
    }
}

/// Makes requests. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Client {
    /// What the host trusts, read when it is first needed.
    secure: Arc<OnceCell<Secure>>,
}

impl Client {
    /// Sends JSON, and returns the status of the answer.
    pub(super) async fn post(
        &self,
        url: &str,
        body: Vec<u8>,
        secret: Option<&Secret>,
    ) -> Result<u16, Failure> {
        let signed = secret.map(|secret| signature(secret, &body));
        self.send(url, "application/json", body, signed).await.map(|(status, _)| status)
    }

    /// Sends a form, and returns the answer.
    pub(super) async fn form(&self, url: &str, body: Vec<u8>) -> Result<(u16, Bytes), Failure> {
        self.send(url, "application/x-www-form-urlencoded", body, None).await
    }

    async fn send(
        &self,
        url: &str,
        kind: &'static str,
        body: Vec<u8>,
        signed: Option<String>,
    ) -> Result<(u16, Bytes), Failure> {
        let uri: Uri = url.parse().map_err(|_| Failure::new("its address is none"))?;
        let secures = uri.scheme_str() == Some("https");
        let authority = uri.authority().ok_or_else(|| Failure::new("its address names no host"))?;
        let port = authority.port_u16().unwrap_or(if secures { 443 } else { 80 });
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let target = uri.path_and_query().map_or("/", |target| target.as_str());
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(target)
            .header(HOST, authority.as_str())
            .header(USER_AGENT, NAME)
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, kind);
        if let Some(signed) = signed {
            request = request.header(SIGNATURE, signed);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| Failure::new(error.to_string()))?;
        let failed = |error: io::Error| Failure::new(format!("no connection: {error}"));
        let stream = TcpStream::connect((host.as_str(), port)).await.map_err(failed)?;
        if !secures {
            return exchange(stream, request).await;
        }
        let name = ServerName::try_from(host)
            .map_err(|_| Failure::new("its address has no name that a certificate could have"))?;
        let secure = self.secure.get_or_try_init(trusted).await?;
        exchange(secure.connect(name, stream).await.map_err(failed)?, request).await
    }
}

/// TLS with the authorities that this host trusts.
async fn trusted() -> Result<Secure, Failure> {
    let read = tokio::task::spawn_blocking(|| rustls_native_certs::load_native_certs().certs);
    let authorities = read.await.unwrap_or_default();
    if authorities.is_empty() {
        return Err(Failure::new(
            "this host trusts no certificate authority: install ca-certificates",
        ));
    }
    Secure::new(&Tls::Verified(authorities.into())).map_err(|error| Failure::new(error.to_string()))
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(u16, Bytes), Failure> {
    let failed = |error: hyper::Error| Failure::new(format!("the connection was lost: {error}"));
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // It ends with whoever waits for the answer.
    let driver = Driver(tokio::spawn(async move { drop(connection.await) }));
    let answer = sender.send_request(request).await.map_err(failed)?;
    let status = answer.status().as_u16();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES)
        .collect()
        .await
        .map_err(|error| Failure::new(format!("its answer can't be read: {error}")))?;
    drop(driver);
    Ok((status, body.to_bytes()))
}

/// The task of a connection, ended with it.
struct Driver(tokio::task::JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// HMAC-SHA256 (RFC 2104) of a body, as the header has it.
pub(super) fn signature(Secret(secret): &Secret, body: &[u8]) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let tag = hmac::sign(&key, body);
    let hex: Vec<String> = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={}", hex.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_that_of_the_standard() {
        // RFC 4231, test case 2.
        let secret = Secret(b"Jefe".to_vec());
        assert_eq!(
            signature(&secret, b"what do ya want for nothing?"),
            "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }
}
