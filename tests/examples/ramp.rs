//! How many flow entries a rollout takes: an hour from 1 to 100 % in five steps, over 1,000,000
//! connections that begin in that hour, with the real planner and the real steering decision.
//!
//! Connections come as a Poisson process and last as long as a log-normal distribution says,
//! median 3 s and σ 2.35: 43 % shorter than 2 s and 0.8 % longer than 15 minutes, about what
//! Brownlee and claffy measured (*Understanding Internet traffic streams: dragonflies and
//! tortoises*, 2002). An hour passes before the first step, so that old ones are open.
//!
//! Full tracking, held against it, has an entry for every connection, and keeps it as long
//! after a FIN as the agent keeps its own; or until it is evicted for want of room, which a
//! table for all connections of the hour never does.
//!
//! ```console
//! # cargo run --release -p canary-tests --example ramp
//! ```

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    time::Duration,
};

use canary_agent::{
    datapath::flows::{CLOSING_NS, expired},
    plan::{Adopted, Family, NextHop, Planner, Start, Tags},
    store::Split,
};
use canary_ebpf_common::{
    abi::{FlowKeyV4, IPPROTO_TCP},
    hash::{bucket, hash_v4},
    nat::bits,
    ports::PortRange,
    steer::{Segment, TCP_ACK, TCP_FIN, TCP_SYN},
};
use canary_tests::{
    model::{Model, Random, Tuple, Verdict},
    names::Host,
    planned::{PORT, Shop, Version},
};

/// Connections that begin in the hour of the ramp.
const CONNECTIONS: f64 = 1_000_000.0;
/// Seconds of each step but the last, with which the hour ends.
const STEP_S: u64 = 900;
/// Shares of the new version.
const STEPS: [&str; 5] = ["1%", "5%", "25%", "50%", "100%"];
/// Seconds before the first step.
const BEFORE_S: u64 = 3600;
/// Median of lifetimes, seconds, and σ of their logarithm.
const LIFETIME: (f64, f64) = (3.0, 2.35);

/// What is counted of one run.
#[derive(Debug, Default)]
struct Counts {
    /// Entries that were made in the hour.
    made: u64,
    /// Connections that began in the hour.
    began: u64,
    /// Sums over its seconds: of entries, and of those that full tracking would have.
    entries_sum: u64,
    full_sum: u64,
    /// Both, at the second with the most entries, and at the end of the hour.
    most: (usize, usize),
    at_end: (usize, usize),
    /// Open connections that have an entry at the end of the hour, and all open ones.
    open_at_end: (usize, usize),
    /// Entries that were made where packets without one go to the same backend.
    needless: u64,
    /// Connections whose packets went to two backends, but for those that outlived the drain.
    broken: u64,
    outlived: u64,
}

