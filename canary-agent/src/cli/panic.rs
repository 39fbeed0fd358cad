//! `panic`: everything to control, whether or not an agent answers.
//!
//! For one service, the agent is asked first. If it has not answered within a moment, because it is
//! stopped, hangs or is gone, this writes the pinned maps by itself, and leaves a mark there that the
//! agent adopts when it goes on, or the next one when it starts. Both may happen where the agent was
//! only slow: the request has a name, so that it is done once.
//!
//! For all services, the maps are written first by whoever may: an agent makes a plan for each, with
//! tables of its own, which takes longer. It is told at once, and adopts what it finds.

use std::{
    collections::BTreeSet,
    hash::{BuildHasher, Hasher, RandomState},
    os::unix::net::UnixStream,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use canary_ebpf_common::abi::PANIC_REASON_BYTES;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use tokio::time::timeout;

use super::{
    args::{self, Global},
    client, detach,
    failure::{Failure, exit},
    print,
    split::{held, noted, shares, touched},
    text::{self, counted},
    wait_for,
};
use crate::{
    api::{
        model::ShareChange,
        panic::{PanicReport, PanicRequest, PanicService},
    },
    daemon,
    datapath::{self, Done, NotMoved, PanicOrder, Panicked, Pinned},
};

const TARGET: &str = "/v1/panic";

/// So long an agent is waited for to make its own what is in force already.
const ADOPTED_WITHIN: Duration = Duration::from_secs(1);

/// Sends everything to control, and says what has become of it.
pub(super) fn run(global: &Global, panic: args::Panic, json: bool) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let args::Panic { service, moves, reason, dry_run, agent_timeout } = panic;
    // What every reader of JSON can hold.
    let id = RandomState::new().build_hasher().finish() >> 11;
    let request = PanicRequest { service, moves, reason, dry_run, id: Some(id) };
    let client = client(global);
    let late = |time: Duration| {
        let socket = client.socket().display();
        let message = format!("the agent at {socket} has not answered within {time:?}");
        Failure::new("timeout", exit::UNREACHABLE, message)
    };
    let (answer, report, whole) = wait_for(async {
        if let Some(why) = stopped(client.socket()) {
            let (report, whole) = through_maps(&global.config, &request, begun, Some(&why))?;
            return Ok((None, report, whole));
        }
        if maps_first(&request)
            && let Ok((mut report, whole)) = through_maps(&global.config, &request, begun, None)
        {
            let patience = agent_timeout.max(ADOPTED_WITHIN);
            let told = timeout(patience, client.post_long(TARGET, &request)).await;
            let told = told.unwrap_or_else(|_| Err(late(patience)));
            match told.and_then(|answer| answer.read::<PanicReport>()) {
                Ok(adopted) => report.revision = adopted.revision,
                Err(why) => report.notes.insert(0, not_adopted(&why)),
            }
            return Ok((None, report, whole));
        }
        let asking = client.post_long(TARGET, &request);
        tokio::pin!(asking);
        let why = match timeout(agent_timeout, &mut asking).await {
            Ok(Ok(answer)) => return Ok((Some(answer.text()), answer.read()?, true)),
            Ok(Err(failure)) if !failure.is_silence() => return Err(failure),
            Ok(Err(failure)) => failure,
            Err(_) => late(agent_timeout),
        };
        match through_maps(&global.config, &request, begun, Some(&why)) {
            // It may only be slow, and is all that is left.
            Err(without)
                if why.is_late()
                    && matches!(without.exit_code(), exit::NOT_PERMITTED | exit::UNREACHABLE) =>
            {
                match asking.await {
                    Ok(answer) => Ok((Some(answer.text()), answer.read()?, true)),
                    Err(failure) if failure.is_silence() => Err(without),
                    Err(failure) => Err(failure),
                }
            }
            done => done.map(|(report, whole)| (None, report, whole)),
        }
    })?;
    let report: PanicReport = report;
    match (json, answer) {
        (true, Some(answer)) => print(&format!("{answer}\n"))?,
        (true, None) => {
            let line = serde_json::to_string(&report);
            let line =
                line.map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
            print(&format!("{line}\n"))?;
        }
        (false, _) => print(&shown(&report))?,
    }
    let refused = report.services.iter().any(|service| service.refused.is_some());
    Ok(ExitCode::from(if refused || !whole { exit::FAILED } else { exit::DONE }))
}

/// Whether the pinned maps are written before the agent is asked. Not where the mark has no room for
/// the reason.
fn maps_first(request: &PanicRequest) -> bool {
    let PanicRequest { service, moves: _, reason, dry_run, id: _ } = request;
    let fits = reason.as_ref().is_none_or(|reason| reason.len() <= PANIC_REASON_BYTES);
    service.is_none() && !dry_run && fits
}

/// Why an agent is not worth waiting for: its process is stopped. It adopts what is done when it
/// goes on.
fn stopped(socket: &Path) -> Option<Failure> {
    let stream = UnixStream::connect(socket).ok()?;
    let pid = getsockopt(&stream, PeerCredentials).ok()?.pid();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    is_stopped(&stat).then(|| {
        let message = format!("the agent at {}, process {pid}, is stopped", socket.display());
        Failure::new("timeout", exit::UNREACHABLE, message)
    })
}

