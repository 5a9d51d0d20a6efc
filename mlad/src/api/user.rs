//! People: users, their keys, invitations and tokens; quotas; the audit log.

use super::Need;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a user may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Own workspaces and jobs.
    User,
    /// Everything, audited.
    Admin,
}

/// Who is calling, as the gateway knows it from the connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Identity {
    /// The user's name; `root` on the administration socket.
    pub user: String,
    /// What they may do.
    pub role: Role,
    /// The workload the call comes from, if it comes from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
}

/// A person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    /// Login name: a lower-case letter, then lower-case letters, digits, `-` or `_`; at most 32.
    pub name: String,
    /// Unix uid and gid of their files and processes.
    pub uid: u32,
    /// What they may do.
    pub role: Role,
    /// Whether they may log in.
    pub enabled: bool,
    /// Their quota.
    pub quota: Quota,
    /// When they were added.
    pub created_at: Timestamp,
    /// When they were last seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_at: Option<Timestamp>,
}

/// Users by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserList {
    /// All of them.
    pub users: Vec<User>,
}

/// A user to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewUser {
    /// Login name.
    pub name: String,
    /// What they may do; `user` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// Unix uid; the next free one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// What is to change about a user; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UserChange {
    /// Whether they may log in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// What they may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
}

/// An SSH public key of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshKey {
    /// `SHA256:…`, as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    /// Whose.
    pub user: String,
    /// `ssh-ed25519 AAAA…`, without comment.
    pub public_key: String,
    /// The comment it came with, or a label.
    pub label: String,
    /// When it was added.
    pub created_at: Timestamp,
    /// When it stops letting its user in; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// When it last logged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// The address that login came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_from: Option<String>,
}

/// A key to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// One line as in `authorized_keys`, without options.
    pub public_key: String,
    /// A label instead of the key's comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// When it stops letting its user in; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// An invitation to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewInvite {
    /// User it is for; added if there is none of that name.
    pub user: String,
    /// How long the code can be used, in seconds; a day if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_seconds: Option<u64>,
}

/// An invitation: its code is shown once and stored hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Invite {
    /// User it is for.
    pub user: String,
    /// The one-time code to hand over.
    pub code: String,
    /// When it stops working.
    pub expires_at: Timestamp,
}

/// A bearer token to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// What it is for.
    pub label: String,
    /// How long it works, in seconds; 90 days if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_seconds: Option<u64>,
}

/// A bearer token of the TCP API: its secret is shown once, at its making, and stored hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Number to revoke it by.
    pub id: i64,
    /// Whose.
    pub user: String,
    /// What it is for.
    pub label: String,
    /// The secret; only in the answer that makes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// When it stops working.
    pub expires_at: Timestamp,
    /// When it was last used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
}

/// What a user may hold at once, and holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    /// Slices (or whole GPUs) at once; none for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slices: Option<u32>,
    /// GPU memory at once, in MiB; none for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_mib: Option<u64>,
    /// Jobs that have not ended; none for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs: Option<u32>,
    /// GPU time in 30 days, in seconds of whole GPUs; none for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_seconds: Option<u64>,
    /// The greatest priority their requests may have, 0 to 100; 0 if absent. Administrators' may have any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub greatest_priority: Option<i32>,
    /// Slices held now.
    #[serde(default)]
    pub slices_used: u32,
    /// GPU memory held now, in MiB.
    #[serde(default)]
    pub gpu_memory_mib_used: u64,
    /// Jobs that have not ended now.
    #[serde(default)]
    pub jobs_used: u32,
    /// Slice asked for where a login or job names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_need: Option<Need>,
}

/// One entry of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditEvent {
    /// When.
    pub at: Timestamp,
    /// Who did it.
    pub actor: String,
    /// What was done: `user.add`, `key.remove`, `login`, …
    pub action: String,
    /// To what.
    pub target: String,
    /// Anything else worth knowing; never a secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The audit log, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditList {
    /// At most the limit asked for.
    pub events: Vec<AuditEvent>,
}
