//! Members of audiences: adding, renewing, removing, and the end of their time.
//!
//! They are stored before they count, and forgotten in the store some time after they have ended.
//! Their lives are measured by the clock that counts suspended time; a start of the host begins that
//! anew, and what is left then is what the wall clock says.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use ipnet::IpNet;

use super::{Kernel, Moment, Peer, Refusal, State, changes::frozen, saving, state::micros};
use crate::{
    api::{
        audience::{AudienceMembers, MembersReport, MembersRequest},
        model::AudienceSummary,
    },
    audience::members::{LONGEST, MAX_BATCH, Members, lifetime_ms, member},
    config::{
        self,
        model::{Audience, Dynamic},
    },
    plan::BootMs,
    store::{StateStore, StoredMember},
};

/// What is done to members in this time is one line of the audit trail.
const TALLY_MS: BootMs = 60_000;
/// So many tallies there are at a time; reasons of more are left out.
const TALLIES: usize = 256;
/// Bad members that a refusal names.
const NAMED: usize = 5;

/// Members of all audiences.
#[derive(Default)]
pub(super) struct Book {
    /// Also of audiences that are not in the configuration, or may have none just now.
    of: BTreeMap<String, Members>,
    /// Those that have ended and are still in the store.
    ended: Vec<(String, IpNet)>,
    /// Those that have ended and are still in the plan, which had no room for that.
    owed: Vec<(String, Vec<IpNet>)>,
    /// The store is another file, which knows none of them.
    unknown: bool,
    counts: BTreeMap<String, Counts>,
    tallies: BTreeMap<Doer, Tally>,
}

/// What has become of members since the agent began, by audience.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    added: u64,
    renewed: u64,
    removed: u64,
    expired: u64,
    refused: u64,
}

/// Who does something to members of an audience, and why; nobody where their time is over.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Doer {
    audience: String,
    uid: Option<u32>,
    reason: Option<String>,
}

/// What somebody has done since the last line about it.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    counts: Counts,
    /// When the next line is due.
    due_ms: BootMs,
}

impl Book {
    /// What is stored, as this start of the host counts time, without those whose time is over.
    pub(super) fn begin(
        stored: Vec<StoredMember>,
        audiences: &[Audience],
        boot_id: &str,
        now: Moment,
    ) -> Self {
        let mut book = Self::default();
        let longest = u64::try_from(LONGEST.as_millis()).unwrap_or(u64::MAX);
        for StoredMember { audience, network, boot_ms, boot_id: of, unix_ms } in stored {
            // A clock that has gone back is another start's, whatever the name says.
            let of_this_start = of == boot_id && boot_ms <= now.boot_ms.saturating_add(longest);
            let left = match of_this_start {
                true => boot_ms.saturating_sub(now.boot_ms),
                false => unix_ms.saturating_sub(now.unix_ms).min(longest),
            };
            match left {
                0 => book.ended.push((audience, network)),
                left => {
                    let members = book.of.entry(audience).or_insert_with(|| Members::new(0));
                    members.put(network, now.boot_ms + left);
                }
            }
        }
        book.resize(audiences);
        book
    }

    /// Takes over how many there may be.
    pub(super) fn resize(&mut self, audiences: &[Audience]) {
        self.of.values_mut().for_each(|members| members.set_room(0));
        for Audience { name, dynamic, .. } in audiences {
            let Some(Dynamic { ttl: _, max }) = dynamic else { continue };
            let members = self.of.entry(name.clone()).or_insert_with(|| Members::new(0));
            members.set_room(*max);
        }
        self.of.retain(|_, members| !members.is_empty() || members.room() > 0);
    }

    /// The members of an audience.
    pub(super) fn of(&self, audience: &str) -> Option<&Members> {
        self.of.get(audience)
    }

    /// The store is another file, which knows none of them.
    pub(super) fn is_unknown(&mut self) {
        self.unknown = true;
    }

    fn next_ms(&self) -> Option<BootMs> {
        self.of.values().filter_map(Members::next_ms).min()
    }
}

impl<S: StateStore, K: Kernel> State<S, K> {
    /// Lets the plan begin with the members that are stored.
    pub(super) fn begin_members(&mut self) {
        for (audience, members) in &self.members.of {
            let networks: Vec<IpNet> = members.iter().map(|(network, _)| network).collect();
            if let Err(error) = self.planner.change_members(audience, &networks, &[]) {
                let alert = format!("the members of audience `{audience}` don't count: {error}");
                tracing::error!("{alert}");
                self.alerts.entry("members").or_default().push(alert);
            }
        }
    }