/// Whether a process's `stat` says that a signal or a debugger has stopped it (proc_pid_stat(5)).
fn is_stopped(stat: &str) -> bool {
    // The name before may hold anything.
    let state = stat.rsplit_once(") ").map(|(_, after)| after.split(' ').next());
    matches!(state, Some(Some("T" | "t")))
}

/// What is said of maps that were written and that no agent has made its own yet.
fn not_adopted(why: &Failure) -> String {
    format!(
        "{why}: the pinned maps were changed. The agent adopts that when it goes on or is started, \
         and puts it into the audit trail"
    )
}

/// Does it without an agent, which is silent for the reason `why`, or not asked yet. Returns whether
/// all maps that an interface may be steered by were understood, too.
fn through_maps(
    config: &Path,
    request: &PanicRequest,
    begun: Instant,
    silent: Option<&Failure>,
) -> Result<(PanicReport, bool), Failure> {
    let bpffs = detach::bpffs(config)?;
    let why = silent.map_or_else(|| "the agent was not asked".to_owned(), ToString::to_string);
    let failed = |error: datapath::Error| {
        if error.not_permitted() {
            let message = format!("{why}; and without it the pinned maps are needed: {error}");
            return Failure::new("not_permitted", exit::NOT_PERMITTED, message).help(
                "run this as root or as the agent's own user, who may open the pins; or restart the agent, \
                 and ask it again",
            );
        }
        let message = format!("{why}; and the pinned maps can't be used: {error}");
        let failure = Failure::new("failed", exit::FAILED, message);
        match error {
            datapath::Error::ForeignPins { .. } => failure.help(
                "nothing was changed; use the `canary-agent` of the release that steers, or restart its agent",
            ),
            _ => failure,
        }
    };
    let open = || Pinned::open(&bpffs).map_err(failed);
    let Some(mut pinned) = open()? else {
        let message = format!(
            "{why}; and nothing is pinned under {}: nothing is steered from there",
            bpffs.display()
        );
        return Err(Failure::new("unreachable", exit::UNREACHABLE, message).help(
            "if the agent's `bpffs` is another, name its configuration with --config; else start it with \
             `canary-agent run`",
        ));
    };
    let known = pinned.services().map_err(failed)?;
    if let Some(name) = request.service.as_ref().filter(|name| !known.contains(*name)) {
        return Err(unknown_service(name, &known));
    }
    let now = daemon::moment()?;
    let order = PanicOrder {
        services: request.service.clone().map(|name| [name].into()),
        moves: request.moves,
        back: None,
        reason: request.reason.clone(),
        uid: nix::unistd::geteuid().as_raw(),
        id: request.id.unwrap_or_default(),
        unix_ms: now.unix_ms,
        now_ms: now.boot_ms,
        dry_run: request.dry_run,
    };
    let mut done = pinned.panic(&order).map_err(failed)?;
    // An agent that has just put other maps in their place may have filled them before.
    while !request.dry_run && !pinned.is_in_force() {
        let Some(others) = open()? else { break };
        pinned = others;
        done = pinned.panic(&order).map_err(failed)?;
    }
    if let ([one], Some(_)) = (&done.services[..], &request.service)
        && matches!(one.refused, Some(NotMoved::NobodyLeft(_)))
    {
        let service = refused(one);
        return Err(Failure::new(
            "nobody_left",
            exit::FAILED,
            service.refused.unwrap_or_default(),
        )
        .help("start an agent, bring a backend of control back with `canary-agent backend ready`, and ask again"));
    }
    let whole = done.unread.is_none();
    Ok((report(done, request, begun, silent), whole))
}

/// What was done to the maps, as an agent would say it.
fn report(
    done: Done,
    request: &PanicRequest,
    begun: Instant,
    silent: Option<&Failure>,
) -> PanicReport {
    let Done { services, cut, took, unread } = done;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let said = |why: &Failure| match request.dry_run {
        true => format!("{why}: this is what would be done to the pinned maps"),
        false => not_adopted(why),
    };
    let mut notes: Vec<String> = silent.map(said).into_iter().collect();
    if let Some(unread) = unread {
        notes.push(format!(
            "an agent was ended while it put these in the place of the maps at {}, which this release does \
             not read: an interface may be steered by those until an agent is started, and their services \
             were not moved there",
            unread.display()
        ));
    }
    let earlier: BTreeSet<(u32, u64)> = services
        .iter()
        .filter_map(|one| one.earlier.as_ref())
        .filter(|mark| mark.back.is_none())
        .map(|mark| (mark.uid, mark.unix_ms))
        .collect();
    for (uid, unix_ms) in earlier {
        let at = std::time::UNIX_EPOCH + Duration::from_millis(unix_ms);
        let at = humantime::format_rfc3339_seconds(at);
        notes.push(format!(
            "uid {uid} has done that at {at} already, and is who the audit trail will name"
        ));
    }
    if request.moves {
        notes.push(daemon::panic::MOVES.to_owned());
        if !request.dry_run {
            notes.push(format!(
                "{} taken away",
                counted(cut, "flow entry").replace("entrys", "entries")
            ));
        }
    }
    let touched: BTreeSet<String> =
        services.iter().flat_map(|one| &one.touched).map(ToString::to_string).collect();
    let services: Vec<PanicService> = services.iter().map(became).collect();
    PanicReport {
        applied: !request.dry_run,
        by: "maps".to_owned(),
        revision: None,
        buckets_moved: services.iter().map(|one| one.buckets_moved).sum(),
        services,
        backends_touched: touched.into_iter().collect(),
        connections_held: None,
        notes,
        took_us: micros(begun.elapsed()),
        maps_us: Some(micros(took)),
    }
}

