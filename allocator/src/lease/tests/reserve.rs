//! Reservations, from the making to their end.

use super::ledger::{FREE, World};
use crate::{
    AllocatorError, LeaseRequest, LeaseState,
    geometry::Columns,
    lease::record::{LeaseRow, Status},
    node::{DriverError, Report},
};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{NewReservation, Wait, WaitReason};
use proptest::prelude::*;

fn ask(workload: &str, user: &str, need: &str) -> LeaseRequest {
    LeaseRequest::new(workload, user, need.parse().unwrap())
}

fn within(workload: &str, user: &str, need: &str, name: &str) -> LeaseRequest {
    LeaseRequest { reservation: Some(name.to_owned()), ..ask(workload, user, need) }
}

fn at(world: &World, seconds: i64) -> Timestamp {
    world.now.wall.checked_add(SignedDuration::from_secs(seconds)).unwrap()
}

/// For user a, in seconds from now.
fn reservation(world: &World, name: &str, need: &str, from: i64, until: i64) -> NewReservation {
    NewReservation {
        name: name.to_owned(),
        need: need.parse().unwrap(),
        slices: 1,
        from: Some(at(world, from)),
        until: at(world, until),
        users: vec!["a".to_owned()],
        projects: Vec::new(),
    }
}

fn reserve(world: &mut World, new: &NewReservation) -> Result<(), AllocatorError> {
    let made = world.ledger.reserve(new, world.now).map(drop);
    world.settle();
    made
}

fn wait(world: &World, workload: &str) -> Wait {
    match world.state(workload) {
        Some(LeaseState::Waiting(wait)) => wait,
        other => panic!("{workload} does not wait: {other:?}"),
    }
}

#[test]
fn a_reservation_is_kept_used_and_over() {
    let mut world = World::new(&["A100-40GB"]);
    let new = reservation(&world, "course", "7g.40gb", 3600, 7200);
    reserve(&mut world, &new).unwrap();
    world.request(&within("j-1-1", "a", "3g.20gb", "course")).unwrap();
    world.request(&ask("w-1-1", "b", "1g.5gb")).unwrap();
    world.ask_for("c-1-1", "2g.10gb", FREE, Some(3600)).unwrap();
    world.finish();
    assert!(world.is_granted("c-1-1"), "it ends in time");
    let told = wait(&world, "w-1-1");
    assert_eq!(told.reason, WaitReason::Reserved);
    assert!(told.detail.contains("set aside for the reservation course"), "{}", told.detail);
    let told = wait(&world, "j-1-1");
    assert_eq!((told.reason, told.estimate), (WaitReason::Reserved, new.from));
    world.pass(3600);
    // It did not end by itself: from here on it may not be renewed, and its container is ended.
    assert!(matches!(world.state("c-1-1"), Some(LeaseState::Ended { reason }) if reason.contains("reserved (course)")));
    world.finish();
    assert!(world.is_granted("j-1-1"), "beside what still runs there");
    assert!(world.ledger.reservations(world.now)[0].trouble.as_ref().unwrap().contains("c-1-1"));
    world.ledger.release("c-1-1", world.now);
    world.settle();
    assert_eq!(world.ledger.reservations(world.now)[0].trouble, None);
    assert!(!world.is_granted("w-1-1"));
    world.pass(3600 - 61);
    assert_eq!(world.notice("j-1-1"), None);
    world.pass(2);
    assert!(world.notice("j-1-1").unwrap().contains("its reservation course ends"));
    world.pass(60);
    assert!(matches!(world.state("j-1-1"), Some(LeaseState::Ended { .. })));
    assert!(world.ledger.reservations(world.now).is_empty());
    world.ledger.release("j-1-1", world.now);
    world.settle();
    world.finish();
    assert!(world.is_granted("w-1-1"));
}

