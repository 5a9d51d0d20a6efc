//! Several slices at once: all of them or none.

use super::{Plan, Policy, Pool, plan};
use crate::geometry::{Placed, Resolution};

/// How many slices are wanted together, and how they are to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gang {
    /// How many in all.
    pub slices: u32,
    /// On how many nodes, the same number on each; none for wherever there is room.
    pub nodes: Option<u32>,
}

impl Gang {
    /// One slice, anywhere.
    pub const ONE: Self = Self { slices: 1, nodes: None };

    /// How many slices come together on a node, if nodes matter.
    fn of_a_node(self) -> Option<(u32, u32)> {
        let nodes = self.nodes.filter(|nodes| *nodes > 0)?;
        Some((nodes, self.slices / nodes))
    }
}

/// The best places for all slices of a gang, as `allowed` lets through, reserved in `pool`; none, and the pool as
/// it was, if not all can be had now. A gang lies on GPUs of one model.
///
/// Instances of one profile are never in each other's way but by their columns, so that placing one after the
/// other finds room for all wherever there is room for all.
pub fn plan_all(
    pool: &mut Pool,
    wanted: &Resolution,
    gang: Gang,
    policy: &dyn Policy,
    allowed: &dyn Fn(&Pool, usize, Placed) -> bool,
) -> Option<Vec<Plan>> {
    pool.price(policy);
    if gang.slices == 1 {
        let found = plan(pool, wanted, policy, |gpu, placed| allowed(pool, gpu, placed))?;
        pool.reserve(&found);
        return Some(vec![found]);
    }
    (0..pool.models().len()).find_map(|model| {
        wanted.on(model)?;
        let wanted = wanted.only(|other| other == model);
        let mut search = Search { pool, wanted: &wanted, policy, allowed, done: Vec::new() };
        let found = match gang.of_a_node() {
            None => search.take(gang.slices, None),
            Some((nodes, each)) => search.take_nodes(nodes, each),
        };
        let plans: Vec<Plan> = search.done.into_iter().map(|(plan, _)| plan).collect();
        plans.iter().filter(|_| found).for_each(|plan| pool.reserve(plan));
        found.then_some(plans)
    })
}

struct Search<'a> {
    pool: &'a mut Pool,
    wanted: &'a Resolution,
    policy: &'a dyn Policy,
    allowed: &'a dyn Fn(&Pool, usize, Placed) -> bool,
    /// What is reserved so far, with the space of its GPU before.
    done: Vec<(Plan, super::Space)>,
}

