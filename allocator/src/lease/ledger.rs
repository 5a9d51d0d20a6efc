//! The ledger's state and its transitions: no I/O, the time as an argument.
//!
//! Every transition leaves in [`Effects`] what has to be written down, and what the GPUs' threads are to do
//! once it is. What is let in is in `admit.rs`, who is served in `line.rs`, whose share it is in `shares.rs`, what is set
//! aside in `reserve.rs`, what is on the GPUs in `machine.rs`, what is told of it all in
//! `view.rs`.

use super::{
    deadlines::Deadlines,
    embedded::QueueSettings,
    gpu::{Gpu, Key},
    idle::Idle,
    line::steady,
    nodes::Machine,
    record::{LeaseRow, Now, Purpose, QuarantineRow, Repartition, RequestRow, ReservationRow, SliceRow, Status, Write},
    store::Loaded,
    usage,
};
use crate::{
    AccountName, AllocatorError,
    geometry::Share,
    node::{Change, Order},
    placement::{Action, ExpectedRoom, Plan, Policy, Pool},
    queue::{Accounts, Charge, Entry, Line, Rules},
};
use jiff::SignedDuration;
use mlad::api::Placement;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
    /// Slots that are kept for waiting requests while what they lack is made.
    pub(super) promised: BTreeMap<(String, Key), u64>,
    /// Users and projects, what they hold and have used.
    pub(super) accounts: Accounts,
    /// Those of them that the database knows by themselves, and not from requests alone.
    pub(super) stored: BTreeSet<AccountName>,
    /// Who waits, in the order of the line.
    pub(super) line: Line,
    pub(super) rules: Rules,
    half_life: Duration,
    /// When GPU time that is going to be used up is to be looked at.
    pub(super) notice_at: Option<Duration>,
    /// When each lease that has had notice ends.
    pub(super) endings: Deadlines,
    /// For which waiting request leases have had notice.
    pub(super) giving_way: BTreeMap<u64, u64>,
    /// Space that is set aside, and when each of these has something to do.
    pub(super) reservations: BTreeMap<u64, ReservationRow>,
    pub(super) due: Deadlines,
    /// When leases within reservations are told of their end, and end.
    pub(super) booked: Deadlines,
    /// Changes of GPUs that are under way.
    pub(super) changes: HashMap<u64, Repartition>,
    /// In the order node, then index.
    pub(super) gpus: Vec<Gpu>,
    /// The machines they sit in, our own among them.
    pub(super) nodes: BTreeMap<String, Machine>,
    /// How long a node's own lease lasts.
    pub(super) node_lease: Duration,
    /// Changes with every start of our own machine.
    pub(super) boot: String,
    /// Leases that have to be used.
    pub(super) idle: BTreeMap<u64, Idle>,
    /// GPUs that are not to be trusted, by UUID.
    pub(super) quarantine: BTreeMap<String, QuarantineRow>,
    pub(super) pool: Pool,
    pub(super) policy: Box<dyn Policy>,
    pub(super) effects: Effects,
    /// Slots whose destruction was under way when the allocator stopped.
    pub(super) unfinished: BTreeSet<(String, Key)>,
    pub(super) deadlines: Deadlines,
    renewed: BTreeSet<u64>,
    flush_at: Option<Duration>,
    pub(super) fence: u64,
    pub(super) seq: u64,
    repartition: u64,
    /// Waiting requests that need no slice, and so no queue.
    pub(super) sliceless: Vec<u64>,
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
    /// Its places, while what of them is missing is being made.
    pub(super) places: Vec<(String, Key)>,
    /// What it counts for meanwhile.
    pub(super) charge: Option<Charge>,
    /// How its place was chosen, for the log; none after a restart in between.
    pub(super) chosen: Option<Chosen>,
}

impl AsRef<Entry> for Waiting {
    fn as_ref(&self) -> &Entry {
        &self.entry
    }
}

