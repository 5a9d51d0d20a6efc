//! The database: wanted state of users, workspaces and jobs. The only room of the gateway that holds SQL.
//!
//! One file per kind of thing; every acknowledged write is durable (`synchronous = FULL`). Times are stored
//! in microseconds.

mod audit;
mod authorities;
mod forwarding;
mod images;
mod jobs;
mod keys;
mod projects;
mod tokens;
mod users;
mod workspaces;

pub use authorities::CertificateName;
pub use images::{ImageRecord, StoredImage};
pub use jobs::{JobFilter, JobRecord, Submission};
pub use keys::{KeyToAdd, KnownKey, LastKey};
pub use projects::ProjectRecord;
pub(crate) use users::GREATEST_PRIORITY;
pub use users::{FIRST_UID, UserRecord, check_user_name};
pub use workspaces::{NewWorkspace, WorkspaceRecord};

use jiff::Timestamp;
use sqlx::{
    Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    time::Duration,
};
use tokio::sync::watch;

/// What can go wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such thing.
    #[error("there is no {kind} {name}")]
    NotFound {
        /// What kind of thing.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// It exists already, or its state does not allow this.
    #[error("{0}")]
    Conflict(String),
    /// A stored value is not what it should be.
    #[error("the database holds a {what} that cannot be read: {reason}")]
    Corrupt {
        /// Which value.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The database fails.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// Its schema cannot be brought up to date.
    #[error("the database's schema: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
}

/// The database.
#[derive(Debug, Clone)]
pub struct Store {
    /// One connection: SQLite has one writer.
    writer: SqlitePool,
    readers: SqlitePool,
    /// Counts what may have taken somebody's right to be here.
    access: watch::Sender<u64>,
    /// Counts what may have changed what users and projects may hold.
    limits: watch::Sender<u64>,
}

impl Store {
    /// Opens the database, makes it if it is absent, and brings its schema up to date.
    ///
    /// # Errors
    /// When the file cannot be opened or its schema is newer than this program.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        // Made before SQLite does: its log and index get the rights of this file.
        let file = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        file.and_then(|file| file.set_permissions(std::fs::Permissions::from_mode(0o600))).map_err(sqlx::Error::Io)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let writer = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        sqlx::migrate!("../migrations/sqlite/gateway").run(&writer).await?;
        let readers = SqlitePoolOptions::new().max_connections(8).connect_with(options.read_only(true)).await?;
        Ok(Self { writer, readers, access: watch::Sender::default(), limits: watch::Sender::default() })
    }

    /// Changes whenever somebody may have lost the right to be here: a user was disabled or removed, a key or an
    /// authority was, a certificate was revoked; or what they may forward has changed. What ends by itself, at a
    /// time that was known before, is not among it.
    pub fn access_changes(&self) -> watch::Receiver<u64> {
        self.access.subscribe()
    }

    /// Says so, once it is written down.
    fn access_changed(&self) {
        self.access.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Changes whenever what users and projects may hold may have changed.
    pub fn limit_changes(&self) -> watch::Receiver<u64> {
        self.limits.subscribe()
    }

    /// Says so, once it is written down.
    fn limits_changed(&self) {
        self.limits.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// A transaction that writes; nobody else writes until it ends.
    pub(crate) async fn write(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Where to read.
    pub(crate) fn read(&self) -> &SqlitePool {
        &self.readers
    }
}

/// A time as the database holds it.
pub(crate) fn to_micros(time: Timestamp) -> i64 {
    time.as_microsecond()
}

/// A time from the database.
pub(crate) fn from_micros(micros: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_microsecond(micros).map_err(|error| StoreError::Corrupt { what: "time", reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_else_reads_the_database_nor_what_sqlite_lays_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
        store.audit("root", "test", "x", None).await.unwrap();
        let mut files = 0;
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let file = file.unwrap();
            assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", file.path());
            files += 1;
        }
        assert!(files > 1, "the log lies beside it");
    }
}
