//! Who of those that wait is served: from the line to the grant, and from notice to the end of what gives way.

use super::{
    gpu::{Gpu, Key},
    ledger::{Chosen, Ledger, Ready, Standing, Waiting},
    record::{Ending, LeaseRow, Now, Purpose, Repartition, RequestRow, Status, Write},
};
use crate::{
    geometry::{Share, resolve},
    placement::{Action, Gang, Plan},
    queue::{self, Charge, Entry, Held, Preemption, Scene},
};
use mlad::api::{Need, Placement};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

impl Ledger {
    /// Puts a request into the line.
    pub(super) fn enqueue(&mut self, row: RequestRow) {
        self.accounts.tell(&row.user, row.limits);
        let mut entry = Entry {
            seq: row.seq,
            leaf: self.accounts.leaf(&row.user, row.project.as_ref()),
            priority: row.priority,
            since: row.requested_at,
            wanted: None,
            gang: Gang { slices: row.slices, nodes: row.nodes },
            only_on: self.only_on(row.on_node.as_deref()),
            share: 0,
            preparing: false,
            expected_seconds: row.expected_seconds,
            booking: row.booked.as_ref().map(|booked| booked.booking),
        };
        self.work_out(&mut entry, &row.need);
        if row.need == Need::Cpu {
            self.sliceless.push(row.seq);
        }
        self.line.insert(&entry);
        self.known.insert(row.workload.clone(), Standing::Waiting(row.seq));
        let waiting = Waiting { row, entry, places: Vec::new(), charge: None, chosen: None };
        self.waiting.insert(waiting.row.seq, waiting);
    }

    /// Works out what each waiting request comes to on the GPUs there are.
    pub(super) fn work_out_all(&mut self) {
        for (seq, mut waiting) in std::mem::take(&mut self.waiting) {
            waiting.entry.only_on = self.only_on(waiting.row.on_node.as_deref());
            self.work_out(&mut waiting.entry, &waiting.row.need);
            self.waiting.insert(seq, waiting);
        }
    }

    fn work_out(&self, entry: &mut Entry, need: &Need) {
        entry.wanted = resolve(need, self.pool.models()).ok().map(Arc::new);
        let on_models = (0..self.pool.models().len()).filter_map(|model| queue::wanted_on(&self.pool, model, entry));
        entry.share = on_models.map(|wanted| wanted.share).min().unwrap_or(0);
    }

    /// Goes through the line and grants what can be.
    pub(super) fn schedule(&mut self, now: Now) {
        if !std::mem::take(&mut self.stirred) {
            return;
        }
        self.withdraw_notices();
        self.move_reservations(now);
        for seq in std::mem::take(&mut self.sliceless) {
            self.grant(seq, Vec::new(), now);
        }
        if self.waiting.is_empty() {
            return;
        }
        let decision = {
            let held = || held_slots(&self.leases, &self.waiting, &self.gpus, now);
            let reserved = self.reserved();
            let scene =
                Scene { now: now.wall, policy: &self.policy, rules: self.rules, held: &held, reserved: &reserved };
            let line = self.line.order(&self.waiting, &self.accounts, self.rules.patience, now.wall);
            queue::schedule(line, &self.accounts, &mut self.pool, &scene)
        };
        for queue::Grant { seq, plans } in decision.grants {
            if plans.is_empty() {
                self.grant(seq, Vec::new(), now);
            } else if self.carry_out(seq, &plans, now).is_none() {
                tracing::error!(seq, ?plans, "a plan does not fit the GPUs it was made for");
                self.wait_on(seq, now);
                self.rebuild_all();
            }
        }
        if let Some(preemption) = decision.preempt {
            self.preempt(&preemption, now);
        }
    }

