//! Users. Their SSH keys and invitations are in `keys`.

use super::{Store, StoreError, from_micros, to_micros};
use jiff::Timestamp;
use mlad::api::{NewUser, Quota, Role, User};
use sqlx::{FromRow, Sqlite, Transaction};

/// No request has a greater priority.
pub(crate) const GREATEST_PRIORITY: i32 = mlad_allocator::LeaseRequest::GREATEST_PRIORITY;
/// First uid given to a user; uids below may be the host's or an image's own.
pub const FIRST_UID: u32 = 20_000;
/// Smallest uid an administrator may choose.
const SMALLEST_UID: u32 = 1_000;
/// Largest uid given: below 2^31, which some programs take for negative.
const LARGEST_UID: u32 = 2_000_000_000;
/// Uids that mean "nobody".
const NOBODY: [u32; 2] = [65_534, 65_535];
/// Longest login name, in bytes.
const MAX_NAME: usize = 32;
/// Names that are taken in images or mean something else at the login.
const RESERVED_NAMES: [&str; 28] = [
    "adm",
    "backup",
    "bin",
    "daemon",
    "default",
    "games",
    "halt",
    "irc",
    "list",
    "lp",
    "mail",
    "man",
    "messagebus",
    "mlad",
    "news",
    "nobody",
    "nogroup",
    "operator",
    "proxy",
    "root",
    "shutdown",
    "sshd",
    "sudo",
    "sync",
    "sys",
    "tty",
    "uucp",
    "www-data",
];

/// A user as the database holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRecord {
    /// Number; never given twice.
    pub id: i64,
    /// Login name.
    pub name: String,
    /// Unix uid, and gid, of their files and processes.
    pub uid: u32,
    /// What they may do.
    pub role: Role,
    /// Whether they may log in.
    pub enabled: bool,
    /// Limits only: what is used is 0 here.
    pub quota: Quota,
    /// When they were added.
    pub created_at: Timestamp,
    /// When they last logged in.
    pub last_seen_at: Option<Timestamp>,
}

impl From<UserRecord> for User {
    fn from(record: UserRecord) -> Self {
        let UserRecord { id: _, name, uid, role, enabled, quota, created_at, last_seen_at } = record;
        Self { name, uid, role, enabled, quota, created_at, last_seen_at }
    }
}

impl Store {
    /// The user of this name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none.
    pub async fn user_by_name(&self, name: &str) -> Result<UserRecord, StoreError> {
        let row: Option<UserRow> =
            sqlx::query_as("SELECT * FROM users WHERE name = $1").bind(name).fetch_optional(self.read()).await?;
        row.ok_or_else(|| no_user(name))?.try_into()
    }

    /// The user of this number.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none.
    pub async fn user_by_id(&self, id: i64) -> Result<UserRecord, StoreError> {
        let row: Option<UserRow> =
            sqlx::query_as("SELECT * FROM users WHERE id = $1").bind(id).fetch_optional(self.read()).await?;
        row.ok_or_else(|| no_user(&id.to_string()))?.try_into()
    }

