//! GPUs that do not do as they are told.

use super::{ask, ended, get, granted, host::Host, machine::Machine, until, waiting};
use mlad::api::{SliceState, WaitReason};
use mlad_allocator::{Allocate, AllocatorError};
use nvidia_ml_sim::state::{Device, FaultKind, Process};
use std::time::Instant;

/// An idle instance that somebody else uses is quarantined and tried again; then its space is granted.
pub(crate) async fn in_use(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    get(allocator, "w-1-1", "4g.20gb").await;
    allocator.release("w-1-1").await.unwrap();
    // As often as it is tried, until it has been seen.
    machine.fault(FaultKind::DestroyInUse, 0, 1000, None);
    allocator.request(&ask("w-2-1", "bob", "7g.40gb")).await.unwrap();
    until(allocator, async || {
        let slices = allocator.map().await.unwrap().gpus.remove(0).slices;
        let wait = waiting(allocator, "w-2-1").await;
        let told = wait.detail.contains("4g.20gb is not used: it cannot be destroyed: a process still uses it");
        (slices.first()?.state == SliceState::Quarantined && wait.reason == WaitReason::NoSlice && told).then_some(())
    })
    .await;
    machine.change(|state| state.clear_faults(None));
    granted(allocator, "w-2-1").await;
    assert_eq!(machine.slices().len(), 1);
    running.stop().await;
}

/// A destroy that stops half-way is finished later.
pub(crate) async fn half_destroyed(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    get(allocator, "w-1-1", "4g.20gb").await;
    allocator.release("w-1-1").await.unwrap();
    machine.fault(FaultKind::GpuInstanceLeft, 0, 1, None);
    allocator.request(&ask("w-2-1", "bob", "7g.40gb")).await.unwrap();
    granted(allocator, "w-2-1").await;
    assert_eq!(machine.state().gpus[0].instances.len(), 1);
    running.stop().await;
}

/// A placement that the driver refuses is passed over for another.
pub(crate) async fn no_room(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    machine.fault(FaultKind::InsufficientResources, 0, 1, None);
    let lease = get(allocator, "w-1-1", "1g.5gb").await;
    assert_ne!(lease.slices[0].placement.unwrap().start, 6, "the best was refused");
    running.stop().await;
}

/// A GPU that takes its time keeps nobody waiting for another.
pub(crate) async fn slow_destroy(host: Host) {
    let machine =
        Machine::described("[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\n[[gpu]]\nmodel = \"A30-24GB\"\nmig = true\n");
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    get(allocator, "w-1-1", "1g.5gb").await;
    allocator.release("w-1-1").await.unwrap();
    machine.fault(FaultKind::SlowDestroy, 0, 1, Some(15_000));
    let begun = Instant::now();
    allocator.request(&ask("w-2-1", "bob", "7g.40gb")).await.unwrap();
    assert_eq!(waiting(allocator, "w-2-1").await.reason, WaitReason::Repartitioning);
    get(allocator, "w-3-1", "2g.12gb").await;
    waiting(allocator, "w-2-1").await;
    granted(allocator, "w-2-1").await;
    assert!(begun.elapsed().as_secs() >= 15);
    running.stop().await;
}

/// A GPU off the bus is shown, not granted, and its leases stay; it is used again when it is back.
pub(crate) async fn lost(host: Host) {
    let machine = Machine::new("A100-40GB", 2);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let held = get(allocator, "w-1-1", "1g.5gb").await;
    let gpu = held.slices[0].gpu_index;
    machine.fault(FaultKind::Lost, gpu, 1, None);
    let fault = until(allocator, async || fault_of(allocator, gpu as usize).await).await;
    assert!(fault.contains("does not answer"), "{fault}");
    assert_eq!(allocator.renew("w-1-1", held.fence).await.unwrap().uuids, held.uuids);
    let other = get(allocator, "w-2-1", "7g.40gb").await;
    assert_ne!(other.slices[0].gpu_index, gpu);
    allocator.request(&ask("w-3-1", "bob", "7g.40gb")).await.unwrap();
    waiting(allocator, "w-3-1").await;
    allocator.release("w-1-1").await.unwrap();
    machine.change(|state| state.reset_gpu(gpu).unwrap());
    assert_eq!(granted(allocator, "w-3-1").await.slices[0].gpu_index, gpu);
    running.stop().await;
}

/// Started while its only GPU is off the bus, it says so, and not that nothing is possible; the GPU is used when it
/// is back.
pub(crate) async fn lost_at_the_start(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let running = host.start(&machine).await;
    let held = get(running.allocator(), "w-1-1", "1g.5gb").await;
    running.stop().await;
    machine.fault(FaultKind::Lost, 0, 1, None);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let refused = |error: AllocatorError| {
        assert!(matches!(&error, AllocatorError::Driver(text) if text.contains("does not answer")), "{error}");
    };
    refused(allocator.resolve(&"1g.5gb".parse().unwrap()).await.unwrap_err());
    refused(allocator.request(&ask("w-2-1", "bob", "1g.5gb")).await.unwrap_err());
    assert!(fault_of(allocator, 0).await.is_some_and(|fault| fault.contains("does not answer")));
    assert_eq!(allocator.renew("w-1-1", held.fence).await.unwrap().uuids, held.uuids, "nobody knows better");
    machine.change(|state| state.reset_gpu(0).unwrap());
    until(allocator, async || fault_of(allocator, 0).await.is_none().then_some(())).await;
    get(allocator, "w-3-1", "1g.5gb").await;
    assert!(ended(allocator, "w-1-1").await.contains("vanished"), "the reset took its slice");
    running.stop().await;
}

