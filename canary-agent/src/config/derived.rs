//! What routes make of services: each audience that a service has a route for has a forwarding
//! table of its own there, with shares, drains and a history of its own.
//!
//! Those that no route names, but a step of a rollout, follow the split of their service.
//!
//! To the planner, the store and the commands it is a service beside the one that it belongs to,
//! `shop@staff`, which has the same backends and no addresses. Nobody can call a service so.

use super::model::{Config, Derived, Service};

/// Between the names of a service and of an audience.
pub const SEPARATOR: char = '@';

/// What the table of an audience's clients in a service is called.
pub fn name(service: &str, audience: &str) -> String {
    format!("{service}{SEPARATOR}{audience}")
}

/// The service and the audience of such a name.
pub fn parts(name: &str) -> Option<(&str, &str)> {
    name.split_once(SEPARATOR)
}

/// Each service with what its routes make of it behind it.
pub(super) fn all(services: impl IntoIterator<Item = Service>) -> Vec<Service> {
    let with_routes = |mut service: Service| {
        service.routed = !service.routes.is_empty();
        let derived = service.routes.iter().map(|route| {
            let (service_name, audience) = (service.name.clone(), route.audience.clone());
            let of = Derived { service: service_name, audience, follows: route.follows };
            of_audience(&service, of, route.split.clone())
        });
        let derived: Vec<Service> = derived.collect();
        [service].into_iter().chain(derived)
    };
    services.into_iter().flat_map(with_routes).collect()
}

fn of_audience(service: &Service, of: Derived, split: super::model::SplitOf) -> Service {
    Service {
        name: name(&of.service, &of.audience),
        split,
        routes: Vec::new(),
        routed: false,
        // What a rollout of the service compares is everybody else, or the audience of its step.
        signals: service.signals && of.follows,
        derived: Some(of),
        ..service.clone()
    }
}

impl Config {
    /// The same with the tables of audiences that have lost their routes, by service and audience:
    /// open connections still go by them. Those that are there, or whose service is gone, count
    /// once or not at all.
    pub fn remembering<'n>(&self, tables: impl IntoIterator<Item = (&'n str, &'n str)>) -> Self {
        let mut config = self.clone();
        for (service, audience) in tables {
            let its = name(service, audience);
            if config.services.iter().any(|one| one.name == its) {
                continue;
            }
            let named = |one: &Service| one.name == service && one.derived.is_none();
            let Some(at) = config.services.iter().position(named) else { continue };
            config.services[at].routed = true;
            let (service, audience) = (service.to_owned(), audience.to_owned());
            let of = Derived { service, audience, follows: false };
            let table = of_audience(&config.services[at], of, Default::default());
            let behind = config.services[at + 1..].iter().take_while(|one| one.derived.is_some());
            let end = at + 1 + behind.count();
            config.services.insert(end, table);
        }
        config
    }
}
