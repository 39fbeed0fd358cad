//! Reloads as the loop makes them: all of it or nothing, and what is live stays.

use std::{collections::HashMap, sync::Arc, time::Duration};

use canary_agent::{
    api::{panic::PanicRequest, reload::ReloadReport},
    config::model::{Backend, Config, Forward, Stickiness},
    daemon::{EventsAsked, Order, Peer, Planned, Refusal, Reloaded, Request},
    datapath::Census,
    plan::Adopted,
    store::{SqliteStore, StateStore},
};

use crate::{
    changes::{confirm, freeze, split},
    panic,
    plan_support::{hop, maps},
    support::{Agent, Shared, agent, shop},
};

impl Agent {
    /// What a reload would do.
    fn planned(&mut self, running: &Config, wanted: &Config) -> Planned {
        let config = Arc::new(wanted.clone());
        let survey =
            self.ask(|reply| Request::Survey { config, if_revision: None, reply }).unwrap();
        survey.plan(running, wanted).unwrap()
    }

    fn put_in_force(&mut self, planned: Planned, wanted: &Config) -> Result<Reloaded, Refusal> {
        self.put_in_force_on(planned, wanted, &[], None, None)
    }

    /// The same with keys of `[agent]`, waiting for a confirmation, or taking one back.
    fn put_in_force_on(
        &mut self,
        planned: Planned,
        wanted: &Config,
        settings: &[&str],
        confirm: Option<&str>,
        takes_back: Option<u64>,
    ) -> Result<Reloaded, Refusal> {
        let mut prepared = planned.prepared;
        let backends = wanted.services.iter().flat_map(|s| &s.versions).flat_map(|v| &v.backends);
        let hops = backends.map(|b| (b.addr.ip(), Ok(hop(b.addr)))).collect();
        prepared.warm(hops, self.boot_ms);
        let order = Box::new(Order {
            prepared,
            interfaces: wanted.agent.interfaces.clone(),
            rollouts: wanted.rollouts.clone(),
            audiences: wanted.audiences.clone(),
            peer: Some(Peer { uid: 1000, gid: 1000, pid: None }),
            reason: Some("because".to_owned()),
            settings: settings.iter().map(|one| (*one).to_owned()).collect(),
            if_revision: None,
            confirm: confirm.map(str::to_owned),
            takes_back,
        });
        self.ask(|reply| Request::Reload { order, reply })
    }

    pub(crate) fn reload(
        &mut self,
        running: &Config,
        wanted: &Config,
    ) -> Result<(ReloadReport, Reloaded), Refusal> {
        let planned = self.planned(running, wanted);
        let report = planned.report.clone();
        self.put_in_force(planned, wanted).map(|reloaded| (report, reloaded))
    }

    fn log(&self) -> Vec<String> {
        self.host.with(|host| std::mem::take(&mut host.log))
    }
}

/// `shop` with a backend of another weight, one more and one less, and without `api`.
fn other() -> Config {
    let mut other = shop();
    let stable = &mut other.services[0].versions[0].backends;
    stable[0].weight = 3;
    stable[1].addr = "10.0.1.9:443".parse().unwrap();
    other.services.truncate(1);
    other
}