/// How the place of a request was chosen.
#[derive(Debug, Clone)]
pub(super) struct Chosen {
    pub(super) cost: i64,
    pub(super) action: &'static str,
    pub(super) why: String,
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
    pub(super) slice: SliceRow,
    pub(super) profile: String,
    pub(super) memory_mib: u64,
    pub(super) share: Share,
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
        let nodes = BTreeMap::from([(node.clone(), Machine::own())]);
        Self {
            node,
            nodes,
            node_lease: crate::remote::LEASE,
            boot: String::new(),
            idle: BTreeMap::new(),
            quarantine: BTreeMap::new(),
            period,
            waiting: BTreeMap::new(),
            leases: BTreeMap::new(),
            known: HashMap::new(),
            just_ended: HashMap::new(),
            holders: BTreeMap::new(),
            promised: BTreeMap::new(),
            accounts: Accounts::new(QueueSettings::default().half_life),
            stored: BTreeSet::new(),
            line: Line::default(),
            rules: QueueSettings::default().rules(),
            half_life: QueueSettings::default().half_life,
            notice_at: None,
            endings: Deadlines::default(),
            giving_way: BTreeMap::new(),
            reservations: BTreeMap::new(),
            due: Deadlines::default(),
            booked: Deadlines::default(),
            changes: HashMap::new(),
            gpus: Vec::new(),
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

    /// The same, serving those who wait by these settings.
    pub(super) fn queued_by(self, settings: QueueSettings) -> Self {
        let half_life = settings.half_life;
        Self { rules: settings.rules(), half_life, accounts: Accounts::new(half_life), ..self }
    }

    /// The same, whose nodes hold leases of so long.
    pub(super) fn with_node_lease(self, node_lease: Duration) -> Self {
        Self { node_lease, ..self }
    }

    /// The same, on a machine that was started as `boot` says.
    pub(super) fn with_boot(self, boot: String) -> Self {
        Self { boot, ..self }
    }

    /// Takes over what the database says, in place of what is remembered. Every lease has a full period from
    /// now. What is known of the GPUs, and changes that their threads are at, stay.
    pub(super) fn load(&mut self, mut loaded: Loaded, now: Now) {
        self.forget();
        self.effects.changed = true;
        (self.waiting, self.leases) = Default::default();
        (self.known, self.holders, self.promised, self.line, self.sliceless) = Default::default();
        (self.endings, self.giving_way, self.idle) = Default::default();
        (self.reservations, self.due, self.booked) = Default::default();
        self.open_accounts(&loaded, now);
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
        self.load_nodes(std::mem::take(&mut loaded.nodes), now);
        self.quarantine.clear();
        self.load_quarantine(std::mem::take(&mut loaded.quarantine));
        for row in std::mem::take(&mut loaded.leases) {
            self.fence = self.fence.max(row.fence);
            self.deadlines.set(row.fence, now.steady + self.period);
            self.count(&row, now);
            if let Some(ending) = &row.ending {
                self.endings.set(row.fence, steady(ending.at, now));
            }
            self.keep_booked(&row, now);
            self.watch_use(&row, now);
            self.keep(LeaseRow { expires_at: self.end_of_period(now), ..row });
        }
        for row in std::mem::take(&mut loaded.reservations) {
            self.keep_reservation(row, now);
        }
        for row in std::mem::take(&mut loaded.waiting) {
            self.seq = self.seq.max(row.seq);
            self.enqueue(row);
        }
        for left in &loaded.repartitions {
            if self.changes.contains_key(&left.change.id) {
                continue;
            }
            tracing::warn!(gpu = left.gpu, change = ?left.change, "a repartition was cut short; what it left is set right");
            self.unfinished.extend(left.change.destroy.iter().map(|key| (left.gpu.clone(), *key)));
            self.effects.writes.push(Write::Finish { id: left.change.id });
        }
        let unread = self.nodes.values_mut().flat_map(|node| node.unread.values_mut()).map(|unread| &mut unread.doubt);
        for doubt in self.gpus.iter_mut().flat_map(Gpu::all_doubts).chain(unread) {
            // What was to be done about it may be among what was not written down.
            doubt.retry_at = doubt.retry_at.min(now.steady);
        }
        let underway: Vec<u64> = self.changes.keys().copied().collect();
        for id in underway {
            self.resume(id, now);
        }
        // What administrators said last counts more than what requests have said before.
        drop(self.accounts.set(&loaded.accounts, now.wall));
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
        self.tick_idle(now);
        self.tick_notices(now);
        self.tick_nodes(now);
        self.tick_reservations(now);
        self.look_again(now);
    }

    /// When [`Self::tick`] has something to do next.
    pub(super) fn next_tick(&self) -> Option<Duration> {
        let deadline = self.deadlines.next();
        let retries = self.gpus.iter().filter_map(Gpu::next_retry);
        let unread = self.nodes.values().flat_map(|node| node.unread.values()).map(|unread| unread.doubt.retry_at);
        retries
            .chain(unread)
            .chain(self.next_loss())
            .chain(self.next_idle())
            .chain(deadline)
            .chain(self.flush_at)
            .chain(self.next_notice())
            .chain(self.next_reservation())
            .min()
    }

    /// After so long use counts half.
    pub(super) fn half_life(&self) -> Duration {
        self.half_life
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

    /// A lease may not be renewed any more; its slice stays held until it is released.
    pub(super) fn end(&mut self, fence: u64, reason: &str, now: Now) {
        let Some(lease) = self.leases.get_mut(&fence) else { return };
        if matches!(lease.status, Status::Over(_)) {
            return;
        }
        tracing::warn!(workload = lease.request.workload, user = %lease.request.user, fence, reason, "the lease is over");
        lease.status = Status::Over(reason.to_owned());
        self.deadlines.remove(fence);
        self.endings.remove(fence);
        self.idle.remove(&fence);
        self.effects.writes.push(Write::Over { fence, at: now.wall, reason: reason.to_owned() });
        self.effects.changed = true;
    }

    pub(super) fn keep(&mut self, lease: LeaseRow) {
        self.known.insert(lease.request.workload.clone(), Standing::Leased(lease.fence));
        for slice in &lease.slices {
            self.holders.insert((slice.gpu.clone(), (slice.profile, slice.placement.start)), lease.fence);
        }
        self.sliceless_held += usize::from(lease.slices.is_empty());
        self.leases.insert(lease.fence, lease);
    }

    fn free(&mut self, fence: u64, reason: &str, now: Now) {
        let Some(lease) = self.leases.remove(&fence) else { return };
        let used = usage::of(&lease, now.wall);
        self.count_out(&lease, &used, now);
        let LeaseRow { request, slices, .. } = lease;
        tracing::info!(workload = request.workload, user = %request.user, fence, reason, "released");
        self.known.remove(&request.workload);
        self.deadlines.remove(fence);
        self.endings.remove(fence);
        self.idle.remove(&fence);
        self.giving_way.remove(&fence);
        self.booked.remove(fence);
        self.renewed.remove(&fence);
        let workload = request.workload;
        self.just_ended.insert(workload.clone(), reason.to_owned());
        self.effects.writes.push(Write::Release { fence, workload, at: now.wall, reason: reason.to_owned(), used });
        self.sliceless_held = self.sliceless_held.saturating_sub(usize::from(slices.is_empty()));
        for slice in slices {
            self.holders.remove(&(slice.gpu.clone(), (slice.profile, slice.placement.start)));
            self.rebuild(&slice.gpu);
        }
        self.stir();
    }

    /// What is in a slot, ready to be granted.
    pub(super) fn slice(&self, gpu: usize, key: Key) -> Option<Ready> {
        let gpu = self.gpus.get(gpu)?;
        let uuid = gpu.device(key)?.to_owned();
        let index = gpu.model.by_id(key.0)?;
        let profile = gpu.model.profile(index)?;
        let slice = SliceRow {
            node: gpu.node.to_string(),
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

    pub(super) fn end_of_period(&self, now: Now) -> jiff::Timestamp {
        let period = SignedDuration::try_from(self.period).unwrap_or(SignedDuration::MAX);
        now.wall.checked_add(period).unwrap_or(jiff::Timestamp::MAX)
    }
}
