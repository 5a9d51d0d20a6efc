//! Certificate authorities that are trusted, and certificates that were revoked.

use super::{KeyToAdd, Store, StoreError, from_micros, keys::kept_label, to_micros, users::user_in};
use jiff::Timestamp;
use mlad::api::{CertificateAuthority, Revocation, Revoked};
use sqlx::FromRow;

/// Authorities there can be.
const MAX_AUTHORITIES: i64 = 1000;
/// Revocations there can be.
const MAX_REVOCATIONS: i64 = 100_000;

/// What a certificate says that a revocation can mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateName {
    /// The fingerprint of the authority that signed it.
    pub authority: String,
    /// Its serial number; 0 if its authority does not number them.
    pub serial: u64,
    /// Its key id.
    pub key_id: String,
    /// The fingerprint of the key it certifies.
    pub key: String,
}

impl Store {
    /// Trusts the certificates of a key: of one user alone, or of everybody.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user; [`StoreError::Conflict`] if it is trusted for them
    /// already, or there are too many.
    pub async fn add_authority(
        &self,
        key: &KeyToAdd,
        user_id: Option<i64>,
    ) -> Result<CertificateAuthority, StoreError> {
        let mut transaction = self.write().await?;
        let user = match user_id {
            Some(id) => Some(user_in(&mut transaction, id).await?.name),
            None => None,
        };
        let count: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM certificate_authorities").fetch_one(&mut *transaction).await?;
        if count >= MAX_AUTHORITIES {
            return Err(StoreError::Conflict(format!("there are {count} authorities; remove one first")));
        }
        let (now, label) = (to_micros(Timestamp::now()), kept_label(&key.label));
        let id: Option<i64> = sqlx::query_scalar(
            "INSERT INTO certificate_authorities (fingerprint, public_key, label, user_id, created_at) \
             VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING RETURNING id",
        )
        .bind(&key.fingerprint)
        .bind(&key.public_key)
        .bind(&label)
        .bind(user_id)
        .bind(now)
        .fetch_optional(&mut *transaction)
        .await?;
        transaction.commit().await?;
        let whom = user.as_deref().unwrap_or("everybody");
        let id = id.ok_or_else(|| {
            StoreError::Conflict(format!("the authority {} is trusted for {whom} already", key.fingerprint))
        })?;
        Ok(CertificateAuthority {
            id,
            fingerprint: key.fingerprint.clone(),
            public_key: key.public_key.clone(),
            label,
            user,
            created_at: from_micros(now)?,
            last_used_at: None,
        })
    }

    /// All authorities, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn authorities(&self) -> Result<Vec<CertificateAuthority>, StoreError> {
        let rows: Vec<AuthorityRow> = sqlx::query_as(
            "SELECT a.*, u.name AS user_name FROM certificate_authorities a LEFT JOIN users u ON u.id = a.user_id \
             ORDER BY a.id",
        )
        .fetch_all(self.read())
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Whether any certificate could let somebody in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn has_authorities(&self) -> Result<bool, StoreError> {
        let any: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM certificate_authorities LIMIT 1").fetch_optional(self.read()).await?;
        Ok(any.is_some())
    }