    /// Does what the plans for a request say: grants what is there, or begins to make what is not.
    fn carry_out(&mut self, seq: u64, plans: &[Plan], now: Now) -> Option<()> {
        let steps: Vec<Step> = plans.iter().map(|plan| self.step(plan)).collect::<Option<_>>()?;
        let first = plans.first()?;
        let model = self.pool.gpus().get(first.gpu)?.model;
        let waiting = self.waiting.get_mut(&seq)?;
        let chosen = waiting.chosen.insert(Chosen::from(first)).clone();
        if steps.iter().all(|step| step.destroy.is_none()) {
            let ready = plans.iter().zip(&steps).map(|(plan, step)| self.slice(plan.gpu, step.key));
            let ready: Vec<Ready> = ready.collect::<Option<_>>()?;
            self.grant(seq, ready, now);
            return Some(());
        }
        let wanted = queue::wanted_on(&self.pool, model, &waiting.entry)?;
        let charge = Charge {
            slices: wanted.slices,
            memory_mib: wanted.memory_mib,
            share: wanted.share,
            since: now.wall,
            expected_seconds: wanted.expected_seconds,
        };
        waiting.entry.preparing = true;
        waiting.charge = Some(charge);
        waiting.places = steps.iter().map(|step| (step.uuid.clone(), step.key)).collect();
        self.accounts.add(waiting.entry.leaf, &charge, now.wall);
        let workload = waiting.row.workload.clone();
        tracing::info!(workload, user = %waiting.row.user, need = %waiting.row.need, slices = steps.len(),
            cost = chosen.cost, action = chosen.action, why = chosen.why, "repartitioning");
        self.promised.extend(steps.iter().map(|step| ((step.uuid.clone(), step.key), seq)));
        for Step { uuid, key, placement, destroy } in steps {
            let Some(destroy) = destroy else { continue };
            let purpose = Purpose::Grant(seq, workload.clone());
            self.begin(&uuid, destroy, Some((key.0, placement)), purpose, now);
        }
        Some(())
    }

    fn step(&self, plan: &Plan) -> Option<Step> {
        let gpu = self.gpus.get(plan.gpu)?;
        let key = gpu.key(plan.placed)?;
        let placement = Placement { start: key.1, size: gpu.model.profile(plan.placed.profile)?.columns };
        let destroy = match &plan.action {
            Action::Reuse => None,
            Action::Make { destroy } => Some(destroy.iter().filter_map(|placed| gpu.key(*placed)).collect()),
        };
        Some(Step { uuid: gpu.uuid.clone(), key, placement, destroy })
    }

    /// A slot of a waiting request has been made, or could not be: with the last of them the request is granted,
    /// all at once. One that is lost on the way makes it wait on.
    pub(super) fn made(&mut self, seq: u64, now: Now) {
        let busy = |change: &Repartition| matches!(&change.purpose, Purpose::Grant(other, _) if *other == seq);
        if self.changes.values().any(busy) {
            return;
        }
        let Some(waiting) = self.waiting.get(&seq) else { return };
        if self.is_too_late(waiting, now) {
            return self.wait_on(seq, now);
        }
        let ready = waiting.places.iter().map(|(uuid, key)| {
            let at = self.gpus.iter().position(|gpu| gpu.uuid == *uuid && gpu.fault.is_none())?;
            self.slice(at, *key)
        });
        match ready.collect::<Option<Vec<Ready>>>() {
            Some(ready) => self.grant(seq, ready, now),
            None => self.wait_on(seq, now),
        }
    }

    /// Grants a waiting request: with these slices, or without any.
    pub(super) fn grant(&mut self, seq: u64, ready: Vec<Ready>, now: Now) {
        let promised = self.unpromise(seq, now);
        let Some(waiting) = self.waiting.remove(&seq) else { return };
        self.line.remove(&waiting.entry);
        self.fence += 1;
        let (profile, memory_mib, share) = ready.first().map_or_else(
            || ("cpu".to_owned(), 0, Share::NONE),
            |Ready { profile, memory_mib, share, .. }| (profile.clone(), *memory_mib, *share),
        );
        let slices: Vec<_> = ready.into_iter().map(|ready| ready.slice).collect();
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
        log_grant(&lease, waiting.chosen.as_ref());
        self.deadlines.set(self.fence, now.steady + self.period);
        self.effects.writes.push(Write::Grant(Box::new(lease.clone())));
        self.count(&lease, now);
        self.keep_booked(&lease, now);
        self.watch_use(&lease, now);
        self.keep(lease);
        // Only now: what was promised to it is held.
        promised.iter().for_each(|gpu| self.rebuild(gpu));
        self.effects.changed = true;
    }

    /// What was being made for a waiting request could not be: it waits on, its places given back.
    pub(super) fn wait_on(&mut self, seq: u64, now: Now) {
        self.unpromise(seq, now).iter().for_each(|gpu| self.rebuild(gpu));
        self.stir();
    }

