//! Checks of the backends: who answers, who does not, and since when.
//!
//! Owns the sockets of the checks, their pace and what came out of them. Must not
//! know of plans, maps or versions: it says which backends of a service are down,
//! `plan` decides what follows. Everything is about the network namespace of the
//! threads that the tokio runtime has.
//!
//! A check uses a source address and port that the kernel chooses, so it never takes
//! one of those that translated flows use ([`crate::resolve::reserve_ports`]), and
//! the program passes its answers to the host. That holds for those `via = "vip"` too,
//! which have a TCP of their own besides (`direct`).
//!
//! Each backend is checked at points in time of its own, computed from its service's
//! name and its address ([`Pace`]): thousands of them make no storm, at no time. The
//! work of a check that changes nothing ends here; only what goes up or down is
//! reported ([`Changes`]), and what flaps meanwhile is reported once.
//!
//! `checker` and `pace` are functions of plain values; `board` is the memory that
//! status reads; `probe`, `direct` and `task` are the shell.

mod board;
mod checker;
mod direct;
mod pace;
mod probe;
mod secure;
mod task;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit},
};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep_until},
};

use self::direct::Direct;
pub(crate) use self::secure::Secure;
pub use self::{
    board::{Report, Reports},
    checker::Checker,
    pace::Pace,
};
use crate::{config::model, plan::Tunnel, resolve::Update};

/// Changes within this time of the first are reported together.
const COALESCE: Duration = Duration::from_millis(20);
/// From one report to the next, so that backends that flap cost a tenth of the loop's time
/// at the very most where a plan takes 10 ms.
const REPORT_GAP: Duration = Duration::from_millis(100);
/// Checks at once, whatever the limit on open files.
const AT_ONCE: (u64, u64) = (64, 4096);

/// A backend of a service, and how it is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The service's name. A backend of two services is checked for each.
    pub service: Arc<str>,
    /// Address and port.
    pub addr: SocketAddr,
    /// How. With [`model::Health::None`] it is not checked at all.
    pub health: Arc<model::Health>,
    /// The service's addresses of its family, for checks `via = "vip"`: each has to be
    /// answered for.
    pub vips: Arc<[IpAddr]>,
    /// How packets are wrapped for it, for the same checks.
    pub tunnel: Option<Tunnel>,
    /// Whether it counts as down until it has passed often enough. Only for targets
    /// that are new; of the others the checks know better.
    pub down: bool,
}

/// What a check came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed, after this time.
    Passed(Duration),
    /// It failed.
    Failed(Failure),
    /// This host could not check: that says nothing about the backend.
    NotChecked(Errno),
}

/// Why a check failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The connection was refused, or there is no way to the backend.
    #[error("can't connect: {}", .0.desc())]
    Connect(Errno),
    /// No connection within the timeout.
    #[error("no connection within {}", humantime::format_duration(*.0))]
    NoConnection(Duration),
    /// A connection, but no whole head of an answer within the timeout.
    #[error("connected, but no answer within {}", humantime::format_duration(*.0))]
    NoAnswer(Duration),
    /// The connection broke.
    #[error("connected, but then: {}", .0.desc())]
    Broken(Errno),
    /// It was closed in good order, before there was a whole head of an answer.
    #[error("closed the connection without an answer")]
    Closed,
    /// Another status than those expected.
    #[error("answered with status {0}")]
    Status(u16),
    /// The answer's head is too large to be one.
    #[error("the head of its answer is larger than 8 KiB or has more than 100 fields")]
    TooLarge,
    /// The answer is something else.
    #[error("its answer is not HTTP/1")]
    NotHttp,
    /// No secure connection, or it broke: what the TLS library says.
    #[error("TLS: {0}")]
    Tls(Arc<str>),
    /// There is no way to send it a frame: why not.
    #[error("no next hop: {0}")]
    NoNextHop(Arc<str>),
    /// It failed at a VIP of the service.
    #[error("through the VIP {vip}: {failure}")]
    ThroughVip {
        /// Which.
        vip: IpAddr,
        /// Why.
        failure: Arc<Failure>,
    },
    /// The configured path can't be sent.
    #[error("`health.path` is not a request target")]
    Path,
}

/// A backend that has gone down or come up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The service's name.
    pub service: Arc<str>,
    /// Address and port.
    pub addr: SocketAddr,
    /// Whether it is down now.
    pub down: bool,
    /// Why it last failed.
    pub why: Option<Failure>,
}

