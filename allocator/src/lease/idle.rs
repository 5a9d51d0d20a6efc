//! Leases that nobody uses: warned, and then over. Used is a slice while a process has its GPU open; the GPUs are looked
//! at once a minute, and when something happens to them.

use super::{
    ledger::Ledger,
    record::{Ending, LeaseRow, Now, Status},
};
use jiff::SignedDuration;
use std::time::Duration;

/// The warning comes so long before the end, or a quarter of the time, if that is less.
const WARNING: Duration = Duration::from_secs(15 * 60);
/// How the reason of an end for want of use begins.
const UNUSED: &str = "its GPU was not used";
/// What was read of a GPU longer ago says nothing of now.
const STALE: SignedDuration = SignedDuration::from_mins(3);

/// When a lease that has to be used was used last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Idle {
    used_at: Duration,
    /// It is over if it is not used for so long.
    most: Duration,
    /// Its holder is warned.
    warned: bool,
}

impl Idle {
    fn warning(&self) -> Duration {
        self.used_at + self.most - WARNING.min(self.most / 4)
    }
}

impl Ledger {
    /// A lease that is held from now on, or known from now on, counts as used now.
    pub(super) fn watch_use(&mut self, lease: &LeaseRow, now: Now) {
        let most = lease.request.idle_seconds.filter(|_| !lease.slices.is_empty());
        let Some(most) = most.filter(|_| !matches!(lease.status, Status::Over(_))) else { return };
        let warned = lease.ending.as_ref().is_some_and(is_ours);
        let idle = Idle { used_at: now.steady, most: Duration::from_secs(most), warned };
        self.idle.insert(lease.fence, idle);
    }

    /// Takes in from a reading of a GPU which leases are used, and takes warnings back.
    pub(super) fn see_use(&mut self, uuid: &str, now: Now) {
        let Some(gpu) = self.gpus.iter().find(|gpu| gpu.uuid == uuid) else { return };
        let mut again = Vec::new();
        for (fence, idle) in &mut self.idle {
            let slices = self.leases.get(fence).into_iter().flat_map(|lease| &lease.slices);
            let on = slices.filter(|slice| slice.gpu == uuid);
            let instances = on.filter_map(|slice| gpu.instance((slice.profile, slice.placement.start)));
            if instances.into_iter().any(|instance| instance.processes > 0) {
                idle.used_at = now.steady;
                if std::mem::take(&mut idle.warned) {
                    again.push(*fence);
                }
            }
        }
        for fence in again {
            self.take_back_notice(fence, "its GPU is used again", is_ours);
        }
    }

    /// Warns the holders of leases that are not used; when the warning is over, so are they.
    pub(super) fn tick_idle(&mut self, now: Now) {
        let due: Vec<(u64, Idle)> = self
            .idle
            .iter()
            .filter(|(_, idle)| !idle.warned && idle.warning() <= now.steady)
            .map(|(f, i)| (*f, *i))
            .collect();
        for (fence, idle) in due {
            let known = self.leases.get(&fence).is_some_and(|lease| self.is_seen(lease, now));
            let Some(entry) = self.idle.get_mut(&fence) else { continue };
            if !known {
                // Whether it is used cannot be told: it counts as used.
                entry.used_at = now.steady;
                continue;
            }
            entry.warned = true;
            let left = (idle.used_at + idle.most).saturating_sub(now.steady);
            let at = SignedDuration::try_from(left).ok().and_then(|left| now.wall.checked_add(left).ok());
            let minutes = idle.most.as_secs().div_ceil(60);
            let reason = format!("{UNUSED} for {minutes} minute{}", if minutes == 1 { "" } else { "s" });
            self.give_notice(fence, Ending { at: at.unwrap_or(now.wall), reason }, now);
        }
    }

    /// When the next holder is warned.
    pub(super) fn next_idle(&self) -> Option<Duration> {
        self.idle.values().filter(|idle| !idle.warned).map(Idle::warning).min()
    }

    /// Whether the GPUs of a lease were read lately.
    fn is_seen(&self, lease: &LeaseRow, now: Now) -> bool {
        lease.slices.iter().all(|slice| {
            let gpu = self.gpus.iter().find(|gpu| gpu.uuid == slice.gpu && gpu.fault.is_none());
            gpu.is_some_and(|gpu| now.wall.duration_since(gpu.read_at) <= STALE)
        })
    }
}

fn is_ours(ending: &Ending) -> bool {
    ending.reason.starts_with(UNUSED)
}
