//! What the loop has to do with the backends' state: what is to be checked, and what
//! follows from what comes out and from next hops that come and go.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{Kernel, Moment, State};
use crate::{
    config::model,
    health::{Change, Reports, Target},
    plan::{self, Hops},
    store::StateStore,
};

impl<S: StateStore, K: Kernel> State<S, K> {
    /// What is to be checked, with what the maps say of it: a backend that was down under an
    /// earlier agent is down until it has passed.
    pub fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for state in self.planner.services() {
            let config = state.config();
            // What serves an audience is checked for its service.
            if config.health == model::Health::None || config.derived.is_some() {
                continue;
            }
            let service: Arc<str> = config.name.as_str().into();
            let health = Arc::new(config.health.clone());
            let of_family =
                |v4| config.vips.iter().copied().filter(|v| v.is_ipv4() == v4).collect();
            let (v4, v6): (Arc<[IpAddr]>, Arc<[IpAddr]>) = (of_family(true), of_family(false));
            // In two versions, a backend is still checked once.
            let mut down: BTreeMap<SocketAddr, bool> = BTreeMap::new();
            for backend in state.tables().iter().flat_map(|table| table.backends()) {
                *down.entry(backend.addr).or_default() |= backend.down;
            }
            targets.extend(down.into_iter().map(|(addr, down)| Target {
                service: Arc::clone(&service),
                addr,
                health: Arc::clone(&health),
                vips: Arc::clone(if addr.is_ipv4() { &v4 } else { &v6 }),
                tunnel: plan::tunnel_of(config, addr),
                down,
            }));
        }
        targets
    }

    /// Shows what the checks know in status, from now on.
    pub fn show_checks(&mut self, reports: Reports) {
        self.checks = reports;
    }

    /// Takes over how backends are reached, or that they are not.
    pub(super) fn next_hops(&mut self, hops: &Hops, now: Moment) {
        let before = self.unreachable();
        self.planner.set_next_hops(hops);
        let after = self.unreachable();
        for ((service, addr), why) in &after {
            if !before.contains_key(&(Arc::clone(service), *addr)) {
                tracing::warn!(%service, backend = %addr, why, "the backend has no next hop");
                let text = format!("{addr} has no next hop: {why}");
                self.notices.add(now, "unreachable", service, text);
            }
        }
        for (service, addr) in before.into_keys().filter(|key| !after.contains_key(key)) {
            tracing::info!(%service, backend = %addr, "the backend has a next hop again");
            let text = format!("{addr} has a next hop again");
            self.notices.add(now, "reachable", &service, text);
        }
    }

    /// The backends that are known to have no next hop, and why.
    fn unreachable(&self) -> BTreeMap<(Arc<str>, SocketAddr), String> {
        let mut unreachable = BTreeMap::new();
        for state in self.planner.services() {
            let service: Arc<str> = state.config().name.as_str().into();
            let live = state.tables().iter().flat_map(|table| table.backends());
            for (addr, why) in live.filter_map(|b| Some((b.addr, b.why_unreachable()?))) {
                unreachable.insert((Arc::clone(&service), addr), why);
            }
        }
        unreachable
    }

    /// Takes over what has gone down and come up.
    pub(super) fn health(&mut self, changes: Vec<Change>, now: Moment) {
        let mut by_service: HashMap<Arc<str>, HashMap<SocketAddr, bool>> = HashMap::new();
        for Change { service, addr, down, why } in changes {
            let (kind, because) = match (&why, down) {
                (Some(why), true) => ("down", format!(": {why}")),
                (None, true) => ("down", String::new()),
                (_, false) => ("up", String::new()),
            };
            self.notices.add(now, kind, &service, format!("{addr} is {kind}{because}"));
            match why {
                Some(why) if down => {
                    tracing::warn!(%service, backend = %addr, %why, "the backend is down");
                }
                _ => tracing::info!(
                    %service,
                    backend = %addr,
                    "the backend is {}",
                    if down { "down" } else { "up again" }
                ),
            }
            by_service.entry(service).or_default().insert(addr, down);
        }
        for (service, down) in by_service {
            // A change may have been on its way while the configuration became another.
            if let Some((at, state)) = self.planner.service(&service)
                && state.config().health != model::Health::None
            {
                self.planner.set_health(at, &down);
            }
        }
    }
}
