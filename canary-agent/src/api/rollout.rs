//! What goes over the socket about rollouts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::ChangeReport;

/// `POST /v1/rollouts/{name}/{action}`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RolloutRequest {
    /// `promote` only: to the last share at once.
    #[serde(default)]
    pub full: bool,
    /// Kept in the audit trail.
    #[serde(default)]
    pub reason: Option<String>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// Only if the service has not changed since this revision.
    #[serde(default)]
    pub if_revision: Option<u64>,
}

/// The answer to [`RolloutRequest`], asked for or carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct RolloutReport {
    /// Whether it was carried out (not a dry run).
    pub applied: bool,
    /// Number of the last change to the live state.
    pub revision: u64,
    /// What is, or would be, done, in a sentence.
    pub text: String,
    /// The audience that the share is of; absent for everyone's.
    #[serde(default)]
    pub audience: Option<String>,
    /// The share that its version is, or would be, given for it; absent where that stays.
    #[serde(default)]
    pub share: Option<String>,
    /// Only said what would happen: what that share would move. Absent where it stays, or where
    /// nobody could set it now.
    #[serde(default)]
    pub change: Option<ChangeReport>,
    /// How the rollout stands.
    pub rollout: RolloutStatus,
    /// Begun: what its gates can't do at the present rate of connections, in sentences.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Microseconds from the request's arrival until it was in force.
    pub took_us: u64,
}

/// `GET /v1/rollouts`, `rollout status --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Rollouts {
    /// In the order of the configuration; those that are not configured any more, last.
    pub rollouts: Vec<RolloutStatus>,
}

/// One rollout: how it stands, or how the last one of its name ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RolloutStatus {
    /// Its name.
    pub name: String,
    /// The service.
    pub service: String,
    /// The version whose share it moves.
    pub to: String,
    /// `idle` (never begun), `entering`, `watching`, `paused`, `held`, `completed` or `aborted`.
    pub state: String,
    /// Whether it goes no further before an operator has said something.
    pub needs_operator: bool,
    /// The step, from 1; absent for one that was never begun.
    pub step: Option<u32>,
    /// All of them.
    pub steps: Vec<RolloutStep>,
    /// The share that it has set, as written.
    pub share: Option<String>,
    /// What audiences have of which a step has set the share, never less than everyone.
    #[serde(default)]
    pub audiences: Vec<RolloutAudience>,
    /// What it waits for.
    pub waits: Option<String>,
    /// Why it stands where it stands.
    pub reason: Option<String>,
    /// The number of this run.
    pub run: Option<u64>,
    /// When it began, in milliseconds since 1970.
    pub begun_unix_ms: Option<u64>,
    /// When its step began.
    pub step_unix_ms: Option<u64>,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// Seconds of this step that were watched.
    pub watched_seconds: f64,
    /// Seconds that the step lasts at least from now on.
    pub left_seconds: Option<f64>,
    /// The gate of its step at work, or as it was when it was aborted.
    pub gate: Option<GateStatus>,
}

/// An audience of a [`RolloutStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RolloutAudience {
    /// Its name.
    pub audience: String,
    /// The share that its clients have by now, as written.
    pub share: String,
}

/// One step of a [`RolloutStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RolloutStep {
    /// Whose share it sets; absent for everyone's.
    #[serde(default)]
    pub audience: Option<String>,
    /// The share that it sets, as written.
    pub split: Option<String>,
    /// Seconds that it lasts at least.
    pub hold_seconds: Option<f64>,
    /// The gate that has to pass.
    pub gate: Option<String>,
    /// Whether it waits for an operator.
    pub pause: bool,
    /// `done`, `current`, `to come`, or `ended` for the one in which it was aborted.
    pub state: String,
}

/// A gate at work, of a [`RolloutStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GateStatus {
    /// Its name.
    pub name: String,
    /// Seconds since it began, without those in which nobody watched.
    pub elapsed_seconds: f64,
    /// Before that it does not pass.
    pub min_duration_seconds: f64,
    /// Then it decides no more.
    pub deadline_seconds: f64,
    /// `pass`, `fail`, `inconclusive` or `no_data`; absent as long as there is none.
    pub verdict: Option<String>,
    /// What the verdict goes by.
    pub because: Option<String>,
    /// What a counted signal's `ln_fail` must reach.
    pub ln_fail_at: f64,
    /// What every deciding one's `ln_pass` must reach.
    pub ln_pass_at: f64,
    /// What is counted.
    pub signals: Vec<SignalStatus>,
    /// Who is asked.
    pub probes: Vec<ProbeStatus>,
}

/// A counted signal of a [`GateStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SignalStatus {
    /// Its name.
    pub name: String,
    /// Whether it is only shown.
    pub observe: bool,
    /// Bad events on control.
    pub control_events: u64,
    /// Bad events on the canary.
    pub canary_events: u64,
    /// The natural logarithm of the evidence that the canary is worse.
    pub ln_fail: f64,
    /// The same that it is better than what would be too bad.
    pub ln_pass: f64,
}

/// One who is asked, of a [`GateStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProbeStatus {
    /// `prometheus`, `command` or `webhook`.
    pub kind: String,
    /// Who, and what is asked.
    pub asked: String,
    /// Whether it is only shown.
    pub observe: bool,
    /// Good answers.
    pub good: u64,
    /// Bad answers.
    pub bad: u64,
    /// Times without an answer.
    pub unanswered: u64,
    /// Good answers in a row; bad ones are below 0.
    pub row: i64,
    /// Good answers in a row that let it pass.
    pub rise: u32,
    /// Bad answers in a row that fail it.
    pub fall: u32,
    /// `good`, `bad` or `no answer`; absent before the first.
    pub last: Option<String>,
    /// What was said last.
    pub last_text: Option<String>,
}

/// `GET /v1/rollouts/{name}/history`, `rollout history --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct RolloutHistory {
    /// The rollout's name.
    pub name: String,
    /// Its runs, the newest first.
    pub runs: Vec<RolloutRun>,
}

/// One run of a [`RolloutHistory`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct RolloutRun {
    /// Its number.
    pub run: u64,
    /// How it stands, or ended.
    pub state: String,
    /// The step, from 1.
    pub step: u32,
    /// What its steps were.
    pub recipe: String,
    /// Why it stands where it stands.
    pub reason: Option<String>,
    /// When it began, in milliseconds since 1970.
    pub begun_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// What it went by, the oldest first; only where it was asked for.
    pub evidence: Vec<EvidenceRow>,
}

/// A line of evidence of a [`RolloutRun`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct EvidenceRow {
    /// The step, from 1.
    pub step: u32,
    /// The end of the window, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The same in seconds since the gate began: `window` of a recording.
    pub window: f64,
    /// What was counted, or who was asked.
    pub signal: String,
    /// Counted: the canary's share.
    pub share: Option<f64>,
    /// Counted: bad events on control.
    pub control: Option<u64>,
    /// Counted: bad events on the canary.
    pub canary: Option<u64>,
    /// Counted: connections of control that were watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// Asked: what was answered.
    pub answer: Option<String>,
}
