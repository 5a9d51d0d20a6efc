//! Why somebody does not get their workspace, in words they can act on.

use crate::{runtime::RuntimeError, store::StoreError};
use mlad::api::{ApiError, ErrorCode, Need};
use mlad_allocator::AllocatorError;
use std::sync::Arc;

/// Why a workspace is not to be had. Everybody who waited for it gets the same one.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WorkspaceError {
    /// The name is none.
    #[error("`{0}` is no name of a workspace: 1 to 32 of a-z, 0-9, - and _")]
    Name(String),
    /// There is no such workspace.
    #[error("there is no workspace {0}")]
    NotFound(String),
    /// Nothing says which image.
    #[error("nothing says which image this workspace is to be made of")]
    NoImage,
    /// Nothing says which slice.
    #[error("nothing says which GPU slice this workspace is to have")]
    NoNeed,
    /// The catalog has no such image; the text names those it has.
    #[error("{0}")]
    Image(String),
    /// The slice is too small for the image.
    #[error("the image {image} needs {needed_mib} MiB of GPU memory, {need} has {has_mib} MiB")]
    ImageNeeds {
        /// The image.
        image: String,
        /// What it needs.
        needed_mib: u64,
        /// The slice asked for.
        need: Need,
        /// What that has.
        has_mib: u64,
    },
    /// What was asked for can never fit; the text names what would.
    #[error("{0}")]
    Impossible(String),
    /// The user's quota can never allow it.
    #[error("{0}")]
    Quota(String),
    /// The user is no member of such a project.
    #[error("there is no project {0} of which you are a member")]
    Project(String),
    /// It is in use and made of something else than was asked for.
    #[error("the workspace {name} is {state} with {what} {has}, not {wished}")]
    Differs {
        /// The workspace.
        name: String,
        /// `running`, `starting`, `waiting`.
        state: &'static str,
        /// `the image`, `the slice` or `the project`.
        what: &'static str,
        /// What it is made of.
        has: String,
        /// What was asked for.
        wished: String,
    },
    /// The user has as many as are allowed.
    #[error("you have {most} workspaces in use ({names}); that is the limit")]
    TooMany {
        /// The limit.
        most: u32,
        /// Their names.
        names: String,
    },
    /// It is not running, so that there is nothing to extend.
    #[error("the workspace {0} is not running")]
    NotRunning(String),
    /// Its place in the queue or its lease is over.
    #[error("the slice cannot be had: {0}")]
    Lease(String),
    /// Somebody or something stopped it meanwhile.
    #[error("the workspace was stopped: {0}")]
    Stopped(String),
    /// No slice within the time a login without a terminal waits.
    #[error("no slice within {seconds} seconds: {detail}")]
    Timeout {
        /// How long.
        seconds: u64,
        /// What was waited for.
        detail: String,
    },
    /// The home cannot be made ready.
    #[error("your home cannot be made ready: {0}")]
    Home(String),
    /// The allocator cannot answer.
    #[error(transparent)]
    Allocator(AllocatorError),
    /// The container engine.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The database.
    #[error(transparent)]
    Store(#[from] Arc<StoreError>),
    /// The gateway is being stopped.
    #[error("the gateway is being restarted")]
    ShuttingDown,
    /// A fault of the gateway.
    #[error("a fault inside the gateway; its log says more")]
    Internal,
}

impl From<StoreError> for WorkspaceError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<AllocatorError> for WorkspaceError {
    fn from(error: AllocatorError) -> Self {
        match error {
            AllocatorError::Impossible(text) => Self::Impossible(text),
            AllocatorError::Quota(text) => Self::Quota(text),
            AllocatorError::Ended(_) | AllocatorError::Fence(_) | AllocatorError::Unknown(_) => {
                Self::Lease(error.to_string())
            }
            error => Self::Allocator(error),
        }
    }
}

impl WorkspaceError {
    /// Its code in the API.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Name(_) | Self::NoImage | Self::NoNeed => ErrorCode::BadRequest,
            Self::NotFound(_) | Self::Image(_) | Self::Project(_) => ErrorCode::NotFound,
            Self::ImageNeeds { .. } | Self::Impossible(_) => ErrorCode::Impossible,
            Self::Quota(_) | Self::TooMany { .. } => ErrorCode::Quota,
            Self::Differs { .. } | Self::NotRunning(_) | Self::Lease(_) | Self::Stopped(_) => ErrorCode::Conflict,
            Self::Timeout { .. } | Self::Allocator(_) | Self::ShuttingDown => ErrorCode::Unavailable,
            Self::Runtime(RuntimeError::Unavailable(_)) => ErrorCode::Unavailable,
            Self::Runtime(_) | Self::Home(_) | Self::Internal => ErrorCode::Internal,
            Self::Store(error) => match **error {
                StoreError::NotFound { .. } => ErrorCode::NotFound,
                StoreError::Conflict(_) => ErrorCode::Conflict,
                _ => ErrorCode::Unavailable,
            },
        }
    }

    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Name(_) => "name it in the login: ssh mlad+NAME@server".into(),
            Self::NotFound(_) => "`mlad workspace ls` lists yours".into(),
            Self::Project(_) => "`mlad project ls` lists yours; an administrator makes somebody a member".into(),
            Self::NoImage => "name one: ssh -o SetEnv=MLAD_IMAGE=IMAGE …; `mlad image ls` lists them".into(),
            Self::NoNeed => "name one: ssh -o SetEnv=MLAD_GPU=1g.5gb … (a profile, 10G, gpu or cpu)".into(),
            Self::Image(_) => "name another: ssh -o SetEnv=MLAD_IMAGE=IMAGE …".into(),
            Self::ImageNeeds { needed_mib, .. } => {
                format!("ask for more: MLAD_GPU={needed_mib}MiB, or take another image")
            }
            Self::Impossible(_) => {
                "name another: ssh -o SetEnv=MLAD_GPU=1g.5gb …; `mlad gpu` shows what there is".into()
            }
            Self::Quota(_) => "ask for less, or ask an administrator for more; `mlad quota` shows yours".into(),
            Self::Differs { name, .. } => {
                format!("stop it first (`mlad workspace stop {name}`), or log in to another one: ssh mlad+other@server")
            }
            Self::TooMany { .. } => "stop one of them: `mlad workspace stop NAME`".into(),
            Self::NotRunning(_) => "log in to start it".into(),
            Self::Lease(_) | Self::Stopped(_) => "log in again to ask anew".into(),
            Self::Timeout { .. } => "`mlad why` says what blocks it; `mlad submit` waits for you".into(),
            Self::Runtime(RuntimeError::Image { .. }) => "take another image, or tell an administrator".into(),
            Self::Home(_) | Self::Internal | Self::Runtime(RuntimeError::Start { .. }) => {
                "tell an administrator".into()
            }
            Self::Allocator(_) | Self::Runtime(_) | Self::Store(_) | Self::ShuttingDown => {
                "try again in a moment".into()
            }
        })
    }
}

impl From<WorkspaceError> for ApiError {
    fn from(error: WorkspaceError) -> Self {
        Self { code: error.code(), message: error.to_string(), hint: error.hint() }
    }
}
