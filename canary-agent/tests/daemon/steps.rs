//! Steps of a rollout for an audience: its table follows that of everyone, and has more only as far
//! as a step says.

use canary_agent::{
    api::{
        model::{FreezeRequest, UndoRequest},
        panic::PanicRequest,
    },
    config::{load_str, model::Config, render},
    daemon::{Action, Peer, Request},
    hooks::Errand,
    plan::Adopted,
    rollout::watch::Answer,
};

use crate::{
    rollout::{restarted, say, seconds, start, status, tell, trail},
    support::{Agent, Shared},
};

const PEER: Peer = Peer { uid: 1000, gid: 1000, pid: None };

/// The shop with staff among its clients, and a rollout with these steps.
fn shop(steps: &str, keys: &str) -> Config {
    let text = format!(
        r#"
[agent]
interfaces = ["lo"]
[[service]]
name = "shop"
vip = "203.0.113.10"
ports = "tcp/443"
buckets = 4096
drain = "1000s"
stickiness = "client"
forward = "dsr"
health = {{ type = "none" }}
versions.stable.backends = ["10.0.1.1:443", "10.0.1.2:443"]
versions.v2.backends = ["10.0.2.1:443"]
versions.v3.backends = ["10.0.3.1:443"]
[[audience]]
name = "staff"
cidr = "198.51.100.0/24"
[[audience]]
name = "beta"
cidr = "192.0.2.0/24"
[[gate]]
name = "asked"
min_duration = "2s"
deadline = "1m"
signals = [{{ webhook = "http://judge/", interval = "1s", timeout = "900ms", rise = 2, fall = 2 }}]
[[rollout]]
name = "shop-v2"
service = "shop"
to = "v2"
steps = [{steps}]
{keys}
"#
    );
    let loaded = load_str("agent.toml", &text);
    loaded.unwrap_or_else(|errors| panic!("{text}\n{}", render(&errors))).config
}

/// Staff, some of them first; then a few of everyone, then everyone.
fn gentle() -> Config {
    shop(
        r#"{ audience = "staff", split = "100%", hold = "20s" }, { split = "10%", hold = "1h" }, { split = "100%" }"#,
        "",
    )
}

fn owners(agent: &Agent, table: &str) -> Vec<u8> {
    let plane = agent.state.plane();
    let plan = plane.services.iter().find(|plan| plan.name == table).expect("a table");
    plan.ledger.iter().map(|entry| entry.owner()).collect()
}

/// Shares of v2 in the tables of everyone and of staff, in percent of their buckets.
fn has(agent: &Agent) -> [usize; 2] {
    ["shop", "shop@staff"].map(|table| {
        let owners = owners(agent, table);
        (owners.iter().filter(|owner| **owner == 1).count() * 100 + owners.len() / 2) / owners.len()
    })
}

fn begun(dir: &tempfile::TempDir, config: &Config) -> Agent {
    let mut agent = start(dir, config);
    agent.wait(2_000);
    assert_eq!(has(&agent), [0, 0]);
    tell(&mut agent, "shop-v2", Action::Start).unwrap();
    assert_eq!(has(&agent), [0, 0], "its buckets are watched first");
    seconds(&mut agent, 8);
    agent
}

