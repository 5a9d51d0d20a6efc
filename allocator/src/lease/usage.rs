//! What a lease has used, day by day, for accounts, fair shares and GPU-hours: pure.
//!
//! Days begin at midnight, UTC. A slice counts as what of its GPU it is, by compute slices, by memory, and by the
//! larger of both. What is less than a microsecond is never lost between two days: the days of a lease add up to
//! the whole of it.

use super::record::{LeaseRow, UsedRow};
use crate::AllocatorError;
use jiff::{Timestamp, civil::Date, tz::TimeZone};
use mlad::api::Usage;
use std::sync::Arc;

/// So many days of use are kept, today included.
pub(super) const KEPT_DAYS: i32 = 800;

const DAY_US: i64 = 86_400_000_000;
/// Shares of a GPU are in millionths.
const WHOLE: u128 = 1_000_000;

/// The day of a time, counted from 1970, UTC.
pub(super) fn day_of(time: Timestamp) -> i32 {
    i32::try_from(time.as_microsecond().div_euclid(DAY_US)).unwrap_or(i32::MAX)
}

/// The number of a day, counted from 1970.
pub(super) fn day_number(date: Date) -> i32 {
    date.to_zoned(TimeZone::UTC).map_or(i32::MAX, |midnight| day_of(midnight.timestamp()))
}

/// The day of that number.
///
/// # Errors
/// [`AllocatorError::Store`] for a number that no day has.
pub(super) fn date(day: i32) -> Result<Date, AllocatorError> {
    let midnight = Timestamp::from_microsecond(i64::from(day).saturating_mul(DAY_US));
    let midnight = midnight.map_err(|error| AllocatorError::Store(error.to_string()))?;
    Ok(midnight.to_zoned(TimeZone::UTC).date())
}

/// Sums of what was used, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Used {
    slice_us: u64,
    compute_us: u64,
    memory_us: u64,
    gpu_us: u64,
    leases: u64,
}

impl Used {
    /// Adds a row.
    pub(super) fn add(&mut self, row: &UsedRow) {
        self.slice_us = self.slice_us.saturating_add(row.slice_us);
        self.compute_us = self.compute_us.saturating_add(row.compute_us);
        self.memory_us = self.memory_us.saturating_add(row.memory_us);
        self.gpu_us = self.gpu_us.saturating_add(row.gpu_us);
        self.leases = self.leases.saturating_add(row.leases);
    }

    /// In seconds, for a day, a user and a project.
    pub(super) fn told(self, day: Date, user: &str, project: Option<&str>) -> Usage {
        let seconds = |micros: u64| micros.saturating_add(500_000) / 1_000_000;
        Usage {
            day: Some(day),
            user: Some(user.to_owned()),
            project: project.map(str::to_owned),
            slice_seconds: seconds(self.slice_us),
            compute_seconds: seconds(self.compute_us),
            memory_seconds: seconds(self.memory_us),
            gpu_seconds: seconds(self.gpu_us),
            leases: self.leases,
        }
    }
}

/// What a lease has used when it is over at `released`, with the lease itself counted on that day.
pub(super) fn of(lease: &LeaseRow, released: Timestamp) -> Vec<UsedRow> {
    let mut days = until(lease, released);
    if let Some(last) = days.last_mut() {
        last.leases = 1;
    }
    days
}

/// What a lease has used until `until`: a row for every day that it touches, at least one and at most
/// [`KEPT_DAYS`]; what is longer ago would be forgotten at once.
pub(super) fn until(lease: &LeaseRow, until: Timestamp) -> Vec<UsedRow> {
    let end = until.as_microsecond();
    // A clock that was set back between grant and end has counted nothing.
    let begin = lease.granted_at.as_microsecond().min(end);
    let last = day_of(until);
    let first = begin.div_euclid(DAY_US).max(i64::from(last) - i64::from(KEPT_DAYS - 1));
    let mut day = first;
    let mut rows = Vec::new();
    while day <= i64::from(last) {
        // The moment of the end is on its day, even at midnight.
        let from = day.saturating_mul(DAY_US).max(begin);
        let to = day.saturating_add(1).saturating_mul(DAY_US).min(end);
        rows.push(row(lease, day, elapsed(begin, from), elapsed(begin, to)));
        day += 1;
    }
    rows
}

fn elapsed(begin: i64, at: i64) -> u64 {
    u64::try_from(at.saturating_sub(begin)).unwrap_or(0)
}

