//! Random changes, one after the other, and kills of the agent among them.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use canary_tests::{
    agent::Agent,
    control::Control,
    hold::{Hold, Kind, State},
    model::Random,
    topology::Family,
};
use nix::sys::signal::Signal;

use super::history::History;
use crate::support::{ECHO, SHOP};

/// Longest pause between two changes.
const PAUSE_MAX: Duration = Duration::from_millis(60);

/// Longest time that nobody runs after a kill.
const DEAD_MAX: Duration = Duration::from_millis(300);

/// How long into a change a kill may come: longer than most take.
const INTO_CHANGE_MAX: Duration = Duration::from_millis(6);

/// Makes a change, and says what; `None` if it is not possible now.
type Make = fn(&mut Script<'_>) -> Option<String>;

/// The kinds of change, each with how often it is made relative to the others.
const CHANGES: [(u64, Make); 5] = [
    (5, |script| script.split(Shares::Two)),
    (5, |script| script.split(Shares::Three)),
    (2, |script| script.split(Shares::Whole)),
    (3, |script| script.fail()),
    (3, |script| script.recover()),
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

/// What the script needs of the backends.
pub(super) struct Backends<'a> {
    /// Their names.
    pub(super) names: Vec<String>,
    /// Lets one pass or fail its checks and go on otherwise, by its position.
    pub(super) set_healthy: &'a dyn Fn(usize, bool),
}

/// The run's means and where it stands.
pub(super) struct Script<'a> {
    backends: Backends<'a>,
    pub(super) agent: Agent<'a>,
    control: Option<Control>,
    hold: &'a Hold,
    pub(super) history: History,
    random: Random,
    /// Positions of the servers that fail their checks.
    failing: BTreeSet<usize>,
    next_client: u32,
}

impl<'a> Script<'a> {
    pub(super) fn new(
        backends: Backends<'a>,
        agent: Agent<'a>,
        hold: &'a Hold,
        history: History,
        random: Random,
    ) -> Self {
        let control = Some(Control::open(&agent.socket()).expect("the socket"));
        let failing = BTreeSet::new();
        Self { backends, agent, control, hold, history, random, failing, next_client: 0 }
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
                let total = CHANGES.iter().map(|(weight, _)| weight).sum();
                let mut drawn = self.random.below(total);
                let make = CHANGES.iter().find(|(weight, _)| {
                    let found = drawn < *weight;
                    drawn = drawn.saturating_sub(*weight);
                    found
                });
                if let Some(what) = make.and_then(|(_, make)| make(self)) {
                    break what;
                }
            };
            self.note(what);
            self.replace_one();
            thread::sleep(self.random.between(Duration::ZERO, PAUSE_MAX));
        }
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
        let control = self.control.as_mut().expect("an agent");
        let answer = control.ask("PUT", &target, body.as_bytes()).expect("an answer");
        let text = String::from_utf8_lossy(&answer.body);
        assert_eq!(answer.status, 200, "{what}: {text}");
        Some(what)
    }

    /// Lets a server fail its checks; it goes on serving.
    fn fail(&mut self) -> Option<String> {
        let server = self.random.below(self.backends.names.len() as u64) as usize;
        self.failing.insert(server).then(|| self.set_health(server, false))
    }

    fn recover(&mut self) -> Option<String> {
        let failing: Vec<usize> = self.failing.iter().copied().collect();
        let server = *failing.get(self.random.below(failing.len().max(1) as u64) as usize)?;
        self.failing.remove(&server);
        Some(self.set_health(server, true))
    }

    fn set_health(&self, server: usize, healthy: bool) -> String {
        (self.backends.set_healthy)(server, healthy);
        let name = &self.backends.names[server];
        format!("the checks of {name} {}", if healthy { "pass" } else { "fail" })
    }

    /// Kills the agent, every second time in the middle of a change, and starts it again.
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
        let begun = Instant::now();
        self.agent.run();
        self.agent.wait_ready();
        self.control = Some(Control::open(&self.agent.socket()).expect("the socket"));
        self.note(format!("started again, which took {:.0?}", begun.elapsed()));
    }
}
