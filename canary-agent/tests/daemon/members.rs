//! Members of audiences: what is asked, what is stored, who is steered by which route.

use std::{collections::BTreeMap, path::Path};

use canary_agent::{
    api::{
        audience::{AudienceStatus, ClientReport, MembersReport, MembersRequest},
        model::AudienceSummary,
    },
    config::{Config, load_str, render},
    daemon::{Event, Peer, Refusal, Request},
    plan::{Adopted, Planner, Start},
    store::{Event as Stored, EventQuery, SqliteStore, StateStore},
};
use ipnet::IpNet;
use proptest::prelude::*;

use crate::support::{Agent, Shared};

const HOUR: u64 = 3_600_000;

fn configured(audiences: &str) -> Config {
    let text = format!(
        r#"
[agent]
interfaces = ["lo"]
[[service]]
name = "shop"
vip = ["203.0.113.10", "2001:db8::10"]
ports = ["tcp/443"]
buckets = 4096
drain = "1000s"
stickiness = "client"
forward = "dsr"
health = {{ type = "none" }}
versions.stable.backends = ["10.0.1.1:443", "[2001:db8:1::1]:443"]
versions.v2.backends = ["10.0.2.1:443", "[2001:db8:2::1]:443"]
[[service.route]]
audience = "banned"
split = {{}}
[[service.route]]
audience = "beta"
split = {{ v2 = "100%" }}
{audiences}
"#
    );
    let loaded = load_str("agent.toml", &text);
    loaded.unwrap_or_else(|errors| panic!("{text}\n{}", render(&errors))).config
}

fn beta(max: u32) -> Config {
    configured(&format!(
        "[[audience]]\nname = \"beta\"\ndynamic = {{ ttl = \"8h\", max = {max} }}\n\
         [[audience]]\nname = \"banned\"\ncidr = \"198.51.100.0/24\"\n"
    ))
}

fn request(add: &[&str], remove: &[&str]) -> MembersRequest {
    let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    MembersRequest { add: texts(add), remove: texts(remove), ..MembersRequest::default() }
}

impl Agent {
    fn members(&mut self, request: MembersRequest) -> Result<MembersReport, Refusal> {
        let peer = Peer { uid: 1000, gid: 1000, pid: None };
        let audience = "beta".to_owned();
        self.ask(|reply| Request::Members { audience, request, peer, reply })
    }

    fn add(&mut self, members: &[&str]) -> Result<MembersReport, Refusal> {
        self.members(request(members, &[]))
    }

    fn audience(&mut self) -> AudienceStatus {
        self.ask(|reply| Request::Audience { name: "beta".to_owned(), reply }).unwrap()
    }

    /// The audience whose route steers a client, and whether its last change is remembered.
    fn route(&mut self, address: &str) -> (Option<String>, bool) {
        let address = address.parse().unwrap();
        let report: ClientReport = self.ask(|reply| Request::Client { address, reply });
        let [shop] = &report.services[..] else { panic!("one service has routes: {report:?}") };
        (shop.audience.clone(), shop.tracked)
    }

    /// What the maps would hold.
    fn maps(&self) -> Adopted {
        self.host.with(|host| {
            let classes = &host.plane.classes;
            let mut adopted = crate::plan_support::maps(&host.plane);
            adopted.classes.networks =
                classes.networks.each_ref().map(|networks| networks.prefixes().to_vec());
            adopted.classes.tables = classes.tables.clone();
            adopted
        })
    }

    fn again(&self, dir: &Path, config: &Config, later_ms: u64) -> Self {
        let host = Shared::default();
        Self::start_at(dir, config, host, self.maps(), self.boot_ms + later_ms)
    }
}

fn by(name: &str, tracked: bool) -> (Option<String>, bool) {
    (Some(name.to_owned()), tracked)
}

