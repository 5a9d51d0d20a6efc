//! What is told, kept and passed over: cases of the ledger that went wrong once.

use super::{
    super::{
        admit::MOST_SLICELESS,
        ledger::Ledger,
        record::{LeaseRow, Now, Status},
        store::Loaded,
    },
    ledger::{FREE, World},
};
use crate::{
    AllocatorError, LeaseRequest, LeaseState,
    node::{DriverError, Listed, Order, Report, fake::FakeGpu},
};
use mlad::api::{Need, Wait};
use std::time::Duration;

fn wait(state: Option<LeaseState>) -> Wait {
    match state {
        Some(LeaseState::Waiting(wait)) => wait,
        other => panic!("it does not wait: {other:?}"),
    }
}

fn need(text: &str) -> Need {
    text.parse().unwrap()
}

/// Takes what the ledger wants done, and says whether it wants anybody to know.
fn told(world: &mut World) -> bool {
    world.ledger.schedule(world.now);
    std::mem::take(&mut world.ledger.effects).changed
}

fn listed(index: u32, uuid: Result<&str, DriverError>) -> Report {
    Report::Listed(vec![Listed { index, uuid: uuid.map(str::to_owned) }])
}

fn unreadable(error: DriverError) -> Report {
    Report::Gpu { uuid: "GPU-0".to_owned(), reading: Err(error), change: None }
}

/// A ledger that knows nothing of its one GPU.
fn blind() -> World {
    let mut world = World::new(&[]);
    world.gpus.push(FakeGpu::new(0, "A100-40GB"));
    world
}

#[test]
fn a_gpu_that_is_listed_and_cannot_be_read_makes_nothing_impossible() {
    let mut world = blind();
    let refused = |world: &World| world.ledger.resolve(&need("1g.5gb")).unwrap_err();
    assert!(matches!(refused(&world), AllocatorError::Impossible(_)), "there is none");
    world.ledger.report(listed(0, Ok("GPU-0")), world.now);
    assert!(matches!(refused(&world), AllocatorError::Driver(_)), "it has not answered yet");
    world.ledger.report(unreadable(DriverError::Denied), world.now);
    let error = refused(&world);
    assert!(matches!(&error, AllocatorError::Driver(why) if why.contains("MLAD has to run as root")), "{error}");
    let map = world.ledger.map();
    assert_eq!((map.gpus[0].uuid.as_str(), map.gpus.len()), ("GPU-0", 1));
    assert!(map.gpus[0].fault.as_ref().is_some_and(|fault| fault.contains("root")), "{map:?}");
    // Asked again and again: not only when the list is next read.
    for pause in [1, 2, 4, 8] {
        world.now.steady += Duration::from_secs(pause);
        world.ledger.tick(world.now);
        let orders = std::mem::take(&mut world.ledger.effects.orders);
        assert!(matches!(orders.as_slice(), [(gpu, Order::Read)] if gpu == "GPU-0"), "{orders:?}");
        world.ledger.report(unreadable(DriverError::Denied), world.now);
    }
    world.list();
    assert_eq!(world.ledger.map().gpus[0].fault, None);
    assert!(world.ledger.resolve(&need("1g.5gb")).is_ok());
    assert!(matches!(world.ledger.resolve(&need("9g.99gb")), Err(AllocatorError::Impossible(_))), "now it is known");
}

#[test]
fn a_gpu_that_does_not_tell_its_name_makes_nothing_impossible() {
    let mut world = World::new(&["A30-24GB"]);
    let lost = DriverError::Lost("it fell off the bus".to_owned());
    let both = vec![Listed { index: 0, uuid: Ok("GPU-0".to_owned()) }, Listed { index: 1, uuid: Err(lost) }];
    world.ledger.report(Report::Listed(both), world.now);
    assert!(world.ledger.resolve(&need("1g.6gb")).is_ok(), "what is there serves");
    let error = world.ledger.resolve(&need("7g.40gb")).unwrap_err();
    assert!(matches!(&error, AllocatorError::Driver(why) if why.contains("GPU 1")), "{error}");
    world.list();
    let error = world.ledger.resolve(&need("7g.40gb")).unwrap_err();
    assert!(matches!(error, AllocatorError::Impossible(_)), "it is not listed any more: {error}");
}

#[test]
fn a_reading_that_was_not_written_down_is_not_forgotten() {
    let mut world = World::new(&["A100-40GB", "A100-40GB"]);
    for workload in ["a-1", "b-1"] {
        world.ask(workload, "7g.40gb", FREE).unwrap();
        world.finish();
    }
    let leases: Vec<LeaseRow> = world.ledger.leases.values().cloned().collect();
    let on = |at: usize| leases[at].slices[0].gpu_index as usize;
    world.gpus[on(0)].reboot();
    world.ledger.report(world.gpus[on(0)].read(), world.now);
    // A GPU that does not answer shows nothing: what is on it stands.
    world.gpus[on(1)].reboot();
    let lost = Err(DriverError::Lost("it fell off the bus".to_owned()));
    let uuid = world.gpus[on(1)].reading.uuid.clone();
    world.ledger.report(Report::Gpu { uuid, reading: lost, change: None }, world.now);
    let over = |world: &World, at: usize| matches!(world.ledger.leases[&leases[at].fence].status, Status::Over(_));
    assert!(over(&world, 0));
    // The write fails: the ledger is read anew, as it was.
    world.ledger.load(Loaded { leases: leases.clone(), ..Loaded::default() }, world.now);
    assert!(over(&world, 0), "its slice is gone all the same");
    assert!(!over(&world, 1));
    assert!(!world.ledger.effects.writes.is_empty(), "and that is written down yet");
}