/// What a lease has used between two times of its life, both in microseconds from its beginning.
fn row(lease: &LeaseRow, day: i64, from: u64, to: u64) -> UsedRow {
    let slices = lease.slices.len() as u128;
    let between = |share: u128| {
        let so_far = |at: u64| u128::from(at).saturating_mul(slices).saturating_mul(share) / WHOLE;
        u64::try_from(so_far(to).saturating_sub(so_far(from))).unwrap_or(u64::MAX)
    };
    UsedRow {
        day: i32::try_from(day).unwrap_or(i32::MAX),
        user: Arc::clone(&lease.request.user),
        project: lease.request.project.clone(),
        slice_us: between(WHOLE),
        compute_us: between(lease.share.compute.into()),
        memory_us: between(lease.share.memory.into()),
        gpu_us: between(lease.share.greater().into()),
        leases: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Limits,
        geometry::Share,
        lease::record::{RequestRow, SliceRow, Status},
    };
    use mlad::api::{Need, Placement};
    use proptest::prelude::*;

    fn time(micros: i64) -> Timestamp {
        Timestamp::from_microsecond(micros).unwrap()
    }

    fn lease(granted: i64, slices: usize, share: Share) -> LeaseRow {
        let request = RequestRow {
            workload: "w-1-1".to_owned(),
            seq: 1,
            user: "alice".into(),
            need: Need::Gpu,
            slices: 1,
            nodes: None,
            project: Some("vision".into()),
            idle_seconds: None,
            on_node: None,
            priority: 0,
            preemptible: false,
            profile: "gpu".to_owned(),
            limits: Limits::default(),
            expected_seconds: None,
            booked: None,
            requested_at: time(granted),
        };
        let slice = SliceRow {
            node: "node-1".to_owned(),
            gpu: "GPU-0".to_owned(),
            gpu_index: 0,
            profile: 0,
            placement: Placement { start: 0, size: 1 },
            whole: false,
            uuid: "MIG-1".to_owned(),
        };
        LeaseRow {
            fence: 1,
            request,
            node: "node-1".to_owned(),
            profile: "gpu".to_owned(),
            memory_mib: 1,
            share,
            slices: vec![slice; slices],
            granted_at: time(granted),
            renewed_at: time(granted),
            expires_at: time(granted),
            status: Status::Active,
            ending: None,
        }
    }

    #[test]
    fn a_lease_over_midnight_is_counted_on_both_days() {
        let hour = DAY_US / 24;
        let half = Share { compute: 428_571, memory: 500_000 };
        let rows = of(&lease(10 * DAY_US + 22 * hour, 2, half), time(11 * DAY_US + 3 * hour));
        let told: Vec<_> = rows.iter().map(|row| (row.day, row.slice_us, row.gpu_us, row.leases)).collect();
        let of = |hours: i64| u64::try_from(hours * hour).unwrap();
        assert_eq!(told, [(10, of(4), of(2), 0), (11, of(6), of(3), 1)]);
        assert_eq!(rows[0].compute_us, of(4) * 428_571 / 1_000_000);
        assert_eq!((rows[0].user.as_ref(), rows[0].project.as_deref()), ("alice", Some("vision")));
    }

    #[test]
    fn one_without_slices_uses_nothing_and_is_counted() {
        let rows = of(&lease(5, 0, Share::NONE), time(DAY_US - 1));
        let [row] = rows.as_slice() else { panic!("{rows:?}") };
        assert_eq!((row.day, row.slice_us, row.gpu_us, row.leases), (0, 0, 0, 1));
    }

    #[test]
    fn a_clock_that_was_set_back_counts_nothing() {
        let rows = of(&lease(3 * DAY_US, 1, Share { compute: 1_000_000, memory: 1_000_000 }), time(DAY_US + 7));
        let [row] = rows.as_slice() else { panic!("{rows:?}") };
        assert_eq!((row.day, row.slice_us, row.leases), (1, 0, 1));
    }

    proptest! {
        #[test]
        fn the_days_add_up_to_the_whole(
            granted in -1_000_000_000_000_i64..2_000_000_000_000_000,
            lasts in prop_oneof![0..1_000_i64, 0..5 * DAY_US, 0..i64::from(KEPT_DAYS - 1) * DAY_US],
            slices in 0..20_usize,
            compute in 0..=1_000_000_u32,
            memory in 0..=1_000_000_u32,
        ) {
            let share = Share { compute, memory };
            let rows = of(&lease(granted, slices, share), time(granted + lasts));
            let all = u128::try_from(lasts).unwrap() * slices as u128;
            let sum = |part: fn(&UsedRow) -> u64| rows.iter().map(|row| u128::from(part(row))).sum::<u128>();
            prop_assert_eq!(sum(|row| row.slice_us), all);
            prop_assert_eq!(sum(|row| row.compute_us), all * u128::from(compute) / 1_000_000);
            prop_assert_eq!(sum(|row| row.memory_us), all * u128::from(memory) / 1_000_000);
            prop_assert_eq!(sum(|row| row.gpu_us), all * u128::from(compute.max(memory)) / 1_000_000);
            prop_assert_eq!(sum(|row| row.leases), 1);
            prop_assert_eq!(rows.last().map(|row| row.leases), Some(1));
            // Every day between grant and end, once, and no more on it than it has.
            let days: Vec<i32> = rows.iter().map(|row| row.day).collect();
            prop_assert_eq!(days, (day_of(time(granted))..=day_of(time(granted + lasts))).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(u128::from(row.slice_us) <= u128::try_from(DAY_US).unwrap() * slices as u128);
            }
        }
    }
}
