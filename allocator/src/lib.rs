//! Who holds which slice of which GPU.
//!
//! The gateway speaks to [`Allocate`] and does not know whether it is embedded or a service elsewhere.
//!
//! * `geometry` — GPU models, profiles, placements: pure.
//! * `placement` — which slot a request gets: pure.
//! * `queue` — who is next and why others wait: pure.
//! * `lease` — the ledger of leases and waiting requests, in the database.
//! * `node` — inventory and repartitioning through NVML.
//! * `proof` — whether a ledger is as it must be: pure.
//! * `simulation` — how good policies are, on simulated requests: pure.
//! * `remote` — GPUs of other machines: their daemons, and who hears them here.
//! * `service` — the same over HTTP, server and client.

mod error;
pub mod geometry;
mod lease;
pub mod node;
pub mod placement;
pub mod proof;
pub mod queue;
pub mod remote;
pub mod service;
pub mod simulation;

pub use error::AllocatorError;
pub use lease::{Embedded, Gpus, QueueSettings, Settings, read_records};

use async_trait::async_trait;
use jiff::{Timestamp, civil::Date};
use mlad::api::{GpuMap, Lease, Need, NewReservation, NodeInfo, Past, Reservation, UsageList, Wait};
use serde::{Deserialize, Serialize};

/// A request for slices. Its key is the workload: asking again for the same workload changes nothing and
/// answers with what became of the first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The workload that will hold the lease (`w-12-3`, `j-7-1`): at most 128 letters, digits, `-`, `_` and `.`,
    /// no `.` first.
    pub workload: String,
    /// The user it belongs to.
    pub user: String,
    /// What each of its slices is to be.
    pub need: Need,
    /// How many slices it is to have, 1 to [`Self::MOST_SLICES`]: all at once or none, and all on GPUs of one model.
    #[serde(default = "one")]
    pub slices: u32,
    /// On how many nodes, the same number of slices on each; none for wherever there is room.
    #[serde(default)]
    pub nodes: Option<u32>,
    /// It is over, after a warning, if no process uses its slices for so many seconds; none for never.
    #[serde(default)]
    pub idle_seconds: Option<u64>,
    /// The only node it may be served from; none for any.
    #[serde(default)]
    pub node: Option<String>,
    /// The project it counts for, beside its user.
    #[serde(default)]
    pub project: Option<String>,
    /// Who asks with more is ahead: -100 to 100.
    #[serde(default)]
    pub priority: i32,
    /// It may be ended, with notice, for a request of greater priority.
    #[serde(default)]
    pub preemptible: bool,
    /// Limits of the user over everything they hold, enforced at the grant. The last that were told count for all
    /// of the user's requests.
    pub limits: Limits,
    /// Seconds until the workload is known to end at the latest, for estimates and backfill; none if that is not
    /// known.
    pub expected_seconds: Option<u64>,
    /// The reservation in whose space, and time, it is to be.
    #[serde(default)]
    pub reservation: Option<String>,
}

fn one() -> u32 {
    1
}

impl LeaseRequest {
    /// The most slices of one request.
    pub const MOST_SLICES: u32 = 1024;
    /// The greatest priority; the least is its negative.
    pub const GREATEST_PRIORITY: i32 = 100;

    /// A request for one slice, without limits, of a length that is not known.
    pub fn new(workload: impl Into<String>, user: impl Into<String>, need: Need) -> Self {
        Self {
            workload: workload.into(),
            user: user.into(),
            need,
            slices: 1,
            nodes: None,
            idle_seconds: None,
            node: None,
            project: None,
            priority: 0,
            preemptible: false,
            limits: Limits::default(),
            expected_seconds: None,
            reservation: None,
        }
    }
}

/// Whether a text can name a workload.
pub fn is_workload_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=128).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(allowed)
}

/// What one user, or the members of one project together, may hold at once, and use up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Slices and whole GPUs; none for no limit.
    pub slices: Option<u32>,
    /// GPU memory in MiB; none for no limit.
    pub gpu_memory_mib: Option<u64>,
    /// Seconds of GPUs in [`PERIOD_DAYS`] days, a slice counting as the larger of its shares of compute and memory;
    /// none for no limit.
    #[serde(default)]
    pub gpu_seconds: Option<u64>,
}

/// Over so many days, today included, GPU time is counted against its limit. Days begin at midnight, UTC.
pub const PERIOD_DAYS: u32 = 30;

/// Whose holdings are limited together, and whose share of the GPUs is fair.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "name")]
pub enum AccountName {
    /// A user, in whatever project.
    User(String),
    /// A project: its members, and projects within it.
    Project(String),
}

/// A user or a project, as administrators want it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Which.
    pub name: AccountName,
    /// The project that a project lies in, whose limits hold for it too; none for users.
    #[serde(default)]
    pub parent: Option<String>,
    /// Its fair share, against those beside it: 1 to 1,000,000.
    pub shares: u32,
    /// Its limits.
    pub limits: Limits,
}

/// A user or a project, and what of its limits is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AccountState {
    /// What administrators want.
    pub account: Account,
    /// Slices it holds now, those being made included.
    pub slices: u32,
    /// GPU memory it holds now, in MiB.
    pub gpu_memory_mib: u64,
    /// GPU time used in the period, in seconds.
    pub gpu_seconds: u64,
    /// GPU time that what runs may still use, in seconds, as far as its end is known.
    pub committed_gpu_seconds: u64,
    /// Used GPU time, in seconds, that fades with the half-life: what fair share goes by.
    pub faded_gpu_seconds: f64,
}

