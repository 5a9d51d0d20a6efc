//! The ledger's state and its transitions: no I/O, the time as an argument.
//!
//! Every transition leaves in [`Effects`] what has to be written down, and what the GPUs' threads are to do
//! once it is. What is let in is in `admit.rs`, what is on the GPUs in `machine.rs`, what is told of it all in
//! `view.rs`.

use super::{
    deadlines::Deadlines,
    gpu::{Gpu, Key, Unread},
    record::{LeaseRow, Now, Purpose, Repartition, RequestRow, SliceRow, Status, Write},
    store::Loaded,
    usage,
};
use crate::{
    AllocatorError,
    geometry::{Share, resolve},
    node::{Change, Order},
    placement::{Action, ExpectedRoom, Plan, Policy, Pool},
    queue::{self, Entry, Holdings},
};
use jiff::SignedDuration;
use mlad::api::{Need, Placement};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

/// Renewals are written down this often: after a restart every lease has a full period anyway.
const FLUSH: Duration = Duration::from_secs(10);

/// Who asked, who holds what, and what is on the GPUs.
pub(super) struct Ledger {
    pub(super) node: String,
    pub(super) period: Duration,
    pub(super) waiting: BTreeMap<u64, Waiting>,
    pub(super) leases: BTreeMap<u64, LeaseRow>,
    pub(super) known: HashMap<String, Standing>,
    /// Workloads whose requests ended in this turn, and why: what the database does not say yet. At most as many
    /// as a turn has commands.
    pub(super) just_ended: HashMap<String, String>,
    /// Slots that leases hold: GPU, profile and start.
    pub(super) holders: BTreeMap<(String, Key), u64>,
    pub(super) holdings: Holdings,
    /// Changes of GPUs that are under way.
    pub(super) changes: HashMap<u64, Repartition>,
    pub(super) gpus: Vec<Gpu>,
    /// GPUs that are listed and could not be read yet, by index.
    pub(super) unread: BTreeMap<u32, Unread>,
    /// Why the driver does not answer at all.
    pub(super) down: Option<String>,
    pub(super) read_at: jiff::Timestamp,
    pub(super) pool: Pool,
    pub(super) policy: Box<dyn Policy>,
    pub(super) effects: Effects,
    /// Slots whose destruction was under way when the allocator stopped.
    pub(super) unfinished: BTreeSet<(String, Key)>,
    deadlines: Deadlines,
    renewed: BTreeSet<u64>,
    flush_at: Option<Duration>,
    fence: u64,
    pub(super) seq: u64,
    repartition: u64,
    /// Waiting requests that need no slice, and so no queue.
    sliceless: Vec<u64>,
    /// How many leases hold no slice.
    sliceless_held: usize,
    /// Something changed since the queue was last gone through.
    pub(super) stirred: bool,
}

/// A request that waits.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) row: RequestRow,
    pub(super) entry: Entry,
    /// Memory in MiB reserved for it while its slice is being made.
    pub(super) reserved_mib: u64,
    /// How its place was chosen, for the log; none after a restart in between.
    chosen: Option<Chosen>,
}

/// How the place of a request was chosen.
#[derive(Debug, Clone)]
struct Chosen {
    cost: i64,
    action: &'static str,
    why: String,
}

impl From<&Plan> for Chosen {
    fn from(plan: &Plan) -> Self {
        let (action, way) = match &plan.action {
            Action::Reuse => ("reuse", "an idle instance is there".to_owned()),
            Action::Make { destroy } if destroy.is_empty() => ("make", "nothing is in the way".to_owned()),
            Action::Make { destroy } => ("make", format!("idle instances that give way: {}", destroy.len())),
        };
        let why = format!("the least expected loss of capacity of all places; {way}");
        Self { cost: plan.cost, action, why }
    }
}

/// A slice that is ready to be granted.
#[derive(Debug)]
pub(super) struct Ready {
    slice: SliceRow,
    profile: String,
    memory_mib: u64,
    share: Share,
}

/// Where a workload is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Waiting, at this place in the order.
    Waiting(u64),
    /// Holding the lease with this fence.
    Leased(u64),
}

/// What a transition asks for.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// To be written down, in one transaction.
    pub(super) writes: Vec<Write>,
    /// To be done after it is.
    pub(super) orders: Vec<(String, Order)>,
    /// Somebody who watches wants to know.
    pub(super) changed: bool,
}

