//! The one loop that owns the state, and the handle by which others reach it.

mod audiences;
mod backends;
mod changes;
mod explain;
mod health;
mod held;
mod interfaces;
mod learn;
mod listing;
pub mod lock;
mod members;
mod memory;
mod notify;
pub(crate) mod panic;
mod pressure;
mod reload;
mod rollout;
mod run;
mod saving;
pub mod signals;
mod split;
mod state;
mod status;
mod sweep;
mod tally;

use std::{net::IpAddr, sync::Arc, time::Instant};

use tokio::sync::{mpsc, oneshot};

pub use self::{
    changes::{EventsAsked, EventsFound},
    held::Counter,
    reload::{Order, Planned, ReloadError, Reloaded, Survey},
    rollout::{Action, Prospect},
    run::run,
    state::{AttachError, Attachment, BeginError, Event, Kernel, LinkStates, Moment, State},
};

use crate::{
    api::{
        audience::{AudienceStatus, Audiences, ClientReport, MembersReport, MembersRequest},
        model::{
            BackendReport, BackendRequest, Backends, ChangeReport, ConfirmReport, ConfirmRequest,
            Explain, FreezeReport, FreezeRequest, SplitRequest, Status, UndoReport, UndoRequest,
        },
        panic::{PanicReport, PanicRequest},
        reload::{ReloadReport, ReloadRequest},
        rollout::{RolloutHistory, RolloutReport, RolloutRequest},
    },
    config::Config,
};

pub(crate) use self::run::moment;

/// Who asks, as the kernel says (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Process id; absent where the kernel does not tell.
    pub pid: Option<i32>,
}

/// What `explain` is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainQuery {
    /// The client, `ADDRESS` or `ADDRESS:PORT`.
    pub from: String,
    /// `ADDRESS:PORT` of the service; its first of the client's family when left out.
    pub to: Option<String>,
    /// `tcp` or `udp`; the service's first port when left out.
    pub protocol: Option<String>,
}

/// A request that the loop answers.
#[derive(Debug)]
pub enum Request {
    /// The whole status.
    Status {
        /// Where the answer goes.
        reply: oneshot::Sender<Status>,
    },
    /// Sets a split.
    Split {
        /// The service's name.
        service: String,
        /// What is asked.
        request: SplitRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<ChangeReport, Refusal>>,
    },
    /// A service's backends.
    Backends {
        /// The service's name.
        service: String,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Backends, Refusal>>,
    },
    /// Tells a backend to be ready, to drain, or to take nothing.
    Backend {
        /// The service's name.
        service: String,
        /// Address and port, or an address that only one backend has.
        backend: String,
        /// What is asked.
        request: BackendRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<BackendReport, Refusal>>,
    },
    /// Takes changes back.
    Undo {
        /// What is asked.
        request: UndoRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<UndoReport, Refusal>>,
    },
    /// Keeps what waits for a confirmation.
    Confirm {
        /// What is asked.
        request: ConfirmRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<ConfirmReport, Refusal>>,
    },
    /// Lets a service, or all, be changed towards control only, or ends that.
    Freeze {
        /// What is asked.
        request: FreezeRequest,
        /// Whether it is to be frozen, or no more.
        freezes: bool,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<FreezeReport, Refusal>>,
    },
    /// Sends everything of a service, or of all, to control.
    Panic {
        /// What is asked.
        request: PanicRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<PanicReport, Refusal>>,
    },
    /// Tells a rollout something.
    Rollout {
        /// The rollout's name.
        name: String,
        /// What.
        action: Action,
        /// On what terms.
        request: RolloutRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<RolloutReport, Refusal>>,
    },
    /// The runs of a rollout.
    RolloutHistory {
        /// The rollout's name.
        name: String,
        /// With all that they went by.
        evidence: bool,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<RolloutHistory, Refusal>>,
    },
    /// What is known of a rollout before it begins.
    Prospect {
        /// The rollout's name.
        name: String,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Prospect, Refusal>>,
    },
    /// All audiences.
    Audiences {
        /// Where the answer goes.
        reply: oneshot::Sender<Audiences>,
    },
    /// One audience.
    Audience {
        /// Its name.
        name: String,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<AudienceStatus, Refusal>>,
    },
    /// Adds members to an audience, renews them and takes them out.
    Members {
        /// The audience's name.
        audience: String,
        /// What is asked.
        request: MembersRequest,
        /// Who asks.
        peer: Peer,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<MembersReport, Refusal>>,
    },
    /// What a client is.
    Client {
        /// Its address.
        address: IpAddr,
        /// Where the answer goes.
        reply: oneshot::Sender<ClientReport>,
    },
    /// What has happened.
    Events {
        /// What of it.
        asked: EventsAsked,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<EventsFound, Refusal>>,
    },
    /// What a reload of a configuration is planned from.
    Survey {
        /// The configuration.
        config: Arc<Config>,
        /// Nothing may have changed since.
        if_revision: Option<u64>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Survey, Refusal>>,
    },
    /// Puts a plan for another configuration in force.
    Reload {
        /// The plan.
        order: Box<Order>,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Reloaded, Refusal>>,
    },
    /// A sign of life.
    Pulse {
        /// Where the answer goes.
        reply: oneshot::Sender<Pulse>,
    },
    /// Says where a client's connections go.
    Explain {
        /// The service's name.
        service: String,
        /// What is asked.
        query: ExplainQuery,
        /// Where the answer goes.
        reply: oneshot::Sender<Result<Explain, Refusal>>,
    },
}