    /// Adds members, renews them and takes them out; or says what that would do.
    ///
    /// # Errors
    /// What is wrong, or that there is no room. Nothing has changed then.
    pub(super) fn change_members(
        &mut self,
        audience: &str,
        request: &MembersRequest,
        peer: Peer,
        (arrived, now): (Instant, Moment),
    ) -> Result<MembersReport, Refusal> {
        let done = self.try_members(audience, request, peer, now);
        if done.is_err() && self.members.of.contains_key(audience) {
            self.members.counts.entry(audience.to_owned()).or_default().refused += 1;
        }
        let report = done?;
        if report.applied {
            self.settle_or_refuse(now)?;
        }
        Ok(MembersReport { took_us: micros(arrived.elapsed()), ..report })
    }

    fn try_members(
        &mut self,
        audience: &str,
        request: &MembersRequest,
        peer: Peer,
        now: Moment,
    ) -> Result<MembersReport, Refusal> {
        let MembersRequest { add, remove, ttl, reason, dry_run } = request;
        let found = self.find_audience(audience)?;
        let Some(Dynamic { ttl: default, max: _ }) = found.dynamic.clone() else {
            return Err(Refusal {
                code: "not_dynamic",
                message: format!("audience `{audience}` has no members with a lifetime"),
                help: Some(
                    "allow for them in the configuration, `dynamic = { ttl = \"8h\" }`, and reload"
                        .to_owned(),
                ),
                exit_code: 1,
            });
        };
        let [add, remove] = [read(add)?, read(remove)?];
        let named = add.len() + remove.len();
        if named == 0 || named > MAX_BATCH {
            let message = match named {
                0 => "no member is named".to_owned(),
                named => format!("{named} members in one request; {MAX_BATCH} is the most"),
            };
            let help = match named {
                0 => "name some in `add` or `remove`",
                _ => "send several requests: those that went through hold",
            };
            return Err(bad(message, help));
        }
        if let Some(both) = add.intersection(&remove).next() {
            return Err(bad(format!("{both} is to be added and to be removed"), "do one of both"));
        }
        let ttl = match ttl {
            None => default,
            Some(text) => config::duration(text).map_err(|why| bad_ttl(&why))?,
        };
        let ttl_ms = lifetime_ms(ttl).map_err(|error| bad_ttl(&error.to_string()))?;
        let until_ms = now.boot_ms.saturating_add(ttl_ms);
        let nobody = Members::new(0);
        let members = self.members.of(audience).unwrap_or(&nobody);
        let added = members.would_add(&add, until_ms);
        let (gone, not_there): (Vec<IpNet>, Vec<IpNet>) =
            remove.iter().partition(|network| members.until_ms(**network).is_some());
        let new: Vec<IpNet> =
            add.iter().copied().filter(|network| members.until_ms(*network).is_none()).collect();
        // Whom the same request takes out makes room.
        members.has_room(added.new.saturating_sub(gone.len())).map_err(|error| Refusal {
            code: "no_room",
            message: format!("audience `{audience}`: {error}"),
            help: Some(
                "wait until some expire, remove some, or raise `max` of its `dynamic` and reload"
                    .to_owned(),
            ),
            exit_code: 1,
        })?;
        if !new.is_empty() || !gone.is_empty() {
            self.may_be_routed(audience)?;
        }
        let mut report = MembersReport {
            applied: !dry_run,
            audience: audience.to_owned(),
            added: added.new,
            renewed: added.renewed,
            kept: added.kept,
            removed: gone.len(),
            not_there: not_there.len(),
            ttl_seconds: (!add.is_empty()).then_some(ttl.as_secs()),
            members: members.len() + added.new - gone.len(),
            room: members.room(),
            took_us: 0,
        };
        if *dry_run {
            return Ok(report);
        }
        let stays = |network: &&IpNet| members.until_ms(**network).is_none_or(|at| at < until_ms);
        let kept: Vec<StoredMember> = add
            .iter()
            .filter(stays)
            .map(|network| self.stored(audience, *network, until_ms, now))
            .collect();
        let forgotten: Vec<(String, IpNet)> =
            gone.iter().map(|network| (audience.to_owned(), *network)).collect();
        self.planner.change_members(audience, &new, &gone).map_err(|error| Refusal {
            code: "no_room",
            message: format!("the members of audience `{audience}` are as they were: {error}"),
            help: None,
            exit_code: 1,
        })?;
        let stored = match kept.is_empty() && forgotten.is_empty() {
            true => Ok(()),
            false => self.keep_members(&kept, &forgotten),
        };
        if let Err(error) = stored {
            if let Err(error) = self.planner.change_members(audience, &gone, &new) {
                tracing::error!(%error, "members that could not be stored count");
            }
            let what = format!("the membership of audience `{audience}`");
            return Err(saving::refused(&what, &error));
        }
        if let Some(members) = self.members.of.get_mut(audience) {
            for network in &gone {
                members.remove(*network);
            }
            add.iter().for_each(|network| members.put(*network, until_ms));
            report.members = members.len();
        }
        let counts = Counts {
            added: added.new as u64,
            renewed: added.renewed as u64,
            removed: gone.len() as u64,
            ..Counts::default()
        };
        tracing::debug!(audience, uid = peer.uid, ?counts, "members");
        self.tally(audience, Some(peer.uid), reason.as_deref(), counts, now);
        Ok(report)
    }

