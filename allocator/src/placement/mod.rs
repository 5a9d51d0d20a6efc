//! Which slot a request gets: pure functions over the space of all GPUs.
//!
//! [`Pool`] is the space as it is now, [`plan`] the one decision, [`Policy`] what it is decided by. Nothing
//! here touches a driver, and no plan ever touches a slot that is held.

mod gang;
mod index;
mod layout;
mod mix;
mod policy;
mod pool;
mod repack;
mod space;

pub use gang::{Gang, plan_all};
pub use layout::Layout;
pub use mix::Mix;
pub use policy::{
    BestFit, ExpectedLoss, ExpectedRoom, FirstFit, LeastFragmentation, Objective, Policy, PolicyName, Ties,
};
pub use pool::Pool;
pub use repack::{Repacking, Shortage, shortage, single_ends};
pub use space::{Slot, SlotState, Space};

use crate::geometry::{Columns, Placed, Resolution};
use index::Candidate;
use std::fmt;

/// Where a request goes, and what has to happen to the GPU first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Index of the GPU in the pool.
    pub gpu: usize,
    /// Which profile, and at which start: never left to the driver.
    pub placed: Placed,
    /// The columns it takes.
    pub span: Columns,
    /// What has to be done.
    pub action: Action,
    /// What the policy says it costs; for the log.
    pub cost: i64,
}

/// What has to be done to a GPU to have the instance of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The instance is there and idle.
    Reuse,
    /// It has to be made, after these idle instances are destroyed.
    Make {
        /// Idle instances in the way.
        destroy: Vec<Placed>,
    },
}

impl Action {
    fn effort(&self) -> space::Effort {
        match self {
            Self::Reuse => space::Effort { made: false, destroyed: 0 },
            Self::Make { destroy } => {
                space::Effort { made: true, destroyed: u32::try_from(destroy.len()).unwrap_or(u32::MAX) }
            }
        }
    }
}

/// The best place for one instance of what `wanted` comes to, among the GPUs and places that `allowed` lets
/// through; none if there is none now.
///
/// Least cost by `policy` first; what decides among equals is the policy's [`Ties`]. Quick where the pool's
/// costs are those of `policy` ([`Pool::price`]), and the same where they are not.
pub fn plan(
    pool: &Pool,
    wanted: &Resolution,
    policy: &dyn Policy,
    allowed: impl Fn(usize, Placed) -> bool,
) -> Option<Plan> {
    let chosen = match pool.priced_by(policy) {
        Some(index) => index.best(|model| wanted.on(model), policy.ties(), &allowed),
        None => candidates(pool, wanted, policy, &allowed).min_by(|a, b| {
            let ties = policy.ties();
            a.rank(ties).cmp(&b.rank(ties))
        }),
    }?;
    let Candidate { gpu, placed, cost, .. } = chosen;
    let space = pool.gpus().get(gpu)?;
    let model = pool.models().get(space.model)?;
    let span = model.profile(placed.profile)?.span_at(placed.start)?;
    Some(Plan { gpu, placed, span, action: space.action_for(model, placed)?, cost })
}

/// Every place for one instance of what `wanted` comes to, GPU by GPU.
fn candidates<'a>(
    pool: &'a Pool,
    wanted: &'a Resolution,
    policy: &'a dyn Policy,
    allowed: &'a dyn Fn(usize, Placed) -> bool,
) -> impl Iterator<Item = Candidate> + 'a {
    let usable = pool.gpus().iter().enumerate().filter(|(_, space)| space.usable);
    let on = move |(gpu, space): (usize, &'a Space)| {
        let model = pool.models().get(space.model)?;
        let profile = wanted.on(space.model)?;
        let place = move |(start, span)| {
            let placed = Placed { profile, start };
            let effort = space.action_for(model, placed).filter(|_| allowed(gpu, placed))?.effort();
            let cost = policy.cost(model, space.layout(), placed, span);
            Some(Candidate { gpu, placed, cost, effort, held: space.held().count() })
        };
        Some(model.profile(profile)?.spans().filter_map(place))
    };
    usable.filter_map(on).flatten()
}

/// What a decision chose among, for the log: the cheapest placements with what they cost, and why the chosen
/// one is.
pub struct Chosen<'a> {
    /// The space before the decision is carried out.
    pub pool: &'a Pool,
    /// What was wanted.
    pub wanted: &'a Resolution,
    /// What it was decided by.
    pub policy: &'a dyn Policy,
    /// What was decided.
    pub plan: &'a Plan,
}

/// So many candidates are logged.
const LOGGED: usize = 6;

impl fmt::Display for Chosen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, wanted, policy, plan } = self;
        let mut all: Vec<Candidate> = candidates(pool, wanted, *policy, &|_, _| true).collect();
        all.sort_by_key(|candidate| candidate.rank(policy.ties()));
        let equal = all.iter().filter(|candidate| candidate.cost == plan.cost).count();
        let why = match (&plan.action, equal) {
            (_, 0 | 1) => "it alone has the least cost",
            (Action::Reuse, _) if policy.ties() == Ties::Warm => "of the least cost, and an idle instance is there",
            (_, _) if policy.ties() == Ties::Warm => "of the least cost, by instances destroyed, fullness and index",
            _ => "of the least cost, the first",
        };
        write!(f, "{why}; {} places:", all.len())?;
        for Candidate { gpu, placed, cost, effort, .. } in all.iter().take(LOGGED) {
            write!(f, " [gpu {gpu} start {} cost {cost}", placed.start)?;
            match effort.made {
                false => write!(f, " idle]")?,
                true => write!(f, " destroys {}]", effort.destroyed)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
