use super::super::{
    ledger::Ledger,
    record::{Now, Status, Write},
};
use crate::{
    AllocatorError, LeaseRequest, LeaseState, Limits,
    geometry::Columns,
    node::{
        Change, Listed, Order, Report,
        fake::{Fails, FakeGpu},
    },
};
use jiff::Timestamp;
use mlad::api::SliceState;
use proptest::prelude::*;
use std::{collections::BTreeMap, time::Duration};

/// A ledger with GPUs in memory and a clock of its own.
pub(super) struct World {
    pub(super) ledger: Ledger,
    pub(super) gpus: Vec<FakeGpu>,
    /// Changes that were ordered and not done yet.
    ordered: Vec<(usize, Change)>,
    pub(super) now: Now,
    greatest_fence: u64,
}

impl World {
    pub(super) fn new(keys: &[&str]) -> Self {
        let gpus: Vec<FakeGpu> = (0..).zip(keys).map(|(index, key)| FakeGpu::new(index, key)).collect();
        let now = Now { wall: Timestamp::from_second(1_800_000_000).unwrap(), steady: Duration::ZERO };
        let ledger = Ledger::new("node-1".to_owned(), Duration::from_secs(60));
        let mut world = Self { ledger, gpus, ordered: Vec::new(), now, greatest_fence: 0 };
        world.list();
        world
    }

    pub(super) fn list(&mut self) {
        let listed = self.gpus.iter().map(|gpu| &gpu.reading);
        let listed = listed.map(|gpu| Listed { index: gpu.index, uuid: Ok(gpu.uuid.clone()) }).collect();
        self.ledger.report(Report::Listed(listed), self.now);
        for gpu in &self.gpus {
            self.ledger.report(gpu.read(), self.now);
        }
        self.settle();
    }

    pub(super) fn ask(&mut self, workload: &str, need: &str, limits: Limits) -> Result<(), AllocatorError> {
        self.ask_for(workload, need, limits, None)
    }

    /// Asks for a workload of known length.
    pub(super) fn ask_for(
        &mut self,
        workload: &str,
        need: &str,
        limits: Limits,
        expected_seconds: Option<u64>,
    ) -> Result<(), AllocatorError> {
        let request = LeaseRequest {
            limits,
            expected_seconds,
            ..LeaseRequest::new(workload, workload.chars().take(1).collect::<String>(), need.parse().unwrap())
        };
        self.request(&request)
    }

    pub(super) fn request(&mut self, request: &LeaseRequest) -> Result<(), AllocatorError> {
        let result = self.ledger.request(request, self.now);
        self.settle();
        result
    }

    /// How many changes are ordered and not done yet.
    pub(super) fn ordered(&self) -> usize {
        self.ordered.len()
    }

    /// What the holder of a workload's lease has been told of its end.
    pub(super) fn notice(&self, workload: &str) -> Option<String> {
        let leases = self.ledger.all_leases();
        leases.into_iter().find(|lease| lease.workload == workload)?.ending.map(|ending| ending.reason)
    }

    pub(super) fn pass(&mut self, seconds: u64) {
        self.now.steady += Duration::from_secs(seconds);
        self.now.wall += Duration::from_secs(seconds);
        self.ledger.tick(self.now);
        self.settle();
    }

    /// What the engine does after every step: schedule, write down, give orders.
    pub(super) fn settle(&mut self) {
        self.ledger.schedule(self.now);
        let effects = std::mem::take(&mut self.ledger.effects);
        for write in &effects.writes {
            if let Write::Grant(lease) = write {
                assert!(lease.fence > self.greatest_fence, "fences grow");
                self.greatest_fence = lease.fence;
            }
        }
        for (gpu, order) in effects.orders {
            let at = self.gpus.iter().position(|fake| fake.reading.uuid == gpu).unwrap();
            match order {
                Order::Read => self.ledger.report(self.gpus[at].read(), self.now),
                Order::Change(change) => self.ordered.push((at, change)),
                Order::Clear(_) => unreachable!("the ledger never orders that"),
            }
        }
        self.check();
    }

    /// Does the changes that are ordered until none is left.
    pub(super) fn finish(&mut self) {
        while !self.ordered.is_empty() {
            self.carry_out(0, Fails::Never);
        }
    }

    pub(super) fn carry_out(&mut self, nth: usize, fails: Fails) {
        let (at, change) = self.ordered.remove(nth);
        let report = self.gpus[at].change(&change, fails);
        self.ledger.report(report, self.now);
        self.settle();
    }

    pub(super) fn state(&self, workload: &str) -> Option<LeaseState> {
        self.ledger.state(workload, &self.ledger.outlook(self.now.wall), self.now.wall)
    }

    pub(super) fn is_granted(&self, workload: &str) -> bool {
        matches!(self.state(workload), Some(LeaseState::Granted(_)))
    }

