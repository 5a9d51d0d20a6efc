//! Whether a ledger is as it must be: pure functions over the rows of its database, written apart from the code that
//! writes them. Nothing here mends anything, or knows how a slice is chosen.
//!
//! * [`check`] — every rule over all that the ledger remembers.
//! * `holders` — no column of a GPU has two holders, at any time; changes under way touch nothing that is held.
//! * `quota` — no grant went over the limits of its user and projects.
//! * `reserved` — nothing of others was granted where it would last into a reservation.
//! * `rows` — the rows agree with one another: requests, leases, slices, numbers, use.

mod holders;
mod quota;
mod reserved;
mod rows;

pub use reserved::{Reserved, Said};

use crate::{Account, Limits};
use serde::Serialize;
use std::fmt;

/// All rows of a ledger, as they were at one moment. Times are microseconds since 1970, UTC; memory is in MiB.
#[derive(Debug, Clone, Default)]
pub struct Records {
    /// Requests that wait, hold a lease, or are over.
    pub requests: Vec<Request>,
    /// Leases, released ones too.
    pub leases: Vec<Lease>,
    /// Slices of leases.
    pub slices: Vec<Slice>,
    /// Changes of GPUs that are under way.
    pub changes: Vec<Change>,
    /// What administrators want of users and projects, as it is now.
    pub accounts: Vec<Account>,
    /// What leases that are over have used.
    pub used: Vec<Used>,
    /// Space that is, or was, set aside.
    pub reserved: Vec<Reserved>,
    /// What each request said of its time.
    pub said: Vec<Said>,
    /// The greatest numbers given so far.
    pub counters: Counters,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Of which workload.
    pub workload: String,
    /// Its place in the order of arrival.
    pub seq: i64,
    /// Whose.
    pub user: String,
    /// The project it counts for.
    pub project: Option<String>,
    /// How many slices it is for.
    pub slices: i64,
    /// What it said of its user's limits.
    pub limits: Limits,
    /// When it was written down.
    pub requested_at: i64,
    /// When it was over.
    pub ended_at: Option<i64>,
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Its number.
    pub fence: i64,
    /// Who holds it.
    pub workload: String,
    /// The profile that was granted: a MIG profile's name, `gpu` or `cpu`.
    pub profile: String,
    /// Memory of each of its slices.
    pub memory_mib: i64,
    /// What of a GPU each slice is, in millionths: the larger of compute and memory.
    pub share: i64,
    /// When it was granted.
    pub granted_at: i64,
    /// When it was renewed last.
    pub renewed_at: i64,
    /// Until when that lasts.
    pub expires_at: i64,
    /// Since when it may not be renewed any more.
    pub over_at: Option<i64>,
    /// When its slices were free again.
    pub released_at: Option<i64>,
}

/// A slice of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Of which lease.
    pub fence: i64,
    /// UUID of its GPU.
    pub gpu: String,
    /// The driver's number of its profile.
    pub profile: i64,
    /// Its first column.
    pub start: i64,
    /// Its columns.
    pub size: i64,
    /// A whole GPU without MIG.
    pub whole: bool,
    /// When it was free again.
    pub released_at: Option<i64>,
}

/// A change of a GPU that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its number.
    pub id: i64,
    /// UUID of the GPU.
    pub gpu: String,
    /// What is destroyed: profile and start.
    pub destroys: Vec<(i64, i64)>,
    /// What is made: start and columns.
    pub makes: Option<(i64, i64)>,
}

/// What was used on a day, by a user for a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Days since 1970, UTC.
    pub day: i64,
    /// Whose.
    pub user: String,
    /// For which project; empty for none.
    pub project: String,
    /// Microseconds of slices.
    pub slice_us: i64,
}

/// The greatest numbers that were given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// To leases.
    pub fence: i64,
    /// To requests.
    pub seq: i64,
    /// To changes of GPUs.
    pub change: i64,
}

/// What a ledger is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// No column of a GPU is held twice at the same time.
    OneHolder,
    /// Every lease belongs to a request that was written down before.
    Asked,
    /// Fences only grow, and so do the numbers of requests and changes.
    Fences,
    /// No grant went over the limits of its user and projects in slices and memory.
    Quota,
    /// What is not released is held, whole, and what is released is free.
    Held,
    /// What happens to a lease happens in order.
    Times,
    /// A change of a GPU that is under way touches nothing that is held.
    Changes,
    /// What leases that are over have used is written down.
    Use,
    /// Nothing of others was granted where it would last into a reservation.
    Reserved,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OneHolder => "one-holder",
            Self::Asked => "asked",
            Self::Fences => "fences",
            Self::Quota => "quota",
            Self::Held => "held",
            Self::Times => "times",
            Self::Changes => "changes",
            Self::Use => "use",
            Self::Reserved => "reserved",
        })
    }
}

/// What in a ledger is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The rule that is broken.
    pub rule: Rule,
    /// What is known to have happened without any fault of the allocator can explain it; told, and no failure.
    pub explained: bool,
    /// What it is, with names and numbers.
    pub detail: String,
}

/// What may have happened to a ledger without any fault of the allocator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowance {
    /// The wall clock, whose times the ledger has, was set back by so many microseconds at most.
    pub clock_set_back_us: i64,
    /// Administrators may have lowered limits of users and projects, or moved projects, since something was granted.
    pub limits_changed: bool,
}

/// Everything in a ledger that is not as it must be, in the order of the rules.
pub fn check(records: &Records, allowance: Allowance) -> Vec<Finding> {
    let mut findings = Findings { allowance, found: Vec::new() };
    holders::check(records, &mut findings);
    rows::check(records, &mut findings);
    quota::check(records, &mut findings);
    reserved::check(records, &mut findings);
    let mut found = findings.found;
    found.sort_by_key(|finding| finding.rule);
    found
}

struct Findings {
    allowance: Allowance,
    found: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, rule: Rule, detail: String) {
        self.found.push(Finding { rule, explained: false, detail });
    }

    /// Whether `later` is not before `earlier`, as far as the clock can be relied on.
    fn in_order(&self, earlier: i64, later: i64) -> bool {
        later.saturating_add(self.allowance.clock_set_back_us) >= earlier
    }
}

#[cfg(test)]
mod tests;
