//! What the ledger knows of each GPU: what was read last, and what of it is in doubt.

use super::record::Now;
use crate::{
    geometry::{Columns, Model, Placed},
    node::{Device, Instance, Reading},
    placement::{SlotState, Space},
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// A slot of a GPU, as the driver numbers it: profile and start.
pub(super) type Key = (u32, u32);

/// A GPU, as it was read last.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) uuid: String,
    /// The node it sits in.
    pub(super) node: Arc<str>,
    pub(super) index: u32,
    pub(super) model: Arc<Model>,
    pub(super) instances: Vec<Instance>,
    /// When it was last read.
    pub(super) read_at: Timestamp,
    /// Why nothing may be granted on it.
    pub(super) fault: Option<Doubt>,
    /// Instances that may not be granted.
    pub(super) doubts: BTreeMap<Key, Doubt>,
    /// Placements that the driver refused.
    pub(super) barred: BTreeMap<Key, Barred>,
}

/// A GPU that is in the driver's list, but of which nothing could be read yet.
#[derive(Debug)]
pub(super) struct Unread {
    /// Its UUID, if the driver tells at least that.
    pub(super) uuid: Option<String>,
    /// Why it cannot be read.
    pub(super) doubt: Doubt,
}

/// What of a GPU matters to the queue and to those who watch; what else differs between two readings is no
/// change.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Face {
    index: u32,
    model: Arc<Model>,
    instances: Vec<(u32, Key, Device)>,
    fault: Option<String>,
    doubts: Vec<(Key, String)>,
    barred: Vec<Key>,
}

/// Something in doubt, and when it is looked at again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doubt {
    pub(super) reason: String,
    pub(super) remedy: Remedy,
    pub(super) tries: u32,
    pub(super) retry_at: Duration,
}

/// A placement that the driver refused, and until when it is not tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Barred {
    pub(super) until: Duration,
    pub(super) reason: String,
}

/// What may end a doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Reading again.
    Read,
    /// Giving the instance the compute instance it lacks.
    Complete,
    /// Destroying the instance.
    Destroy,
}

impl Doubt {
    /// A doubt that is not looked at again by itself: it ends when the driver is heard of.
    pub(super) fn until_told(reason: String) -> Self {
        Self { reason, remedy: Remedy::Read, tries: 0, retry_at: Duration::MAX }
    }

    /// A doubt that is looked at again after a second, or twice as long as the one before.
    pub(super) fn new(reason: impl Into<String>, remedy: Remedy, before: Option<&Self>, now: Now) -> Self {
        let tries = before.map_or(0, |before| before.tries.saturating_add(1));
        let pause = Duration::from_secs(1 << tries.min(6)).min(Duration::from_secs(60));
        Self { reason: reason.into(), remedy, tries, retry_at: now.steady + pause }
    }
}

impl Gpu {
    pub(super) fn new(node: &str, reading: Reading) -> Self {
        let Reading { index, uuid, model, instances } = reading;
        Self {
            uuid,
            node: node.into(),
            index,
            model: Arc::new(model),
            instances,
            read_at: Timestamp::UNIX_EPOCH,
            fault: None,
            doubts: BTreeMap::new(),
            barred: BTreeMap::new(),
        }
    }

    /// Takes in what was read. True if the GPU is cut differently now.
    pub(super) fn observe(&mut self, reading: Reading) -> bool {
        self.index = reading.index;
        self.instances = reading.instances;
        self.fault = None;
        let there = |key: &Key| self.instances.iter().any(|instance| key_of(instance) == *key);
        self.doubts.retain(|key, _| there(key));
        let other = *self.model != reading.model;
        if other {
            self.model = Arc::new(reading.model);
            self.barred.clear();
        }
        other
    }

    /// What of it matters to others. Processes are not among it: of those only doubts come.
    pub(super) fn face(&self) -> Face {
        let instance = |instance: &Instance| (instance.id, key_of(instance), instance.device.clone());
        Face {
            index: self.index,
            model: Arc::clone(&self.model),
            instances: self.instances.iter().map(instance).collect(),
            fault: self.fault.as_ref().map(|fault| fault.reason.clone()),
            doubts: self.doubts.iter().map(|(key, doubt)| (*key, doubt.reason.clone())).collect(),
            barred: self.barred.keys().copied().collect(),
        }
    }

    /// The instance in a slot.
    pub(super) fn instance(&self, key: Key) -> Option<&Instance> {
        self.instances.iter().find(|instance| key_of(instance) == key)
    }

