//! The engine: what arrives together, GPUs that do not answer at the start, and an end in spite of them.

use super::super::{
    embedded::{Embedded, Gpus, Opener, Settings, lock, system_clock},
    store::Store,
};
use crate::{
    Allocate, AllocatorError, LeaseRequest, LeaseState,
    node::{Driver, DriverError, puppet::Puppet},
};
use mlad::api::Need;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::time::timeout;

/// Far more than anything here takes.
const BOUND: Duration = Duration::from_secs(60);

async fn start(folder: &Path, gpus: Option<&Arc<Puppet>>) -> Arc<Embedded> {
    let settings = Settings { gpus: Gpus::None, ..Settings::new(folder.join("allocator.db"), "node-1") };
    let opener = gpus.map(|puppet| -> Opener {
        let driver = Arc::clone(puppet);
        Box::new(move || Ok(Arc::clone(&driver) as Arc<dyn Driver>))
    });
    let lock = lock(&settings.database).unwrap();
    let store = Store::open(&settings.database).await.unwrap();
    let started = Embedded::start_with(settings, opener, store, lock, system_clock());
    timeout(BOUND, started).await.expect("the start has no end").unwrap()
}

fn ask(workload: &str, need: &str) -> LeaseRequest {
    LeaseRequest::new(workload, "alice", need.parse().unwrap())
}

async fn stop(allocator: &Embedded) {
    timeout(BOUND, allocator.stop()).await.expect("the end has no end");
}

fn ended(workload: &str) -> AllocatorError {
    AllocatorError::Ended(workload.to_owned())
}

// The tests of batches run in one thread, where the engine gets its turn only when the test waits: what is joined
// is one batch.

#[tokio::test]
async fn what_follows_a_release_in_the_same_batch_finds_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let allocator = start(folder.path(), None).await;
    let LeaseState::Granted(held) = allocator.request(&ask("w-1-1", "cpu")).await.unwrap() else { panic!("waits") };
    let (once, again) = (ask("w-1-1", "cpu"), ask("w-2-1", "cpu"));
    let (before, released, asked, state, renewed, twice, other) = tokio::join!(
        allocator.renew("w-1-1", held.fence),
        allocator.release("w-1-1"),
        allocator.request(&once),
        allocator.state("w-1-1"),
        allocator.renew("w-1-1", held.fence),
        allocator.release("w-1-1"),
        allocator.request(&again),
    );
    assert_eq!(before, Err(ended("w-1-1")), "renewed, and then released, before it is answered");
    assert_eq!((released, twice), (Ok(()), Ok(())));
    assert_eq!(asked, Err(ended("w-1-1")));
    assert_eq!(state, Ok(LeaseState::Ended { reason: "released".to_owned() }));
    assert_eq!(renewed, Err(ended("w-1-1")));
    assert!(matches!(other, Ok(LeaseState::Granted(_))), "who is not concerned is served: {other:?}");
    // And so it stays.
    assert_eq!(allocator.state("w-1-1").await, Ok(LeaseState::Ended { reason: "released".to_owned() }));
    assert_eq!(allocator.renew("w-1-1", held.fence).await, Err(ended("w-1-1")));
    stop(&allocator).await;
}