#[test]
fn what_cannot_be_kept_is_not_accepted() {
    let mut world = World::new(&["A100-40GB"]);
    world.request(&ask("w-1-1", "b", "4g.20gb")).unwrap();
    world.finish();
    let mut refused = |name: &str, need: &str, from, until| {
        let new = reservation(&world, name, need, from, until);
        reserve(&mut world, &new).unwrap_err()
    };
    let conflict = |error: AllocatorError, part: &str| {
        assert!(matches!(&error, AllocatorError::Reservation(text) if text.contains(part)), "{error}");
    };
    conflict(refused("x", "7g.40gb", 3600, 7200), "w-1-1 of b (no known end)");
    assert!(matches!(refused("x", "cpu", 3600, 7200), AllocatorError::Invalid(_)));
    assert!(matches!(refused("x", "9g.40gb", 3600, 7200), AllocatorError::Impossible(_)));
    assert!(matches!(refused("a b", "1g.5gb", 3600, 7200), AllocatorError::Invalid(_)));
    assert!(matches!(refused("x", "1g.5gb", 3600, 3610), AllocatorError::Invalid(_)));
    assert!(matches!(refused("x", "1g.5gb", -7200, -3600), AllocatorError::Invalid(_)));
    assert!(matches!(refused("x", "1g.5gb", 0, 500 * 86_400), AllocatorError::Invalid(_)));
    let new = reservation(&world, "x", "3g.20gb", 3600, 7200);
    reserve(&mut world, &new).unwrap();
    reserve(&mut world, &new).unwrap();
    assert_eq!(world.ledger.reservations(world.now).len(), 1, "the same again changes nothing");
    let mut refused = |name: &str, need: &str, from, until| {
        let new = reservation(&world, name, need, from, until);
        reserve(&mut world, &new).unwrap_err()
    };
    conflict(refused("x", "1g.5gb", 3600, 7200), "there is a reservation x already");
    conflict(refused("y", "3g.20gb", 7199, 9000), "other reservations have the space then: x");
}

#[test]
fn only_those_it_is_for_use_it_and_only_for_what_has_room() {
    let mut world = World::new(&["A100-40GB"]);
    let mut new = reservation(&world, "x", "3g.20gb", 3600, 7200);
    new.projects = vec!["vision".to_owned()];
    reserve(&mut world, &new).unwrap();
    let mut refused = |request: LeaseRequest| world.request(&request).unwrap_err();
    let text = |error: AllocatorError| match error {
        AllocatorError::Reservation(text) => text,
        other => panic!("{other}"),
    };
    assert!(text(refused(within("j-1-1", "b", "1g.5gb", "x"))).contains("is not for b"));
    assert!(text(refused(within("j-1-1", "a", "1g.5gb", "y"))).contains("no reservation y"));
    assert!(text(refused(within("j-1-1", "a", "cpu", "x"))).contains("needs no GPU"));
    let error = refused(within("j-1-1", "a", "4g.20gb", "x"));
    assert!(matches!(&error, AllocatorError::Impossible(text) if text.contains("1 of 3g.20gb")), "{error}");
    let error = refused(LeaseRequest { slices: 4, ..within("j-1-1", "a", "1g.10gb", "x") });
    assert!(matches!(error, AllocatorError::Impossible(_)), "{error}");
    let of_project = LeaseRequest { project: Some("vision".to_owned()), ..within("j-1-1", "b", "1g.5gb", "x") };
    world.request(&of_project).unwrap();
    world.pass(3600);
    world.finish();
    assert!(world.is_granted("j-1-1"));
}

#[test]
fn one_that_is_removed_lets_go_of_its_space_and_of_those_who_wait_for_it() {
    let mut world = World::new(&["A100-40GB"]);
    let new = reservation(&world, "x", "7g.40gb", 3600, 7200);
    reserve(&mut world, &new).unwrap();
    world.request(&within("j-1-1", "a", "1g.5gb", "x")).unwrap();
    world.request(&ask("w-1-1", "b", "7g.40gb")).unwrap();
    world.ledger.cancel_reservation("x", world.now);
    world.settle();
    world.finish();
    assert!(world.is_granted("w-1-1"));
    assert!(matches!(world.state("j-1-1"), Some(LeaseState::Ended { reason }) if reason.contains("was removed")));
    world.ledger.cancel_reservation("x", world.now);
}

#[test]
fn one_on_a_gpu_that_fails_moves_or_is_told_as_not_kept() {
    let mut world = World::new(&["A100-40GB", "A100-40GB"]);
    let new = reservation(&world, "x", "7g.40gb", 3600, 7200);
    reserve(&mut world, &new).unwrap();
    let place = |world: &World| world.ledger.reservations(world.now)[0].places[0].gpu.clone();
    let fail = |world: &mut World, uuid: &str| {
        let reading = Err(DriverError::Lost("fallen off the bus".to_owned()));
        world.ledger.report(Report::Gpu { uuid: uuid.to_owned(), reading, change: None }, world.now);
        world.settle();
    };
    let first = place(&world);
    fail(&mut world, &first);
    let second = place(&world);
    assert_ne!(first, second, "it moved");
    assert_eq!(world.ledger.reservations(world.now)[0].trouble, None);
    fail(&mut world, &second);
    let told = world.ledger.reservations(world.now)[0].trouble.clone().unwrap();
    assert!(told.contains("fallen off the bus"), "{told}");
    world.list();
    assert_eq!(world.ledger.reservations(world.now)[0].trouble, None);
    world.request(&within("j-1-1", "a", "7g.40gb", "x")).unwrap();
    world.pass(3600);
    world.finish();
    assert!(world.is_granted("j-1-1"));
}

