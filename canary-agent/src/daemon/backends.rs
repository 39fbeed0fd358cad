//! The backend commands: what there is, and telling one to be ready, to drain or to take
//! nothing.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use tokio::sync::oneshot;

use super::{
    Kernel, Moment, Peer, Refusal, State,
    changes::{self, Terms, Thing},
    held::{self, NOT_COUNTED},
    listing::{self, Listing},
    split::{self, suggestion},
};
use crate::{
    api::model::{BackendReport, BackendRequest, Backends},
    config::model::Fallback,
    plan::{BackendState, BucketSet, Family, Preview, ServiceState, Table},
    store::{Admin, BackendChange, StateStore},
};

/// What a report and what is to be counted for it.
type Reported = (BackendReport, Vec<BucketSet>);

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Answers with a service's backends.
    pub(super) fn list_backends(
        &self,
        service: &str,
        now: Moment,
        reply: oneshot::Sender<Result<Backends, Refusal>>,
    ) {
        let Some((at, state)) = self.planner.service(service) else {
            let refusal = split::unknown_service(&self.planner, service);
            return drop(reply.send(Err(refusal)));
        };
        let (counters, checks) = (self.counters(), self.checks.of_service(service));
        let listing = Listing::new(state, &counters, &checks, now.boot_ms);
        let (list, indices) = listing.backends(self.revision);
        let nat = self.counts(at);
        let has_entries = nat || state.tables().iter().any(|table| table.tracked() > 0);
        let counter = if has_entries { self.kernel.counter() } else { None };
        let wanted = self.counted(at, vec![BucketSet::default(); state.tables().len()]);
        held::answer(reply, list, counter, wanted, move |list, census| {
            listing::fill(list, &indices, census, nat);
        });
    }

    /// Tells a backend to be something, or says what that would do, and answers.
    pub(super) fn tell_backend(
        &mut self,
        service: &str,
        backend: &str,
        request: &BackendRequest,
        asked: (Peer, Instant, Moment),
        reply: oneshot::Sender<Result<BackendReport, Refusal>>,
    ) {
        let told = self.set_backend(service, backend, request, asked);
        let (report, moved) = match told {
            Ok(done) => done,
            Err(refusal) => return drop(reply.send(Err(refusal))),
        };
        let Some((at, state)) = self.planner.service(service) else {
            return drop(reply.send(Ok(report)));
        };
        let ours: Vec<_> = state
            .tables()
            .iter()
            .flat_map(Table::backends)
            .filter(|one| one.addr.to_string() == report.backend)
            .map(|one| one.index)
            .collect();
        let counter = if self.counts(at) { self.kernel.counter() } else { None };
        let wanted = self.counted(at, moved);
        held::answer(reply, report, counter, wanted, move |report, census| {
            let on_it = ours.iter().filter_map(|index| census.by_backend.get(index)).sum();
            let comes_back = report.state == Admin::Ready.name();
            report.connections_held = Some(if comes_back { census.in_buckets } else { on_it });
        });
    }

    fn set_backend(
        &mut self,
        service: &str,
        backend: &str,
        request: &BackendRequest,
        (peer, arrived, now): (Peer, Instant, Moment),
    ) -> Result<Reported, Refusal> {
        let BackendRequest { state: word, reason, dry_run, force, if_revision, confirm } = request;
        let (at, state) = self
            .planner
            .service(service)
            .ok_or_else(|| split::unknown_service(&self.planner, service))?;
        let addr = find(state, backend)?;
        let admin = Admin::named(word).ok_or_else(|| Refusal {
            code: "bad_state",
            message: format!("`{word}` is nothing that a backend can be told to be"),
            help: Some("say `ready`, `drain` or `maint`".to_owned()),
            exit_code: 2,
        })?;
        let before = state.admins().get(&addr).copied().unwrap_or_default();
        let (reason, confirm) = (reason.as_deref(), confirm.as_deref());
        let terms = Terms { peer, reason, if_revision: *if_revision, confirm };
        if before != admin
            && let Some(freeze) = self.control.frozen(service)
        {
            return Err(changes::frozen(service, freeze));
        }
        if !force && admin != Admin::Ready && before == Admin::Ready {
            last_of_version(state, addr, admin)?;
        }
        let thing = Thing::Backend(service, addr);
        let within = self.terms(Some(service), &[thing], &terms, now)?;
        let preview = match before == admin {
            true => Preview::default(),
            false => self.planner.preview(at, None, &[(addr, admin)]),
        };
        let state = &self.planner.services()[at];
        let tables: Vec<_> =
            state.tables().iter().map(|table| (table.entries(), table.bucket_counts())).collect();
        let mut report = BackendReport {
            service: service.to_owned(),
            backend: addr.to_string(),
            before: before.name().to_owned(),
            state: admin.name().to_owned(),
            buckets_moved: preview.moved.iter().map(BucketSet::len).sum(),
            backends_touched: preview.touched.iter().map(ToString::to_string).collect(),
            notes: notes(state, addr, before, admin, &preview),
            ..BackendReport::default()
        };
        if report.buckets_moved > 0 {
            report.connections_per_second =
                self.connections_per_second(&tables, &preview.moved, now.boot_ms);
        }
        if !dry_run && before != admin {
            let change = BackendChange { addr, before, after: admin };
            self.store_backend(at, change, &terms, within, now)?;
            let within = within.map(|within| u64::try_from(within.as_millis()));
            report.confirm_within_ms = within.map(|within| within.unwrap_or(u64::MAX));
            self.planner.set_admin(at, addr, admin);
            self.settle_or_refuse(now)?;
            tracing::info!(
                service,
                backend = %addr,
                revision = self.revision,
                uid = peer.uid,
                reason,
                buckets_moved = report.buckets_moved,
                "the backend was {} and is {} now",
                before.name(),
                admin.name(),
            );
        }
        report.applied = !dry_run;
        report.revision = self.revision;
        report.took_us = u64::try_from(arrived.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok((report, preview.moved))
    }
}

