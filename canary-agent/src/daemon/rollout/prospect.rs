//! What is known of a rollout before it begins, for whoever reckons how its gates will do.

use std::{collections::HashMap, sync::Arc};

use canary_ebpf_common::share::Share;

use crate::{
    config::{
        derived,
        model::{Rollout, SignalKind},
    },
    daemon::{Kernel, Moment, Refusal, State, signals::BEGIN_PART},
    plan::ServiceState,
    rollout::outlook::{Source, Usual},
    store::StateStore,
};

/// A rollout and its service's traffic.
#[derive(Clone, Debug, PartialEq)]
pub struct Prospect {
    /// The rollout, as it is configured.
    pub rollout: Arc<Rollout>,
    /// New connections of its service a second, over the last seconds; `None` before there is a
    /// second to go by.
    pub per_second: Option<f64>,
    /// The same of audiences that steps name.
    pub audiences: HashMap<String, f64>,
    /// The parts of them that go to versions other than control and the canary.
    pub others: Vec<f64>,
    /// How many of them may be watched for what they do; `None` where that is not known.
    pub watched_at_most: Option<f64>,
    /// How often what is counted happens to control's connections.
    pub usual: HashMap<SignalKind, Usual>,
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// What is known of a rollout.
    pub(in crate::daemon) fn prospect(&self, name: &str, now: Moment) -> Result<Prospect, Refusal> {
        let rollout = self.rollouts.config(name).ok_or_else(|| self.unknown_rollout(name))?;
        let state = self.planner.service(&rollout.service).map(|(_, state)| state);
        let split = state.map(|state| &state.ownership().split);
        let others = split.into_iter().flatten().filter(|(version, _)| **version != rollout.to);
        let others = others.filter(|(_, share)| **share != Share::ZERO);
        let others = others.map(|(_, share)| share.fraction()).collect();
        let audiences = rollout.steps.iter().filter_map(|step| step.audience.clone());
        let audiences = audiences.filter_map(|audience| {
            let table = self.planner.service(&derived::name(&rollout.service, &audience));
            Some((audience, self.rate_of(table?.1, now)?))
        });
        let counted = state.map(|state| {
            let control = &state.config().versions[state.config().control].name;
            self.kernel.signals().usual(&rollout.service, control)
        });
        let usual = counted.into_iter().flatten();
        let usual: HashMap<SignalKind, Usual> =
            usual.map(|(kind, rate)| (kind, Usual { rate, source: Source::Counted })).collect();
        let maps = self.kernel.maps();
        let room = maps.iter().find(|map| map.name == "SAMPLES_V4").map(|map| map.capacity);
        let services = self.planner.services().iter().filter(|one| one.config().signals).count();
        Ok(Prospect {
            rollout: Arc::clone(rollout),
            per_second: state.map_or(Some(0.0), |state| self.rate_of(state, now)),
            audiences: audiences.collect(),
            others,
            watched_at_most: room.map(|room| room as f64 / BEGIN_PART / services.max(1) as f64),
            usual,
        })
    }

    /// New connections of a table's clients a second.
    fn rate_of(&self, state: &ServiceState, now: Moment) -> Option<f64> {
        let slots = (0_u8..).zip(state.slots()).map(|(slot, _)| slot);
        let places = slots.flat_map(|slot| state.tables().iter().map(move |table| (table, slot)));
        let indices: Vec<_> = places.flat_map(|(table, slot)| table.indices_of(slot)).collect();
        let counters = self.kernel.counters(&indices);
        let rates = indices.iter().zip(counters).map(|(index, counter)| {
            self.samples.per_second(*index, counter.connections, now.boot_ms)
        });
        rates.sum()
    }
}
