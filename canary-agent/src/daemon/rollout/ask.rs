//! What operators tell rollouts: on what terms, and what comes of it.

use std::{sync::Arc, time::Instant};

use canary_ebpf_common::{compile, share::Share};

use super::{ACTION, Active, at};
use crate::{
    api::rollout::{
        EvidenceRow, RolloutHistory, RolloutReport, RolloutRequest, RolloutRun, RolloutStatus,
    },
    config::{derived, model::Rollout},
    daemon::{
        Kernel, Moment, Peer, Refusal, State,
        changes::{Terms, Thing, frozen},
        saving,
        split::suggestion,
    },
    rollout::drive::{Ask, Record, Run, Stage, Told, Unfit, Wish, recipe},
    store::{Change, Commit, EvidenceLine, StateStore, StoredRollout},
};

/// So many runs of a rollout are told.
const RUNS: usize = 50;

/// What a rollout is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin.
    Start,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Leave out what is left of the step, or all steps but the last.
    Promote,
    /// End, with nothing left of its share.
    Abort,
    /// Begin the step again that was held, or the whole that was aborted.
    Retry,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Start, Self::Pause, Self::Resume, Self::Promote, Self::Abort, Self::Retry];

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Promote => "promote",
            Self::Abort => "abort",
            Self::Retry => "retry",
        }
    }
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Does what an operator says, or says what that would do.
    pub(in crate::daemon) fn ask_rollout(
        &mut self,
        name: &str,
        action: Action,
        request: &RolloutRequest,
        peer: Peer,
        (arrived, now): (Instant, Moment),
    ) -> Result<RolloutReport, Refusal> {
        if request.full && action != Action::Promote {
            return Err(Refusal {
                code: "bad_full",
                message: format!(
                    "`full` is of use with `promote` only, not with `{}`",
                    action.name()
                ),
                help: None,
                exit_code: 2,
            });
        }
        let config = self.rollouts.config(name).cloned();
        let active = self.rollouts.at(name);
        let service = match (active, &config) {
            (Some(at), _) => self.rollouts.active[at].run.position().service.clone(),
            (None, Some(config)) => config.service.clone(),
            (None, None) => return Err(self.unknown_rollout(name)),
        };
        if let Some(expected) = request.if_revision {
            self.refuse_stale(Some(&service), expected, now)?;
        }
        let begins = match (action, active) {
            (Action::Start, _) => true,
            (Action::Retry, None) => self.may_retry(name)?,
            _ => false,
        };
        let (text, ask) = if begins {
            let Some(config) = config else { return Err(self.unknown_rollout(name)) };
            self.start_rollout(&config, request, peer, now)?
        } else {
            let at = active.ok_or_else(|| self.not_under_way(name, action))?;
            self.tell_rollout(at, config, action, request, peer, now)?
        };
        if !request.dry_run {
            self.drive_rollouts(now);
        }
        Ok(RolloutReport {
            applied: !request.dry_run,
            revision: self.revision,
            text,
            audience: ask.as_ref().and_then(|ask| ask.audience.clone()),
            share: ask.map(|ask| ask.share.to_string()),
            change: None,
            rollout: self.rollout_status(name).unwrap_or_default(),
            warnings: Vec::new(),
            took_us: crate::daemon::state::micros(arrived.elapsed()),
        })
    }

    pub(super) fn unknown_rollout(&self, name: &str) -> Refusal {
        let names: Vec<&str> = self.rollouts.configured.iter().map(|r| r.name.as_str()).collect();
        Refusal {
            code: "unknown_rollout",
            message: format!("there is no rollout `{name}`"),
            help: Some(match names.is_empty() {
                true => "none is configured: write a `[[rollout]]` and reload".to_owned(),
                false => suggestion(name, &names, "there are"),
            }),
            exit_code: 1,
        }
    }

    fn not_under_way(&self, name: &str, action: Action) -> Refusal {
        let how = match self.rollouts.over.get(name) {
            Some((_, record)) => format!("it is {}", record.stage.name()),
            None => "it was never begun".to_owned(),
        };
        Refusal {
            code: "rollout_not_under_way",
            message: format!("rollout `{name}` can't be told to {}: {how}", action.name()),
            help: Some(format!("`canary-agent rollout start {name}` begins it")),
            exit_code: 1,
        }
    }

    /// Whether the last one of a name was aborted.
    fn may_retry(&self, name: &str) -> Result<bool, Refusal> {
        match self.rollouts.over.get(name) {
            Some((_, record)) if record.stage == Stage::Aborted => Ok(true),
            _ => Err(self.not_under_way(name, Action::Retry)),
        }
    }

    fn start_rollout(
        &mut self,
        config: &Arc<Rollout>,
        request: &RolloutRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<(String, Option<Ask>), Refusal> {
        let share = self.may_start(config, request, peer, now)?;
        let text =
            format!("rollout `{}` of `{}` begins: {}", config.name, config.to, recipe(config));
        let run = Run::start(config, share, self.revision, at(now));
        let next = next_share(&run, Some(config));
        if request.dry_run {
            return Ok((text + &self.would_move(run.position(), next.as_ref()), next));
        }
        self.line(&config.service, &config.name, Action::Start, request, peer, now)?;
        self.rollouts.over.remove(&config.name);
        self.rollouts.active.push(Active::new(None, run));
        let told = Told { kind: "started", text: recipe(config) };
        let wishes = vec![Wish::Save, Wish::Tell(told)];
        self.fulfil(self.rollouts.active.len() - 1, wishes, now);
        Ok((text, next))
    }

    /// What setting the share of an audience would move, in words.
    fn would_move(&self, record: &Record, ask: Option<&Ask>) -> String {
        let asked = ask.and_then(|ask| self.asked(record, ask));
        let Some((table, _, after)) = asked else { return String::new() };
        let state = &self.planner.services()[table];
        let before = state.ownership().owners.plain();
        let moved = compile::difference(&before, &after.owners.plain()).len();
        format!("; {moved} buckets of `{}` would move", state.config().name)
    }

    /// Refuses to begin what could not go on. Returns the share that the version has.
    fn may_start(
        &mut self,
        config: &Rollout,
        request: &RolloutRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<Share, Refusal> {
        let Rollout { name, service, to, steps, .. } = config;
        let refused = |code, message: String, help: String| Refusal {
            code,
            message,
            help: Some(help),
            exit_code: 1,
        };
        let mut others = self.rollouts.active.iter().map(|active| active.run.position());
        if let Some(Record { name: other, stage, .. }) = others.find(|one| one.service == *service)
        {
            return Err(refused(
                "rollout_under_way",
                format!("rollout `{other}` of service `{service}` is under way ({})", stage.name()),
                format!("one at a time: `canary-agent rollout abort {other}` ends it"),
            ));
        }
        let found = self.planner.service(service).filter(|(_, state)| state.slot(to).is_some());
        let Some((_, state)) = found else {
            return Err(refused(
                "no_version_slot",
                format!("version `{to}` of service `{service}` gets no connections yet"),
                "reload the configuration when versions that were removed have drained".to_owned(),
            ));
        };
        for audience in steps.iter().filter_map(|step| step.audience.as_ref()) {
            let table = self.planner.service(&derived::name(service, audience));
            if table.is_none_or(|(_, its)| !its.follows() || its.slot(to).is_none()) {
                return Err(refused(
                    "no_version_slot",
                    format!(
                        "version `{to}` of service `{service}` gets no connections of `{audience}` yet"
                    ),
                    "reload the configuration when what was removed has drained".to_owned(),
                ));
            }
        }
        let split = state.ownership().split.clone();
        if let Some(freeze) = self.control.frozen(service) {
            return Err(frozen(service, freeze));
        }
        let reason = request.reason.as_deref();
        let terms = Terms { peer, reason, if_revision: None, confirm: None };
        self.terms(Some(service), &[Thing::Split(service)], &terms, now)?;
        let has = split.get(to).copied().unwrap_or(Share::ZERO);
        let everyone = steps.iter().filter(|step| step.audience.is_none());
        let first = everyone.filter_map(|step| step.split).next().unwrap_or(Share::ZERO);
        if has > first {
            return Err(refused(
                "share_is_larger",
                format!("`{to}` has {has} already, and rollout `{name}` begins with {first}"),
                format!("take it back first: `canary-agent split {service} {to}=0`"),
            ));
        }
        for share in steps.iter().filter_map(|step| step.split) {
            let others =
                split.iter().filter(|(version, _)| *version != to).map(|(_, share)| *share);
            if !Share::fit_together(others.chain([share])) {
                let others: Vec<String> = split
                    .iter()
                    .filter(|(version, share)| *version != to && **share != Share::ZERO)
                    .map(|(version, share)| format!("{version}={share}"))
                    .collect();
                return Err(refused(
                    "shares_above_whole",
                    format!(
                        "rollout `{name}` goes up to {share}, and others have {}: more than 100% together",
                        others.join(" ")
                    ),
                    "take those back, or make the one with the most the `control` version and reload"
                        .to_owned(),
                ));
            }
        }
        Ok(has)
    }

    fn tell_rollout(
        &mut self,
        at: usize,
        config: Option<Arc<Rollout>>,
        action: Action,
        request: &RolloutRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<(String, Option<Ask>), Refusal> {
        let record = self.rollouts.active[at].run.position().clone();
        let reason = request.reason.as_deref();
        let mut run = self.rollouts.active[at].run.clone();
        let needed =
            || config.as_deref().ok_or_else(|| Unfit("it is not configured any more".to_owned()));
        let moment = super::at(now);
        let told = match action {
            Action::Start => Err(Unfit("it is under way already".to_owned())),
            Action::Pause => run.ask_pause(reason),
            Action::Resume => needed().and_then(|config| run.ask_resume(config, moment)),
            Action::Retry if record.stage != Stage::Held => Err(Unfit(format!(
                "it is {}: only what was held or aborted is tried again",
                record.stage.name()
            ))),
            Action::Retry => needed().and_then(|config| run.ask_resume(config, moment)),
            Action::Promote => {
                needed().and_then(|config| run.ask_promote(config, request.full, moment))
            }
            Action::Abort => run.ask_abort(reason, moment),
        };
        let wishes = told.map_err(|Unfit(why)| Refusal {
            code: "rollout_state",
            message: format!("rollout `{}`: {why}", record.name),
            help: Some(format!("`canary-agent rollout status {}` shows it", record.name)),
            exit_code: 1,
        })?;
        let mut text =
            format!("rollout `{}` at step {}: {}", record.name, record.step + 1, action.name());
        let more = record.audiences.iter().filter(|(_, share)| **share > record.shares[1]);
        let more: Vec<String> = more.map(|(name, share)| format!("`{name}` ({share})")).collect();
        if action == Action::Abort && !more.is_empty() {
            text.push_str(&format!("; what {} has goes back, too", more.join(", ")));
        }
        let [_, mine] = record.shares;
        let next = match action {
            Action::Abort => {
                let ask = Ask { audience: None, share: Share::ZERO };
                Some(ask).filter(|ask| ask.share != mine)
            }
            _ => next_share(&run, config.as_deref()),
        };
        if request.dry_run {
            return Ok((text + &self.would_move(run.position(), next.as_ref()), next));
        }
        if action == Action::Abort {
            // It waits for no disk.
            self.rollouts.active[at].run = run;
            self.rollouts.active[at].by = Some(peer.uid);
            self.fulfil(at, wishes, now);
            if let Err(refusal) =
                self.line(&record.service, &record.name, action, request, peer, now)
            {
                tracing::error!("{refusal}");
            }
            return Ok((text, next));
        }
        self.line(&record.service, &record.name, action, request, peer, now)?;
        self.rollouts.active[at].run = run;
        self.fulfil(at, wishes, now);
        Ok((text, next))
    }

    /// Who has told a rollout what: a line of the audit trail that moves nothing.
    fn line(
        &mut self,
        service: &str,
        name: &str,
        action: Action,
        request: &RolloutRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<(), Refusal> {
        let full = if request.full { " --full" } else { "" };
        let split = self.planner.service(service).map(|(_, state)| &state.ownership().split);
        let split = split.cloned().unwrap_or_default();
        let change = Change {
            unix_ms: now.unix_ms,
            uid: Some(peer.uid),
            service: service.to_owned(),
            action: format!("{ACTION} {}{full}", action.name()),
            reason: Some(match &request.reason {
                Some(reason) => format!("{name}: {reason}"),
                None => name.to_owned(),
            }),
            before: split.clone(),
            after: split,
            ..Change::default()
        };
        let commit = Commit { change, record: None, deadline: None, settles: Vec::new() };
        self.save(vec![commit], now)
            .map_err(|error| saving::refused(&format!("rollout `{name}`"), &error))?;
        tracing::info!(
            rollout = name,
            uid = peer.uid,
            reason = request.reason,
            "{}",
            action.name()
        );
        Ok(())
    }

    /// The runs of a rollout.
    pub(in crate::daemon) fn rollout_history(
        &mut self,
        name: &str,
        evidence: bool,
    ) -> Result<RolloutHistory, Refusal> {
        for at in 0..self.rollouts.active.len() {
            if self.rollouts.active[at].run.position().name == name {
                let now = crate::daemon::run::moment().ok();
                if let Some(now) = now {
                    self.keep_rollout(at, false, now);
                }
            }
        }
        let unread = |error: crate::store::StoreError| Refusal {
            code: "state_not_read",
            message: format!("what was kept of rollouts can't be read: {error}"),
            help: Some("look at the agent's log".to_owned()),
            exit_code: 1,
        };
        let stored = self.store.rollouts(name, RUNS).map_err(unread)?;
        if stored.is_empty() && self.rollouts.config(name).is_none() {
            return Err(self.unknown_rollout(name));
        }
        let mut runs = Vec::new();
        for StoredRollout { number, record, begun_unix_ms, ended_unix_ms, .. } in stored {
            let Ok(record) = serde_json::from_str::<Record>(&record) else { continue };
            let run = number.unwrap_or_default();
            let lines = match evidence {
                true => self.store.evidence(run).map_err(unread)?,
                false => Vec::new(),
            };
            runs.push(RolloutRun {
                run,
                state: record.stage.name().to_owned(),
                step: u32::try_from(record.step + 1).unwrap_or(u32::MAX),
                recipe: record.recipe,
                reason: record.reason,
                begun_unix_ms,
                ended_unix_ms,
                evidence: lines.into_iter().map(evidence_row).collect(),
            });
        }
        Ok(RolloutHistory { name: name.to_owned(), runs })
    }

    /// One rollout as it stands.
    fn rollout_status(&self, name: &str) -> Option<RolloutStatus> {
        self.rollout_statuses().into_iter().find(|status| status.name == name)
    }
}

/// The share that a rollout is about to set, if that is another one.
fn next_share(run: &Run, config: Option<&Rollout>) -> Option<Ask> {
    let entering = run.stage() == Stage::Entering;
    config.filter(|_| entering).and_then(|config| run.next_ask(config, run.position().step))
}

fn evidence_row(line: EvidenceLine) -> EvidenceRow {
    let EvidenceLine { rollout: _, step, unix_ms, window_ms, signal, share, .. } = line;
    let EvidenceLine { events, connections, answer, .. } = line;
    EvidenceRow {
        step: step + 1,
        unix_ms,
        window: window_ms as f64 / 1e3,
        signal,
        share,
        control: events.map(|[control, _]| control),
        canary: events.map(|[_, canary]| canary),
        connections,
        answer,
    }
}
