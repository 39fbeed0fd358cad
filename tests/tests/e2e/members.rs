//! Members of audiences: what a login service says over the socket is what clients get, for as long
//! as it said, whatever happens to the agent, and nobody's connection notices.

use std::{
    fmt::Write as _,
    fs, thread,
    time::{Duration, Instant},
};

use canary_agent::{
    api::{
        audience::{AudienceStatus, ClientReport, MembersReport},
        model::{ErrorBody, Events, Explain},
    },
    failpoint::{self, Failpoint},
};
use canary_tests::{
    agent::{Agent, AgentOptions},
    control::Control,
    host,
    server::{ECHO_PORT, HTTP_PORT},
    topology::Family,
    wait,
};
use nix::sys::signal::Signal;

use crate::support::{Bench, ECHO, SHOP, Transport, Way, of_version};

/// What a member that ends in the test is given: longer than an agent takes to start on a host that
/// does much else.
const SHORT: Duration = Duration::from_secs(20);

fn services(bench: &Bench) -> String {
    let keys = "stickiness = \"client\"\nbuckets = 4096";
    let route = "[[service.route]]\naudience = \"beta\"\nsplit = { v2 = \"100%\" }\n";
    bench.service(SHOP, HTTP_PORT, &["tcp"], keys)
        + route
        + &bench.service(ECHO, ECHO_PORT, &["tcp", "udp"], keys)
        + route
        + "[[audience]]\nname = \"beta\"\ndynamic = { ttl = \"8h\", max = 15000 }\n"
}

/// Whether a new connection of a client goes to the canary.
fn sees_v2(bench: &Bench, family: Family, client: u32, port: u16) -> bool {
    let names = bench.survey(family, Transport::Tcp, client..client + 1, port);
    of_version(&names, "v2") == 1
}

