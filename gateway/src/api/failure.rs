//! What goes wrong in a room, as the API says it: code, message and hint.

use crate::{
    files::FilesError, image::ImageError, job::JobError, runtime::RuntimeError, ssh::KeyError, store::StoreError,
    workspace::WorkspaceError,
};
use axum::{
    Json,
    extract::rejection::{JsonRejection, PathRejection, QueryRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use mlad::api::{ApiError, ErrorCode};
use mlad_allocator::AllocatorError;

/// An answer that is not a success.
#[derive(Debug)]
pub(super) struct Failure(pub(super) ApiError);

pub(super) type Answer<T> = Result<T, Failure>;

impl Failure {
    pub(super) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ApiError::new(code, message))
    }

    pub(super) fn hint(self, hint: impl Into<String>) -> Self {
        Self(self.0.hint(hint))
    }

    /// There is no such thing, or the caller may not know of it.
    pub(super) fn not_found(kind: &str, name: impl std::fmt::Display) -> Self {
        let name: String = name.to_string().chars().filter(|letter| !letter.is_control()).take(128).collect();
        Self::new(ErrorCode::NotFound, format!("there is no {kind} {name}"))
    }

    /// Something of ours failed: the operator is told what, the caller that it did.
    fn internal(error: &dyn std::fmt::Display) -> Self {
        tracing::error!(%error, "an API call failed");
        Self::new(ErrorCode::Internal, "the gateway failed; its log says why").hint("tell an administrator")
    }

    fn unavailable(message: String) -> Self {
        Self::new(ErrorCode::Unavailable, message).hint("try again in a moment")
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { kind, name } => Self::not_found(kind, name),
            StoreError::Conflict(text) => Self::new(ErrorCode::Conflict, text),
            // The disk may be full, or somebody may hold the file: not for the caller to know more.
            StoreError::Database(error) => {
                tracing::error!(%error, "the database failed");
                Self::unavailable("the gateway's database does not answer; its log says why".into())
            }
            error => Self::internal(&error),
        }
    }
}

impl From<AllocatorError> for Failure {
    fn from(error: AllocatorError) -> Self {
        let message = error.to_string();
        match error {
            AllocatorError::Impossible(_) => {
                Self::new(ErrorCode::Impossible, message).hint("`mlad gpu` shows what there is")
            }
            AllocatorError::Quota(_) => Self::new(ErrorCode::Quota, message).hint("`mlad quota` shows yours"),
            AllocatorError::Invalid(_) => Self::new(ErrorCode::BadRequest, message),
            AllocatorError::TooMany(_) => Self::new(ErrorCode::TooMany, message),
            AllocatorError::Unknown(_) => Self::new(ErrorCode::NotFound, message),
            AllocatorError::Ended(_) | AllocatorError::Fence(_) => Self::new(ErrorCode::Conflict, message),
            AllocatorError::Reservation(_) => {
                Self::new(ErrorCode::Conflict, message).hint("`mlad reservations` shows those you may use")
            }
            AllocatorError::Driver(_)
            | AllocatorError::Store(_)
            | AllocatorError::Settings(_)
            | AllocatorError::Unreachable { .. } => {
                tracing::warn!(%error, "the allocator does not do what it should");
                Self::unavailable("the allocator does not answer".into())
            }
        }
    }
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        let message = error.to_string();
        match error {
            RuntimeError::Unavailable(_) => {
                tracing::warn!(%error, "the container engine does not answer");
                Self::unavailable("the container engine does not answer".into())
            }
            RuntimeError::Gone(_) => Self::new(ErrorCode::NotFound, message),
            RuntimeError::Image { .. } => Self::new(ErrorCode::Conflict, message),
            RuntimeError::Start { .. } | RuntimeError::Agent { .. } | RuntimeError::Host(_) => Self::internal(&error),
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        let message = error.to_string();
        match error {
            ImageError::Unknown { .. } => {
                Self::new(ErrorCode::NotFound, message).hint("`mlad image ls` lists the images")
            }
            ImageError::Invalid(_) | ImageError::File { .. } => Self::new(ErrorCode::BadRequest, message),
            ImageError::Store(error) => error.into(),
            ImageError::Runtime(error) => error.into(),
        }
    }
}

impl From<FilesError> for Failure {
    fn from(error: FilesError) -> Self {
        let message = error.to_string();
        match error {
            FilesError::Path { source, path } if source.kind() == std::io::ErrorKind::NotFound => {
                Self::not_found("file", path.display())
            }
            FilesError::Path { .. } => Self::new(ErrorCode::NotFound, message),
            FilesError::Refused { .. } => {
                Self::new(ErrorCode::NotFound, message).hint("put a file or folder of your own in its place")
            }
            FilesError::Bound { .. } => {
                Self::new(ErrorCode::Conflict, message).hint("fetch them by sftp, or pack them into one file")
            }
            error => Self::internal(&error),
        }
    }
}

impl From<WorkspaceError> for Failure {
    fn from(error: WorkspaceError) -> Self {
        if error.code() == ErrorCode::Internal {
            tracing::error!(%error, "a workspace cannot go on");
        }
        Self(error.into())
    }
}

impl From<KeyError> for Failure {
    fn from(error: KeyError) -> Self {
        Self::new(ErrorCode::BadRequest, error.to_string())
    }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        let message = error.to_string();
        match error {
            JobError::Spec(_) => Self::new(ErrorCode::BadRequest, message),
            JobError::NoImage => Self::new(ErrorCode::BadRequest, message)
                .hint("name one with --image; `mlad image ls` lists the images"),
            JobError::Impossible(_) => Self::new(ErrorCode::Impossible, message).hint("`mlad gpu` shows what there is"),
            JobError::OverQuota(_) => Self::new(ErrorCode::Quota, message).hint("`mlad quota` shows yours"),
            JobError::Project(_) => Self::new(ErrorCode::NotFound, message)
                .hint("`mlad project ls` lists yours; an administrator makes somebody a member"),
            JobError::Priority { .. } => {
                Self::new(ErrorCode::Denied, message).hint("an administrator may allow more: `mlad admin user quota`")
            }
            JobError::TooMany { .. } => {
                Self::new(ErrorCode::Quota, message).hint("wait for some to end, or cancel some: `mlad cancel ID`")
            }
            JobError::KeyUsed(_) => Self::new(ErrorCode::Conflict, message).hint("take another key"),
            JobError::State { .. } => Self::new(ErrorCode::Conflict, message),
            JobError::Image(error) => error.into(),
            JobError::Allocator(error) => error.into(),
            JobError::Runtime(error) => error.into(),
            JobError::Store(error) => error.into(),
            JobError::Files(error) => error.into(),
            JobError::Read(_) => Self::internal(&message),
            JobError::Stopping => Self::unavailable(message),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::internal(&error)
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        Self::rejected(rejection.status(), &rejection.body_text())
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self::rejected(rejection.status(), &rejection.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Self::rejected(rejection.status(), &rejection.body_text())
    }
}

impl Failure {
    fn rejected(status: StatusCode, text: &str) -> Self {
        if status.is_server_error() {
            return Self::internal(&text);
        }
        Self::new(ErrorCode::BadRequest, text)
    }
}
