//! Reservations: space on GPUs that is set aside for some people from a time until another.

use super::{Need, Placement};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A reservation to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReservation {
    /// Its name: letters, digits, `-`, `_` and `.`, at most 64, no `.` first.
    pub name: String,
    /// What each of its slices is.
    pub need: Need,
    /// How many slices; 1 if absent.
    #[serde(default = "one")]
    pub slices: u32,
    /// When it begins; at once if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Timestamp>,
    /// When it ends.
    pub until: Timestamp,
    /// Users who may use it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub users: Vec<String>,
    /// Projects for which it may be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub projects: Vec<String>,
}

fn one() -> u32 {
    1
}

/// Space that is set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reservation {
    /// Its name.
    pub name: String,
    /// What each of its slices is.
    pub need: Need,
    /// How many slices.
    pub slices: u32,
    /// When it begins.
    pub from: Timestamp,
    /// When it ends, and with it whatever uses it.
    pub until: Timestamp,
    /// Users who may use it.
    pub users: Vec<String>,
    /// Projects for which it may be used.
    pub projects: Vec<String>,
    /// Where it is.
    pub places: Vec<ReservedSlice>,
    /// Whether it has begun.
    pub active: bool,
    /// Workloads that hold slices within it now.
    pub in_use: u32,
    /// Why it cannot be kept as it stands, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// When it was made.
    pub made_at: Timestamp,
}

/// One slice of a reservation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReservedSlice {
    /// The node.
    pub node: String,
    /// UUID of the GPU.
    pub gpu: String,
    /// Index of the GPU at the node's driver.
    pub gpu_index: u32,
    /// The profile's name; `gpu` for a whole one.
    pub profile: String,
    /// Where on the GPU; none for a whole GPU without MIG.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
}

/// Every reservation that is not over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReservationList {
    /// Those that begin first are first.
    pub reservations: Vec<Reservation>,
}
