//! Neighbours that die without a word: their links stay up, and they do not answer any more.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use canary_agent::resolve::{Resolver, Update};
use tokio::sync::watch;

use crate::netns::{Peer, ip, ip_addr, ip_output, isolated, until};

/// What the contract allows for following a change.
const FOLLOWED: Duration = Duration::from_secs(1);

/// Peers behind one bridge, `c0`, each by a port of its own: with `.2`, `.3` and so on, in both
/// families. What happens to a port says nothing to `c0`.
fn bridged<const N: usize>() -> [Peer; N] {
    ip(
        "link add c0 address 02:00:00:00:00:01 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
    );
    let peers = std::array::from_fn(|n| {
        let (peer, n) = (Peer::new(), n + 2);
        ip(&format!("link add port{n} type veth peer name p0 address 02:00:00:00:03:0{n}"));
        peer.take("p0");
        peer.ip(&format!("address add 10.0.1.{n}/24 dev p0"));
        peer.ip(&format!("address add 2001:db8:1::{n}/64 dev p0 nodad"));
        peer.ip("link set p0 up");
        ip(&format!("link set port{n} master c0 up"));
        peer
    });
    // A bridge without any port that is up has no carrier.
    ip("link add port0 type veth peer name unused");
    ip("link set unused up");
    ip("link set port0 master c0 up");
    ip("address add 10.0.1.1/24 dev c0");
    ip("address add 2001:db8:1::1/64 dev c0 nodad");
    ip("link set c0 up");
    peers
}

/// Which destinations are silent; all of them have a next hop.
#[track_caller]
fn silent(update: &Update) -> BTreeSet<String> {
    let silent = update.hops.iter().filter(|(address, hop)| {
        let hop = hop.as_ref().unwrap_or_else(|why| panic!("{address}: {why}"));
        hop.silent.is_some()
    });
    silent.map(|(address, _)| address.to_string()).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// A resolver of `destinations`, each of whose neighbours has answered one of its questions.
async fn started(destinations: &[&str]) -> (Resolver, watch::Receiver<Update>) {
    let resolver = Resolver::start().unwrap();
    resolver.set_destinations(destinations.iter().map(|address| ip_addr(address)));
    let mut updates = resolver.updates();
    until(&mut updates, "all of them", |update| {
        update.hops.len() == destinations.len() && update.hops.values().all(Result::is_ok)
    })
    .await;
    // The kernel itself asks one that is stale some seconds later.
    let neighbours = |state: &str| ip_output(&format!("neigh show dev c0 nud {state}"));
    let known = neighbours("reachable");
    let known: Vec<_> = known.lines().filter_map(|line| line.split(' ').next()).collect();
    for address in &known {
        ip(&format!("neigh change {address} dev c0 nud stale"));
    }
    let begun = Instant::now();
    while neighbours("reachable").lines().count() < known.len() {
        assert!(begun.elapsed() < Duration::from_secs(4), "{}", ip_output("neigh show dev c0"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    (resolver, updates)
}

/// Nothing of this may be so for a while.
async fn never(
    updates: &mut watch::Receiver<Update>,
    time: Duration,
    mut condition: impl FnMut(&Update) -> bool,
) {
    let met = tokio::time::timeout(time, updates.wait_for(|update| condition(update))).await;
    if let Ok(update) = met {
        panic!("{:#?}", *update.unwrap());
    }
}

#[test]
fn a_neighbour_that_dies_without_a_word_is_silent_within_a_second() {
    isolated(|| async {
        let _peers = bridged::<3>();
        ip("route add 192.0.2.0/24 via 10.0.1.2");
        ip("-6 route add 2001:db8:99::/48 via 2001:db8:1::2");
        ip("route add 198.51.100.0/24 via inet6 2001:db8:1::2");
        let direct = ["10.0.1.2", "2001:db8:1::2"];
        let through = ["192.0.2.7", "2001:db8:99::7", "198.51.100.7"];
        let others = ["10.0.1.3", "2001:db8:1::4"];
        let (_resolver, mut updates) = started(&[&direct[..], &through, &others].concat()).await;
        let gone = set([direct[0], direct[1], through[0], through[1], through[2]]);
        let mut times = Vec::new();
        for _ in 0..5 {
            ip("link set port2 down");
            let took = until(&mut updates, "silence", |update| silent(update) == gone).await;
            eprintln!("measured: five addresses of a dead neighbour are silent: {took:?}");
            times.push(took);
            let hop = updates.borrow().hops[&ip_addr("192.0.2.7")].clone().unwrap();
            assert_eq!((hop.silent, hop.destination_mac[5]), (Some(ip_addr("10.0.1.2")), 2));
            assert!(!updates.borrow().nobody_answers);
            ip("link set port2 up");
            let took = until(&mut updates, "answers", |update| silent(update).is_empty()).await;
            eprintln!("measured: they are back after {took:?}");
            assert!(took < FOLLOWED * 2, "{took:?}");
        }
        // A host that is busy with other tests may be late with its questions, which then don't
        // count. The kernel takes 15 s and more.
        times.sort_unstable();
        assert!(times[2] < FOLLOWED && times[4] < FOLLOWED * 5, "{times:?}");
    });
}

#[test]
fn while_nobody_answers_next_hops_stay_and_it_is_said() {
    isolated(|| async {
        let _peers = bridged::<3>();
        let all = ["10.0.1.2", "10.0.1.3", "2001:db8:1::4"];
        let (_resolver, mut updates) = started(&all).await;
        let ports = |state: &str| (2..5).for_each(|n| ip(&format!("link set port{n} {state}")));
        ports("down");
        until(&mut updates, "it is said", |update| {
            assert_eq!(silent(update), set([]));
            update.nobody_answers
        })
        .await;
        ports("up");
        until(&mut updates, "all are back", |update| {
            assert_eq!(silent(update), set([]));
            !update.nobody_answers
        })
        .await;
        never(&mut updates, FOLLOWED, |update| !silent(update).is_empty()).await;
    });
}

#[test]
fn a_host_that_stands_still_finds_nobody_silent() {
    isolated(|| async {
        let _peers = bridged::<3>();
        let (_resolver, mut updates) = started(&["10.0.1.2", "10.0.1.3", "2001:db8:1::4"]).await;
        for ms in [130, 700, 1900] {
            // It is the runtime's only thread.
            std::thread::sleep(Duration::from_millis(ms));
            never(&mut updates, Duration::from_millis(700), |update| !silent(update).is_empty())
                .await;
        }
    });
}

#[test]
fn a_neighbour_that_is_reached_and_does_not_answer_is_not_silent() {
    isolated(|| async {
        let peers = bridged::<3>();
        let (resolver, mut updates) = started(&["10.0.1.2", "10.0.1.3", "10.0.1.4"]).await;
        peers[0].ip("link set p0 arp off");
        let reached = async {
            loop {
                resolver.alive(ip_addr("10.0.1.2"));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            () = never(&mut updates, FOLLOWED * 2, |update| !silent(update).is_empty()) => {}
            () = reached => {}
        }
        until(&mut updates, "silence", |update| silent(update) == set(["10.0.1.2"])).await;
        // The next check that passes, long after the last one: it is believed from then on.
        resolver.alive(ip_addr("10.0.1.2"));
        until(&mut updates, "it is reached", |update| silent(update).is_empty()).await;
        never(&mut updates, FOLLOWED * 2, |update| !silent(update).is_empty()).await;
    });
}
