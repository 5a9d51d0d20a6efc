//! Certificate authorities for users, and certificates that were revoked.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A key whose OpenSSH user certificates let people in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CertificateAuthority {
    /// Number to remove it by.
    pub id: i64,
    /// `SHA256:…` of its key.
    pub fingerprint: String,
    /// `ssh-ed25519 AAAA…`, without comment.
    pub public_key: String,
    /// The comment it came with, or a label.
    pub label: String,
    /// Whom alone it may let in; everybody if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// When it was added.
    pub created_at: Timestamp,
    /// When one of its certificates last logged in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
}

/// An authority to trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewCertificateAuthority {
    /// Its public key: one line as in `authorized_keys`, without options.
    pub public_key: String,
    /// A label instead of the key's comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whom alone it may let in; everybody if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Which certificates are meant by a revocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "value")]
pub enum Revoked {
    /// Those with this serial number, which is not 0.
    Serial(u64),
    /// Those with this key id.
    KeyId(String),
    /// Those of the key with this fingerprint (`SHA256:…`).
    Key(String),
}

/// Certificates to revoke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRevocation {
    /// Which.
    pub revoked: Revoked,
    /// The fingerprint of the authority whose certificates are meant; those of all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
}

/// Certificates that let nobody in any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Revocation {
    /// Number to withdraw it by.
    pub id: i64,
    /// Which.
    pub revoked: Revoked,
    /// The fingerprint of the authority whose certificates are meant; those of all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// Since when.
    pub created_at: Timestamp,
}