#[test]
fn a_reload_is_stored_then_applied_and_what_is_live_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "40%")]).unwrap();
    agent.tell("10.0.1.1:443", "drain").unwrap();
    let owners = agent.owners();
    let revision = agent.status().agent.revision;
    agent.log();
    let wanted = other();
    let (report, reloaded) = agent.reload(&shop(), &wanted).unwrap();
    assert_eq!(agent.log(), ["store", "apply"]);
    assert_eq!(agent.owners(), owners);
    assert_eq!(reloaded.revision, revision + 2);
    assert!(reloaded.not_applied.is_none() && report.differs);
    let status = agent.status();
    assert_eq!(status.services.len(), 1);
    let stable = &status.services[0].versions[0];
    let backends: Vec<_> = stable
        .backends
        .iter()
        .map(|b| (b.addr.to_string(), b.weight, b.admin.to_string()))
        .collect();
    assert_eq!(
        backends,
        [
            ("10.0.1.1:443".to_owned(), 3, "drain".to_owned()),
            ("10.0.1.9:443".to_owned(), 1, "ready".to_owned())
        ]
    );
    assert_eq!(status.services[0].versions[1].asked_text, "40%");

    let trail = SqliteStore::new(dir.path()).changes(revision, 10).unwrap();
    let told: Vec<_> = trail
        .iter()
        .map(|(_, c)| (c.service.as_str(), c.action.as_str(), c.uid, c.reason.as_deref()))
        .collect();
    let because = Some("because");
    assert_eq!(
        told,
        [("shop", "config", Some(1000), because), ("api", "removed", Some(1000), because)]
    );

    // The next agent finds nothing to do.
    let host = agent.host.clone();
    let plane = host.with(|host| host.plane.clone());
    drop(agent);
    let mut next = Agent::start(dir.path(), &wanted, host.clone(), maps(&plane));
    assert!(host.with(|host| host.plane.services == plane.services), "not a bit differs");
    assert_eq!(next.status().agent.revision, reloaded.revision, "nothing new to store");
    // What is configured again goes on as it was.
    next.reload(&wanted, &shop()).unwrap();
    assert_eq!(next.status().services[1].name, "api");
}

#[test]
fn a_report_says_what_comes_goes_and_moves() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let mut wanted = other();
    wanted.services[0].drain = Some(Duration::from_secs(7));
    wanted.services[0].versions.remove(2);
    wanted.agent.listen = Some("127.0.0.1:9109".parse().unwrap());
    wanted.agent.capacity.flows = 9;
    agent.log();
    let before = agent.state.plane().clone();
    let report = agent.planned(&shop(), &wanted).report;
    assert!(agent.log().is_empty() && agent.state.plane() == &before, "nothing has changed");
    let settings: Vec<_> = report
        .settings
        .iter()
        .map(|s| (s.key.as_str(), s.before.as_str(), s.after.as_str()))
        .collect();
    assert_eq!(
        settings,
        [("agent.listen", "off", "127.0.0.1:9109"), ("agent.capacity.flows", "65536", "9")]
    );
    assert_eq!(report.needs_restart, ["agent.capacity.flows"]);
    let [shop, api] = &report.services[..] else { panic!("{:?}", report.services) };
    assert_eq!((shop.change.as_str(), api.change.as_str()), ("changed", "removed"));
    assert_eq!(
        (
            shop.settings[0].key.as_str(),
            shop.settings[0].before.as_str(),
            shop.settings[0].after.as_str()
        ),
        ("drain", "16m 40s", "7s")
    );
    assert_eq!(
        (shop.versions[0].name.as_str(), shop.versions[0].change.as_str()),
        ("v3", "removed")
    );
    let backends: Vec<_> = shop
        .backends
        .iter()
        .map(|b| (b.addr.as_str(), b.change.as_str(), b.weight_before, b.weight))
        .collect();
    assert_eq!(
        backends,
        [
            ("10.0.1.1:443", "changed", Some(1), Some(3)),
            ("10.0.1.9:443", "added", None, Some(1)),
            ("10.0.1.2:443", "removed", Some(1), None),
            ("10.0.3.1:443", "removed", Some(1), None),
        ]
    );
    assert!(shop.buckets_moved > 1024 && report.buckets_moved == u64::from(shop.buckets_moved));
    assert!(
        report.notes.iter().any(|note| note.contains("`stable` takes the new connections of `v3`"))
    );
    let same = agent.planned(&super::shop(), &super::shop()).report;
    assert!(!same.differs && same.services.is_empty() && same.settings.is_empty(), "{same:?}");
}

