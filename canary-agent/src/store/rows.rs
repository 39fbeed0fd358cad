//! What stands in the tables' rows: writing and reading them.

use rusqlite::{Connection, OptionalExtension, Row, ToSql, Transaction, params, params_from_iter};

use super::{
    Change, Commit, Deadline, Event, EventQuery, Freeze, KEPT_CHANGES, KEPT_LISTS, KEPT_NOTICES,
    Notice, Pending, PlacementRecord, ServiceRecord, json, sqlite::Failure,
};
use crate::failpoint::Failpoint;

/// Columns of a change, as [`change`] reads them; `moved` last, because it is large.
const CHANGE: &str = "change.revision, change.unix_ms, uid, change.service, action, reason, before, \
     after, backends, buckets_moved, slots, salt, freeze, about, confirm_ms";

/// The last revision.
pub(super) fn revision(connection: &Connection) -> Result<u64, Failure> {
    last(connection, "SELECT max(revision) FROM change")
}

/// The number of the last event.
pub(super) fn last_event(connection: &Connection) -> Result<u64, Failure> {
    last(connection, "SELECT max(id) FROM event")
}

fn last(connection: &Connection, query: &str) -> Result<u64, Failure> {
    let number: Option<i64> =
        connection.query_row(query, (), |row| row.get(0)).optional()?.flatten();
    Ok(number.unwrap_or(0).cast_unsigned())
}

/// Writes a change and all that it leads to.
pub(super) fn insert(
    transaction: &Transaction<'_>,
    revision: u64,
    commit: &Commit,
) -> Result<(), Failure> {
    let Commit { change, record, deadline, settles } = commit;
    insert_change(transaction, revision, change)?;
    Failpoint::ChangeWritten.pass();
    if let Some(record) = record {
        insert_service(transaction, revision, record)?;
        Failpoint::ServiceWritten.pass();
    }
    for settled in settles {
        transaction
            .prepare_cached("DELETE FROM pending WHERE revision = ?1")?
            .execute([settled.cast_signed()])?;
    }
    if let Some(Deadline { batch, within_ms, boot_ms, boot_id, unix_ms }) = deadline {
        transaction.execute(
            "INSERT INTO pending VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![
                revision.cast_signed(),
                batch.cast_signed(),
                within_ms.cast_signed(),
                boot_ms.cast_signed(),
                boot_id,
                unix_ms.cast_signed()
            ],
        )?;
    }
    if let Some(freeze) = &change.freeze {
        let Change { service, unix_ms, uid, .. } = change;
        match &freeze.after {
            None => transaction.execute("DELETE FROM freeze WHERE service = ?1", [service])?,
            Some(reason) => transaction.execute(
                "INSERT OR REPLACE INTO freeze VALUES (?1, ?2, ?3, ?4, ?5)",
                params![service, revision.cast_signed(), unix_ms.cast_signed(), uid, reason],
            )?,
        };
    }
    Ok(())
}

fn insert_change(
    transaction: &Transaction<'_>,
    revision: u64,
    change: &Change,
) -> Result<(), Failure> {
    let Change {
        unix_ms,
        uid,
        service,
        action,
        reason,
        before,
        after,
        moved,
        buckets_moved,
        slots,
        salt,
        backends,
        freeze,
        about,
        confirm_ms,
    } = change;
    transaction
        .prepare_cached(
            "INSERT INTO change (revision, unix_ms, uid, service, action, reason, before, after,
             moved, backends, buckets_moved, slots, salt, freeze, about, confirm_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
        )?
        .execute(params![
            revision.cast_signed(),
            unix_ms.cast_signed(),
            uid,
            service,
            action,
            reason,
            json::split_to(before),
            json::split_to(after),
            moved,
            json::backends_to(backends),
            buckets_moved,
            json::list_to(slots),
            salt.map(u64::cast_signed),
            freeze.as_ref().map(json::freeze_to),
            json::list_to(about),
            confirm_ms.map(u64::cast_signed),
        ])?;
    transaction
        .prepare_cached(
            "INSERT INTO event (revision, unix_ms, kind, service, text) VALUES (?1, ?2, ?3, ?4, '')",
        )?
        .execute(params![revision.cast_signed(), unix_ms.cast_signed(), action, service])?;
    Ok(())
}

