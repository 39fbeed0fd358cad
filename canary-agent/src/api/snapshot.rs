//! One status for many readers.
//!
//! A status is asked of the loop at most once at a time, and everybody who asked
//! before that began gets the same one, rendered once. So a crowd of readers
//! costs the loop no more than one, and yet nobody gets a status that is older
//! than his question: a change that has been answered is always in it.

use std::{
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::Mutex;

use super::{model::Status, public};
use crate::{
    daemon::{Handle, Refusal},
    telemetry::{Exposition, Metrics},
};

/// A status with its renderings.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// What the loop said.
    pub(super) status: Arc<Status>,
    /// Bytes of room for its JSON.
    room: usize,
    public: OnceLock<Arc<Status>>,
    json: OnceLock<Bytes>,
    public_json: OnceLock<Bytes>,
    openmetrics: OnceLock<Bytes>,
    prometheus: OnceLock<Bytes>,
}

impl Snapshot {
    fn new(status: Status, room: usize) -> Self {
        Self {
            room,
            status: Arc::new(status),
            public: OnceLock::new(),
            json: OnceLock::new(),
            public_json: OnceLock::new(),
            openmetrics: OnceLock::new(),
            prometheus: OnceLock::new(),
        }
    }

    /// As JSON.
    pub(super) fn json(&self) -> Bytes {
        self.json.get_or_init(|| self.written(&self.status)).clone()
    }

    /// A status always has a JSON form: its only map-like parts have names for keys, and numbers
    /// that are none become `null`.
    fn written(&self, status: &Status) -> Bytes {
        let mut json = Vec::with_capacity(self.room);
        match serde_json::to_writer(&mut json, status) {
            Ok(()) => json.into(),
            Err(_) => Bytes::new(),
        }
    }

    /// How much room the next one should take for its JSON, which is about as long as this one's.
    fn next_room(&self) -> usize {
        let written = [&self.json, &self.public_json].map(|json| json.get().map_or(0, Bytes::len));
        match written[0].max(written[1]) {
            0 => self.room,
            length => length + length / 16,
        }
    }

    /// Without what it says of people, for the TCP listener.
    pub(super) fn public(&self) -> &Status {
        self.public.get_or_init(|| public::status(&self.status))
    }

    /// The same as JSON.
    pub(super) fn public_json(&self) -> Bytes {
        let render = || match ptr::eq(self.public(), &*self.status) {
            true => self.json(),
            false => self.written(self.public()),
        };
        self.public_json.get_or_init(render).clone()
    }

    /// As metrics.
    pub(super) fn metrics(&self, metrics: &Metrics, format: Exposition) -> Bytes {
        let cell = match format {
            Exposition::OpenMetrics => &self.openmetrics,
            Exposition::Prometheus => &self.prometheus,
        };
        let render = || metrics.render(&self.status, format).into();
        cell.get_or_init(render).clone()
    }
}

/// Where snapshots come from.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    tickets: AtomicU64,
    /// The last one, with the ticket drawn when it was asked for.
    last: Mutex<Option<(u64, Arc<Snapshot>)>>,
}

impl Snapshots {
    /// A snapshot that was asked for after this call.
    ///
    /// # Errors
    /// What the loop refuses: it is stopping.
    pub(super) async fn take(&self, handle: &Handle) -> Result<Arc<Snapshot>, Refusal> {
        let called = self.tickets.fetch_add(1, Ordering::SeqCst);
        let mut last = self.last.lock().await;
        if let Some((asked, snapshot)) = &*last
            && *asked > called
        {
            return Ok(Arc::clone(snapshot));
        }
        let asked = self.tickets.fetch_add(1, Ordering::SeqCst);
        let room = last.as_ref().map_or(0, |(_, snapshot)| snapshot.next_room());
        let snapshot = Arc::new(Snapshot::new(handle.status().await?, room));
        *last = Some((asked, Arc::clone(&snapshot)));
        Ok(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::daemon::Request;

    /// A scripted loop: each status has the number of the question as revision.
    fn counting_loop() -> Handle {
        let (handle, mut requests) = Handle::channel(256);
        tokio::spawn(async move {
            let mut revision = 0;
            while let Some(request) = requests.recv().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
                if let Request::Status { reply } = request {
                    revision += 1;
                    let mut status = Status::default();
                    status.agent.revision = revision;
                    let _ = reply.send(status);
                }
            }
        });
        handle
    }

    #[tokio::test]
    async fn a_crowd_costs_the_loop_two_questions() {
        let handle = counting_loop();
        let snapshots = Arc::new(Snapshots::default());
        let mut crowd = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let (handle, snapshots) = (handle.clone(), Arc::clone(&snapshots));
            crowd.spawn(async move { snapshots.take(&handle).await });
        }
        let mut most = 0;
        while let Some(taken) = crowd.join_next().await {
            let snapshot = taken.expect("no panic").expect("a status");
            most = most.max(snapshot.status.agent.revision);
        }
        assert!(most <= 2, "{most} questions");
        let later = snapshots.take(&handle).await.expect("a status");
        assert_eq!(later.status.agent.revision, most + 1, "never an old one");
    }
}
