//! When a lease is to be renewed. Pure.

use super::clock::{between, later};
use jiff::Timestamp;
use mlad::api::Lease;
use std::time::Duration;

/// Never sooner than this after the last try, however short the lease.
const SHORTEST: Duration = Duration::from_secs(1);
/// Never later than this after a try that failed.
const RETRY: Duration = Duration::from_secs(30);

/// The renewal of one lease: due after a third of what is left of it, so that two tries may fail.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renewal {
    due: Timestamp,
    expires: Timestamp,
}

impl Renewal {
    pub(super) fn new(lease: &Lease, now: Timestamp) -> Self {
        let left = between(now, lease.expires_at);
        Self { due: later(now, (left / 3).max(SHORTEST)), expires: lease.expires_at }
    }

    /// When it is due.
    pub(super) fn due(&self) -> Timestamp {
        self.due
    }

    /// A try failed for now: sets the time of the next. A lease that expires meanwhile is in force again when
    /// it is renewed: the allocator gives its slice to nobody else before.
    pub(super) fn failed(&mut self, now: Timestamp) {
        let left = between(now, self.expires);
        let pause = if left.is_zero() { RETRY } else { left / 4 };
        self.due = later(now, pause.clamp(SHORTEST, RETRY));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::Need;

    fn lease(expires: i64) -> Lease {
        Lease {
            workload: "w-1-1".into(),
            user: "alice".into(),
            fence: 1,
            node: "here".into(),
            need: Need::Cpu,
            profile: "cpu".into(),
            uuids: vec![],
            memory_mib: 0,
            slices: Vec::new(),
            project: None,
            priority: 0,
            preemptible: false,
            expected_end: None,
            ending: None,
            trouble: None,
            granted_at: Timestamp::UNIX_EPOCH,
            expires_at: at(expires),
            over: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn it_is_due_after_a_third_and_tried_often_after_a_failure() {
        let mut renewal = Renewal::new(&lease(90), at(0));
        assert_eq!(renewal.due(), at(30));
        let mut tries = 0;
        while renewal.due() < at(300) {
            let now = renewal.due();
            renewal.failed(now);
            tries += u32::from(now < at(90));
            assert!(renewal.due() > now && renewal.due() <= later(now, RETRY), "{:?}", renewal.due());
        }
        assert!(tries >= 4, "{tries}");
    }

    #[test]
    fn a_lease_that_has_ended_does_not_make_it_spin() {
        let renewal = Renewal::new(&lease(0), at(50));
        assert_eq!(renewal.due(), at(51));
    }
}
