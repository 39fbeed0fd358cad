//! The split command: from what was typed to a proposal, or why not; and putting it in force.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use canary_ebpf_common::share::Share;

use super::{
    Kernel, Moment, Peer, Refusal, State,
    changes::{Terms, Thing},
    saving::refused,
    state::{changed, micros, tables_of},
};
use crate::{
    api::model::{ChangeReport, ShareChange, SplitRequest},
    plan::{BucketSet, Ownership, Planner, Proposal, ServiceState},
    store::{Change, Commit, Split, StateStore},
};

/// A name is suggested when it is at least this like what was typed (Jaro–Winkler).
const ALIKE: f64 = 0.75;

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Makes a split or says what it would do; also which buckets go elsewhere, by table.
    pub(super) fn split(
        &mut self,
        service: &str,
        request: &SplitRequest,
        peer: Peer,
        arrived: Instant,
        now: Moment,
    ) -> Result<(ChangeReport, Vec<BucketSet>), Refusal> {
        let (at, proposal) = propose(&self.planner, service, request)?;
        let within = self.split_terms(service, request, peer, now)?;
        let state = &self.planner.services()[at];
        self.thaw(state, &proposal)?;
        let before = state.ownership().clone();
        let mut report = report(state, &before, &proposal, &[]);
        let nothing = proposal.moved == 0 && proposal.ownership.split == before.split;
        let tables = tables_of(&self.planner, at);
        let counts = self.bucket_counts(at);
        let mut moved = vec![BucketSet::default(); tables.len()];
        if request.dry_run {
            let preview = self.planner.preview(at, Some(&proposal.ownership), &[]);
            report.backends_touched = preview.touched.iter().map(ToString::to_string).collect();
            moved = preview.moved;
        } else if nothing {
            report.applied = true;
        } else {
            let deadline = self.deadline(within, now);
            report.confirm_within_ms = deadline.as_ref().map(|deadline| deadline.within_ms);
            let commit = Commit {
                change: Change {
                    unix_ms: now.unix_ms,
                    uid: Some(peer.uid),
                    service: service.to_owned(),
                    action: "split".to_owned(),
                    reason: request.reason.clone(),
                    before: before.split,
                    after: proposal.ownership.split.clone(),
                    moved: proposal.change_list,
                    buckets_moved: proposal.moved,
                    slots: state.slots().to_vec(),
                    salt: Some(before.salt),
                    confirm_ms: report.confirm_within_ms,
                    ..Change::default()
                },
                record: Some(state.stored(&proposal.ownership)),
                deadline,
                settles: Vec::new(),
            };
            self.save(vec![commit], now)
                .map_err(|error| refused(&format!("the split of service `{service}`"), &error))?;
            self.planner.set_ownership(at, proposal.ownership);
            let started = Instant::now();
            self.settle_or_refuse(now)?;
            let settled = Instant::now();
            let touched;
            (touched, moved) = changed(&self.planner.services()[at], &tables);
            report.backends_touched = touched;
            report.applied = true;
            report.took_us = micros(settled.saturating_duration_since(arrived));
            // What was prepared was in force as quickly as any other when its time had come.
            let since = if request.learn { started } else { arrived };
            self.metrics.split_applied(settled.saturating_duration_since(since));
            let asked: Vec<String> =
                report.versions.iter().map(|v| format!("{}={}", v.name, v.asked)).collect();
            tracing::info!(
                service,
                revision = self.revision,
                uid = peer.uid,
                reason = request.reason.as_deref(),
                buckets_moved = report.buckets_moved,
                split = asked.join(" "),
                "the split has changed"
            );
        }
        report.revision = self.revision;
        if report.took_us == 0 {
            report.took_us = micros(arrived.elapsed());
        }
        if report.buckets_moved > 0 {
            let entries: Vec<_> = tables
                .iter()
                .zip(&counts)
                .map(|(table, counts)| (&*table.entries, &counts[..]))
                .collect();
            report.connections_per_second =
                self.connections_per_second(&entries, &moved, now.boot_ms);
        }
        Ok((report, moved))
    }

    /// Refuses a split on terms that don't hold, prepared or not.
    pub(super) fn split_terms(
        &mut self,
        service: &str,
        request: &SplitRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<Option<Duration>, Refusal> {
        let SplitRequest { reason, if_revision, confirm, .. } = request;
        let (reason, confirm) = (reason.as_deref(), confirm.as_deref());
        let terms = Terms { peer, reason, if_revision: *if_revision, confirm };
        self.terms(Some(service), &[Thing::Split(service)], &terms, now)
    }
}

