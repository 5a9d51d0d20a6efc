//! Goes through the line once.

use super::{
    AccountId, Accounts, Backfill, Block, Booking, Entry, Held, LeafId, Preemption, Scene, Wanted,
    ahead::{Kept, earliest},
    preempt::preemption,
    timeline::{Owner, Timeline},
    wanted_on,
};
use crate::{
    geometry::{Placed, Resolution},
    placement::{Chosen, Gang, Plan, Pool, plan, plan_all},
};
use jiff::{SignedDuration, Timestamp};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

/// For so many requests it is worked out when they find space, and with conservative backfill space is kept; those
/// behind get no estimate.
pub const LOOK_AHEAD: usize = 64;
/// So many requests are looked at in one pass for whether they can be served beside those ahead of them.
const LOOKED_AT: usize = 20_000;
/// Why each of so many requests waits is worked out; those behind wait for who is ahead.
const EXPLAINED: usize = 1_000;

/// A request that is granted: without a slice, or with these, which are reserved in the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Which.
    pub seq: u64,
    /// Its places, all on GPUs of one model.
    pub plans: Vec<Plan>,
}

/// What going through the line comes to.
#[derive(Debug, Default)]
pub struct Decision {
    /// Who is granted what, in this order.
    pub grants: Vec<Grant>,
    /// Leases that have to give way, for whom.
    pub preempt: Option<Preemption>,
}

/// Goes through the waiting requests, first in line first, and grants what can be, reserving it in `pool`. What is
/// granted is to be counted in the accounts afterwards.
pub fn schedule<'a>(
    line: impl Iterator<Item = &'a Entry>,
    accounts: &Accounts,
    pool: &mut Pool,
    scene: &Scene<'_>,
) -> Decision {
    let depth = match scene.rules.backfill {
        Backfill::None => 0,
        Backfill::Easy => 1,
        Backfill::Conservative => LOOK_AHEAD,
    };
    let mut pass = Pass::new(accounts, pool, scene, depth);
    let mut grants = Vec::new();
    for entry in line.take(LOOKED_AT) {
        if pass.is_closed() {
            break;
        }
        match pass.judge(entry) {
            Verdict::Grant(plans) => {
                pass.grant(entry, &plans);
                grants.push(Grant { seq: entry.seq, plans });
            }
            Verdict::Wait(block) => pass.wait(entry, block),
        }
    }
    let preempt = pass.head.take().and_then(|(entry, kept)| preemption(entry, kept, pass.pool, &pass.timeline, scene));
    Decision { grants, preempt }
}

/// Why requests wait, and when they find space: worked out once for all of them, after [`schedule`].
#[derive(Debug, Default)]
pub struct Outlook {
    blocks: HashMap<u64, Block>,
    estimates: HashMap<u64, Timestamp>,
    /// The first that waits for space.
    first: Option<u64>,
}

impl Outlook {
    /// Goes through the waiting requests, first in line first, as far as it matters.
    pub fn new<'a>(
        line: impl Iterator<Item = &'a Entry>,
        accounts: &Accounts,
        pool: &mut Pool,
        scene: &Scene<'_>,
    ) -> Self {
        let mut pass = Pass::new(accounts, pool, scene, LOOK_AHEAD);
        pass.closes = scene.rules.backfill == Backfill::None;
        pass.explains = true;
        let mut outlook = Self::default();
        for entry in line.take(EXPLAINED) {
            let block = match pass.judge(entry) {
                Verdict::Wait(block) => block,
                Verdict::Grant(plans) => {
                    // Scheduled in the next round, which is on its way.
                    pass.grant(entry, &plans);
                    Block::Preparing
                }
            };
            pass.wait(entry, block);
            if outlook.first.is_none() && matches!(block, Block::Space | Block::Reserved(_)) {
                outlook.first = Some(entry.seq);
            }
            outlook.blocks.insert(entry.seq, block);
        }
        outlook.estimates = pass.estimates;
        outlook
    }

    /// Why a request waits.
    pub fn block(&self, entry: &Entry, accounts: &Accounts, pool: &Pool, now: Timestamp) -> Block {
        if let Some(block) = self.blocks.get(&entry.seq) {
            return *block;
        }
        if let Some(booking) = entry.booking {
            return if booking.is_open(now) { Block::Full } else { Block::NotYet };
        }
        let serving = (0..pool.models().len()).filter_map(|model| wanted_on(pool, model, entry));
        let mut over: Option<Block> = None;
        for wanted in serving {
            match accounts.allow(entry.leaf, &wanted, now) {
                Ok(()) => return self.first.map_or(Block::Space, Block::Behind),
                Err(account) => over = Some(Block::Quota(account)),
            }
        }
        over.unwrap_or(Block::NoGpu)
    }

    /// When a request finds space at the earliest, if that is known.
    pub fn estimate(&self, seq: u64) -> Option<Timestamp> {
        self.estimates.get(&seq).copied()
    }
}

