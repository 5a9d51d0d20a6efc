//! A GPU that exists in memory only and does what changes say, without threads; for tests of the ledger.

use super::{Change, Device, DriverError, Failure, Instance, Reading, Report, Stage};
use crate::geometry::{Model, Placed, facts, is_legal};
use mlad::api::Placement;

/// A GPU in memory.
#[derive(Debug, Clone)]
pub(crate) struct FakeGpu {
    pub(crate) reading: Reading,
    made: u32,
}

impl FakeGpu {
    /// An empty GPU of a model of the facts.
    pub(crate) fn new(index: u32, key: &str) -> Self {
        let reading = Reading { index, uuid: format!("GPU-{index}"), model: facts::model(key), instances: Vec::new() };
        Self { reading, made: 0 }
    }

    /// What is on it.
    pub(crate) fn read(&self) -> Report {
        Report::Gpu { uuid: self.reading.uuid.clone(), reading: Ok(self.reading.clone()), change: None }
    }

    /// Does a change, as far as `fails` lets it: none, at the first destroy (half-way or not at all), at the make.
    pub(crate) fn change(&mut self, change: &Change, fails: Fails) -> Report {
        let result = self.attempt(change, fails);
        Report::Gpu {
            uuid: self.reading.uuid.clone(),
            reading: Ok(self.reading.clone()),
            change: Some((change.id, result)),
        }
    }

    /// All instances are gone.
    pub(crate) fn reboot(&mut self) {
        self.reading.instances.clear();
    }

    fn attempt(&mut self, change: &Change, fails: Fails) -> Result<(), Failure> {
        for (profile, start) in change.destroy.iter().copied() {
            let instances = &mut self.reading.instances;
            let Some(at) = instances.iter().position(|i| i.profile == profile && i.placement.start == start) else {
                continue;
            };
            let failed = Failure { stage: Stage::Destroy(profile, start), error: DriverError::InUse };
            match fails {
                Fails::Destroy => return Err(failed),
                Fails::HalfWay => {
                    instances[at].device = Device::Missing;
                    return Err(failed);
                }
                Fails::Never | Fails::Make => drop(instances.remove(at)),
            }
        }
        let Some((profile, placement)) = change.make else { return Ok(()) };
        if fails == Fails::Make {
            return Err(Failure { stage: Stage::Make, error: DriverError::NoRoom });
        }
        self.make(profile, placement);
        Ok(())
    }

    fn make(&mut self, profile: u32, placement: Placement) {
        self.made += 1;
        let device = Device::Whole(format!("MIG-{}-{}", self.reading.index, self.made));
        let there = self.reading.instances.iter_mut();
        if let Some(half) = there.into_iter().find(|i| i.profile == profile && i.placement == placement) {
            assert_eq!(half.device, Device::Missing, "made twice");
            half.device = device;
            return;
        }
        self.reading.instances.push(Instance { id: self.made, profile, placement, device, processes: 0 });
        let model = &self.reading.model;
        assert!(is_legal(model, &placed(model, &self.reading.instances)), "{:?}", self.reading.instances);
    }
}

/// Where a change fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fails {
    Never,
    Destroy,
    HalfWay,
    Make,
}

fn placed(model: &Model, instances: &[Instance]) -> Vec<Placed> {
    let index = |instance: &Instance| model.by_id(instance.profile).expect("profile");
    instances.iter().map(|i| Placed { profile: index(i), start: i.placement.start }).collect()
}