/// The configured backend that `text` means.
fn find(state: &ServiceState, text: &str) -> Result<SocketAddr, Refusal> {
    let config = state.config();
    let service = &config.name;
    let mut configured: Vec<SocketAddr> =
        config.versions.iter().flat_map(|v| &v.backends).map(|b| b.addr).collect();
    configured.sort();
    configured.dedup();
    let typed = text.trim();
    if let Ok(addr) = typed.parse::<SocketAddr>()
        && configured.contains(&addr)
    {
        return Ok(addr);
    }
    let bare = typed.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(typed);
    let of_ip: Vec<SocketAddr> = match bare.parse::<IpAddr>() {
        Ok(ip) => configured.iter().copied().filter(|addr| addr.ip() == ip).collect(),
        Err(_) => Vec::new(),
    };
    match &of_ip[..] {
        [one] => return Ok(*one),
        [] => {}
        several => {
            let ports: Vec<String> = several.iter().map(|addr| format!("`{addr}`")).collect();
            return Err(Refusal {
                code: "ambiguous_backend",
                message: format!("service `{service}` has more than one backend at {bare}"),
                help: Some(format!("name the port: {}", ports.join(", "))),
                exit_code: 2,
            });
        }
    }
    let removed = state.tables().iter().flat_map(Table::removed);
    if let Some(gone) = removed.map(|r| r.addr).find(|addr| addr.to_string() == typed) {
        return Err(Refusal {
            code: "removed_backend",
            message: format!(
                "{gone} is not a backend of service `{service}` any more: it takes no new connections, \
                 and is forgotten when the old ones have drained"
            ),
            help: Some("to use it again, put it back into the configuration".to_owned()),
            exit_code: 1,
        });
    }
    let names: Vec<String> = configured.iter().map(ToString::to_string).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Err(Refusal {
        code: "unknown_backend",
        message: format!("service `{service}` has no backend `{text}`"),
        help: Some(suggestion(text, &names, "its backends are")),
        exit_code: 1,
    })
}