#[test]
fn what_can_not_be_stored_or_attached_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.split(&[("v2", "40%")]).unwrap();
    let mut wanted = other();
    wanted.agent.interfaces = vec!["lo".to_owned(), "new0".to_owned(), "taken0".to_owned()];
    let before = (agent.state.plane().clone(), agent.status().agent.revision);
    agent.log();

    agent.host.with(|host| host.refused = vec!["taken0".to_owned()]);
    let refusal = agent.reload(&shop(), &wanted).unwrap_err();
    assert_eq!(refusal.code, "not_attached");
    assert!(refusal.message.contains("taken0"), "{refusal:?}");
    assert_eq!(agent.log(), ["attach new0", "detach new0"]);

    agent.host.with(|host| (host.refused.clear(), host.refuse_store = true));
    let refusal = agent.reload(&shop(), &wanted).unwrap_err();
    assert_eq!(refusal.code, "state_not_stored");
    assert!(refusal.message.contains("disk is full"), "{refusal:?}");
    assert_eq!(agent.log(), ["attach new0", "attach taken0", "detach new0", "detach taken0"]);
    assert!(agent.state.plane() == &before.0);
    let status = agent.status();
    assert_eq!((status.agent.revision, status.services.len()), (before.1, 2));
    assert_eq!(status.interfaces.len(), 1);

    agent.host.with(|host| host.refuse_store = false);
    agent.reload(&shop(), &wanted).unwrap();
    assert_eq!(agent.log(), ["attach new0", "attach taken0", "store", "apply"]);
    let names: Vec<_> = agent.status().interfaces.into_iter().map(|i| (i.name, i.mode)).collect();
    let native = || Some("native".to_owned());
    assert_eq!(
        names,
        [
            ("lo".to_owned(), native()),
            ("new0".to_owned(), native()),
            ("taken0".to_owned(), native())
        ]
    );
    agent.reload(&wanted, &other()).unwrap();
    assert_eq!(agent.log(), ["detach new0", "detach taken0"], "nothing else was to be done");
}

#[test]
fn a_kernel_that_refuses_a_reload_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    agent.host.with(|host| host.refuse_apply = true);
    let (_, reloaded) = agent.reload(&shop(), &other()).unwrap();
    assert_eq!(reloaded.not_applied.unwrap().code, "not_applied");
    agent.host.with(|host| host.refuse_apply = false);
    agent.wait(1_000);
    assert_eq!(agent.host.with(|host| host.plane.services.clone()), agent.state.plane().services);
    assert!(agent.status().alerts.is_empty());
}

#[test]
fn a_split_that_is_being_prepared_goes_on_or_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let (answer, _) = agent.learn(&[("v2", "30%")]);
    // The service stands elsewhere in the list after this, and has another configuration.
    let mut wanted = shop();
    wanted.services.rotate_left(1);
    wanted.services[1].versions[0].backends[0].weight = 2;
    agent.reload(&shop(), &wanted).unwrap();
    agent.wait(100);
    agent.wait(7_000);
    assert!(answer.blocking_recv().unwrap().unwrap().applied);
    assert_eq!(agent.status().services[1].versions[1].asked_text, "30%");

    let (answer, _) = agent.learn(&[("v2", "60%")]);
    let mut gone = wanted.clone();
    gone.services.remove(1);
    agent.reload(&wanted, &gone).unwrap();
    assert_eq!(answer.blocking_recv().unwrap().unwrap_err().code, "unknown_service");
}

#[test]
fn a_service_that_is_frozen_or_waits_for_a_confirmation_is_not_configured() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let mut weighed = shop();
    weighed.services[0].versions[0].backends[0].weight = 3;
    let mut gone = shop();
    gone.services.remove(0);
    let mut elsewhere = shop();
    elsewhere.services[1].versions[0].backends[0].weight = 3;

    freeze(&mut agent, Some("shop"), Some("a fair"), None).unwrap();
    for wanted in [&weighed, &gone] {
        let before = agent.owners();
        let refusal = agent.reload(&shop(), wanted).unwrap_err();
        assert_eq!((refusal.code, agent.owners()), ("frozen", before));
        assert!(refusal.message.contains("a fair"), "{}", refusal.message);
    }
    agent.reload(&shop(), &elsewhere).unwrap();
    agent.reload(&elsewhere, &shop()).unwrap();
    freeze(&mut agent, None, Some("night"), None).unwrap();
    assert_eq!(agent.reload(&shop(), &elsewhere).unwrap_err().code, "frozen");
    freeze(&mut agent, None, None, None).unwrap();
    freeze(&mut agent, Some("shop"), None, None).unwrap();

    split(&mut agent, &[("v2", "5%")], "confirm=5m").unwrap();
    let refusal = agent.reload(&shop(), &weighed).unwrap_err();
    assert_eq!(refusal.code, "confirmation_pending", "{}", refusal.message);
    agent.reload(&shop(), &elsewhere).unwrap();
    confirm(&mut agent, None).unwrap();
    agent.reload(&elsewhere, &weighed).unwrap();
}

