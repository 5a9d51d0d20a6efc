//! Who is next, and why the others wait: pure functions over the waiting requests, in order of arrival.
//!
//! First come, first served. A request that only its own user's limits hold back keeps nobody waiting. One
//! that waits for space keeps those behind it off every GPU that could serve it, so that it is never
//! overtaken to its cost. `cpu` waits for nothing.

mod ahead;
mod text;

pub(crate) use ahead::after;
pub use ahead::{LOOK_AHEAD, estimates};
pub(crate) use text::TROUBLES;
pub use text::{Facts, explain};

use crate::{
    Limits,
    geometry::Resolution,
    placement::{Chosen, Plan, Policy, Pool, plan},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// A waiting request, as the queue sees it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its place in the order of arrival; unique.
    pub seq: u64,
    /// Whose it is.
    pub user: Arc<str>,
    /// Limits of that user.
    pub limits: Limits,
    /// What it needs; none if no GPU here serves it any more.
    pub wanted: Option<Arc<Resolution>>,
    /// Its place has been chosen and is being made: it holds its space already.
    pub preparing: bool,
    /// Seconds it is known to last.
    pub expected_seconds: Option<u64>,
}

/// What every user holds now, reservations included.
#[derive(Debug, Clone, Default)]
pub struct Holdings(HashMap<Arc<str>, Held>);

#[derive(Debug, Clone, Copy, Default)]
struct Held {
    slices: u32,
    memory_mib: u64,
}

impl Holdings {
    /// Counts one slice more.
    pub fn add(&mut self, user: &Arc<str>, memory_mib: u64) {
        let held = self.0.entry(Arc::clone(user)).or_default();
        held.slices += 1;
        held.memory_mib += memory_mib;
    }

    /// Counts one slice less.
    pub fn take(&mut self, user: &Arc<str>, memory_mib: u64) {
        if let Some(held) = self.0.get_mut(user) {
            held.slices = held.slices.saturating_sub(1);
            held.memory_mib = held.memory_mib.saturating_sub(memory_mib);
            if held.slices == 0 {
                self.0.remove(user);
            }
        }
    }

    /// Slices and memory in MiB that a user holds.
    pub fn of(&self, user: &str) -> (u32, u64) {
        self.0.get(user).map_or((0, 0), |held| (held.slices, held.memory_mib))
    }

    /// Whether a user may hold one more slice of so much memory.
    fn allow(&self, user: &str, limits: Limits, memory_mib: u64) -> bool {
        let (slices, memory) = self.of(user);
        limits.slices.is_none_or(|most| slices < most)
            && limits.gpu_memory_mib.is_none_or(|most| memory.saturating_add(memory_mib) <= most)
    }
}

/// What becomes of a waiting request now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is granted: without a slice, or with this one.
    Grant(Option<Plan>),
    /// It waits.
    Wait(Block),
}

/// Why a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// What its user holds already, with this, is over the user's limits.
    Quota,
    /// No space is free for it.
    Space,
    /// This earlier request is to have the space first.
    Behind(u64),
    /// Its place is being made.
    Preparing,
    /// No GPU that could serve it can be used now.
    NoGpu,
}

/// Goes through the waiting requests in order and grants what can be, reserving it in `pool` and `holdings`,
/// until nothing more can be. Ends early where nobody behind can be granted a slice; requests for none are to be
/// granted beforehand.
pub fn schedule<'a>(
    entries: impl IntoIterator<Item = &'a Entry> + Clone,
    holdings: &mut Holdings,
    pool: &mut Pool,
    policy: &dyn Policy,
) -> Vec<(u64, Option<Plan>)> {
    let mut grants = Vec::new();
    while pass(entries.clone(), &mut grants, holdings, pool, policy) {}
    grants
}

/// Goes through the line once. True if it is to be gone through again: what was granted to somebody who waits
/// further ahead for something else may be all that their limits allow, and what was kept for them is free then.
fn pass<'a>(
    entries: impl IntoIterator<Item = &'a Entry>,
    grants: &mut Vec<(u64, Option<Plan>)>,
    holdings: &mut Holdings,
    pool: &mut Pool,
    policy: &dyn Policy,
) -> bool {
    let granted: HashSet<u64> = grants.iter().map(|(seq, _)| *seq).collect();
    let mut ahead: HashSet<Arc<str>> = HashSet::new();
    let mut again = false;
    let mut line = Line::new(pool);
    pool.price(policy);
    for entry in entries.into_iter().filter(|entry| !granted.contains(&entry.seq)) {
        if line.is_closed(pool) {
            break;
        }
        match line.judge(entry, holdings, pool, policy) {
            Verdict::Grant(plan) => {
                if let (Some(plan), Some(wanted)) = (&plan, &entry.wanted) {
                    if tracing::enabled!(tracing::Level::DEBUG) {
                        let chosen = Chosen { pool, wanted, policy, plan };
                        tracing::debug!(seq = entry.seq, user = %entry.user, profile = wanted.profile, gpu = plan.gpu,
                            start = plan.placed.start, cost = plan.cost, why = %chosen, "placed");
                    }
                    pool.reserve(plan);
                    pool.price(policy);
                    holdings.add(&entry.user, memory_of(pool, plan));
                    again |= ahead.contains(&entry.user);
                }
                grants.push((entry.seq, plan));
            }
            Verdict::Wait(block) => {
                if line.keep(entry, block, holdings, pool) && entry.limits != Limits::default() {
                    ahead.insert(Arc::clone(&entry.user));
                }
            }
        }
    }
    again
}

