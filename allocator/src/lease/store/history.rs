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
        let old = "DELETE FROM request WHERE ended_at < $1";
        let pruned = sqlx::query(old).bind(before.as_microsecond()).execute(&self.pool).await?.rows_affected();
        let many = "DELETE FROM request WHERE ended_at <= (SELECT ended_at FROM request
                    WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT 1 OFFSET $1)";
        Ok(pruned + sqlx::query(many).bind(i64::from(most)).execute(&self.pool).await?.rows_affected())
    }

    /// Forgets what was used before the day `before`.
    pub(in crate::lease) async fn prune_usage(&self, before: i32) -> Result<u64, AllocatorError> {
        let query = sqlx::query("DELETE FROM usage WHERE day < $1").bind(i64::from(before));
        Ok(query.execute(&self.pool).await?.rows_affected())
    }
}