#[test]
fn an_audience_has_it_first_and_everyone_comes_after() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = begun(&dir, &gentle());
    assert_eq!(has(&agent), [0, 100]);
    let now = status(&mut agent, "shop-v2");
    assert_eq!((now.step, now.share.as_deref()), (Some(1), Some("0%")));
    let of_staff: Vec<_> =
        now.audiences.iter().map(|one| (one.audience.as_str(), one.share.as_str())).collect();
    assert_eq!(of_staff, [("staff", "100%")]);
    assert_eq!(now.steps[0].audience.as_deref(), Some("staff"));
    // What is said of a client is what is so.
    let staff = agent.explain("shop", "198.51.100.7", None, None).unwrap();
    assert_eq!((staff.audience.as_deref(), staff.version.as_deref()), (Some("staff"), Some("v2")));
    let other = agent.explain("shop", "192.0.2.7", None, None).unwrap();
    assert_eq!((other.audience, other.version.as_deref()), (None, Some("stable")));
    let (_, line) = trail(&dir).pop().unwrap();
    assert_eq!((line.service.as_str(), line.action.as_str()), ("shop@staff", "rollout"));
    assert_eq!((line.after["v2"].to_string().as_str(), line.buckets_moved), ("100%", 4096));
    seconds(&mut agent, 21);
    assert_eq!(has(&agent), [10, 100]);
    // Another start, with the maps or without.
    let before = (owners(&agent, "shop"), owners(&agent, "shop@staff"));
    let plane = agent.host.with(|host| host.plane.services.clone());
    let mut next = restarted(&agent, &dir, &gentle(), 1_000);
    assert_eq!((owners(&next, "shop"), owners(&next, "shop@staff")), before);
    assert!(next.host.with(|host| host.plane.services.clone()) == plane, "not a bucket moves");
    seconds(&mut next, 10);
    assert_eq!(has(&next), [10, 100]);
    let mut next = Agent::start_at(
        dir.path(),
        &gentle(),
        Shared::default(),
        Adopted::default(),
        next.boot_ms + 1_000,
    );
    assert_eq!((owners(&next, "shop"), owners(&next, "shop@staff")), before);
    tell(&mut next, "shop-v2", Action::Promote).unwrap();
    seconds(&mut next, 2);
    assert_eq!(has(&next), [100, 100]);
    assert_eq!(status(&mut next, "shop-v2").state, "completed");
    next.split(&[("v2", "30%")]).unwrap();
    assert_eq!(has(&next), [30, 30], "staff is nothing else any more");
}

#[test]
fn who_has_it_of_the_audience_has_it_of_everyone() {
    let dir = tempfile::tempdir().unwrap();
    let config = shop(
        r#"{ audience = "staff", split = "5%", hold = "20s" }, { split = "5%", hold = "20s" }, { split = "40%", hold = "1h" }, { split = "100%" }"#,
        "",
    );
    let mut agent = begun(&dir, &config);
    assert_eq!(has(&agent), [0, 5]);
    let of_staff = owners(&agent, "shop@staff");
    seconds(&mut agent, 21);
    assert_eq!(owners(&agent, "shop"), of_staff, "the very same clients");
    assert_eq!(owners(&agent, "shop@staff"), of_staff);
    // A third version of everyone's is a third version of staff's.
    agent.split(&[("v3", "20%")]).unwrap();
    seconds(&mut agent, 21);
    assert_eq!(has(&agent), [40, 40]);
    assert_eq!(owners(&agent, "shop@staff"), owners(&agent, "shop"));
}

#[test]
fn an_abort_takes_both_back_at_once_and_without_a_disk() {
    for (waits, shares, marked) in
        [(0, [0, 100], vec!["shop@staff"]), (21, [10, 100], vec!["shop", "shop@staff"])]
    {
        for full in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let mut agent = begun(&dir, &gentle());
            seconds(&mut agent, waits);
            assert_eq!(has(&agent), shares);
            agent.host.with(|host| host.refuse_store = full);
            let report = tell(&mut agent, "shop-v2", Action::Abort).unwrap();
            assert_eq!(report.rollout.state, "aborted");
            assert_eq!(has(&agent), [0, 0]);
            assert_eq!(agent.host.with(|host| host.marked.clone()), marked);
            let mut next = restarted(&agent, &dir, &gentle(), 1_000);
            assert_eq!(has(&next), [0, 0], "full: {full}");
            assert_eq!(status(&mut next, "shop-v2").state, "aborted");
            seconds(&mut next, 30);
            assert_eq!(has(&next), [0, 0]);
            let lines: Vec<String> = trail(&dir)
                .iter()
                .rev()
                .take_while(|(_, one)| !one.action.starts_with("rollout start"))
                .filter(|(_, one)| {
                    one.action == "rollout"
                        && one.after.get("v2").is_none_or(|share| share.fraction() == 0.0)
                })
                .map(|(_, one)| one.service.clone())
                .collect();
            let mut lines = lines;
            lines.sort();
            assert_eq!(lines, marked, "each once: {full}");
        }
    }
}