#[test]
fn a_member_is_steered_by_its_route_until_its_time_is_over_to_the_second() {
    let dir = tempfile::tempdir().unwrap();
    let config = beta(100);
    let mut agent = Agent::start(dir.path(), &config, Shared::default(), Adopted::default());
    assert_eq!(agent.route("192.0.2.1"), (None, false));
    let mut asked = request(&["192.0.2.1", "2001:db8:9::7", "198.51.100.9"], &[]);
    asked.ttl = Some("10m".to_owned());
    asked.dry_run = true;
    let before = agent.members(asked.clone()).unwrap();
    assert_eq!((before.applied, before.added, before.members), (false, 3, 3));
    assert_eq!(
        (agent.route("192.0.2.1"), agent.audience().members.unwrap().members),
        ((None, false), 0)
    );

    asked.dry_run = false;
    let report = agent.members(asked).unwrap();
    assert_eq!((report.applied, report.added, report.ttl_seconds), (true, 3, Some(600)));
    assert_eq!(agent.route("192.0.2.1"), by("beta", true));
    assert_eq!(agent.route("192.0.2.2"), (None, false));
    assert_eq!(agent.route("2001:db8:9::8"), by("beta", true), "its /64");
    assert_eq!(agent.route("198.51.100.9"), by("banned", false), "the first route that holds it");

    // Renewed, but for one.
    agent.wait(300_000);
    let report = agent.add(&["192.0.2.1", "192.0.2.3"]).unwrap();
    assert_eq!((report.added, report.renewed, report.members), (1, 1, 4));
    agent.wait(299_999);
    assert_eq!(agent.route("2001:db8:9::8"), by("beta", true));
    let wakeup = agent.event(Event::Tick).unwrap();
    assert_eq!(wakeup, agent.boot_ms + 1, "the loop wakes up for it");
    agent.boot_ms += 1;
    agent.event(Event::Wakeup);
    assert_eq!(agent.route("2001:db8:9::8"), (None, true));
    assert_eq!(agent.route("192.0.2.1"), by("beta", true), "renewed for 8 h");
    let members = agent.audience().members.unwrap();
    assert_eq!((members.members, members.room, members.ttl_seconds), (2, 100, 28_800));

    let report = agent.members(request(&[], &["192.0.2.1", "192.0.2.77"])).unwrap();
    assert_eq!((report.removed, report.not_there, report.members), (1, 1, 1));
    agent.wait(100);
    assert_eq!(agent.route("192.0.2.1"), (None, true));
    // A shorter life is none: nothing is taken away by adding.
    let short = MembersRequest { ttl: Some("1s".to_owned()), ..request(&["192.0.2.3"], &[]) };
    assert_eq!(agent.members(short).unwrap().kept, 1);
    agent.wait(10_000);
    assert_eq!(agent.route("192.0.2.3"), by("beta", true));

    // Who did what, and how often; nobody's address.
    agent.wait(60_000);
    let query = EventQuery { limit: 100, ..EventQuery::default() };
    let events = SqliteStore::new(dir.path()).events(&query).unwrap();
    let lines: Vec<String> = events
        .into_iter()
        .filter_map(|event| match event {
            Stored::Notice(_, notice) if notice.kind == "members" => Some(notice.text),
            _ => None,
        })
        .collect();
    assert_eq!(
        lines,
        [
            "members of audience beta: 3 added by uid 1000",
            "members of audience beta: 1 added, 1 renewed by uid 1000",
            "members of audience beta: 2 expired",
            "members of audience beta: 1 removed by uid 1000",
        ],
    );
    let status = agent.status();
    let one = status.audiences.iter().find(|one| one.name == "beta").unwrap();
    let expected = AudienceSummary {
        name: "beta".to_owned(),
        members: 1,
        room: 100,
        added: 4,
        renewed: 1,
        removed: 1,
        expired: 2,
        ..AudienceSummary::default()
    };
    assert_eq!(*one, expected);
}

