//! `audience`: shows audiences and what a client is; adds members and takes them out.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    args::{self, Audience},
    changes::DRY_RUN,
    client::{Client, encoded},
    failure::{Failure, exit},
    print,
    text::{self, Align, Table, counted},
};
use crate::{
    api::audience::{
        AudienceMembers, AudienceRoute, AudienceStatus, Audiences, ClientReport, ClientRoute,
        HoldingAudience, MembersReport, MembersRequest,
    },
    audience::{
        file::{FileError, MAX_NETWORKS, parse_members},
        members::{MAX_BATCH, member},
    },
};

/// Bad lines of a file that are named.
const NAMED: usize = 10;
/// As much of a file is read: what so many members take with comments.
const MOST_BYTES: u64 = 128 << 20;

/// Asks the agent and prints what it says.
pub(super) async fn run(client: &Client, command: Audience, json: bool) -> Result<(), Failure> {
    let target = match &command {
        Audience::List => "/v1/audiences".to_owned(),
        Audience::Show { name } => format!("/v1/audiences/{}", encoded(name)),
        Audience::Test { address } => format!("/v1/clients/{address}"),
        Audience::Add { .. } | Audience::Remove { .. } => {
            return change(client, command, json).await;
        }
    };
    let answer = client.get(&target).await?;
    if json {
        return print(&format!("{}\n", answer.text()));
    }
    print(&match command {
        Audience::List => listed(&answer.read()?),
        Audience::Test { .. } => tested(&answer.read()?),
        _ => shown(&answer.read()?),
    })
}

/// Adds members or takes them out, in as many requests as that takes.
async fn change(client: &Client, command: Audience, json: bool) -> Result<(), Failure> {
    let (members, ttl, adds) = match command {
        Audience::Add { members, ttl } => (members, ttl, true),
        Audience::Remove { members } => (members, None, false),
        _ => return Ok(()),
    };
    let args::Members { name, networks, from, reason, dry_run } = members;
    let mut named = BTreeSet::new();
    for text in &networks {
        let network = member(text).map_err(|error| wrong(error.to_string()))?;
        named.insert(network);
    }
    if let Some(path) = &from {
        named.extend(listed_in(path)?);
    }
    let named: Vec<IpNet> = named.into_iter().collect();
    let target = format!("/v1/audiences/{}/members", encoded(&name));
    let mut sum: Option<MembersReport> = None;
    for batch in named.chunks(MAX_BATCH) {
        let texts: Vec<String> = batch.iter().map(ToString::to_string).collect();
        let (add, remove) = if adds { (texts, Vec::new()) } else { (Vec::new(), texts) };
        let (ttl, reason) = (ttl.clone(), reason.clone());
        let request = MembersRequest { add, remove, ttl, reason, dry_run };
        let done = match client.post(&target, &request).await {
            Ok(answer) => answer.read()?,
            Err(failure) => return Err(halfway(failure, sum.as_ref())),
        };
        sum = Some(match sum {
            None => done,
            Some(before) => together(before, done),
        });
    }
    let Some(report) = sum else {
        return Err(wrong("no member is named".to_owned()));
    };
    if !report.applied && report.members > report.room && report.added > 0 {
        let MembersReport { members, room, .. } = report;
        let message = format!("there would be {members} members, and {room} is the most");
        return Err(Failure::new("no_room", exit::FAILED, message));
    }
    if json {
        let report = serde_json::to_string(&report)
            .map_err(|error| Failure::new("failed", exit::FAILED, error.to_string()))?;
        return print(&format!("{report}\n"));
    }
    print(&changed(&report))
}

/// The members in a file.
fn listed_in(path: &Path) -> Result<Vec<IpNet>, Failure> {
    let shown = match path.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => path.display().to_string(),
    };
    let unreadable = |error: io::Error| {
        Failure::new("bad_file", exit::USAGE, format!("{shown} can't be read: {error}"))
    };
    let mut bytes = Vec::new();
    match path.to_str() {
        Some("-") => io::stdin().lock().take(MOST_BYTES + 1).read_to_end(&mut bytes),
        _ => File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes)),
    }
    .map_err(unreadable)?;
    parse_members(&bytes).map_err(|error| match error {
        FileError::Lines(bad) => {
            let named: Vec<String> = bad.iter().take(NAMED).map(ToString::to_string).collect();
            let more = match bad.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!("\n  and {more} more"),
            };
            wrong(format!("{shown}:\n  {}{more}", named.join("\n  ")))
        }
        FileError::TooMany { .. } => {
            wrong(format!("{shown} names more than {MAX_NETWORKS} members"))
        }
        error => wrong(format!("{shown}: {error}")),
    })
}