/// What `request` asks of `service`, merged into its split and carried through.
pub(super) fn propose(
    planner: &Planner,
    service: &str,
    request: &SplitRequest,
) -> Result<(usize, Proposal), Refusal> {
    let SplitRequest { split: asked, .. } = request;
    let (at, state) = planner.service(service).ok_or_else(|| unknown_service(planner, service))?;
    if state.follows() {
        return Err(follows(state));
    }
    let mut split = state.ownership().split.clone();
    for (version, text) in asked {
        split.insert(version.clone(), share(state, version, text)?);
    }
    if !Share::fit_together(split.values().copied()) {
        return Err(above_whole(service, &split));
    }
    let proposal = state.propose(split).map_err(|error| Refusal {
        code: "split_impossible",
        message: format!("service `{service}`: {error}"),
        help: Some("leave control a larger share, or give the service more `buckets`".to_owned()),
        exit_code: 1,
    })?;
    Ok((at, proposal))
}

/// The share that `text` asks for `version`.
fn share(state: &ServiceState, version: &str, text: &str) -> Result<Share, Refusal> {
    let config = state.config();
    let service = &config.name;
    let names: Vec<&str> = config.versions.iter().map(|v| v.name.as_str()).collect();
    if !names.contains(&version) {
        return Err(Refusal {
            code: "unknown_version",
            message: format!("service `{service}` has no version `{version}`"),
            help: Some(suggestion(version, &names, "its versions are")),
            exit_code: 1,
        });
    }
    if config.versions[config.control].name == version {
        return Err(Refusal {
            code: "control_has_share",
            message: format!(
                "`{version}` is the control version of service `{service}`: it gets what the others leave"
            ),
            help: Some(format!("set the others, such as `canary-agent split {service} VERSION=0`")),
            exit_code: 1,
        });
    }
    if state.slot(version).is_none() {
        return Err(Refusal {
            code: "no_version_slot",
            message: format!(
                "version `{version}` of service `{service}` has to wait: versions that were removed still have \
                 connections, and a service has room for 16"
            ),
            help: Some("reload the configuration when they have drained".to_owned()),
            exit_code: 1,
        });
    }
    // Nothing is nothing in any unit.
    if text.trim() == "0" {
        return Ok(Share::ZERO);
    }
    text.parse().map_err(|error| Refusal {
        code: "bad_share",
        message: format!("version `{version}`: {error}"),
        help: Some(format!("such as `canary-agent split {service} {version}=5%`")),
        exit_code: 2,
    })
}

fn above_whole(service: &str, split: &Split) -> Refusal {
    let given: Vec<String> = split
        .iter()
        .filter(|(_, share)| **share != Share::ZERO)
        .map(|(version, share)| format!("{version}={share}"))
        .collect();
    Refusal {
        code: "shares_above_whole",
        message: format!(
            "the shares of service `{service}` are more than 100% together: {}",
            given.join(" ")
        ),
        help: Some(
            "versions that are not named keep their shares: lower one in the same command"
                .to_owned(),
        ),
        exit_code: 1,
    }
}

