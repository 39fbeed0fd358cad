//! The database's schema: every version of it, and the way from each to the next.
//!
//! A released migration is never edited: a new one is added.

use rusqlite::{Connection, Transaction, TransactionBehavior};

/// `PRAGMA application_id`: "cnry". What tells the agent's file from another's.
pub(super) const APPLICATION_ID: i64 = 0x636e_7279;

/// Migration `n` leads from schema `n` to `n + 1`.
const MIGRATIONS: &[&str] = &[
    "CREATE TABLE change (
        revision INTEGER PRIMARY KEY,
        unix_ms INTEGER NOT NULL,
        uid INTEGER,
        service TEXT NOT NULL,
        action TEXT NOT NULL,
        reason TEXT,
        before TEXT NOT NULL,
        after TEXT NOT NULL,
        moved BLOB NOT NULL
    ) STRICT;
    CREATE TABLE service (
        name TEXT PRIMARY KEY,
        revision INTEGER NOT NULL REFERENCES change (revision),
        control TEXT NOT NULL,
        split TEXT NOT NULL,
        slots TEXT NOT NULL,
        owners BLOB NOT NULL,
        salt INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;",
    "CREATE TABLE placement (
        service TEXT NOT NULL REFERENCES service (name),
        version TEXT NOT NULL,
        family INTEGER NOT NULL CHECK (family IN (4, 6)),
        placement BLOB NOT NULL,
        PRIMARY KEY (service, version, family)
    ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE change ADD COLUMN backend TEXT;
    ALTER TABLE service ADD COLUMN admins TEXT NOT NULL DEFAULT '{}';",
    // A backend's change becomes a list of them. What is not known of older changes is NULL.
    "ALTER TABLE change ADD COLUMN buckets_moved INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE change ADD COLUMN slots TEXT;
    ALTER TABLE change ADD COLUMN salt INTEGER;
    ALTER TABLE change ADD COLUMN freeze TEXT;
    ALTER TABLE change ADD COLUMN about TEXT;
    ALTER TABLE change ADD COLUMN confirm_ms INTEGER;
    ALTER TABLE change RENAME COLUMN backend TO backends;
    UPDATE change SET backends = '[' || backends || ']' WHERE backends IS NOT NULL;
    CREATE INDEX change_by_service ON change (service, revision);
    CREATE TABLE pending (
        revision INTEGER PRIMARY KEY REFERENCES change (revision),
        batch INTEGER NOT NULL,
        within_ms INTEGER NOT NULL,
        boot_ms INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        unix_ms INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE freeze (
        service TEXT PRIMARY KEY,
        revision INTEGER NOT NULL REFERENCES change (revision),
        unix_ms INTEGER NOT NULL,
        uid INTEGER,
        reason TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE event (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        revision INTEGER REFERENCES change (revision),
        unix_ms INTEGER NOT NULL,
        kind TEXT NOT NULL,
        service TEXT NOT NULL,
        text TEXT NOT NULL
    ) STRICT;
    CREATE INDEX event_change ON event (revision) WHERE revision IS NOT NULL;
    CREATE INDEX event_notice ON event (id) WHERE revision IS NULL;
    INSERT INTO event (revision, unix_ms, kind, service, text)
        SELECT revision, unix_ms, action, service, '' FROM change ORDER BY revision;",
    "CREATE TABLE rollout (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        begun_unix_ms INTEGER NOT NULL,
        ended_unix_ms INTEGER,
        record TEXT NOT NULL
    ) STRICT;
    CREATE INDEX rollout_by_name ON rollout (name, number);
    CREATE TABLE evidence (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        rollout INTEGER NOT NULL REFERENCES rollout (number),
        step INTEGER NOT NULL,
        unix_ms INTEGER NOT NULL,
        window_ms INTEGER NOT NULL,
        signal TEXT NOT NULL,
        share REAL,
        control INTEGER,
        canary INTEGER,
        answer TEXT
    ) STRICT;
    CREATE INDEX evidence_by_rollout ON evidence (rollout, id);",
    "CREATE TABLE member (
        audience TEXT NOT NULL,
        network TEXT NOT NULL,
        boot_ms INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        unix_ms INTEGER NOT NULL,
        PRIMARY KEY (audience, network)
    ) STRICT, WITHOUT ROWID;",
    "ALTER TABLE evidence ADD COLUMN connections INTEGER;",
];

/// The newest schema known here.
pub(super) const NEWEST: i64 = MIGRATIONS.len() as i64;

/// What was found when a file was brought to the newest schema.
pub(super) enum Schema {
    /// It has the newest schema now.
    Ready,
    /// It has a newer one.
    Newer(i64),
    /// It belongs to another program.
    Foreign,
}

/// The schema of a file, if it is newer than [`NEWEST`].
pub(super) fn newer(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    let number = |pragma| connection.query_row(pragma, (), |row| row.get::<_, i64>(0));
    let ours = number("PRAGMA application_id")? == APPLICATION_ID;
    Ok(Some(number("PRAGMA user_version")?).filter(|found| ours && *found > NEWEST))
}

/// Brings `connection`'s file to the newest schema, in one transaction.
pub(super) fn migrate(connection: &mut Connection) -> rusqlite::Result<Schema> {
    let state = |c: &Connection| -> rusqlite::Result<(i64, i64, i64)> {
        Ok((
            c.query_row("PRAGMA application_id", (), |row| row.get(0))?,
            c.query_row("PRAGMA user_version", (), |row| row.get(0))?,
            c.query_row("SELECT count(*) FROM sqlite_schema", (), |row| row.get(0))?,
        ))
    };
    let judge = |(application, version, objects): (i64, i64, i64)| match (application, version) {
        (APPLICATION_ID, NEWEST) => Some(Schema::Ready),
        (APPLICATION_ID, v) if v > NEWEST => Some(Schema::Newer(v)),
        (APPLICATION_ID, v) if v >= 0 => None,
        (0, 0) if objects == 0 => None,
        _ => Some(Schema::Foreign),
    };
    // Looked at without a write lock first: a finished file may lie on a read-only disk.
    if let Some(verdict) = judge(state(connection)?) {
        return Ok(verdict);
    }
    let transaction = Transaction::new(connection, TransactionBehavior::Immediate)?;
    let found = state(&transaction)?;
    if let Some(verdict) = judge(found) {
        return Ok(verdict);
    }
    for migration in MIGRATIONS.iter().skip(found.1 as usize) {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", NEWEST)?;
    transaction.commit()?;
    Ok(Schema::Ready)
}