    /// All users by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn users(&self) -> Result<Vec<UserRecord>, StoreError> {
        let rows: Vec<UserRow> = sqlx::query_as("SELECT * FROM users ORDER BY name").fetch_all(self.read()).await?;
        rows.into_iter().map(TryInto::try_into).collect()
    }

    /// Adds a user. Their home is made by `files::ensure_home`.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the name is no login name or taken, or the uid is out of bounds or was
    /// ever given to somebody else.
    pub async fn add_user(&self, new: &NewUser) -> Result<UserRecord, StoreError> {
        check_user_name(&new.name).map_err(StoreError::Conflict)?;
        let mut transaction = self.write().await?;
        let taken: Option<i64> = sqlx::query_scalar("SELECT id FROM users WHERE name = $1")
            .bind(&new.name)
            .fetch_optional(&mut *transaction)
            .await?;
        if taken.is_some() {
            return Err(StoreError::Conflict(format!("there is a user {} already", new.name)));
        }
        let uid = take_uid(&mut transaction, new).await?;
        let row: UserRow = sqlx::query_as(
            "INSERT INTO users (name, uid, role, enabled, created_at) VALUES ($1, $2, $3, TRUE, $4) RETURNING *",
        )
        .bind(&new.name)
        .bind(i64::from(uid))
        .bind(role_name(new.role.unwrap_or(Role::User)))
        .bind(to_micros(Timestamp::now()))
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        row.try_into()
    }

    /// Lets a user log in, or no longer.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user.
    pub async fn set_user_enabled(&self, id: i64, enabled: bool) -> Result<UserRecord, StoreError> {
        let mut transaction = self.write().await?;
        let row: Option<UserRow> = sqlx::query_as("UPDATE users SET enabled = $2 WHERE id = $1 RETURNING *")
            .bind(id)
            .bind(enabled)
            .fetch_optional(&mut *transaction)
            .await?;
        transaction.commit().await?;
        self.access_changed();
        row.ok_or_else(|| no_user(&id.to_string()))?.try_into()
    }

    /// Changes what a user may do.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user.
    pub async fn set_user_role(&self, id: i64, role: Role) -> Result<UserRecord, StoreError> {
        let mut transaction = self.write().await?;
        let row: Option<UserRow> = sqlx::query_as("UPDATE users SET role = $2 WHERE id = $1 RETURNING *")
            .bind(id)
            .bind(role_name(role))
            .fetch_optional(&mut *transaction)
            .await?;
        transaction.commit().await?;
        row.ok_or_else(|| no_user(&id.to_string()))?.try_into()
    }

    /// Replaces a user's limits and default slice; the used amounts in `quota` are ignored.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user.
    pub async fn set_user_quota(&self, id: i64, quota: &Quota) -> Result<UserRecord, StoreError> {
        let memory = column("the GPU memory of the quota", quota.gpu_memory_mib)?;
        let time = column("the GPU time of the quota", quota.gpu_seconds)?;
        if quota.greatest_priority.is_some_and(|greatest| !(0..=GREATEST_PRIORITY).contains(&greatest)) {
            return Err(StoreError::Conflict(format!("the greatest priority is 0 to {GREATEST_PRIORITY}")));
        }
        let mut transaction = self.write().await?;
        let row: Option<UserRow> = sqlx::query_as(
            "UPDATE users SET quota_slices = $2, quota_gpu_memory_mib = $3, quota_jobs = $4, default_need = $5, \
             quota_gpu_seconds = $6, greatest_priority = $7 \
             WHERE id = $1 RETURNING *",
        )
        .bind(id)
        .bind(quota.slices.map(i64::from))
        .bind(memory)
        .bind(quota.jobs.map(i64::from))
        .bind(quota.default_need.as_ref().map(ToString::to_string))
        .bind(time)
        .bind(quota.greatest_priority)
        .fetch_optional(&mut *transaction)
        .await?;
        transaction.commit().await?;
        self.limits_changed();
        row.ok_or_else(|| no_user(&id.to_string()))?.try_into()
    }

    /// Removes a user with their keys, invitations and tokens. Their home stays; their uid is never given
    /// to anybody else.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such user; [`StoreError::Conflict`] while a workspace of theirs
    /// is not stopped or jobs of theirs are on record: disable them instead.
    pub async fn remove_user(&self, id: i64) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let name: Option<String> = sqlx::query_scalar("SELECT name FROM users WHERE id = $1")
            .bind(id)
            .fetch_optional(&mut *transaction)
            .await?;
        let name = name.ok_or_else(|| no_user(&id.to_string()))?;
        // A stopped workspace is no more than the memory of an image and a slice.
        sqlx::query("DELETE FROM workspaces WHERE user_id = $1 AND state = 'stopped'")
            .bind(id)
            .execute(&mut *transaction)
            .await?;
        let left: i64 = sqlx::query_scalar(
            "SELECT (SELECT COUNT(*) FROM workspaces WHERE user_id = $1) + (SELECT COUNT(*) FROM jobs WHERE user_id = $1)",
        )
        .bind(id)
        .fetch_one(&mut *transaction)
        .await?;
        if left > 0 {
            return Err(StoreError::Conflict(format!(
                "{left} workspaces and jobs of {name} are on record; disable the user instead"
            )));
        }
        sqlx::query("DELETE FROM users WHERE id = $1").bind(id).execute(&mut *transaction).await?;
        transaction.commit().await?;
        self.access_changed();
        Ok(())
    }
}

