//! What operators tell a rollout.

use super::{Run, Stage, Unfit, Wish, recipe, tell};
use crate::{config::model::Rollout, rollout::drive::At};

impl Run {
    /// An operator, or the agent itself, stops it where it is.
    ///
    /// # Errors
    /// It stands already, or is over.
    pub fn ask_pause(&mut self, reason: Option<&str>) -> Result<Vec<Wish>, Unfit> {
        match self.record.stage {
            stage @ (Stage::Entering | Stage::Watching) => {
                let why = reason.unwrap_or("an operator has paused it").to_owned();
                Ok(self.pause(why, Some(stage)))
            }
            stage => Err(self.unfit(stage, "paused")),
        }
    }

    /// An operator lets it go on.
    ///
    /// # Errors
    /// It does not stand, or is over; its configuration has fewer steps.
    pub fn ask_resume(&mut self, rollout: &Rollout, now: At) -> Result<Vec<Wish>, Unfit> {
        let mut wishes = match self.record.stage {
            Stage::Paused | Stage::Held => {
                if rollout.service != self.record.service || rollout.to != self.record.to {
                    return Err(Unfit(
                        "its service or version is another one by now: abort it".to_owned(),
                    ));
                }
                if self.record.step >= rollout.steps.len() {
                    return Err(Unfit(format!(
                        "it is at step {}, and its configuration has {} by now: promote or abort it",
                        self.record.step + 1,
                        rollout.steps.len()
                    )));
                }
                self.record.recipe = recipe(rollout);
                match self.record.paused_at.take() {
                    Some(stage) if self.record.stage == Stage::Paused => {
                        self.record.stage = stage;
                    }
                    _ => {
                        self.record.stage = Stage::Entering;
                        self.record.step_unix_ms = now.unix_ms;
                        self.watch = None;
                    }
                }
                Vec::new()
            }
            Stage::Watching if self.asks_operator(rollout) => {
                self.record.let_pass = true;
                Vec::new()
            }
            stage => return Err(self.unfit(stage, "resumed")),
        };
        self.record.reason = None;
        wishes.extend([tell("resumed", format!("{} goes on", self.place(rollout))), Wish::Save]);
        Ok(wishes)
    }

    /// An operator sends it on to the next step, or to the last share at once.
    ///
    /// # Errors
    /// It is over.
    pub fn ask_promote(
        &mut self,
        rollout: &Rollout,
        full: bool,
        now: At,
    ) -> Result<Vec<Wish>, Unfit> {
        if self.record.stage.is_over() {
            return Err(self.unfit(self.record.stage, "promoted"));
        }
        let entering =
            self.record.stage == Stage::Entering || self.record.paused_at == Some(Stage::Entering);
        let next = match full {
            true => rollout.steps.iter().rposition(|step| step.split.is_some()),
            false if entering => Some(self.record.step),
            false => Some(self.record.step + 1),
        };
        let (reason, text) = match full {
            true => ("promoted to the last share", "sent to its last share at once".to_owned()),
            false => ("promoted", format!("sent on from {}", self.place(rollout))),
        };
        let mut wishes = vec![tell("promoted", text)];
        self.record.recipe = recipe(rollout);
        self.record.paused_at = None;
        self.record.reason = Some(reason.to_owned());
        match next.filter(|next| *next < rollout.steps.len()) {
            Some(next) => {
                self.record.step = next;
                self.record.step_unix_ms = now.unix_ms;
                self.record.stage = Stage::Entering;
                (self.record.full, self.record.sent_on) = (full, true);
                self.watch = None;
                self.ask_anew();
                wishes.push(Wish::Save);
            }
            None => wishes.extend(self.complete(now)),
        }
        Ok(wishes)
    }

    /// An operator, or what has happened to its service, ends it: the share goes back to nothing.
    ///
    /// # Errors
    /// It is over.
    pub fn ask_abort(&mut self, reason: Option<&str>, now: At) -> Result<Vec<Wish>, Unfit> {
        match self.record.stage {
            stage if stage.is_over() => Err(self.unfit(stage, "aborted")),
            _ => Ok(self.abort(reason.unwrap_or("an operator has aborted it").to_owned(), now)),
        }
    }

    /// It is over because nothing is left that it could move.
    pub fn bereave(&mut self, why: &str, now: At) -> Vec<Wish> {
        if self.record.stage.is_over() {
            return Vec::new();
        }
        self.end(Stage::Aborted, why.to_owned(), now);
        vec![tell("aborted", why.to_owned()), Wish::Save]
    }

    /// Whether all that is missing of the step is an operator's word.
    pub fn asks_operator(&self, rollout: &Rollout) -> bool {
        let step = rollout.steps.get(self.record.step);
        self.record.stage == Stage::Watching
            && step.is_some_and(|step| {
                step.pause && !self.record.let_pass && self.step_done(step.hold)
            })
    }

    fn unfit(&self, stage: Stage, what: &str) -> Unfit {
        let is = match stage {
            Stage::Entering | Stage::Watching => "goes on already".to_owned(),
            Stage::Paused | Stage::Held => format!("is {} already", stage.name()),
            Stage::Completed => "is completed".to_owned(),
            Stage::Aborted => "was aborted".to_owned(),
        };
        Unfit(format!("it {is}, and can't be {what}"))
    }

    pub(super) fn place(&self, rollout: &Rollout) -> String {
        format!("step {} of {}", self.record.step + 1, rollout.steps.len())
    }
}