/// What becomes of a waiting request now.
enum Verdict {
    Grant(Vec<Plan>),
    Wait(Block),
}

/// What requests that can be served alike have in common: what serves them on each model, and how they are to lie.
type Kind = (Vec<Option<usize>>, Gang, Option<Arc<BTreeSet<u32>>>, Option<u64>);

struct Pass<'a, 'e> {
    accounts: &'a Accounts,
    pool: &'a mut Pool,
    scene: &'a Scene<'a>,
    timeline: Timeline<'a>,
    /// For so many requests on each model space is kept.
    depth: usize,
    /// How many it is kept for, by the reservation in whose space it is.
    kept: HashMap<Option<u64>, usize>,
    /// Whether GPUs of a model are closed to those behind who waits for them, and for whom they are.
    closes: bool,
    closed: Vec<Option<u64>>,
    /// What those granted, and those for whom space is kept, have of their limits; from when, and for whom.
    owed: Vec<(LeafId, Wanted, Option<Timestamp>, u64)>,
    /// The shortest of each kind for which there was no room: longer ones find none either.
    failed: HashMap<Kind, u64>,
    /// The first that waits for space, and where and when it is going to have it.
    head: Option<(&'e Entry, Option<Kept>)>,
    /// The first that waits for space on each model.
    first: Vec<Option<u64>>,
    estimates: HashMap<u64, Timestamp>,
    explains: bool,
}

impl<'a, 'e> Pass<'a, 'e> {
    fn new(accounts: &'a Accounts, pool: &'a mut Pool, scene: &'a Scene<'a>, depth: usize) -> Self {
        pool.price(scene.policy);
        let models = pool.models().len();
        Self {
            accounts,
            pool,
            scene,
            timeline: Timeline::new(scene.now, scene.held, scene.reserved),
            depth,
            kept: HashMap::new(),
            closes: depth == 0,
            closed: vec![None; models],
            owed: Vec::new(),
            failed: HashMap::new(),
            head: None,
            first: vec![None; models],
            estimates: HashMap::new(),
            explains: false,
        }
    }

    /// Whether every GPU that can be used is closed. What is reserved never is.
    fn is_closed(&self) -> bool {
        if !self.scene.reserved.is_empty() {
            return false;
        }
        let mut models = self.closed.iter().enumerate();
        models.all(|(model, closed)| closed.is_some() || self.pool.usable(model) == 0)
    }

    fn judge(&mut self, entry: &'e Entry) -> Verdict {
        if entry.preparing {
            return Verdict::Wait(Block::Preparing);
        }
        let Some(wanted) = &entry.wanted else { return Verdict::Wait(Block::NoGpu) };
        if !wanted.needs_gpu() {
            return Verdict::Grant(Vec::new());
        }
        // Nothing is begun that would be told to end at once.
        let told = |booking: Booking| booking.until.duration_since(self.scene.now) <= self.scene.rules.notice;
        if entry.booking.is_some_and(|booking| !booking.is_open(self.scene.now) || told(booking)) {
            return Verdict::Wait(Block::NotYet);
        }
        let open = match self.open_models(entry) {
            Ok(open) => wanted.only(|model| open.contains(&model)).into_owned(),
            Err(block) => return Verdict::Wait(block),
        };
        match self.find(entry, &open) {
            Some(plans) => Verdict::Grant(plans),
            None => Verdict::Wait(self.why(entry, &open)),
        }
    }

