//! Bearer tokens of the TCP API: made here, stored hashed, looked up by number and compared in constant time.

use super::{Store, StoreError, from_micros, to_micros};
use data_encoding::BASE32_NOPAD;
use jiff::{SignedDuration, Timestamp};
use mlad::api::Token;
use rand::TryRng as _;
use sha2::{Digest as _, Sha256};
use sqlx::{Row as _, sqlite::SqliteRow};
use subtle::ConstantTimeEq as _;

/// Tokens one user may have.
const MAX_TOKENS: u32 = 100;
/// How old `last_used_at` may be before it is written again: not every request is to be a write.
const LAST_USED_STEP: SignedDuration = SignedDuration::from_mins(1);

impl Store {
    /// Makes a token; its secret is in the answer and nowhere else.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the user has too many.
    pub async fn add_token(&self, user_id: i64, label: &str, expires_at: Timestamp) -> Result<Token, StoreError> {
        let mut random = [0_u8; 32];
        rand::rngs::SysRng
            .try_fill_bytes(&mut random)
            .map_err(|error| StoreError::Corrupt { what: "random number", reason: error.to_string() })?;
        let random = BASE32_NOPAD.encode(&random).to_ascii_lowercase();
        let now = Timestamp::now();
        let mut transaction = self.write().await?;
        sqlx::query("DELETE FROM tokens WHERE user_id = $1 AND expires_at < $2")
            .bind(user_id)
            .bind(to_micros(now))
            .execute(&mut *transaction)
            .await?;
        let count: u32 = sqlx::query_scalar("SELECT COUNT(*) FROM tokens WHERE user_id = $1")
            .bind(user_id)
            .fetch_one(&mut *transaction)
            .await?;
        if count >= MAX_TOKENS {
            return Err(StoreError::Conflict(format!("{count} tokens are the most one user can have; revoke one")));
        }
        let row = sqlx::query(
            "INSERT INTO tokens (secret_hash, user_id, label, created_at, expires_at) VALUES ($1, $2, $3, $4, $5)
             RETURNING id, (SELECT name FROM users WHERE id = $2) AS user",
        )
        .bind(hash(&random).to_vec())
        .bind(user_id)
        .bind(label)
        .bind(to_micros(now))
        .bind(to_micros(expires_at))
        .fetch_one(&mut *transaction)
        .await?;
        let id: i64 = row.try_get("id")?;
        let user = row.try_get("user")?;
        transaction.commit().await?;
        let secret = Some(format!("mlad_{id}_{random}"));
        Ok(Token { id, user, label: label.into(), secret, expires_at, last_used_at: None })
    }

    /// The user (by number) whose token this is; none if it is nobody's or has expired.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn user_of_token(&self, secret: &str) -> Result<Option<i64>, StoreError> {
        let Some((id, random)) = secret.strip_prefix("mlad_").and_then(|rest| rest.split_once('_')) else {
            return Ok(None);
        };
        let Ok(id) = id.parse::<i64>() else { return Ok(None) };
        let row = sqlx::query("SELECT secret_hash, user_id, expires_at, last_used_at FROM tokens WHERE id = $1")
            .bind(id)
            .fetch_optional(self.read())
            .await?;
        let Some(row) = row else { return Ok(None) };
        let stored: Vec<u8> = row.try_get("secret_hash")?;
        let now = Timestamp::now();
        if !bool::from(stored.as_slice().ct_eq(&hash(random))) || from_micros(row.try_get("expires_at")?)? <= now {
            return Ok(None);
        }
        let last_used: Option<i64> = row.try_get("last_used_at")?;
        if last_used.is_none_or(|at| at < to_micros(now - LAST_USED_STEP)) {
            let mut transaction = self.write().await?;
            sqlx::query("UPDATE tokens SET last_used_at = $1 WHERE id = $2")
                .bind(to_micros(now))
                .bind(id)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
        }
        Ok(Some(row.try_get("user_id")?))
    }

    /// A user's tokens, without their secrets.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn tokens(&self, user_id: i64) -> Result<Vec<Token>, StoreError> {
        let rows = sqlx::query(
            "SELECT t.id, t.label, t.expires_at, t.last_used_at, u.name AS user
             FROM tokens t JOIN users u ON u.id = t.user_id WHERE t.user_id = $1 ORDER BY t.id",
        )
        .bind(user_id)
        .fetch_all(self.read())
        .await?;
        rows.iter().map(token).collect()
    }

    /// Revokes a user's token.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when the user has none of that number.
    pub async fn remove_token(&self, user_id: i64, id: i64) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let removed = sqlx::query("DELETE FROM tokens WHERE id = $1 AND user_id = $2")
            .bind(id)
            .bind(user_id)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
        transaction.commit().await?;
        if removed == 0 { Err(StoreError::NotFound { kind: "token", name: id.to_string() }) } else { Ok(()) }
    }
}

fn token(row: &SqliteRow) -> Result<Token, StoreError> {
    Ok(Token {
        id: row.try_get("id")?,
        user: row.try_get("user")?,
        label: row.try_get("label")?,
        secret: None,
        expires_at: from_micros(row.try_get("expires_at")?)?,
        last_used_at: row.try_get::<Option<i64>, _>("last_used_at")?.map(from_micros).transpose()?,
    })
}

fn hash(random: &str) -> [u8; 32] {
    Sha256::digest(random.as_bytes()).into()
}