    /// Takes a request that waits out of the line.
    pub(super) fn give_up(&mut self, seq: u64, reason: &str, now: Now) {
        self.unpromise(seq, now).iter().for_each(|gpu| self.rebuild(gpu));
        let Some(waiting) = self.waiting.remove(&seq) else { return };
        self.line.remove(&waiting.entry);
        let workload = waiting.row.workload;
        tracing::info!(workload, user = %waiting.row.user, reason, "no longer waits");
        self.known.remove(&workload);
        self.just_ended.insert(workload.clone(), reason.to_owned());
        self.effects.writes.push(Write::GiveUp { workload, at: now.wall, reason: reason.to_owned() });
        self.stir();
    }

    /// Nothing is kept for a waiting request any more, nor counted. Gives the GPUs that something was kept on: their
    /// space is to be rebuilt as soon as it is known who has it now.
    #[must_use]
    fn unpromise(&mut self, seq: u64, now: Now) -> BTreeSet<String> {
        let Some(waiting) = self.waiting.get_mut(&seq) else { return BTreeSet::new() };
        waiting.entry.preparing = false;
        if let Some(charge) = waiting.charge.take() {
            self.accounts.take(waiting.entry.leaf, &charge, now.wall);
        }
        let places = std::mem::take(&mut waiting.places);
        for place in &places {
            self.promised.remove(place);
        }
        places.into_iter().map(|(gpu, _)| gpu).collect()
    }

    /// Takes up a change again whose request was loaded anew. Where there are several for one request, what they
    /// make stays idle, and the request is served anew.
    pub(super) fn resume(&mut self, id: u64, now: Now) {
        let Some(Repartition { purpose: Purpose::Grant(seq, _), gpu, change }) = self.changes.get(&id) else { return };
        let Some((profile, placement)) = change.make else { return };
        let place = (gpu.clone(), (profile, placement.start));
        let model = self.gpus.iter().find(|known| known.uuid == *gpu).map(|gpu| Arc::clone(&gpu.model));
        let Some(waiting) = self.waiting.get_mut(seq).filter(|waiting| waiting.row.slices == 1) else { return };
        let kind = model.as_ref().and_then(|model| Some((model.by_id(profile)?, model)));
        let charge = Charge {
            slices: 1,
            memory_mib: kind.and_then(|(at, model)| model.profile(at)).map_or(0, |profile| profile.memory_mib),
            share: kind.map_or(0, |(at, model)| u64::from(model.share(at).greater())),
            since: now.wall,
            expected_seconds: waiting.row.expected_seconds,
        };
        waiting.entry.preparing = true;
        waiting.charge = Some(charge);
        waiting.places = vec![place.clone()];
        self.accounts.add(waiting.entry.leaf, &charge, now.wall);
        self.promised.insert(place, *seq);
    }

    /// Gives notice to leases that have to give way.
    fn preempt(&mut self, preemption: &Preemption, now: Now) {
        let Some(waiting) = self.waiting.get(&preemption.seq) else { return };
        let RequestRow { user, need, priority, .. } = &waiting.row;
        let reason = format!("it gives way to {user}, who asks for {need} with priority {priority}");
        let at = now.wall.checked_add(self.rules.notice).unwrap_or(now.wall);
        for fence in &preemption.fences {
            self.giving_way.insert(*fence, preemption.seq);
            self.give_notice(*fence, Ending { at, reason: reason.clone() }, now);
        }
    }

    /// Tells a lease's holder that it ends, unless it is to end sooner already.
    pub(super) fn give_notice(&mut self, fence: u64, ending: Ending, now: Now) {
        let Some(lease) = self.leases.get_mut(&fence) else { return };
        let sooner = lease.ending.as_ref().is_some_and(|other| other.at <= ending.at);
        if sooner || matches!(lease.status, Status::Over(_)) {
            return;
        }
        let Ending { at, reason } = &ending;
        tracing::info!(workload = lease.request.workload, user = %lease.request.user, fence, %at, reason, "notice");
        self.endings.set(fence, steady(*at, now));
        self.effects.writes.push(Write::Ending { fence, ending: Some(ending.clone()) });
        lease.ending = Some(ending);
        self.stir();
    }

