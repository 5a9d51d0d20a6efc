//! What is over, and when it is forgotten.

use super::Store;
use crate::AllocatorError;
use jiff::Timestamp;

impl Store {
    /// Why the request of a workload ended, if it did.
    pub(in crate::lease) async fn ended(&self, workload: &str) -> Result<Option<String>, AllocatorError> {
        let query = "SELECT reason FROM request WHERE workload = $1 AND ended_at IS NOT NULL";
        let reason: Option<Option<String>> =
            sqlx::query_scalar(query).bind(workload).fetch_optional(&self.pool).await?;
        Ok(reason.map(Option::unwrap_or_default))
    }

    /// Forgets what ended before `before`, and the oldest beyond the newest `most`.
    pub(in crate::lease) async fn prune(&self, before: Timestamp, most: u32) -> Result<u64, AllocatorError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let many = "SELECT ended_at FROM request WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT 1 OFFSET $1";
        let beyond: Option<i64> =
            sqlx::query_scalar(many).bind(i64::from(most)).fetch_optional(&mut *transaction).await?;
        let until = beyond.map_or(i64::MIN, |at| at.saturating_add(1)).max(before.as_microsecond());
        // Who asks for a time before this is told that not all of it is known.
        let latest = "UPDATE counter SET value = MAX(value, (SELECT COALESCE(MAX(ended_at), 0) FROM request
                      WHERE ended_at < $1)) WHERE name = 'forgotten'";
        sqlx::query(latest).bind(until).execute(&mut *transaction).await?;
        let pruned = sqlx::query("DELETE FROM request WHERE ended_at < $1").bind(until);
        let pruned = pruned.execute(&mut *transaction).await?.rows_affected();
        let reservations = sqlx::query("DELETE FROM reservation WHERE over_at < $1");
        reservations.bind(before.as_microsecond()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(pruned)
    }

    /// Forgets what was used before the day `before`.
    pub(in crate::lease) async fn prune_usage(&self, before: i32) -> Result<u64, AllocatorError> {
        let query = sqlx::query("DELETE FROM usage WHERE day < $1").bind(i64::from(before));
        Ok(query.execute(&self.pool).await?.rows_affected())
    }
}
