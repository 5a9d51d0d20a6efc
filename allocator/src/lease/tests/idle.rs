use super::{super::store::Loaded, ledger::World};
use crate::{LeaseRequest, LeaseState};

const MOST: u64 = 1200;
const WARNING: u64 = MOST / 4;

fn world() -> World {
    let mut world = World::new(&["A100-40GB"]);
    let request =
        LeaseRequest { idle_seconds: Some(MOST), ..LeaseRequest::new("w-1-1", "a", "3g.20gb".parse().unwrap()) };
    world.request(&request).unwrap();
    world.finish();
    assert!(world.is_granted("w-1-1"));
    world
}

/// Time passes; the GPU is read once a minute, and so many processes use what is on it.
fn pass(world: &mut World, seconds: u64, processes: u32) {
    for _ in 0..seconds / 60 {
        world.pass(60);
        world.gpus[0].reading.instances.iter_mut().for_each(|instance| instance.processes = processes);
        world.list();
    }
}

#[test]
fn a_lease_that_is_not_used_is_warned_and_then_over() {
    let mut world = world();
    pass(&mut world, MOST - WARNING - 60, 0);
    assert_eq!(world.notice("w-1-1"), None);
    pass(&mut world, 60, 0);
    assert_eq!(world.notice("w-1-1").as_deref(), Some("its GPU was not used for 20 minutes"));
    pass(&mut world, WARNING - 60, 0);
    assert!(world.is_granted("w-1-1"));
    pass(&mut world, 60, 0);
    let Some(LeaseState::Ended { reason }) = world.state("w-1-1") else { panic!("it is not over") };
    assert!(reason.contains("not used"), "{reason}");
}

#[test]
fn use_takes_the_warning_back() {
    let mut world = world();
    pass(&mut world, MOST - 120, 0);
    assert!(world.notice("w-1-1").is_some());
    pass(&mut world, 60, 1);
    assert_eq!(world.notice("w-1-1"), None);
    pass(&mut world, 10 * MOST, 1);
    assert!(world.is_granted("w-1-1"));
    pass(&mut world, MOST - WARNING, 0);
    assert!(world.notice("w-1-1").is_some());
}

#[test]
fn what_cannot_be_seen_counts_as_used() {
    let mut world = world();
    // Nobody reads the GPU.
    for _ in 0..4 {
        world.pass(MOST);
    }
    assert!(world.is_granted("w-1-1") && world.notice("w-1-1").is_none());
}

#[test]
fn a_warning_outlasts_the_allocator_and_can_be_taken_back_then() {
    let mut world = world();
    pass(&mut world, MOST - WARNING, 0);
    let lease = world.ledger.leases.values().next().unwrap().clone();
    let loaded = || Loaded { leases: vec![lease.clone()], fence: lease.fence, seq: 1, ..Loaded::default() };
    let now = world.now;
    world.ledger.load(loaded(), now);
    assert!(world.notice("w-1-1").is_some());
    pass(&mut world, 60, 2);
    assert_eq!(world.notice("w-1-1"), None);
    world.ledger.load(loaded(), now);
    pass(&mut world, WARNING + 60, 0);
    assert!(matches!(world.state("w-1-1"), Some(LeaseState::Ended { .. })));
}