async fn fault_of(allocator: &dyn Allocate, gpu: usize) -> Option<String> {
    allocator.map().await.unwrap().gpus[gpu].fault.clone()
}

/// A GPU with a fatal error is granted no more, over a restart too, until somebody says that it is well.
pub(crate) async fn fatal_error(host: Host) {
    let machine = Machine::new("A30-24GB", 2);
    let running = host.start(&machine).await;
    let lease = get(running.allocator(), "w-1-1", "2g.12gb").await;
    let (sick, well) = (lease.slices[0].gpu.clone(), 1 - lease.slices[0].gpu_index);
    let number = lease.slices[0].gpu_index as usize;
    machine.change(|state| state.xid(lease.slices[0].gpu_index, 95, None).unwrap());
    until(running.allocator(), async || fault_of(running.allocator(), number).await).await;
    running.stop().await;
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let told = fault_of(allocator, number).await.expect("it is in quarantine still");
    assert!(told.contains("XID 95"), "{told}");
    for workload in ["w-2-1", "w-3-1"] {
        assert_eq!(get(allocator, workload, "2g.12gb").await.slices[0].gpu_index, well);
    }
    let leases = allocator.leases().await.unwrap();
    let holder = leases.iter().find(|lease| lease.workload == "w-1-1").unwrap();
    assert!(holder.trouble.is_some() && holder.over.is_none(), "{holder:?}");
    allocator.request(&ask("w-4-1", "bob", "2g.12gb")).await.unwrap();
    let told = waiting(allocator, "w-4-1").await.detail;
    assert!(told.contains("quarantine"), "{told}");
    allocator.trust_gpu(&sick).await.unwrap();
    granted(allocator, "w-4-1").await;
    running.stop().await;
}

/// An idle instance on which somebody else computes is not granted.
pub(crate) async fn foreign_process(host: Host) {
    let machine = Machine::new("A30-24GB", 1);
    let running = host.start(&machine).await;
    let lease = get(running.allocator(), "w-1-1", "4g.24gb").await;
    running.allocator().release("w-1-1").await.unwrap();
    running.stop().await;
    let device = |state: &nvidia_ml_sim::state::State| state.device_by_uuid(&lease.uuids[0]).unwrap();
    machine.change(|state| {
        let device: Device = device(state);
        state.start_process(device, Process { pid: 4711, memory_mib: 100 }).unwrap();
    });
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    assert_eq!(allocator.map().await.unwrap().gpus[0].slices[0].state, SliceState::Quarantined);
    allocator.request(&ask("w-2-1", "bob", "4g.24gb")).await.unwrap();
    waiting(allocator, "w-2-1").await;
    machine.change(|state| assert!(state.end_process(4711)));
    assert_eq!(granted(allocator, "w-2-1").await.uuids, lease.uuids);
    running.stop().await;
}

/// Instances that somebody else left, whole or half, are used or set right.
pub(crate) async fn cut_by_hand(host: Host) {
    let machine = Machine::new("A100-40GB", 1);
    let left = machine.change(|state| {
        let whole = state.create_gpu_instance(0, 535, 14, None).unwrap();
        state.create_compute_instance(whole, 1, None).unwrap();
        let split = state.create_gpu_instance(0, 535, 9, None).unwrap();
        state.create_compute_instance(split, 0, None).unwrap();
        state.create_compute_instance(split, 0, None).unwrap();
        state.gpus[0].instances.len()
    });
    assert_eq!(left, 2);
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    let whole = machine.slices().into_iter().map(|(_, uuid)| uuid).collect::<Vec<_>>();
    let pair = get(allocator, "w-1-1", "2g.10gb").await;
    assert!(whole.contains(&pair.uuids[0]), "made by hand, and idle");
    let large = get(allocator, "w-2-1", "3g.20gb").await;
    assert!(!whole.contains(&large.uuids[0]), "what is cut further is made anew");
    assert_eq!(machine.slices().len(), 2);
    running.stop().await;
}

/// Without a driver only `cpu` can be had, and it is said why.
pub(crate) async fn no_driver(host: Host) {
    let machine = Machine::described("this is no description");
    let running = host.start(&machine).await;
    let allocator = running.allocator();
    get(allocator, "w-1-1", "cpu").await;
    let error = allocator.request(&ask("w-2-1", "bob", "1g.5gb")).await.unwrap_err();
    assert!(matches!(&error, AllocatorError::Driver(text) if text.contains("cpu")), "{error}");
    assert!(allocator.map().await.unwrap().gpus.is_empty());
    running.stop().await;
}