fn wrong(message: String) -> Failure {
    Failure::new("bad_members", exit::USAGE, message).help("nothing has changed")
}

/// What to say where some requests went through and one has not.
fn halfway(failure: Failure, done: Option<&MembersReport>) -> Failure {
    match (failure, done) {
        (Failure::Told(mut detail), Some(done)) if done.applied => {
            let MembersReport { added, renewed, kept, removed, not_there, .. } = done;
            let before = added + renewed + kept + removed + not_there;
            detail.message = format!("after {before} that are done: {}", detail.message);
            Failure::Told(detail)
        }
        (failure, _) => failure,
    }
}

/// Two requests as one.
fn together(before: MembersReport, done: MembersReport) -> MembersReport {
    let MembersReport { added, renewed, kept, removed, not_there, took_us, members, .. } = before;
    let members = match done.applied {
        true => done.members,
        // Each was asked what it would do to those who are there.
        false => members + done.added - done.removed,
    };
    MembersReport {
        added: added + done.added,
        renewed: renewed + done.renewed,
        kept: kept + done.kept,
        removed: removed + done.removed,
        not_there: not_there + done.not_there,
        took_us: took_us + done.took_us,
        members,
        ..done
    }
}

fn changed(report: &MembersReport) -> String {
    let MembersReport {
        applied,
        audience,
        added,
        renewed,
        kept,
        removed,
        not_there,
        ttl_seconds,
        members,
        room,
        took_us: _,
    } = report;
    let parts = [
        (*added, "added"),
        (*renewed, "renewed"),
        (*kept, "members for longer already"),
        (*removed, "removed"),
        (*not_there, "no members"),
    ];
    let parts = parts.iter().filter(|(count, _)| *count > 0);
    let parts: Vec<String> = parts.map(|(count, what)| format!("{count} {what}")).collect();
    let ttl = ttl_seconds.map_or_else(String::new, |seconds| {
        format!(", for {}", humantime::format_duration(Duration::from_secs(seconds)))
    });
    let would = if *applied { "" } else { "would be " };
    let line = format!("{audience}: {would}{}{ttl}", parts.join(", "));
    let mut out = format!("{}\n  {members} of at most {room} members\n", text::plain(&line));
    if !applied {
        out.push_str(DRY_RUN);
    }
    out
}

fn listed(Audiences { audiences }: &Audiences) -> String {
    if audiences.is_empty() {
        return "there is no audience\n".to_owned();
    }
    let mut table = Table::new([
        ("AUDIENCE", Align::Left),
        ("IPV4 NETWORKS", Align::Right),
        ("ADDRESSES", Align::Right),
        ("IPV6 NETWORKS", Align::Right),
        ("MEMBERS", Align::Right),
        ("ROUTES", Align::Left),
    ]);
    for one in audiences {
        let routes: Vec<&str> = one.routes.iter().map(|route| route.service.as_str()).collect();
        table.row([
            one.name.clone(),
            one.networks_v4.to_string(),
            one.addresses_v4.to_string(),
            one.networks_v6.to_string(),
            one.members.as_ref().map_or_else(String::new, |of| of.members.to_string()),
            routes.join(", "),
        ]);
    }
    table.render("")
}

