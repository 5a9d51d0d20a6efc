//! Who is next, and why the others wait: pure functions over the waiting requests, the time as an argument.
//!
//! * `order` — the order of the line: patience, priority, fair share, arrival.
//! * `account`, `meter` — users and projects: limits, what is held and has been used.
//! * `pass` — goes through the line once: who is granted what, who is kept space, who has to give way.
//! * `timeline` — which slots end when, and which space is kept for whom.
//! * `reservation` — where space is set aside for a time, and what is in the way of that.
//! * `ahead` — where and when a request finds space at the earliest; `preempt` — what would have to end for it.
//! * `text` — what a waiting person is told.
//!
//! A request that only limits hold back keeps nobody waiting. For one that waits for space, space is kept
//! (backfill, a setting), and those behind it are served as long as they do not take that. `cpu` waits for nothing.

mod account;
mod ahead;
mod meter;
mod order;
mod pass;
mod preempt;
mod reservation;
mod text;
mod timeline;

pub use account::{AccountId, Accounts, DEEPEST, LeafId, MOST_ACCOUNTS, Wanted};
pub use meter::Charge;
pub use order::Line;
pub use pass::{Decision, Grant, LOOK_AHEAD, Outlook, schedule};
pub use preempt::Preemption;
pub use reservation::{Booking, InTheWay, Reserved, in_the_way, places_for};
pub(crate) use text::TROUBLES;
pub use text::{Facts, Told, explain};
pub use timeline::Held;

use crate::{
    geometry::Resolution,
    placement::{Gang, Plan, Policy, Pool},
};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

/// A waiting request, as the queue sees it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its place in the order of arrival; unique.
    pub seq: u64,
    /// Whose it is.
    pub leaf: LeafId,
    /// Who has more is ahead.
    pub priority: i32,
    /// Since when it waits.
    pub since: Timestamp,
    /// What each of its slices is to be; none if no GPU here serves it any more.
    pub wanted: Option<Arc<Resolution>>,
    /// How many slices, and how they are to lie.
    pub gang: Gang,
    /// The nodes they may lie on; none for all.
    pub only_on: Option<Arc<BTreeSet<u32>>>,
    /// What of whole GPUs its slices are together, in millionths.
    pub share: u64,
    /// Its place has been chosen and is being made: it holds its space already.
    pub preparing: bool,
    /// Seconds it lasts at most, if that is known.
    pub expected_seconds: Option<u64>,
    /// The reservation in whose space, and in whose time, it is to be; none for the space of everybody.
    pub booking: Option<Booking>,
}

impl AsRef<Self> for Entry {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Entry {
    /// The reservation that it is for.
    pub(crate) fn reservation(&self) -> Option<u64> {
        self.booking.map(|booking| booking.id)
    }

    /// When it ends at the latest if it is granted at a time; none if that is not known.
    pub(crate) fn end(&self, granted: Timestamp) -> Option<Timestamp> {
        let expected = self.expected_seconds.and_then(|seconds| after(granted, seconds));
        expected.into_iter().chain(self.booking.map(|booking| booking.until)).min()
    }
}

/// Whether those behind somebody who waits for space are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backfill {
    /// Not from GPUs that could serve who is ahead.
    None,
    /// As long as they do not delay the first in line, for whom space is kept.
    #[default]
    Easy,
    /// As long as they delay nobody ahead: space is kept for each of the first in line.
    Conservative,
}

impl fmt::Display for Backfill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Easy => "easy",
            Self::Conservative => "conservative",
        })
    }
}

impl FromStr for Backfill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = [Self::None, Self::Easy, Self::Conservative].into_iter().find(|mode| mode.to_string() == text);
        found.ok_or_else(|| "backfill is none, easy or conservative".to_owned())
    }
}

/// What the line goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Whether those behind are served.
    pub backfill: Backfill,
    /// Who has waited for so long is ahead of everybody who has not.
    pub patience: SignedDuration,
    /// How long before its end a lease that has to give way is told.
    pub notice: SignedDuration,
}

/// Everything that is decided by, but for the space and the accounts.
pub struct Scene<'a> {
    /// The time.
    pub now: Timestamp,
    /// Where slices are placed.
    pub policy: &'a dyn Policy,
    /// What the line goes by.
    pub rules: Rules,
    /// Every slot that is held, asked for at most once.
    pub held: &'a dyn Fn() -> Vec<Held>,
    /// Space that is reserved, now or later.
    pub reserved: &'a [Reserved],
}

/// Why a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// With what is held already, it is over the limits of this user or project.
    Quota(AccountId),
    /// No space is free for it.
    Space,
    /// This earlier request is to have the space first.
    Behind(u64),
    /// Its place is being made.
    Preparing,
    /// No GPU that could serve it can be used now.
    NoGpu,
    /// What is free is set aside for this reservation.
    Reserved(u64),
    /// Its own reservation begins later.
    NotYet,
    /// All space of its own reservation is in use.
    Full,
}

/// Memory in MiB of what a plan gives.
pub fn memory_of(pool: &Pool, plan: &Plan) -> u64 {
    let model = pool.gpus().get(plan.gpu).and_then(|space| pool.models().get(space.model));
    model.and_then(|model| model.profile(plan.placed.profile)).map_or(0, |profile| profile.memory_mib)
}

/// What all slices of a request come to on GPUs of a model; none if nothing serves there, or there are none.
pub(crate) fn wanted_on(pool: &Pool, model: usize, entry: &Entry) -> Option<Wanted> {
    let profile = entry.wanted.as_ref()?.on(model)?;
    let model = pool.models().get(model)?;
    let slices = entry.gang.slices;
    Some(Wanted {
        slices,
        memory_mib: model.profile(profile)?.memory_mib.saturating_mul(u64::from(slices)),
        share: u64::from(model.share(profile).greater()) * u64::from(slices),
        expected_seconds: entry.expected_seconds,
    })
}

/// `seconds` after `time`; none beyond the end of time.
pub(crate) fn after(time: Timestamp, seconds: u64) -> Option<Timestamp> {
    time.checked_add(SignedDuration::from_secs(i64::try_from(seconds).ok()?)).ok()
}

#[cfg(test)]
mod tests;