/// Whether a name can be a login name; says why not.
///
/// # Errors
/// A sentence for a person.
pub fn check_user_name(name: &str) -> Result<(), String> {
    let mut bytes = name.bytes();
    let shape = bytes.next().is_some_and(|first| first.is_ascii_lowercase())
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_')
        && name.len() <= MAX_NAME;
    if !shape {
        return Err(format!(
            "{name:?} is no login name: a lower-case letter, then lower-case letters, digits, `-` or `_`, at most \
             {MAX_NAME} in all"
        ));
    }
    if RESERVED_NAMES.contains(&name) || name.starts_with("systemd-") {
        return Err(format!("the name {name} is reserved; choose another"));
    }
    Ok(())
}

/// Gives a uid and remembers that it is given.
async fn take_uid(transaction: &mut Transaction<'static, Sqlite>, new: &NewUser) -> Result<u32, StoreError> {
    let uid = match new.uid {
        Some(uid) => check_chosen_uid(transaction, uid, &new.name).await?,
        None => next_uid(transaction).await?,
    };
    sqlx::query(
        "INSERT INTO given_uids (uid, name, automatic) VALUES ($1, $2, $3) ON CONFLICT (uid) DO UPDATE SET name = $2",
    )
    .bind(i64::from(uid))
    .bind(&new.name)
    .bind(new.uid.is_none())
    .execute(&mut **transaction)
    .await?;
    Ok(uid)
}

async fn check_chosen_uid(
    transaction: &mut Transaction<'static, Sqlite>,
    uid: u32,
    name: &str,
) -> Result<u32, StoreError> {
    if !(SMALLEST_UID..=LARGEST_UID).contains(&uid) || NOBODY.contains(&uid) {
        return Err(StoreError::Conflict(format!(
            "the uid {uid} cannot be given: choose one from {SMALLEST_UID} to {LARGEST_UID}, or none"
        )));
    }
    let holder: Option<String> = sqlx::query_scalar("SELECT name FROM given_uids WHERE uid = $1")
        .bind(i64::from(uid))
        .fetch_optional(&mut **transaction)
        .await?;
    match holder {
        Some(holder) if holder != name => {
            Err(StoreError::Conflict(format!("the uid {uid} is or was that of {holder}; choose another, or none")))
        }
        _ => Ok(uid),
    }
}

async fn next_uid(transaction: &mut Transaction<'static, Sqlite>) -> Result<u32, StoreError> {
    let last: Option<i64> =
        sqlx::query_scalar("SELECT MAX(uid) FROM given_uids WHERE automatic").fetch_one(&mut **transaction).await?;
    let mut uid = last.map_or(i64::from(FIRST_UID), |last| last + 1);
    loop {
        let given: Option<i64> = sqlx::query_scalar("SELECT uid FROM given_uids WHERE uid = $1")
            .bind(uid)
            .fetch_optional(&mut **transaction)
            .await?;
        let number = u32::try_from(uid).ok().filter(|uid| *uid <= LARGEST_UID);
        let number = number.ok_or_else(|| StoreError::Conflict("there are no uids left".into()))?;
        if given.is_none() && !NOBODY.contains(&number) {
            return Ok(number);
        }
        uid += 1;
    }
}

/// The user of this number, within a transaction.
pub(super) async fn user_in(transaction: &mut Transaction<'static, Sqlite>, id: i64) -> Result<UserRecord, StoreError> {
    let row: Option<UserRow> =
        sqlx::query_as("SELECT * FROM users WHERE id = $1").bind(id).fetch_optional(&mut **transaction).await?;
    row.ok_or_else(|| no_user(&id.to_string()))?.try_into()
}

fn no_user(name: &str) -> StoreError {
    StoreError::NotFound { kind: "user", name: name.into() }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::User => "user",
        Role::Admin => "admin",
    }
}

#[derive(FromRow)]
pub(super) struct UserRow {
    id: i64,
    name: String,
    uid: i64,
    role: String,
    enabled: bool,
    quota_slices: Option<i64>,
    quota_gpu_memory_mib: Option<i64>,
    quota_jobs: Option<i64>,
    quota_gpu_seconds: Option<i64>,
    greatest_priority: Option<i64>,
    default_need: Option<String>,
    created_at: i64,
    last_seen_at: Option<i64>,
}

