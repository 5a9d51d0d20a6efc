//! All rows of a ledger, to be checked: read from its database beside the allocator that uses it, or without one.

use super::read;
use crate::{
    AllocatorError,
    proof::{Change, Counters, Lease, Records, Request, Reserved, Said, Slice, Used},
};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection, sqlite::SqliteConnectOptions, sqlite::SqliteRow};
use std::{path::Path, time::Duration};

/// Each place of each reservation, and until when it had it.
const RESERVED: &str = "SELECT id, name, starts_at, chosen_at, gpu, slice_start, slice_size, whole,
    MIN(ends_at, COALESCE(over_at, ends_at), COALESCE(left_at, ends_at)) AS until
    FROM reserved_slice JOIN reservation ON reservation.id = reserved_slice.reservation";

/// Reads all rows of the ledger in a database, as they are at one moment. Nothing is changed, and an allocator that
/// uses the database is not held up.
///
/// # Errors
/// [`AllocatorError::Store`] when it cannot be read, or is of another version of MLAD.
pub async fn read_records(database: &Path) -> Result<Records, AllocatorError> {
    let options = SqliteConnectOptions::new().filename(database).read_only(true).busy_timeout(Duration::from_secs(10));
    let mut connection = options.connect().await?;
    check_version(&mut connection).await?;
    // One transaction: all of it is of the same moment.
    let mut transaction = connection.begin().await?;
    let records = Records {
        requests: all(&mut transaction, "SELECT * FROM request", request).await?,
        leases: all(&mut transaction, "SELECT * FROM lease", lease).await?,
        slices: all(&mut transaction, "SELECT * FROM slice", slice).await?,
        changes: all(&mut transaction, "SELECT * FROM repartition", change).await?,
        accounts: all(&mut transaction, "SELECT * FROM account", read::account).await?,
        used: all(&mut transaction, "SELECT * FROM usage", used).await?,
        reserved: all(&mut transaction, RESERVED, reserved).await?,
        said: all(&mut transaction, "SELECT workload, reservation, expected_seconds FROM request", said).await?,
        counters: counters(&mut transaction).await?,
    };
    transaction.rollback().await?;
    connection.close().await?;
    Ok(records)
}

async fn check_version(connection: &mut SqliteConnection) -> Result<(), AllocatorError> {
    let ours = sqlx::migrate!("../migrations/sqlite/allocator").iter().map(|migration| migration.version).max();
    let query = sqlx::query_scalar("SELECT MAX(version) FROM _sqlx_migrations WHERE success");
    let theirs: Option<i64> = query.fetch_one(connection).await.map_err(|error| {
        AllocatorError::Store(format!("this is not the database of an allocator, or cannot be read: {error}"))
    })?;
    if theirs == ours {
        return Ok(());
    }
    let told = |version: Option<i64>| version.map_or("none".to_owned(), |version| version.to_string());
    Err(AllocatorError::Store(format!(
        "the database has schema {}, and this program knows {}; check it with the program that uses it",
        told(theirs),
        told(ours)
    )))
}

async fn all<T>(
    connection: &mut SqliteConnection,
    query: &'static str,
    row: impl Fn(&SqliteRow) -> Result<T, AllocatorError>,
) -> Result<Vec<T>, AllocatorError> {
    sqlx::query(query).fetch_all(connection).await?.iter().map(row).collect()
}

fn request(row: &SqliteRow) -> Result<Request, AllocatorError> {
    Ok(Request {
        workload: row.try_get("workload")?,
        seq: row.try_get("seq")?,
        user: row.try_get("user_name")?,
        project: row.try_get("project")?,
        slices: row.try_get("slices")?,
        limits: read::limits(row)?,
        requested_at: row.try_get("requested_at")?,
        ended_at: row.try_get("ended_at")?,
    })
}

fn lease(row: &SqliteRow) -> Result<Lease, AllocatorError> {
    Ok(Lease {
        fence: row.try_get("fence")?,
        workload: row.try_get("workload")?,
        profile: row.try_get("granted")?,
        memory_mib: row.try_get("memory_mib")?,
        share: row.try_get::<i64, _>("compute_share")?.max(row.try_get("memory_share")?),
        granted_at: row.try_get("granted_at")?,
        renewed_at: row.try_get("renewed_at")?,
        expires_at: row.try_get("expires_at")?,
        over_at: row.try_get("over_at")?,
        released_at: row.try_get("released_at")?,
    })
}

fn slice(row: &SqliteRow) -> Result<Slice, AllocatorError> {
    Ok(Slice {
        fence: row.try_get("fence")?,
        gpu: row.try_get("gpu")?,
        profile: row.try_get("profile_id")?,
        start: row.try_get("slice_start")?,
        size: row.try_get("slice_size")?,
        whole: row.try_get::<i64, _>("whole")? != 0,
        released_at: row.try_get("released_at")?,
    })
}

fn change(row: &SqliteRow) -> Result<Change, AllocatorError> {
    let broken = |error: serde_json::Error| AllocatorError::Store(error.to_string());
    let makes: Option<String> = row.try_get("makes")?;
    let makes: Option<(i64, i64, i64)> = makes.as_deref().map(serde_json::from_str).transpose().map_err(broken)?;
    Ok(Change {
        id: row.try_get("id")?,
        gpu: row.try_get("gpu")?,
        destroys: serde_json::from_str(&row.try_get::<String, _>("destroys")?).map_err(broken)?,
        makes: makes.map(|(_, start, size)| (start, size)),
    })
}

fn used(row: &SqliteRow) -> Result<Used, AllocatorError> {
    Ok(Used {
        day: row.try_get("day")?,
        user: row.try_get("user_name")?,
        project: row.try_get("project")?,
        slice_us: row.try_get("slice_us")?,
    })
}

fn reserved(row: &SqliteRow) -> Result<Reserved, AllocatorError> {
    Ok(Reserved {
        reservation: row.try_get("id")?,
        name: row.try_get("name")?,
        from: row.try_get("starts_at")?,
        until: row.try_get("until")?,
        chosen_at: row.try_get("chosen_at")?,
        gpu: row.try_get("gpu")?,
        start: row.try_get("slice_start")?,
        size: row.try_get("slice_size")?,
        whole: row.try_get::<i64, _>("whole")? != 0,
    })
}

fn said(row: &SqliteRow) -> Result<Said, AllocatorError> {
    let seconds: Option<i64> = row.try_get("expected_seconds")?;
    Ok(Said {
        workload: row.try_get("workload")?,
        reservation: row.try_get("reservation")?,
        expected_us: seconds.map(|seconds| seconds.saturating_mul(1_000_000)),
    })
}

async fn counters(connection: &mut SqliteConnection) -> Result<Counters, AllocatorError> {
    let mut counters = Counters::default();
    let pair = |row: &SqliteRow| Ok((row.try_get::<String, _>("name")?, row.try_get::<i64, _>("value")?));
    for (name, value) in all(connection, "SELECT * FROM counter", pair).await? {
        match name.as_str() {
            "fence" => counters.fence = value,
            "seq" => counters.seq = value,
            "repartition" => counters.change = value,
            _ => {}
        }
    }
    Ok(counters)
}
