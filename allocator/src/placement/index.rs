//! GPUs of equal occupation, grouped: the cost of a decision does not grow with their number.
//!
//! A [`Class`] is the GPUs of one model on which the same is held: a placement costs the same on each of them.
//! A [`Group`] is those of a class on which the same lies idle and is barred as well: a placement is the same
//! work on each. The placements on classes that have GPUs are kept in order of cost, so that the first that
//! can be had is the best.

use super::{Layout, Policy, Space, Ties, space::Effort};
use crate::geometry::{Columns, Model, Placed};
use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

/// Groups and classes that no GPU is in are kept, for GPUs that come back to them, up to this number.
const EMPTY: usize = 4_096;

/// A placement with everything that ranks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) gpu: usize,
    pub(super) placed: Placed,
    pub(super) cost: i64,
    pub(super) effort: Effort,
    /// Columns that are held already.
    pub(super) held: u32,
}

impl Candidate {
    /// The order in which placements are preferred.
    pub(super) fn rank(&self, ties: Ties) -> impl Ord + use<> {
        let Self { gpu, placed, cost, effort, held } = *self;
        match ties {
            Ties::Warm => (cost, Some((effort, Reverse(held))), gpu, placed.start),
            Ties::Index => (cost, None, gpu, placed.start),
        }
    }
}

/// GPUs of equal occupation, grouped.
#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    /// Of which policy the costs are.
    fingerprint: Option<u64>,
    /// Classes that have had GPUs since costs were worked out last, and have no costs.
    unpriced: Vec<usize>,
    classes: Vec<Class>,
    class_of: HashMap<(usize, Layout), usize>,
    groups: Vec<Group>,
    group_of: HashMap<Space, usize>,
    /// The group of each GPU; none while it cannot be used.
    gpus: Vec<Option<usize>>,
    /// For each model and profile the placements on classes that have GPUs, cheapest first.
    offers: Vec<Vec<Vec<Offer>>>,
    /// For each model the GPUs that can be used.
    usable: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Class {
    model: usize,
    held: u32,
    layout: Layout,
    /// Groups that have GPUs.
    groups: Vec<usize>,
    /// What each placement costs, once that was worked out.
    costs: Option<Arc<[(Placed, usize, i64)]>>,
}

#[derive(Debug, Clone)]
struct Group {
    class: usize,
    gpus: BTreeSet<usize>,
    /// For each place of the model what it takes to have an instance there.
    efforts: Arc<[Option<Effort>]>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    cost: i64,
    class: usize,
    start: u32,
    /// Which of the model's places it is.
    place: usize,
}

impl Index {
    /// An index of these GPUs, whose costs are those of no policy yet.
    pub(super) fn new(models: &[Arc<Model>], gpus: &[Space]) -> Self {
        let offers = models.iter().map(|model| vec![Vec::new(); model.profiles().len()]).collect();
        let mut index = Self { offers, usable: vec![0; models.len()], ..Self::default() };
        index.gpus = vec![None; gpus.len()];
        for (gpu, space) in gpus.iter().enumerate() {
            index.insert(models, gpu, space);
        }
        index
    }

    /// Whether its costs are those of `policy`, and all are known.
    pub(super) fn is_priced_by(&self, policy: &dyn Policy) -> bool {
        self.unpriced.is_empty() && self.fingerprint == Some(policy.fingerprint())
    }

    /// How many GPUs of a model can be used.
    pub(super) fn usable(&self, model: usize) -> usize {
        self.usable.get(model).copied().unwrap_or(0)
    }

    /// Works out by `policy` the costs that are not known, or another's.
    pub(super) fn price(&mut self, models: &[Arc<Model>], policy: &dyn Policy) {
        let fingerprint = Some(policy.fingerprint());
        if self.fingerprint != fingerprint {
            self.fingerprint = fingerprint;
            self.offers.iter_mut().flatten().for_each(Vec::clear);
            self.classes.iter_mut().for_each(|class| class.costs = None);
            self.unpriced = (0..self.classes.len()).collect();
        }
        for at in std::mem::take(&mut self.unpriced) {
            let Some(class) = self.classes.get_mut(at).filter(|class| !class.groups.is_empty()) else { continue };
            let Some(model) = models.get(class.model) else { continue };
            let layout = &class.layout;
            let free = |(_, (_, span)): &(usize, (Placed, Columns))| !span.overlaps(layout.columns());
            let cost = |(place, (placed, span))| (placed, place, policy.cost(model, layout, placed, span));
            class.costs = Some(places(model).enumerate().filter(free).map(cost).collect());
            self.offer(at);
        }
    }

    /// Takes a GPU out, before it changes.
    pub(super) fn remove(&mut self, gpu: usize) {
        let Some(group_at) = self.gpus.get_mut(gpu).and_then(Option::take) else { return };
        let Some(group) = self.groups.get_mut(group_at) else { return };
        group.gpus.remove(&gpu);
        let empty = group.gpus.is_empty();
        let Some(class) = self.classes.get_mut(group.class) else { return };
        if let Some(usable) = self.usable.get_mut(class.model) {
            *usable = usable.saturating_sub(1);
        }
        if !empty {
            return;
        }
        class.groups.retain(|at| *at != group_at);
        if class.groups.is_empty() {
            let (at, model, costs) = (group.class, class.model, class.costs.clone());
            for (placed, place, cost) in costs.iter().flat_map(|costs| costs.iter().copied()) {
                let offer = Offer { cost, class: at, start: placed.start, place };
                if let Some(offers) = self.offers.get_mut(model).and_then(|m| m.get_mut(placed.profile))
                    && let Ok(found) = offers.binary_search(&offer)
                {
                    offers.remove(found);
                }
            }
        }
    }

