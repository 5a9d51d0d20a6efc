//! SSH keys of users, and the invitations that bring new ones in.

use super::{
    Store, StoreError, from_micros, to_micros,
    users::{UserRecord, UserRow, user_in},
};
use jiff::Timestamp;
use mlad::api::SshKey;
use rand::Rng as _;
use sha2::{Digest as _, Sha256};
use sqlx::{FromRow, Sqlite, Transaction};
use std::net::IpAddr;

/// Keys of one user.
const MAX_KEYS: i64 = 64;
/// Longest label of a key, in characters.
const MAX_LABEL: usize = 128;
/// Random bytes of an invitation's code: 120 bits, 24 symbols.
const CODE_BYTES: usize = 15;
/// Symbols between two dashes of a code.
const CODE_GROUP: usize = 6;
/// Crockford's base 32: no I, L, O, U.
const CODE_ALPHABET: &str = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// A public key, read and checked (`ssh::parse_key`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyToAdd {
    /// `SHA256:…`.
    pub fingerprint: String,
    /// `ssh-ed25519 AAAA…`, without comment.
    pub public_key: String,
    /// Comment or label; may be empty.
    pub label: String,
    /// When it stops letting its user in; never if absent.
    pub expires_at: Option<Timestamp>,
}

/// A key that is somebody's.
#[derive(Debug, Clone, PartialEq)]
pub struct KnownKey {
    /// Whose.
    pub user: UserRecord,
    /// When it stops letting them in; never if absent.
    pub expires_at: Option<Timestamp>,
}

/// Whether the last key that lets a user in may be taken from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastKey {
    /// It may: they have another way in, or are to have none.
    MayGo,
    /// It may not.
    Stays,
}

impl LastKey {
    /// Whether it was said that it may.
    pub fn may_go_if(force: bool) -> Self {
        if force { Self::MayGo } else { Self::Stays }
    }
}

impl KnownKey {
    /// Whether it lets its user in no more.
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|time| time <= now)
    }
}

