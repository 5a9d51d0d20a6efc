//! The space of all GPUs.

use super::{Action, Plan, Policy, SlotState, Space, index::Index};
use crate::geometry::{Model, Placed};
use std::{collections::BTreeSet, sync::Arc};

/// The space of all GPUs, as it is now. GPUs of equal occupation are grouped, so that [`plan`](super::plan) need
/// not look at each.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    models: Vec<Arc<Model>>,
    gpus: Vec<Space>,
    /// The node of each GPU, by number.
    nodes: Vec<u32>,
    index: Index,
}

impl Pool {
    /// The space of `gpus`, whose models are among `models`, all on one node.
    pub fn new(models: Vec<Arc<Model>>, gpus: Vec<Space>) -> Self {
        let index = Index::new(&models, &gpus);
        Self { models, nodes: vec![0; gpus.len()], gpus, index }
    }

    /// The same, each GPU on the node with this number.
    #[must_use]
    pub fn on_nodes(self, nodes: Vec<u32>) -> Self {
        Self { nodes, ..self }
    }

    /// The node of a GPU.
    pub fn node(&self, gpu: usize) -> u32 {
        self.nodes.get(gpu).copied().unwrap_or(0)
    }

    /// Every node that has GPUs, once.
    pub fn nodes(&self) -> BTreeSet<u32> {
        self.nodes.iter().copied().collect()
    }

    /// The models there are.
    pub fn models(&self) -> &[Arc<Model>] {
        &self.models
    }

    /// The GPUs.
    pub fn gpus(&self) -> &[Space] {
        &self.gpus
    }

    /// How many GPUs of the model with this index can be used.
    pub fn usable(&self, model: usize) -> usize {
        self.index.usable(model)
    }

    /// Works out what placements cost by `policy`, as far as it is not known: a [`plan`](super::plan) by the same
    /// policy is quick afterwards. Without it a plan is the same, but looks at every GPU.
    pub fn price(&mut self, policy: &dyn Policy) {
        if self.index.is_overgrown() {
            self.index = Index::new(&self.models, &self.gpus);
        }
        self.index.price(&self.models, policy);
    }

    /// Changes what is on a GPU.
    pub fn change(&mut self, gpu: usize, change: impl FnOnce(&Model, &mut Space)) {
        let Some(space) = self.gpus.get_mut(gpu) else { return };
        let Some(model) = self.models.get(space.model) else { return };
        self.index.remove(gpu);
        change(model, space);
        self.index.insert(&self.models, gpu, space);
    }

    /// Puts another space in the place of a GPU's.
    pub fn replace(&mut self, gpu: usize, space: Space) {
        let Some(there) = self.gpus.get_mut(gpu) else { return };
        if *there != space {
            self.index.remove(gpu);
            self.index.insert(&self.models, gpu, &space);
            *there = space;
        }
    }

    /// Reserves what a plan needs: its columns, and the instances it destroys until they are gone.
    pub fn reserve(&mut self, plan: &Plan) {
        self.change(plan.gpu, |model, space| {
            if let Action::Make { destroy } = &plan.action {
                for placed in destroy {
                    space.set(model, *placed, SlotState::Held);
                }
            }
            space.set(model, plan.placed, SlotState::Held);
        });
    }

    /// Puts the instance of a plan there at once, as if the driver took no time; for looking ahead.
    pub fn occupy(&mut self, plan: &Plan) {
        self.change(plan.gpu, |model, space| space.put(model, plan.placed, &plan.action));
    }

    /// Lets go of a held slot: its instance stays, idle.
    pub fn release(&mut self, gpu: usize, placed: Placed) {
        self.change(gpu, |model, space| space.set(model, placed, SlotState::Idle { reusable: true }));
    }

    /// The index, if its costs are those of `policy`.
    pub(super) fn priced_by(&self, policy: &dyn Policy) -> Option<&Index> {
        Some(&self.index).filter(|index| index.is_priced_by(policy))
    }

    /// The GPUs that can be used, in groups on which the same lies.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &BTreeSet<usize>> {
        self.index.groups()
    }
}