fn uniform(random: &mut Random) -> f64 {
    // Never 0: its logarithm is taken.
    ((random.bits() >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

/// A standard normal number (Box and Muller, 1958).
fn normal(random: &mut Random) -> f64 {
    let (u, v) = (uniform(random), uniform(random));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

fn planner(shop: &Shop) -> Planner {
    let config = shop.config();
    let start = Start { config: &config, adopted: Adopted::default(), stored: &[], now_ms: 0 };
    let (mut planner, _) = Planner::begin(start).unwrap_or_else(|error| panic!("{error}"));
    let hop = |ip| NextHop {
        ifindex: 1,
        source_mac: [2; 6],
        destination_mac: [4; 6],
        source: ip,
        tags: Tags::default(),
        mtu: 1500,
        silent: None,
    };
    let hops: HashMap<_, _> = planner.addresses().into_iter().map(|ip| (ip, Ok(hop(ip)))).collect();
    planner.set_next_hops(&hops);
    planner
}

/// Runs the ramp with `drain`; prints a line for each step, and at its end.
fn ramp(drain: Duration, seed: u64) {
    let version = |name, first: u16| Version {
        name,
        backends: (first..first + 10).map(|n| (n, 1)).collect(),
    };
    let shop = Shop {
        drain: Some(drain),
        buckets: 65_536,
        versions: vec![version("stable", 1), version("v2", 11)],
        ..Shop::default()
    };
    let mut planner = planner(&shop);
    let mut random = Random::new(seed);
    let mut model =
        Model::<FlowKeyV4>::new(planner.plane(), 1 << 24, PortRange { first: 1, count: 1 });
    // (when, tuple's number, whether it ends), and where each open one is.
    let mut ends: BinaryHeap<Reverse<(u64, u32)>> = BinaryHeap::new();
    let mut open: HashMap<u32, (Verdict, u64)> = HashMap::new();
    // When those ended that full tracking still has.
    let mut ended: VecDeque<u64> = VecDeque::new();
    let (mut number, mut next_ms) = (0_u32, 0.0);
    let mut counts = Counts::default();
    let mut wakeup_ms = Some(0);
    let hour_s = STEP_S * 4;
    let end_s = BEFORE_S + hour_s + drain.as_secs() + 120;
    let tuple = |number: u32| Tuple {
        src: std::net::Ipv4Addr::from(0x0a09_0000 + number / 32_768).into(),
        dst: Host::Vip(1).v4().into(),
        src_port: 32_768 + (number % 32_768) as u16,
        dst_port: PORT,
        protocol: IPPROTO_TCP,
    };
    println!("\ndrain {} min", drain.as_secs() / 60);
    println!(
        "{:>7} {:>6} {:>8} {:>8} {:>8} {:>8} {:>7}",
        "minute", "share", "tracked", "open", "full", "entries", "of full"
    );
    for second in 0..=end_s {
        let now_ms = second * 1000;
        let in_hour = (BEFORE_S..BEFORE_S + hour_s).contains(&second);
        if second >= BEFORE_S
            && (second - BEFORE_S).is_multiple_of(STEP_S)
            && let Some(share) = STEPS.get(((second - BEFORE_S) / STEP_S) as usize)
        {
            let split = Split::from([("v2".to_owned(), share.parse().expect("a share"))]);
            let proposal = planner.services()[0].propose(split).expect("a share");
            planner.set_ownership(0, proposal.ownership);
            wakeup_ms = Some(now_ms);
        }
        if wakeup_ms.is_some_and(|at| at <= now_ms) {
            loop {
                wakeup_ms = planner.step(now_ms).next_wakeup_ms;
                model.apply(planner.plane());
                sweep(&model, &planner, now_ms);
                if !planner.applied(now_ms) {
                    break;
                }
            }
        }
        if second.is_multiple_of(10) {
            sweep(&model, &planner, now_ms);
        }
        let service =
            planner.plane().services.iter().find(|s| s.family == Family::V4).expect("a table");
        model.flows.clock_ns.set(now_ms * 1_000_000);
        // What ends in this second, and what begins.
        while let Some(Reverse((_, n))) =
            ends.peek().copied().filter(|Reverse((at, _))| *at < now_ms + 1000)
        {
            ends.pop();
            ended.push_back(second);
            let (at, began_s) = open.remove(&n).expect("it is open");
            // It closes, and acknowledges the server's FIN.
            let last = [(TCP_FIN | TCP_ACK, 1001), (TCP_ACK, 1002)];
            let went = last.map(|(flags, seq)| {
                model.decide(service, &tuple(n), Segment::tcp(flags, seq), 0, 64).1
            });
            if went != [at; 2] {
                // Its bucket may have moved right after it began, and no sooner.
                match second - began_s > drain.as_secs() * 9 / 10 {
                    true => counts.outlived += 1,
                    false => counts.broken += 1,
                }
            }
        }
        while next_ms < (now_ms + 1000) as f64 {
            let before = model.flows.len();
            let (bucket, at) =
                model.decide(service, &tuple(number), Segment::tcp(TCP_SYN, 1000), 0, 64);
            let (_, again) =
                model.decide(service, &tuple(number), Segment::tcp(TCP_ACK, 1001), 0, 64);
            counts.broken += u64::from(at != again);
            if in_hour {
                counts.began += 1;
                let made = (model.flows.len() - before) as u64;
                let entry = service.entries[bucket as usize];
                counts.made += made;
                counts.needless += if entry.current() == entry.previous() { made } else { 0 };
            }
            let lifetime_s = LIFETIME.0 * (LIFETIME.1 * normal(&mut random)).exp();
            ends.push(Reverse((now_ms + 1000 + (lifetime_s * 1000.0) as u64, number)));
            open.insert(number, (at, second));
            number += 1;
            next_ms -= uniform(&mut random).ln() * hour_s as f64 * 1000.0 / CONNECTIONS;
        }
        while ended.front().is_some_and(|at| (second - at) * 1_000_000_000 > CLOSING_NS) {
            ended.pop_front();
        }
        let (entries, full) = (model.flows.len(), open.len() + ended.len());
        if in_hour {
            counts.entries_sum += entries as u64;
            counts.full_sum += full as u64;
            counts.at_end = (entries, full);
        }
        if second == BEFORE_S + hour_s - 1 {
            let held = open.keys().filter(|n| model.flows.get(&tuple(**n).key()).is_some());
            counts.open_at_end = (held.count(), open.len());
        }
        counts.most = counts.most.max((entries, full));
        let marked = second + 1 >= BEFORE_S && (second + 1 - BEFORE_S).is_multiple_of(300);
        if marked || second == end_s {
            let tracked = planner.services()[0].tables()[0].tracked();
            let minute = (second as f64 + 1.0 - BEFORE_S as f64) / 60.0;
            let share = planner.services()[0].ownership().split.get("v2").map(ToString::to_string);
            println!(
                "{minute:>7.0} {:>6} {:>7.1}% {:>8} {full:>8} {entries:>8} {:>6.1}%",
                share.unwrap_or_default(),
                f64::from(tracked) / 655.36,
                open.len(),
                100.0 * entries as f64 / full as f64,
            );
        }
    }
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole as f64;
    println!(
        "in the hour: {} connections, {} entries made ({:.1} %); in the mean {:.1} % of full tracking's; \
         at the most {} of {} at a time",
        counts.began,
        counts.made,
        percent(counts.made, counts.began),
        percent(counts.entries_sum, counts.full_sum),
        counts.most.0,
        counts.most.1,
    );
    let (entries, full) = (counts.at_end.0 as u64, counts.at_end.1 as u64);
    let (held, open) = (counts.open_at_end.0 as u64, counts.open_at_end.1 as u64);
    println!(
        "at the end of the hour: {entries} entries, {:.1} % of the {full} of full tracking with our \
         expiry, {:.1} % of the {} of one that keeps them until they are evicted; {} of those made \
         named the backend that packets without one go to",
        percent(entries, full),
        percent(entries, counts.began),
        counts.began,
        counts.needless,
    );
    println!(
        "{held} of these entries are of connections that are open, {:.1} % of the {open} open ones; \
         {} of closed ones, {:.1} % of full tracking's {}",
        percent(held, open),
        entries - held,
        percent(entries - held, full - open),
        full - open,
    );
    println!(
        "{} connections changed their backend, and {} that outlived the drain",
        counts.broken, counts.outlived
    );
}

/// Lets entries go as the agent does: expired ones, and those of buckets that are not tracked.
fn sweep(model: &Model<FlowKeyV4>, planner: &Planner, now_ms: u64) {
    let service =
        planner.plane().services.iter().find(|s| s.family == Family::V4).expect("a table");
    let record = &service.record;
    model.flows.retain(|key, flow| {
        let hash = hash_v4(
            record,
            key.src_be,
            key.dst_be,
            key.ports.src_be(),
            key.ports.dst_be(),
            IPPROTO_TCP,
        );
        let silent_ns = (now_ms * 1_000_000).saturating_sub(flow.last_ns);
        service.entries[bucket(record, hash) as usize].tracked()
            && !expired(bits(flow), silent_ns, 0)
    });
}

fn main() {
    for minutes in [2, 5, 10, 30] {
        ramp(Duration::from_secs(minutes * 60), 1);
    }
}
