//! What travels: bodies, and the HTTP status of each error.

use crate::AllocatorError;
use jiff::{Timestamp, civil::Date};
use mlad::api::Need;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The longest body of a call, in bytes; the largest call has some hundred.
pub(super) const LONGEST_CALL: usize = 64 << 10;
/// The longest body of a call that sets accounts, in bytes.
pub(super) const LONGEST_ACCOUNTS: usize = 8 << 20;
/// The longest body of an answer, in bytes: a list of some hundred thousand requests.
pub(super) const LONGEST_ANSWER: usize = 128 << 20;
/// How long the server holds a question for changes before it answers that there are none.
pub(super) const HOLD: Duration = Duration::from_secs(25);
/// How long any other call may take at the server.
pub(super) const TAKE: Duration = Duration::from_secs(30);

/// Body of `POST /v1/resolve`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Resolve {
    pub(super) need: Need,
}

/// Body of `POST /v1/requests/{workload}/renew`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Renew {
    pub(super) fence: u64,
}

/// Body of `POST /v1/requests/{workload}/revoke`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Revoke {
    pub(super) reason: String,
    pub(super) free: bool,
}

/// Query of `GET /v1/past`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct At {
    pub(super) at: Timestamp,
}

/// Query of `GET /v1/usage`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Days {
    pub(super) from: Date,
    pub(super) to: Date,
}

/// Query and answer of `GET /v1/changed`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Version {
    pub(super) seen: u64,
}

/// A refusal that is not the allocator's own: of the form of its errors, and with other kinds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Refusal<'a> {
    pub(super) kind: &'a str,
    pub(super) detail: &'a str,
}

impl Refusal<'static> {
    /// With 401.
    pub(super) const NO_TOKEN: Self =
        Self { kind: "no-token", detail: "the call does not show the token (Authorization: Bearer TOKEN)" };
    /// With 408.
    pub(super) const LATE: Self =
        Self { kind: "late", detail: "the call took too long and may still be done; ask again" };
    /// With 404 and 405.
    pub(super) const NO_SUCH_CALL: Self = Self { kind: "no-such-call", detail: "there is no such call" };
}

/// The HTTP status that carries an error.
pub(super) fn status(error: &AllocatorError) -> u16 {
    match error {
        AllocatorError::Invalid(_) => 400,
        AllocatorError::Quota(_) => 403,
        AllocatorError::Unknown(_) => 404,
        AllocatorError::Ended(_) | AllocatorError::Fence(_) | AllocatorError::Reservation(_) => 409,
        AllocatorError::Impossible(_) => 422,
        AllocatorError::TooMany(_) => 429,
        AllocatorError::Settings(_) => 500,
        AllocatorError::Driver(_) | AllocatorError::Store(_) | AllocatorError::Unreachable { .. } => 503,
    }
}