fn insert_service(
    transaction: &Transaction<'_>,
    revision: u64,
    record: &ServiceRecord,
) -> Result<(), Failure> {
    let ServiceRecord { name, control, split, slots, owners, salt, placements, admins } = record;
    transaction
        .prepare_cached(
            "INSERT INTO service VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT (name) DO UPDATE SET revision = excluded.revision,
             control = excluded.control, split = excluded.split,
             slots = excluded.slots, owners = excluded.owners, salt = excluded.salt,
             admins = excluded.admins",
        )?
        .execute(params![
            name,
            revision.cast_signed(),
            control,
            json::split_to(split),
            serde_json::Value::from(slots.as_slice()).to_string(),
            owners,
            salt.cast_signed(),
            json::admins_to(admins)
        ])?;
    if let Some(placements) = placements {
        transaction.execute("DELETE FROM placement WHERE service = ?1", [name])?;
        let mut statement =
            transaction.prepare_cached("INSERT INTO placement VALUES (?1, ?2, ?3, ?4)")?;
        for PlacementRecord { version, family, placement } in placements {
            statement.execute(params![name, version, family, placement])?;
        }
    }
    Ok(())
}

/// Adds what is no change.
pub(super) fn insert_notices(
    transaction: &Transaction<'_>,
    notices: &[Notice],
) -> Result<(), Failure> {
    let mut statement = transaction.prepare_cached(
        "INSERT INTO event (revision, unix_ms, kind, service, text) VALUES (NULL, ?1, ?2, ?3, ?4)",
    )?;
    for Notice { unix_ms, kind, service, text } in notices {
        statement.execute(params![unix_ms.cast_signed(), kind, service, text])?;
    }
    let last = last_event(transaction)?;
    transaction
        .prepare_cached("DELETE FROM event WHERE revision IS NULL AND id <= ?1")?
        .execute([last.saturating_sub(KEPT_NOTICES).cast_signed()])?;
    Ok(())
}

/// Lets go of what is older than is kept, but for what the present state refers to. Lists up
/// to revision `forgotten` have been forgotten before.
pub(super) fn prune(
    transaction: &Transaction<'_>,
    newest: u64,
    forgotten: u64,
) -> Result<(), Failure> {
    transaction.execute(
        "UPDATE change SET moved = x'' WHERE revision > ?1 AND revision <= ?2
         AND revision NOT IN (SELECT revision FROM pending)",
        [forgotten.cast_signed(), newest.saturating_sub(KEPT_LISTS).cast_signed()],
    )?;
    let old = newest.saturating_sub(KEPT_CHANGES).cast_signed();
    const UNUSED: &str = "revision <= ?1 AND revision NOT IN (SELECT revision FROM service
         UNION SELECT revision FROM pending UNION SELECT revision FROM freeze)";
    transaction.execute(&format!("DELETE FROM event WHERE {UNUSED}"), [old])?;
    transaction.execute(&format!("DELETE FROM change WHERE {UNUSED}"), [old])?;
    Ok(())
}

/// All services, by name, with their placements.
pub(super) fn services(transaction: &Transaction<'_>) -> Result<Vec<ServiceRecord>, Failure> {
    let mut services = Vec::new();
    let mut statement = transaction.prepare(
        "SELECT name, control, split, slots, owners, salt, admins FROM service ORDER BY name",
    )?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        services.push(ServiceRecord {
            name: row.get(0)?,
            control: row.get(1)?,
            split: json::split_from(&row.get::<_, String>(2)?)?,
            slots: json::list_from("slots", row.get(3)?)?,
            owners: row.get(4)?,
            salt: row.get::<_, i64>(5)?.cast_unsigned(),
            placements: Some(Vec::new()),
            admins: json::admins_from(&row.get::<_, String>(6)?)?,
        });
    }
    placements(transaction, &mut services)?;
    Ok(services)
}

/// Gives `services`, which are in order of name, their placements.
fn placements(
    transaction: &Transaction<'_>,
    services: &mut [ServiceRecord],
) -> Result<(), Failure> {
    let mut statement = transaction.prepare(
        "SELECT service, version, family, placement FROM placement ORDER BY service, version, family",
    )?;
    let mut rows = statement.query(())?;
    while let Some(row) = rows.next()? {
        let service: String = row.get(0)?;
        let at = services.binary_search_by(|s| s.name.cmp(&service)).map_err(|_| {
            Failure::Damaged(format!("a placement of service {service}, which does not exist"))
        })?;
        services[at].placements.get_or_insert_default().push(PlacementRecord {
            version: row.get(1)?,
            family: row.get(2)?,
            placement: row.get(3)?,
        });
    }
    Ok(())
}

/// What waits for a confirmation.
pub(super) fn pending(connection: &Connection) -> Result<Vec<Pending>, Failure> {
    let mut statement = connection.prepare(&format!(
        "SELECT {CHANGE}, moved, batch, within_ms, boot_ms, boot_id, pending.unix_ms
         FROM pending JOIN change USING (revision) ORDER BY revision"
    ))?;
    let mut rows = statement.query(())?;
    let mut pending = Vec::new();
    while let Some(row) = rows.next()? {
        let (revision, mut change) = change(row)?;
        change.moved = row.get(15)?;
        let number = |at: usize| row.get::<_, i64>(at).map(i64::cast_unsigned);
        let deadline = Deadline {
            batch: number(16)?,
            within_ms: number(17)?,
            boot_ms: number(18)?,
            boot_id: row.get(19)?,
            unix_ms: number(20)?,
        };
        pending.push(Pending { revision, deadline, change });
    }
    Ok(pending)
}