/// How the loop does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// The present plan is in the maps.
    pub in_force: bool,
    /// On how many interfaces the program is to be.
    pub interfaces: usize,
    /// On how many of them it is.
    pub attached: usize,
}

impl Pulse {
    /// Whether packets are steered as they should be: on one interface at least, unless the
    /// configuration names none.
    pub fn is_steering(self) -> bool {
        self.in_force && (self.attached > 0 || self.interfaces == 0)
    }
}

/// A request that was not carried out; nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A word for programs, such as `unknown_service`.
    pub code: &'static str,
    /// The thing and the reason.
    pub message: String,
    /// The next step.
    pub help: Option<String>,
    /// The exit code that a command ends with.
    pub exit_code: u8,
}

/// The way to the loop. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    /// Absent where there are no files to read again.
    reloads: Option<mpsc::Sender<reload::Asked>>,
}

impl Handle {
    /// A handle and the end of the channel that the loop reads.
    pub fn channel(depth: usize) -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(depth);
        (Self { requests, reloads: None }, receiver)
    }

    /// The same with a way to whoever makes reloads.
    fn with_reloads(self, reloads: mpsc::Sender<reload::Asked>) -> Self {
        Self { reloads: Some(reloads), ..self }
    }

    /// Goes on with what the configuration files say by now, or says what that would change.
    /// `peer` is `None` for a signal.
    ///
    /// # Errors
    /// Everything that is wrong with the files; or what can't be done, or would break
    /// connections. Nothing has changed then.
    pub async fn reload(
        &self,
        request: ReloadRequest,
        peer: Option<Peer>,
    ) -> Result<ReloadReport, ReloadError> {
        let Some(reloads) = &self.reloads else { return Err(stopping().into()) };
        let (reply, answer) = oneshot::channel();
        let asked = reload::Asked { request, peer, arrived: Instant::now(), reply };
        reloads.send(asked).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    async fn survey(
        &self,
        config: Arc<Config>,
        if_revision: Option<u64>,
    ) -> Result<Survey, Refusal> {
        self.ask(|reply| Request::Survey { config, if_revision, reply }).await?
    }

    async fn put_in_force(&self, order: Order) -> Result<Reloaded, Refusal> {
        self.ask(|reply| Request::Reload { order: Box::new(order), reply }).await?
    }

    /// A sign of life from the loop.
    ///
    /// # Errors
    /// [`Refusal`] `stopping` when the loop has ended.
    pub async fn pulse(&self) -> Result<Pulse, Refusal> {
        self.ask(|reply| Request::Pulse { reply }).await
    }

    /// The status of everything.
    ///
    /// # Errors
    /// [`Refusal`] `stopping` when the loop has ended.
    pub async fn status(&self) -> Result<Status, Refusal> {
        self.ask(|reply| Request::Status { reply }).await
    }

    /// Sets a split, or says what setting it would do.
    ///
    /// # Errors
    /// What the loop refuses: an unknown service or version, shares that are
    /// none or too many, state that can't be stored.
    pub async fn split(
        &self,
        service: String,
        request: SplitRequest,
        peer: Peer,
    ) -> Result<ChangeReport, Refusal> {
        self.ask(|reply| Request::Split { service, request, peer, reply }).await?
    }

    /// A service's backends, with their open connections as far as they are known.
    ///
    /// # Errors
    /// An unknown service.
    pub async fn backends(&self, service: String) -> Result<Backends, Refusal> {
        self.ask(|reply| Request::Backends { service, reply }).await?
    }

    /// Tells a backend to be ready, to drain, or to take nothing; or says what that would do.
    ///
    /// # Errors
    /// What the loop refuses: an unknown service or backend, the last backend of control,
    /// state that can't be stored.
    pub async fn backend(
        &self,
        service: String,
        backend: String,
        request: BackendRequest,
        peer: Peer,
    ) -> Result<BackendReport, Refusal> {
        self.ask(|reply| Request::Backend { service, backend, request, peer, reply }).await?
    }

    /// Takes changes back, or says what that would do.
    ///
    /// # Errors
    /// What the loop refuses: nothing to take back, a configuration in between, state that
    /// can't be stored.
    pub async fn undo(&self, request: UndoRequest, peer: Peer) -> Result<UndoReport, Refusal> {
        self.ask(|reply| Request::Undo { request, peer, reply }).await?
    }

    /// Keeps what waits for a confirmation, or says what that would be.
    ///
    /// # Errors
    /// Nothing waits, or several changes do; state that can't be stored.
    pub async fn confirm(
        &self,
        request: ConfirmRequest,
        peer: Peer,
    ) -> Result<ConfirmReport, Refusal> {
        self.ask(|reply| Request::Confirm { request, peer, reply }).await?
    }

    /// Freezes or unfreezes a service or all of them, or says what that would do.
    ///
    /// # Errors
    /// An unknown service, no reason, nothing that is frozen; state that can't be stored.
    pub async fn freeze(
        &self,
        request: FreezeRequest,
        freezes: bool,
        peer: Peer,
    ) -> Result<FreezeReport, Refusal> {
        self.ask(|reply| Request::Freeze { request, freezes, peer, reply }).await?
    }

    /// Sends everything of a service or of all to control, or says what that would do.
    ///
    /// # Errors
    /// An unknown service; control without a backend that takes new connections.
    pub async fn panic(&self, request: PanicRequest, peer: Peer) -> Result<PanicReport, Refusal> {
        self.ask(|reply| Request::Panic { request, peer, reply }).await?
    }

    /// Tells a rollout something, or says what that would do.
    ///
    /// # Errors
    /// An unknown rollout, or one that stands otherwise; state that can't be stored.
    pub async fn rollout(
        &self,
        name: String,
        action: Action,
        request: RolloutRequest,
        peer: Peer,
    ) -> Result<RolloutReport, Refusal> {
        self.ask(|reply| Request::Rollout { name, action, request, peer, reply }).await?
    }

    /// The runs of a rollout, the newest first.
    ///
    /// # Errors
    /// An unknown rollout; state that can't be read.
    pub async fn rollout_history(
        &self,
        name: String,
        evidence: bool,
    ) -> Result<RolloutHistory, Refusal> {
        self.ask(|reply| Request::RolloutHistory { name, evidence, reply }).await?
    }

    /// What is known of a rollout before it begins.
    ///
    /// # Errors
    /// An unknown rollout.
    pub async fn prospect(&self, name: String) -> Result<Prospect, Refusal> {
        self.ask(|reply| Request::Prospect { name, reply }).await?
    }

    /// All audiences.
    ///
    /// # Errors
    /// [`Refusal`] `stopping` when the loop has ended.
    pub async fn audiences(&self) -> Result<Audiences, Refusal> {
        self.ask(|reply| Request::Audiences { reply }).await
    }

    /// One audience, with a few of its networks.
    ///
    /// # Errors
    /// An unknown audience.
    pub async fn audience(&self, name: String) -> Result<AudienceStatus, Refusal> {
        self.ask(|reply| Request::Audience { name, reply }).await?
    }

    /// Adds members to an audience, renews them and takes them out; or says what that would do.
    ///
    /// # Errors
    /// An unknown audience or one without members, what is no member, no room; state that can't
    /// be stored.
    pub async fn members(
        &self,
        audience: String,
        request: MembersRequest,
        peer: Peer,
    ) -> Result<MembersReport, Refusal> {
        self.ask(|reply| Request::Members { audience, request, peer, reply }).await?
    }

    /// What a client is.
    ///
    /// # Errors
    /// [`Refusal`] `stopping` when the loop has ended.
    pub async fn client(&self, address: IpAddr) -> Result<ClientReport, Refusal> {
        self.ask(|reply| Request::Client { address, reply }).await
    }

    /// What has happened.
    ///
    /// # Errors
    /// An unknown service, a time that is none; a trail that can't be read.
    pub async fn events(&self, asked: EventsAsked) -> Result<EventsFound, Refusal> {
        self.ask(|reply| Request::Events { asked, reply }).await?
    }

    /// Says where a client's connections go, and why.
    ///
    /// # Errors
    /// An unknown service, or a client or destination that is no address of it.
    pub async fn explain(&self, service: String, query: ExplainQuery) -> Result<Explain, Refusal> {
        self.ask(|reply| Request::Explain { service, query, reply }).await?
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    }
}

fn stopping() -> Refusal {
    Refusal {
        code: "stopping",
        message: "the agent is stopping".to_owned(),
        help: None,
        exit_code: 5,
    }
}