#[test]
fn a_report_of_what_is_known_wakes_nobody() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask("a-1", "3g.20gb", FREE).unwrap();
    world.finish();
    told(&mut world);
    let mut reading = world.gpus[0].reading.clone();
    reading.instances[0].processes = 1;
    let used = Report::Gpu { uuid: reading.uuid.clone(), reading: Ok(reading), change: None };
    let same =
        [world.gpus[0].read(), used, Report::Xid { gpu: "GPU-0".to_owned(), xid: Some(13) }, listed(0, Ok("GPU-0"))];
    for report in same {
        let shown = format!("{report:?}");
        world.ledger.report(report, world.now);
        assert!(!told(&mut world), "{shown}");
    }
    let lost = || unreadable(DriverError::Lost("it fell off the bus".to_owned()));
    for (report, is_news) in [
        (lost(), true),
        (lost(), false),
        (world.gpus[0].read(), true),
        (Report::Down(DriverError::Absent("it is gone".to_owned())), true),
        (Report::Down(DriverError::Absent("it is gone".to_owned())), false),
        (listed(0, Ok("GPU-0")), true),
        (world.gpus[0].read(), true),
        (world.gpus[0].read(), false),
    ] {
        let shown = format!("{report:?}");
        world.ledger.report(report, world.now);
        assert_eq!(told(&mut world), is_news, "{shown}");
    }
    world.gpus[0].reboot();
    world.ledger.report(world.gpus[0].read(), world.now);
    assert!(told(&mut world), "instances are gone");
}

#[test]
fn an_estimate_is_never_in_the_past() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask_for("a-1", "7g.40gb", FREE, Some(600)).unwrap();
    world.finish();
    world.ask("b-1", "7g.40gb", FREE).unwrap();
    let begun = world.now.wall;
    let outlook = world.ledger.outlook(begun);
    let estimate = |world: &World| wait(world.ledger.state("b-1", &outlook, world.now.wall)).estimate.unwrap();
    assert_eq!(estimate(&world).duration_since(begun).as_secs(), 600);
    world.now.wall += Duration::from_secs(599);
    assert!(outlook.is_good(world.now.wall));
    world.now.wall += Duration::from_secs(61);
    assert!(!outlook.is_good(world.now.wall), "the lease did not end when it was said to");
    assert_eq!(estimate(&world), world.now.wall, "any moment");
    // Worked out anew it is good for a moment only.
    let outlook = world.ledger.outlook(world.now.wall);
    assert_eq!(wait(world.ledger.state("b-1", &outlook, world.now.wall)).estimate, Some(world.now.wall));
    assert!(outlook.is_good(world.now.wall) && !outlook.is_good(world.now.wall + Duration::from_secs(10)));
}

#[test]
fn places_are_told_without_counting_everybody_ahead() {
    let mut world = World::new(&["A100-40GB"]);
    for nth in 0..40 {
        world.ask(&format!("a-{nth}"), "7g.40gb", FREE).unwrap();
    }
    for gone in [0, 3, 17] {
        world.ledger.release(&format!("a-{gone}"), world.now);
    }
    world.settle();
    let outlook = world.ledger.outlook(world.now.wall);
    let waits = world.ledger.waits(&outlook, world.now.wall);
    assert_eq!(waits.len(), 37);
    for (at, listed) in waits.iter().enumerate() {
        let asked = wait(world.ledger.state(&listed.workload, &outlook, world.now.wall));
        assert_eq!((&asked, asked.place as usize, asked.waiting), (listed, at + 1, 37));
    }
}

#[test]
fn leases_without_a_slice_are_bounded() {
    let mut ledger = Ledger::new("node-1".to_owned(), Duration::from_secs(60));
    let now = Now { wall: jiff::Timestamp::UNIX_EPOCH, steady: Duration::ZERO };
    let request = |workload: String| LeaseRequest::new(workload, "alice", Need::Cpu);
    for nth in 0..MOST_SLICELESS {
        ledger.request(&request(format!("w-{nth}-1")), now).unwrap();
        if nth % 1000 == 0 {
            ledger.schedule(now);
        }
    }
    let more = request("w-more-1".to_owned());
    let error = ledger.request(&more, now).unwrap_err();
    assert!(
        matches!(&error, AllocatorError::TooMany(text) if text.contains("50000 workloads without a GPU")),
        "{error}"
    );
    ledger.schedule(now);
    assert!(ledger.request(&more, now).is_err());
    ledger.release("w-7-1", now);
    ledger.request(&more, now).unwrap();
}