/// Why requests wait: worked out once for all of them, after [`schedule`], as far as the line is open; what
/// is behind that is told from it.
#[derive(Debug)]
pub struct Outlook {
    judged: HashMap<u64, Block>,
    line: Line,
}

impl Outlook {
    /// Goes through the waiting requests in order, as far as somebody could still be granted something.
    pub fn new<'a>(
        entries: impl IntoIterator<Item = &'a Entry>,
        holdings: &Holdings,
        pool: &Pool,
        policy: &dyn Policy,
    ) -> Self {
        let (mut judged, mut line) = (HashMap::new(), Line::new(pool));
        for entry in entries {
            if line.is_closed(pool) {
                break;
            }
            let block = line.block(entry, holdings, pool, policy);
            line.keep(entry, block, holdings, pool);
            judged.insert(entry.seq, block);
        }
        Self { judged, line }
    }

    /// Why a request waits.
    pub fn block(&self, entry: &Entry, holdings: &Holdings, pool: &Pool, policy: &dyn Policy) -> Block {
        let judged = self.judged.get(&entry.seq).copied();
        judged.unwrap_or_else(|| self.line.block(entry, holdings, pool, policy))
    }
}

/// Memory in MiB of what a plan gives.
pub fn memory_of(pool: &Pool, plan: &Plan) -> u64 {
    let model = pool.gpus().get(plan.gpu).and_then(|space| pool.models().get(space.model));
    model.and_then(|model| model.profile(plan.placed.profile)).map_or(0, |profile| profile.memory_mib)
}

/// Where the line stands while it is gone through: whose GPUs of each model are kept for somebody ahead.
#[derive(Debug)]
struct Line {
    kept_for: Vec<Option<u64>>,
}

impl Line {
    fn new(pool: &Pool) -> Self {
        Self { kept_for: vec![None; pool.models().len()] }
    }

    /// Whether every GPU that can be used is kept for somebody.
    fn is_closed(&self, pool: &Pool) -> bool {
        self.kept_for.iter().enumerate().all(|(model, kept)| kept.is_some() || pool.usable(model) == 0)
    }

    /// What becomes of a request at this point of the line.
    fn judge(&self, entry: &Entry, holdings: &Holdings, pool: &Pool, policy: &dyn Policy) -> Verdict {
        if entry.preparing {
            return Verdict::Wait(Block::Preparing);
        }
        let Some(wanted) = &entry.wanted else { return Verdict::Wait(Block::NoGpu) };
        if !wanted.needs_gpu() {
            return Verdict::Grant(None);
        }
        let (mut serves, mut allowed, mut usable, mut open, mut ahead) = (false, false, false, false, None);
        for (model, kept) in self.kept_for.iter().enumerate() {
            serves |= memory_on(pool, model, wanted).is_some();
            if !may_have(entry, wanted, model, holdings, pool) {
                continue;
            }
            allowed = true;
            if pool.usable(model) > 0 {
                usable = true;
                open |= kept.is_none();
                ahead = ahead.or(*kept);
            }
        }
        match (serves, allowed, usable) {
            (false, _, _) => return Verdict::Wait(Block::NoGpu),
            (_, false, _) => return Verdict::Wait(Block::Quota),
            (_, _, false) => return Verdict::Wait(Block::NoGpu),
            (true, true, true) => {}
        }
        let kept = |model: usize| self.kept_for.get(model).is_some_and(Option::is_some);
        let plan = if open {
            let open = wanted.only(|model| !kept(model) && may_have(entry, wanted, model, holdings, pool));
            plan(pool, &open, policy, |_| true)
        } else {
            None
        };
        match (plan, ahead) {
            (Some(plan), _) => Verdict::Grant(Some(plan)),
            (None, Some(seq)) => Verdict::Wait(Block::Behind(seq)),
            (None, None) => Verdict::Wait(Block::Space),
        }
    }

    /// Why a request waits at this point of the line.
    fn block(&self, entry: &Entry, holdings: &Holdings, pool: &Pool, policy: &dyn Policy) -> Block {
        match self.judge(entry, holdings, pool, policy) {
            Verdict::Wait(block) => block,
            // Scheduled in the next round, which is on its way.
            Verdict::Grant(_) => Block::Preparing,
        }
    }

    /// Keeps every GPU that could serve a request for it, if it waits for space. Not one that its user's limits
    /// forbid it: nobody would be served from that. True if one is kept for it now that was not for another.
    fn keep(&mut self, entry: &Entry, block: Block, holdings: &Holdings, pool: &Pool) -> bool {
        if matches!(block, Block::Quota | Block::Preparing) {
            return false;
        }
        let Some(wanted) = &entry.wanted else { return false };
        let mut keeps = false;
        for (model, kept) in self.kept_for.iter_mut().enumerate() {
            if kept.is_none() && may_have(entry, wanted, model, holdings, pool) {
                *kept = Some(entry.seq);
                keeps = true;
            }
        }
        keeps
    }
}

/// Whether GPUs of a model serve a request, and its user's limits allow what it would get there.
fn may_have(entry: &Entry, wanted: &Resolution, model: usize, holdings: &Holdings, pool: &Pool) -> bool {
    memory_on(pool, model, wanted).is_some_and(|memory| holdings.allow(&entry.user, entry.limits, memory))
}

/// Memory in MiB of what would serve on GPUs of a model; none if nothing does, or there are none.
fn memory_on(pool: &Pool, model: usize, wanted: &Resolution) -> Option<u64> {
    Some(pool.models().get(model)?.profile(wanted.on(model)?)?.memory_mib)
}

#[cfg(test)]
mod tests;
