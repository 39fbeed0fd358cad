//! Random changes, one after the other, and kills of the agent among them.
//!
//! What an operator can do to a backend is among them: `drain` and `ready`; `maint`, which
//! breaks its connections by contract and so comes when it has none any more; weights,
//! removals and additions by a changed configuration, at each start after a kill and at
//! restarts of their own.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use canary_agent::store::Admin;
use canary_tests::{
    agent::{Agent, AgentOptions},
    control::Control,
    hold::{Hold, State},
    model::Random,
    stack,
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use super::{
    Kind,
    fleet::Fleet,
    history::{History, encoded, service},
};
use crate::support::{Bench, ECHO, SHOP};

/// Longest pause between two changes.
const PAUSE_MAX: Duration = Duration::from_millis(60);

/// Longest time that nobody runs after a kill.
const DEAD_MAX: Duration = Duration::from_millis(300);

/// How long into a change a kill may come: longer than most take.
const INTO_CHANGE_MAX: Duration = Duration::from_millis(6);

/// Makes a change, and says what; `None` if it is not possible now.
type Make = fn(&mut Script<'_>) -> Option<String>;

/// The kinds of change, each with how often it is made relative to the others.
const CHANGES: [(u64, &str, Make); 9] = [
    (10, "splits of one version", |script| script.split(Shares::Two)),
    (10, "splits of two", |script| script.split(Shares::Three)),
    (4, "whole splits", |script| script.split(Shares::Whole)),
    (6, "failed checks", |script| script.fail()),
    (6, "passed checks", |script| script.recover()),
    (7, "drain", |script| script.drain()),
    (7, "ready", |script| script.ready()),
    (3, "maint", |script| script.maintain()),
    (3, "restarts", |script| script.restart()),
];

/// What kind of split is drawn.
#[derive(Clone, Copy)]
enum Shares {
    /// Some for one version besides control.
    Two,
    /// Some for either.
    Three,
    /// All for one version, which may be control.
    Whole,
}

/// What the script needs of the hosts and their services.
pub(super) struct Place<'a> {
    pub(super) bench: &'a Bench,
    /// Lets a server pass or fail its checks and go on otherwise, by its position.
    pub(super) set_healthy: &'a dyn Fn(usize, bool),
    /// The configuration after its `[agent]` table.
    pub(super) services: &'a dyn Fn(&Fleet) -> String,
}

/// The run's means and where it stands.
pub(super) struct Script<'a> {
    place: Place<'a>,
    pub(super) agent: Agent<'a>,
    control: Option<Control>,
    hold: &'a Hold,
    pub(super) history: History,
    random: Random,
    /// Positions of the servers that fail their checks.
    failing: BTreeSet<usize>,
    fleet: Fleet,
    next_client: u32,
    /// How often each of [`CHANGES`] was made, and changed configurations at a start.
    made: [u32; CHANGES.len()],
    configured: u32,
}

impl<'a> Script<'a> {
    pub(super) fn new(
        place: Place<'a>,
        agent: Agent<'a>,
        hold: &'a Hold,
        history: History,
        random: Random,
        fleet: Fleet,
    ) -> Self {
        let control = Some(Control::open(&agent.socket()).expect("the socket"));
        Self {
            place,
            agent,
            control,
            hold,
            history,
            random,
            failing: BTreeSet::new(),
            fleet,
            next_client: 0,
            made: Default::default(),
            configured: 0,
        }
    }

    /// Begins to open a connection from a client of its own.
    pub(super) fn open(&mut self, kind: Kind, family: Family) {
        self.next_client += 1;
        self.hold.open(kind, family, family.client(self.next_client));
    }

