//! UDP flows: those that talk stay, the others follow a change after `udp_idle`.

use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use canary_tests::{
    agent::Agent,
    client::{UdpFlow, version_of},
    host,
    server::ECHO_PORT,
    topology::Family,
    wait,
};

use crate::support::{Bench, ECHO, Transport, Way, of_version};

/// `udp_idle` in the tests here.
const IDLE: Duration = Duration::from_secs(3);

/// Flows of each family that go on talking.
const TALKERS: u32 = 10;

/// Pauses of the talkers are shorter than [`IDLE`] by far.
const PAUSE: Duration = Duration::from_millis(300);

/// A flow, and the server that it began on.
struct Talker {
    flow: UdpFlow,
    server: String,
}

impl Talker {
    #[track_caller]
    fn start(bench: &Bench, family: Family, index: u32) -> Self {
        let to = SocketAddr::new(family.vip(), ECHO_PORT);
        let flow = UdpFlow::open(bench.client(), SocketAddr::new(family.client(index), 0), to)
            .expect("a socket");
        let server = flow.ask(b"first").expect("an answer");
        Self { flow, server }
    }

    /// Those of both families from `first` on.
    #[track_caller]
    fn start_some(bench: &Bench, first: u32) -> Vec<Self> {
        let each = |family| (first..first + TALKERS).map(move |index| (family, index));
        let all = Family::ALL.into_iter().flat_map(each);
        all.map(|(family, index)| Self::start(bench, family, index)).collect()
    }
}

/// Flows that go on talking on a thread of their own, and are answered by the same server.
#[derive(Default)]
struct Conversation {
    talkers: Mutex<Vec<Talker>>,
    over: AtomicBool,
    rounds: AtomicU64,
}

impl Conversation {
    fn go_on(&self) {
        let mut last = Instant::now();
        while !self.over.load(Ordering::Relaxed) {
            for Talker { flow, server } in &*self.talkers.lock().expect("nobody has panicked") {
                let now = flow.ask(b"still there?");
                assert!(now.as_ref().is_ok_and(|now| now == server), "{server} became {now:?}");
            }
            // Otherwise they were silent, and what came of them says nothing.
            assert!(last.elapsed() < IDLE - PAUSE, "this host took {:?}", last.elapsed());
            last = Instant::now();
            self.rounds.fetch_add(1, Ordering::Relaxed);
            wait::pause_until(last + PAUSE);
        }
    }

    /// Adds flows that have just begun.
    fn add(&self, talkers: Vec<Talker>) {
        self.talkers.lock().expect("a conversation that has not ended").extend(talkers);
    }

    /// Waits until all have been answered again.
    fn is_answered(&self) {
        let rounds = self.rounds.load(Ordering::Relaxed);
        wait::until("everybody's answer", || {
            drop(self.talkers.lock().expect("a conversation that has not ended"));
            let passed = self.rounds.load(Ordering::Relaxed) - rounds;
            if passed >= 2 { Ok(()) } else { Err(format!("{passed} rounds")) }
        });
    }
}

fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 3), ("v2", 2)]);
    let agent = bench.agent(&format!("udp_idle = \"{}s\"", IDLE.as_secs()));
    let conversation = Conversation::default();
    thread::scope(|scope| {
        scope.spawn(|| conversation.go_on());
        // Also when something here panics: the scope waits for the thread.
        let _end = Ends(&conversation.over);
        changes(test, way, &bench, &agent, &conversation);
    });
}

/// Sets a flag when it goes.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn changes(test: &str, way: Way, bench: &Bench, agent: &Agent<'_>, conversation: &Conversation) {
    conversation.add(Talker::start_some(bench, 0));
    let mut next = 100_000;
    for (share, version, round) in
        [("100%", "v2", 1), ("0%", "stable", 2), ("100%", "v2", 3), ("0%", "stable", 4)]
    {
        let silent = Talker::start(bench, Family::V4, 50_000 + round);
        assert_ne!(version_of(&silent.server), version);
        conversation.is_answered();
        let changed = Instant::now();
        agent.split(ECHO, "v2", share);
        let tcp = bench.survey(Family::V4, Transport::Tcp, next..next + 50, 20_000);
        assert_eq!(of_version(&tcp, version), 50, "{test}: TCP at once, at {share}");
        let mut elsewhere = 0;
        loop {
            next += 1;
            let names = bench.survey(Family::V4, Transport::Udp, next..next + 1, 20_000);
            if version_of(&names[0]) == version {
                break;
            }
            elsewhere += 1;
            let since = changed.elapsed();
            assert!(since < wait::PATIENCE, "{test}: at {share} new flows are on {names:?}");
        }
        let took = changed.elapsed();
        println!("{test}: at {share} a new flow was on {version} after {took:?}");
        if way == Way::Dsr && round == 1 {
            // Until then nobody knows which flows are new.
            assert!(took >= IDLE, "{test}: at {share} after {took:?}");
        } else {
            // What is kept for each flow tells: in `nat` for all, in `dsr` since the first change.
            assert_eq!(elsewhere, 0, "{test}: new flows are elsewhere at {share}");
        }
        // For longer than `udp_idle` after it is over.
        wait::pause_until(Instant::now() + IDLE);
        for family in Family::ALL {
            let names = bench.survey(family, Transport::Udp, next + 1..next + 101, 20_000);
            assert_eq!(of_version(&names, version), 100, "{test}: new flows, at {share}");
        }
        next += 101;
        // It has said nothing since before the change.
        let now = silent.flow.ask(b"here again").expect("an answer");
        assert_eq!(version_of(&now), version, "{test}: a silent flow, at {share}");
        conversation.is_answered();
        conversation.add(Talker::start_some(bench, 1_000 * round));
    }
    conversation.is_answered();
}

#[test]
fn udp_flows_that_talk_stay_and_others_follow_after_udp_idle_in_dsr() {
    exercise("udp_flows_that_talk_stay_and_others_follow_after_udp_idle_in_dsr", Way::Dsr);
}

#[test]
fn udp_flows_that_talk_stay_and_others_follow_at_once_in_nat() {
    exercise("udp_flows_that_talk_stay_and_others_follow_at_once_in_nat", Way::NatTwoArmed);
}