    /// Takes notice back from leases that were to give way to somebody who does not wait any more.
    fn withdraw_notices(&mut self) {
        let idle = |seq: &u64| !self.waiting.contains_key(seq);
        let over: Vec<u64> = self.giving_way.iter().filter(|(_, seq)| idle(seq)).map(|(fence, _)| *fence).collect();
        for fence in over {
            self.giving_way.remove(&fence);
            self.take_back_notice(fence, "nobody waits for it any more", |_| true);
        }
    }

    /// A lease in force that has a notice of this kind does not have to end after all.
    pub(super) fn take_back_notice(&mut self, fence: u64, why: &str, of_kind: impl FnOnce(&Ending) -> bool) {
        let Some(lease) = self.leases.get_mut(&fence) else { return };
        if matches!(lease.status, Status::Over(_)) || lease.ending.take_if(|ending| of_kind(ending)).is_none() {
            return;
        }
        tracing::info!(workload = lease.request.workload, fence, why, "notice is taken back");
        self.endings.remove(fence);
        self.effects.writes.push(Write::Ending { fence, ending: None });
        self.effects.changed = true;
    }

    /// Ends what has had notice long enough, and gives notice where GPU time is going to be used up.
    pub(super) fn tick_notices(&mut self, now: Now) {
        while let Some(fence) = self.endings.pop(now.steady) {
            let ending = self.leases.get(&fence).and_then(|lease| lease.ending.clone());
            if let Some(ending) = ending {
                self.end(fence, &ending.reason, now);
            }
        }
        self.notice_exhaustion(now);
    }
}

/// What has to be done for one slice: the instances to destroy before it is made, if it has to be.
struct Step {
    uuid: String,
    key: Key,
    placement: Placement,
    destroy: Option<Vec<Key>>,
}

/// Every slot that is held, by leases and by what is being made.
pub(super) fn held_slots(
    leases: &BTreeMap<u64, LeaseRow>,
    waiting: &BTreeMap<u64, Waiting>,
    gpus: &[Gpu],
    now: Now,
) -> Vec<Held> {
    let at: HashMap<&str, usize> = gpus.iter().enumerate().map(|(at, gpu)| (gpu.uuid.as_str(), at)).collect();
    let slot = |uuid: &str, key: Key| {
        let at = *at.get(uuid)?;
        Some((at, gpus.get(at)?.placed(key)?))
    };
    let of_lease = leases.values().flat_map(|lease| {
        let (end, over) = (lease.known_end(), matches!(lease.status, Status::Over(_)));
        let willing = lease.request.preemptible && lease.ending.is_none() && !over;
        let preemptible = willing.then_some(lease.request.priority);
        lease.slices.iter().map(move |slice| {
            (slice.gpu.as_str(), (slice.profile, slice.placement.start), end, lease.fence, preemptible)
        })
    });
    let being_made = waiting.values().flat_map(|waiting| {
        let end = waiting.entry.end(now.wall);
        waiting.places.iter().map(move |(gpu, key)| (gpu.as_str(), *key, end, 0, None))
    });
    let held = |(gpu, key, end, fence, preemptible)| {
        let (gpu, placed) = slot(gpu, key)?;
        Some(Held { gpu, placed, end, fence, preemptible })
    };
    of_lease.chain(being_made).filter_map(held).collect()
}

/// A time of the wall by the clock that only goes forward.
pub(super) fn steady(at: jiff::Timestamp, now: Now) -> Duration {
    now.steady + Duration::try_from(at.duration_since(now.wall)).unwrap_or_default()
}

fn log_grant(lease: &LeaseRow, chosen: Option<&Chosen>) {
    let LeaseRow { request, slices, .. } = lease;
    let slice = slices.first();
    let (action, why) = match (chosen, slice) {
        (Some(chosen), _) => (chosen.action, chosen.why.as_str()),
        (None, Some(_)) => ("make", "it was being made for it when the ledger was read anew"),
        (None, None) => ("none", "it needs no slice"),
    };
    tracing::info!(workload = request.workload, user = %request.user, need = %request.need,
        profile = lease.profile, fence = lease.fence, slices = slices.len(),
        gpu = slice.map(|slice| slice.gpu_index),
        start = slice.map(|slice| slice.placement.start),
        uuid = slice.map(|slice| &slice.uuid),
        cost = chosen.map(|chosen| chosen.cost), action, why, "granted");
}