    /// What must always hold: no column has two holders, every lease in force has its instance, and what
    /// users are counted to hold is what they hold.
    pub(super) fn check(&self) {
        let mut taken: BTreeMap<&str, Columns> = BTreeMap::new();
        let mut held: BTreeMap<&str, (u32, u64)> = BTreeMap::new();
        for lease in self.ledger.leases.values() {
            for slice in &lease.slices {
                let span = Columns::span(slice.placement.start, slice.placement.size).unwrap();
                let columns = taken.entry(&slice.gpu).or_default();
                assert!(!span.overlaps(*columns), "two holders on {}", slice.gpu);
                *columns |= span;
                let count = held.entry(&lease.request.user).or_default();
                *count = (count.0 + 1, count.1 + lease.memory_mib);
                if !matches!(lease.status, Status::Over(_)) {
                    let gpu = self.gpus.iter().find(|gpu| gpu.reading.uuid == slice.gpu).unwrap();
                    let there = gpu.reading.instances.iter();
                    let there = there.filter(|i| (i.profile, i.placement) == (slice.profile, slice.placement));
                    assert_eq!(there.count(), 1, "{slice:?} in {:?}", gpu.reading.instances);
                }
            }
        }
        for repartition in self.ledger.changes.values() {
            if let Some((_, placement)) = repartition.change.make {
                let span = Columns::span(placement.start, placement.size).unwrap();
                let columns = taken.entry(&repartition.gpu).or_default();
                assert!(!span.overlaps(*columns), "made where somebody holds on {}", repartition.gpu);
                *columns |= span;
            }
        }
        for waiting in self.ledger.waiting.values() {
            let Some(charge) = waiting.charge else { continue };
            assert!(waiting.entry.preparing && waiting.places.len() == charge.slices as usize);
            let count = held.entry(&waiting.row.user).or_default();
            *count = (count.0 + charge.slices, count.1 + charge.memory_mib);
        }
        for user in ["a", "b", "c"] {
            assert_eq!(self.ledger.accounts.held_by(user), held.get(user).copied().unwrap_or_default(), "{user}");
        }
    }
}

pub(super) const FREE: Limits = Limits { slices: None, gpu_memory_mib: None, gpu_seconds: None };

#[test]
fn an_expired_lease_holds_its_slice_until_its_holder_is_heard_of() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask("a-1", "7g.40gb", FREE).unwrap();
    world.finish();
    world.ask("b-1", "1g.5gb", FREE).unwrap();
    let fence = world.greatest_fence;
    world.pass(59);
    assert!(world.ledger.leases[&fence].status == Status::Active);
    world.pass(2);
    assert!(world.ledger.leases[&fence].status == Status::Expired);
    assert_eq!(world.ledger.map().gpus[0].slices[0].state, SliceState::Quarantined);
    assert!(!world.is_granted("b-1"), "its container may still run");
    world.ledger.renew("a-1", fence, world.now).unwrap();
    assert!(world.ledger.leases[&fence].status == Status::Active, "nobody had it since");
    world.pass(61);
    world.ledger.release("a-1", world.now);
    world.settle();
    world.finish();
    assert!(world.is_granted("b-1"));
}

#[test]
fn who_waits_is_told_whether_space_is_missing_or_one_lease_is_in_the_way() {
    let mut world = World::new(&["A100-40GB"]);
    for (workload, need) in [("b-1", "1g.5gb"), ("c-1", "4g.20gb")] {
        world.ask(workload, need, FREE).unwrap();
        world.finish();
    }
    let told = |world: &World, workload: &str| match world.state(workload) {
        Some(LeaseState::Waiting(wait)) => wait.detail,
        other => panic!("{workload}: {other:?}"),
    };
    assert!(world.is_granted("c-1"));
    world.ask("d-1", "4g.20gb", FREE).unwrap();
    let detail = told(&world, "d-1");
    assert!(detail.contains("it fits as soon as c-1 of c (4g.20gb on GPU 0) ends"), "{detail}");
    world.ledger.release("d-1", world.now);
    world.ask("e-1", "7g.40gb", FREE).unwrap();
    let detail = told(&world, "e-1");
    assert!(detail.contains("it fits when more than one lease has ended"), "{detail}");
}

#[test]
fn a_lease_that_is_renewed_does_not_expire() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask("a-1", "cpu", FREE).unwrap();
    let fence = world.greatest_fence;
    for _ in 0..20 {
        world.pass(20);
        world.ledger.renew("a-1", fence, world.now).unwrap();
    }
    assert_eq!(world.ledger.leases[&fence].status, Status::Active);
    world.ledger.effects.writes.clear();
    world.now.steady += Duration::from_secs(20);
    world.ledger.tick(world.now);
    let written = world.ledger.effects.writes.iter().filter(|write| matches!(write, Write::Renew { .. }));
    assert_eq!(written.count(), 1, "renewals are written down, many as one");
}

