//! What the service manager is told (sd_notify(3)), where there is one.
//!
//! Ready means that traffic is steered: the first plan is in force and the program is on an
//! interface. The watchdog is kept quiet by the loop, and by nothing else: an agent whose
//! loop hangs is started again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sd_notify::NotifyState;

use super::Handle;

/// From one look at an agent that is not ready to the next.
const WAITING: Duration = Duration::from_millis(200);

/// The way to the service manager. Without one (`NOTIFY_SOCKET`), nothing is said.
#[derive(Clone, Debug, Default)]
pub(super) struct Notifier {
    /// It has been said that the agent is ready.
    ready: Arc<AtomicBool>,
}

impl Notifier {
    /// Tells one or more things in one message.
    fn tell(&self, state: &[NotifyState<'_>]) {
        if let Err(error) = sd_notify::notify(state) {
            tracing::warn!(%error, "the service manager can't be told anything");
        }
    }

    /// What `systemctl status` shows.
    pub(super) fn status(&self, text: &str) {
        self.tell(&[NotifyState::Status(&one_line(text))]);
    }

    /// A reload begins. It is over when what is returned is dropped.
    /// What is not ready yet becomes ready by itself.
    pub(super) fn reloading(&self) -> Option<Reloading> {
        if !self.ready.load(Ordering::Relaxed) {
            return None;
        }
        let now = NotifyState::monotonic_usec_now();
        let now = now.inspect_err(|error| tracing::warn!(%error, "CLOCK_MONOTONIC can't be read"));
        self.tell(&[NotifyState::Reloading, now.ok()?]);
        Some(Reloading(self.clone()))
    }

    /// The agent ends.
    pub(super) fn stopping(&self) {
        self.tell(&[NotifyState::Stopping, NotifyState::Status("stopping; traffic is steered on")]);
    }

    /// Says when the agent is ready, with `status`, and from then on that the loop is alive,
    /// as often as the service manager wants to hear it (`WATCHDOG_USEC`).
    pub(super) async fn follow(self, handle: Handle, status: String) {
        let mut told = false;
        loop {
            match handle.pulse().await {
                Ok(pulse) if pulse.is_steering() => break,
                Ok(_) if told => {}
                Ok(_) => {
                    told = true;
                    self.status("waiting for an interface to steer on");
                }
                // It stops.
                Err(_) => return,
            }
            tokio::time::sleep(WAITING).await;
        }
        self.ready.store(true, Ordering::Relaxed);
        self.tell(&[NotifyState::Ready, NotifyState::Status(&one_line(&status))]);
        let Some(limit) = sd_notify::watchdog_enabled() else { return };
        // Half of the time, as sd_watchdog_enabled(3) has it.
        let mut every = tokio::time::interval((limit / 2).max(Duration::from_millis(1)));
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            if handle.pulse().await.is_err() {
                return;
            }
            self.tell(&[NotifyState::Watchdog]);
        }
    }
}

/// A reload that goes on.
#[derive(Debug)]
pub(super) struct Reloading(Notifier);

impl Drop for Reloading {
    fn drop(&mut self) {
        self.0.tell(&[NotifyState::Ready]);
    }
}

/// A line's end would be the end of a message's field.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
