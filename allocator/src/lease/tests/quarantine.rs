use super::{
    super::{
        record::{QuarantineRow, Write},
        store::Loaded,
    },
    ledger::World,
};
use crate::{AllocatorError, Limits, node::Report};

fn xid(world: &mut World, xid: u64) {
    world.ledger.report(Report::Xid { gpu: "GPU-0".to_owned(), xid: Some(xid) }, world.now);
}

fn fault(world: &World) -> Option<String> {
    world.ledger.map().gpus[0].fault.clone()
}

#[test]
fn a_gpu_with_a_fatal_error_is_granted_no_more_and_its_holders_are_told() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask("w-1-1", "1g.5gb", Limits::default()).unwrap();
    world.finish();
    xid(&mut world, 31);
    assert_eq!(fault(&world), None, "an application's error");
    xid(&mut world, 95);
    assert!(fault(&world).unwrap().contains("XID 95"));
    world.ask("a-1-1", "1g.5gb", Limits::default()).unwrap();
    world.finish();
    assert!(world.is_granted("w-1-1") && !world.is_granted("a-1-1"));
    let leases = world.ledger.all_leases();
    assert!(leases[0].trouble.as_ref().is_some_and(|trouble| trouble.contains("GPU 0")), "{leases:?}");
    // Reading it does not make it well.
    world.list();
    assert!(!world.is_granted("a-1-1"));
    world.ledger.trust_gpu("GPU-0").unwrap();
    world.settle();
    world.finish();
    assert!(world.is_granted("a-1-1"));
    assert_eq!(world.ledger.all_leases()[0].trouble, None);
    assert!(matches!(world.ledger.trust_gpu("GPU-9"), Err(AllocatorError::Unknown(_))));
}

#[test]
fn quarantine_outlasts_the_allocator_and_not_the_machine() {
    let mut world = World::new(&["A100-40GB"]);
    world.ledger.boot = "boot-1".to_owned();
    world.ledger.report(Report::Xid { gpu: "GPU-0".to_owned(), xid: Some(64) }, world.now);
    let rows: Vec<QuarantineRow> = std::mem::take(&mut world.ledger.effects)
        .writes
        .into_iter()
        .filter_map(|write| match write {
            Write::Quarantine(row) => Some(row),
            _ => None,
        })
        .collect();
    assert_eq!(rows.len(), 1);
    for (boot, trusted) in [("boot-1", false), ("boot-2", true)] {
        let mut after = World::new(&["A100-40GB"]);
        after.ledger.boot = boot.to_owned();
        after.ledger.load(Loaded { quarantine: rows.clone(), ..Loaded::default() }, after.now);
        assert_eq!(fault(&after).is_none(), trusted, "{boot}");
    }
}
