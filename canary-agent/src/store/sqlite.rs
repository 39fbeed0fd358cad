//! The store of a single host: one SQLite file.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};

use super::{
    Change, Commit, PlacementRecord, ServiceRecord, Snapshot, StateStore, StoreError, json,
    schema::{self, Schema},
};

/// How long another reader of the file may keep a change waiting.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);

/// [`StateStore`] in `state.db`, in WAL mode with full synchronisation.
///
/// A file that can't be opened is tried again at every call. A damaged one is
/// renamed to `state.db.damaged-TIME` and an empty one takes its place.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    connection: Option<Connection>,
    /// Names of damaged files that were set aside, until they are asked for.
    set_aside: Vec<PathBuf>,
}

impl SqliteStore {
    /// The store at `state_dir/state.db`. Nothing is touched before the first call.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("state.db"), connection: None, set_aside: Vec::new() }
    }

    /// The damaged files that were set aside since the last call.
    pub fn take_set_aside(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.set_aside)
    }

    /// Runs `work` on the open file, opening it first where needed. A file that
    /// turns out to be damaged is set aside and `work` runs on an empty one.
    fn with<T>(
        &mut self,
        work: impl Fn(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        match self.attempt(&work) {
            Err(StoreError::Damaged { path, reason }) => {
                let aside = set_aside(&path).map_err(|e| {
                    unavailable(&path, format!("damaged ({reason}), and can't be set aside: {e}"))
                })?;
                tracing::error!(file = %path.display(), set_aside = %aside.display(), reason, "the state file is damaged; an empty one takes its place");
                self.set_aside.push(aside);
                self.attempt(&work)
            }
            result => result,
        }
    }

    fn attempt<T>(
        &mut self,
        work: &impl Fn(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => open(&self.path)?,
        };
        let result = work(&mut connection).map_err(|failure| failure.into_store_error(&self.path));
        // Whatever went wrong below may have been the file's or the disk's: look afresh next time.
        if matches!(result, Ok(_) | Err(StoreError::Stale { .. })) {
            self.connection = Some(connection);
        }
        result
    }
}

impl StateStore for SqliteStore {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        self.with(|connection| {
            let transaction = connection.transaction()?;
            let revision = revision(&transaction)?;
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
                    slots: serde_json::from_str(&row.get::<_, String>(3)?)
                        .map_err(|e| Failure::Damaged(format!("slots: {e}")))?,
                    owners: row.get(4)?,
                    salt: row.get::<_, i64>(5)?.cast_unsigned(),
                    placements: Some(Vec::new()),
                    admins: json::admins_from(&row.get::<_, String>(6)?)?,
                });
            }
            placements(&transaction, &mut services)?;
            Ok(Snapshot { revision, services })
        })
    }

    fn commit(&mut self, expected: u64, commits: &[Commit]) -> Result<u64, StoreError> {
        self.with(|connection| {
            let transaction = Transaction::new(connection, TransactionBehavior::Immediate)?;
            let found = revision(&transaction)?;
            if found != expected {
                return Err(Failure::Stale { expected, found });
            }
            let mut number = found;
            for Commit { change, record } in commits {
                number += 1;
                insert(&transaction, number, change, record)?;
            }
            transaction.commit()?;
            Ok(number)
        })
    }

    fn changes(&mut self, after: u64, limit: usize) -> Result<Vec<(u64, Change)>, StoreError> {
        self.with(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT revision, unix_ms, uid, service, action, reason, before, after, moved, backend
                 FROM change WHERE revision > ?1 ORDER BY revision LIMIT ?2",
            )?;
            let mut rows = statement.query(params![
                i64::try_from(after).unwrap_or(i64::MAX),
                i64::try_from(limit).unwrap_or(i64::MAX)
            ])?;
            let mut changes = Vec::new();
            while let Some(row) = rows.next()? {
                let change = Change {
                    unix_ms: row.get::<_, i64>(1)?.cast_unsigned(),
                    uid: row.get(2)?,
                    service: row.get(3)?,
                    action: row.get(4)?,
                    reason: row.get(5)?,
                    before: json::split_from(&row.get::<_, String>(6)?)?,
                    after: json::split_from(&row.get::<_, String>(7)?)?,
                    moved: row.get(8)?,
                    backend: row
                        .get::<_, Option<String>>(9)?
                        .map(|text| json::backend_from(&text))
                        .transpose()?,
                };
                changes.push((row.get::<_, i64>(0)?.cast_unsigned(), change));
            }
            Ok(changes)
        })
    }
}

/// Why work on the open file failed.
pub(super) enum Failure {
    Sqlite(rusqlite::Error),
    Damaged(String),
    Stale { expected: u64, found: u64 },
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl Failure {
    fn into_store_error(self, path: &Path) -> StoreError {
        let damaged = |reason| StoreError::Damaged { path: path.to_owned(), reason };
        match self {
            Self::Stale { expected, found } => StoreError::Stale { expected, found },
            Self::Damaged(reason) => damaged(reason),
            Self::Sqlite(error) => match error.sqlite_error_code() {
                Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                    damaged(error.to_string())
                }
                Some(_) => unavailable(path, error.to_string()),
                // Not SQLite's own: a column of another type than the schema says.
                None => damaged(error.to_string()),
            },
        }
    }
}

