//! The ledger's SQL.

use super::record::{Ending, LeaseRow, Purpose, Repartition, RequestRow, SliceRow, Status, Write};
use crate::{AllocatorError, Limits, geometry::Share, node::Change};
use jiff::Timestamp;
use mlad::api::Placement;
use sqlx::{
    Row, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};
use std::{path::Path, time::Duration};

/// The ledger in its database. One connection: the ledger itself is in memory, and its one owner writes.
pub(super) struct Store {
    pool: SqlitePool,
    #[cfg(test)]
    pub(super) crash: Option<std::sync::Arc<super::tests::Crash>>,
}

/// All that is in force when the allocator starts.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// Requests that wait, first come first.
    pub(super) waiting: Vec<RequestRow>,
    /// Leases that hold their slices.
    pub(super) leases: Vec<LeaseRow>,
    /// Changes that were under way.
    pub(super) repartitions: Vec<Repartition>,
    /// Profiles asked for lately, oldest first.
    pub(super) asked: Vec<String>,
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
            apply(&mut transaction, write).await?;
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

    /// All that is in force.
    pub(super) async fn load(&self) -> Result<Loaded, AllocatorError> {
        let mut loaded = Loaded::default();
        let open = "SELECT * FROM request WHERE ended_at IS NULL
                    AND workload NOT IN (SELECT workload FROM lease) ORDER BY seq";
        for row in sqlx::query(open).fetch_all(&self.pool).await? {
            loaded.waiting.push(request(&row)?);
        }
        let held = "SELECT * FROM lease JOIN request USING (workload) WHERE released_at IS NULL ORDER BY fence";
        for row in sqlx::query(held).fetch_all(&self.pool).await? {
            loaded.leases.push(lease(&row)?);
        }
        let slices = "SELECT * FROM slice WHERE released_at IS NULL ORDER BY fence, position";
        for row in sqlx::query(slices).fetch_all(&self.pool).await? {
            let fence = unsigned(row.try_get("fence")?);
            if let Ok(at) = loaded.leases.binary_search_by_key(&fence, |lease| lease.fence)
                && let Some(lease) = loaded.leases.get_mut(at)
            {
                lease.slices.push(slice(&row)?);
            }
        }
        for row in sqlx::query("SELECT * FROM repartition ORDER BY id").fetch_all(&self.pool).await? {
            loaded.repartitions.push(repartition(&row)?);
        }
        let asked = "SELECT profile FROM request WHERE profile <> 'cpu' ORDER BY seq DESC LIMIT 2048";
        loaded.asked = sqlx::query_scalar(asked).fetch_all(&self.pool).await?;
        loaded.asked.reverse();
        for row in sqlx::query("SELECT name, value FROM counter").fetch_all(&self.pool).await? {
            let value = unsigned(row.try_get("value")?);
            match row.try_get::<String, _>("name")?.as_str() {
                "fence" => loaded.fence = value,
                "seq" => loaded.seq = value,
                "repartition" => loaded.repartition = value,
                _ => {}
            }
        }
        Ok(loaded)
    }

    /// Why the request of a workload ended, if it did.
    pub(super) async fn ended(&self, workload: &str) -> Result<Option<String>, AllocatorError> {
        let query = "SELECT reason FROM request WHERE workload = $1 AND ended_at IS NOT NULL";
        let reason: Option<Option<String>> =
            sqlx::query_scalar(query).bind(workload).fetch_optional(&self.pool).await?;
        Ok(reason.map(Option::unwrap_or_default))
    }

    /// Forgets what ended before `before`, and the oldest beyond the newest `most`.
    pub(super) async fn prune(&self, before: Timestamp, most: u32) -> Result<u64, AllocatorError> {
        let old = "DELETE FROM request WHERE ended_at < $1";
        let pruned = sqlx::query(old).bind(before.as_microsecond()).execute(&self.pool).await?.rows_affected();
        let many = "DELETE FROM request WHERE ended_at <= (SELECT ended_at FROM request
                    WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT 1 OFFSET $1)";
        Ok(pruned + sqlx::query(many).bind(i64::from(most)).execute(&self.pool).await?.rows_affected())
    }
}