#[test]
fn what_can_t_be_done_is_said_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), &beta(3), Shared::default(), Adopted::default());
    agent.add(&["192.0.2.1", "192.0.2.2"]).unwrap();
    let before = agent.audience();
    let many: Vec<String> = (0..10_001).map(|n| format!("10.0.{}.{}", n / 256, n % 256)).collect();
    let many = MembersRequest { add: many, ..MembersRequest::default() };
    let ttl =
        |ttl: &str| MembersRequest { ttl: Some(ttl.to_owned()), ..request(&["192.0.2.1"], &[]) };
    for (asked, code, said) in [
        (
            request(&["192.0.2.3", "192.0.2.4"], &[]),
            "no_room",
            "2 of at most 3; nothing has changed",
        ),
        (
            request(&["192.0.2.3", "192.0.2.4/24", "x"], &[]),
            "bad_members",
            "number 2: `192.0.2.4/24`",
        ),
        (request(&["10.0.0.0/8"], &[]), "bad_members", "too large for a member"),
        (request(&["192.0.2.3"], &["192.0.2.3"]), "bad_members", "to be added and to be removed"),
        (request(&[], &[]), "bad_members", "no member is named"),
        (many, "bad_members", "10001 members in one request; 10000 is the most"),
        (ttl("0s"), "bad_ttl", "a lifetime is from 1s to 365 days"),
        (ttl("400d"), "bad_ttl", "at most 365 days"),
        (ttl("8"), "bad_ttl", "no unit"),
    ] {
        let refusal = agent.members(asked).unwrap_err();
        assert_eq!(refusal.code, code, "{refusal:?}");
        assert!(refusal.message.contains(said), "{refusal:?}");
        assert!(refusal.help.is_some(), "{refusal:?}");
        assert_eq!(agent.audience(), before);
    }
    assert_eq!(agent.route("192.0.2.3"), (None, false));
    // Who is there is renewed, and who goes makes room for another.
    assert_eq!(agent.add(&["192.0.2.1"]).unwrap().kept, 1);
    let report = agent.members(request(&["192.0.2.3", "192.0.2.4"], &["192.0.2.1"])).unwrap();
    assert_eq!((report.added, report.removed, report.members), (2, 1, 3));
    assert_eq!(agent.status().audiences[0].refused, 9);

    // What can't be stored does not count.
    agent.host.with(|host| host.refuse_store = true);
    let refusal = agent.members(request(&["192.0.2.9"], &["192.0.2.3"])).unwrap_err();
    assert_eq!(refusal.code, "state_not_stored");
    agent.host.with(|host| host.refuse_store = false);
    agent.wait(1_000);
    assert_eq!(agent.route("192.0.2.9"), (None, false));
    assert_eq!(agent.route("192.0.2.3"), by("beta", true));

    // Audiences that are not there, or have no members.
    for (name, code) in [("banned", "not_dynamic"), ("bete", "unknown_audience")] {
        let peer = Peer { uid: 1000, gid: 1000, pid: None };
        let (audience, request) = (name.to_owned(), request(&["192.0.2.9"], &[]));
        let refused = agent.ask(|reply| Request::Members { audience, request, peer, reply });
        assert_eq!(refused.unwrap_err().code, code);
    }
}

#[test]
fn members_are_kept_over_a_restart_and_those_who_are_late_are_gone_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let config = beta(100);
    let mut agent = Agent::start(dir.path(), &config, Shared::default(), Adopted::default());
    agent.add(&["192.0.2.1"]).unwrap();
    let short = MembersRequest { ttl: Some("60s".to_owned()), ..request(&["192.0.2.2"], &[]) };
    agent.members(short).unwrap();
    agent.wait(1_000);

    let mut next = agent.again(dir.path(), &config, 30_000);
    assert_eq!(next.route("192.0.2.1"), by("beta", true));
    assert_eq!(next.route("192.0.2.2"), by("beta", true));
    // Killed, and started when the time of one is over: it is in no table that is written.
    let mut next = next.again(dir.path(), &config, 30_000);
    assert_eq!(next.host.with(|host| host.log.iter().filter(|line| *line == "apply").count()), 1);
    assert_eq!(next.route("192.0.2.1"), by("beta", true));
    assert_eq!(next.route("192.0.2.2"), (None, true));
    assert_eq!(next.audience().members.unwrap().members, 1);
    next.wait(1_000);
    assert_eq!(SqliteStore::new(dir.path()).load().unwrap().members.len(), 1);

    // The host is started: what is left is what the wall clock says.
    let host = Shared::default();
    host.with(|host| host.boot_id = "another".to_owned());
    let unix_ms = 1_700_000_000_000 + 4 * HOUR;
    let mut next = Agent::start_with(dir.path(), &config, host, Adopted::default(), 7_000, unix_ms);
    assert_eq!(next.route("192.0.2.1"), by("beta", false), "nobody has a connection from before");
    let left = next.audience().members.unwrap().next_ends_in_seconds.unwrap();
    assert!((4.0 * 3600.0 - 10.0..=4.0 * 3600.0).contains(&left), "{left}");
    next.wait(4 * HOUR);
    assert_eq!(next.route("192.0.2.1"), (None, true));

    // An audience that may have none just now keeps those that it had.
    next.add(&["192.0.2.5"]).unwrap();
    next.wait(100);
    let none = configured(
        "[[audience]]\nname = \"beta\"\ncidr = \"192.0.2.9\"\n\
         [[audience]]\nname = \"banned\"\ncidr = \"198.51.100.0/24\"\n",
    );
    let mut without = next.again(dir.path(), &none, 1_000);
    assert_eq!(without.route("192.0.2.5"), (None, true));
    let mut with = without.again(dir.path(), &config, 1_000);
    assert_eq!(with.route("192.0.2.5"), by("beta", true));
    assert_eq!(with.route("192.0.2.9"), (None, true));
}