    /// The models whose GPUs can serve a request now: limits allow it, some can be used, and they are not closed.
    fn open_models(&self, entry: &Entry) -> Result<Vec<usize>, Block> {
        let (mut over, mut behind, mut allowed, mut open) = (None, None, false, Vec::new());
        for model in 0..self.pool.models().len() {
            let Some(wanted) = wanted_on(self.pool, model, entry) else { continue };
            if let Err(block) = self.allow(entry, &wanted) {
                over = over.or(Some(block));
                continue;
            }
            allowed = true;
            match self.closed.get(model).copied().flatten() {
                _ if self.pool.usable(model) == 0 => {}
                Some(seq) if entry.booking.is_none() => behind = behind.or(Some(seq)),
                _ => open.push(model),
            }
        }
        match (over, behind) {
            _ if !open.is_empty() => Ok(open),
            (_, Some(seq)) => Err(Block::Behind(seq)),
            (Some(block), None) if !allowed => Err(block),
            (_, None) => Err(Block::NoGpu),
        }
    }

    /// Whether limits allow something, beside what is held, was granted just now, and is kept for those ahead.
    fn allow(&self, entry: &Entry, wanted: &Wanted) -> Result<(), Block> {
        let now = self.scene.now;
        let end = entry.end(now);
        // Who has ended by then takes nothing from who is to have it then.
        let in_time = |from: &Option<Timestamp>| from.is_some_and(|from| end.is_some_and(|end| end <= from));
        let owed = self.owed.iter().filter(|(_, _, from, _)| !in_time(from));
        self.accounts.allow_beside(entry.leaf, wanted, owed.clone().map(|(leaf, owed, ..)| (*leaf, owed)), now).map_err(
            |account: AccountId| match self.accounts.allow(entry.leaf, wanted, now) {
                Err(account) => Block::Quota(account),
                Ok(()) => {
                    let ahead =
                        owed.clone().find(|(leaf, .., seq)| *seq != GRANTED && self.accounts.is_of(*leaf, account));
                    ahead.map_or(Block::Quota(account), |(.., seq)| Block::Behind(*seq))
                }
            },
        )
    }

    /// Room for all of a request now, beside what is kept for others.
    fn find(&mut self, entry: &Entry, open: &Resolution) -> Option<Vec<Plan>> {
        let length = entry.expected_seconds.unwrap_or(u64::MAX);
        let kind = (open.by_model().to_vec(), entry.gang, entry.only_on.clone(), entry.reservation());
        if self.failed.get(&kind).is_some_and(|failed| length >= *failed) {
            return None;
        }
        let Self { timeline, scene, .. } = self;
        let until = entry.end(scene.now);
        let allowed = |pool: &Pool, gpu: usize, placed: Placed| {
            let anywhere = entry.booking.is_none() && !timeline.is_kept(gpu);
            is_on(pool, gpu, entry) && (anywhere || timeline.fits(pool, (gpu, placed), scene.now, until, entry).is_ok())
        };
        let plans = plan_all(self.pool, open, entry.gang, scene.policy, &allowed);
        if plans.is_none() {
            self.failed.entry(kind).and_modify(|failed| *failed = length.min(*failed)).or_insert(length);
        }
        plans
    }

    /// Why there is no room for a request.
    fn why(&self, entry: &Entry, open: &Resolution) -> Block {
        if !self.explains {
            return Block::Space;
        }
        if entry.booking.is_some() {
            return Block::Full;
        }
        let on = |gpu: usize, _: Placed| is_on(self.pool, gpu, entry);
        let Some(free) = plan(self.pool, open, self.scene.policy, on) else {
            let mut first = self.first.iter().enumerate().filter(|(model, _)| open.on(*model).is_some());
            return first.find_map(|(_, first)| *first).map_or(Block::Space, Block::Behind);
        };
        let now = self.scene.now;
        match self.timeline.fits(self.pool, (free.gpu, free.placed), now, entry.end(now), entry) {
            Err(Some(Owner::Request(seq))) => Block::Behind(seq),
            Err(Some(Owner::Reservation(id))) => Block::Reserved(id),
            Ok(()) | Err(None) => Block::Space,
        }
    }