    /// The UUID a container can be given for a slot, if the instance there is whole.
    pub(super) fn device(&self, key: Key) -> Option<&str> {
        match &self.instance(key)?.device {
            Device::Whole(uuid) => Some(uuid),
            Device::Missing | Device::Split => None,
        }
    }

    /// Finds doubts in idle instances, and ends those that reading ends. `held` tells the slots that are not
    /// idle; what happens there is their holder's.
    pub(super) fn examine(&mut self, held: impl Fn(Key) -> bool, now: Now) {
        for instance in &self.instances {
            let key = key_of(instance);
            let before = self.doubts.get(&key);
            if held(key) {
                self.doubts.remove(&key);
            } else if instance.device == Device::Missing {
                if before.is_none() {
                    let doubt = Doubt::new("it has no compute instance", Remedy::Complete, None, now);
                    self.doubts.insert(key, Doubt { retry_at: now.steady, ..doubt });
                }
            } else if instance.processes > 0 && before.is_none_or(|before| before.remedy == Remedy::Read) {
                let reason = format!("{} processes that are not MLAD's use it", instance.processes);
                let doubt = Doubt::new(reason, Remedy::Read, before, now);
                tracing::warn!(gpu = self.index, profile = key.0, start = key.1, reason = doubt.reason, "quarantined");
                self.doubts.insert(key, doubt);
            } else if before.is_some_and(|before| before.remedy == Remedy::Read) {
                self.doubts.remove(&key);
            }
        }
    }

    /// The space on it, for placement: `held` are slots that are leased, or being made or destroyed.
    pub(super) fn space(&self, model: usize, held: impl IntoIterator<Item = Key>) -> Space {
        let mut space = Space::empty(model);
        space.usable = self.fault.is_none();
        for instance in &self.instances {
            let key = key_of(instance);
            let Some(placed) = self.placed(key) else {
                let span = Columns::span(instance.placement.start, instance.placement.size);
                space.block(&self.model, span.unwrap_or(!Columns::NONE));
                continue;
            };
            let whole = matches!(instance.device, Device::Whole(_));
            let state = match self.doubts.contains_key(&key) {
                true => SlotState::Held,
                false => SlotState::Idle { reusable: whole },
            };
            space.set(&self.model, placed, state);
        }
        for placed in held.into_iter().filter_map(|key| self.placed(key)) {
            space.set(&self.model, placed, SlotState::Held);
        }
        for placed in self.barred.keys().filter_map(|key| self.placed(*key)) {
            space.bar(placed);
        }
        space
    }

    /// A slot in the model's terms.
    pub(super) fn placed(&self, (profile, start): Key) -> Option<Placed> {
        let profile = self.model.by_id(profile)?;
        self.model.profile(profile)?.span_at(start)?;
        Some(Placed { profile, start })
    }

    /// A slot in the driver's terms.
    pub(super) fn key(&self, placed: Placed) -> Option<Key> {
        Some((self.model.profile(placed.profile)?.id, placed.start))
    }

    /// Everything about it that is in doubt.
    pub(super) fn all_doubts(&mut self) -> impl Iterator<Item = &mut Doubt> {
        self.doubts.values_mut().chain(&mut self.fault)
    }

    /// What keeps space of it from being used, for people, who know it as `place`: a line for each kind of trouble.
    pub(super) fn troubles(&self, place: &str) -> BTreeSet<String> {
        let name = |profile: u32| {
            let profile = self.model.by_id(profile).and_then(|index| self.model.profile(index));
            profile.map_or("?", |profile| profile.name.as_str())
        };
        let doubts = self.doubts.iter().map(|(key, doubt)| (name(key.0), &doubt.reason));
        let doubts = doubts.map(|(name, reason)| format!("{place}: an idle {name} is not used: {reason}"));
        let barred = self.barred.iter().map(|(key, barred)| (name(key.0), &barred.reason));
        let barred = barred.map(|(name, reason)| format!("{place}: no {name} could be made: {reason}"));
        doubts.chain(barred).collect()
    }

    /// When something of it is to be looked at again.
    pub(super) fn next_retry(&self) -> Option<Duration> {
        let doubts = self.doubts.values().chain(&self.fault).map(|doubt| doubt.retry_at);
        doubts.chain(self.barred.values().map(|barred| barred.until)).min()
    }
}

/// The slot an instance lies in.
pub(super) fn key_of(instance: &Instance) -> Key {
    (instance.profile, instance.placement.start)
}
