//! Looking ahead: when known lease ends make room.

use super::{Block, Entry};
use crate::{
    geometry::Placed,
    placement::{Policy, Pool, plan},
};
use jiff::{SignedDuration, Timestamp};
use std::{cmp::Reverse, collections::BinaryHeap};

/// So many requests are looked ahead for; those behind get no estimate.
pub const LOOK_AHEAD: usize = 64;

/// The earliest time at which known ends make room for each of the first waiting requests, in order; none
/// where the known ends do not.
///
/// `ends` are held slots whose end is known. Those behind never come before those ahead, and a request
/// without a known length is taken to stay.
pub fn estimates(
    entries: &[(&Entry, Block)],
    ends: &[(Timestamp, usize, Placed)],
    pool: &Pool,
    policy: &dyn Policy,
    now: Timestamp,
) -> Vec<Option<Timestamp>> {
    if ends.is_empty() {
        return vec![None; entries.len()];
    }
    let mut future = pool.clone();
    let mut ends: BinaryHeap<_> = ends.iter().map(|(end, gpu, placed)| Reverse((*end, *gpu, *placed))).collect();
    let mut time = now;
    let mut open = true;
    let estimate = |(entry, block): &(&Entry, Block)| {
        let wanted = entry.wanted.as_ref()?;
        if !open || matches!(block, Block::Quota | Block::NoGpu | Block::Preparing) {
            return None;
        }
        loop {
            future.price(policy);
            if let Some(plan) = plan(&future, wanted, policy, |_| true) {
                future.occupy(&plan);
                let end = entry.expected_seconds.and_then(|seconds| after(time, seconds));
                ends.extend(end.map(|end| Reverse((end, plan.gpu, plan.placed))));
                return Some(time);
            }
            let Some(Reverse((end, gpu, placed))) = ends.pop() else {
                open = false;
                return None;
            };
            time = time.max(end);
            future.release(gpu, placed);
        }
    };
    entries.iter().map(estimate).collect()
}

/// `seconds` after `time`; none beyond the end of time.
pub(crate) fn after(time: Timestamp, seconds: u64) -> Option<Timestamp> {
    time.checked_add(SignedDuration::from_secs(i64::try_from(seconds).ok()?)).ok()
}