impl TryFrom<UserRow> for UserRecord {
    type Error = StoreError;

    fn try_from(row: UserRow) -> Result<Self, StoreError> {
        let role = match row.role.as_str() {
            "user" => Role::User,
            "admin" => Role::Admin,
            other => return Err(corrupt("role", &other)),
        };
        let default_need = row.default_need.map(|text| text.parse().map_err(|error| corrupt("default slice", &error)));
        Ok(Self {
            id: row.id,
            name: row.name,
            uid: number("uid", row.uid)?,
            role,
            enabled: row.enabled,
            quota: Quota {
                slices: row.quota_slices.map(|value| number("quota", value)).transpose()?,
                gpu_memory_mib: row.quota_gpu_memory_mib.map(|value| number("quota", value)).transpose()?,
                jobs: row.quota_jobs.map(|value| number("quota", value)).transpose()?,
                gpu_seconds: row.quota_gpu_seconds.map(|value| number("quota", value)).transpose()?,
                greatest_priority: row.greatest_priority.map(|value| number("priority", value)).transpose()?,
                default_need: default_need.transpose()?,
                ..Quota::default()
            },
            created_at: from_micros(row.created_at)?,
            last_seen_at: row.last_seen_at.map(from_micros).transpose()?,
        })
    }
}

fn number<T: TryFrom<i64>>(what: &'static str, value: i64) -> Result<T, StoreError> {
    T::try_from(value).map_err(|_| corrupt(what, &value))
}

/// A limit as a column holds it.
pub(super) fn column(what: &str, limit: Option<u64>) -> Result<Option<i64>, StoreError> {
    let number = limit.map(i64::try_from).transpose();
    number.map_err(|_| StoreError::Conflict(format!("{what} is too large")))
}

fn corrupt(what: &'static str, value: &dyn std::fmt::Display) -> StoreError {
    StoreError::Corrupt { what, reason: value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = crate::testing::store(folder.path()).await;
        (folder, store)
    }

    fn new_user(name: &str) -> NewUser {
        NewUser { name: name.into(), role: None, uid: None }
    }

    #[test]
    fn only_login_names_are_taken() {
        for good in ["a", "alice", "a-1_b", &"x".repeat(32)] {
            check_user_name(good).unwrap();
        }
        for bad in ["", "A", "1a", "-a", "a b", "a+b", "a/..", "å", "root", "mlad", "systemd-network", &"x".repeat(33)]
        {
            assert!(check_user_name(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_uid_is_never_given_to_somebody_else() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        assert_eq!(alice.uid, FIRST_UID);
        let chosen = NewUser { uid: Some(FIRST_UID + 1), ..new_user("bob") };
        let bob = store.add_user(&chosen).await.unwrap();
        store.remove_user(bob.id).await.unwrap();
        store.remove_user(alice.id).await.unwrap();
        assert_eq!(store.add_user(&new_user("carol")).await.unwrap().uid, FIRST_UID + 2);
        assert!(store.add_user(&NewUser { uid: Some(FIRST_UID), ..new_user("eve") }).await.is_err());
        assert!(store.add_user(&NewUser { uid: Some(0), ..new_user("eve") }).await.is_err());
        assert_eq!(store.add_user(&chosen).await.unwrap().uid, FIRST_UID + 1);
    }

    #[tokio::test]
    async fn a_quota_comes_back_as_it_was_set() {
        let (_folder, store) = store().await;
        let alice = store.add_user(&new_user("alice")).await.unwrap();
        let quota = Quota {
            slices: Some(2),
            gpu_memory_mib: Some(20_000),
            gpu_seconds: Some(7200),
            greatest_priority: Some(50),
            default_need: Some("1g.5gb".parse().unwrap()),
            ..Quota::default()
        };
        assert_eq!(store.set_user_quota(alice.id, &quota).await.unwrap().quota, quota);
        assert!(!store.set_user_enabled(alice.id, false).await.unwrap().enabled);
        assert_eq!(store.set_user_role(alice.id, Role::Admin).await.unwrap().role, Role::Admin);
    }
}
