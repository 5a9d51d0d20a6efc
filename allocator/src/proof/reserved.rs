//! Whether what was reserved was kept: nothing of others was granted where it would last into a reservation.

use super::{Findings, Lease, Records, Rule};
use std::collections::HashMap;

/// Space that is, or was, set aside at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// Number of its reservation.
    pub reservation: i64,
    /// Its name.
    pub name: String,
    /// When the reservation begins.
    pub from: i64,
    /// Until when it has the place: it ends, was removed, or is somewhere else since.
    pub until: i64,
    /// Since when it has the place.
    pub chosen_at: i64,
    /// UUID of the GPU.
    pub gpu: String,
    /// The first column.
    pub start: i64,
    /// The columns.
    pub size: i64,
    /// A whole GPU without MIG.
    pub whole: bool,
}

/// What a request said of its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Of which workload.
    pub workload: String,
    /// The reservation that it is for.
    pub reservation: Option<i64>,
    /// How long it lasts at most.
    pub expected_us: Option<i64>,
}

pub(super) fn check(records: &Records, findings: &mut Findings) {
    if records.reserved.is_empty() {
        return;
    }
    let leases: HashMap<i64, &Lease> = records.leases.iter().map(|lease| (lease.fence, lease)).collect();
    let said: HashMap<&str, &Said> = records.said.iter().map(|said| (said.workload.as_str(), said)).collect();
    // When reservations end as they were made: who is in one ends with it.
    let mut ends: HashMap<i64, i64> = HashMap::new();
    for reserved in &records.reserved {
        let end = ends.entry(reserved.reservation).or_insert(reserved.until);
        *end = reserved.until.max(*end);
    }
    for slice in &records.slices {
        let Some(lease) = leases.get(&slice.fence) else { continue };
        let Some(said) = said.get(lease.workload.as_str()) else { continue };
        let expected = said.expected_us.map(|length| lease.granted_at.saturating_add(length));
        let booked = said.reservation.and_then(|id| ends.get(&id).copied());
        let end = expected.into_iter().chain(booked).min().unwrap_or(i64::MAX);
        let there = records.reserved.iter().filter(|reserved| {
            let beside = reserved.start.saturating_add(reserved.size) <= slice.start
                || slice.start.saturating_add(slice.size) <= reserved.start;
            reserved.gpu == slice.gpu && (slice.whole || reserved.whole || !beside)
        });
        for reserved in there.filter(|reserved| said.reservation != Some(reserved.reservation)) {
            let chosen_before = reserved.chosen_at < lease.granted_at;
            let over = findings.in_order(reserved.until, lease.granted_at);
            if chosen_before && !over && !findings.in_order(end, reserved.from) {
                let detail = format!(
                    "{} (fence {}) was granted columns {}+{} of {}, and may last into the reservation {}",
                    lease.workload, lease.fence, slice.start, slice.size, slice.gpu, reserved.name
                );
                findings.add(Rule::Reserved, detail);
            }
        }
    }
}