#[tokio::test]
async fn what_is_asked_and_given_up_in_the_same_batch_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let puppet = Puppet::with_gpus(1);
    let allocator = start(folder.path(), Some(&puppet)).await;
    let request = ask("w-1-1", "1g.5gb");
    let (asked, revoked, state, again) = tokio::join!(
        allocator.request(&request),
        allocator.revoke("w-1-1", "the administrator said so", false),
        allocator.state("w-1-1"),
        allocator.request(&request),
    );
    let over = LeaseState::Ended { reason: "the administrator said so".to_owned() };
    assert_eq!((asked, revoked), (Ok(over.clone()), Ok(())));
    assert_eq!((state, again), (Ok(over.clone()), Err(ended("w-1-1"))));
    assert_eq!(allocator.state("w-1-1").await, Ok(over));
    stop(&allocator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn started_while_its_only_gpu_is_off_the_bus_it_does_not_say_impossible() {
    let folder = tempfile::tempdir().unwrap();
    let puppet = Puppet::with_gpus(1);
    let lost = DriverError::Lost("it fell off the bus".to_owned());
    let reading = puppet.pull(|strings| strings.gpus.insert("GPU-0".to_owned(), Err(lost)).unwrap());
    let allocator = start(folder.path(), Some(&puppet)).await;
    let need: Need = "1g.5gb".parse().unwrap();
    let error = allocator.resolve(&need).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Driver(why) if why.contains("fell off the bus")), "{error}");
    let error = allocator.request(&ask("w-1-1", "1g.5gb")).await.unwrap_err();
    assert!(matches!(error, AllocatorError::Driver(_)), "{error}");
    puppet.pull(|strings| strings.gpus.insert("GPU-0".to_owned(), reading));
    // It is read again without a new list, which is a minute away.
    let served = async {
        let mut seen = 0;
        while allocator.resolve(&need).await.is_err() {
            seen = allocator.changed(seen).await.unwrap();
        }
    };
    timeout(Duration::from_secs(30), served).await.expect("it is not read again");
    stop(&allocator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn started_without_the_right_to_read_gpus_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let puppet = Puppet::with_gpus(1);
    puppet.pull(|strings| strings.gpus.insert("GPU-0".to_owned(), Err(DriverError::Denied)));
    let allocator = start(folder.path(), Some(&puppet)).await;
    let error = allocator.request(&ask("w-1-1", "1g.5gb")).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Driver(why) if why.contains("MLAD has to run as root")), "{error}");
    assert!(matches!(allocator.request(&ask("w-2-1", "cpu")).await, Ok(LeaseState::Granted(_))));
    stop(&allocator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_hangs_does_not_hold_up_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let puppet = Puppet::with_gpus(1);
    let allocator = start(folder.path(), Some(&puppet)).await;
    // The request has the GPU changed, which does not come to its end.
    puppet.pull(|strings| strings.hung.insert("GPU-0".to_owned()));
    let state = allocator.request(&ask("w-1-1", "1g.5gb")).await.unwrap();
    assert!(matches!(state, LeaseState::Waiting(_)));
    stop(&allocator).await;
    puppet.pull(|strings| strings.hung.clear());
    // What was not finished is found at the next start, and the request still waits.
    let allocator = start(folder.path(), Some(&Puppet::with_gpus(1))).await;
    assert!(matches!(allocator.state("w-1-1").await, Ok(LeaseState::Waiting(_))));
    stop(&allocator).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_is_written_down_with_the_release_and_added_up() {
    let folder = tempfile::tempdir().unwrap();
    let allocator = start(folder.path(), None).await;
    for (workload, project) in [("w-1-1", None), ("w-2-1", None), ("j-1-1", Some("vision"))] {
        let request = LeaseRequest { project: project.map(str::to_owned), ..ask(workload, "cpu") };
        allocator.request(&request).await.unwrap();
        allocator.release(workload).await.unwrap();
        // Twice changes nothing.
        allocator.release(workload).await.unwrap();
    }
    stop(&allocator).await;
    let store = Store::open(&folder.path().join("allocator.db")).await.unwrap();
    let loaded = store.load((system_clock())().wall).await.unwrap();
    let leases = |project: Option<&str>| -> u64 {
        loaded.used.iter().filter(|row| row.project.as_deref() == project).map(|row| row.leases).sum()
    };
    assert_eq!((leases(None), leases(Some("vision"))), (2, 1), "{:?}", loaded.used);
    assert!(loaded.used.iter().all(|row| row.user.as_ref() == "alice" && row.gpu_us == 0));
}