impl Store {
    /// Whose key this is, expired or not; none if nobody's.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn user_by_key(&self, fingerprint: &str) -> Result<Option<KnownKey>, StoreError> {
        let row: Option<KnownRow> = sqlx::query_as(
            "SELECT users.*, ssh_keys.expires_at FROM users JOIN ssh_keys ON ssh_keys.user_id = users.id \
             WHERE ssh_keys.fingerprint = $1",
        )
        .bind(fingerprint)
        .fetch_optional(self.read())
        .await?;
        row.map(TryInto::try_into).transpose()
    }

    /// Notes that a key logged in from an address, and that its owner was seen.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn key_used(&self, fingerprint: &str, from: IpAddr) -> Result<(), StoreError> {
        let now = to_micros(Timestamp::now());
        let mut transaction = self.write().await?;
        sqlx::query("UPDATE ssh_keys SET last_used_at = $2, last_used_from = $3 WHERE fingerprint = $1")
            .bind(fingerprint)
            .bind(now)
            .bind(from.to_canonical().to_string())
            .execute(&mut *transaction)
            .await?;
        sqlx::query(
            "UPDATE users SET last_seen_at = $2 WHERE id = (SELECT user_id FROM ssh_keys WHERE fingerprint = $1)",
        )
        .bind(fingerprint)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// A user's keys, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keys_of(&self, user_id: i64) -> Result<Vec<SshKey>, StoreError> {
        let rows: Vec<KeyRow> = sqlx::query_as(
            "SELECT ssh_keys.*, users.name AS user_name FROM ssh_keys JOIN users ON users.id = ssh_keys.user_id \
             WHERE user_id = $1 ORDER BY ssh_keys.created_at, fingerprint",
        )
        .bind(user_id)
        .fetch_all(self.read())
        .await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Gives a user a key.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user; [`StoreError::Conflict`] when the key is somebody's
    /// already, or the user has too many.
    pub async fn add_key(&self, user_id: i64, key: &KeyToAdd) -> Result<SshKey, StoreError> {
        let mut transaction = self.write().await?;
        let added = insert_key(&mut transaction, user_id, key).await?;
        transaction.commit().await?;
        Ok(added)
    }

    /// Takes a key away from a user.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the user has no such key; [`StoreError::Conflict`] if it is the last one that
    /// lets them in, and has to stay.
    pub async fn remove_key(&self, user_id: i64, fingerprint: &str, last: LastKey) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        if last == LastKey::Stays && is_last_key(&mut transaction, user_id, fingerprint).await? {
            return Err(StoreError::Conflict(format!(
                "{fingerprint} is the last key that lets you in: add another first, or remove it all the same with --force"
            )));
        }
        let removed = sqlx::query("DELETE FROM ssh_keys WHERE user_id = $1 AND fingerprint = $2")
            .bind(user_id)
            .bind(fingerprint)
            .execute(&mut *transaction)
            .await?
            .rows_affected();
        transaction.commit().await?;
        self.access_changed();
        if removed == 0 {
            return Err(StoreError::NotFound { kind: "key", name: fingerprint.into() });
        }
        Ok(())
    }

    /// Makes an invitation and returns its code, which is stored hashed. Invitations that expired are
    /// removed on the way.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user.
    pub async fn add_invite(&self, user_id: i64, expires_at: Timestamp) -> Result<String, StoreError> {
        let code = new_code();
        let now = to_micros(Timestamp::now());
        let mut transaction = self.write().await?;
        user_in(&mut transaction, user_id).await?;
        sqlx::query("DELETE FROM invites WHERE expires_at < $1").bind(now).execute(&mut *transaction).await?;
        sqlx::query("INSERT INTO invites (code_hash, user_id, created_at, expires_at) VALUES ($1, $2, $3, $4)")
            .bind(code_hash(&code))
            .bind(user_id)
            .bind(now)
            .bind(to_micros(expires_at))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(code)
    }

    /// Whether any code could be right now.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn has_open_invites(&self) -> Result<bool, StoreError> {
        let open: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM invites WHERE used_at IS NULL AND expires_at > $1 LIMIT 1")
                .bind(to_micros(Timestamp::now()))
                .fetch_optional(self.read())
                .await?;
        Ok(open.is_some())
    }

    /// Whom a code invites, without using it up; none if it is wrong, used or expired.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn invited_by(&self, code: &str) -> Result<Option<UserRecord>, StoreError> {
        let row: Option<UserRow> = sqlx::query_as(
            "SELECT users.* FROM users JOIN invites ON invites.user_id = users.id \
             WHERE code_hash = $1 AND used_at IS NULL AND expires_at > $2",
        )
        .bind(code_hash(code))
        .bind(to_micros(Timestamp::now()))
        .fetch_optional(self.read())
        .await?;
        row.map(TryInto::try_into).transpose()
    }

    /// Uses a code up and gives its user the key, both or neither; none if the code is wrong, used or expired.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the key is somebody's already; the code stays good.
    pub async fn redeem_invite(&self, code: &str, key: &KeyToAdd) -> Result<Option<UserRecord>, StoreError> {
        let now = to_micros(Timestamp::now());
        let mut transaction = self.write().await?;
        let user_id: Option<i64> = sqlx::query_scalar(
            "UPDATE invites SET used_at = $2 WHERE code_hash = $1 AND used_at IS NULL AND expires_at > $2 \
             RETURNING user_id",
        )
        .bind(code_hash(code))
        .bind(now)
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(user_id) = user_id else { return Ok(None) };
        insert_key(&mut transaction, user_id, key).await?;
        let user = user_in(&mut transaction, user_id).await?;
        transaction.commit().await?;
        Ok(Some(user))
    }
}

/// Whether a key lets its user in, and no other of theirs does.
async fn is_last_key(
    transaction: &mut Transaction<'static, Sqlite>,
    user_id: i64,
    fingerprint: &str,
) -> Result<bool, StoreError> {
    let valid: Vec<String> = sqlx::query_scalar(
        "SELECT fingerprint FROM ssh_keys WHERE user_id = $1 AND (expires_at IS NULL OR expires_at > $2)",
    )
    .bind(user_id)
    .bind(to_micros(Timestamp::now()))
    .fetch_all(&mut **transaction)
    .await?;
    Ok(valid == [fingerprint])
}