    /// Whether an authority's certificates may let this user in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_trusted(&self, authority: &str, user_id: i64) -> Result<bool, StoreError> {
        let any: Option<i64> = sqlx::query_scalar(
            "SELECT 1 FROM certificate_authorities WHERE fingerprint = $1 AND (user_id IS NULL OR user_id = $2) LIMIT 1",
        )
        .bind(authority)
        .bind(user_id)
        .fetch_optional(self.read())
        .await?;
        Ok(any.is_some())
    }

    /// Whether an authority's certificates may let anybody in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_authority(&self, fingerprint: &str) -> Result<bool, StoreError> {
        let any: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM certificate_authorities WHERE fingerprint = $1 LIMIT 1")
                .bind(fingerprint)
                .fetch_optional(self.read())
                .await?;
        Ok(any.is_some())
    }

    /// Notes that a certificate of this authority let a user in.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn authority_used(&self, fingerprint: &str, user_id: i64) -> Result<(), StoreError> {
        let now = to_micros(Timestamp::now());
        let mut transaction = self.write().await?;
        sqlx::query(
            "UPDATE certificate_authorities SET last_used_at = $3 \
             WHERE fingerprint = $1 AND (user_id IS NULL OR user_id = $2)",
        )
        .bind(fingerprint)
        .bind(user_id)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        sqlx::query("UPDATE users SET last_seen_at = $2 WHERE id = $1")
            .bind(user_id)
            .bind(now)
            .execute(&mut *transaction)
            .await?;
        Ok(transaction.commit().await?)
    }

    /// Trusts an authority no more.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none of that number.
    pub async fn remove_authority(&self, id: i64) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let removed = sqlx::query("DELETE FROM certificate_authorities WHERE id = $1")
            .bind(id)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
        transaction.commit().await?;
        self.access_changed();
        if removed == 0 { Err(StoreError::NotFound { kind: "authority", name: id.to_string() }) } else { Ok(()) }
    }

    /// Revokes certificates of one authority, or of all. Those revoked already stay so.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if there are too many revocations.
    pub async fn revoke(&self, revoked: &Revoked, authority: Option<&str>) -> Result<Revocation, StoreError> {
        let mut transaction = self.write().await?;
        let count: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM certificate_revocations").fetch_one(&mut *transaction).await?;
        if count >= MAX_REVOCATIONS {
            return Err(StoreError::Conflict(format!("there are {count} revocations; withdraw old ones first")));
        }
        let (kind, value) = columns(revoked);
        let row: RevocationRow = sqlx::query_as(
            "INSERT INTO certificate_revocations (kind, value, authority, created_at) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (kind, value, authority) DO UPDATE SET created_at = created_at RETURNING *",
        )
        .bind(kind)
        .bind(value)
        .bind(authority.unwrap_or_default())
        .bind(to_micros(Timestamp::now()))
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.access_changed();
        row.try_into()
    }

    /// All revocations, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn revocations(&self) -> Result<Vec<Revocation>, StoreError> {
        let rows: Vec<RevocationRow> =
            sqlx::query_as("SELECT * FROM certificate_revocations ORDER BY id").fetch_all(self.read()).await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Withdraws a revocation.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none of that number.
    pub async fn withdraw_revocation(&self, id: i64) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let removed = sqlx::query("DELETE FROM certificate_revocations WHERE id = $1")
            .bind(id)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
        transaction.commit().await?;
        if removed == 0 { Err(StoreError::NotFound { kind: "revocation", name: id.to_string() }) } else { Ok(()) }
    }

    /// Whether a certificate was revoked: by its serial number, its key id, or its key.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn is_revoked(&self, name: &CertificateName) -> Result<bool, StoreError> {
        let any: Option<i64> = sqlx::query_scalar(
            "SELECT 1 FROM certificate_revocations WHERE authority IN ('', $1) \
             AND (kind, value) IN (VALUES ('serial', $2), ('key-id', $3), ('key', $4)) LIMIT 1",
        )
        .bind(&name.authority)
        .bind(name.serial.to_string())
        .bind(&name.key_id)
        .bind(&name.key)
        .fetch_optional(self.read())
        .await?;
        Ok(any.is_some())
    }
}

fn columns(revoked: &Revoked) -> (&'static str, String) {
    match revoked {
        Revoked::Serial(serial) => ("serial", serial.to_string()),
        Revoked::KeyId(id) => ("key-id", id.clone()),
        Revoked::Key(fingerprint) => ("key", fingerprint.clone()),
    }
}

#[derive(FromRow)]
struct AuthorityRow {
    id: i64,
    fingerprint: String,
    public_key: String,
    label: String,
    user_name: Option<String>,
    created_at: i64,
    last_used_at: Option<i64>,
}

impl TryFrom<AuthorityRow> for CertificateAuthority {
    type Error = StoreError;

    fn try_from(row: AuthorityRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: row.id,
            fingerprint: row.fingerprint,
            public_key: row.public_key,
            label: row.label,
            user: row.user_name,
            created_at: from_micros(row.created_at)?,
            last_used_at: row.last_used_at.map(from_micros).transpose()?,
        })
    }
}

#[derive(FromRow)]
struct RevocationRow {
    id: i64,
    kind: String,
    value: String,
    authority: String,
    created_at: i64,
}

impl TryFrom<RevocationRow> for Revocation {
    type Error = StoreError;

