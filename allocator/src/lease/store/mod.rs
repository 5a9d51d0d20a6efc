//! The ledger's SQL: nowhere else is any.
//!
//! * `write` — what a transition leaves behind.
//! * `read` — what the allocator starts from.
//! * `records` — all rows, to be checked.
//! * `history` — what is over, and when it is forgotten; `past` — who held what, and what was used.

mod history;
mod past;
mod read;
mod records;
mod write;

pub(super) use past::Reader;
pub use records::read_records;

use super::record::{LeaseRow, NodeRow, QuarantineRow, Repartition, RequestRow, ReservationRow, UsedRow, Write};
use crate::{Account, AllocatorError};
use jiff::Timestamp;
use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{path::Path, time::Duration};

/// The ledger in its database. One connection: the ledger itself is in memory, and its one owner writes.
pub(super) struct Store {
    pool: SqlitePool,
    #[cfg(test)]
    pub(super) crash: Option<std::sync::Arc<super::tests::Crash>>,
}

/// The kinds of accounts.
const USER: &str = "user";
const PROJECT: &str = "project";

/// So many days of use are taken into memory at the start, today included.
pub(super) const USED_DAYS: i32 = 60;

/// All that is in force when the allocator starts.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// Requests that wait, first come first.
    pub(super) waiting: Vec<RequestRow>,
    /// Leases that hold their slices.
    pub(super) leases: Vec<LeaseRow>,
    /// Space that is set aside.
    pub(super) reservations: Vec<ReservationRow>,
    /// Changes that were under way.
    pub(super) repartitions: Vec<Repartition>,
    /// Profiles asked for lately, oldest first.
    pub(super) asked: Vec<String>,
    /// What leases that are over have used in the last [`USED_DAYS`] days, in no order.
    pub(super) used: Vec<UsedRow>,
    /// What administrators want of users and projects.
    pub(super) accounts: Vec<Account>,
    /// GPUs that are not to be trusted.
    pub(super) quarantine: Vec<QuarantineRow>,
    /// The nodes that have daemons.
    pub(super) nodes: Vec<NodeRow>,
    /// The greatest numbers given so far.
    pub(super) fence: u64,
    pub(super) seq: u64,
    pub(super) repartition: u64,
}

impl From<sqlx::Error> for AllocatorError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.to_string())
    }
}

impl Store {
    /// Opens the database at `path`, made and brought up to date if need be.
    pub(super) async fn open(path: &Path) -> Result<Self, AllocatorError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
        let pool = pool.connect_with(options).await?;
        let migrated = sqlx::migrate!("../migrations/sqlite/allocator").run(&pool).await;
        migrated.map_err(|error| AllocatorError::Store(error.to_string()))?;
        Ok(Self {
            pool,
            #[cfg(test)]
            crash: None,
        })
    }

    /// Ends the connection, everything written.
    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    /// Writes all of it down, or nothing; durable when it returns.
    pub(super) async fn commit(
        &self,
        writes: &[Write],
        counters: [(&'static str, u64); 3],
    ) -> Result<(), AllocatorError> {
        #[cfg(test)]
        self.crash_point().await;
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        for write in writes {
            write::apply(&mut transaction, write).await?;
        }
        for (name, value) in counters {
            let query = sqlx::query("UPDATE counter SET value = $1 WHERE name = $2 AND value < $1");
            query.bind(signed(value)).bind(name).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        #[cfg(test)]
        self.crash_point().await;
        Ok(())
    }

    #[cfg(test)]
    async fn crash_point(&self) {
        if let Some(crash) = &self.crash {
            crash.point().await;
        }
    }
}

fn moment(micros: i64) -> Result<Timestamp, AllocatorError> {
    Timestamp::from_microsecond(micros).map_err(|error| AllocatorError::Store(error.to_string()))
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn narrow(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
