//! A program's exit code as an answer.
//!
//! 0 is good. 75 (`EX_TEMPFAIL` of sysexits.h), 126 and 127 (a shell's words for what can't be
//! run), and an end by a signal say nothing of the canary. Any other code is bad.

use std::process::Stdio;

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::process::Command;

use crate::rollout::watch::Answer;

/// Ends a program with all that it has started, when nobody waits for it any more.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0.take() {
            // It may have ended by itself in this moment.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs a program to its end. What it prints is not read.
pub(super) async fn run(words: &[String], about: &[(&'static str, String)]) -> Answer {
    let Some((program, arguments)) = words.split_first() else {
        return Answer::None("there is no program".to_owned());
    };
    let spawned = Command::new(program)
        .args(arguments)
        .envs(about.iter().map(|(key, value)| (*key, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Answer::None(format!("it can't be started: {error}")),
    };
    let id = child.id().and_then(|id| i32::try_from(id).ok());
    let mut group = Group(id.map(Pid::from_raw));
    let ended = child.wait().await;
    // Its number may be another's from now on.
    group.0 = None;
    match ended.map(|status| status.code()) {
        Ok(Some(0)) => Answer::Good("exit code 0".to_owned()),
        Ok(Some(code @ (75 | 126 | 127))) => Answer::None(format!("exit code {code}")),
        Ok(Some(code)) => Answer::Bad(format!("exit code {code}")),
        Ok(None) => Answer::None("a signal has ended it".to_owned()),
        Err(error) => Answer::None(format!("it can't be waited for: {error}")),
    }
}
