//! The types of the HTTP API `/v1`: what travels as JSON between gateway, allocator, client and SDK.
//!
//! Pure data: no I/O, no clock. Times are [`jiff::Timestamp`] (RFC 3339 in JSON, microseconds at most),
//! memory is in MiB unless a name says otherwise.

mod authority;
mod error;
mod forwarding;
mod gpu;
mod history;
mod image;
mod job;
mod node;
mod project;
mod reservation;
mod user;
mod workspace;

pub use authority::{CertificateAuthority, NewCertificateAuthority, NewRevocation, Revocation, Revoked};
pub use error::{ApiError, ErrorCode, ExitCode};
pub use forwarding::Forwarding;
pub use gpu::{
    Ending, Gpu, GpuMap, Holder, Lease, LeasedSlice, Need, NeedError, Placement, ProfileRoom, Slice, SliceState, Wait,
    WaitReason,
};
pub use history::{Past, PastLease, Usage, UsageList};
pub use image::{Image, ImageList, NewImage};
pub use job::{
    Artifact, ArtifactList, Attempt, Job, JobEnd, JobId, JobList, JobReason, JobSpec, JobState, JobSubmitted,
};
pub use node::{NodeInfo, NodeList, NodeState};
pub use project::{DefaultProject, NewProject, Project, ProjectLimits, ProjectList, ProjectUse};
pub use reservation::{NewReservation, Reservation, ReservationList, ReservedSlice};
pub use user::{
    AuditEvent, AuditList, Identity, Invite, NewInvite, NewKey, NewToken, NewUser, Quota, Role, SshKey, Token, User,
    UserChange, UserList,
};
pub use workspace::{Workspace, WorkspaceExtension, WorkspaceList, WorkspaceState};