/// Checks a set of backends until it is dropped.
///
/// ```no_run
/// use std::{sync::Arc, time::Duration};
///
/// use canary_agent::{
///     config::model::{Ask, Check, Health, Timing, Via},
///     health::{self, Prober, Target},
///     resolve::Resolver,
/// };
///
/// # async fn follow() -> Result<(), Box<dyn std::error::Error>> {
/// let timing = Timing {
///     interval: Duration::from_secs(2),
///     jitter_percent: 10,
///     timeout: Duration::from_secs(1),
///     rise: 2,
///     fall: 3,
/// };
/// // Only checks `via = "vip"` ask it.
/// let resolver = Resolver::start()?;
/// let prober = Prober::start(health::checks_at_once(), resolver.updates(), |addr, passed| {
///     println!("{addr} {} a check", if passed { "passed" } else { "failed" });
/// });
/// prober.set_targets(vec![Target {
///     service: "shop".into(),
///     addr: "10.0.1.1:8443".parse()?,
///     health: Arc::new(Health::Check(Check { ask: Ask::Tcp, via: Via::Backend, timing })),
///     vips: [].into(),
///     tunnel: None,
///     down: false,
/// }]);
/// let mut changes = prober.changes();
/// while let Some(changes) = changes.next().await {
///     for change in changes {
///         println!("{} is {}", change.addr, if change.down { "down" } else { "up" });
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Prober {
    targets: watch::Sender<Arc<Vec<Target>>>,
    reports: Reports,
    news: watch::Receiver<()>,
    task: AbortHandle,
}

impl Prober {
    /// Starts without a target. At most `at_once` checks are under way at a time; what is due
    /// beyond that waits. Checks `via = "vip"` go to the next hops in `hops`, by the backends'
    /// addresses. `on_check` is told of every check that passes (`true`) or fails, on a thread
    /// of the runtime: it must be quick.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(
        at_once: usize,
        hops: watch::Receiver<Update>,
        on_check: impl Fn(IpAddr, bool) + Send + 'static,
    ) -> Self {
        let (targets, wanted) = watch::channel(Arc::default());
        let (tell, news) = watch::channel(());
        let reports = Reports::default();
        let task = task::Task::new(
            at_once.max(1),
            wanted,
            reports.clone(),
            tell,
            Box::new(on_check),
            Direct::new(hops),
        );
        let task = tokio::spawn(task.run()).abort_handle();
        Self { targets, reports, news, task }
    }

    /// Replaces the targets. Those that stay keep what is known of them, also if they are
    /// checked in another way from now on; of those that go nothing more is reported.
    pub fn set_targets(&self, targets: Vec<Target>) {
        self.targets.send_replace(Arc::new(targets));
    }

    /// What is known of each target.
    pub fn reports(&self) -> Reports {
        self.reports.clone()
    }

    /// What goes up and down. To be taken once: of two, each change reaches only one.
    pub fn changes(&self) -> Changes {
        Changes { news: self.news.clone(), reports: self.reports.clone(), last: None }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What goes up and down, in batches.
#[derive(Debug)]
pub struct Changes {
    news: watch::Receiver<()>,
    reports: Reports,
    last: Option<Instant>,
}

impl Changes {
    /// The next batch: every backend at most once, with what it is by now. One that is again
    /// what it was is not in it. `None` when the prober is gone.
    ///
    /// Nothing is lost when the future is dropped before it is done.
    pub async fn next(&mut self) -> Option<Vec<Change>> {
        loop {
            if !self.reports.has_changes() {
                self.news.changed().await.ok()?;
            }
            let now = Instant::now();
            let gap = self.last.map_or(now, |last| last + REPORT_GAP);
            sleep_until(gap.max(now + COALESCE)).await;
            let changes = self.reports.take_changes();
            if !changes.is_empty() {
                self.last = Some(Instant::now());
                return Some(changes);
            }
        }
    }
}

/// How many checks may be under way at once: a quarter of the files that this process may
/// open, which is 256 where nobody has raised the usual limit.
pub fn checks_at_once() -> usize {
    let (least, most) = AT_ONCE;
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    usize::try_from((files / 4).clamp(least, most)).unwrap_or(usize::MAX)
}
