//! What the ledger makes of what the GPUs' threads report.

use super::{
    gpu::{Barred, Doubt, Face, Gpu, Key, Remedy, Unread},
    ledger::Ledger,
    record::{Now, Purpose, Repartition, Status, Write},
};
use crate::{
    node::{DriverError, Failure, Listed, Order, Reading, Report, Stage},
    placement::{Pool, Space},
    queue::TROUBLES,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// A placement that the driver refused is not tried again for this long, unless the GPU changes.
const BARRED: Duration = Duration::from_secs(30);

/// What is known of all GPUs of a node, as far as a list of the driver tells it.
#[derive(PartialEq, Eq)]
struct Roll {
    down: Option<String>,
    faults: Vec<Option<String>>,
    unread: Vec<(u32, Option<String>, String)>,
}

impl Ledger {
    /// Takes in a report of our own machine.
    pub(super) fn report(&mut self, report: Report, now: Now) {
        let node = self.node.clone();
        self.take_in(&node, report, now);
    }

    /// Takes in a report of a node. Nobody is woken by one that says what is known already.
    pub(super) fn take_in(&mut self, node: &str, report: Report, now: Now) {
        match report {
            Report::Down(error) => self.driver_down(node, &error),
            Report::Listed(listed) => self.listed(node, &listed, now),
            Report::Gpu { uuid, reading, change } => {
                if let Some(machine) = self.nodes.get_mut(node) {
                    machine.read_at = now.wall;
                }
                if let Some(other) = self.gpu(&uuid).map(|gpu| Arc::clone(&gpu.node)).filter(|other| **other != *node)
                    && !self.moved(&uuid, &other, node)
                {
                    return self.not_own(node, &uuid, &other, now);
                }
                let before = self.face(&uuid);
                let change = change.and_then(|(id, result)| Some((self.finish(id)?, result)));
                let changed = change.is_some();
                self.observe(node, &uuid, reading, now);
                if let Some((change, result)) = change {
                    self.outcome(change, result, now);
                }
                self.examine(&uuid, now);
                self.rebuild(&uuid);
                if changed || self.face(&uuid) != before {
                    self.stir();
                }
            }
            Report::Xid { gpu, xid } => {
                self.fatal(node, &gpu, xid, now);
            }
        }
    }

    /// Looks again at what is in doubt, where it is due.
    pub(super) fn look_again(&mut self, now: Now) {
        let due = |doubt: &Doubt| doubt.retry_at <= now.steady;
        let mut orders: Vec<(String, Order)> = Vec::new();
        let mut repairs: Vec<(String, Key, Remedy)> = Vec::new();
        let mut freed: Vec<String> = Vec::new();
        for gpu in &mut self.gpus {
            let barred = gpu.barred.len();
            gpu.barred.retain(|_, barred| barred.until > now.steady);
            if gpu.barred.len() < barred {
                freed.push(gpu.uuid.clone());
            }
            for doubt in gpu.fault.iter_mut().filter(|doubt| due(doubt)) {
                doubt.retry_at = Duration::MAX;
                orders.push((gpu.uuid.clone(), Order::Read));
            }
            for (key, doubt) in gpu.doubts.iter_mut().filter(|(_, doubt)| due(doubt)) {
                doubt.retry_at = Duration::MAX;
                match doubt.remedy {
                    Remedy::Read => orders.push((gpu.uuid.clone(), Order::Read)),
                    remedy => repairs.push((gpu.uuid.clone(), *key, remedy)),
                }
            }
        }
        let unread = self.nodes.values_mut().flat_map(|node| node.unread.values_mut());
        for unread in unread.filter(|unread| due(&unread.doubt)) {
            unread.doubt.retry_at = Duration::MAX;
            // One without a name can only be found in the next list.
            orders.extend(unread.uuid.iter().map(|uuid| (uuid.clone(), Order::Read)));
        }
        self.effects.orders.append(&mut orders);
        for (gpu, key, remedy) in repairs {
            if self.changes.values().any(|change| change.gpu == gpu && change.slots().any(|slot| slot == key)) {
                continue;
            }
            let placement = self.gpu(&gpu).and_then(|gpu| gpu.instance(key)).map(|instance| instance.placement);
            let Some(placement) = placement else { continue };
            let unfinished = self.unfinished.contains(&(gpu.clone(), key));
            let (destroy, make) = match remedy {
                Remedy::Complete if !unfinished => (Vec::new(), Some((key.0, placement))),
                _ => (vec![key], None),
            };
            self.begin(&gpu, destroy, make, Purpose::Repair(key.0, key.1), now);
        }
        for gpu in freed {
            self.rebuild(&gpu);
            self.stir();
        }
    }

    /// What is on a GPU has changed in the ledger: its space is worked out again.
    pub(super) fn rebuild(&mut self, uuid: &str) {
        let Some(at) = self.gpus.iter().position(|gpu| gpu.uuid == uuid) else { return };
        let Some(gpu) = self.gpus.get(at) else { return };
        let Some(model) = self.pool.models().iter().position(|model| Arc::ptr_eq(model, &gpu.model)) else { return };
        let space = self.space_of(gpu, model);
        self.pool.replace(at, space);
        self.pool.price(&self.policy);
    }

    /// Works out models and space of every GPU, and what each waiting request comes to on them.
    pub(super) fn rebuild_all(&mut self) {
        let mut models: Vec<Arc<_>> = Vec::new();
        for gpu in &mut self.gpus {
            match models.iter().find(|model| **model == gpu.model) {
                Some(model) => gpu.model = Arc::clone(model),
                None => models.push(Arc::clone(&gpu.model)),
            }
        }
        let spaces = self.gpus.iter().map(|gpu| {
            let model = models.iter().position(|model| Arc::ptr_eq(model, &gpu.model)).unwrap_or(usize::MAX);
            self.space_of(gpu, model)
        });
        let gpus = spaces.collect();
        let number = |gpu: &Gpu| self.nodes.get(&*gpu.node).map_or(u32::MAX, |node| node.number);
        let nodes = self.gpus.iter().map(number).collect();
        self.pool = Pool::new(models, gpus).on_nodes(nodes);
        self.pool.price(&self.policy);
        self.work_out_all();
        self.stir();
    }

    /// The space on a GPU whose model has this number.
    fn space_of(&self, gpu: &Gpu, model: usize) -> Space {
        let mut space = gpu.space(model, self.held_on(&gpu.uuid));
        space.usable &= !self.quarantine.contains_key(&gpu.uuid);
        space
    }

    /// Puts the GPUs into their order: node, then index.
    fn sort_gpus(&mut self) {
        self.gpus.sort_by(|a, b| (&a.node, a.index).cmp(&(&b.node, b.index)));
    }

    fn gpu(&self, uuid: &str) -> Option<&Gpu> {
        self.gpus.iter().find(|gpu| gpu.uuid == uuid)
    }

    fn gpu_mut(&mut self, uuid: &str) -> Option<&mut Gpu> {
        self.gpus.iter_mut().find(|gpu| gpu.uuid == uuid)
    }

    /// Slots of a GPU that are leased, being made or being destroyed.
    fn held_on(&self, uuid: &str) -> BTreeSet<Key> {
        let from = (uuid.to_owned(), (0, 0));
        let leased = self.holders.range(from..).take_while(|((gpu, _), _)| gpu == uuid).map(|((_, key), _)| *key);
        let changing = self.changes.values().filter(|repartition| repartition.gpu == uuid);
        let from = (uuid.to_owned(), (0, 0));
        let promised = self.promised.range(from..).take_while(|((gpu, _), _)| gpu == uuid).map(|((_, key), _)| *key);
        leased.chain(promised).chain(changing.flat_map(Repartition::slots)).collect()
    }

    /// What is known of a GPU, as far as it matters to others.
    fn face(&self, uuid: &str) -> (Option<Face>, Option<String>) {
        let mut unread = self.nodes.values().flat_map(|node| node.unread.values());
        let unread = unread.find(|unread| unread.uuid.as_deref() == Some(uuid));
        (self.gpu(uuid).map(Gpu::face), unread.map(|unread| unread.doubt.reason.clone()))
    }

    /// What is known of all GPUs of a node, as far as a list tells it.
    fn roll(&self, node: &str) -> Roll {
        let fault = |gpu: &Gpu| gpu.fault.as_ref().map(|fault| fault.reason.clone());
        let unread = |(index, unread): (&u32, &Unread)| (*index, unread.uuid.clone(), unread.doubt.reason.clone());
        let machine = self.nodes.get(node);
        Roll {
            down: machine.and_then(|machine| machine.down.clone()),
            faults: self.gpus.iter().filter(|gpu| *gpu.node == *node).map(fault).collect(),
            unread: machine.into_iter().flat_map(|machine| &machine.unread).map(unread).collect(),
        }
    }

    fn driver_down(&mut self, node: &str, error: &DriverError) {
        let before = self.roll(node);
        let reason = error.to_string();
        let Some(machine) = self.nodes.get_mut(node) else { return };
        if machine.down.as_ref() != Some(&reason) {
            tracing::warn!(node, reason, "only `cpu` can be granted there until the driver answers");
        }
        machine.down = Some(reason.clone());
        for gpu in self.gpus.iter_mut().filter(|gpu| *gpu.node == *node) {
            gpu.fault = Some(Doubt::until_told(reason.clone()));
        }
        if self.roll(node) != before {
            self.rebuild_all();
        }
    }

    fn listed(&mut self, node: &str, listed: &[Listed], now: Now) {
        let before = self.roll(node);
        let Some(machine) = self.nodes.get_mut(node) else { return };
        (machine.down, machine.read_at) = (None, now.wall);
        self.list_unread(node, listed, now);
        let there: BTreeSet<&String> = listed.iter().filter_map(|gpu| gpu.uuid.as_ref().ok()).collect();
        let all_answer = there.len() == listed.len();
        for gpu in self.gpus.iter_mut().filter(|gpu| *gpu.node == *node && !there.contains(&gpu.uuid)) {
            let at_index = listed.iter().find(|listed| listed.index == gpu.index);
            let reason = match at_index.map(|listed| &listed.uuid) {
                Some(Err(error)) => error.to_string(),
                _ => "the GPU is no longer in the driver's list".to_owned(),
            };
            if gpu.fault.is_none() {
                tracing::error!(gpu = gpu.index, uuid = gpu.uuid, reason, "a GPU is out of service");
            }
            gpu.fault = Some(Doubt::new(reason, Remedy::Read, gpu.fault.as_ref(), now));
        }
        if all_answer && !listed.is_empty() {
            let gone = self.leases.values().filter_map(|lease| {
                let gone = |slice: &super::record::SliceRow| slice.node == *node && !there.contains(&slice.gpu);
                lease.slices.iter().any(gone).then_some(lease.fence)
            });
            for fence in gone.collect::<Vec<_>>() {
                self.end(fence, "its GPU is no longer in the machine", now);
            }
        }
        if self.roll(node) != before {
            self.rebuild_all();
        }
    }

    /// Keeps which GPUs of a node's list nothing is known of: they may be able to do what those that are known
    /// cannot.
    fn list_unread(&mut self, node: &str, listed: &[Listed], now: Now) {
        let Some(machine) = self.nodes.get_mut(node) else { return };
        let mut before = std::mem::take(&mut machine.unread);
        for Listed { index, uuid } in listed {
            let known = |gpu: &&Gpu| uuid.as_ref().map_or(gpu.index == *index, |uuid| gpu.uuid == *uuid);
            if self.gpus.iter().filter(|gpu| *gpu.node == *node).any(|gpu| known(&gpu)) {
                continue;
            }
            let before = before.remove(index).filter(|before| before.uuid.as_ref() == uuid.as_ref().ok());
            let doubt = match (uuid, before) {
                (Ok(_), Some(before)) => before.doubt,
                // It is being read.
                (Ok(_), None) => {
                    Doubt { retry_at: Duration::MAX, ..Doubt::new("it has not answered yet", Remedy::Read, None, now) }
                }
                (Err(error), before) => {
                    if before.is_none() {
                        tracing::error!(gpu = index, %error, "a GPU that is listed does not tell its name");
                    }
                    let doubt = Doubt::new(error.to_string(), Remedy::Read, None, now);
                    Doubt { retry_at: Duration::MAX, ..doubt }
                }
            };
            machine.unread.insert(*index, Unread { uuid: uuid.as_ref().ok().cloned(), doubt });
        }
    }

    /// Why it cannot be said yet what the GPUs here can serve: the driver does not answer, or not for all that
    /// it lists.
    pub(super) fn unsure(&self) -> Option<String> {
        let each = self.nodes.iter().flat_map(|(name, machine)| {
            let known = self.gpus.iter().any(|gpu| *gpu.node == **name);
            let unknown = machine.absence(name).or_else(|| machine.down.clone());
            if let Some(why) = unknown.filter(|_| !known || !machine.unread.is_empty()) {
                return vec![why];
            }
            let unread = machine.unread.iter();
            unread.map(|(index, unread)| format!("{}: {}", self.place(name, *index), unread.doubt.reason)).collect()
        });
        let told: Vec<String> = each.take(TROUBLES).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }

    /// The record of a change that is over; none if it is not ours any more.
    fn finish(&mut self, id: u64) -> Option<Repartition> {
        let repartition = self.changes.remove(&id)?;
        self.effects.writes.push(Write::Finish { id });
        Some(repartition)
    }

    fn observe(&mut self, node: &str, uuid: &str, reading: Result<Reading, DriverError>, now: Now) {
        let reading = match reading {
            Ok(reading) => reading,
            Err(error) => return self.not_read(node, uuid, &error, now),
        };
        if let Some(machine) = self.nodes.get_mut(node) {
            machine.unread.retain(|index, unread| *index != reading.index && unread.uuid.as_deref() != Some(uuid));
        }
        match self.gpu_mut(uuid) {
            Some(gpu) => {
                if gpu.fault.is_some() {
                    tracing::info!(gpu = gpu.index, uuid, "a GPU is back in service");
                }
                if gpu.observe(reading) {
                    self.rebuild_all();
                }
            }
            None => {
                let model = &reading.model;
                tracing::info!(
                    node,
                    gpu = reading.index,
                    uuid,
                    model = model.name,
                    mig = model.sliced,
                    instances = reading.instances.len(),
                    "a GPU is in service"
                );
                self.gpus.push(Gpu::new(node, reading));
                self.sort_gpus();
                self.rebuild_all();
            }
        }
        if let Some(gpu) = self.gpu_mut(uuid) {
            gpu.read_at = now.wall;
        }
        self.see_use(uuid, now);
        self.compare(uuid, now);
    }

    /// A GPU cannot be read: nothing is granted on it, and it is read again.
    fn not_read(&mut self, node: &str, uuid: &str, error: &DriverError, now: Now) {
        let reason = error.to_string();
        if let Some(gpu) = self.gpu_mut(uuid) {
            if gpu.fault.is_none() {
                tracing::error!(gpu = gpu.index, uuid, reason, "a GPU is out of service");
            }
            gpu.fault = Some(Doubt::new(reason, Remedy::Read, gpu.fault.as_ref(), now));
            return;
        }
        let mut unread = self.nodes.get_mut(node).into_iter().flat_map(|machine| machine.unread.iter_mut());
        let unread = unread.find(|(_, unread)| unread.uuid.as_deref() == Some(uuid));
        let Some((index, unread)) = unread else { return };
        let before = Some(&unread.doubt).filter(|before| before.reason == reason);
        if before.is_none() {
            tracing::error!(gpu = index, uuid, reason, "a GPU cannot be read; it is not used until it can");
        }
        unread.doubt = Doubt::new(reason, Remedy::Read, before, now);
    }

    /// A GPU that was known in another node sits in this one now, if nothing of it is held there and it was missed
    /// there.
    fn moved(&mut self, uuid: &str, from: &str, to: &str) -> bool {
        let held = !self.held_on(uuid).is_empty();
        let Some(gpu) = self.gpu_mut(uuid).filter(|gpu| gpu.fault.is_some() && !held) else { return false };
        tracing::info!(uuid, from, to, "a GPU sits in another node now");
        gpu.node = to.into();
        self.sort_gpus();
        self.rebuild_all();
        true
    }

    /// A node speaks of a GPU that another node has: it is not believed.
    fn not_own(&mut self, node: &str, uuid: &str, other: &str, now: Now) {
        let Some(machine) = self.nodes.get_mut(node) else { return };
        let Some(unread) = machine.unread.values_mut().find(|unread| unread.uuid.as_deref() == Some(uuid)) else {
            return;
        };
        let reason = format!("it has the UUID of a GPU of the node {other}");
        if unread.doubt.reason != reason {
            tracing::error!(node, uuid, other, "two nodes have a GPU of one UUID; the second is not used");
        }
        unread.doubt = Doubt::new(reason, Remedy::Read, Some(&unread.doubt), now);
        self.stir();
    }

    /// Compares all leases with what was read last of the GPUs that answer.
    pub(super) fn compare_all(&mut self, now: Now) {
        let answer = self.gpus.iter().filter(|gpu| gpu.fault.is_none());
        for uuid in answer.map(|gpu| gpu.uuid.clone()).collect::<Vec<_>>() {
            self.compare(&uuid, now);
        }
    }

    /// Compares the leases on a GPU with what is there: the driver is believed.
    fn compare(&mut self, uuid: &str, now: Now) {
        let Some(gpu) = self.gpu(uuid) else { return };
        let mut gone = Vec::new();
        let mut moved = Vec::new();
        for lease in self.leases.values() {
            for (position, slice) in lease.slices.iter().enumerate().filter(|(_, slice)| slice.gpu == uuid) {
                let key = (slice.profile, slice.placement.start);
                match gpu.device(key).filter(|_| slice.whole != gpu.model.sliced) {
                    None if matches!(lease.status, Status::Over(_)) => {}
                    None => gone.push(lease.fence),
                    Some(device) if device != slice.uuid || gpu.index != slice.gpu_index => {
                        let mut slice = slice.clone();
                        (slice.uuid, slice.gpu_index) = (device.to_owned(), gpu.index);
                        moved.push((lease.fence, position, slice));
                    }
                    Some(_) => {}
                }
            }
        }
        for fence in gone {
            self.end(fence, "the slice vanished: the machine was restarted, or somebody destroyed it", now);
        }
        for (fence, position, slice) in moved {
            tracing::info!(fence, gpu = slice.gpu_index, uuid = slice.uuid, "the slice has another UUID or index now");
            self.effects.writes.push(Write::Slice { fence, position, slice: slice.clone() });
            self.effects.changed = true;
            let held = self.leases.get_mut(&fence).and_then(|lease| lease.slices.get_mut(position));
            held.into_iter().for_each(|held| *held = slice.clone());
        }
    }

    /// What comes of a change that is over.
    fn outcome(&mut self, done: Repartition, result: Result<(), Failure>, now: Now) {
        let Repartition { gpu: uuid, change, purpose } = done;
        if let Err(failure) = &result {
            self.blame(&uuid, &change.make, failure, now);
        }
        let (seq, workload) = match purpose {
            Purpose::Grant(seq, workload) => (seq, workload),
            Purpose::Repair(profile, start) => return self.repaired(&uuid, (profile, start), result.is_ok(), now),
        };
        let at = self.gpus.iter().position(|gpu| gpu.uuid == uuid);
        let made = change.make.map(|(profile, placement)| (profile, placement.start));
        let slice = at.zip(made).and_then(|(at, key)| self.slice(at, key));
        match (result, slice) {
            _ if made.is_none_or(|key| self.promised.get(&(uuid.clone(), key)) != Some(&seq)) => {
                tracing::info!(
                    workload,
                    gpu = uuid,
                    "made for a request that does not wait for it any more; it stays idle"
                );
            }
            (Ok(()), Some(_)) => self.made(seq, now),
            (result, _) => {
                let reason = result.err().map_or("it is not there".to_owned(), |failure| failure.error.to_string());
                tracing::warn!(workload, gpu = uuid, reason, "the slice could not be made; the request waits on");
                self.wait_on(seq, now);
            }
        }
    }

    fn repaired(&mut self, uuid: &str, key: Key, success: bool, now: Now) {
        let Some(gpu) = self.gpu_mut(uuid) else { return };
        if success {
            gpu.doubts.remove(&key);
            tracing::info!(gpu = gpu.index, profile = key.0, start = key.1, "an instance in doubt is set right");
        } else if let Some(doubt) = gpu.doubts.get_mut(&key).filter(|doubt| doubt.retry_at == Duration::MAX) {
            *doubt = Doubt::new(doubt.reason.clone(), doubt.remedy, Some(doubt), now);
        }
    }

    /// Puts in doubt what a change failed at, so that it is not tried again at once.
    fn blame(&mut self, uuid: &str, make: &Option<(u32, mlad::api::Placement)>, failure: &Failure, now: Now) {
        let Some(gpu) = self.gpu_mut(uuid) else { return };
        let Failure { stage, error } = failure;
        match (stage, make) {
            (Stage::Destroy(profile, start), _) => {
                let key = (*profile, *start);
                let reason = format!("it cannot be destroyed: {error}");
                tracing::warn!(gpu = gpu.index, profile, start, reason, "quarantined");
                let doubt = Doubt::new(reason, Remedy::Destroy, gpu.doubts.get(&key), now);
                gpu.doubts.insert(key, doubt);
            }
            (Stage::Make, Some((profile, placement))) => {
                let key = (*profile, placement.start);
                tracing::warn!(gpu = gpu.index, profile, start = placement.start, %error, "the driver refuses a placement");
                match gpu.instance(key) {
                    Some(_) => {
                        let doubt = Doubt::new(error.to_string(), Remedy::Destroy, gpu.doubts.get(&key), now);
                        gpu.doubts.insert(key, doubt);
                    }
                    None => {
                        let barred = Barred { until: now.steady + BARRED, reason: error.to_string() };
                        gpu.barred.insert(key, barred);
                    }
                }
            }
            (Stage::Make | Stage::Read, _) => {}
        }
    }

    fn examine(&mut self, uuid: &str, now: Now) {
        let held = self.held_on(uuid);
        let Some(gpu) = self.gpus.iter_mut().find(|gpu| gpu.uuid == uuid) else { return };
        gpu.examine(|key| held.contains(&key), now);
        self.unfinished.retain(|(other, key)| other != uuid || gpu.instance(*key).is_some());
    }
}

impl Repartition {
    /// The slots it is about.
    fn slots(&self) -> impl Iterator<Item = Key> {
        let made = self.change.make.iter().map(|(profile, placement)| (*profile, placement.start));
        self.change.destroy.iter().copied().chain(made)
    }
}