#[test]
fn what_was_being_made_for_one_that_left_serves_the_next() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask("a-1", "7g.40gb", FREE).unwrap();
    world.ask("b-1", "7g.40gb", FREE).unwrap();
    world.ledger.release("a-1", world.now);
    world.settle();
    assert_eq!(world.ordered.len(), 1, "its space is not given twice meanwhile");
    world.finish();
    assert!(world.is_granted("b-1"));
    assert_eq!(world.gpus[0].reading.instances.len(), 1);
}

#[test]
fn a_vanished_slice_ends_its_lease_and_is_not_given_on_before_it_is_released() {
    let mut world = World::new(&["A100-40GB"]);
    world.ask("a-1", "7g.40gb", FREE).unwrap();
    world.finish();
    world.gpus[0].reboot();
    world.ledger.report(world.gpus[0].read(), world.now);
    world.settle();
    assert!(matches!(world.state("a-1"), Some(LeaseState::Ended { .. })));
    world.ask("b-1", "7g.40gb", FREE).unwrap();
    world.finish();
    assert!(!world.is_granted("b-1"));
    world.ledger.release("a-1", world.now);
    world.settle();
    world.finish();
    assert!(world.is_granted("b-1"));
}

#[derive(Debug, Clone)]
enum Step {
    Ask(usize, usize, Option<u32>),
    Release(usize),
    Renew(usize),
    Revoke(usize, bool),
    CarryOut(usize, u8),
    Pass(u64),
    Reboot(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..3, 0usize..8, prop::option::of(1u32..4)).prop_map(|(u, p, l)| Step::Ask(u, p, l)),
        5 => (0usize..64).prop_map(Step::Release),
        2 => (0usize..64).prop_map(Step::Renew),
        1 => (0usize..64, any::<bool>()).prop_map(|(w, free)| Step::Revoke(w, free)),
        8 => (0usize..64, 0u8..8).prop_map(|(nth, fails)| Step::CarryOut(nth, fails)),
        2 => (1u64..90).prop_map(Step::Pass),
        1 => (0usize..3).prop_map(Step::Reboot),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is asked, fails and goes away in whatever order: what [`World::check`] says holds after every
    /// step, and when all ends well at last, everybody who waits is served.
    #[test]
    fn the_ledger_stays_sound(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new(&["A100-40GB", "A100-40GB", "A30-24GB"]);
        let mut workloads: Vec<String> = Vec::new();
        for step in steps {
            let pick = |nth: usize| workloads.get(nth % workloads.len().max(1)).cloned().unwrap_or_default();
            match step {
                Step::Ask(user, need, slices) => {
                    let workload = format!("{}-{}", ["a", "b", "c"][user], workloads.len());
                    let need = ["1g.5gb", "2g.10gb", "3g.20gb", "7g.40gb", "2g.12gb", "1g.6gb+me", "10G", "cpu"][need];
                    world.ask(&workload, need, Limits { slices, gpu_memory_mib: None, gpu_seconds: None }).unwrap();
                    workloads.push(workload);
                }
                Step::Release(nth) => world.ledger.release(&pick(nth), world.now),
                Step::Renew(nth) => {
                    let fence = world.ledger.lease(&pick(nth)).map_or(0, |lease| lease.fence);
                    // Unknown or over: refused, and nothing more.
                    drop(world.ledger.renew(&pick(nth), fence, world.now));
                }
                Step::Revoke(nth, free) => world.ledger.revoke(&pick(nth), "revoked", free, world.now),
                Step::CarryOut(nth, fails) if !world.ordered.is_empty() => {
                    let all = [Fails::Destroy, Fails::HalfWay, Fails::Make, Fails::Never];
                    let fails = all[usize::from(fails).min(3)];
                    // Those of one GPU are done in order.
                    let gpu = world.ordered[nth % world.ordered.len()].0;
                    let first = world.ordered.iter().position(|(at, _)| *at == gpu).unwrap();
                    world.carry_out(first, fails);
                }
                Step::CarryOut(..) => {}
                Step::Pass(seconds) => world.pass(seconds),
                Step::Reboot(at) => {
                    world.gpus[at].reboot();
                    world.ledger.report(world.gpus[at].read(), world.now);
                }
            }
            world.settle();
        }
        // Then everybody who holds something leaves, again and again, and nothing fails any more.
        for _ in 0..workloads.len() + 2 {
            for _ in 0..10 {
                world.finish();
                world.pass(61);
            }
            let held: Vec<String> = world.ledger.leases.values().map(|lease| lease.request.workload.clone()).collect();
            for workload in held {
                world.ledger.release(&workload, world.now);
            }
            world.settle();
        }
        prop_assert!(world.ledger.waiting.is_empty(), "{:?}", world.ledger.waiting);
        prop_assert!(world.ledger.leases.is_empty() && world.ledger.changes.is_empty());
    }
}
