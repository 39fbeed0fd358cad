//! How many open connections a change is about.
//!
//! With `nat` every connection has an entry, and they can be counted. With `dsr` nearly none
//! has one, which is what makes it cheap; what is known is how many begin in a second.
//!
//! Counting takes as long as the flow table is large, so it is done beside the loop, and the
//! answer waits for it. What is asked for is in force before.

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use canary_ebpf_common::{
    Packed,
    abi::BackendCounters,
    entry::{BackendIndex, Entry},
};
use tokio::sync::oneshot;

use super::{Kernel, Refusal, State};
use crate::{
    config::model::Forward,
    datapath::{Census, Counted},
    plan::{BootMs, BucketSet},
    store::StateStore,
};

/// Said where connections can't be counted.
pub(super) const NOT_COUNTED: &str = "how many connections are open is not known: with dsr none has an entry \
     unless its bucket has moved";

/// A table's entries, and how many buckets each backend has in it.
pub(super) type Before<'a> = (&'a Packed<Entry>, &'a [(BackendIndex, u32)]);

/// Counts open connections, on a thread of its own.
pub type Counter = Box<dyn FnOnce(&[Counted]) -> Result<Census, String> + Send>;

impl<S: StateStore, K: Kernel> State<S, K> {
    /// What is to be counted of a service, `buckets` of each of its tables by themselves.
    pub(super) fn counted(&self, service: usize, buckets: Vec<BucketSet>) -> Vec<Counted> {
        let state = &self.planner.services()[service];
        let plane = self.planner.plane();
        let tables = state.tables().iter().zip(buckets);
        tables
            .filter_map(|(table, buckets)| {
                let id = u32::from(table.id());
                let plan = plane.services.iter().find(|plan| plan.record.id == id)?;
                Some(Counted { record: plan.record, buckets })
            })
            .collect()
    }

    /// Whether every connection of a service has an entry.
    pub(super) fn counts(&self, service: usize) -> bool {
        self.planner.services()[service].config().forward == Forward::Nat
    }

    /// How many buckets each backend of a service has now, by table.
    pub(super) fn bucket_counts(&self, service: usize) -> Vec<Vec<(BackendIndex, u32)>> {
        let tables = self.planner.services()[service].tables();
        tables.iter().map(|table| table.bucket_counts().to_vec()).collect()
    }

    /// New connections a second in `moved` buckets of tables that were `before`, with so many
    /// buckets for each backend: each backend's, by the part of its buckets that is among
    /// them. `None` where not enough has been seen.
    pub(super) fn connections_per_second(
        &self,
        before: &[Before<'_>],
        moved: &[BucketSet],
        now_ms: BootMs,
    ) -> Option<f64> {
        let mut parts: Vec<(BackendIndex, f64)> = Vec::new();
        for ((entries, counts), moved) in before.iter().zip(moved) {
            let mut some = vec![0_u32; usize::from(BackendIndex::MAX.get()) + 1];
            for entry in moved.iter().filter_map(|bucket| entries.get(bucket as usize)) {
                some[usize::from(entry.current().get())] += 1;
            }
            let rows =
                counts.iter().map(|(index, all)| (*index, some[usize::from(index.get())], *all));
            let some = rows.filter(|(_, some, _)| *some > 0);
            parts.extend(some.map(|(index, some, all)| (index, f64::from(some) / f64::from(all))));
        }
        let indices: Vec<BackendIndex> = parts.iter().map(|(index, _)| *index).collect();
        let counters = self.kernel.counters(&indices);
        let rate = |((index, part), counter): (&(BackendIndex, f64), BackendCounters)| {
            Some(self.samples.per_second(*index, counter.connections, now_ms)? * part)
        };
        let sum: Option<f64> = parts.iter().zip(counters).map(rate).sum();
        // The sum of nothing is -0.0.
        sum.map(|rate| rate + 0.0)
    }
}

/// Sends `report` when `counter` has counted and `fill` has put in what came out.
pub(super) fn answer<T: Send + 'static>(
    reply: oneshot::Sender<Result<T, Refusal>>,
    report: T,
    counter: Option<Counter>,
    wanted: Vec<Counted>,
    fill: impl FnOnce(&mut T, &Census) + Send + 'static,
) {
    let Some(counter) = counter else {
        drop(reply.send(Ok(report)));
        return;
    };
    let held = Arc::new(Mutex::new(Some((reply, report))));
    let take = |held: &Mutex<Option<_>>| held.lock().unwrap_or_else(PoisonError::into_inner).take();
    let work = {
        let held = Arc::clone(&held);
        move || {
            let census = counter(&wanted);
            let Some((reply, mut report)) = take(&held) else { return };
            match census {
                Ok(census) => fill(&mut report, &census),
                Err(error) => tracing::warn!(error, "open connections can't be counted"),
            }
            // Whoever has stopped waiting for the answer has lost nothing but the answer.
            drop(reply.send(Ok(report)));
        }
    };
    if let Err(error) = thread::Builder::new().name("count".to_owned()).spawn(work) {
        tracing::warn!(%error, "open connections can't be counted");
        if let Some((reply, report)) = take(&held) {
            drop(reply.send(Ok(report)));
        }
    }
}