impl Ledger {
    /// An empty ledger for `node`, whose leases last `period` unless they are renewed.
    pub(super) fn new(node: String, period: Duration) -> Self {
        Self {
            node,
            period,
            waiting: BTreeMap::new(),
            leases: BTreeMap::new(),
            known: HashMap::new(),
            just_ended: HashMap::new(),
            holders: BTreeMap::new(),
            holdings: Holdings::default(),
            changes: HashMap::new(),
            gpus: Vec::new(),
            unread: BTreeMap::new(),
            down: None,
            read_at: jiff::Timestamp::UNIX_EPOCH,
            pool: Pool::default(),
            policy: Box::new(ExpectedRoom::default()),
            effects: Effects::default(),
            unfinished: BTreeSet::new(),
            deadlines: Deadlines::default(),
            renewed: BTreeSet::new(),
            flush_at: None,
            fence: 0,
            seq: 0,
            repartition: 0,
            sliceless: Vec::new(),
            sliceless_held: 0,
            stirred: true,
        }
    }

    /// The same, placing by `policy`.
    pub(super) fn with(self, policy: Box<dyn Policy>) -> Self {
        Self { policy, ..self }
    }

    /// Takes over what the database says, in place of what is remembered. Every lease has a full period from
    /// now. What is known of the GPUs, and changes that their threads are at, stay.
    pub(super) fn load(&mut self, loaded: Loaded, now: Now) {
        self.forget();
        self.effects.changed = true;
        (self.waiting, self.leases) = Default::default();
        (self.known, self.holders, self.holdings, self.sliceless) = Default::default();
        self.sliceless_held = 0;
        self.just_ended.clear();
        if self.seq == 0 {
            for profile in &loaded.asked {
                self.policy.see(profile);
            }
        }
        (self.deadlines, self.renewed, self.flush_at) = Default::default();
        self.fence = self.fence.max(loaded.fence);
        self.seq = self.seq.max(loaded.seq);
        self.repartition = self.repartition.max(loaded.repartition);
        for row in loaded.leases {
            self.fence = self.fence.max(row.fence);
            self.deadlines.set(row.fence, now.steady + self.period);
            for _ in &row.slices {
                self.holdings.add(&row.request.user, row.memory_mib);
            }
            self.keep(LeaseRow { expires_at: self.end_of_period(now), ..row });
        }
        for row in loaded.waiting {
            self.seq = self.seq.max(row.seq);
            self.enqueue(row);
        }
        for left in loaded.repartitions {
            if self.changes.contains_key(&left.change.id) {
                continue;
            }
            tracing::warn!(gpu = left.gpu, change = ?left.change, "a repartition was cut short; what it left is set right");
            self.unfinished.extend(left.change.destroy.iter().map(|key| (left.gpu.clone(), *key)));
            self.effects.writes.push(Write::Finish { id: left.change.id });
        }
        let unread = self.unread.values_mut().map(|unread| &mut unread.doubt);
        for doubt in self.gpus.iter_mut().flat_map(Gpu::all_doubts).chain(unread) {
            // What was to be done about it may be among what was not written down.
            doubt.retry_at = doubt.retry_at.min(now.steady);
        }
        let underway: Vec<u64> = self.changes.keys().copied().collect();
        for id in underway {
            self.resume(id);
        }
        self.rebuild_all();
        // What readings have shown of the leases may be among what was not written down, too.
        self.compare_all(now);
    }

    /// Drops what was to be written down and done: it will not be. Changes that were never ordered are not under
    /// way.
    pub(super) fn forget(&mut self) {
        for (_, order) in std::mem::take(&mut self.effects).orders {
            if let Order::Change(change) = order {
                self.changes.remove(&change.id);
            }
        }
    }

    /// Keeps a lease.
    pub(super) fn renew(&mut self, workload: &str, fence: u64, now: Now) -> Result<(), AllocatorError> {
        let Some(Standing::Leased(held)) = self.known.get(workload).copied() else {
            return Err(AllocatorError::Unknown(workload.to_owned()));
        };
        let expires_at = self.end_of_period(now);
        let Some(lease) = self.leases.get_mut(&held) else {
            return Err(AllocatorError::Unknown(workload.to_owned()));
        };
        if held != fence {
            return Err(AllocatorError::Fence(workload.to_owned()));
        }
        match &lease.status {
            Status::Over(_) => return Err(AllocatorError::Ended(workload.to_owned())),
            Status::Expired => {
                tracing::info!(workload, fence, "the holder of an expired lease is back");
                lease.status = Status::Active;
                self.effects.changed = true;
            }
            Status::Active => {}
        }
        (lease.renewed_at, lease.expires_at) = (now.wall, expires_at);
        self.deadlines.set(fence, now.steady + self.period);
        self.renewed.insert(fence);
        self.flush_at.get_or_insert(now.steady + FLUSH);
        Ok(())
    }

