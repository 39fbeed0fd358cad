//! Rollouts as answers have them.

use std::time::Duration;

use super::Active;
use crate::{
    api::rollout::{
        GateStatus, ProbeStatus, RolloutAudience, RolloutStatus, RolloutStep, SignalStatus,
    },
    config::model::Rollout,
    daemon::{Kernel, State},
    rollout::{
        drive::{Record, Stage},
        gate::Verdict,
        watch::{Answer, Watch},
    },
    store::StateStore,
};

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Whether there is one under way.
    pub(in crate::daemon) fn has_rollouts(&self) -> bool {
        !self.rollouts.active.is_empty()
    }

    /// All rollouts, as they stand.
    pub(in crate::daemon) fn rollout_statuses(&self) -> Vec<RolloutStatus> {
        let rollouts = &self.rollouts;
        let configured = rollouts.configured.iter().map(|config| {
            match (rollouts.at(&config.name), rollouts.over.get(&config.name)) {
                (Some(at), _) => under_way(&rollouts.active[at], Some(config)),
                (None, Some((number, record))) => of_record(record, *number, Some(config)),
                (None, None) => RolloutStatus {
                    name: config.name.clone(),
                    service: config.service.clone(),
                    to: config.to.clone(),
                    state: "idle".to_owned(),
                    steps: steps(config, None),
                    ..RolloutStatus::default()
                },
            }
        });
        let gone = rollouts
            .active
            .iter()
            .filter(|active| rollouts.config(&active.run.position().name).is_none());
        configured.chain(gone.map(|active| under_way(active, None))).collect()
    }
}

fn under_way(active: &Active, config: Option<&std::sync::Arc<Rollout>>) -> RolloutStatus {
    let Active { number, run, .. } = active;
    let record = run.position();
    let status = of_record(record, *number, config);
    let asks = config.is_some_and(|config| run.asks_operator(config));
    let hold = config.and_then(|config| config.steps.get(record.step)).and_then(|step| step.hold);
    let left = hold
        .map(|hold| hold.saturating_sub(Duration::from_millis(record.watched_ms)).as_secs_f64());
    RolloutStatus {
        needs_operator: matches!(record.stage, Stage::Paused | Stage::Held) || asks,
        waits: run.waits().map(str::to_owned),
        left_seconds: left.filter(|_| record.stage == Stage::Watching),
        gate: run.watch().map(gate),
        ..status
    }
}

fn of_record(
    record: &Record,
    number: Option<u64>,
    config: Option<&std::sync::Arc<Rollout>>,
) -> RolloutStatus {
    // What it has come to its end by, if that is still what is configured.
    let step = config.and_then(|config| config.steps.get(record.step));
    let ended = step.and_then(|step| step.gate.as_ref()).zip(record.evidence.clone());
    let ended = ended.filter(|_| record.stage == Stage::Aborted);
    RolloutStatus {
        gate: ended.and_then(|(gate, kept)| Watch::resume(gate, kept).ok()).as_ref().map(gate),
        name: record.name.clone(),
        service: record.service.clone(),
        to: record.to.clone(),
        state: record.stage.name().to_owned(),
        step: u32::try_from(record.step + 1).ok(),
        steps: config.map_or_else(Vec::new, |config| steps(config, Some(record))),
        share: Some(record.shares[1].to_string()),
        audiences: record
            .audiences
            .keys()
            .map(|name| RolloutAudience {
                audience: name.clone(),
                share: record.share_of(Some(name)).to_string(),
            })
            .collect(),
        reason: record.reason.clone(),
        run: number,
        begun_unix_ms: Some(record.begun_unix_ms),
        step_unix_ms: Some(record.step_unix_ms),
        ended_unix_ms: record.ended_unix_ms,
        watched_seconds: record.watched_ms as f64 / 1e3,
        ..RolloutStatus::default()
    }
}

fn steps(config: &Rollout, record: Option<&Record>) -> Vec<RolloutStep> {
    let state = |at: usize| match record {
        Some(record) if record.stage == Stage::Completed || at < record.step => "done",
        Some(record) if at == record.step && record.stage == Stage::Aborted => "ended",
        Some(record) if at == record.step => "current",
        _ => "to come",
    };
    let all = config.steps.iter().enumerate();
    all.map(|(at, step)| RolloutStep {
        audience: step.audience.clone(),
        split: step.split.map(|share| share.to_string()),
        hold_seconds: step.hold.map(|hold| hold.as_secs_f64()),
        gate: step.gate.as_ref().map(|gate| gate.name.clone()),
        pause: step.pause,
        state: state(at).to_owned(),
    })
    .collect()
}

fn gate(watch: &Watch) -> GateStatus {
    let (kept, gate) = (watch.kept(), watch.gate());
    let signals = gate.signals().iter().zip(&gate.progress().signals);
    let probes = watch.probes().zip(&kept.heard);
    GateStatus {
        name: watch.config().name.clone(),
        elapsed_seconds: kept.elapsed_ms as f64 / 1e3,
        min_duration_seconds: gate.min_duration().as_secs_f64(),
        deadline_seconds: gate.deadline().as_secs_f64(),
        verdict: kept.verdict.map(|verdict| word(verdict).to_owned()),
        because: kept.because.clone(),
        ln_fail_at: gate.ln_fail_at(),
        ln_pass_at: gate.ln_pass_at(),
        signals: signals
            .map(|(terms, seen)| SignalStatus {
                name: terms.kind.name().to_owned(),
                observe: terms.observe,
                control_events: seen.control_events,
                canary_events: seen.canary_events,
                ln_fail: seen.fail.ln(),
                ln_pass: seen.pass.ln(),
            })
            .collect(),
        probes: probes
            .map(|(probe, heard)| ProbeStatus {
                kind: probe.ask.kind().to_owned(),
                asked: heard.asked.clone(),
                observe: probe.observe,
                good: heard.good,
                bad: heard.bad,
                unanswered: heard.unanswered,
                row: heard.row,
                rise: probe.rise,
                fall: probe.fall,
                last: heard.last.as_ref().map(|last| last.word().to_owned()),
                last_text: heard.last.as_ref().map(Answer::text).map(str::to_owned),
            })
            .collect(),
    }
}

const fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Fail => "fail",
        Verdict::Pass => "pass",
        Verdict::Inconclusive => "inconclusive",
        Verdict::NoData => "no_data",
    }
}