    /// Takes note of a request that is granted.
    fn grant(&mut self, entry: &Entry, plans: &[Plan]) {
        if let (Some(first), Some(wanted)) = (plans.first(), &entry.wanted)
            && tracing::enabled!(tracing::Level::DEBUG)
        {
            let chosen = Chosen { pool: self.pool, wanted, policy: self.scene.policy, plan: first };
            tracing::debug!(seq = entry.seq, profile = wanted.profile, slices = plans.len(), gpu = first.gpu,
                start = first.placed.start, cost = first.cost, why = %chosen, "placed");
        }
        self.pool.price(self.scene.policy);
        for plan in plans {
            let end = entry.end(self.scene.now);
            self.timeline.grant(Held { gpu: plan.gpu, placed: plan.placed, end, fence: 0, preemptible: None });
        }
        let model = plans.first().and_then(|plan| self.pool.gpus().get(plan.gpu)).map(|space| space.model);
        if let Some(wanted) = model.and_then(|model| wanted_on(self.pool, model, entry)) {
            self.owed.push((entry.leaf, wanted, None, GRANTED));
        }
    }

    /// Takes note of a request that waits: keeps space for it, or closes the GPUs that could serve it.
    fn wait(&mut self, entry: &'e Entry, block: Block) {
        if let (Block::NotYet, Some(booking)) = (block, entry.booking) {
            self.estimates.extend((booking.from > self.scene.now).then_some((entry.seq, booking.from)));
        }
        if !matches!(block, Block::Space | Block::Behind(_) | Block::Reserved(_) | Block::Full) {
            return;
        }
        if entry.booking.is_some() {
            return self.wait_within(entry);
        }
        for (model, first) in self.first.iter_mut().enumerate() {
            if first.is_none() && entry.wanted.as_ref().is_some_and(|wanted| wanted.on(model).is_some()) {
                *first = Some(entry.seq);
            }
        }
        if self.keeps_for(None) {
            let Some(kept) = self.keep_earliest(entry) else { return };
            self.head.get_or_insert((entry, kept));
        } else if matches!(block, Block::Space | Block::Reserved(_)) {
            self.head.get_or_insert((entry, None));
        }
        if self.closes {
            self.close(entry);
        }
    }

    /// The same for a request of a reservation: it is in the way of nobody else.
    fn wait_within(&mut self, entry: &'e Entry) {
        if self.keeps_for(entry.reservation()) {
            self.keep_earliest(entry);
        }
    }

    /// Whether space is kept for one more of those who wait for the space of everybody, or of a reservation.
    fn keeps_for(&self, reservation: Option<u64>) -> bool {
        self.kept.get(&reservation).copied().unwrap_or(0) < self.depth
    }

    /// Keeps the earliest space for a request, and tells it if there is any; none if no GPU is open to it.
    fn keep_earliest(&mut self, entry: &Entry) -> Option<Option<Kept>> {
        let open = self.open_models(entry).ok()?;
        let open = entry.wanted.as_ref()?.only(|model| open.contains(&model)).into_owned();
        let kept = earliest(entry, &open, self.pool, &self.timeline, self.scene);
        if let Some(kept) = &kept {
            self.keep(entry, kept);
        }
        Some(kept)
    }

    fn keep(&mut self, entry: &Entry, kept: &Kept) {
        *self.kept.entry(entry.reservation()).or_default() += 1;
        let until = kept.from.and_then(|from| entry.end(from));
        self.timeline.keep(entry, &kept.places, kept.from, until);
        if let Some(from) = kept.from {
            // What is overdue may end any moment.
            let now = self.scene.now;
            let at = if from.duration_since(now) <= SignedDuration::from_micros(1) { now } else { from };
            self.estimates.insert(entry.seq, at);
        }
        let model = kept.places.first().and_then(|(gpu, _)| self.pool.gpus().get(*gpu)).map(|space| space.model);
        if let Some(wanted) = model.and_then(|model| wanted_on(self.pool, model, entry)) {
            self.owed.push((entry.leaf, wanted, kept.from, entry.seq));
        }
    }

    /// Keeps every GPU that could serve a request for it.
    fn close(&mut self, entry: &Entry) {
        for model in 0..self.closed.len() {
            let Some(wanted) = wanted_on(self.pool, model, entry) else { continue };
            if self.allow(entry, &wanted).is_ok()
                && let Some(closed) = self.closed.get_mut(model)
            {
                closed.get_or_insert(entry.seq);
            }
        }
    }
}

/// Stands for who was granted something in this pass, and is ahead of nobody any more.
const GRANTED: u64 = u64::MAX;

/// Whether a GPU is on a node that a request may be served from.
pub(super) fn is_on(pool: &Pool, gpu: usize, entry: &Entry) -> bool {
    entry.only_on.as_ref().is_none_or(|nodes| nodes.contains(&pool.node(gpu)))
}