/// What is frozen.
pub(super) fn freezes(connection: &Connection) -> Result<Vec<Freeze>, Failure> {
    let mut statement = connection
        .prepare("SELECT service, revision, unix_ms, uid, reason FROM freeze ORDER BY service")?;
    let freezes = statement.query_map((), |row| {
        Ok(Freeze {
            service: row.get(0)?,
            revision: row.get::<_, i64>(1)?.cast_unsigned(),
            unix_ms: row.get::<_, i64>(2)?.cast_unsigned(),
            uid: row.get(3)?,
            reason: row.get(4)?,
        })
    })?;
    Ok(freezes.collect::<rusqlite::Result<_>>()?)
}

/// Changes with their lists, by what follows `WHERE`.
pub(super) fn changes(
    connection: &Connection,
    condition: &str,
    parameters: &[&dyn ToSql],
) -> Result<Vec<(u64, Change)>, Failure> {
    let mut statement = connection
        .prepare_cached(&format!("SELECT {CHANGE}, moved FROM change WHERE {condition}"))?;
    let mut rows = statement.query(parameters)?;
    let mut changes = Vec::new();
    while let Some(row) = rows.next()? {
        let (revision, mut change) = change(row)?;
        change.moved = row.get(15)?;
        changes.push((revision, change));
    }
    Ok(changes)
}

/// Everything of a change but its list.
fn change(row: &Row<'_>) -> Result<(u64, Change), Failure> {
    let number = |at: usize| row.get::<_, Option<i64>>(at).map(|n| n.map(i64::cast_unsigned));
    let change = Change {
        unix_ms: row.get::<_, i64>(1)?.cast_unsigned(),
        uid: row.get(2)?,
        service: row.get(3)?,
        action: row.get(4)?,
        reason: row.get(5)?,
        before: json::split_from(&row.get::<_, String>(6)?)?,
        after: json::split_from(&row.get::<_, String>(7)?)?,
        moved: Vec::new(),
        backends: json::backends_from(row.get(8)?)?,
        buckets_moved: row.get(9)?,
        slots: json::list_from("slots", row.get(10)?)?,
        salt: number(11)?,
        freeze: row
            .get::<_, Option<String>>(12)?
            .map(|text| json::freeze_from(&text))
            .transpose()?,
        about: json::list_from("about", row.get(13)?)?,
        confirm_ms: number(14)?,
    };
    Ok((row.get::<_, i64>(0)?.cast_unsigned(), change))
}

/// What has happened.
pub(super) fn events(connection: &Connection, query: &EventQuery) -> Result<Vec<Event>, Failure> {
    let EventQuery { after, since_unix_ms, service, limit } = query;
    let mut conditions = vec!["1"];
    let mut parameters: Vec<Box<dyn ToSql>> = Vec::new();
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    if let Some(after) = after {
        conditions.push("event.id > ?");
        parameters.push(Box::new(signed(*after)));
    }
    if let Some(since) = since_unix_ms {
        conditions.push("event.unix_ms >= ?");
        parameters.push(Box::new(signed(*since)));
    }
    if let Some(service) = service {
        conditions.push("(event.service = ? OR event.service = '' AND event.revision IS NOT NULL)");
        parameters.push(Box::new(service.clone()));
    }
    parameters.push(Box::new(signed(*limit as u64)));
    let order = if after.is_some() { "ASC" } else { "DESC" };
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {CHANGE}, event.id, event.unix_ms, event.kind, event.service, event.text
         FROM event LEFT JOIN change ON change.revision = event.revision
         WHERE {} ORDER BY event.id {order} LIMIT ?",
        conditions.join(" AND ")
    ))?;
    let mut rows = statement.query(params_from_iter(parameters))?;
    let mut events = Vec::new();
    while let Some(row) = rows.next()? {
        let id = row.get::<_, i64>(15)?.cast_unsigned();
        events.push(match row.get::<_, Option<i64>>(0)? {
            Some(_) => {
                let (revision, change) = change(row)?;
                Event::Change(id, revision, Box::new(change))
            }
            None => Event::Notice(
                id,
                Notice {
                    unix_ms: row.get::<_, i64>(16)?.cast_unsigned(),
                    kind: row.get(17)?,
                    service: row.get(18)?,
                    text: row.get(19)?,
                },
            ),
        });
    }
    if after.is_none() {
        events.reverse();
    }
    Ok(events)
}
