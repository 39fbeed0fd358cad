//! ping: echo requests of every size, whole and in fragments.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use canary_tests::{
    agent::Agent, binary, netns::Namespace, server::HTTP_PORT, topology::Family, wait,
};

use super::{Mode, in_every_mode, option, ready, wait_served};
use crate::icmp;

/// Bytes of the largest payload.
const SIZE_MAX: u32 = 4_000;

/// Each mode has its own part of the sizes for the real ping, so that all of them together have
/// each; with `CANARY_LONG`, every mode has each.
const MODES: u32 = 5;

/// Client that pings.
const INDEX: u32 = 3;

/// Bytes of a packet.
const MTU: u32 = 1_500;

/// The largest payload in one packet.
fn whole_max(family: Family) -> u32 {
    match family {
        Family::V4 => MTU - 20 - 8,
        Family::V6 => MTU - 40 - 8,
    }
}

/// Echo requests that the balancer's program has answered.
fn answered(agent: &Agent<'_>) -> u64 {
    let reasons = agent.status().reasons;
    reasons.iter().find(|one| one.reason == "answer_echo").map_or(0, |one| one.packets)
}

/// Sends a request of each size with the host's ping and looks that it is answered.
#[track_caller]
fn ping_all(client: &Namespace, family: Family, sizes: &[u32]) {
    /// More than there are processors: an answer takes a while.
    const WORKERS: u32 = 4;
    let program = binary::installed("ping").expect("ping");
    let next = AtomicU32::new(0);
    let one = |size: u32| {
        let size = size.to_string();
        let from = family.client(INDEX).to_string();
        let to = family.vip().to_string();
        // Born into the thread's namespace; it ends by itself after two seconds at most.
        let mut command = Command::new(&program);
        command.env("LC_ALL", "C").args([option(family), "-n", "-q", "-c", "1", "-W", "2"]);
        let output = command.args(["-I", &from, "-s", &size, &to]).output().expect("ping runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        // ping looks at each byte, and says "+1 corrupted" or "+1 errors" behind it.
        let good = said.contains("1 packets transmitted, 1 received, 0% packet loss");
        assert!(output.status.success() && good, "{family:?}, {size} bytes:\n{said}");
    };
    client.run(|| {
        thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    while let Some(size) = sizes.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                    {
                        wait::check();
                        one(*size);
                    }
                });
            }
        });
    });
}

#[track_caller]
fn exercise(test: &str, mode: Mode) {
    if !ready(test, &["ping"]) {
        return;
    }
    let bench = mode.bench();
    let agent = bench.agent("");
    wait_served(&bench, HTTP_PORT);
    let every = std::env::var_os("CANARY_LONG").is_some();
    let mine = |size: &u32| every || size % MODES == mode as u32;
    for family in Family::ALL {
        let before = answered(&agent);
        let payload: Vec<u8> = (0..SIZE_MAX).map(|at| (at % 251) as u8).collect();
        bench.client().run(|| {
            for size in 0..=SIZE_MAX {
                let payload = &payload[..size as usize];
                let answer = icmp::ping(family.client(INDEX), family.vip(), payload);
                let answer = answer.unwrap_or_else(|e| panic!("{test} {family:?} {size}: {e}"));
                assert!(answer == payload, "{test} {family:?} {size}: other bytes came back");
            }
        });
        let sizes: Vec<u32> = (0..=SIZE_MAX).filter(mine).collect();
        ping_all(bench.client(), family, &sizes);
        // Those in fragments are the host's to answer.
        let largest = whole_max(family);
        let whole = largest + 1 + sizes.iter().filter(|size| **size <= largest).count() as u32;
        assert_eq!(answered(&agent) - before, u64::from(whole), "{test} {family:?}");
    }
}

in_every_mode!(exercise:
    every_size_of_ping_is_answered_in_nat,
    every_size_of_ping_is_answered_in_one_armed_nat,
    every_size_of_ping_is_answered_in_dsr,
    every_size_of_ping_is_answered_in_ipip,
    every_size_of_ping_is_answered_in_gue
);