impl Search<'_> {
    /// Reserves so many slices, on one node if one is named; or none of them.
    fn take(&mut self, slices: u32, node: Option<u32>) -> bool {
        let before = self.done.len();
        for _ in 0..slices {
            self.pool.price(self.policy);
            let pool = &*self.pool;
            let here = |gpu: usize| node.is_none_or(|node| pool.node(gpu) == node);
            let allowed = |gpu, placed| here(gpu) && (self.allowed)(pool, gpu, placed);
            let found = plan(pool, self.wanted, self.policy, allowed);
            let space = found.as_ref().and_then(|plan| pool.gpus().get(plan.gpu)).cloned();
            let (Some(plan), Some(space)) = (found, space) else {
                self.put_back(before);
                return false;
            };
            // A GPU is changed step by step: what is destroyed for one slice is gone before the next is made.
            self.pool.occupy(&plan);
            self.done.push((plan, space));
        }
        true
    }

    /// Reserves so many slices on each of so many nodes: on those first that have the least room beside.
    fn take_nodes(&mut self, nodes: u32, each: u32) -> bool {
        let mut free: Vec<(u32, u32)> = self.pool.nodes().into_iter().map(|node| (self.free_on(node), node)).collect();
        free.sort_unstable();
        let mut taken = 0;
        for (_, node) in free {
            if taken == nodes {
                break;
            }
            taken += u32::from(self.take(each, Some(node)));
        }
        if taken < nodes {
            self.put_back(0);
        }
        taken == nodes
    }

    /// Columns that nobody holds on a node's GPUs of the models that serve.
    fn free_on(&self, node: u32) -> u32 {
        let pool = &*self.pool;
        let here = pool.gpus().iter().enumerate().filter(|(gpu, _)| pool.node(*gpu) == node);
        let serving = here.filter(|(_, space)| space.usable && self.wanted.on(space.model).is_some());
        let columns = |model: usize| pool.models().get(model).map_or(0, |model| model.columns);
        serving.map(|(_, space)| columns(space.model).saturating_sub(space.held().count())).sum()
    }

    fn put_back(&mut self, keep: usize) {
        while self.done.len() > keep
            && let Some((plan, space)) = self.done.pop()
        {
            self.pool.replace(plan.gpu, space);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        geometry::{facts, resolve},
        placement::{ExpectedRoom, Space},
    };
    use proptest::prelude::*;
    use std::sync::Arc;

    fn pool(gpus: usize, nodes: u32) -> Pool {
        let nodes = (0..gpus).map(|gpu| u32::try_from(gpu).unwrap() % nodes).collect();
        Pool::new(vec![Arc::new(facts::model("A100-40GB"))], vec![Space::empty(0); gpus]).on_nodes(nodes)
    }

    fn take(pool: &mut Pool, need: &str, gang: Gang) -> Option<Vec<Plan>> {
        let wanted = resolve(&need.parse().unwrap(), pool.models()).unwrap();
        plan_all(pool, &wanted, gang, &ExpectedRoom::default(), &|_, _, _| true)
    }

    #[test]
    fn a_gang_that_does_not_fit_leaves_everything_as_it_was() {
        let mut pool = pool(2, 1);
        take(&mut pool, "4g.20gb", Gang::ONE).unwrap();
        let before = pool.gpus().to_vec();
        assert_eq!(take(&mut pool, "7g.40gb", Gang { slices: 2, nodes: None }), None);
        assert_eq!(take(&mut pool, "3g.20gb", Gang { slices: 4, nodes: None }), None);
        assert_eq!(pool.gpus(), before);
        assert_eq!(take(&mut pool, "3g.20gb", Gang { slices: 3, nodes: None }).unwrap().len(), 3);
    }

    #[test]
    fn a_gang_over_nodes_has_as_many_slices_on_each() {
        let mut pool = pool(4, 2);
        let plans = take(&mut pool, "7g.40gb", Gang { slices: 2, nodes: Some(2) }).unwrap();
        let on: Vec<u32> = plans.iter().map(|plan| pool.node(plan.gpu)).collect();
        assert_eq!(on, [0, 1]);
        assert_eq!(take(&mut pool, "7g.40gb", Gang { slices: 2, nodes: Some(1) }), None, "no node has two left");
        assert_eq!(take(&mut pool, "4g.20gb", Gang { slices: 2, nodes: Some(2) }).unwrap().len(), 2);
    }

    proptest! {
        /// Either every slice is placed, on free columns of its own, or the pool is as it was.
        #[test]
        fn all_or_nothing(asked in prop::collection::vec((0usize..6, 1u32..9, prop::option::of(1u32..4)), 1..12)) {
            let mut pool = pool(6, 3);
            let names: Vec<String> = pool.models()[0].profiles().iter().map(|profile| profile.name.clone()).collect();
            let mut held: Vec<(usize, crate::geometry::Columns)> = Vec::new();
            for (which, each, nodes) in asked {
                let gang = Gang { slices: each * nodes.unwrap_or(1), nodes };
                let before = pool.gpus().to_vec();
                match take(&mut pool, &names[which % names.len()], gang) {
                    None => prop_assert_eq!(pool.gpus(), before),
                    Some(plans) => {
                        prop_assert_eq!(plans.len(), gang.slices as usize);
                        for plan in &plans {
                            prop_assert!(!held.iter().any(|(gpu, span)| *gpu == plan.gpu && span.overlaps(plan.span)));
                            held.push((plan.gpu, plan.span));
                        }
                        if let Some(nodes) = nodes {
                            let mut on: Vec<u32> = plans.iter().map(|plan| pool.node(plan.gpu)).collect();
                            on.sort_unstable();
                            on.dedup();
                            prop_assert_eq!(on.len(), nodes as usize);
                        }
                    }
                }
            }
        }
    }
}
