//! Which slot a request gets: pure functions over the space of all GPUs.
//!
//! [`Pool`] is the space as it is now, [`plan`] the one decision, [`Policy`] what it is decided by. Nothing
//! here touches a driver, and no plan ever touches a slot that is held.

mod policy;
mod space;

pub use policy::{ExpectedLoss, Mix, Policy};
pub use space::{Pool, Slot, SlotState, Space};

use crate::geometry::{Columns, Placed, Resolution};
use std::cmp::Reverse;

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
    pub cost: u64,
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

/// The best place for one instance of what `wanted` comes to, among the GPUs that `allowed` lets through;
/// none if there is none now.
///
/// Least cost by `policy` first; among equals an idle instance that is there already, then the fewest
/// instances destroyed, then the fullest GPU, then the lowest index and start.
pub fn plan(pool: &Pool, wanted: &Resolution, policy: &dyn Policy, allowed: impl Fn(usize) -> bool) -> Option<Plan> {
    let mut best: Option<(_, Plan)> = None;
    for (gpu, space) in pool.gpus.iter().enumerate() {
        let Some(profile) = wanted.on(space.model).filter(|_| space.usable && allowed(gpu)) else { continue };
        let Some(model) = pool.models.get(space.model) else { continue };
        let Some(kind) = model.profile(profile) else { continue };
        for (start, span) in kind.spans() {
            let placed = Placed { profile, start };
            let Some(action) = space.action_for(model, placed) else { continue };
            let cost = policy.cost(model, space.held(), span);
            let (made, destroyed) = match &action {
                Action::Reuse => (false, 0),
                Action::Make { destroy } => (true, destroy.len()),
            };
            tracing::trace!(gpu, start, profile = kind.name, cost, made, destroyed, "candidate");
            let rank = (cost, made, destroyed, Reverse(space.held().count()), gpu, start);
            if best.as_ref().is_none_or(|(least, _)| rank < *least) {
                best = Some((rank, Plan { gpu, placed, span, action, cost }));
            }
        }
    }
    best.map(|(_, plan)| plan)
}

#[cfg(test)]
mod tests;
