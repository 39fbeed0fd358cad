//! The control socket and the TCP listener: HTTP/1.1 and JSON under `/v1`.
//!
//! Owns sockets, connections, limits, who may ask what, and the shape of answers.
//! Must not know of maps, of plans or of the configuration's files: everything it
//! says it has from the loop, over [`crate::daemon::Handle`].
//!
//! What a client can do to the agent is bounded here: connections, time for each
//! part of a request and of its answer, size of a body, how often a peer asks, and how often
//! the loop is asked for a status ([`Limits`]).

pub mod audience;
mod deadline;
mod error;
mod events;
mod extract;
mod host;
pub mod model;
mod openapi;
pub mod panic;
mod peer;
mod plan;
mod public;
mod rate;
pub mod reload;
pub mod rollout;
mod routes;
mod senders;
mod server;
mod snapshot;
mod socket;

use std::sync::Arc;

use tokio::{net::TcpListener, sync::watch};

use self::{
    events::Users,
    peer::Identity,
    snapshot::{Snapshot, Snapshots},
};
pub use self::{
    rate::Rate,
    server::Limits,
    socket::{ControlSocket, SocketError},
};
use crate::{
    config::model::Operators,
    daemon::{Handle, Refusal},
    telemetry::Metrics,
};

/// What the routes work with. Cheap to clone; clones share their snapshots.
///
/// ```
/// use canary_agent::{
///     api::{self, Api, ControlSocket},
///     config::model::Operators,
///     daemon::Handle,
///     telemetry::Metrics,
/// };
/// use tokio::sync::watch;
///
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("agent.sock");
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// let (handle, _requests) = Handle::channel(64);
/// let (_reload, operators) = watch::channel(Operators::default());
/// let api = Api::new(handle, operators, Metrics::new());
/// let socket = ControlSocket::bind(&path)?;
/// let stop = async {}; // here: at once
/// api::serve_control(socket, api, stop).await;
/// assert!(!path.exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Api {
    handle: Handle,
    operators: watch::Receiver<Operators>,
    metrics: Metrics,
    limits: Limits,
    snapshots: Arc<Snapshots>,
    plans: plan::Plans,
    users: Arc<Users>,
    agent_uid: u32,
    host_name: Arc<str>,
}

impl Api {
    /// The routes to `handle`. Changes are permitted to the last of `operators`.
    pub fn new(handle: Handle, operators: watch::Receiver<Operators>, metrics: Metrics) -> Self {
        let host_name = nix::sys::utsname::uname()
            .map(|names| names.nodename().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self {
            handle,
            operators,
            metrics,
            limits: Limits::default(),
            snapshots: Arc::default(),
            plans: plan::Plans::default(),
            users: Arc::default(),
            agent_uid: nix::unistd::geteuid().as_raw(),
            host_name: host_name.into(),
        }
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    fn may_change(&self, identity: &Identity) -> bool {
        identity.may_change(self.agent_uid, &self.operators.borrow())
    }

    async fn snapshot(&self) -> Result<Arc<Snapshot>, Refusal> {
        self.snapshots.take(&self.handle).await
    }
}

/// Serves the control socket until `stop` is done, then removes it.
///
/// Open requests are finished within [`Limits::stop`].
pub async fn serve_control(socket: ControlSocket, api: Api, stop: impl Future<Output = ()>) {
    server::serve(socket, routes::control(api.clone()), api, stop).await;
}

/// Serves `agent.listen` until `stop` is done: reading only, and only for
/// requests that name this host ([`Api`] knows its name).
///
/// Open requests are finished within [`Limits::stop`].
pub async fn serve_read_only(listener: TcpListener, api: Api, stop: impl Future<Output = ()>) {
    server::serve(listener, routes::read_only_routes(api.clone()), api, stop).await;
}
