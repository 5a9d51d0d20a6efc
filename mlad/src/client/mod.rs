//! The Rust SDK: calls the gateway's HTTP API over a Unix socket or TCP.
//!
//! ```no_run
//! # async fn example() -> Result<(), mlad::client::ClientError> {
//! use mlad::{api::JobSpec, client::Client};
//! let client = Client::from_environment()?;
//! let spec: JobSpec = serde_json::from_str(r#"{"command": ["python3", "train.py"]}"#).unwrap_or_else(|_| unreachable!());
//! let job = client.submit(&spec).await?;
//! let job = client.wait_for(job.id).await?;
//! println!("{:?}", job.exit_code);
//! # Ok(()) }
//! ```
//!
//! Not here: what a person sees ([`crate::cli`]).

mod calls;
mod endpoint;
mod transport;

pub use calls::{JobQuery, UsageQuery};
pub use endpoint::{Endpoint, EndpointError};
pub use transport::{Answer, Client, Digest};

use crate::api::{ApiError, ErrorCode, ExitCode};

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The gateway answered that it will not.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The gateway cannot be reached, or the connection broke. Trying again may help.
    #[error("the gateway cannot be reached at {endpoint}: {reason}")]
    Unreachable {
        /// Where it should be.
        endpoint: String,
        /// Why not.
        reason: String,
    },
    /// The gateway answered something that is not its API.
    #[error("{endpoint} answered what this program does not understand: {reason}")]
    Answer {
        /// Who answered.
        endpoint: String,
        /// What was wrong.
        reason: String,
    },
    /// Where the gateway is was not said, or not rightly.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

impl ClientError {
    /// The exit code of a command that ended with this error.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Api(error) => error.code.exit_code(),
            Self::Unreachable { .. } | Self::Endpoint(EndpointError::Missing) => ExitCode::Unreachable,
            Self::Answer { .. } => ExitCode::Failure,
            Self::Endpoint(EndpointError::Malformed(_)) => ExitCode::Usage,
        }
    }

    /// What to do next, for a person.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Api(error) => error.hint.as_deref(),
            Self::Unreachable { .. } => {
                Some("it may be restarting: try again in a moment; `mlad doctor` looks for the cause")
            }
            Self::Answer { .. } | Self::Endpoint(_) => None,
        }
    }

    /// Whether the same call may succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
            || matches!(self, Self::Api(error) if error.code == ErrorCode::Unavailable)
    }
}
