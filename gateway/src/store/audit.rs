//! The audit log: who did what to what, and when. Rows are only ever added.

use super::{Store, StoreError, from_micros, to_micros};
use jiff::Timestamp;
use mlad::api::AuditEvent;
use sqlx::{Row as _, sqlite::SqliteRow};

/// Longest target and detail that are kept, in characters: some of it comes from outside.
const MAX_TEXT: usize = 1024;

impl Store {
    /// Writes one entry. `action` is a dotted verb (`user.add`, `login`); `detail` never holds a secret.
    ///
    /// # Errors
    /// When the database fails: what was to be audited must not be done then.
    pub async fn audit(&self, actor: &str, action: &str, target: &str, detail: Option<&str>) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        sqlx::query("INSERT INTO audit (at, actor, action, target, detail) VALUES ($1, $2, $3, $4, $5)")
            .bind(to_micros(Timestamp::now()))
            .bind(shorten(actor))
            .bind(action)
            .bind(shorten(target))
            .bind(detail.map(shorten))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The newest entries, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit_log(&self, limit: u32) -> Result<Vec<AuditEvent>, StoreError> {
        let rows = sqlx::query("SELECT at, actor, action, target, detail FROM audit ORDER BY id DESC LIMIT $1")
            .bind(limit)
            .fetch_all(self.read())
            .await?;
        rows.iter().map(event).collect()
    }
}

fn event(row: &SqliteRow) -> Result<AuditEvent, StoreError> {
    Ok(AuditEvent {
        at: from_micros(row.try_get("at")?)?,
        actor: row.try_get("actor")?,
        action: row.try_get("action")?,
        target: row.try_get("target")?,
        detail: row.try_get("detail")?,
    })
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_entry_comes_first_and_long_text_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
        store.audit("root", "user.add", "alice", None).await.unwrap();
        store.audit("alice", "key.add", &"x".repeat(5000), Some("laptop")).await.unwrap();
        let events = store.audit_log(10).await.unwrap();
        assert_eq!(events.len(), 2);
        assert_eq!((events[0].actor.as_str(), events[0].target.len()), ("alice", MAX_TEXT));
        assert_eq!((events[1].action.as_str(), events[1].detail.as_deref()), ("user.add", None));
        assert_eq!(store.audit_log(1).await.unwrap().len(), 1);
    }
}