#[test]
fn a_change_of_members_takes_the_same_time_however_often_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(dir.path(), &beta(100), Shared::default(), Adopted::default());
    agent.wait(1_000);
    agent.host.with(|host| host.log.clear());
    for n in 1..=50 {
        agent.add(&[&format!("192.0.2.{n}")]).unwrap();
    }
    let applied = agent.host.with(|host| host.log.iter().filter(|line| *line == "apply").count());
    assert_eq!(applied, 1, "the first at once");
    agent.boot_ms += 100;
    agent.event(Event::Wakeup);
    let applied = agent.host.with(|host| host.log.iter().filter(|line| *line == "apply").count());
    assert_eq!(applied, 2, "the others together");
    assert_eq!(agent.route("192.0.2.50"), by("beta", true));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever comes and goes, in whatever is inside what, clients have the class that a loop over
    /// the routes gives them.
    #[test]
    fn members_are_in_the_classes_that_a_loop_gives_them(
        nets in proptest::collection::vec((any::<u8>(), 24_u8..=32), 0..6),
        steps in proptest::collection::vec((any::<bool>(), any::<bool>(), any::<u8>(), 22_u8..=32, 0_u64..120), 1..40),
    ) {
        let net = |last: u8, length: u8| {
            IpNet::new([192, 0, 2, last].into(), length).unwrap().trunc()
        };
        let listed: Vec<String> = nets.iter().map(|(last, len)| format!("{:?}", net(*last, *len).to_string())).collect();
        let mut listed = listed;
        listed.sort();
        listed.dedup();
        let config = configured(&format!(
            "[[audience]]\nname = \"beta\"\ndynamic = {{ ttl = \"8h\" }}\n\
             [[audience]]\nname = \"banned\"\ncidr = [{}]\ndynamic = {{ ttl = \"8h\" }}\n",
            listed.join(", ")
        ));
        let listed: Vec<IpNet> = nets.iter().map(|(last, len)| net(*last, *len)).collect();
        let start = Start { config: &config, adopted: Adopted::default(), stored: &[], now_ms: 1_000_000 };
        let (mut planner, _) = Planner::begin(start).unwrap();
        let mut now = 1_000_000;
        planner.step(now);
        let mut members: BTreeMap<&str, Vec<IpNet>> = BTreeMap::from([("beta", Vec::new()), ("banned", Vec::new())]);
        for (of_beta, adds, last, length, wait) in steps {
            let name = if of_beta { "beta" } else { "banned" };
            let (net, its) = (net(last, length), members.get_mut(name).unwrap());
            match (adds, its.iter().position(|one| *one == net)) {
                (true, None) => {
                    planner.change_members(name, &[net], &[]).unwrap();
                    its.push(net);
                }
                (false, Some(at)) => {
                    its.remove(at);
                    planner.change_members(name, &[], &[net]).unwrap();
                }
                _ => {}
            }
            now += wait;
            planner.step(now);
        }
        planner.step(now + 1_000);
        for last in 0..=u8::MAX {
            for third in [0, 1, 2, 3] {
                let addr = [192, 0, third, last].into();
                let banned = listed.iter().chain(&members["banned"]).any(|net| net.contains(&addr));
                let beta = members["beta"].iter().any(|net| net.contains(&addr));
                let expected = if banned { Some("banned") } else { beta.then_some("beta") };
                let class = planner.plane().classes.class(addr).entry.current();
                prop_assert_eq!(planner.audience(class, "shop"), expected, "{}", addr);
            }
        }
    }
}
