//! What the TCP listener keeps to itself.
//!
//! Whoever can reach it may read, and nobody knows who that is. So what is said there of people
//! who operate this agent (user ids, names, the reasons that they wrote) is for the control
//! socket alone, where the kernel says who reads; and so is what costs much to answer.

use std::sync::Arc;

use super::model::{Event, FreezeStatus, PendingStatus, Status};

/// Why a route is for the control socket alone, if it is.
pub(super) fn socket_only(path: &str) -> Option<&'static str> {
    let of_rollout = path.strip_prefix("/v1/rollouts/").and_then(|rest| rest.split_once('/'));
    match (path, of_rollout) {
        ("/v1/events", _) | (_, Some((_, "history"))) => Some("says who has done what"),
        _ if path.starts_with("/v1/audiences") || path.starts_with("/v1/clients/") => {
            Some("says which networks people have")
        }
        (_, Some((_, "plan"))) => Some("keeps a processor busy"),
        _ => None,
    }
}

/// A status without what it says of people: the very same where it says nothing.
pub(super) fn status(full: &Arc<Status>) -> Arc<Status> {
    if !of_people(full) {
        return Arc::clone(full);
    }
    let mut public = Status::clone(full);
    public.agent.frozen.iter_mut().for_each(freeze);
    public.services.iter_mut().filter_map(|service| service.frozen.as_mut()).for_each(freeze);
    for rollout in &mut public.rollouts {
        // An operator's words may stand there.
        rollout.reason = None;
    }
    for PendingStatus { change, left_seconds: _ } in &mut public.pending {
        let Event { uid, user, reason, .. } = change;
        (*uid, *user, *reason) = (None, None, None);
    }
    Arc::new(public)
}

fn of_people(full: &Status) -> bool {
    full.agent.frozen.is_some()
        || full.services.iter().any(|service| service.frozen.is_some())
        || full.rollouts.iter().any(|rollout| rollout.reason.is_some())
        || !full.pending.is_empty()
}

fn freeze(freeze: &mut FreezeStatus) {
    let FreezeStatus { reason, uid, revision: _, unix_ms: _ } = freeze;
    reason.clear();
    *uid = None;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{model::ServiceStatus, rollout::RolloutStatus};

    #[test]
    fn people_are_left_out_and_the_rest_stays() {
        let frozen = || {
            Some(FreezeStatus {
                reason: "Ada is ill".to_owned(),
                uid: Some(1001),
                revision: 7,
                unix_ms: 5,
            })
        };
        let mut full = Status::default();
        full.agent.frozen = frozen();
        full.services.push(ServiceStatus {
            name: "shop".to_owned(),
            frozen: frozen(),
            ..ServiceStatus::default()
        });
        let change = Event {
            uid: Some(1001),
            user: Some("ada".to_owned()),
            reason: Some("Ada is ill".to_owned()),
            text: "split".to_owned(),
            ..Event::default()
        };
        full.pending.push(PendingStatus { left_seconds: 9.0, change });
        let full = Arc::new(full);
        let public = serde_json::to_string(&*status(&full)).expect("JSON");
        for personal in ["Ada", "ada", "1001"] {
            assert!(!public.contains(personal), "{personal} in {public}");
        }
        for kept in ["shop", "\"revision\":7", "\"left_seconds\":9.0"] {
            assert!(public.contains(kept), "{kept} in {public}");
        }
    }

    #[test]
    fn whatever_alone_is_said_of_people_is_left_out() {
        let frozen = || Some(FreezeStatus { reason: "Ada".to_owned(), ..FreezeStatus::default() });
        let ways: [fn(&mut Status, Option<FreezeStatus>); 4] = [
            |full, frozen| full.agent.frozen = frozen,
            |full, frozen| {
                full.services.push(ServiceStatus { frozen, ..ServiceStatus::default() });
            },
            |full, _| {
                let reason = Some("Ada".to_owned());
                full.rollouts.push(RolloutStatus { reason, ..RolloutStatus::default() });
            },
            |full, _| {
                let change = Event { user: Some("Ada".to_owned()), ..Event::default() };
                full.pending.push(PendingStatus { left_seconds: 9.0, change });
            },
        ];
        for (nth, way) in ways.into_iter().enumerate() {
            let mut full = Status::default();
            way(&mut full, frozen());
            let of = |status: &Status| serde_json::to_string(status).expect("JSON");
            assert!(of(&full).contains("Ada"), "{nth}");
            assert!(!of(&status(&Arc::new(full))).contains("Ada"), "{nth}");
        }
    }

    #[test]
    fn where_nothing_is_said_of_people_it_is_the_same() {
        let mut full = Status::default();
        full.services.push(ServiceStatus::default());
        full.rollouts.push(RolloutStatus::default());
        let full = Arc::new(full);
        assert!(Arc::ptr_eq(&status(&full), &full));
    }
}
