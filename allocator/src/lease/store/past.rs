//! Who held what, and what was used: read beside the one who writes, so that nobody waits for it.

use super::{
    moment,
    read::{lease, slice, used_row},
    unsigned,
};
use crate::{
    AllocatorError,
    lease::{
        record::{LeaseRow, UsedRow},
        usage,
    },
};
use jiff::Timestamp;
use mlad::api::{LeasedSlice, Past, PastLease};
use sqlx::{
    Row, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};
use std::{collections::HashMap, path::Path, time::Duration};

/// Questions that are answered at the same time.
const READERS: u32 = 2;

/// Reads the ledger's past.
#[derive(Debug, Clone)]
pub(in crate::lease) struct Reader {
    pool: SqlitePool,
}

impl Reader {
    /// Of the database at `path`, once somebody asks.
    pub(in crate::lease) fn new(path: &Path) -> Self {
        let options = SqliteConnectOptions::new().filename(path).read_only(true).busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new().max_connections(READERS).idle_timeout(Duration::from_secs(60));
        Self { pool: pool.connect_lazy_with(options) }
    }

    /// Who held slices at a time.
    pub(in crate::lease) async fn past(&self, at: Timestamp) -> Result<Past, AllocatorError> {
        let mut snapshot = self.pool.begin().await?;
        let held = "SELECT lease.*, request.*, request.reason AS ended_reason FROM lease JOIN request USING (workload)
                    WHERE granted_at <= $1 AND (released_at IS NULL OR released_at > $1) AND granted <> 'cpu'
                    ORDER BY user_name, workload";
        let mut leases: Vec<(u64, PastLease)> = Vec::new();
        for row in sqlx::query(held).bind(at.as_microsecond()).fetch_all(&mut *snapshot).await? {
            let ended: Option<i64> = row.try_get("released_at")?;
            let LeaseRow { fence, request, profile, memory_mib, granted_at, .. } = lease(&row)?;
            let past = PastLease {
                user: request.user.to_string(),
                workload: request.workload,
                project: request.project.as_deref().map(str::to_owned),
                profile,
                memory_mib,
                slices: Vec::new(),
                granted_at,
                ended_at: ended.map(moment).transpose()?,
                reason: row.try_get("ended_reason")?,
            };
            leases.push((fence, past));
        }
        let mut slices = slices_at(&mut snapshot, at).await?;
        for (fence, lease) in &mut leases {
            lease.slices = slices.remove(fence).unwrap_or_default();
        }
        let forgotten = "SELECT value FROM counter WHERE name = 'forgotten'";
        let forgotten: i64 = sqlx::query_scalar(forgotten).fetch_one(&mut *snapshot).await?;
        let leases = leases.into_iter().map(|(_, lease)| lease).collect();
        Ok(Past { at, incomplete: at.as_microsecond() < forgotten, leases })
    }

    /// What was used from one day to another, both included, with what is held still, until `now`.
    pub(in crate::lease) async fn used(&self, days: [i32; 2], now: Timestamp) -> Result<Vec<UsedRow>, AllocatorError> {
        let [from, to] = days;
        let mut snapshot = self.pool.begin().await?;
        let query = sqlx::query("SELECT * FROM usage WHERE day BETWEEN $1 AND $2").bind(i64::from(from));
        let rows = query.bind(i64::from(to)).fetch_all(&mut *snapshot).await?;
        let mut used = rows.iter().map(used_row).collect::<Result<Vec<_>, _>>()?;
        let held = "SELECT * FROM lease JOIN request USING (workload) WHERE released_at IS NULL AND granted <> 'cpu'";
        let mut slices = full_slices(&mut snapshot).await?;
        for row in sqlx::query(held).fetch_all(&mut *snapshot).await? {
            let mut held = lease(&row)?;
            held.slices = slices.remove(&held.fence).unwrap_or_default();
            let rows = usage::until(&held, now).into_iter();
            used.extend(rows.filter(|row| (from..=to).contains(&row.day)));
        }
        Ok(used)
    }
}

async fn slices_at(
    snapshot: &mut SqliteConnection,
    at: Timestamp,
) -> Result<HashMap<u64, Vec<LeasedSlice>>, AllocatorError> {
    let query = "SELECT slice.* FROM slice JOIN lease USING (fence) WHERE granted_at <= $1
                 AND (lease.released_at IS NULL OR lease.released_at > $1) ORDER BY fence, position";
    let mut found: HashMap<u64, Vec<LeasedSlice>> = HashMap::new();
    for row in sqlx::query(query).bind(at.as_microsecond()).fetch_all(snapshot).await? {
        let fence = unsigned(row.try_get("fence")?);
        found.entry(fence).or_default().push(slice(&row)?.to_api());
    }
    Ok(found)
}

async fn full_slices(
    snapshot: &mut SqliteConnection,
) -> Result<HashMap<u64, Vec<crate::lease::record::SliceRow>>, AllocatorError> {
    let mut found: HashMap<u64, Vec<_>> = HashMap::new();
    let query = "SELECT * FROM slice WHERE released_at IS NULL ORDER BY fence, position";
    for row in sqlx::query(query).fetch_all(snapshot).await? {
        found.entry(unsigned(row.try_get("fence")?)).or_default().push(slice(&row)?);
    }
    Ok(found)
}