    /// Gives a lease, or a place in the queue, back.
    pub(super) fn release(&mut self, workload: &str, now: Now) {
        match self.known.get(workload).copied() {
            None => {}
            Some(Standing::Waiting(seq)) => self.give_up(seq, "given up before it was granted", now),
            Some(Standing::Leased(fence)) => {
                let over = self.leases.get(&fence).and_then(|lease| match &lease.status {
                    Status::Over(reason) => Some(reason.clone()),
                    Status::Active | Status::Expired => None,
                });
                self.free(fence, over.as_deref().unwrap_or("released"), now);
            }
        }
    }

    /// Ends a lease, or a wait, for `reason`. Its slice stays held until it is released, unless `free`.
    pub(super) fn revoke(&mut self, workload: &str, reason: &str, free: bool, now: Now) {
        match self.known.get(workload).copied() {
            None => {}
            Some(Standing::Waiting(seq)) => self.give_up(seq, reason, now),
            Some(Standing::Leased(fence)) if free => self.free(fence, reason, now),
            Some(Standing::Leased(fence)) => self.end(fence, reason, now),
        }
    }

    /// Does what is due: marks leases as expired, writes renewals down, looks at doubts again.
    pub(super) fn tick(&mut self, now: Now) {
        while let Some(fence) = self.deadlines.pop(now.steady) {
            let Some(lease) = self.leases.get_mut(&fence) else { continue };
            if lease.status == Status::Active {
                lease.status = Status::Expired;
                let LeaseRow { request, .. } = &*lease;
                tracing::warn!(workload = request.workload, user = %request.user, fence,
                    "the lease expired: nobody renewed it; its slice stays held until it is released or revoked");
                self.effects.writes.push(Write::Expire { fence, at: now.wall });
                self.effects.changed = true;
            }
        }
        if self.flush_at.is_some_and(|at| at <= now.steady) {
            self.flush_at = None;
            for fence in std::mem::take(&mut self.renewed) {
                let Some(lease) = self.leases.get(&fence) else { continue };
                let (at, expires_at) = (lease.renewed_at, lease.expires_at);
                self.effects.writes.push(Write::Renew { fence, at, expires_at });
            }
        }
        self.look_again(now);
    }

