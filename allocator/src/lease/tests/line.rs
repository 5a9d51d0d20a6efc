//! Several slices at once, leases that give way, and limits of projects, from request to end.

use super::ledger::{FREE, World};
use crate::{Account, AccountName, AllocatorError, LeaseRequest, LeaseState, Limits, node::fake::Fails};

fn ask(workload: &str, user: &str, need: &str) -> LeaseRequest {
    LeaseRequest::new(workload, user, need.parse().unwrap())
}

fn uuids(world: &World, workload: &str) -> usize {
    match world.state(workload) {
        Some(LeaseState::Granted(lease)) => lease.uuids.len(),
        _ => 0,
    }
}

#[test]
fn several_slices_are_granted_at_the_same_moment() {
    let mut world = World::new(&["A100-40GB", "A100-40GB"]);
    let gang = LeaseRequest { slices: 3, ..ask("j-1-1", "a", "3g.20gb") };
    world.request(&gang).unwrap();
    assert_eq!(world.ordered(), 3);
    for _ in 0..2 {
        world.carry_out(0, Fails::Never);
        assert!(!world.is_granted("j-1-1"), "not before all of it is there");
    }
    world.carry_out(0, Fails::Never);
    assert_eq!(uuids(&world, "j-1-1"), 3);
    world.ledger.release("j-1-1", world.now);
    world.settle();
    world.request(&LeaseRequest { slices: 4, ..ask("j-2-1", "a", "3g.20gb") }).unwrap();
    world.finish();
    assert_eq!(uuids(&world, "j-2-1"), 4, "what was idle and what had to be made, together");
}

#[test]
fn slices_of_a_gang_on_other_gpus_than_the_last_that_was_made_are_not_free() {
    let mut world = World::new(&["A100-40GB", "A100-40GB", "A100-40GB"]);
    world.request(&LeaseRequest { slices: 3, ..ask("j-1-1", "a", "7g.40gb") }).unwrap();
    world.finish();
    assert_eq!(uuids(&world, "j-1-1"), 3);
    // Of the same profile, and of one for which the slice that is held would be destroyed.
    for (workload, need) in [("j-2-1", "7g.40gb"), ("j-3-1", "1g.5gb")] {
        world.request(&ask(workload, "b", need)).unwrap();
        world.finish();
        assert!(!world.is_granted(workload), "{need}: every GPU is held");
    }
    assert_eq!(world.ordered(), 0, "nothing is destroyed");
}

#[test]
fn a_gang_of_which_one_cannot_be_made_gives_all_of_it_back_and_waits_on() {
    let mut world = World::new(&["A100-40GB", "A100-40GB"]);
    world.request(&LeaseRequest { slices: 2, ..ask("j-1-1", "a", "7g.40gb") }).unwrap();
    world.carry_out(0, Fails::Make);
    world.finish();
    assert!(!world.is_granted("j-1-1"));
    assert_eq!(world.ledger.accounts.held_by("a"), (0, 0), "nothing is counted while it waits");
    // The driver refused a place: it is tried there again after a while.
    world.pass(31);
    world.finish();
    assert_eq!(uuids(&world, "j-1-1"), 2);
}

#[test]
fn what_could_never_be_is_refused_at_once() {
    let mut world = World::new(&["A100-40GB", "A100-40GB"]);
    let mut refused = |request: LeaseRequest| world.request(&request).unwrap_err();
    let gang = |slices, nodes| LeaseRequest { slices, nodes, ..ask("j-1-1", "a", "3g.20gb") };
    assert!(matches!(refused(gang(5, None)), AllocatorError::Impossible(text) if text.contains("ask for fewer")));
    assert!(matches!(refused(gang(2, Some(2))), AllocatorError::Impossible(_)), "there is one node");
    assert!(matches!(refused(gang(3, Some(2))), AllocatorError::Invalid(_)));
    assert!(matches!(refused(gang(0, None)), AllocatorError::Invalid(_)));
    let urgent = LeaseRequest { priority: 101, ..gang(1, None) };
    assert!(matches!(refused(urgent), AllocatorError::Invalid(text) if text.contains("-100 to 100")));
    let limits = Limits { slices: Some(1), ..FREE };
    let over = LeaseRequest { limits, ..gang(2, None) };
    assert!(matches!(refused(over), AllocatorError::Quota(text) if text.contains("the limits of a")));
}