/// The table of an audience that only a rollout gives more than everyone has.
pub(super) fn follows(state: &ServiceState) -> Refusal {
    let config = state.config();
    let of = config.derived.as_ref();
    let (service, audience) = of.map_or(("", ""), |of| (&of.service, &of.audience));
    Refusal {
        code: "follows_service",
        message: format!(
            "`{}` has no split of its own: clients of `{audience}` have what everyone has in service \
             `{service}`, and what its rollout gives them more",
            config.name
        ),
        help: Some(format!(
            "say it of `{service}`; `canary-agent rollout abort` takes back what the rollout has given; a \
             `[[service.route]]` gives the audience a split of its own"
        )),
        exit_code: 1,
    }
}

/// No service has that name.
pub(super) fn unknown_service(planner: &Planner, name: &str) -> Refusal {
    let names: Vec<&str> = planner.services().iter().map(|s| s.config().name.as_str()).collect();
    Refusal {
        code: "unknown_service",
        message: format!("there is no service `{name}`"),
        help: Some(suggestion(name, &names, "there are")),
        exit_code: 1,
    }
}

/// The nearest of `names`, or a few of them.
pub(super) fn suggestion(name: &str, names: &[&str], they_are: &str) -> String {
    let like = |other: &str| strsim::jaro_winkler(&name.to_lowercase(), &other.to_lowercase());
    let nearest =
        names.iter().map(|other| (like(other), *other)).max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((alike, nearest)) if alike >= ALIKE => format!("did you mean `{nearest}`?"),
        _ => {
            let some: Vec<String> = names.iter().take(8).map(|n| format!("`{n}`")).collect();
            let more = if names.len() > some.len() { " …" } else { "" };
            format!("{they_are} {}{more}", some.join(", "))
        }
    }
}

/// What the change from `before` to `proposal` does, before it is done.
pub(super) fn report(
    state: &ServiceState,
    before: &Ownership,
    proposal: &Proposal,
    touched: &[SocketAddr],
) -> ChangeReport {
    let config = state.config();
    ChangeReport {
        applied: false,
        revision: 0,
        service: config.name.clone(),
        versions: shares(state, before, &proposal.ownership),
        buckets_moved: proposal.moved,
        backends_touched: touched.iter().map(ToString::to_string).collect(),
        connections_held: None,
        connections_per_second: None,
        notes: Vec::new(),
        learned_ms: None,
        confirm_within_ms: None,
        took_us: 0,
    }
}

/// The shares of a service's versions before a change and after it, control's first.
pub(super) fn shares(
    state: &ServiceState,
    before: &Ownership,
    after: &Ownership,
) -> Vec<ShareChange> {
    let config = state.config();
    let (had, has) = (before.counts(), after.counts());
    let total = f64::from(config.buckets);
    let control = &config.versions[config.control];
    let others = config.versions.iter().filter(|v| v.name != control.name);
    let change = |name: &str| {
        let slot = state.slot(name).map(usize::from);
        let fraction = |counts: &[u32]| slot.map_or(0.0, |slot| f64::from(counts[slot]) / total);
        ShareChange {
            name: name.to_owned(),
            asked: asked_text(state, after, name),
            before: fraction(&had),
            in_force: fraction(&has),
        }
    };
    std::iter::once(control).chain(others).map(|v| change(&v.name)).collect()
}

/// The asked share of a version as it was written; control's is what the others leave.
pub(super) fn asked_text(state: &ServiceState, ownership: &Ownership, version: &str) -> String {
    let config = state.config();
    if config.versions[config.control].name == version {
        let rest = asked_fraction(state, ownership, version) * 100.0;
        let text = format!("{rest:.9}");
        let text = text.trim_end_matches('0').trim_end_matches('.');
        return format!("{text}%");
    }
    ownership.split.get(version).copied().unwrap_or(Share::ZERO).to_string()
}

/// The asked share of a version as a fraction of 1.
pub(super) fn asked_fraction(state: &ServiceState, ownership: &Ownership, version: &str) -> f64 {
    let config = state.config();
    if config.versions[config.control].name == version {
        let others: f64 = ownership.split.values().map(|share| share.fraction()).sum();
        return (1.0 - others).clamp(0.0, 1.0);
    }
    ownership.split.get(version).map_or(0.0, |share| share.fraction())
}
