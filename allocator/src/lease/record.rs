//! What the ledger remembers, and what it writes down.

use crate::{Account, Limits, geometry::Share, node::Change, queue::Booking};
use jiff::Timestamp;
use mlad::api::{Need, Placement};
use std::{sync::Arc, time::Duration};

/// The time, by two clocks: the wall's for people, and one that only goes forward for deadlines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Now {
    pub(super) wall: Timestamp,
    pub(super) steady: Duration,
}

/// A request that waits, or waited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RequestRow {
    pub(super) workload: String,
    /// Its place in the order of arrival.
    pub(super) seq: u64,
    pub(super) user: Arc<str>,
    pub(super) need: Need,
    /// How many slices, and on how many nodes if that matters.
    pub(super) slices: u32,
    pub(super) nodes: Option<u32>,
    pub(super) project: Option<Arc<str>>,
    /// It is over if it is not used for so long.
    pub(super) idle_seconds: Option<u64>,
    /// The only node it may be served from, if there is one.
    pub(super) on_node: Option<Arc<str>>,
    pub(super) priority: i32,
    pub(super) preemptible: bool,
    /// What the need came to when it was asked.
    pub(super) profile: String,
    pub(super) limits: Limits,
    pub(super) expected_seconds: Option<u64>,
    pub(super) requested_at: Timestamp,
    /// The reservation that it is for.
    pub(super) booked: Option<Booked>,
}

/// What a request has of its reservation, also when that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Booked {
    pub(super) booking: Booking,
    pub(super) name: Arc<str>,
}

/// Space that is set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReservationRow {
    pub(super) booking: Booking,
    pub(super) name: Arc<str>,
    /// What each of its slices is.
    pub(super) need: Need,
    pub(super) users: Vec<String>,
    pub(super) projects: Vec<String>,
    pub(super) made_at: Timestamp,
    /// Where it is now.
    pub(super) slots: Vec<ReservedSlot>,
}

/// A slice of a reservation, by its identity: GPU, profile and start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ReservedSlot {
    pub(super) node: String,
    /// UUID of the GPU.
    pub(super) gpu: String,
    pub(super) gpu_index: u32,
    /// The driver's number of the profile.
    pub(super) profile: u32,
    pub(super) placement: Placement,
    /// A whole GPU without MIG.
    pub(super) whole: bool,
    pub(super) chosen_at: Timestamp,
}

/// A lease that holds, or held, its slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LeaseRow {
    pub(super) fence: u64,
    pub(super) request: RequestRow,
    pub(super) node: String,
    /// The profile granted: a MIG profile's name, `gpu` or `cpu`.
    pub(super) profile: String,
    /// Memory of each slice.
    pub(super) memory_mib: u64,
    /// What of a GPU each slice is.
    pub(super) share: Share,
    /// What it holds, all on GPUs of one model; nothing for `cpu`.
    pub(super) slices: Vec<SliceRow>,
    pub(super) granted_at: Timestamp,
    pub(super) renewed_at: Timestamp,
    pub(super) expires_at: Timestamp,
    pub(super) status: Status,
    /// It is to end at a time, for a reason: its holder has been given notice.
    pub(super) ending: Option<Ending>,
}

/// Notice that a lease ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ending {
    pub(super) at: Timestamp,
    pub(super) reason: String,
}

/// A slice, by its identity: GPU, profile and start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SliceRow {
    /// The node of the GPU.
    pub(super) node: String,
    /// UUID of the GPU.
    pub(super) gpu: String,
    pub(super) gpu_index: u32,
    /// The driver's number of the profile.
    pub(super) profile: u32,
    pub(super) placement: Placement,
    /// A whole GPU without MIG.
    pub(super) whole: bool,
    /// The UUID a container sees, as it was last read.
    pub(super) uuid: String,
}

/// How a lease that holds its slice stands.
///
/// ```text
/// Active ⇄ Expired        the deadline passes; its holder comes back and renews
/// Active, Expired → Over  revoked, or the slice vanished
/// any → released          (then it is history)
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Status {
    /// It is renewed in time.
    Active,
    /// Nobody renewed it in time; its container may still run.
    Expired,
    /// It may not be renewed any more, for this reason; its container may still run.
    Over(String),
}

/// What leases have used on one day, by user and project. Times are microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UsedRow {
    /// Days since 1970, UTC.
    pub(super) day: i32,
    pub(super) user: Arc<str>,
    pub(super) project: Option<Arc<str>>,
    /// Of slices.
    pub(super) slice_us: u64,
    /// Of whole GPUs: each slice counting by its share of the compute slices, of the memory, and by the larger of
    /// both.
    pub(super) compute_us: u64,
    pub(super) memory_us: u64,
    pub(super) gpu_us: u64,
    /// Leases that ended on that day.
    pub(super) leases: u64,
}

/// A change of a GPU that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repartition {
    pub(super) gpu: String,
    pub(super) change: Change,
    pub(super) purpose: Purpose,
}

/// What a change is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To grant the request with this place in the order, of this workload.
    Grant(u64, String),
    /// To complete, or to get rid of, an instance in doubt: profile and start.
    Repair(u32, u32),
}

/// A node with a daemon of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeRow {
    pub(super) name: String,
    /// What tells the machine from others.
    pub(super) machine: String,
    /// Changes with every start of the machine.
    pub(super) boot: String,
    /// Under which its daemon joined last.
    pub(super) fence: u64,
    /// When it joined, or was lost.
    pub(super) at: Timestamp,
    pub(super) lost: bool,
}

/// A GPU on which nothing is granted any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QuarantineRow {
    /// UUID of the GPU.
    pub(super) gpu: String,
    pub(super) node: String,
    /// The start of the machine since which it is so.
    pub(super) boot: String,
    pub(super) reason: String,
    pub(super) at: Timestamp,
}

/// Something to be written down. A batch of them is one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Write {
    /// A request that waits.
    Request(RequestRow),
    /// It was given up, or refused in the end.
    GiveUp { workload: String, at: Timestamp, reason: String },
    /// It is granted.
    Grant(Box<LeaseRow>),
    /// The lease was renewed.
    Renew { fence: u64, at: Timestamp, expires_at: Timestamp },
    /// The lease was not renewed in time.
    Expire { fence: u64, at: Timestamp },
    /// The lease may not be renewed any more.
    Over { fence: u64, at: Timestamp, reason: String },
    /// The lease has notice that it ends, or not any more.
    Ending { fence: u64, ending: Option<Ending> },
    /// What administrators want of a user or a project.
    Account(Account),
    /// The slices are free again; what was used of them is added to what their user has used before.
    Release { fence: u64, workload: String, at: Timestamp, reason: String, used: Vec<UsedRow> },
    /// The slice at this position of a lease has another UUID or index now.
    Slice { fence: u64, position: usize, slice: SliceRow },
    /// Space is set aside.
    Reserve(Box<ReservationRow>),
    /// A slice of a reservation, by its position, is somewhere else now.
    Move { id: u64, position: usize, slot: ReservedSlot, at: Timestamp },
    /// A reservation is over.
    Unreserve { id: u64, at: Timestamp },
    /// A GPU is about to be changed.
    Begin { repartition: Repartition, at: Timestamp },
    /// A node joined, or is lost.
    Node(NodeRow),
    /// A GPU is not to be trusted.
    Quarantine(QuarantineRow),
    /// It is again.
    Trust { gpu: String },
    /// A node is forgotten.
    Forget { node: String },
    /// It has been, or could not be.
    Finish { id: u64 },
}