#[test]
fn a_step_back_without_a_disk_leaves_what_the_step_before_gave() {
    let dir = tempfile::tempdir().unwrap();
    let config = shop(
        r#"{ audience = "staff", split = "50%" }, { audience = "staff", split = "100%", gate = "asked" }, { split = "100%" }"#,
        "on_fail = \"step-back\"",
    );
    let mut agent = begun(&dir, &config);
    let (errands, mut asked) = tokio::sync::mpsc::unbounded_channel();
    agent.state.send_errands_to(errands);
    seconds(&mut agent, 8);
    assert_eq!(has(&agent), [0, 100]);
    let about = std::iter::from_fn(|| asked.try_recv().ok());
    assert!(about.into_iter().any(|errand| matches!(errand, Errand::Measure { .. })));
    agent.host.with(|host| host.refuse_store = true);
    for _ in 0..3 {
        say(&mut agent, Answer::Bad("worse".to_owned()));
        seconds(&mut agent, 1);
    }
    assert_eq!(has(&agent), [0, 50]);
    let mut next = restarted(&agent, &dir, &config, 1_000);
    assert_eq!(has(&next), [0, 50]);
    let held = status(&mut next, "shop-v2");
    assert_eq!((held.state.as_str(), held.step), ("held", Some(1)), "{held:?}");
    assert_eq!(held.audiences[0].share, "50%");
    assert!(held.reason.unwrap().contains("worse"));
    tell(&mut next, "shop-v2", Action::Abort).unwrap();
    assert_eq!(has(&next), [0, 0]);
}

#[test]
fn a_panic_sends_the_audience_to_control_and_nobody_brings_it_back() {
    for (waits, stands) in [(0, false), (0, true), (21, false), (21, true)] {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = begun(&dir, &gentle());
        seconds(&mut agent, waits);
        if stands {
            tell(&mut agent, "shop-v2", Action::Pause).unwrap();
        }
        let request = PanicRequest { service: Some("shop".to_owned()), ..PanicRequest::default() };
        agent.ask(|reply| Request::Panic { request, peer: PEER, reply }).unwrap();
        assert_eq!(has(&agent), [0, 0]);
        seconds(&mut agent, 3);
        assert_eq!(has(&agent), [0, 0]);
        if waits == 0 || !stands {
            assert_eq!(status(&mut agent, "shop-v2").state, "aborted", "{waits} {stands}");
        }
        let mut next = restarted(&agent, &dir, &gentle(), 1_000);
        seconds(&mut next, 30);
        assert_eq!(has(&next), [0, 0], "{waits} {stands}");
    }
}

#[test]
fn a_panic_that_the_rollout_has_not_heard_of_holds_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = begun(&dir, &gentle());
    // What the store holds of the rollout is from before the panic.
    agent.host.with(|host| host.refuse_rollouts = true);
    let request = PanicRequest { service: Some("shop".to_owned()), ..PanicRequest::default() };
    agent.ask(|reply| Request::Panic { request, peer: PEER, reply }).unwrap();
    assert_eq!(has(&agent), [0, 0]);
    let mut next = restarted(&agent, &dir, &gentle(), 1_000);
    assert_eq!(has(&next), [0, 0]);
    seconds(&mut next, 2);
    assert_eq!(status(&mut next, "shop-v2").state, "aborted");
    assert_eq!(has(&next), [0, 0]);
}