fn exercise(test: &str, way: Way) {
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(way, &[("stable", 2), ("v2", 2)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::start(&bench.topology, &options, &services(&bench));
    bench.wait_answered();
    let mut pools: Vec<_> = Family::ALL.map(|family| bench.connect(family, 5..15)).into();
    let mut stay = |when: &str| pools.iter_mut().for_each(|pool| pool.assert_where_they_were(when));

    // Over the socket, as a login service would.
    let mut control = Control::open(&agent.socket()).expect("the control socket");
    let addresses = Family::ALL.map(|family| family.client(5).to_string());
    let body = format!("{{\"add\": {addresses:?}, \"ttl\": \"8h\", \"reason\": \"signed in\"}}");
    let begun = Instant::now();
    let answer = control.ask("POST", "/v1/audiences/beta/members", body.as_bytes());
    let report: MembersReport = answer.expect("an answer").json();
    assert_eq!((report.added, report.members, report.ttl_seconds), (2, 2, Some(28_800)));
    let mut port = 30_000;
    for family in Family::ALL {
        wait::until("the member on the canary", || {
            port += 1;
            sees_v2(&bench, family, 5, port).then_some(()).ok_or_else(|| "on stable".to_owned())
        });
    }
    let took = begun.elapsed();
    println!("{test}: a member of both families was steered after {took:?}");
    if cfg!(not(debug_assertions)) {
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    assert!(!sees_v2(&bench, Family::V4, 6, port + 1), "nobody else");
    stay("members came");
    let explain: Explain = agent.json(&["explain", ECHO, "--from", &addresses[0]]);
    assert_eq!(explain.audience.as_deref(), Some("beta"));

    // As many as there is room for, in several requests.
    let mut list = String::from("# from 172.16 on\n");
    for n in 0..12_000_u32 {
        writeln!(list, "172.{}.{}.{}", 16 + (n >> 16), n >> 8 & 255, n & 255).expect("a line");
    }
    fs::write(agent.folder().join("list"), &list).expect("a list");
    let file = agent.folder().join("list").display().to_string();
    let dry: MembersReport = agent.json(&["audience", "add", "beta", "--from", &file, "--dry-run"]);
    assert_eq!((dry.applied, dry.added, dry.members), (false, 12_000, 12_002));
    let done: MembersReport =
        agent.json(&["audience", "add", "beta", "--from", &file, "--for", "2h"]);
    assert_eq!((done.added, done.members, done.room), (12_000, 12_002, 15_000));
    let again: MembersReport = agent.json(&["audience", "add", "beta", "--from", &file]);
    assert_eq!((again.added, again.renewed, again.members), (0, 12_000, 12_002));
    fs::write(agent.folder().join("more"), list.replace("172.", "173.")).expect("a list");
    let more = agent.folder().join("more").display().to_string();
    let refused = agent.cli(&["audience", "add", "beta", "--from", &more, "--json"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    let error: ErrorBody = refused.json();
    assert_eq!(error.error.code, "no_room", "{error:?}");
    let beta: AudienceStatus = agent.json(&["audience", "show", "beta"]);
    let members = beta.members.expect("members");
    assert_eq!((members.members, members.room), (12_002, 15_000), "nothing has changed");
    for (bad, code, said) in [
        (&["audience", "add", "beta", "10.0.0.1/8"][..], 2, "bits beyond its prefix"),
        (&["audience", "add", "bete", "10.0.0.1"], 1, "did you mean `beta`?"),
        (&["audience", "add", "beta", "10.0.0.1", "--ttl", "8"], 2, "no unit"),
        (&["audience", "add", "beta"], 2, "NETWORK"),
        (&["audience", "remove", "beta", "--from", "/nowhere"], 2, "can't be read"),
    ] {
        let output = agent.cli(bad);
        assert_eq!(output.code, code, "{output:?}");
        assert!(output.stderr.contains(said), "{output:?}");
    }

    // One ends while an agent runs that was killed in between, one while none does.
    let [brief, late] = [6, 7].map(|client| Family::V4.client(client).to_string());
    let ttl = format!("{}s", SHORT.as_secs());
    let begun = Instant::now();
    let _: MembersReport = agent.json(&["audience", "add", "beta", &brief, "--ttl", &ttl]);
    let in_force = Instant::now();
    let _: MembersReport = agent.json(&["audience", "add", "beta", &late, "--ttl", "1s"]);
    let ended = Instant::now() + Duration::from_secs(1);
    agent.stop(Signal::SIGKILL);
    stay("the agent was killed");
    thread::sleep(ended.saturating_duration_since(Instant::now()));
    agent.run();
    agent.wait_ready();
    let report: ClientReport = agent.json(&["audience", "test", &late]);
    assert!(report.audiences.is_empty(), "{report:?}");
    assert!(!sees_v2(&bench, Family::V4, 7, 31_000), "its time is over");
    let mut port = 31_000;
    let mut seen = 0;
    let over = wait::until("the end of a member", || {
        port += 1;
        // Ports have to do for the whole time.
        thread::sleep(Duration::from_millis(20));
        let asked = Instant::now();
        match sees_v2(&bench, Family::V4, 6, port) {
            true => {
                // It may have been asked for before its end, and answered after it.
                assert!(asked < in_force + SHORT + Duration::from_secs(5), "it does not end");
                seen += 1;
                Err("on the canary".to_owned())
            }
            false => Ok(begun.elapsed()),
        }
    });
    assert!(over >= SHORT, "it has ended after {over:?}");
    println!("{test}: after a kill {seen} connections on the canary, ended after {over:?}");
    assert!(sees_v2(&bench, Family::V4, 5, 38_000), "who is a member for 8 h is one");
    let beta: AudienceStatus = agent.json(&["audience", "show", "beta"]);
    assert_eq!(beta.members.expect("members").members, 12_002);
    stay("members went");

    let gone: MembersReport =
        agent.json(&["audience", "remove", "beta", &addresses[0], "172.16.0.9"]);
    assert_eq!((gone.removed, gone.members), (2, 12_000));
    wait::until("the member on stable", || {
        port += 1;
        (!sees_v2(&bench, Family::V4, 5, port)).then_some(()).ok_or_else(|| "on v2".to_owned())
    });
    assert!(sees_v2(&bench, Family::V6, 5, 39_000));
    stay("a member was removed");
    let events: Events = agent.json(&["events"]);
    let lines: Vec<&str> = events
        .events
        .iter()
        .filter(|event| event.kind == "members")
        .map(|event| event.text.as_str())
        .collect();
    let first = "members of audience beta: 2 added by uid 0 (signed in)";
    assert!(lines.contains(&first), "{lines:#?}");
    assert!(lines.len() < 12 && !lines.concat().contains("172."), "{lines:#?}");
}

#[test]
fn members_are_steered_for_as_long_as_was_said_in_dsr() {
    exercise("members_are_steered_for_as_long_as_was_said_in_dsr", Way::Dsr);
}

#[test]
fn members_are_steered_for_as_long_as_was_said_in_nat() {
    exercise("members_are_steered_for_as_long_as_was_said_in_nat", Way::NatTwoArmed);
}

#[test]
fn a_kill_while_members_are_written_leaves_all_of_them_or_none() {
    let test = "a_kill_while_members_are_written_leaves_all_of_them_or_none";
    if !host::ready(test) {
        return;
    }
    let bench = Bench::new(Way::Dsr, &[("stable", 1), ("v2", 1)]);
    let options = AgentOptions::native(&bench.topology);
    let mut agent = Agent::prepare(&bench.topology.balancer, &options, &services(&bench));
    let choice = agent.folder().join("failpoint");
    let run = |agent: &mut Agent<'_>| {
        agent.run_with(|command| {
            command.env(failpoint::FILE, &choice);
        });
        agent.wait_ready();
    };
    run(&mut agent);
    for (point, kept) in [(Failpoint::MembersWritten, 0), (Failpoint::BeforeMaps, 2)] {
        fs::write(&choice, point.name()).expect("a choice");
        let output = agent.cli(&["audience", "add", "beta", "10.64.0.5", "10.64.0.6"]);
        assert_eq!(output.code, 5, "{output:?}");
        wait::until("the end of the agent", || agent.ended().ok_or_else(|| "it runs".to_owned()));
        agent.stop(Signal::SIGTERM);
        fs::remove_file(&choice).expect("a choice");
        run(&mut agent);
        let beta: AudienceStatus = agent.json(&["audience", "show", "beta"]);
        assert_eq!(beta.members.expect("members").members, kept, "{}", point.name());
    }
}