async fn apply(transaction: &mut Transaction<'_, Sqlite>, write: &Write) -> Result<(), AllocatorError> {
    let query = match write {
        Write::Request(row) => sqlx::query(
            "INSERT INTO request (workload, seq, user_name, need, profile, limit_slices, limit_memory_mib,
             expected_seconds, requested_at, slices, nodes, project, priority, preemptible, reservation,
             limit_gpu_seconds) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)",
        )
        .bind(&row.workload)
        .bind(signed(row.seq))
        .bind(row.user.as_ref())
        .bind(row.need.to_string())
        .bind(&row.profile)
        .bind(row.limits.slices.map(i64::from))
        .bind(row.limits.gpu_memory_mib.map(signed))
        .bind(row.expected_seconds.map(signed))
        .bind(row.requested_at.as_microsecond())
        .bind(i64::from(row.slices))
        .bind(row.nodes.map(i64::from))
        .bind(row.project.as_deref())
        .bind(i64::from(row.priority))
        .bind(i64::from(row.preemptible))
        .bind(&row.reservation)
        .bind(row.limits.gpu_seconds.map(signed)),
        Write::GiveUp { workload, at, reason } => {
            sqlx::query(END_REQUEST).bind(at.as_microsecond()).bind(reason).bind(workload)
        }
        Write::Grant(row) => return grant(transaction, row).await,
        Write::Renew { fence, at, expires_at } => {
            sqlx::query("UPDATE lease SET renewed_at = $1, expires_at = $2, expired_at = NULL WHERE fence = $3")
                .bind(at.as_microsecond())
                .bind(expires_at.as_microsecond())
                .bind(signed(*fence))
        }
        Write::Expire { fence, at } => sqlx::query("UPDATE lease SET expired_at = $1 WHERE fence = $2")
            .bind(at.as_microsecond())
            .bind(signed(*fence)),
        Write::Over { fence, at, reason } => {
            sqlx::query("UPDATE lease SET over_at = $1, over_reason = $2 WHERE fence = $3")
                .bind(at.as_microsecond())
                .bind(reason)
                .bind(signed(*fence))
        }
        Write::Release { fence, workload, at, reason } => {
            let lease = sqlx::query("UPDATE lease SET released_at = $1 WHERE fence = $2");
            lease.bind(at.as_microsecond()).bind(signed(*fence)).execute(&mut **transaction).await?;
            let slices = sqlx::query("UPDATE slice SET released_at = $1 WHERE fence = $2");
            slices.bind(at.as_microsecond()).bind(signed(*fence)).execute(&mut **transaction).await?;
            sqlx::query(END_REQUEST).bind(at.as_microsecond()).bind(reason).bind(workload)
        }
        Write::Slice { fence, position, slice } => {
            sqlx::query("UPDATE slice SET uuid = $1, gpu_index = $2 WHERE fence = $3 AND position = $4")
                .bind(&slice.uuid)
                .bind(i64::from(slice.gpu_index))
                .bind(signed(*fence))
                .bind(signed(*position as u64))
        }
        Write::Begin { repartition, at } => {
            let make = repartition.change.make.map(|(profile, at)| [profile, at.start, at.size]);
            let workload = match &repartition.purpose {
                Purpose::Grant(_, workload) => Some(workload),
                Purpose::Repair(..) => None,
            };
            sqlx::query(
                "INSERT INTO repartition (id, gpu, workload, destroys, makes, begun_at)
                 VALUES ($1, $2, $3, $4, $5, $6)",
            )
            .bind(signed(repartition.change.id))
            .bind(&repartition.gpu)
            .bind(workload)
            .bind(json(&repartition.change.destroy)?)
            .bind(make.as_ref().map(json).transpose()?)
            .bind(at.as_microsecond())
        }
        Write::Finish { id } => sqlx::query("DELETE FROM repartition WHERE id = $1").bind(signed(*id)),
    };
    query.execute(&mut **transaction).await?;
    Ok(())
}