#[test]
fn a_panic_between_the_plan_and_the_reload_is_not_lost() {
    let mut weighed = shop();
    weighed.services[0].versions[0].backends[0].weight = 3;
    for behind in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = agent(&dir);
        agent.split(&[("v2", "40%")]).unwrap();
        let planned = agent.planned(&shop(), &weighed);
        if behind {
            let now_ms = agent.boot_ms;
            let found = panic::behind(maps(agent.state.plane()), "shop", false, now_ms, 5);
            agent.host.with(|host| host.panics = Some(found));
        } else {
            let (request, peer) = (PanicRequest::default(), Peer { uid: 0, gid: 0, pid: None });
            agent.ask(|reply| Request::Panic { request, peer, reply }).unwrap();
        }
        agent.put_in_force(planned, &weighed).unwrap();
        panic::assert_all_on_control(&agent);
        let status = agent.status();
        assert_eq!(status.services[0].versions[1].asked_text, "0%", "{behind}");
        assert!(status.services[0].panic.is_some(), "{behind}");
        assert_eq!(status.services[0].versions[0].backends[0].buckets, 3072, "{behind}");
    }
}

#[test]
fn a_reload_of_agent_keys_alone_is_in_the_audit_trail() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let planned = agent.planned(&shop(), &shop());
    let settings = ["agent.listen: off → 127.0.0.1:9109"];
    let reloaded = agent.put_in_force_on(planned, &shop(), &settings, None, None).unwrap();
    let (revision, change) = SqliteStore::new(dir.path()).changes(0, 100).unwrap().pop().unwrap();
    assert_eq!((revision, change.action.as_str()), (reloaded.revision, "reload"));
    assert_eq!((change.uid, change.reason.as_deref()), (Some(1000), Some("because")));
    agent.wait(1_000);
    let asked = EventsAsked::default();
    let found = agent.ask(|reply| Request::Events { asked, reply }).unwrap().events.events;
    assert!(found.iter().any(|event| event.text == settings[0]), "{found:?}");
    // It is about no service: a split goes by its own.
    split(&mut agent, &[("v2", "5%")], &format!("if={}", revision - 1)).unwrap();
    let config = Arc::new(shop());
    let stale = agent.ask(|reply| Request::Survey { config, if_revision: Some(revision), reply });
    assert_eq!(stale.unwrap_err().code, "stale_revision");
}

#[test]
fn a_reload_that_waits_is_alone_and_is_taken_back_whatever_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let mut elsewhere = shop();
    elsewhere.services[1].versions[0].backends[0].weight = 3;
    let planned = agent.planned(&shop(), &elsewhere);
    let first = agent.put_in_force_on(planned, &elsewhere, &[], Some("5m"), None).unwrap();
    assert_eq!(first.confirm_within_ms, Some(300_000));
    let waits = agent.status().pending;
    assert_eq!((waits.len(), waits[0].change.revision), (1, Some(first.revision)));
    let refused = agent.reload(&elsewhere, &shop()).unwrap_err();
    assert_eq!(refused.code, "confirmation_pending");
    assert!(refused.help.unwrap().contains("comes back by itself"));
    agent.split(&[("v2", "5%")]).unwrap();
    freeze(&mut agent, None, Some("night"), None).unwrap();
    let planned = agent.planned(&elsewhere, &shop());
    let back = agent.put_in_force_on(planned, &shop(), &[], None, Some(first.revision)).unwrap();
    assert!(agent.status().pending.is_empty());
    assert_eq!(agent.status().services[0].versions[1].asked_text, "5%", "live state stays");
    let (_, change) = SqliteStore::new(dir.path()).changes(0, 100).unwrap().pop().unwrap();
    assert_eq!((change.action.as_str(), &change.about[..]), ("reload", &[first.revision][..]));
    assert!(back.revision > first.revision);
}

