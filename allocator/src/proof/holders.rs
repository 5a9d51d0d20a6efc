//! Who held which column of a GPU, and when.

use super::{Findings, Lease, Records, Rule, Slice};
use std::collections::{BTreeMap, HashMap};

/// A slice, held from a time until another.
struct Held<'a> {
    slice: &'a Slice,
    lease: &'a Lease,
    until: i64,
}

impl Held<'_> {
    fn covers(&self, start: i64, size: i64) -> bool {
        let end = self.slice.start.saturating_add(self.slice.size);
        self.slice.whole || (self.slice.start < start.saturating_add(size) && start < end)
    }
}

pub(super) fn check(records: &Records, findings: &mut Findings) {
    let leases: HashMap<i64, &Lease> = records.leases.iter().map(|lease| (lease.fence, lease)).collect();
    let mut by_gpu: BTreeMap<&str, Vec<Held<'_>>> = BTreeMap::new();
    for slice in &records.slices {
        let Some(lease) = leases.get(&slice.fence).copied() else { continue };
        let until = lease.released_at.unwrap_or(i64::MAX);
        by_gpu.entry(&slice.gpu).or_default().push(Held { slice, lease, until });
    }
    for held in by_gpu.values_mut() {
        held.sort_by_key(|held| (held.lease.granted_at, held.lease.fence));
        one_holder(held, findings);
    }
    for change in &records.changes {
        let now: Vec<&Held<'_>> =
            by_gpu.get(change.gpu.as_str()).into_iter().flatten().filter(|held| held.until == i64::MAX).collect();
        let touched = |held: &&&Held<'_>| {
            let destroyed = change.destroys.contains(&(held.slice.profile, held.slice.start));
            destroyed || change.makes.is_some_and(|(start, size)| held.covers(start, size))
        };
        for held in now.iter().filter(touched) {
            let (id, gpu, workload) = (change.id, &change.gpu, &held.lease.workload);
            let detail =
                format!("change {id} of {gpu} touches columns that {workload} holds (fence {})", held.lease.fence);
            findings.add(Rule::Changes, detail);
        }
    }
}

/// Goes through what was held on one GPU, first granted first.
fn one_holder(held: &[Held<'_>], findings: &mut Findings) {
    let mut open: Vec<&Held<'_>> = Vec::new();
    for later in held {
        let granted = later.lease.granted_at;
        open.retain(|earlier| !findings.in_order(earlier.until, granted));
        let (start, size) = if later.slice.whole { (0, i64::MAX) } else { (later.slice.start, later.slice.size) };
        for earlier in open.iter().filter(|earlier| earlier.covers(start, size)) {
            let detail = format!(
                "{}: {} (fence {}) was granted columns {}+{} while {} (fence {}) held {}+{}",
                later.slice.gpu,
                later.lease.workload,
                later.lease.fence,
                later.slice.start,
                later.slice.size,
                earlier.lease.workload,
                earlier.lease.fence,
                earlier.slice.start,
                earlier.slice.size
            );
            findings.add(Rule::OneHolder, detail);
        }
        open.push(later);
    }
}