async fn insert_key(
    transaction: &mut Transaction<'static, Sqlite>,
    user_id: i64,
    key: &KeyToAdd,
) -> Result<SshKey, StoreError> {
    let user = user_in(transaction, user_id).await?;
    let owner: Option<String> = sqlx::query_scalar(
        "SELECT users.name FROM users JOIN ssh_keys ON ssh_keys.user_id = users.id WHERE fingerprint = $1",
    )
    .bind(&key.fingerprint)
    .fetch_optional(&mut **transaction)
    .await?;
    if let Some(owner) = owner {
        return Err(StoreError::Conflict(format!("the key {} is {owner}'s already", key.fingerprint)));
    }
    let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM ssh_keys WHERE user_id = $1")
        .bind(user_id)
        .fetch_one(&mut **transaction)
        .await?;
    if count >= MAX_KEYS {
        return Err(StoreError::Conflict(format!("{} has {count} keys; remove one first", user.name)));
    }
    let label = kept_label(&key.label);
    let (now, expires_at) = (to_micros(Timestamp::now()), key.expires_at.map(to_micros));
    sqlx::query(
        "INSERT INTO ssh_keys (fingerprint, user_id, public_key, label, created_at, expires_at) \
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&key.fingerprint)
    .bind(user_id)
    .bind(&key.public_key)
    .bind(&label)
    .bind(now)
    .bind(expires_at)
    .execute(&mut **transaction)
    .await?;
    Ok(SshKey {
        fingerprint: key.fingerprint.clone(),
        user: user.name,
        public_key: key.public_key.clone(),
        label,
        created_at: from_micros(now)?,
        expires_at: expires_at.map(from_micros).transpose()?,
        last_used_at: None,
        last_used_from: None,
    })
}

/// A label as it is kept.
pub(super) fn kept_label(label: &str) -> String {
    label.chars().filter(|symbol| !symbol.is_control()).take(MAX_LABEL).collect()
}

/// A fresh code, in groups: `XXXXXX-XXXXXX-XXXXXX-XXXXXX`.
fn new_code() -> String {
    let mut random = [0_u8; CODE_BYTES];
    rand::rng().fill_bytes(&mut random);
    let mut code = String::new();
    for (index, symbol) in code_symbols(&random).enumerate() {
        if index > 0 && index % CODE_GROUP == 0 {
            code.push('-');
        }
        code.push(symbol);
    }
    code
}

/// Five bits at a time.
fn code_symbols(bytes: &[u8]) -> impl Iterator<Item = char> {
    bytes.chunks(5).flat_map(|chunk| {
        let bits = chunk.iter().fold(0_u64, |bits, byte| (bits << 8) | u64::from(*byte));
        (0..8).rev().map(move |index| {
            let value = (bits >> (index * 5)) & 31;
            CODE_ALPHABET.chars().nth(usize::try_from(value).unwrap_or_default()).unwrap_or('0')
        })
    })
}

/// What is stored of a code: dashes, blanks and case do not matter, nor does taking O for 0 or I and L for 1.
fn code_hash(code: &str) -> Vec<u8> {
    let normal: String = code
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|symbol| match symbol.to_ascii_uppercase() {
            'O' => '0',
            'I' | 'L' => '1',
            other => other,
        })
        .collect();
    Sha256::digest(normal).to_vec()
}

#[derive(FromRow)]
struct KnownRow {
    #[sqlx(flatten)]
    user: UserRow,
    expires_at: Option<i64>,
}

impl TryFrom<KnownRow> for KnownKey {
    type Error = StoreError;

    fn try_from(row: KnownRow) -> Result<Self, StoreError> {
        Ok(Self { user: row.user.try_into()?, expires_at: row.expires_at.map(from_micros).transpose()? })
    }
}

#[derive(FromRow)]
struct KeyRow {
    fingerprint: String,
    user_name: String,
    public_key: String,
    label: String,
    created_at: i64,
    expires_at: Option<i64>,
    last_used_at: Option<i64>,
    last_used_from: Option<String>,
}

impl TryFrom<KeyRow> for SshKey {
    type Error = StoreError;

