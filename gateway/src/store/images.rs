//! Images an administrator added, changed or hid, beside those of `catalog.toml`.

use super::{Store, StoreError, from_micros, to_micros};
use jiff::Timestamp;
use sqlx::{Row as _, sqlite::SqliteRow};

/// What an administrator said about one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// The name people use.
    pub name: String,
    /// What it stands for; nothing if the name is hidden.
    pub image: Option<StoredImage>,
    /// When it was said.
    pub created_at: Timestamp,
}

/// An image an administrator added, or put in the place of the catalog file's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// OCI reference.
    pub reference: String,
    /// One line for people.
    pub description: String,
    /// Least GPU memory it needs, in MiB; 0 for none.
    pub min_gpu_memory_mib: u64,
}

impl Store {
    /// What was said about every name, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let rows = sqlx::query(
            "SELECT name, reference, description, min_gpu_memory_mib, enabled, created_at FROM images ORDER BY name",
        )
        .fetch_all(self.read())
        .await?;
        rows.iter().map(record).collect()
    }

    /// Adds an image, or replaces what was said about its name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn put_image(&self, name: &str, image: &StoredImage) -> Result<(), StoreError> {
        self.write_image(name, Some(image)).await
    }

    /// Hides a name, whether the catalog file or the database has it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn hide_image(&self, name: &str) -> Result<(), StoreError> {
        self.write_image(name, None).await
    }

    /// Forgets what was said about a name: what the catalog file says holds again.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when nothing was said about it.
    pub async fn forget_image(&self, name: &str) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let done = sqlx::query("DELETE FROM images WHERE name = $1").bind(name).execute(&mut *transaction).await?;
        transaction.commit().await?;
        if done.rows_affected() == 0 {
            return Err(StoreError::NotFound { kind: "change of the image", name: name.to_owned() });
        }
        Ok(())
    }

    async fn write_image(&self, name: &str, image: Option<&StoredImage>) -> Result<(), StoreError> {
        let memory = i64::try_from(image.map_or(0, |image| image.min_gpu_memory_mib)).unwrap_or(i64::MAX);
        let mut transaction = self.write().await?;
        sqlx::query(
            "INSERT INTO images (name, reference, description, min_gpu_memory_mib, enabled, created_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (name) DO UPDATE SET reference = excluded.reference, description = excluded.description,
                 min_gpu_memory_mib = excluded.min_gpu_memory_mib, enabled = excluded.enabled,
                 created_at = excluded.created_at",
        )
        .bind(name)
        .bind(image.map_or("", |image| &image.reference))
        .bind(image.map_or("", |image| &image.description))
        .bind(memory)
        .bind(image.is_some())
        .bind(to_micros(Timestamp::now()))
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }
}

fn record(row: &SqliteRow) -> Result<ImageRecord, StoreError> {
    let image = if row.try_get("enabled")? {
        let memory: i64 = row.try_get("min_gpu_memory_mib")?;
        Some(StoredImage {
            reference: row.try_get("reference")?,
            description: row.try_get("description")?,
            min_gpu_memory_mib: u64::try_from(memory)
                .map_err(|error| StoreError::Corrupt { what: "size of memory", reason: error.to_string() })?,
        })
    } else {
        None
    };
    Ok(ImageRecord { name: row.try_get("name")?, image, created_at: from_micros(row.try_get("created_at")?)? })
}