/// Refuses what would leave nobody to take new connections.
pub(super) fn last_of_version(
    state: &ServiceState,
    addr: SocketAddr,
    admin: Admin,
) -> Result<(), Refusal> {
    let config = state.config();
    let owned = state.ownership().counts();
    for table in state.tables() {
        for version in &config.versions {
            let Some(slot) = state.slot(&version.name) else { continue };
            let control = slot == state.control();
            let owns = owned[usize::from(slot)] > 0;
            let serves = control || owns && config.fallback == Fallback::None;
            let of_version = || table.backends().iter().filter(|b| b.slot == slot && b.weight > 0);
            let ready = || of_version().filter(|b| b.admin == Admin::Ready);
            let Some(it) = ready().find(|b| b.addr == addr).filter(|_| serves) else {
                continue;
            };
            let others = || ready().filter(|b| b.addr != addr);
            let up = others().any(|b| b.state() == BackendState::Up);
            // What is down already is no loss, as long as there is another to try.
            if up || it.state() != BackendState::Up && others().next().is_some() {
                continue;
            }
            let family = match table.family() {
                Family::V4 => "IPv4",
                Family::V6 => "IPv6",
            };
            let (role, name) = (if control { "control" } else { "version" }, &version.name);
            return Err(Refusal {
                code: "last_backend",
                message: format!(
                    "{addr} is the last {family} backend of {role} `{name}` of service `{}` that takes new \
                     connections: with it in `{}`, they would get nothing",
                    config.name,
                    admin.name()
                ),
                help: Some(format!(
                    "make another one of `{name}` ready first, or do it all the same with --force"
                )),
                exit_code: 1,
            });
        }
    }
    Ok(())
}

/// What else an operator should know of a change.
fn notes(
    state: &ServiceState,
    addr: SocketAddr,
    before: Admin,
    admin: Admin,
    preview: &Preview,
) -> Vec<String> {
    let config = state.config();
    let mut notes = Vec::new();
    if before == admin {
        notes.push(format!("{addr} is in `{}` already", admin.name()));
        return notes;
    }
    let live = || state.tables().iter().flat_map(Table::backends).filter(|b| b.addr == addr);
    if admin == Admin::Ready && live().all(|b| b.state() != BackendState::Up) {
        notes.push("it gets no new connections before it is up".to_owned());
    } else if admin == Admin::Ready
        && !config.slow_start.is_zero()
        && preview.moved.iter().any(|m| !m.is_empty())
    {
        let time = humantime::format_duration(config.slow_start);
        notes.push(format!("it takes its share little by little within {time}"));
    }
    for version in &config.versions {
        let Some(slot) = state.slot(&version.name) else { continue };
        let fell_back = |before: bool| match before {
            true => state.tables().iter().any(|table| table.fell_back(slot)),
            false => preview.fell_back >> slot & 1 != 0,
        };
        if fell_back(false) && !fell_back(true) {
            let control = &config.versions[config.control].name;
            notes.push(match config.fallback {
                Fallback::Control if slot != state.control() => format!(
                    "version `{}` has no other backend: `{control}` takes its new connections",
                    version.name
                ),
                Fallback::Control | Fallback::None => {
                    format!(
                        "version `{}` has no other backend: its new connections get nothing",
                        version.name
                    )
                }
            });
        }
    }
    match admin {
        Admin::Maint => notes.push("its open connections are cut".to_owned()),
        Admin::Drain if !config.forward.translates() => match config.drain {
            Some(drain) => notes.push(format!(
                "its open connections stay, for {} at most",
                humantime::format_duration(drain)
            )),
            None => notes.push("its open connections stay".to_owned()),
        },
        Admin::Drain => notes.push("its open connections stay".to_owned()),
        Admin::Ready => {}
    }
    if !config.forward.translates() {
        notes.push(NOT_COUNTED.to_owned());
    }
    notes
}
