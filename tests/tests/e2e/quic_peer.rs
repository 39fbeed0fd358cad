//! A QUIC server on each backend, and clients that hold their connections open.
//!
//! A server answers each stream with its name, a newline and what it got. Those of `v2`
//! validate addresses by a Retry first (RFC 9000, 8.1.2).

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use canary_tests::{netns::Namespace, topology::Host};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{sync::watch, task::JoinSet};

/// Port of the servers.
pub(crate) const QUIC_PORT: u16 = 443;

/// The name in their certificate.
const NAME: &str = "quic.test";

/// Largest request and answer in bytes.
const MOST: usize = 1 << 20;

/// How long a handshake or an answer may take: a moved connection would never get one.
const PATIENCE: Duration = Duration::from_secs(10);

/// What servers and clients of one test share: a certificate that they make and trust.
pub(crate) struct Trust {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Trust {
    /// A new one.
    pub(crate) fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).expect("a key");
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        Self { certificate: made.cert.der().clone(), key }
    }

    fn server(&self) -> ServerConfig {
        let tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .expect("a certificate");
        let quic = QuicServerConfig::try_from(tls).expect("a cipher for Initial packets");
        ServerConfig::with_crypto(Arc::new(quic))
    }

    fn client(&self) -> ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a certificate");
        let tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let quic = QuicClientConfig::try_from(tls).expect("a cipher for Initial packets");
        ClientConfig::new(Arc::new(quic))
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The server of one backend, on all its addresses; stopped on drop.
pub(crate) struct QuicServer {
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl QuicServer {
    #[track_caller]
    pub(crate) fn start(host: &Host, trust: &Trust) -> Self {
        let (name, addrs, config) = (host.name.clone(), host.addrs(), trust.server());
        let retries = host.version == "v2";
        let (stop, mut stopped) = watch::channel(());
        let (report, started) = mpsc::channel();
        let thread = host.namespace.spawn_thread(&host.name, move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("no runtime");
            runtime.block_on(async {
                let mut tasks = JoinSet::new();
                for addr in addrs {
                    // A socket for each address: answers come from where the packet went to.
                    let addr = SocketAddr::new(addr, QUIC_PORT);
                    let endpoint = Endpoint::server(config.clone(), addr).expect("a socket");
                    tasks.spawn(serve(endpoint, name.clone(), retries));
                }
                report.send(()).expect("a test that waits");
                let _ = stopped.changed().await;
                tasks.shutdown().await;
            });
        });
        started.recv().unwrap_or_else(|_| panic!("{}: the server did not start", host.name));
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for QuicServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A server that panicked has said so; its clients have noticed.
            let _ = thread.join();
        }
    }
}

async fn serve(endpoint: Endpoint, name: String, retries: bool) {
    let mut connections = JoinSet::new();
    while let Some(incoming) = endpoint.accept().await {
        if retries && !incoming.remote_address_validated() {
            // It can't be refused: the address is not validated yet.
            let _ = incoming.retry();
        } else {
            connections.spawn(converse(incoming, name.clone()));
        }
    }
}

/// Answers streams until the client goes; what goes wrong, the client sees.
async fn converse(incoming: Incoming, name: String) {
    let Ok(connection) = incoming.await else { return };
    while let Ok((mut out, mut request)) = connection.accept_bi().await {
        let Ok(got) = request.read_to_end(MOST).await else { return };
        let answer = [name.as_bytes(), b"\n", &got].concat();
        if out.write_all(&answer).await.is_err() || out.finish().is_err() {
            return;
        }
    }
}

/// Clients of one namespace: a thread with a runtime, which lives as long as the value.
pub(crate) struct QuicClients<'a> {
    namespace: &'a Namespace,
    runtime: tokio::runtime::Runtime,
    config: ClientConfig,
}

/// An open connection from a socket of its own, and the server that it began on.
pub(crate) struct QuicConnection {
    connection: Connection,
    _endpoint: Endpoint,
    pub(crate) server: String,
}

impl<'a> QuicClients<'a> {
    pub(crate) fn new(namespace: &'a Namespace, trust: &Trust) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("no runtime");
        Self { namespace, runtime, config: trust.client() }
    }

    /// Opens a connection from `source` and asks who is there.
    #[track_caller]
    pub(crate) fn open(&self, source: SocketAddr, to: SocketAddr) -> QuicConnection {
        let socket = self.namespace.run(|| UdpSocket::bind(source)).expect("a socket");
        let opened = self.runtime.block_on(async {
            let runtime = Arc::new(TokioRuntime);
            let endpoint = Endpoint::new(EndpointConfig::default(), None, socket, runtime)
                .map_err(|e| e.to_string())?;
            let connecting =
                endpoint.connect_with(self.config.clone(), to, NAME).map_err(|e| e.to_string())?;
            let connection = tokio::time::timeout(PATIENCE, connecting)
                .await
                .map_err(|_| "no handshake".to_owned())?
                .map_err(|e| e.to_string())?;
            let server = ask(&connection, b"who are you?").await?;
            Ok::<_, String>(QuicConnection { connection, _endpoint: endpoint, server })
        });
        opened.unwrap_or_else(|error| panic!("{source} to {to}: {error}"))
    }

    /// Sends `payload` on a new stream of the connection; returns the server's name.
    pub(crate) fn ask(&self, on: &QuicConnection, payload: &[u8]) -> Result<String, String> {
        self.runtime.block_on(ask(&on.connection, payload))
    }
}

async fn ask(connection: &Connection, payload: &[u8]) -> Result<String, String> {
    let asked = async {
        let (mut out, mut answer) = connection.open_bi().await.map_err(|e| e.to_string())?;
        out.write_all(payload).await.map_err(|e| e.to_string())?;
        out.finish().map_err(|e| e.to_string())?;
        answer.read_to_end(MOST + 64).await.map_err(|e| e.to_string())
    };
    let got = tokio::time::timeout(PATIENCE, asked).await.map_err(|_| "no answer".to_owned())??;
    match got.iter().position(|byte| *byte == b'\n') {
        Some(end) if &got[end + 1..] == payload => {
            Ok(String::from_utf8_lossy(&got[..end]).into_owned())
        }
        _ => Err("other bytes came back".to_owned()),
    }
}
