//! What a rollout's gates would find, reckoned beside the loop.
//!
//! Reckoning takes up to seconds of a processor, so only one is made at a time, on a thread behind
//! all that handles requests, and it ends early when nobody waits for it any more.

use std::{collections::HashMap, sync::Arc, thread, time::Duration};

use axum::http::StatusCode;
use canary_ebpf_common::share::Share;
use tokio::{
    sync::{Semaphore, oneshot},
    time::timeout,
};

use super::{
    Api,
    error::{ApiError, exit},
    extract::Query,
};
use crate::{
    config::model::{Signal, SignalKind},
    daemon::Prospect,
    rollout::outlook::{self, Known, Outlook, Source, Usual, outlook},
};

/// How long the answer to a rollout's beginning may be kept for what is to be said of its gates.
const WARN_WITHIN: Duration = Duration::from_secs(5);
/// Priority of the thread, as nice(2) counts.
const NICE: libc::c_int = 5;
/// Connections a second that nobody has.
const MOST_PER_SECOND: f64 = 1e9;

/// One at a time.
#[derive(Clone, Debug)]
pub(super) struct Plans(Arc<Semaphore>);

impl Default for Plans {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

/// What is to be reckoned with instead of what the agent knows.
#[derive(Debug, Default)]
pub(super) struct Instead {
    per_second: Option<f64>,
    usual: HashMap<SignalKind, f64>,
}

impl Instead {
    /// From `rate` and `usual` of a query.
    ///
    /// # Errors
    /// They are none, or there are other keys.
    pub(super) fn read(mut query: Query) -> Result<Self, ApiError> {
        let (rate, usual) = (query.take("rate"), query.take("usual"));
        query.finish(&["rate", "usual"])?;
        let bad =
            |message: String, help: &str| ApiError::bad_request("bad_query", message).help(help);
        let per_second = match rate {
            None => None,
            Some(text) => {
                let rate = text.parse::<f64>().ok();
                let rate = rate.filter(|rate| *rate > 0.0 && *rate <= MOST_PER_SECOND);
                Some(rate.ok_or_else(|| {
                    bad(
                        format!("`rate` should be connections a second, above 0, not `{text}`"),
                        "for instance `200` or `0.5`",
                    )
                })?)
            }
        };
        let mut all = HashMap::new();
        for item in usual.iter().flat_map(|usual| usual.split(',')) {
            let (name, share) = item.split_once('=').ok_or_else(|| {
                bad(
                    format!("`usual` should be signals with their shares, not `{item}`"),
                    "for instance `connect_failed=0.2%`, several of them with commas",
                )
            })?;
            let kind = SignalKind::ALL.into_iter().find(|kind| kind.name() == name.trim());
            let kind = kind.ok_or_else(|| {
                let names = SignalKind::ALL.map(SignalKind::name).join(", ");
                bad(format!("there is no signal `{name}`"), &format!("there are {names}"))
            })?;
            let share = share.trim().parse::<Share>();
            let share = share.map_err(|error| error.to_string()).map(Share::fraction);
            let share = match share {
                Ok(share) if share > 0.0 => share,
                Ok(_) => {
                    let message = format!("`{name}` never happens then: no gate can go by it");
                    return Err(bad(message, "a share above 0, for instance `0.01%`"));
                }
                Err(why) => return Err(bad(format!("`{name}`: {why}"), "of the connections")),
            };
            if all.insert(kind, share).is_some() {
                return Err(bad(format!("`usual` has `{name}` twice"), "once is enough"));
            }
        }
        Ok(Self { per_second, usual: all })
    }
}

/// What a rollout's gates would find.
///
/// # Errors
/// An unknown rollout; no connections that could be reckoned with.
pub(super) async fn plan(api: &Api, name: String, instead: Instead) -> Result<Outlook, ApiError> {
    let prospect = api.handle.prospect(name.clone()).await?;
    let Instead { per_second, usual } = instead;
    let (rate, source) = match (per_second, prospect.per_second) {
        (Some(rate), _) => (rate, Source::Asked),
        (None, Some(rate)) if rate > 0.0 => (rate, Source::Counted),
        (None, known) if counts(&prospect) => return Err(no_traffic(&prospect, known)),
        (None, _) => (0.0, Source::Counted),
    };
    let usual = usual.into_iter().map(|(kind, rate)| (kind, Usual { rate, source: Source::Asked }));
    let mut known = known(prospect, rate);
    known.usual.extend(usual);
    reckon(api, &name, move |waited_for| outlook(&known, source, waited_for)).await
}

/// What to warn of about a rollout that begins. Nothing if that would take too long.
pub(super) async fn warnings(api: &Api, name: &str) -> Vec<String> {
    let Ok(prospect) = api.handle.prospect(name.to_owned()).await else { return Vec::new() };
    let rate = match prospect.per_second.filter(|rate| *rate > 0.0) {
        Some(rate) => rate,
        None if counts(&prospect) => {
            return vec![format!(
                "no connections came over the last seconds, so it is not known what its gates can find: \
                 `canary-agent plan {name} --rate NUMBER` reckons with others"
            )];
        }
        None => 0.0,
    };
    let known = known(prospect, rate);
    let reckoned = reckon(api, name, move |waited_for| outlook::warnings(&known, waited_for));
    timeout(WARN_WITHIN, reckoned).await.ok().and_then(Result::ok).unwrap_or_default()
}

/// Whether it goes by what connections do, so that it matters how many there are.
fn counts(prospect: &Prospect) -> bool {
    let gates = prospect.rollout.steps.iter().filter_map(|step| step.gate.as_ref());
    gates.flat_map(|gate| &gate.signals).any(Signal::decides_by_counts)
}

fn known(prospect: Prospect, per_second: f64) -> Known {
    let Prospect { rollout, per_second: _, audiences, others, watched_at_most, usual } = prospect;
    Known { rollout, per_second, audiences, others, watched_at_most, usual }
}

fn no_traffic(prospect: &Prospect, known: Option<f64>) -> ApiError {
    let service = &prospect.rollout.service;
    let message = match known {
        Some(_) => format!("service `{service}` has had no new connection over the last seconds"),
        None => format!("it is not known yet how many connections service `{service}` has"),
    };
    ApiError::new(StatusCode::CONFLICT, "no_traffic", exit::FAILED, message).help(format!(
        "say what to reckon with, in new connections a second: `canary-agent plan {} --rate 200`",
        prospect.rollout.name
    ))
}

/// Has something reckoned on the thread; it is given a way to ask whether that is waited for.
async fn reckon<T: Send + 'static>(
    api: &Api,
    rollout: &str,
    work: impl FnOnce(&dyn Fn() -> bool) -> Option<T> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |why: &str| {
        let message = format!("the gates of `{rollout}` can't be reckoned: {why}");
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "failed", exit::FAILED, message)
    };
    let Ok(_one) = Arc::clone(&api.plans.0).acquire_owned().await else {
        return Err(failed("the agent is stopping"));
    };
    let (reply, answer) = oneshot::channel();
    let thread = thread::Builder::new().name("plan".to_owned()).spawn(move || {
        // Of this thread alone. Where it is refused, it takes its turn like all else.
        // SAFETY: no memory is involved.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
        if let Some(found) = work(&|| !reply.is_closed()) {
            drop(reply.send(found));
        }
    });
    if let Err(error) = thread {
        return Err(failed(&error.to_string()));
    }
    answer.await.map_err(|_| failed("its thread has ended"))
}