    /// Whether clients may go by another route of the services that have one for `audience`.
    fn may_be_routed(&self, audience: &str) -> Result<(), Refusal> {
        for state in self.planner.services() {
            let config = state.config();
            let has = config.routes.iter().any(|route| route.audience == audience);
            if has && let Some(freeze) = self.control.frozen(&config.name) {
                return Err(frozen(&config.name, freeze));
            }
        }
        Ok(())
    }

    fn stored(
        &self,
        audience: &str,
        network: IpNet,
        until_ms: BootMs,
        now: Moment,
    ) -> StoredMember {
        StoredMember {
            audience: audience.to_owned(),
            network,
            boot_ms: until_ms,
            boot_id: self.control.boot_id.clone(),
            unix_ms: now.unix_ms.saturating_add(until_ms.saturating_sub(now.boot_ms)),
        }
    }

    /// Stores what has become of members, after what the store has not been told of others.
    fn keep_members(
        &mut self,
        kept: &[StoredMember],
        forgotten: &[(String, IpNet)],
    ) -> Result<(), crate::store::StoreError> {
        // Those that have ended go first: one of them may be there again.
        let ended = std::mem::take(&mut self.members.ended);
        let again: BTreeSet<(&str, IpNet)> =
            kept.iter().map(|one| (one.audience.as_str(), one.network)).collect();
        let is_again =
            |(audience, network): &(String, IpNet)| again.contains(&(audience.as_str(), *network));
        let gone: Vec<_> =
            ended.iter().filter(|one| !is_again(one)).chain(forgotten).cloned().collect();
        let done = self.store.keep_members(kept, &gone, true);
        if done.is_err() {
            self.members.ended = ended;
        }
        done
    }

    /// Ends the memberships whose time is over. Returns when the next one's is.
    pub(super) fn expire_members(&mut self, now: Moment) -> Option<BootMs> {
        while self.members.next_ms().is_some_and(|at| at <= now.boot_ms) {
            let mut ended = Vec::new();
            for (audience, members) in &mut self.members.of {
                let networks = members.expire(now.boot_ms);
                if !networks.is_empty() {
                    ended.push((audience.clone(), networks));
                }
            }
            for (audience, networks) in ended {
                let expired = networks.len() as u64;
                let each = networks.iter().map(|network| (audience.clone(), *network));
                self.members.ended.extend(each);
                let counts = Counts { expired, ..Counts::default() };
                self.tally(&audience, None, None, counts, now);
                self.members.owed.push((audience, networks));
            }
            self.pay_members();
        }
        self.members.next_ms()
    }

    /// Takes those out of the plan that have ended. Where there are too many kinds of clients for
    /// that, they stay what they are until there are fewer.
    fn pay_members(&mut self) {
        if self.members.owed.is_empty() {
            return;
        }
        let planner = &mut self.planner;
        self.members.owed.retain(|(audience, networks)| {
            planner
                .change_members(audience, &[], networks)
                .inspect_err(|error| tracing::error!(%error, audience, "members can't end"))
                .is_err()
        });
        match self.members.owed.len() {
            0 => drop(self.alerts.remove("members")),
            audiences => {
                let alert = format!(
                    "members of {audiences} audiences have ended and still count: there are too many \
                     kinds of clients; let audiences overlap less"
                );
                self.alerts.insert("members", vec![alert]);
            }
        }
    }

    /// What is to be done about members each second.
    pub(super) fn tick_members(&mut self, now: Moment) {
        self.pay_members();
        self.tell_tallies(now, false);
        if std::mem::take(&mut self.members.unknown) {
            let all: Vec<StoredMember> = self
                .members
                .of
                .iter()
                .flat_map(|(audience, members)| {
                    members
                        .iter()
                        .map(|(network, until)| self.stored(audience, network, until, now))
                })
                .collect();
            self.members.unknown = self.keep_members(&all, &[]).is_err();
        }
        // Not worth waiting for the disk: what has ended is known by its time.
        let ended = std::mem::take(&mut self.members.ended);
        if !ended.is_empty()
            && let Err(error) = self.store.keep_members(&[], &ended, false)
        {
            tracing::debug!(%error, "members that have ended can't be forgotten");
            self.members.ended = ended;
        }
    }