    /// When [`Self::tick`] has something to do next.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        let deadline = self.deadlines.next();
        let retries = self.gpus.iter().filter_map(Gpu::next_retry);
        let unread = self.unread.values().map(|unread| unread.doubt.retry_at);
        retries.chain(unread).chain(deadline).chain(self.flush_at).min()
    }

    /// Goes through the queue and grants what can be.
    pub(super) fn schedule(&mut self, now: Now) {
        if !std::mem::take(&mut self.stirred) {
            return;
        }
        for seq in std::mem::take(&mut self.sliceless) {
            self.grant(seq, None, now);
        }
        let entries = self.waiting.values().map(|waiting| &waiting.entry);
        let grants = queue::schedule(entries, &mut self.holdings, &mut self.pool, &self.policy);
        for (seq, plan) in grants {
            match plan {
                None => self.grant(seq, None, now),
                Some(plan) => {
                    let user = self.waiting.get(&seq).map(|waiting| Arc::clone(&waiting.row.user));
                    if let (None, Some(user)) = (self.carry_out(seq, &plan, now), user) {
                        tracing::error!(seq, ?plan, "a plan does not fit the GPUs it was made for");
                        self.holdings.take(&user, queue::memory_of(&self.pool, &plan));
                    }
                }
            }
        }
    }

    /// The greatest numbers given so far, by the names the store has for them.
    pub(super) fn counters(&self) -> [(&'static str, u64); 3] {
        [("fence", self.fence), ("seq", self.seq), ("repartition", self.repartition)]
    }

    /// Something changed: the queue is to be gone through, and watchers want to know.
    pub(super) fn stir(&mut self) {
        self.stirred = true;
        self.effects.changed = true;
    }

    /// Begins a change of a GPU: it is written down, then done.
    pub(super) fn begin(
        &mut self,
        gpu: &str,
        destroy: Vec<Key>,
        make: Option<(u32, Placement)>,
        purpose: Purpose,
        now: Now,
    ) {
        self.repartition += 1;
        let change = Change { id: self.repartition, destroy, make };
        let repartition = Repartition { gpu: gpu.to_owned(), change: change.clone(), purpose };
        self.effects.writes.push(Write::Begin { repartition: repartition.clone(), at: now.wall });
        self.effects.orders.push((gpu.to_owned(), Order::Change(change)));
        self.effects.changed = true;
        self.changes.insert(self.repartition, repartition);
    }

    /// Grants a waiting request: with this slice and its memory, or without one.
    pub(super) fn grant(&mut self, seq: u64, slice: Option<Ready>, now: Now) {
        let Some(waiting) = self.waiting.remove(&seq) else { return };
        self.fence += 1;
        let (slices, profile, memory_mib, share) = match slice {
            Some(Ready { slice, profile, memory_mib, share }) => (vec![slice], profile, memory_mib, share),
            None => (Vec::new(), "cpu".to_owned(), 0, Share::NONE),
        };
        let lease = LeaseRow {
            fence: self.fence,
            request: waiting.row,
            node: slices.first().map_or_else(|| self.node.clone(), |slice| slice.node.clone()),
            profile,
            memory_mib,
            share,
            slices,
            granted_at: now.wall,
            renewed_at: now.wall,
            expires_at: self.end_of_period(now),
            status: Status::Active,
            ending: None,
        };
        let LeaseRow { request, slices, .. } = &lease;
        let slice = slices.first();
        let (action, why) = match (&waiting.chosen, slice) {
            (Some(chosen), _) => (chosen.action, chosen.why.as_str()),
            (None, Some(_)) => ("make", "it was being made for it when the ledger was read anew"),
            (None, None) => ("none", "it needs no slice"),
        };
        tracing::info!(workload = request.workload, user = %request.user, need = %request.need,
            profile = lease.profile, fence = lease.fence,
            gpu = slice.map(|slice| slice.gpu_index),
            start = slice.map(|slice| slice.placement.start),
            uuid = slice.map(|slice| &slice.uuid),
            cost = waiting.chosen.as_ref().map(|chosen| chosen.cost), action, why, "granted");
        self.deadlines.set(self.fence, now.steady + self.period);
        self.effects.writes.push(Write::Grant(Box::new(lease.clone())));
        self.keep(lease);
        self.effects.changed = true;
    }

    /// The change for a waiting request failed: it waits on, its reservation given back.
    pub(super) fn wait_on(&mut self, seq: u64) {
        if let Some(waiting) = self.waiting.get_mut(&seq) {
            waiting.entry.preparing = false;
            self.holdings.take(&waiting.entry.user, waiting.reserved_mib);
        }
        self.stir();
    }

    /// A lease may not be renewed any more; its slice stays held until it is released.
    pub(super) fn end(&mut self, fence: u64, reason: &str, now: Now) {
        let Some(lease) = self.leases.get_mut(&fence) else { return };
        if matches!(lease.status, Status::Over(_)) {
            return;
        }
        tracing::warn!(workload = lease.request.workload, user = %lease.request.user, fence, reason, "the lease is over");
        lease.status = Status::Over(reason.to_owned());
        self.deadlines.remove(fence);
        self.effects.writes.push(Write::Over { fence, at: now.wall, reason: reason.to_owned() });
        self.effects.changed = true;
    }

    /// Takes up a change again whose request was loaded anew.
    fn resume(&mut self, id: u64) {
        let Some(Repartition { purpose: Purpose::Grant(seq, _), gpu, change }) = self.changes.get(&id) else { return };
        let gpu = self.gpus.iter().find(|known| known.uuid == *gpu);
        let profile = change.make.and_then(|(profile, _)| gpu?.model.profiles().iter().find(|p| p.id == profile));
        let Some(waiting) = self.waiting.get_mut(seq) else { return };
        waiting.entry.preparing = true;
        waiting.reserved_mib = profile.map_or(0, |profile| profile.memory_mib);
        self.holdings.add(&waiting.entry.user, waiting.reserved_mib);
    }

    pub(super) fn enqueue(&mut self, row: RequestRow) {
        let entry = Entry {
            seq: row.seq,
            user: Arc::clone(&row.user),
            limits: row.limits,
            wanted: resolve(&row.need, self.pool.models()).ok().map(Arc::new),
            preparing: false,
            expected_seconds: row.expected_seconds,
        };
        if row.need == Need::Cpu {
            self.sliceless.push(row.seq);
        }
        self.known.insert(row.workload.clone(), Standing::Waiting(row.seq));
        self.waiting.insert(row.seq, Waiting { row, entry, reserved_mib: 0, chosen: None });
    }

    fn keep(&mut self, lease: LeaseRow) {
        self.known.insert(lease.request.workload.clone(), Standing::Leased(lease.fence));
        for slice in &lease.slices {
            self.holders.insert((slice.gpu.clone(), (slice.profile, slice.placement.start)), lease.fence);
        }
        self.sliceless_held += usize::from(lease.slices.is_empty());
        self.leases.insert(lease.fence, lease);
    }

    fn give_up(&mut self, seq: u64, reason: &str, now: Now) {
        let Some(waiting) = self.waiting.remove(&seq) else { return };
        let workload = waiting.row.workload;
        tracing::info!(workload, user = %waiting.row.user, reason, "no longer waits");
        if waiting.entry.preparing {
            self.holdings.take(&waiting.entry.user, waiting.reserved_mib);
        }
        self.known.remove(&workload);
        self.just_ended.insert(workload.clone(), reason.to_owned());
        self.effects.writes.push(Write::GiveUp { workload, at: now.wall, reason: reason.to_owned() });
        self.stir();
    }

    fn free(&mut self, fence: u64, reason: &str, now: Now) {
        let Some(lease) = self.leases.remove(&fence) else { return };
        let used = usage::of(&lease, now.wall);
        let LeaseRow { request, slices, memory_mib, .. } = lease;
        tracing::info!(workload = request.workload, user = %request.user, fence, reason, "released");
        self.known.remove(&request.workload);
        self.deadlines.remove(fence);
        self.renewed.remove(&fence);
        let workload = request.workload;
        self.just_ended.insert(workload.clone(), reason.to_owned());
        self.effects.writes.push(Write::Release { fence, workload, at: now.wall, reason: reason.to_owned(), used });
        self.sliceless_held = self.sliceless_held.saturating_sub(usize::from(slices.is_empty()));
        for slice in slices {
            self.holders.remove(&(slice.gpu.clone(), (slice.profile, slice.placement.start)));
            self.holdings.take(&request.user, memory_mib);
            self.rebuild(&slice.gpu);
        }
        self.stir();
    }

    /// Does what a plan says: grants what is there, or begins to make it.
    fn carry_out(&mut self, seq: u64, plan: &Plan, now: Now) -> Option<()> {
        let gpu = self.gpus.get(plan.gpu)?;
        let key = gpu.key(plan.placed)?;
        let profile = gpu.model.profile(plan.placed.profile)?;
        let waiting = self.waiting.get_mut(&seq)?;
        let (uuid, placement) = (gpu.uuid.clone(), Placement { start: key.1, size: profile.columns });
        let chosen = waiting.chosen.insert(Chosen::from(plan));
        match &plan.action {
            Action::Reuse => {
                let slice = self.slice(plan.gpu, key)?;
                self.grant(seq, Some(slice), now);
            }
            Action::Make { destroy } => {
                waiting.entry.preparing = true;
                waiting.reserved_mib = profile.memory_mib;
                let destroy: Vec<Key> = destroy.iter().filter_map(|placed| gpu.key(*placed)).collect();
                tracing::info!(workload = waiting.row.workload, user = %waiting.row.user, need = %waiting.row.need,
                    gpu = gpu.index, profile = profile.name, start = key.1, destroyed = ?destroy,
                    cost = chosen.cost, action = chosen.action, why = chosen.why, "repartitioning");
                let purpose = Purpose::Grant(seq, waiting.row.workload.clone());
                self.begin(&uuid, destroy, Some((key.0, placement)), purpose, now);
            }
        }
        Some(())
    }

    /// What is in a slot, ready to be granted.
    pub(super) fn slice(&self, gpu: usize, key: Key) -> Option<Ready> {
        let gpu = self.gpus.get(gpu)?;
        let uuid = gpu.device(key)?.to_owned();
        let index = gpu.model.by_id(key.0)?;
        let profile = gpu.model.profile(index)?;
        let slice = SliceRow {
            node: self.node.clone(),
            gpu: gpu.uuid.clone(),
            gpu_index: gpu.index,
            profile: key.0,
            placement: gpu.instance(key)?.placement,
            whole: !gpu.model.sliced,
            uuid,
        };
        Some(Ready {
            slice,
            profile: profile.name.clone(),
            memory_mib: profile.memory_mib,
            share: gpu.model.share(index),
        })
    }

    /// How many leases hold no slice, or are about to be granted without one.
    pub(super) fn sliceless_leases(&self) -> usize {
        self.sliceless_held + self.sliceless.len()
    }

    fn end_of_period(&self, now: Now) -> jiff::Timestamp {
        let period = SignedDuration::try_from(self.period).unwrap_or(SignedDuration::MAX);
        now.wall.checked_add(period).unwrap_or(jiff::Timestamp::MAX)
    }
}
