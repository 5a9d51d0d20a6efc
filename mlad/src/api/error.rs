//! What an API call answers when it does not succeed, and the exit code it becomes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The body of every answer that is not a success.
///
/// `message` says what happened and why; `hint` says what to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Stable code, for programs.
    pub code: ErrorCode,
    /// What happened and why, for a person.
    pub message: String,
    /// What to do next, for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// The same error with what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Stable codes of API errors. The HTTP status and the exit code follow from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request is malformed: HTTP 400, exit 2.
    BadRequest,
    /// Nobody is logged in or the token is wrong: HTTP 401, exit 4.
    Unauthenticated,
    /// The caller may not do this: HTTP 403, exit 4.
    Denied,
    /// A quota would be exceeded: HTTP 403, exit 4.
    Quota,
    /// There is no such thing (or the caller may not know of it): HTTP 404, exit 3.
    NotFound,
    /// The thing is in a state that does not allow this, or exists already: HTTP 409, exit 1.
    Conflict,
    /// What was asked for can never fit: HTTP 422, exit 2.
    Impossible,
    /// Too much at once: HTTP 429, exit 75.
    TooMany,
    /// A part MLAD needs does not answer now (container engine, database, driver): HTTP 503, exit 75.
    Unavailable,
    /// A fault of MLAD itself: HTTP 500, exit 1.
    Internal,
}

impl ErrorCode {
    /// The HTTP status that carries this code.
    pub fn http_status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthenticated => 401,
            Self::Denied | Self::Quota => 403,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Impossible => 422,
            Self::TooMany => 429,
            Self::Unavailable => 503,
            Self::Internal => 500,
        }
    }

    /// The exit code of a command that ended with this error.
    pub fn exit_code(self) -> ExitCode {
        match self {
            Self::BadRequest | Self::Impossible => ExitCode::Usage,
            Self::Unauthenticated | Self::Denied | Self::Quota => ExitCode::Denied,
            Self::NotFound => ExitCode::NotFound,
            Self::Conflict | Self::Internal => ExitCode::Failure,
            Self::TooMany | Self::Unavailable => ExitCode::TryLater,
        }
    }
}

/// The exit codes of `mlad` (design, "What every part owes"). `run` and `wait` give the job's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// It worked.
    Success = 0,
    /// It failed.
    Failure = 1,
    /// It was asked for wrongly.
    Usage = 2,
    /// There is no such thing.
    NotFound = 3,
    /// Not allowed, or over quota.
    Denied = 4,
    /// The gateway cannot be reached.
    Unreachable = 69,
    /// Not now; try again later.
    TryLater = 75,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}