    /// Counts what somebody has done. The first of it is told at once, what follows within a minute
    /// in one line: a service where people log in would drown all else.
    fn tally(
        &mut self,
        audience: &str,
        uid: Option<u32>,
        reason: Option<&str>,
        counts: Counts,
        now: Moment,
    ) {
        self.members.counts.entry(audience.to_owned()).or_default().add(counts);
        let reason = reason.filter(|_| self.members.tallies.len() < TALLIES);
        let doer = Doer { audience: audience.to_owned(), uid, reason: reason.map(str::to_owned) };
        match self.members.tallies.get_mut(&doer) {
            Some(tally) => tally.counts.add(counts),
            None => {
                self.notices.add(now, "members", "", line(&doer, counts));
                let due_ms = now.boot_ms + TALLY_MS;
                self.members.tallies.insert(doer, Tally { due_ms, ..Tally::default() });
                // Whoever asked has been promised a line.
                self.store_notices(now);
            }
        }
    }

    /// Adds lines that are due, or `all`, to the events.
    pub(super) fn tell_tallies(&mut self, now: Moment, all: bool) {
        let notices = &mut self.notices;
        self.members.tallies.retain(|doer, tally| {
            if !all && tally.due_ms > now.boot_ms {
                return true;
            }
            let counts = std::mem::take(&mut tally.counts);
            tally.due_ms = now.boot_ms + TALLY_MS;
            let any = !counts.is_nothing();
            if any {
                notices.add(now, "members", "", line(doer, counts));
            }
            any
        });
    }

    /// What is said of an audience's members.
    pub(super) fn members_status(
        &self,
        audience: &Audience,
        now: Moment,
    ) -> Option<AudienceMembers> {
        let Dynamic { ttl, max } = audience.dynamic.as_ref()?;
        let members = self.members.of(&audience.name);
        let next = members.and_then(Members::next_ms);
        let next = next.map(|at| Duration::from_millis(at.saturating_sub(now.boot_ms)));
        Some(AudienceMembers {
            members: members.map_or(0, Members::len),
            room: *max,
            ttl_seconds: ttl.as_secs(),
            next_ends_in_seconds: next.map(|left| left.as_secs_f64()),
        })
    }

    /// The audiences, for the status and the metrics.
    pub(super) fn audience_summaries(&self) -> Vec<AudienceSummary> {
        let one = |audience: &Audience| {
            let counts = self.members.counts.get(&audience.name).copied().unwrap_or_default();
            let Counts { added, renewed, removed, expired, refused } = counts;
            let dynamic = audience.dynamic.as_ref();
            AudienceSummary {
                name: audience.name.clone(),
                networks: audience.networks.len(),
                members: dynamic
                    .and_then(|_| self.members.of(&audience.name))
                    .map_or(0, Members::len),
                room: dynamic.map_or(0, |dynamic| dynamic.max),
                added,
                renewed,
                removed,
                expired,
                refused,
            }
        };
        self.audiences.iter().map(one).collect()
    }
}

impl Counts {
    fn add(&mut self, other: Self) {
        let Self { added, renewed, removed, expired, refused } = other;
        self.added += added;
        self.renewed += renewed;
        self.removed += removed;
        self.expired += expired;
        self.refused += refused;
    }

    const fn is_nothing(self) -> bool {
        self.added + self.renewed + self.removed + self.expired == 0
    }
}

fn line(doer: &Doer, counts: Counts) -> String {
    let Counts { added, renewed, removed, expired, refused: _ } = counts;
    let each = [(added, "added"), (renewed, "renewed"), (removed, "removed"), (expired, "expired")];
    let done: Vec<String> = each
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    let done = match done.is_empty() {
        true => "nothing changed".to_owned(),
        false => done.join(", "),
    };
    let Doer { audience, uid, reason } = doer;
    let who = uid.map_or_else(String::new, |uid| format!(" by uid {uid}"));
    let why = reason.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    format!("members of audience {audience}: {done}{who}{why}")
}

/// Reads members; of those that are none a few are named.
fn read(texts: &[String]) -> Result<BTreeSet<IpNet>, Refusal> {
    let (mut members, mut wrong) = (BTreeSet::new(), Vec::new());
    for (at, text) in (1..).zip(texts) {
        match member(text) {
            Ok(network) => drop(members.insert(network)),
            Err(error) => wrong.push(format!("number {at}: {error}")),
        }
    }
    if wrong.is_empty() {
        return Ok(members);
    }
    let more = match wrong.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    wrong.truncate(NAMED);
    Err(bad(
        format!("{}{more}", wrong.join("; ")),
        "nothing has changed; write `192.0.2.1` or `2001:db8::/64`",
    ))
}

fn bad(message: String, help: &str) -> Refusal {
    Refusal { code: "bad_members", message, help: Some(help.to_owned()), exit_code: 2 }
}

fn bad_ttl(why: &str) -> Refusal {
    Refusal {
        code: "bad_ttl",
        message: format!("the lifetime is wrong: {why}"),
        help: Some("write it as `8h` or `30m`".to_owned()),
        exit_code: 2,
    }
}
