//! What is free, idle and held on every GPU.

use super::{Action, Plan};
use crate::geometry::{Columns, Model, Placed, Profile, Resources};
use std::sync::Arc;

/// The space of all GPUs, as it is now.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// The models there are.
    pub models: Vec<Arc<Model>>,
    /// The GPUs.
    pub gpus: Vec<Space>,
}

impl Pool {
    /// Reserves what a plan needs: its columns, and the instances it destroys until they are gone.
    pub fn reserve(&mut self, plan: &Plan) {
        let Some((model, space)) = self.parts(plan.gpu) else { return };
        if let Action::Make { destroy } = &plan.action {
            for placed in destroy {
                space.set(&model, *placed, SlotState::Held);
            }
        }
        space.set(&model, plan.placed, SlotState::Held);
    }

    /// Puts the instance of a plan there at once, as if the driver took no time; for looking ahead.
    pub fn occupy(&mut self, plan: &Plan) {
        let Some((model, space)) = self.parts(plan.gpu) else { return };
        space.put(&model, plan.placed, &plan.action);
    }

    /// Lets go of a held slot: its instance stays, idle.
    pub fn release(&mut self, gpu: usize, placed: Placed) {
        let Some((model, space)) = self.parts(gpu) else { return };
        space.set(&model, placed, SlotState::Idle { reusable: true });
    }

    fn parts(&mut self, gpu: usize) -> Option<(Arc<Model>, &mut Space)> {
        let space = self.gpus.get_mut(gpu)?;
        Some((Arc::clone(self.models.get(space.model)?), space))
    }
}

/// What is on one GPU.
#[derive(Debug, Clone, Default)]
pub struct Space {
    /// Index of its model.
    pub model: usize,
    /// Whether anything may be granted on it.
    pub usable: bool,
    slots: Vec<Slot>,
    barred: Vec<Placed>,
    blocked: Columns,
    held: Columns,
    used: Resources,
}

/// An instance that is there, or a place that is reserved for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Which profile, and where.
    pub placed: Placed,
    /// Its columns.
    pub span: Columns,
    /// Whether it may be touched.
    pub state: SlotState,
}

/// Whether a slot may be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// Nobody holds it: it may be destroyed.
    Idle {
        /// It is whole, and may be granted as it is.
        reusable: bool,
    },
    /// Leased, reserved or in doubt: it is left alone.
    Held,
}

impl Space {
    /// A GPU of the model with this index, with nothing on it.
    pub fn empty(model: usize) -> Self {
        Self { model, usable: true, ..Self::default() }
    }

    /// What is on it.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Columns that are held.
    pub fn held(&self) -> Columns {
        self.held
    }

    /// Puts a slot there, or changes the one that is.
    pub fn set(&mut self, model: &Model, placed: Placed, state: SlotState) {
        let Some(span) = model.profile(placed.profile).and_then(|profile| profile.span_at(placed.start)) else {
            return;
        };
        self.slots.retain(|slot| slot.placed != placed);
        self.slots.push(Slot { placed, span, state });
        self.sum(model);
    }

    /// Keeps these columns from being used, whatever lies there.
    pub fn block(&mut self, model: &Model, span: Columns) {
        self.blocked |= span;
        self.sum(model);
    }

    /// Keeps one placement from being chosen: the driver would not make it.
    pub fn bar(&mut self, placed: Placed) {
        self.barred.push(placed);
    }

    /// How many instances of a profile could be had now, if nothing else were asked for.
    pub fn room(&self, model: &Model, profile: usize) -> u32 {
        let Some(spans) = model.profile(profile).filter(|_| self.usable).map(Profile::spans) else { return 0 };
        let mut space = self.clone();
        let mut room = 0;
        // Equal lengths, sorted by start: the earliest first is the most that fit.
        for (start, _) in spans {
            let placed = Placed { profile, start };
            if let Some(action) = space.action_for(model, placed) {
                space.put(model, placed, &action);
                room += 1;
            }
        }
        room
    }

    fn put(&mut self, model: &Model, placed: Placed, action: &Action) {
        if let Action::Make { destroy } = action {
            self.slots.retain(|slot| !destroy.contains(&slot.placed));
        }
        self.set(model, placed, SlotState::Held);
    }

    /// What has to be done to have an instance there; none if it cannot be had beside what is held.
    pub(super) fn action_for(&self, model: &Model, placed: Placed) -> Option<Action> {
        let profile = model.profile(placed.profile)?;
        let span = profile.span_at(placed.start)?;
        let held = || self.slots.iter().filter(|slot| slot.state == SlotState::Held);
        let same = held().filter(|slot| slot.placed.profile == placed.profile).count();
        if span.overlaps(self.held)
            || same >= profile.max_instances as usize
            || !self.used.plus(profile.resources).within(model.capacity)
        {
            return None;
        }
        let idle = |slot: &&Slot| matches!(slot.state, SlotState::Idle { .. });
        let mut rest: Vec<Slot> = self.slots.iter().filter(idle).copied().collect();
        if rest.iter().any(|slot| slot.placed == placed && slot.state == SlotState::Idle { reusable: true }) {
            return Some(Action::Reuse);
        }
        if self.barred.contains(&placed) {
            return None;
        }
        let mut destroy: Vec<Placed> =
            rest.extract_if(.., |slot| slot.span.overlaps(span)).map(|slot| slot.placed).collect();
        let resources = |placed: Placed| model.profile(placed.profile).map_or(Resources::NONE, |p| p.resources);
        // What is idle elsewhere may still hold the last media engine or the last instance of the profile.
        loop {
            let count = same + rest.iter().filter(|slot| slot.placed.profile == placed.profile).count();
            let used = rest.iter().fold(self.used.plus(profile.resources), |sum, s| sum.plus(resources(s.placed)));
            let too_many = count >= profile.max_instances as usize;
            if !too_many && used.within(model.capacity) {
                break;
            }
            let helps = |slot: &Slot| match too_many {
                true => slot.placed.profile == placed.profile,
                false => resources(slot.placed).shares_excess(used, model.capacity),
            };
            let at = rest.iter().position(helps)?;
            destroy.push(rest.swap_remove(at).placed);
        }
        destroy.sort_unstable();
        Some(Action::Make { destroy })
    }

    fn sum(&mut self, model: &Model) {
        let held = self.slots.iter().filter(|slot| slot.state == SlotState::Held);
        (self.held, self.used) = held.fold((self.blocked, Resources::NONE), |(columns, used), slot| {
            let resources = model.profile(slot.placed.profile).map_or(Resources::NONE, |profile| profile.resources);
            (columns | slot.span, used.plus(resources))
        });
    }
}