fn shown(audience: &AudienceStatus) -> String {
    let AudienceStatus {
        name,
        networks_v4,
        addresses_v4,
        networks_v6,
        addresses_v6,
        file,
        mmdb,
        expression,
        members,
        examples,
        routes,
    } = audience;
    let mut lines = vec![
        name.clone(),
        format!(
            "  IPv4: {}, {}",
            counted(*networks_v4 as u64, "network"),
            match addresses_v4 {
                1 => "1 address".to_owned(),
                count => format!("{count} addresses"),
            }
        ),
        format!("  IPv6: {}, {addresses_v6} addresses", counted(*networks_v6 as u64, "network")),
    ];
    lines.extend(file.iter().map(|file| format!("  file: {file}")));
    lines.extend(mmdb.iter().map(|file| format!("  mmdb: {file}")));
    lines.extend(expression.iter().map(|asked| format!("  where: {asked}")));
    if let Some(AudienceMembers { members, room, ttl_seconds, next_ends_in_seconds }) = members {
        let for_seconds = |seconds| humantime::format_duration(Duration::from_secs(seconds));
        let next = next_ends_in_seconds.map_or_else(String::new, |left| {
            format!(", the next ends in {}", for_seconds(left.ceil() as u64))
        });
        let ttl = for_seconds(*ttl_seconds);
        lines.push(format!("  members: {members} of at most {room}, for {ttl} as a rule{next}"));
    }
    if !examples.is_empty() {
        lines.push(format!("  such as: {}", examples.join(", ")));
    }
    if routes.is_empty() {
        lines.push("  no route names it".to_owned());
    }
    for AudienceRoute { service, place, split, table } in routes {
        let split = if split.is_empty() { "control alone" } else { split };
        lines.push(format!("  route {place} of {service}: {split} (`split {table} …` changes it)"));
    }
    told(&lines)
}

fn tested(ClientReport { address, audiences, services }: &ClientReport) -> String {
    let mut lines = vec![match audiences.is_empty() {
        true => format!("{address} is in no audience"),
        false => {
            let one = |HoldingAudience { name, network, ends_in_seconds }: &HoldingAudience| {
                let left = ends_in_seconds.map_or_else(String::new, |left| {
                    let left = Duration::from_secs(left.ceil() as u64);
                    format!(", a member for {}", humantime::format_duration(left))
                });
                format!("{name} (as one of {network}{left})")
            };
            let names: Vec<String> = audiences.iter().map(one).collect();
            format!("{address} is in {}", names.join(", "))
        }
    }];
    for ClientRoute { service, audience, tracked, previous } in services {
        let of = |audience: &Option<String>| match audience {
            Some(name) => format!("the route of {name}"),
            None => "the service's own split".to_owned(),
        };
        let older = match tracked {
            true => format!("; connections from before its last change go by {}", of(previous)),
            false => String::new(),
        };
        lines.push(format!("  {service}: {}{older}", of(audience)));
    }
    told(&lines)
}

fn told(lines: &[String]) -> String {
    let mut out = lines.iter().map(|line| text::plain(line)).collect::<Vec<_>>().join("\n");
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_of_in_sentences() {
        let report = ClientReport {
            address: "198.51.100.7".to_owned(),
            audiences: vec![HoldingAudience {
                name: "staff".to_owned(),
                network: "198.51.100.0/24".to_owned(),
                ends_in_seconds: None,
            }],
            services: vec![
                ClientRoute {
                    service: "shop".to_owned(),
                    audience: Some("staff".to_owned()),
                    tracked: true,
                    previous: None,
                },
                ClientRoute { service: "blog".to_owned(), ..ClientRoute::default() },
            ],
        };
        assert_eq!(
            tested(&report),
            "198.51.100.7 is in staff (as one of 198.51.100.0/24)\n\
             \x20 shop: the route of staff; connections from before its last change go by the \
             service's own split\n\
             \x20 blog: the service's own split\n"
        );
    }

    #[test]
    fn several_requests_are_told_as_one() {
        let one = |added, members, applied| MembersReport {
            applied,
            audience: "beta".to_owned(),
            added,
            kept: 1,
            ttl_seconds: Some(28_800),
            members,
            room: 50_000,
            ..MembersReport::default()
        };
        let done = together(one(10_000, 10_000, true), one(5, 10_005, true));
        assert_eq!(
            changed(&done),
            "beta: 10005 added, 2 members for longer already, for 8h\n  10005 of at most 50000 \
             members\n"
        );
        let asked = together(one(10_000, 10_007, false), one(5, 12, false));
        assert_eq!(asked.members, 10_012, "7 are there");
        assert!(changed(&asked).ends_with(DRY_RUN));
    }
}
