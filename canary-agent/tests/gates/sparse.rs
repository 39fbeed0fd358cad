//! Services with few connections: windows in which a version has none, and events that come long
//! after their connections.
//!
//! Here the share of a window is what was counted in it, as in the agent, and a signal such as
//! `server_reset` comes up to a minute after its connection.

use std::{collections::VecDeque, fmt::Write as _, sync::Arc, time::Duration};

use canary_agent::{
    config::model::{self, SignalKind::ServerReset},
    rollout::{
        gate::Verdict,
        watch::{Counted, Watch},
    },
};
use rand_distr::{Distribution, Exp};
use rand_pcg::Pcg64Mcg;

use crate::{
    simulation::{assert_rare, binomial, percent, poisson, random, rate, runs, table},
    verdict::{config, signal},
};

/// A canary's and control's connections a second, how often they are bad, and how many seconds
/// later that is seen, on an average.
#[derive(Clone, Copy, Debug)]
struct Sparse {
    control: f64,
    canary: f64,
    base: f64,
    ratio: f64,
    later: f64,
}

/// Events on control and on the canary by how many seconds from now they will be seen.
#[derive(Default)]
struct Coming(VecDeque<[u64; 2]>);

impl Coming {
    fn add(&mut self, side: usize, bad: u64, later: f64, rng: &mut Pcg64Mcg) {
        for _ in 0..bad {
            let seconds = match later > 0.0 {
                true => Exp::new(1.0 / later).expect("a rate").sample(rng).min(60.0) as usize,
                false => 0,
            };
            while self.0.len() <= seconds {
                self.0.push_back([0, 0]);
            }
            self.0[seconds][side] += 1;
        }
    }
}

fn run(terms: &Arc<model::Gate>, world: Sparse, rng: &mut Pcg64Mcg) -> Option<Verdict> {
    let Sparse { control, canary, base, ratio, later } = world;
    let mut watch = Watch::new(terms);
    let mut coming = Coming::default();
    for _ in 0..terms.deadline.as_secs() {
        let connections = [poisson(rng, control), poisson(rng, canary)];
        for (side, chance) in [(0, base), (1, (base * ratio).min(1.0))] {
            let bad = match connections[side] {
                0 => 0,
                of => binomial(rng, of, chance),
            };
            coming.add(side, bad, later, rng);
        }
        let events = coming.0.pop_front().unwrap_or_default();
        watch.pass_time(1_000);
        let counted = Counted {
            service: "shop".to_owned(),
            canary: "v2".to_owned(),
            watched: Duration::from_secs(1),
            complete: true,
            slow_ns: u64::MAX,
            connections,
            events: vec![(ServerReset, events)],
        };
        let verdict = watch.gather(&counted).and_then(|window| watch.count(&window));
        if verdict.is_some() {
            return verdict;
        }
    }
    None
}

/// How many fail, and how many pass.
fn ends(stream: u64, terms: &Arc<model::Gate>, world: Sparse) -> (usize, usize) {
    let mut rng = random(stream);
    let mut ended = (0, 0);
    for _ in 0..runs() {
        match run(terms, world, &mut rng) {
            Some(Verdict::Fail) => ended.0 += 1,
            Some(Verdict::Pass) => ended.1 += 1,
            Some(Verdict::Inconclusive | Verdict::NoData) | None => {}
        }
    }
    ended
}

/// Long enough for a decision.
fn day() -> model::Gate {
    let deadline = Duration::from_secs(8 * 3600);
    model::Gate { deadline, ..config(vec![signal(ServerReset, false)]) }
}

/// Neither risk is another for it, and worse ones are found.
#[test]
fn few_connections_and_late_events_change_no_risk() {
    let (terms, mut rows, mut stream) = (Arc::new(day()), String::new(), 800);
    for (control, canary) in [(1.9, 0.1), (0.5, 0.5), (9.9, 0.1), (19.0, 1.0)] {
        for (base, later) in [(0.01, 0.0), (0.01, 20.0), (0.05, 20.0)] {
            let _ = write!(rows, "| {canary} and {control} | {} | {later} s |", percent(base));
            for ratio in [1.0, 3.0, 10.0] {
                stream += 1;
                let world = Sparse { control, canary, base, ratio, later };
                let (failed, passed) = ends(stream, &terms, world);
                let (wrong, risk) = match ratio {
                    1.0 => (failed, terms.alpha),
                    _ => (passed, terms.beta),
                };
                assert_rare(&format!("{world:?}"), wrong, runs(), risk);
                let _ = write!(rows, " {} |", rate(wrong, runs()));
            }
            rows.push('\n');
        }
    }
    table(
        "Few connections, eight hours",
        "| connections a second of the canary and control | base rate | seen after | healthy ones that failed | ×3 that passed | ×10 that passed |",
        &rows,
    );
}

#[test]
fn a_window_that_is_not_over_is_kept_over_a_restart() {
    let terms = Arc::new(day());
    let window = |connections: [u64; 2], events: [u64; 2], complete: bool| Counted {
        service: "shop".to_owned(),
        canary: "v2".to_owned(),
        watched: Duration::from_secs(1),
        complete,
        slow_ns: u64::MAX,
        connections,
        events: vec![(ServerReset, events)],
    };
    let mut watch = Watch::new(&terms);
    assert_eq!(watch.gather(&window([90, 0], [1, 2], true)), None);
    // What was missed is told at once, and is not in it.
    let missed = window([5, 5], [9, 9], false);
    assert_eq!(watch.gather(&missed), Some(missed));
    let kept = serde_json::to_string(watch.kept()).expect("JSON");
    let kept = serde_json::from_str(&kept).expect("JSON");
    let mut watch = Watch::resume(&terms, kept).expect("the same gate");
    assert_eq!(watch.gather(&window([1, 9], [0, 0], true)), None);
    let whole = Counted { watched: Duration::from_secs(3), ..window([91, 10], [1, 3], true) };
    assert_eq!(watch.gather(&window([0, 1], [0, 1], true)), Some(whole));
    assert!(watch.kept().pool.is_empty());
    // Where there are enough, each is by itself; what an earlier agent has kept has none begun.
    let busy = window([100, 10], [0, 0], true);
    assert_eq!(watch.gather(&busy), Some(busy));
    assert!(!serde_json::to_string(watch.kept()).expect("JSON").contains("pool"));
}