fn unavailable(path: &Path, reason: String) -> StoreError {
    StoreError::Unavailable { path: path.to_owned(), reason }
}

/// Opens `path`, making directory and file where they are missing, checks it
/// and brings it to the newest schema.
fn open(path: &Path) -> Result<Connection, StoreError> {
    match open_writable(path) {
        // Another attempt without writing: what a read-only disk holds can still be read.
        Err(StoreError::Unavailable { reason, .. }) if path.is_file() => {
            open_read_only(path).map_err(|_| unavailable(path, reason))
        }
        result => result,
    }
}

fn open_writable(path: &Path) -> Result<Connection, StoreError> {
    make_private_file(path).map_err(|e| unavailable(path, e.to_string()))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let prepare = |connection: &mut Connection| -> Result<Schema, Failure> {
        configure(connection)?;
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
        check(connection)?;
        Ok(schema::migrate(connection)?)
    };
    opened(path, Connection::open_with_flags(path, flags), prepare)
}

fn open_read_only(path: &Path) -> Result<Connection, StoreError> {
    let mut flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    // Without its write-ahead log the file is whole by itself; with one, only a
    // reader that can map the log's index sees the last changes.
    let log = with_suffix(path, "-wal");
    let target = match fs::metadata(&log) {
        Ok(log) if log.len() > 0 => path.as_os_str().to_owned(),
        _ => {
            flags |= OpenFlags::SQLITE_OPEN_URI;
            let mut uri = OsString::from("file:");
            uri.push(escape(path));
            uri.push("?immutable=1");
            uri
        }
    };
    let prepare = |connection: &mut Connection| -> Result<Schema, Failure> {
        configure(connection)?;
        check(connection)?;
        Ok(schema::migrate(connection)?)
    };
    opened(path, Connection::open_with_flags(target, flags), prepare)
}

/// What `prepare` makes of a connection, as an error or a usable store.
fn opened(
    path: &Path,
    connection: rusqlite::Result<Connection>,
    prepare: impl Fn(&mut Connection) -> Result<Schema, Failure>,
) -> Result<Connection, StoreError> {
    let into = |failure: Failure| failure.into_store_error(path);
    let mut connection = connection.map_err(|e| into(e.into()))?;
    match prepare(&mut connection).map_err(into)? {
        Schema::Ready => Ok(connection),
        Schema::Newer(found) => {
            Err(StoreError::NewerSchema { path: path.to_owned(), found, known: schema::NEWEST })
        }
        Schema::Foreign => Err(StoreError::Damaged {
            path: path.to_owned(),
            reason: "it is another program's database".to_owned(),
        }),
    }
}

fn configure(connection: &Connection) -> Result<(), Failure> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // A change with its owners fills some 30 pages. At the default of 1,000 pages each
    // thirtieth change would wait for the log to be copied; the log may grow to 32 MiB.
    connection.pragma_update(None, "wal_autocheckpoint", 8_000)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // What a file says must not run code or reach other files.
    connection.pragma_update(None, "trusted_schema", false)?;
    Ok(())
}

fn check(connection: &Connection) -> Result<(), Failure> {
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", (), |row| row.get(0))?;
    if verdict == "ok" { Ok(()) } else { Err(Failure::Damaged(verdict)) }
}

/// Makes `path` readable by its owner only; SQLite gives its side files the same mode.
fn make_private_file(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(parent)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path).map(drop)
}

/// Renames a damaged file and its side files, and says what it is called now.
fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let aside = (0_u32..)
        .map(|n| match n {
            0 => with_suffix(path, &format!(".damaged-{seconds}")),
            n => with_suffix(path, &format!(".damaged-{seconds}-{n}")),
        })
        .find(|candidate| fs::symlink_metadata(candidate).is_err())
        .unwrap_or_else(|| with_suffix(path, ".damaged"));
    for side in ["-wal", "-shm"] {
        match fs::rename(with_suffix(path, side), with_suffix(&aside, side)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    fs::rename(path, &aside)?;
    Ok(aside)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// `path` as it is written in a `file:` URI (<https://sqlite.org/uri.html>).
fn escape(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                text.push(char::from(*byte))
            }
            other => text.push_str(&format!("%{other:02x}")),
        }
    }
    text
}

fn revision(connection: &Connection) -> Result<u64, Failure> {
    let revision: Option<i64> = connection
        .query_row("SELECT max(revision) FROM change", (), |row| row.get(0))
        .optional()?
        .flatten();
    Ok(revision.unwrap_or(0).cast_unsigned())
}

fn insert(
    transaction: &Transaction<'_>,
    revision: u64,
    change: &Change,
    record: &ServiceRecord,
) -> Result<(), Failure> {
    let Change { unix_ms, uid, service, action, reason, before, after, moved, backend } = change;
    let ServiceRecord { name, control, split, slots, owners, salt, placements, admins } = record;
    transaction
        .prepare_cached("INSERT INTO change VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)")?
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
            backend.as_ref().map(json::backend_to)
        ])?;
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