/// Leases of others that are, or may come to be, where space is reserved while it is.
fn intruders(world: &World) -> Vec<String> {
    let meets = |lease: &LeaseRow| {
        world.ledger.reservations.values().any(|row| {
            let own = lease.request.booked.as_ref().is_some_and(|booked| booked.booking.id == row.booking.id);
            let lasts = lease.known_end().is_none_or(|end| end > row.booking.from);
            let there = row.slots.iter().any(|slot| {
                let span = Columns::span(slot.placement.start, slot.placement.size).unwrap();
                let held = |start, size| Columns::span(start, size).unwrap().overlaps(span);
                let mut slices = lease.slices.iter();
                slices.any(|at| at.gpu == slot.gpu && held(at.placement.start, at.placement.size))
            });
            !own && lasts && there
        })
    };
    let open = world.ledger.leases.values().filter(|lease| !matches!(lease.status, Status::Over(_)));
    open.filter(|lease| meets(lease)).map(|lease| lease.request.workload.clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked and reserved, whenever, and however late those that run end: at no time can somebody else
    /// keep what is reserved, and who it is for has it as soon as the last of those before is proven gone.
    #[test]
    fn a_reservation_that_is_accepted_is_kept(
        steps in prop::collection::vec((0u8..10, 0usize..6, 0i64..4000, 150i64..3000), 1..40),
    ) {
        let needs = ["1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"];
        let mut world = World::new(&["A100-40GB", "A100-40GB"]);
        for (nth, (what, need, from, length)) in steps.iter().enumerate() {
            let need = needs[*need];
            match what {
                0..4 => {
                    let known = (*what > 0).then(|| u64::try_from(*length).unwrap());
                    world.ask_for(&format!("b-{nth}-1"), need, FREE, known).unwrap();
                }
                4..6 => {
                    let new = reservation(&world, &format!("r{nth}"), need, *from, from + length);
                    let made = reserve(&mut world, &new);
                    prop_assert!(made.is_ok() || matches!(made, Err(AllocatorError::Reservation(_))), "{:?}", made);
                }
                6 => {
                    let ended = world.ledger.leases.values().nth(usize::try_from(*from).unwrap() % 3);
                    if let Some(workload) = ended.map(|lease| lease.request.workload.clone()) {
                        world.ledger.release(&workload, world.now);
                        world.settle();
                    }
                }
                7 => world.finish(),
                _ => world.pass(u64::try_from(*from).unwrap()),
            }
            prop_assert_eq!(intruders(&world), Vec::<String>::new());
        }
        world.finish();
        // Every reservation that is left is used to the full when it has begun.
        while let Some(next) = world.ledger.reservations(world.now).into_iter().find(|next| next.in_use == 0) {
            let begins = next.from.duration_since(world.now.wall).as_secs().max(0);
            world.pass(u64::try_from(begins).unwrap());
            prop_assert_eq!(intruders(&world), Vec::<String>::new());
            if next.until.duration_since(world.now.wall).as_secs() <= 60 {
                // Nothing is begun that would be told to end at once.
                world.pass(61);
                continue;
            }
            let late: Vec<String> = world.ledger.leases.values()
                .filter(|lease| matches!(lease.status, Status::Over(_)))
                .map(|lease| lease.request.workload.clone())
                .collect();
            for workload in late {
                world.ledger.release(&workload, world.now);
                world.settle();
            }
            world.finish();
            let workload = format!("j-{}-1", next.name);
            let request = LeaseRequest {
                reservation: Some(next.name.clone()),
                ..LeaseRequest::new(&workload, "a", next.need.clone())
            };
            if world.request(&request).is_err() {
                // The long step was over its end.
                prop_assert!(next.until <= world.now.wall);
                continue;
            }
            world.finish();
            prop_assert!(world.is_granted(&workload), "{:?} has not its space: {:?}", next, world.state(&workload));
        }
    }
}
