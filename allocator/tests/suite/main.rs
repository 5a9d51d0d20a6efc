//! What every allocator must do, embedded or as the real program behind HTTP, on simulated machines: one
//! suite for both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod disk;
mod faults;
mod host;
mod kill;
mod ledger;
mod machine;
mod nodes;
mod past;
mod restart;
mod rules;
mod seeds;
mod service;

use mlad::api::{Lease, Wait};
use mlad_allocator::{Allocate, LeaseRequest, LeaseState};
use std::time::Duration;

/// Each case as a test, on one host.
macro_rules! suite {
    ($host:expr) => {
        suite!($host, rules: forty_people, repartition, refusals, repeats, quotas, gangs, accounts, reservations, kinds_of_need, two_models,
            revocation, changes);
        suite!($host, faults: in_use, half_destroyed, no_room, slow_destroy, lost, lost_at_the_start, fatal_error, foreign_process, cut_by_hand,
            no_driver);
        suite!($host, past: who_held_what, what_was_used);
        suite!($host, restart: carries_on, reboot, remade, waits_again);
    };
    ($host:expr, $room:ident: $($case:ident),*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $case() {
                crate::$room::$case($host).await;
            }
        )*
    };
}

mod embedded {
    suite!(crate::host::Host::Embedded);
}

mod program {
    suite!(crate::host::Host::Unix);
}

/// A request without limits.
pub(crate) fn ask(workload: &str, user: &str, need: &str) -> LeaseRequest {
    LeaseRequest::new(workload, user, need.parse().unwrap())
}

/// Asks, and waits until it is granted.
pub(crate) async fn get(allocator: &dyn Allocate, workload: &str, need: &str) -> Lease {
    allocator.request(&ask(workload, "alice", need)).await.unwrap();
    granted(allocator, workload).await
}

/// Waits until the request of a workload is granted.
pub(crate) async fn granted(allocator: &dyn Allocate, workload: &str) -> Lease {
    until(allocator, async || match allocator.state(workload).await.unwrap() {
        LeaseState::Granted(lease) => Some(lease),
        LeaseState::Waiting(_) => None,
        LeaseState::Ended { reason } => panic!("{workload}: {reason}"),
    })
    .await
}

/// Waits until something is so, looking at every change.
pub(crate) async fn until<T>(allocator: &dyn Allocate, look: impl AsyncFn() -> Option<T>) -> T {
    let wait = async {
        let mut seen = 0;
        loop {
            seen = allocator.changed(seen).await.unwrap();
            if let Some(found) = look().await {
                return found;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("it never came to that")
}

/// Waits until something is so that nobody tells.
pub(crate) async fn until_so<T>(look: impl AsyncFn() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("it never came to that")
}

/// The wait of a workload.
pub(crate) async fn waiting(allocator: &dyn Allocate, workload: &str) -> Wait {
    match allocator.state(workload).await.unwrap() {
        LeaseState::Waiting(wait) => wait,
        other => panic!("{workload} does not wait: {other:?}"),
    }
}

/// Why the request of a workload is over.
pub(crate) async fn ended(allocator: &dyn Allocate, workload: &str) -> String {
    match allocator.state(workload).await.unwrap() {
        LeaseState::Ended { reason } => reason,
        other => panic!("{workload} is not over: {other:?}"),
    }
}