/// What a need comes to on the GPUs there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    /// The profile: a MIG profile's name, `gpu` or `cpu`.
    pub profile: String,
    /// Its memory in MiB; 0 for `cpu`.
    pub memory_mib: u64,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseState {
    /// It waits.
    Waiting(Wait),
    /// It holds its slices.
    Granted(Lease),
    /// The lease is over (released, expired, revoked) or the wait was given up.
    Ended {
        /// Why, in words.
        reason: String,
    },
}

/// The allocator, wherever it runs.
#[async_trait]
pub trait Allocate: Send + Sync + 'static {
    /// What a need comes to.
    ///
    /// # Errors
    /// [`AllocatorError::Impossible`] when no GPU here can ever fit it, naming what would.
    async fn resolve(&self, need: &Need) -> Result<Resolved, AllocatorError>;

    /// Asks for slices. Durable when it returns; idempotent by workload.
    ///
    /// # Errors
    /// [`AllocatorError::Impossible`] when it can never fit; [`AllocatorError::Ended`] when a request of
    /// that workload has already ended.
    async fn request(&self, request: &LeaseRequest) -> Result<LeaseState, AllocatorError>;

    /// What became of the request of `workload`.
    ///
    /// # Errors
    /// [`AllocatorError::Unknown`] when there was none.
    async fn state(&self, workload: &str) -> Result<LeaseState, AllocatorError>;

    /// Keeps a lease. Only its own fence can. One that has expired, and whose slice nobody was given since, is
    /// in force again.
    ///
    /// # Errors
    /// [`AllocatorError::Ended`] when it is over, [`AllocatorError::Fence`] when the fence is another's.
    async fn renew(&self, workload: &str, fence: u64) -> Result<Lease, AllocatorError>;

    /// Gives the lease, or the place in the queue, back. To be called when no container of the workload is
    /// left. Idempotent; an unknown workload is no error.
    ///
    /// # Errors
    /// When the allocator cannot be reached or cannot write it down.
    async fn release(&self, workload: &str) -> Result<(), AllocatorError>;

    /// Ends the lease, or the wait, of `workload` for `reason`: it cannot be renewed any more, so that whoever
    /// runs the workload ends it. Its slice is free once [`Self::release`] confirms that; with `free` at once,
    /// for a holder that never comes back — the caller answers for it that nothing uses the slice any more.
    /// Idempotent; an unknown workload is no error.
    ///
    /// # Errors
    /// When the allocator cannot be reached or cannot write it down.
    async fn revoke(&self, workload: &str, reason: &str, free: bool) -> Result<(), AllocatorError>;

    /// Every lease that holds its slices, by workload; one with `expires_at` in the past has expired and keeps
    /// them until it is renewed, released or revoked.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn leases(&self) -> Result<Vec<Lease>, AllocatorError>;

    /// Every waiting request, first in line first.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn waits(&self) -> Result<Vec<Wait>, AllocatorError>;

    /// Every GPU and what is on it.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn map(&self) -> Result<GpuMap, AllocatorError>;

    /// Sets shares and limits of these users and projects; others stay as they are. In force at once, for what
    /// waits too; what is held already is not taken away.
    ///
    /// # Errors
    /// [`AllocatorError::Invalid`] when a project lies within itself, or more are named than are taken.
    async fn set_accounts(&self, accounts: &[Account]) -> Result<(), AllocatorError>;

    /// Every user and project that is known, and what of its limits is used.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn accounts(&self) -> Result<Vec<AccountState>, AllocatorError>;

    /// The machines with GPUs.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn nodes(&self) -> Result<Vec<NodeInfo>, AllocatorError>;

    /// Forgets a node that is lost and has no leases any more.
    ///
    /// # Errors
    /// [`AllocatorError::Unknown`] when there is no such node, [`AllocatorError::Invalid`] when it may still be in use.
    async fn forget_node(&self, node: &str) -> Result<(), AllocatorError>;

    /// Who held slices at a time, now included.
    ///
    /// # Errors
    /// When the allocator cannot be reached, or cannot read it.
    async fn past(&self, at: Timestamp) -> Result<Past, AllocatorError>;

    /// What was used from one day to another, both included, by day, user and project, with what is held still.
    ///
    /// # Errors
    /// [`AllocatorError::Invalid`] when that is no span of time, or a longer one than is kept.
    async fn usage(&self, from: Date, to: Date) -> Result<UsageList, AllocatorError>;

    /// A GPU, by its UUID, is trusted again after a critical error: its slices are granted. Idempotent.
    ///
    /// # Errors
    /// [`AllocatorError::Unknown`] when there is no such GPU.
    async fn trust_gpu(&self, gpu: &str) -> Result<(), AllocatorError>;
    /// Sets space aside for some people from a time until another. Durable when it returns; the same again changes
    /// nothing.
    ///
    /// # Errors
    /// [`AllocatorError::Reservation`] when leases that last into it or other reservations are in the way, or
    /// another has its name; [`AllocatorError::Impossible`] when the GPUs never have so much.
    async fn reserve(&self, new: &NewReservation) -> Result<Reservation, AllocatorError>;

    /// Sets space aside no longer. What runs in it goes on until its end; what waits for it is over. None of that
    /// name is no error.
    ///
    /// # Errors
    /// When the allocator cannot be reached or cannot write it down.
    async fn cancel_reservation(&self, name: &str) -> Result<(), AllocatorError>;

    /// Every reservation that is not over, those that begin first first.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn reservations(&self) -> Result<Vec<Reservation>, AllocatorError>;

    /// Returns when leases, waits or GPUs have changed since version `seen` (at once if they already have),
    /// with the version now. Begin with 0. Versions begin anew when the allocator restarts.
    ///
    /// # Errors
    /// When the allocator cannot be reached.
    async fn changed(&self, seen: u64) -> Result<u64, AllocatorError>;
}