fn became(one: &Panicked) -> PanicService {
    match &one.refused {
        Some(NotMoved::NobodyLeft(_)) => return refused(one),
        Some(why @ (NotMoved::Unusable(_) | NotMoved::Contended)) => {
            return PanicService {
                service: one.service.clone(),
                buckets_moved: one.moved,
                refused: Some(format!(
                    "service `{}`: {why}; some of its buckets may not be control's: start an agent, or ask again",
                    one.service
                )),
                ..PanicService::default()
            };
        }
        None => {}
    }
    let Panicked { service, control, had, buckets, moved, .. } = one;
    let share = |count: u32| f64::from(count) / f64::from((*buckets).max(1));
    let of_control = ShareChange {
        name: control.clone(),
        asked: "100%".to_owned(),
        before: share(buckets.saturating_sub(*moved)),
        in_force: 1.0,
    };
    let others = had.iter().map(|(name, count)| ShareChange {
        name: name.clone(),
        asked: "0%".to_owned(),
        before: share(*count),
        in_force: 0.0,
    });
    PanicService {
        service: service.clone(),
        versions: std::iter::once(of_control).chain(others).collect(),
        buckets_moved: *moved,
        refused: None,
    }
}

fn refused(one: &Panicked) -> PanicService {
    let Panicked { service, control, refused, .. } = one;
    let why = refused.as_ref().map_or_else(String::new, ToString::to_string);
    PanicService {
        service: service.clone(),
        refused: Some(format!(
            "service `{service}`: {why} (`{control}`); new connections would get nothing"
        )),
        ..PanicService::default()
    }
}

fn unknown_service(name: &str, known: &BTreeSet<String>) -> Failure {
    let message = format!("there is no service `{name}` in the pinned maps");
    let some: Vec<String> = known.iter().take(8).map(|name| format!("`{name}`")).collect();
    let more = if known.len() > some.len() { " …" } else { "" };
    Failure::new("unknown_service", exit::FAILED, message)
        .help(format!("there are {}{more}", some.join(", ")))
}

/// Services with their shares that an answer shows; of more it shows a line each.
const IN_FULL: usize = 4;

fn shown(report: &PanicReport) -> String {
    let PanicReport {
        applied,
        by: _,
        revision,
        services,
        buckets_moved,
        backends_touched,
        connections_held,
        notes,
        took_us,
        maps_us: _,
    } = report;
    let mut out = String::new();
    let took = Duration::from_micros(*took_us);
    let buckets = counted(u64::from(*buckets_moved), "bucket");
    out.push_str(&match (applied, revision) {
        (true, Some(revision)) => {
            format!("{buckets} moved to control; in force after {took:?} (revision {revision})\n")
        }
        (true, None) => format!("{buckets} moved to control; in force after {took:?}\n"),
        (false, _) => format!("{buckets} would move to control\n"),
    });
    for PanicService { service, versions, buckets_moved, refused } in services {
        let name = text::plain(service);
        if let Some(why) = refused {
            out.push_str(&format!("\nnot {name}: {}\n", text::plain(why)));
        } else if services.len() > IN_FULL {
            if *buckets_moved > 0 {
                out.push_str(&format!(
                    "  {name}: {}\n",
                    counted((*buckets_moved).into(), "bucket")
                ));
            }
        } else {
            out.push_str(&format!("\n{name}\n{}", shares(versions)));
        }
    }
    out.push_str(&touched(backends_touched));
    out.push_str(&held(*connections_held, None, "in these buckets"));
    out.push_str(&noted(notes));
    if !applied {
        out.push_str("nothing was changed (--dry-run)\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_told_from_others() {
        for (stat, expected) in [
            ("17 (canary-agent) T 1 17 17 0", true),
            ("17 (canary-agent) t 1 17 17 0", true),
            ("17 (canary-agent) S 1 17 17 0", false),
            ("17 (a) T (b) R 1 17 17 0", false),
            ("17 (a) R (b) T 1 17 17 0", true),
            ("17", false),
            ("", false),
        ] {
            assert_eq!(is_stopped(stat), expected, "{stat}");
        }
    }
}
