//! Ends and begins of the allocator and of the machine.

use super::{ask, ended, get, granted, host::Host, machine::Machine, waiting};
use mlad::api::SliceState;
use mlad_allocator::AllocatorError;

/// Leases, fences and the queue survive a restart; leases have a full period again.
pub(crate) async fn carries_on(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let held = get(running.allocator(), "w-1-1", "7g.40gb").await;
    running.allocator().request(&ask("w-2-1", "bob", "3g.20gb")).await.unwrap();
    running.allocator().request(&ask("w-3-1", "carol", "4g.20gb")).await.unwrap();
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let leases = allocator.leases().await.unwrap();
    assert_eq!((&leases[0].uuids, leases[0].fence, leases.len()), (&held.uuids, held.fence, 1));
    let renewed = allocator.renew("w-1-1", held.fence).await.unwrap();
    assert!(renewed.expires_at > held.expires_at);
    assert_eq!(waiting(allocator, "w-2-1").await.place, 1);
    assert_eq!(waiting(allocator, "w-3-1").await.place, 2);
    allocator.release("w-1-1").await.unwrap();
    assert!(granted(allocator, "w-2-1").await.fence > held.fence);
    assert!(granted(allocator, "w-3-1").await.fence > held.fence);
    running.stop().await;
}

/// After a reboot the instances are gone: leases on them are over, and free when they are released.
pub(crate) async fn reboot(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let held = get(running.allocator(), "w-1-1", "7g.40gb").await;
    let none = get(running.allocator(), "w-2-1", "cpu").await;
    running.stop().await;
    machine.change(|state| state.reboot());
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    assert!(ended(allocator, "w-1-1").await.contains("vanished"));
    let error = allocator.renew("w-1-1", held.fence).await.unwrap_err();
    assert_eq!(error, AllocatorError::Ended("w-1-1".into()));
    allocator.renew("w-2-1", none.fence).await.unwrap();
    allocator.request(&ask("w-1-2", "alice", "7g.40gb")).await.unwrap();
    waiting(allocator, "w-1-2").await;
    allocator.release("w-1-1").await.unwrap();
    let again = granted(allocator, "w-1-2").await;
    assert!(again.fence > held.fence && again.uuids != held.uuids);
    running.stop().await;
}

/// A slice made again at the same place is the same slice with another UUID.
pub(crate) async fn remade(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let held = get(running.allocator(), "w-1-1", "7g.40gb").await;
    running.stop().await;
    machine.change(|state| {
        state.reboot();
        let made = state.create_gpu_instance(0, 535, 0, None).unwrap();
        state.create_compute_instance(made, 4, None).unwrap();
    });
    let running = host.start(&machine).await;
    let again = running.allocator().renew("w-1-1", held.fence).await.unwrap();
    assert_ne!(again.uuids, held.uuids);
    assert_eq!(again.uuids[0], machine.slices()[0].1);
    running.stop().await;
}

/// Idle instances stay warm over a restart.
pub(crate) async fn waits_again(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let held = get(running.allocator(), "w-1-1", "2g.10gb").await;
    running.allocator().release("w-1-1").await.unwrap();
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    assert_eq!(allocator.map().await.unwrap().gpus[0].slices[0].state, SliceState::Idle);
    assert_eq!(get(allocator, "w-2-1", "2g.10gb").await.uuids, held.uuids);
    assert_eq!(ended(allocator, "w-1-1").await, "released");
    running.stop().await;
}
