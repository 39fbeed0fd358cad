//! A program's exit code as an answer.
//!
//! 0 is good. 75 (`EX_TEMPFAIL` of sysexits.h), 126 and 127 (a shell's words for what can't be
//! run), and an end by a signal say nothing of the canary. Any other code is bad.

use std::process::Stdio;

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use rustix::thread::clear_ambient_capability_set;
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

/// Runs a program to its end. What it prints is not read. The capabilities that a service manager
/// gives the agent (`AmbientCapabilities=`, systemd.exec(5)) are not the program's, nor the socket
/// on which it hears of the agent.
pub(super) async fn run(words: &[String], about: &[(&'static str, String)]) -> Answer {
    let Some((program, arguments)) = words.split_first() else {
        return Answer::None("there is no program".to_owned());
    };
    let mut command = Command::new(program);
    // SAFETY: a plain system call, as may come between fork and exec; nothing is allocated.
    unsafe {
        command.pre_exec(|| Ok(clear_ambient_capability_set()?));
    }
    for of_the_agent in ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"] {
        command.env_remove(of_the_agent);
    }
    let spawned = command
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

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::thread::{
        CapabilitySet, capabilities, configure_capability_in_ambient_set, set_capabilities,
    };

    use super::*;

    fn run_here(script: &str) -> Answer {
        let words = ["sh", "-c", script].map(str::to_owned);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(run(&words, &[]))
    }

    #[test]
    fn a_command_gets_none_of_the_agents_capabilities() {
        // Capabilities are a thread's: this one takes them as an ordinary user's agent has them.
        let in_thread = thread::spawn(|| {
            let mut sets = capabilities(None).unwrap();
            if !sets.permitted.contains(CapabilitySet::NET_ADMIN) {
                // Without root there is nothing to hand on.
                return None;
            }
            sets.inheritable |= CapabilitySet::NET_ADMIN;
            set_capabilities(None, sets).unwrap();
            configure_capability_in_ambient_set(CapabilitySet::NET_ADMIN, true).unwrap();
            Some(run_here("grep -Eq '^CapAmb:[[:space:]]0+$' /proc/self/status"))
        });
        if let Some(answer) = in_thread.join().unwrap() {
            assert!(matches!(answer, Answer::Good(_)), "{answer:?}");
        }
    }
}
