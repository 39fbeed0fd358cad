//! The store of a single host: one SQLite file.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior, params};
use tokio::sync::watch;

use super::{
    Change, Commit, Event, EventQuery, EvidenceLine, KEPT_LISTS, Notice, Snapshot, StateStore,
    StoreError, StoredMember, StoredRollout, members, rollouts, rows,
    schema::{self, Schema},
};
use crate::failpoint::Failpoint;

/// How long another reader of the file may keep a change waiting.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);

/// So many changes pass between two looks for what is too old.
const PRUNED_EVERY: u64 = 64;

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
    /// The number of the last event.
    last: watch::Sender<u64>,
    /// Up to this revision lists of buckets have been forgotten.
    forgotten: u64,
}

impl SqliteStore {
    /// The store at `state_dir/state.db`. Nothing is touched before the first call.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join("state.db"),
            connection: None,
            set_aside: Vec::new(),
            last: watch::Sender::new(0),
            forgotten: 0,
        }
    }

    /// The damaged files that were set aside since the last call.
    pub fn take_set_aside(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.set_aside)
    }

    /// What [`load`](StateStore::load) would say if a newer release has written the file; it is
    /// only looked at. `None` also where it can't be.
    pub fn newer_schema(&self) -> Option<StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags).ok()?;
        let found = schema::newer(&connection).ok()??;
        Some(StoreError::NewerSchema { path: self.path.clone(), found, known: schema::NEWEST })
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
                self.forgotten = 0;
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
        let (snapshot, last) = self.with(|connection| {
            let transaction = connection.transaction()?;
            let snapshot = Snapshot {
                revision: rows::revision(&transaction)?,
                services: rows::services(&transaction)?,
                pending: rows::pending(&transaction)?,
                freezes: rows::freezes(&transaction)?,
                rollouts: rollouts::current(&transaction)?,
                members: members::all(&transaction)?,
            };
            Ok((snapshot, rows::last_event(&transaction)?))
        })?;
        self.last.send_replace(last);
        Ok(snapshot)
    }

    fn commit(&mut self, expected: u64, commits: &[Commit]) -> Result<u64, StoreError> {
        Failpoint::BeforeStore.pass();
        let forgotten = self.forgotten;
        let (number, last, pruned) = self.with(|connection| {
            let transaction = Transaction::new(connection, TransactionBehavior::Immediate)?;
            Failpoint::StoreBegun.pass();
            let found = rows::revision(&transaction)?;
            if found != expected {
                return Err(Failure::Stale { expected, found });
            }
            let mut number = found;
            for commit in commits {
                number += 1;
                rows::insert(&transaction, number, commit)?;
            }
            let prunes = number / PRUNED_EVERY != found / PRUNED_EVERY;
            if prunes {
                rows::prune(&transaction, number, forgotten)?;
            }
            let last = rows::last_event(&transaction)?;
            Failpoint::BeforeCommit.pass();
            transaction.commit()?;
            Ok((number, last, prunes))
        })?;
        Failpoint::Committed.pass();
        if pruned {
            self.forgotten = number.saturating_sub(KEPT_LISTS);
        }
        self.last.send_replace(last);
        Ok(number)
    }

    fn record(&mut self, notices: &[Notice]) -> Result<(), StoreError> {
        // A second's events are not worth waiting for the disk.
        let last = self.with(|connection| {
            written(connection, false, |transaction| {
                rows::insert_notices(transaction, notices)?;
                Failpoint::NoticesWritten.pass();
                rows::last_event(transaction)
            })
        })?;
        self.last.send_replace(last);
        Ok(())
    }

    fn keep_rollout(
        &mut self,
        rollout: &StoredRollout,
        evidence: &[EvidenceLine],
        durable: bool,
    ) -> Result<u64, StoreError> {
        self.with(|connection| {
            written(connection, durable, |transaction| {
                let kept = rollouts::keep(transaction, rollout, evidence)?;
                Failpoint::RolloutWritten.pass();
                Ok(kept)
            })
        })
    }

    fn keep_members(
        &mut self,
        kept: &[StoredMember],
        gone: &[(String, ipnet::IpNet)],
        durable: bool,
    ) -> Result<(), StoreError> {
        self.with(|connection| {
            written(connection, durable, |transaction| {
                members::keep(transaction, kept, gone)?;
                Failpoint::MembersWritten.pass();
                Ok(())
            })
        })
    }

    fn rollouts(&mut self, name: &str, limit: usize) -> Result<Vec<StoredRollout>, StoreError> {
        self.with(|connection| rollouts::of_name(connection, name, limit))
    }

    fn evidence(&mut self, rollout: u64) -> Result<Vec<EvidenceLine>, StoreError> {
        self.with(|connection| rollouts::evidence(connection, rollout))
    }

    fn changes(&mut self, after: u64, limit: usize) -> Result<Vec<(u64, Change)>, StoreError> {
        let (after, limit) = (signed(after), signed(limit as u64));
        self.with(|connection| {
            let condition = "revision > ?1 ORDER BY revision LIMIT ?2";
            rows::changes(connection, condition, params![after, limit])
        })
    }

    fn changes_before(
        &mut self,
        service: Option<&str>,
        before: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Change)>, StoreError> {
        let (before, limit) = (signed(before), signed(limit as u64));
        self.with(|connection| match service {
            Some(service) => rows::changes(
                connection,
                "service = ?1 AND revision < ?2 ORDER BY revision DESC LIMIT ?3",
                params![service, before, limit],
            ),
            None => rows::changes(
                connection,
                "revision < ?1 ORDER BY revision DESC LIMIT ?2",
                params![before, limit],
            ),
        })
    }

    fn events(&mut self, query: &EventQuery) -> Result<Vec<Event>, StoreError> {
        self.with(|connection| rows::events(connection, query))
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}

/// Runs `work` in a transaction. One that need not be durable does not wait for the disk.
fn written<T>(
    connection: &mut Connection,
    durable: bool,
    work: impl Fn(&Transaction<'_>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    if !durable {
        connection.pragma_update(None, "synchronous", "NORMAL")?;
    }
    let done = (|| -> Result<T, Failure> {
        let transaction = Transaction::new(connection, TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        transaction.commit()?;
        Ok(value)
    })();
    if !durable {
        connection.pragma_update(None, "synchronous", "FULL")?;
    }
    done
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
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