    fn try_from(row: KeyRow) -> Result<Self, StoreError> {
        Ok(Self {
            fingerprint: row.fingerprint,
            user: row.user_name,
            public_key: row.public_key,
            label: row.label,
            created_at: from_micros(row.created_at)?,
            expires_at: row.expires_at.map(from_micros).transpose()?,
            last_used_at: row.last_used_at.map(from_micros).transpose()?,
            last_used_from: row.last_used_from,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan as _;
    use mlad::api::NewUser;

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::testing::store(folder.path()).await;
        (folder, store)
    }

    fn new_user(name: &str) -> NewUser {
        NewUser { name: name.into(), role: None, uid: None }
    }

    fn key(name: &str) -> KeyToAdd {
        KeyToAdd {
            fingerprint: format!("SHA256:{name}"),
            public_key: format!("ssh-ed25519 {name}"),
            label: name.into(),
            expires_at: None,
        }
    }

    #[tokio::test]
    async fn a_key_belongs_to_one_user() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        let bob = store.add_user(&new_user("bob")).await.unwrap();
        store.add_key(alice.id, &key("one")).await.unwrap();
        assert!(matches!(store.add_key(bob.id, &key("one")).await, Err(StoreError::Conflict(_))));
        assert_eq!(store.user_by_key("SHA256:one").await.unwrap().unwrap().user.name, "alice");
        store.key_used("SHA256:one", "::ffff:192.0.2.7".parse().unwrap()).await.unwrap();
        let used = &store.keys_of(alice.id).await.unwrap()[0];
        assert!(used.last_used_at.is_some() && used.last_used_from.as_deref() == Some("192.0.2.7"));
        assert!(store.user_by_name("alice").await.unwrap().last_seen_at.is_some());
        assert!(store.user_by_name("bob").await.unwrap().last_seen_at.is_none());
        assert!(store.remove_key(bob.id, "SHA256:one", LastKey::MayGo).await.is_err());
        store.remove_key(alice.id, "SHA256:one", LastKey::MayGo).await.unwrap();
        assert_eq!(store.user_by_key("SHA256:one").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_code_works_once_however_it_is_typed() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        let code = store.add_invite(alice.id, Timestamp::now() + 1.hour()).await.unwrap();
        assert_eq!(code.len(), 27);
        assert!(store.has_open_invites().await.unwrap());
        assert_eq!(store.invited_by("wrong").await.unwrap(), None);
        assert_eq!(store.invited_by(&code).await.unwrap().unwrap().name, "alice");
        let typed = format!(" {} ", code.to_lowercase().replace('-', " ").replace('0', "o").replace('1', "l"));
        assert_eq!(store.redeem_invite(&typed, &key("one")).await.unwrap().unwrap().name, "alice");
        assert!(!store.has_open_invites().await.unwrap());
        assert_eq!(store.redeem_invite(&code, &key("two")).await.unwrap(), None);
        assert_eq!(store.invited_by(&code).await.unwrap(), None);
        assert_eq!(store.user_by_key("SHA256:one").await.unwrap().unwrap().user.name, "alice");
    }

    #[tokio::test]
    async fn the_last_key_that_lets_somebody_in_stays() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        let until = |name: &str, time| KeyToAdd { expires_at: Some(time), ..key(name) };
        let (before, later) = (Timestamp::now() - 1.second(), Timestamp::now() + 1.hour());
        store.add_key(alice.id, &until("over", before)).await.unwrap();
        store.add_key(alice.id, &until("good", later)).await.unwrap();
        let refused = store.remove_key(alice.id, "SHA256:good", LastKey::Stays).await;
        assert!(matches!(refused, Err(StoreError::Conflict(_))), "the other has expired: {refused:?}");
        store.add_key(alice.id, &key("other")).await.unwrap();
        store.remove_key(alice.id, "SHA256:good", LastKey::Stays).await.unwrap();
        store.remove_key(alice.id, "SHA256:over", LastKey::Stays).await.unwrap();
        let unknown = store.remove_key(alice.id, "SHA256:unknown", LastKey::Stays).await;
        assert!(matches!(unknown, Err(StoreError::NotFound { .. })), "{unknown:?}");
        assert!(store.remove_key(alice.id, "SHA256:other", LastKey::Stays).await.is_err());
        store.remove_key(alice.id, "SHA256:other", LastKey::MayGo).await.unwrap();
    }

    #[tokio::test]
    async fn a_key_is_known_after_it_has_expired() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        let time = from_micros(to_micros(Timestamp::now() + 1.hour())).unwrap();
        let added = store.add_key(alice.id, &KeyToAdd { expires_at: Some(time), ..key("one") }).await.unwrap();
        assert_eq!(store.keys_of(alice.id).await.unwrap(), [added]);
        let known = store.user_by_key("SHA256:one").await.unwrap().unwrap();
        assert_eq!((known.user.name.as_str(), known.expires_at), ("alice", Some(time)));
        assert!(!known.has_expired(time - 1.second()) && known.has_expired(time));
    }

    #[tokio::test]
    async fn a_code_is_kept_when_its_key_cannot_be_added_and_ends_when_it_expires() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        let bob = store.add_user(&new_user("bob")).await.unwrap();
        store.add_key(bob.id, &key("one")).await.unwrap();
        let code = store.add_invite(alice.id, Timestamp::now() + 1.hour()).await.unwrap();
        assert!(matches!(store.redeem_invite(&code, &key("one")).await, Err(StoreError::Conflict(_))));
        assert!(store.redeem_invite(&code, &key("two")).await.unwrap().is_some());
        let late = store.add_invite(alice.id, Timestamp::now() - 1.second()).await.unwrap();
        assert_eq!(store.redeem_invite(&late, &key("three")).await.unwrap(), None);
    }
}