    /// Notes a step.
    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.history.note(what.into(), &self.hold.records(), self.control.as_mut());
    }

    /// Makes so many changes, with so many kills spread among them.
    pub(super) fn run(&mut self, changes: u32, kills: u32) {
        let every = changes / kills;
        let kill_at: BTreeSet<u32> =
            (0..kills).map(|n| n * every + self.random.below(every.into()) as u32).collect();
        for number in 0..changes {
            if kill_at.contains(&number) {
                self.kill();
            }
            let what = loop {
                let total = CHANGES.iter().map(|(weight, ..)| weight).sum();
                let mut drawn = self.random.below(total);
                let kind = CHANGES.iter().position(|(weight, ..)| {
                    let found = drawn < *weight;
                    drawn = drawn.saturating_sub(*weight);
                    found
                });
                let kind = kind.expect("less than the total was drawn");
                if let Some(what) = CHANGES[kind].2(self) {
                    self.made[kind] += 1;
                    break what;
                }
            };
            self.note(what);
            self.replace_one();
            thread::sleep(self.random.between(Duration::ZERO, PAUSE_MAX));
        }
    }

    /// What was done how often.
    pub(super) fn made(&self) -> String {
        let kinds = CHANGES.iter().zip(self.made);
        let kinds: Vec<String> = kinds.map(|((_, name, _), n)| format!("{n} {name}")).collect();
        format!("{}; {} starts with other backends", kinds.join(", "), self.configured)
    }

    /// Closes a connection and opens another of its kind: some are always as young
    /// as the last change.
    fn replace_one(&mut self) {
        let records = self.hold.records();
        let open: Vec<usize> =
            (0..records.len()).filter(|id| records[*id].state == State::Open).collect();
        let id = self.random.one_of(&open);
        self.hold.close(id as u64);
        self.open(records[id].kind, records[id].family);
    }

    /// A service and a split for it, as a request and in words.
    fn draw(&mut self, shares: Shares) -> (String, String, String) {
        let service = self.random.one_of(&[SHOP, ECHO]);
        let (v2, v3) = match shares {
            Shares::Two => (self.random.below(101), 0),
            Shares::Three => {
                let v2 = self.random.below(101);
                (v2, self.random.below(101 - v2))
            }
            Shares::Whole => self.random.one_of(&[(100, 0), (0, 100), (0, 0)]),
        };
        (
            format!("/v1/services/{service}/split"),
            format!("{{\"split\": {{\"v2\": \"{v2}%\", \"v3\": \"{v3}%\"}}}}"),
            format!("split {service} v2={v2}% v3={v3}%"),
        )
    }

    fn split(&mut self, shares: Shares) -> Option<String> {
        let (target, body, what) = self.draw(shares);
        self.ask(&target, &body, &what).expect("a split takes no backend away");
        Some(what)
    }

    /// Asks for a change, which must be made. `Err` with the answer where the backend is the last
    /// one that takes new connections.
    #[track_caller]
    fn ask(&mut self, target: &str, body: &str, what: &str) -> Result<(), String> {
        let control = self.control.as_mut().expect("an agent");
        let answer = control.ask("PUT", target, body.as_bytes()).expect("an answer");
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        if answer.status == 409 && text.contains("last_backend") {
            return Err(text);
        }
        assert_eq!(answer.status, 200, "{what}: {text}");
        Ok(())
    }

    /// A service and the position of a server of it.
    fn draw_backend(&mut self) -> (&'static str, usize) {
        let server = self.random.below(self.place.bench.servers.len() as u64) as usize;
        (self.random.one_of(&[SHOP, ECHO]), server)
    }

    /// Tells both addresses of a server in a service something. `None` where it stays ready, being
    /// the last one that passes its checks.
    fn tell(&mut self, name: &'static str, server: usize, admin: Admin) -> Option<String> {
        let host = &self.place.bench.topology.backends[server];
        let what = format!("{} {name} {}", admin.name(), host.name);
        let port = self.fleet.port(name);
        let targets = Family::ALL.map(|family| {
            let addr = SocketAddr::new(host.addr(family), port);
            format!("/v1/services/{name}/backends/{}", encoded(addr))
        });
        for target in &targets {
            let body = format!("{{\"state\": {:?}}}", admin.name());
            let mut refused = None;
            // A check of another one that has just begun to pass again, or that was late on a busy
            // host, is waited for.
            wait::until(&what, || match self.ask(target, &body, &what) {
                Err(why) if !self.fleet.may_be_last(name, server, &self.failing) => Err(why),
                answer => {
                    refused = answer.err();
                    Ok(())
                }
            });
            if refused.is_some() {
                for target in &targets {
                    self.ask(target, r#"{"state": "ready"}"#, &what).expect("ready is not refused");
                }
                return None;
            }
        }
        self.fleet.member(name, server).admin = admin;
        Some(what)
    }

    fn drain(&mut self) -> Option<String> {
        let (name, server) = self.draw_backend();
        let ready = self.fleet.member(name, server).admin == Admin::Ready;
        (ready && self.fleet.may_go(name, server))
            .then(|| self.tell(name, server, Admin::Drain))
            .flatten()
    }

    fn ready(&mut self) -> Option<String> {
        let (name, server) = self.draw_backend();
        let member = self.fleet.member(name, server);
        (member.configured && member.admin != Admin::Ready)
            .then(|| self.tell(name, server, Admin::Ready))
            .flatten()
    }

    /// Drains a server, ends what is open on it as its clients would, and puts it into
    /// maintenance. What was ended begins anew, elsewhere.
    fn maintain(&mut self) -> Option<String> {
        let (name, server) = self.draw_backend();
        let member = *self.fleet.member(name, server);
        let there = member.configured && member.admin != Admin::Maint;
        if !there || !self.fleet.may_go(name, server) {
            return None;
        }
        self.tell(name, server, Admin::Drain)?;
        self.hold.wait_opened();
        let host = &self.place.bench.topology.backends[server];
        let records = self.hold.records();
        let on_it: Vec<usize> = (0..records.len())
            .filter(|id| {
                let record = &records[*id];
                service(record.kind) == name
                    && !record.ended()
                    && record.server.as_deref() == Some(&host.name)
            })
            .collect();
        on_it.iter().for_each(|id| self.hold.close(*id as u64));
        let port = self.fleet.port(name);
        wait::until("a drained server without connections", || {
            let records = self.hold.records();
            let open = on_it.iter().filter(|id| !records[**id].ended()).count();
            // A connection ends for its client before it ends for the server.
            let sockets = stack::open_sockets(&host.namespace, Some(port));
            (open + sockets == 0)
                .then_some(())
                .ok_or_else(|| format!("{name} on {}: {open} held, {sockets} sockets", host.name))
        });
        let what = self.tell(name, server, Admin::Maint).expect("it takes none already");
        on_it.iter().for_each(|id| self.open(records[*id].kind, records[*id].family));
        Some(format!("{what}, {} connections having ended", on_it.len()))
    }

    /// Another configuration, and the agent ended and started with it.
    fn restart(&mut self) -> Option<String> {
        let what = self.reconfigure();
        self.control = None;
        self.agent.stop(Signal::SIGTERM);
        self.start();
        Some(format!("restarted with {what}"))
    }

    /// Writes a configuration with other weights and other backends, for the next start.
    fn reconfigure(&mut self) -> String {
        let mut done = Vec::new();
        let mut changed = BTreeSet::new();
        for _ in 0..1 + self.random.below(3) {
            let (name, server) = self.draw_backend();
            let weight = self.random.below(4) as u32;
            let toggle = self.random.below(2) == 0;
            // Of one that is removed and added again at once, the agent hears nothing, and keeps
            // what it was told.
            if !changed.insert((name, server)) {
                continue;
            }
            let host = &self.place.bench.topology.backends[server].name;
            let change = match toggle {
                true => self.fleet.toggle(name, server),
                false => self.fleet.weigh(name, server, weight),
            };
            done.extend(change.map(|change| format!("{name} {host} {change}")));
        }
        let options = AgentOptions::native(&self.place.bench.topology);
        self.agent.configure(&options, &(self.place.services)(&self.fleet));
        if done.is_empty() {
            return "the same configuration".to_owned();
        }
        self.configured += 1;
        done.join(", ")
    }

    fn start(&mut self) {
        self.agent.run();
        self.agent.wait_ready();
        self.control = Some(Control::open(&self.agent.socket()).expect("the socket"));
    }

    /// Lets a server fail its checks; it goes on serving.
    fn fail(&mut self) -> Option<String> {
        let server = self.random.below(self.place.bench.servers.len() as u64) as usize;
        self.failing.insert(server).then(|| self.set_health(server, false))
    }

    fn recover(&mut self) -> Option<String> {
        let failing: Vec<usize> = self.failing.iter().copied().collect();
        let server = *failing.get(self.random.below(failing.len().max(1) as u64) as usize)?;
        self.failing.remove(&server);
        Some(self.set_health(server, true))
    }

    fn set_health(&self, server: usize, healthy: bool) -> String {
        (self.place.set_healthy)(server, healthy);
        let name = self.place.bench.servers[server].name();
        format!("the checks of {name} {}", if healthy { "pass" } else { "fail" })
    }

    /// Kills the agent, every second time in the middle of a change, and starts it again,
    /// every second time with another configuration.
    fn kill(&mut self) {
        self.control = None;
        let in_change = self.random.below(2) == 0;
        let (target, body, what) = self.draw(Shares::Three);
        let socket = self.agent.socket();
        let delay = self.random.between(Duration::ZERO, INTO_CHANGE_MAX);
        let answer = thread::scope(|scope| {
            let asker = in_change.then(|| {
                let mut control = Control::open(&socket).expect("the socket");
                scope.spawn(move || control.ask("PUT", &target, body.as_bytes()))
            });
            thread::sleep(delay);
            self.agent.stop(Signal::SIGKILL);
            asker.map(|asker| asker.join().expect("the asker"))
        });
        let what = match answer {
            None => "killed".to_owned(),
            Some(Ok(_)) => format!("killed after {what}"),
            Some(Err(_)) => format!("killed {delay:?} into {what}"),
        };
        self.note(what);
        self.replace_one();
        thread::sleep(self.random.between(Duration::ZERO, DEAD_MAX));
        let with = match self.random.below(2) {
            0 => self.reconfigure(),
            _ => "the same configuration".to_owned(),
        };
        let begun = Instant::now();
        self.start();
        self.note(format!("started again with {with}, which took {:.0?}", begun.elapsed()));
    }
}