#[test]
fn a_start_ends_the_wait_of_a_reload() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = agent(&dir);
    let planned = first.planned(&shop(), &shop());
    let reloaded = first.put_in_force_on(planned, &shop(), &[], Some("5m"), None).unwrap();
    let plane = first.state.plane().clone();
    let at = first.boot_ms + 1_000;
    let mut next = Agent::start_at(dir.path(), &shop(), Shared::default(), maps(&plane), at);
    assert!(next.status().pending.is_empty());
    let (_, change) = SqliteStore::new(dir.path()).changes(0, 100).unwrap().pop().unwrap();
    assert_eq!((change.action.as_str(), &change.about[..]), ("confirm", &[reloaded.revision][..]));
    next.wait(400_000);
    assert_eq!(next.status().agent.revision, reloaded.revision + 1);
    next.reload(&shop(), &other()).unwrap();
}

/// Whether a reload would be refused without being forced, and the words for it.
fn refused(agent: &mut Agent, wanted: &Config) -> String {
    agent.planned(&shop(), wanted).report.needs_force.join("; ")
}

#[test]
fn what_breaks_connections_takes_force_where_there_may_be_any() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = agent(&dir);
    let mut hashed = shop();
    hashed.services[0].stickiness = Stickiness::Connection;
    let mut forward = shop();
    forward.services[0].forward = Forward::Nat;
    let mut gone = shop();
    gone.services.remove(0);
    for wanted in [&hashed, &forward, &gone] {
        assert_eq!(refused(&mut agent, wanted), "", "no packet has come yet");
    }
    let index = agent.host.with(|host| {
        let (index, _) = host.plane.backends.iter().find(|(_, b)| b.service == 0).unwrap();
        *index
    });
    agent.host.with(|host| host.packets.insert(index, 5));
    agent.wait(1_000);
    assert!(
        refused(&mut agent, &hashed)
            .contains("another `stickiness` gives every client another bucket")
    );
    assert!(
        refused(&mut agent, &forward).contains("another `forward` breaks its open connections")
    );
    assert!(
        refused(&mut agent, &gone)
            .contains("`shop` is removed and has had packets within the last")
    );
    for _ in 0..60 {
        agent.wait(1_000);
    }
    assert_eq!(refused(&mut agent, &gone), "", "quiet for a minute");
    assert!(refused(&mut agent, &hashed).contains("has had traffic"), "as at a start");
    agent.host.with(|host| host.packets.insert(index, 6));
    assert!(refused(&mut agent, &gone).contains("within the last 0 s"));
}

#[test]
fn open_connections_of_translated_services_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut nat = shop();
    nat.services.iter_mut().for_each(|service| service.forward = Forward::Nat);
    let mut agent = Agent::start(dir.path(), &nat, Shared::default(), Adopted::default());
    let mut gone = nat.clone();
    gone.services.remove(0);
    let census = |open| Census { by_table: HashMap::from([(0, open)]), ..Census::default() };
    agent.host.with(|host| host.census = Some(census(0)));
    let report = agent.planned(&nat, &gone).report;
    assert_eq!((report.needs_force.len(), report.services[0].connections_held), (0, Some(0)));
    agent.host.with(|host| host.census = Some(census(12)));
    let report = agent.planned(&nat, &gone).report;
    assert_eq!(report.services[0].connections_held, Some(12));
    assert!(report.needs_force[0].contains("has about 12 open connections"), "{report:?}");
    let mut moved = nat.clone();
    moved.services[0].versions[0]
        .backends
        .push(Backend { addr: "10.0.1.9:443".parse().unwrap(), weight: 1 });
    let report = agent.planned(&nat, &moved).report;
    assert_eq!(report.services[0].connections_held, Some(12));
    assert!(report.needs_force.is_empty());
}