#[test]
fn a_lease_gives_way_after_its_notice() {
    let mut world = World::new(&["A100-40GB"]);
    world.request(&LeaseRequest { preemptible: true, ..ask("j-1-1", "a", "7g.40gb") }).unwrap();
    world.finish();
    world.request(&ask("j-2-1", "b", "7g.40gb")).unwrap();
    assert_eq!(world.notice("j-1-1"), None, "of equal priority");
    world.request(&LeaseRequest { priority: 10, ..ask("j-3-1", "c", "3g.20gb") }).unwrap();
    let told = world.notice("j-1-1").unwrap();
    assert!(told.contains("gives way to c"), "{told}");
    world.pass(59);
    assert!(world.is_granted("j-1-1"));
    world.pass(2);
    assert!(matches!(world.state("j-1-1"), Some(LeaseState::Ended { reason }) if reason == told));
    assert!(!world.is_granted("j-3-1"), "its container may still run");
    world.ledger.release("j-1-1", world.now);
    world.settle();
    world.finish();
    assert!(world.is_granted("j-3-1") && !world.is_granted("j-2-1"));
}

#[test]
fn notice_is_taken_back_when_nobody_waits_for_it_any_more() {
    let mut world = World::new(&["A100-40GB"]);
    world.request(&LeaseRequest { preemptible: true, ..ask("j-1-1", "a", "7g.40gb") }).unwrap();
    world.finish();
    world.request(&LeaseRequest { priority: 1, ..ask("j-2-1", "b", "1g.5gb") }).unwrap();
    assert!(world.notice("j-1-1").is_some());
    world.ledger.release("j-2-1", world.now);
    world.settle();
    assert_eq!(world.notice("j-1-1"), None);
    world.pass(3600);
    assert!(!matches!(world.state("j-1-1"), Some(LeaseState::Ended { .. })));
}

#[test]
fn gpu_time_that_is_used_up_ends_what_has_no_end_of_its_own() {
    let mut world = World::new(&["A100-40GB"]);
    // Two hours of a whole GPU.
    let limits = Limits { gpu_seconds: Some(7200), ..FREE };
    world.request(&LeaseRequest { limits, ..ask("w-1-1", "a", "7g.40gb") }).unwrap();
    world.finish();
    world.pass(7100);
    assert_eq!(world.notice("w-1-1"), None);
    world.pass(50);
    assert!(world.notice("w-1-1").unwrap().contains("the GPU hours of a are used up"));
    world.pass(60);
    assert!(matches!(world.state("w-1-1"), Some(LeaseState::Ended { .. })));
    world.ledger.release("w-1-1", world.now);
    world.settle();
    world.request(&LeaseRequest { limits, ..ask("w-1-2", "a", "1g.5gb") }).unwrap();
    world.finish();
    assert!(!world.is_granted("w-1-2"), "until days have passed");
}

#[test]
fn limits_that_are_raised_serve_who_waits_for_them() {
    let mut world = World::new(&["A100-40GB"]);
    let set = |world: &mut World, slices| {
        let limits = Limits { slices: Some(slices), ..FREE };
        let name = AccountName::Project("vision".to_owned());
        world.ledger.set_accounts(&[Account { name, parent: None, shares: 1, limits }], world.now).unwrap();
        world.settle();
        world.finish();
    };
    set(&mut world, 1);
    for nth in 1..3 {
        let project = Some("vision".to_owned());
        world.request(&LeaseRequest { project, ..ask(&format!("j-{nth}-1"), "a", "1g.5gb") }).unwrap();
        world.finish();
    }
    let Some(LeaseState::Waiting(wait)) = world.state("j-2-1") else { panic!("granted over the limit") };
    assert!(wait.detail.contains("the project vision holds 1 of 1 slices"), "{}", wait.detail);
    set(&mut world, 2);
    assert!(world.is_granted("j-2-1"));
}
