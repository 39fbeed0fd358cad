//! What is said of audiences, and of a client.

use std::net::IpAddr;

use canary_ebpf_common::networks::Width;

use super::{Kernel, Moment, Refusal, State, split::suggestion};
use crate::{
    api::audience::{
        AudienceRoute, AudienceStatus, Audiences, ClientReport, ClientRoute, HoldingAudience,
    },
    config::{
        derived,
        model::{Audience, Mmdb},
    },
    plan::{Family, followed},
    store::StateStore,
};

/// Networks that are shown of an audience.
const EXAMPLES: usize = 5;

impl<S: StateStore, K: Kernel> State<S, K> {
    /// All audiences.
    pub(super) fn list_audiences(&self, now: Moment) -> Audiences {
        let audiences = self.audiences.iter();
        Audiences { audiences: audiences.map(|one| self.audience_status(one, now)).collect() }
    }

    /// One of them, with a few of its networks.
    ///
    /// # Errors
    /// There is none of that name.
    pub(super) fn show_audience(&self, name: &str, now: Moment) -> Result<AudienceStatus, Refusal> {
        let audience = self.find_audience(name)?;
        let members = self.members.of(name).into_iter().flat_map(|members| members.iter());
        let networks = audience.networks.iter().chain(members.map(|(network, _)| network));
        let examples = networks.take(EXAMPLES).map(|net| net.to_string()).collect();
        Ok(AudienceStatus { examples, ..self.audience_status(audience, now) })
    }

    /// The audience of that name.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn find_audience(&self, name: &str) -> Result<&Audience, Refusal> {
        if let Some(audience) = self.audiences.iter().find(|one| one.name == name) {
            return Ok(audience);
        }
        let names: Vec<&str> = self.audiences.iter().map(|one| one.name.as_str()).collect();
        let help = match names.is_empty() {
            true => "describe one in the configuration: `[[audience]]`".to_owned(),
            false => suggestion(name, &names, "there are"),
        };
        Err(Refusal {
            code: "unknown_audience",
            message: format!("there is no audience `{name}`"),
            help: Some(help),
            exit_code: 1,
        })
    }

    fn audience_status(&self, audience: &Audience, now: Moment) -> AudienceStatus {
        let Audience { name, networks, file, mmdb, dynamic: _ } = audience;
        let mut routes = Vec::new();
        for state in self.planner.services() {
            let its = state.config().routes.iter();
            for (at, _) in its.enumerate().filter(|(_, route)| route.audience == *name) {
                let service = state.config().name.clone();
                let table = derived::name(&service, name);
                let split = self.planner.service(&table).map(|(_, own)| {
                    let shares = own.ownership().split.iter();
                    shares.map(|(name, share)| format!("{name}={share}")).collect::<Vec<_>>()
                });
                let split = split.unwrap_or_default().join(" ");
                routes.push(AudienceRoute { service, place: at + 1, split, table });
            }
        }
        let path = |path: &std::path::Path| path.display().to_string();
        AudienceStatus {
            name: name.clone(),
            networks_v4: networks.of(Width::V4).len(),
            addresses_v4: u64::try_from(networks.addresses(Width::V4)).unwrap_or(u64::MAX),
            networks_v6: networks.of(Width::V6).len(),
            addresses_v6: networks.addresses(Width::V6).to_string(),
            file: file.as_deref().map(path),
            mmdb: mmdb.as_ref().map(|Mmdb { file, filter: _ }| path(file)),
            expression: mmdb.as_ref().map(|Mmdb { file: _, filter }| filter.text().to_owned()),
            members: self.members_status(audience, now),
            examples: Vec::new(),
            routes,
        }
    }

    /// What a client is.
    pub(super) fn client_report(&self, address: IpAddr, now: Moment) -> ClientReport {
        let address = address.to_canonical();
        let holding = self.audiences.iter().filter_map(|audience| {
            let name = audience.name.clone();
            if let Some(network) = audience.networks.find(address) {
                let network = network.to_string();
                return Some(HoldingAudience { name, network, ends_in_seconds: None });
            }
            audience.dynamic.as_ref()?;
            let (network, until_ms) = self.members.of(&name)?.find(address)?;
            let left = until_ms.saturating_sub(now.boot_ms) as f64 / 1_000.0;
            let network = network.to_string();
            Some(HoldingAudience { name, network, ends_in_seconds: Some(left) })
        });
        let plane = self.planner.plane();
        let mut services = Vec::new();
        for state in self.planner.services().iter().filter(|state| state.config().routed) {
            let family = Family::of(address);
            let Some(table) = state.tables().iter().find(|table| table.family() == family) else {
                continue;
            };
            let id = u32::from(table.id());
            let Some(base) = plane.services.iter().find(|plan| plan.record.id == id) else {
                continue;
            };
            let (class, _, before) = followed(&plane.classes, &base.record, address);
            let name = &state.config().name;
            let audience = |class| self.planner.audience(class, name).map(str::to_owned);
            services.push(ClientRoute {
                service: name.clone(),
                audience: audience(class.current()),
                tracked: before.is_some(),
                previous: before.and_then(|_| audience(class.previous())),
            });
        }
        ClientReport { address: address.to_string(), audiences: holding.collect(), services }
    }
}
