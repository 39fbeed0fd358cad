//! What is kept of a rollout, over restarts.

use std::collections::BTreeMap;

use canary_ebpf_common::share::Share;
use serde::{Deserialize, Serialize};

use crate::{
    config::model::Rollout,
    rollout::{sample_ratio::SampleRatio, watch::Kept},
};

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// A step's share is to be set.
    Entering,
    /// It is set, and the step goes on.
    Watching,
    /// An operator has stopped it, or something that only an operator can judge.
    Paused,
    /// A verdict has stopped it.
    Held,
    /// Its last step is done.
    Completed,
    /// The version has no share any more.
    Aborted,
}

impl Stage {
    /// Whether it goes no further.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Aborted)
    }

    /// The word for it in answers and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Entering => "entering",
            Self::Watching => "watching",
            Self::Paused => "paused",
            Self::Held => "held",
            Self::Completed => "completed",
            Self::Aborted => "aborted",
        }
    }
}

/// What a slow handshake is, for as long as a rollout lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slow {
    /// The part of control's handshakes that was quicker, in thousandths.
    pub permille: u16,
    /// It takes longer than this, nanoseconds.
    pub over_ns: u64,
}

/// All that is kept of a rollout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// The service.
    pub service: String,
    /// The version.
    pub to: String,
    /// What its steps were when it began, in words: whether they are others by now.
    pub recipe: String,
    /// Where it stands.
    pub stage: Stage,
    /// The step, from 0.
    pub step: usize,
    /// The share that the version had before, and that it has by now.
    #[serde(with = "shares")]
    pub shares: [Share; 2],
    /// What audiences have of their own by now; those that have no more than everyone may be left out.
    #[serde(default, with = "by_audience", skip_serializing_if = "BTreeMap::is_empty")]
    pub audiences: BTreeMap<String, Share>,
    /// The revision of the state when it began.
    pub since_revision: u64,
    /// When it began, in milliseconds since 1970.
    pub begun_unix_ms: u64,
    /// When its step began.
    pub step_unix_ms: u64,
    /// When it ended.
    pub ended_unix_ms: Option<u64>,
    /// Milliseconds of this step that were watched.
    pub watched_ms: u64,
    /// Why it stands where it stands.
    pub reason: Option<String>,
    /// Where it goes on when it is resumed; absent where it begins the step anew.
    pub paused_at: Option<Stage>,
    /// An operator has let the step's `pause` pass.
    pub let_pass: bool,
    /// An operator has sent it to the last step at once.
    pub full: bool,
    /// An operator has sent it on: it asks nobody before the next share.
    pub sent_on: bool,
    /// What a slow handshake is, once control has said it.
    #[serde(default)]
    pub slow: Option<Slow>,
    /// What the step's gate has seen.
    pub evidence: Option<Kept>,
    /// How the share has been measured in this step.
    pub ratio: Option<SampleRatio>,
}

impl Record {
    /// The share that clients of an audience have, or everyone.
    pub fn share_of(&self, audience: Option<&str>) -> Share {
        let [_, everyone] = self.shares;
        let own = audience.and_then(|audience| self.audiences.get(audience));
        own.copied().unwrap_or(Share::ZERO).max(everyone)
    }

    /// Whether the step that it is about to enter gives everyone this share.
    pub fn enters_with(&self, rollout: &Rollout, share: Share) -> bool {
        let step = rollout.steps.get(self.step).filter(|step| step.audience.is_none());
        self.stage == Stage::Entering && step.and_then(|step| step.split) == Some(share)
    }
}

mod by_audience {
    use std::collections::BTreeMap;

    use canary_ebpf_common::share::Share;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    type Shares = BTreeMap<String, Share>;

    pub(super) fn serialize<S: Serializer>(shares: &Shares, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(shares.iter().map(|(name, share)| (name, share.to_string())))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Shares, D::Error> {
        let texts = BTreeMap::<String, String>::deserialize(from)?;
        let parse = |(name, text): (String, String)| Ok((name, text.parse::<Share>()?));
        let parsed = texts
            .into_iter()
            .map(parse)
            .collect::<Result<Shares, canary_ebpf_common::share::ShareError>>();
        parsed.map_err(D::Error::custom)
    }
}

mod shares {
    use canary_ebpf_common::share::Share;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(shares: &[Share; 2], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(shares.map(|share| share.to_string()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[Share; 2], D::Error> {
        let [before, now] = <[String; 2]>::deserialize(from)?;
        let parse = |text: String| text.parse().map_err(D::Error::custom);
        Ok([parse(before)?, parse(now)?])
    }
}