    /// Puts a GPU in, as it is now.
    pub(super) fn insert(&mut self, models: &[Arc<Model>], gpu: usize, space: &Space) {
        let Some(model) = models.get(space.model).filter(|_| space.usable) else { return };
        let group_at = match self.group_of.get(space) {
            Some(at) => *at,
            None => self.new_group(model, space),
        };
        if let Some(slot) = self.gpus.get_mut(gpu) {
            *slot = Some(group_at);
        }
        if let Some(usable) = self.usable.get_mut(space.model) {
            *usable += 1;
        }
        let Some(group) = self.groups.get_mut(group_at) else { return };
        let first = group.gpus.is_empty();
        group.gpus.insert(gpu);
        let class_at = group.class;
        let Some(class) = self.classes.get_mut(class_at) else { return };
        if !first {
            return;
        }
        class.groups.push(group_at);
        if class.groups.len() > 1 {
            return;
        }
        match class.costs {
            Some(_) => self.offer(class_at),
            None => self.unpriced.push(class_at),
        }
    }

    /// Whether so much is kept for GPUs that may come back that it should be made anew.
    pub(super) fn is_overgrown(&self) -> bool {
        self.groups.len().max(self.classes.len()) > EMPTY + 2 * self.gpus.len()
    }

    /// The best placement of `profiles`, one for each model, on a GPU and at a place that `allowed` lets through.
    pub(super) fn best(
        &self,
        profiles: impl Fn(usize) -> Option<usize>,
        ties: Ties,
        allowed: &dyn Fn(usize, Placed) -> bool,
    ) -> Option<Candidate> {
        let mut best: Option<Candidate> = None;
        for (model, offers) in self.offers.iter().enumerate() {
            let Some(profile) = profiles(model) else { continue };
            for offer in offers.get(profile).into_iter().flatten() {
                if best.is_some_and(|best| best.cost < offer.cost) {
                    break;
                }
                let placed = Placed { profile, start: offer.start };
                self.weigh(*offer, placed, ties, allowed, &mut best);
            }
        }
        best
    }

    /// The GPUs of each group.
    pub(super) fn groups(&self) -> impl Iterator<Item = &BTreeSet<usize>> {
        self.groups.iter().map(|group| &group.gpus).filter(|gpus| !gpus.is_empty())
    }

    fn weigh(
        &self,
        offer: Offer,
        placed: Placed,
        ties: Ties,
        allowed: &dyn Fn(usize, Placed) -> bool,
        best: &mut Option<Candidate>,
    ) {
        let Some(class) = self.classes.get(offer.class) else { return };
        for at in &class.groups {
            let Some(group) = self.groups.get(*at) else { continue };
            let Some(effort) = group.efforts.get(offer.place).copied().flatten() else { continue };
            let Some(first) = group.gpus.first() else { continue };
            let candidate = Candidate { gpu: *first, placed, cost: offer.cost, effort, held: class.held };
            // Even its first GPU would not do better.
            if best.is_some_and(|best| best.rank(ties) <= candidate.rank(ties)) {
                continue;
            }
            let Some(gpu) = group.gpus.iter().copied().find(|gpu| allowed(*gpu, placed)) else { continue };
            let candidate = Candidate { gpu, ..candidate };
            if best.is_none_or(|best| candidate.rank(ties) < best.rank(ties)) {
                *best = Some(candidate);
            }
        }
    }

    fn new_group(&mut self, model: &Model, space: &Space) -> usize {
        let key = (space.model, space.layout().clone());
        let class = match self.class_of.get(&key) {
            Some(at) => *at,
            None => {
                let at = self.classes.len();
                let held = space.held().count();
                let layout = key.1.clone();
                self.classes.push(Class { model: space.model, held, layout, groups: Vec::new(), costs: None });
                self.class_of.insert(key, at);
                at
            }
        };
        let efforts = places(model).map(|(placed, _)| space.effort_for(model, placed)).collect();
        let at = self.groups.len();
        self.groups.push(Group { class, gpus: BTreeSet::new(), efforts });
        self.group_of.insert(space.clone(), at);
        at
    }

    /// Offers the placements on a class that has GPUs now.
    fn offer(&mut self, class_at: usize) {
        let Some(class) = self.classes.get(class_at) else { return };
        let Some(of_model) = self.offers.get_mut(class.model) else { return };
        for (placed, place, cost) in class.costs.iter().flat_map(|costs| costs.iter().copied()) {
            let offer = Offer { cost, class: class_at, start: placed.start, place };
            if let Some(offers) = of_model.get_mut(placed.profile)
                && let Err(at) = offers.binary_search(&offer)
            {
                offers.insert(at, offer);
            }
        }
    }
}

/// Every place on a GPU of a model, always in the same order.
fn places(model: &Model) -> impl Iterator<Item = (Placed, Columns)> + '_ {
    let profiles = model.profiles().iter().enumerate();
    profiles.flat_map(|(profile, kind)| kind.spans().map(move |(start, span)| (Placed { profile, start }, span)))
}