#[test]
fn what_is_set_by_hand_is_meant_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut agent = begun(&dir, &gentle());
    seconds(&mut agent, 21);
    assert_eq!(has(&agent), [10, 100]);
    agent.split(&[("v2", "0")]).unwrap();
    assert_eq!(has(&agent), [0, 0], "in the same moment");
    let paused = status(&mut agent, "shop-v2");
    assert_eq!(paused.state, "paused");
    assert!(paused.reason.unwrap().contains("`staff` (100%)"));
    tell(&mut agent, "shop-v2", Action::Resume).unwrap();
    seconds(&mut agent, 18);
    assert_eq!(has(&agent), [10, 100]);
    // Its table has no split, no past and no freeze of its own.
    let table = "shop@staff".to_owned();
    let refused = agent.request("shop@staff", &[("v2", "5%")], false).unwrap_err();
    assert_eq!(refused.code, "follows_service");
    assert!(refused.help.unwrap().contains("rollout abort"));
    let request = UndoRequest { service: Some(table.clone()), ..UndoRequest::default() };
    let refused = agent.ask(|reply| Request::Undo { request, peer: PEER, reply }).unwrap_err();
    assert_eq!(refused.code, "follows_service");
    let request = FreezeRequest {
        service: Some(table.clone()),
        reason: Some("peace".to_owned()),
        ..FreezeRequest::default()
    };
    let freezes = true;
    let refused = agent.ask(|reply| Request::Freeze { request, freezes, peer: PEER, reply });
    assert_eq!(refused.unwrap_err().code, "follows_service");
    let request = PanicRequest { service: Some(table), ..PanicRequest::default() };
    let refused = agent.ask(|reply| Request::Panic { request, peer: PEER, reply }).unwrap_err();
    assert_eq!(refused.code, "follows_service");
    assert_eq!(has(&agent), [10, 100]);
    // The last change is that of everyone's share.
    let request = UndoRequest::default();
    agent.ask(|reply| Request::Undo { request, peer: PEER, reply }).unwrap();
    assert_eq!(has(&agent), [0, 0]);
}

#[test]
fn an_audience_that_a_reload_takes_out_has_what_everyone_has() {
    let dir = tempfile::tempdir().unwrap();
    let running = gentle();
    let mut agent = begun(&dir, &running);
    assert_eq!(has(&agent), [0, 100]);
    let wanted = shop(r#"{ split = "10%", hold = "1h" }, { split = "100%" }"#, "");
    agent.reload(&running, &wanted).unwrap();
    let paused = status(&mut agent, "shop-v2");
    assert_eq!(paused.state, "paused");
    let reason = paused.reason.unwrap();
    assert!(reason.contains("no step names `staff` (100%) any more"), "{reason}");
    let staff = agent.explain("shop", "198.51.100.7", None, None).unwrap();
    assert_eq!((staff.audience, staff.version.as_deref()), (None, Some("stable")));
    // It comes back with nothing of its own, until a step says so.
    agent.wait(2_000);
    agent.reload(&wanted, &running).unwrap();
    assert_eq!(has(&agent), [0, 0]);
    tell(&mut agent, "shop-v2", Action::Resume).unwrap();
    seconds(&mut agent, 9);
    assert_eq!(has(&agent), [0, 100]);
    // Other reloads leave it alone.
    let mut other = gentle();
    for service in &mut other.services {
        service.versions[0].backends[0].weight = 3;
    }
    agent.reload(&running, &other).unwrap();
    assert_eq!((has(&agent), status(&mut agent, "shop-v2").state.as_str()), ([0, 100], "watching"));
    let mut next = restarted(&agent, &dir, &other, 1_000);
    assert_eq!(has(&next), [0, 100]);
    seconds(&mut next, 21);
    assert_eq!(has(&next), [10, 100]);
}

#[test]
fn a_route_that_takes_the_place_of_a_step_says_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let running = gentle();
    let mut agent = begun(&dir, &running);
    assert_eq!(has(&agent), [0, 100]);
    let mut wanted = shop(r#"{ split = "10%", hold = "1h" }, { split = "100%" }"#, "");
    let route = canary_agent::config::model::Route {
        audience: "staff".to_owned(),
        split: Default::default(),
        follows: false,
    };
    let mut table = gentle().services.swap_remove(1);
    table.split = Default::default();
    if let Some(of) = &mut table.derived {
        of.follows = false;
    }
    wanted.services[0].routes.push(route);
    wanted.services[0].routed = true;
    wanted.services.insert(1, table);
    agent.reload(&running, &wanted).unwrap();
    assert_eq!(has(&agent), [0, 0], "control alone");
}
