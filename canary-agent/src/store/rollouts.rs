//! Where rollouts stand, and what they went by: their rows.

use rusqlite::{Connection, Row, Transaction, params};

use super::{EvidenceLine, KEPT_EVIDENCE, KEPT_ROLLOUTS, StoredRollout, sqlite::Failure};

const COLUMNS: &str = "number, name, begun_unix_ms, ended_unix_ms, record";

/// Writes a rollout in place of what was kept of it, adds evidence, and lets go of what is too
/// old. Returns its number.
pub(super) fn keep(
    transaction: &Transaction<'_>,
    rollout: &StoredRollout,
    evidence: &[EvidenceLine],
) -> Result<u64, Failure> {
    let StoredRollout { number, name, begun_unix_ms, ended_unix_ms, record } = rollout;
    transaction
        .prepare_cached(
            "INSERT INTO rollout (number, name, begun_unix_ms, ended_unix_ms, record)
             VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (number) DO UPDATE SET name = excluded.name,
             begun_unix_ms = excluded.begun_unix_ms, ended_unix_ms = excluded.ended_unix_ms,
             record = excluded.record",
        )?
        .execute(params![
            number.map(u64::cast_signed),
            name,
            begun_unix_ms.cast_signed(),
            ended_unix_ms.map(u64::cast_signed),
            record
        ])?;
    let number = number.unwrap_or_else(|| transaction.last_insert_rowid().cast_unsigned());
    let mut insert = transaction.prepare_cached(
        "INSERT INTO evidence (rollout, step, unix_ms, window_ms, signal, share, control, canary,
         answer, connections) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?;
    for line in evidence {
        let EvidenceLine { rollout: _, step, unix_ms, window_ms, signal, share, .. } = line;
        let EvidenceLine { events, connections, answer, .. } = line;
        insert.execute(params![
            number.cast_signed(),
            step,
            unix_ms.cast_signed(),
            window_ms.cast_signed(),
            signal,
            share,
            events.map(|[control, _]| control.cast_signed()),
            events.map(|[_, canary]| canary.cast_signed()),
            answer,
            connections.map(u64::cast_signed)
        ])?;
    }
    if !evidence.is_empty() {
        let last = transaction.last_insert_rowid();
        transaction
            .prepare_cached("DELETE FROM evidence WHERE id <= ?1")?
            .execute([last.saturating_sub(KEPT_EVIDENCE.cast_signed())])?;
    }
    if ended_unix_ms.is_some() {
        let old = number.saturating_sub(KEPT_ROLLOUTS).cast_signed();
        transaction.execute(
            "DELETE FROM evidence WHERE rollout IN
             (SELECT number FROM rollout WHERE number <= ?1 AND ended_unix_ms IS NOT NULL)",
            [old],
        )?;
        transaction.execute(
            "DELETE FROM rollout WHERE number <= ?1 AND ended_unix_ms IS NOT NULL",
            [old],
        )?;
    }
    Ok(number)
}

/// Those that are not over, and the last of each name.
pub(super) fn current(connection: &Connection) -> Result<Vec<StoredRollout>, Failure> {
    let mut statement = connection.prepare(&format!(
        "SELECT {COLUMNS} FROM rollout WHERE ended_unix_ms IS NULL OR number IN
         (SELECT max(number) FROM rollout GROUP BY name) ORDER BY number"
    ))?;
    let rows = statement.query_map((), read)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Those of a name, the newest first.
pub(super) fn of_name(
    connection: &Connection,
    name: &str,
    limit: usize,
) -> Result<Vec<StoredRollout>, Failure> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM rollout WHERE name = ?1 ORDER BY number DESC LIMIT ?2"
    ))?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = statement.query_map(params![name, limit], read)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// What one went by, the oldest first.
pub(super) fn evidence(connection: &Connection, number: u64) -> Result<Vec<EvidenceLine>, Failure> {
    let mut statement = connection.prepare_cached(
        "SELECT rollout, step, unix_ms, window_ms, signal, share, control, canary, answer,
         connections FROM evidence WHERE rollout = ?1 ORDER BY id",
    )?;
    let rows = statement.query_map([number.cast_signed()], |row| {
        let number = |at: usize| row.get::<_, i64>(at).map(i64::cast_unsigned);
        let events: (Option<i64>, Option<i64>) = (row.get(6)?, row.get(7)?);
        Ok(EvidenceLine {
            rollout: number(0)?,
            step: row.get(1)?,
            unix_ms: number(2)?,
            window_ms: number(3)?,
            signal: row.get(4)?,
            share: row.get(5)?,
            events: events
                .0
                .zip(events.1)
                .map(|(control, canary)| [control.cast_unsigned(), canary.cast_unsigned()]),
            answer: row.get(8)?,
            connections: row.get::<_, Option<i64>>(9)?.map(i64::cast_unsigned),
        })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

fn read(row: &Row<'_>) -> rusqlite::Result<StoredRollout> {
    let number = |at: usize| row.get::<_, i64>(at).map(i64::cast_unsigned);
    Ok(StoredRollout {
        number: Some(number(0)?),
        name: row.get(1)?,
        begun_unix_ms: number(2)?,
        ended_unix_ms: row.get::<_, Option<i64>>(3)?.map(i64::cast_unsigned),
        record: row.get(4)?,
    })
}