async fn grant(transaction: &mut Transaction<'_, Sqlite>, row: &LeaseRow) -> Result<(), AllocatorError> {
    sqlx::query(
        "INSERT INTO lease (fence, workload, node, granted, memory_mib, granted_at, renewed_at, expires_at,
         compute_share, memory_share, ends_at, ends_reason) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(signed(row.fence))
    .bind(&row.request.workload)
    .bind(&row.node)
    .bind(&row.profile)
    .bind(signed(row.memory_mib))
    .bind(row.granted_at.as_microsecond())
    .bind(row.renewed_at.as_microsecond())
    .bind(row.expires_at.as_microsecond())
    .bind(i64::from(row.share.compute))
    .bind(i64::from(row.share.memory))
    .bind(row.ending.as_ref().map(|ending| ending.at.as_microsecond()))
    .bind(row.ending.as_ref().map(|ending| &ending.reason))
    .execute(&mut **transaction)
    .await?;
    for (position, slice) in row.slices.iter().enumerate() {
        sqlx::query(
            "INSERT INTO slice (fence, position, node, gpu, gpu_index, profile_id, slice_start, slice_size, whole, uuid)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        )
        .bind(signed(row.fence))
        .bind(signed(position as u64))
        .bind(&slice.node)
        .bind(&slice.gpu)
        .bind(i64::from(slice.gpu_index))
        .bind(i64::from(slice.profile))
        .bind(i64::from(slice.placement.start))
        .bind(i64::from(slice.placement.size))
        .bind(i64::from(slice.whole))
        .bind(&slice.uuid)
        .execute(&mut **transaction)
        .await?;
    }
    Ok(())
}

const END_REQUEST: &str = "UPDATE request SET ended_at = $1, reason = $2 WHERE workload = $3";

fn request(row: &SqliteRow) -> Result<RequestRow, AllocatorError> {
    let need: String = row.try_get("need")?;
    Ok(RequestRow {
        workload: row.try_get("workload")?,
        seq: unsigned(row.try_get("seq")?),
        user: row.try_get::<String, _>("user_name")?.into(),
        need: need.parse().map_err(|error: mlad::api::NeedError| AllocatorError::Store(error.to_string()))?,
        slices: narrow(row.try_get("slices")?),
        nodes: row.try_get::<Option<i64>, _>("nodes")?.map(narrow),
        project: row.try_get::<Option<String>, _>("project")?.map(Into::into),
        priority: i32::try_from(row.try_get::<i64, _>("priority")?).unwrap_or(0),
        preemptible: row.try_get::<i64, _>("preemptible")? != 0,
        reservation: row.try_get("reservation")?,
        profile: row.try_get("profile")?,
        limits: Limits {
            slices: row.try_get::<Option<i64>, _>("limit_slices")?.map(narrow),
            gpu_memory_mib: row.try_get::<Option<i64>, _>("limit_memory_mib")?.map(unsigned),
            gpu_seconds: row.try_get::<Option<i64>, _>("limit_gpu_seconds")?.map(unsigned),
        },
        expected_seconds: row.try_get::<Option<i64>, _>("expected_seconds")?.map(unsigned),
        requested_at: time(row, "requested_at")?,
    })
}

fn lease(row: &SqliteRow) -> Result<LeaseRow, AllocatorError> {
    let over: Option<String> = row.try_get("over_reason")?;
    let expired: Option<i64> = row.try_get("expired_at")?;
    let ends_at: Option<i64> = row.try_get("ends_at")?;
    let reason = row.try_get::<Option<String>, _>("ends_reason")?.unwrap_or_default();
    Ok(LeaseRow {
        fence: unsigned(row.try_get("fence")?),
        request: request(row)?,
        node: row.try_get("node")?,
        profile: row.try_get("granted")?,
        memory_mib: unsigned(row.try_get("memory_mib")?),
        share: Share { compute: narrow(row.try_get("compute_share")?), memory: narrow(row.try_get("memory_share")?) },
        // Read from their own table.
        slices: Vec::new(),
        granted_at: time(row, "granted_at")?,
        renewed_at: time(row, "renewed_at")?,
        expires_at: time(row, "expires_at")?,
        status: match (over, expired) {
            (Some(reason), _) => Status::Over(reason),
            (None, Some(_)) => Status::Expired,
            (None, None) => Status::Active,
        },
        ending: ends_at.map(|at| Ok::<_, AllocatorError>(Ending { at: moment(at)?, reason })).transpose()?,
    })
}

fn slice(row: &SqliteRow) -> Result<SliceRow, AllocatorError> {
    let number = |column| row.try_get::<i64, _>(column).map(narrow);
    Ok(SliceRow {
        node: row.try_get("node")?,
        gpu: row.try_get("gpu")?,
        gpu_index: number("gpu_index")?,
        profile: number("profile_id")?,
        placement: Placement { start: number("slice_start")?, size: number("slice_size")? },
        whole: number("whole")? != 0,
        uuid: row.try_get("uuid")?,
    })
}

fn repartition(row: &SqliteRow) -> Result<Repartition, AllocatorError> {
    let broken = |error: serde_json::Error| AllocatorError::Store(error.to_string());
    let make: Option<String> = row.try_get("makes")?;
    let make: Option<[u32; 3]> = make.as_deref().map(serde_json::from_str).transpose().map_err(broken)?;
    let destroy = serde_json::from_str(&row.try_get::<String, _>("destroys")?).map_err(broken)?;
    let workload: Option<String> = row.try_get("workload")?;
    let make = make.map(|[profile, start, size]| (profile, Placement { start, size }));
    Ok(Repartition {
        gpu: row.try_get("gpu")?,
        change: Change { id: unsigned(row.try_get("id")?), destroy, make },
        purpose: workload.map_or(Purpose::Repair(0, 0), |workload| Purpose::Grant(0, workload)),
    })
}

fn json(value: &impl serde::Serialize) -> Result<String, AllocatorError> {
    serde_json::to_string(value).map_err(|error| AllocatorError::Store(error.to_string()))
}

fn time(row: &SqliteRow, column: &str) -> Result<Timestamp, AllocatorError> {
    moment(row.try_get(column)?)
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