    fn try_from(row: RevocationRow) -> Result<Self, StoreError> {
        let corrupt = |reason: String| StoreError::Corrupt { what: "revocation", reason };
        let revoked = match row.kind.as_str() {
            "serial" => Revoked::Serial(row.value.parse().map_err(|_| corrupt(row.value.clone()))?),
            "key-id" => Revoked::KeyId(row.value),
            "key" => Revoked::Key(row.value),
            other => return Err(corrupt(other.into())),
        };
        let authority = Some(row.authority).filter(|authority| !authority.is_empty());
        Ok(Self { id: row.id, revoked, authority, created_at: from_micros(row.created_at)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::NewUser;

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::testing::store(folder.path()).await;
        (folder, store)
    }

    fn key(name: &str) -> KeyToAdd {
        KeyToAdd {
            fingerprint: format!("SHA256:{name}"),
            public_key: format!("ssh-ed25519 {name}"),
            label: name.into(),
            expires_at: None,
        }
    }

    fn certificate(serial: u64) -> CertificateName {
        CertificateName {
            authority: "SHA256:ca".into(),
            serial,
            key_id: "alice@laptop".into(),
            key: "SHA256:laptop".into(),
        }
    }

    #[tokio::test]
    async fn an_authority_is_trusted_for_one_or_for_everybody() {
        let (_folder, store) = store().await;
        let new = |name: &str| NewUser { name: name.into(), role: None, uid: None };
        let (alice, bob) = (store.add_user(&new("alice")).await.unwrap(), store.add_user(&new("bob")).await.unwrap());
        assert!(!store.has_authorities().await.unwrap());
        let own = store.add_authority(&key("ca"), Some(alice.id)).await.unwrap();
        assert!(matches!(store.add_authority(&key("ca"), Some(alice.id)).await, Err(StoreError::Conflict(_))));
        let trusted = async |user| store.is_trusted("SHA256:ca", user).await.unwrap();
        assert!(trusted(alice.id).await && !trusted(bob.id).await && store.is_authority("SHA256:ca").await.unwrap());
        let all = store.add_authority(&key("ca"), None).await.unwrap();
        assert!(matches!(store.add_authority(&key("ca"), None).await, Err(StoreError::Conflict(_))));
        assert!(trusted(bob.id).await && !store.is_trusted("SHA256:other", bob.id).await.unwrap());
        store.authority_used("SHA256:ca", bob.id).await.unwrap();
        let listed = store.authorities().await.unwrap();
        let seen: Vec<_> = listed.iter().map(|it| (it.user.as_deref(), it.last_used_at.is_some())).collect();
        assert_eq!(seen, [(Some("alice"), false), (None, true)]);
        store.remove_authority(all.id).await.unwrap();
        assert!(store.remove_authority(all.id).await.is_err() && !trusted(bob.id).await);
        // Its user's end is its own.
        store.remove_user(alice.id).await.unwrap();
        assert!(!store.has_authorities().await.unwrap() && store.remove_authority(own.id).await.is_err());
    }

    #[tokio::test]
    async fn certificates_are_revoked_by_serial_key_id_and_key() {
        let (_folder, store) = store().await;
        let revoked = async |serial| store.is_revoked(&certificate(serial)).await.unwrap();
        assert!(!revoked(7).await);
        let greatest = store.revoke(&Revoked::Serial(u64::MAX), Some("SHA256:ca")).await.unwrap();
        store.revoke(&Revoked::Serial(7), Some("SHA256:other")).await.unwrap();
        assert!(revoked(u64::MAX).await && !revoked(7).await, "the other authority has numbers of its own");
        let again = store.revoke(&Revoked::Serial(u64::MAX), Some("SHA256:ca")).await.unwrap();
        assert_eq!(greatest, again);
        for what in [Revoked::KeyId("alice@laptop".into()), Revoked::Key("SHA256:laptop".into()), Revoked::Serial(7)] {
            let made = store.revoke(&what, None).await.unwrap();
            assert!(revoked(7).await, "{what:?}");
            assert_eq!(store.revocations().await.unwrap().last(), Some(&made));
            store.withdraw_revocation(made.id).await.unwrap();
            assert!(!revoked(7).await && store.withdraw_revocation(made.id).await.is_err());
        }
        // A key id is no serial number.
        store.revoke(&Revoked::KeyId("7".into()), None).await.unwrap();
        assert!(!revoked(7).await);
    }
}
