//! What is free, idle and held on one GPU.

use super::{Action, Layout};
use crate::geometry::{Columns, Model, Placed, Profile, Resources};

/// What is on one GPU. Two that are equal serve alike.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Space {
    /// Index of its model.
    pub model: usize,
    /// Whether anything may be granted on it.
    pub usable: bool,
    /// Sorted, and so are those that are barred: what is equal reads equal.
    slots: Vec<Slot>,
    barred: Vec<Placed>,
    layout: Layout,
    /// Columns of idle instances, and the first column of each.
    idle: Columns,
    idle_starts: Columns,
    used: Resources,
}

/// An instance that is there, or a place that is reserved for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Which profile, and where.
    pub placed: Placed,
    /// Its columns.
    pub span: Columns,
    /// Whether it may be touched.
    pub state: SlotState,
}

/// Whether a slot may be touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

    /// What is held.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Columns that are held.
    pub fn held(&self) -> Columns {
        self.layout.columns()
    }

    /// Puts a slot there, or changes the one that is.
    pub fn set(&mut self, model: &Model, placed: Placed, state: SlotState) {
        let Some(span) = model.profile(placed.profile).and_then(|profile| profile.span_at(placed.start)) else {
            return;
        };
        let slot = Slot { placed, span, state };
        match self.slots.binary_search_by_key(&placed, |slot| slot.placed) {
            Ok(at) => self.slots.iter_mut().skip(at).take(1).for_each(|there| *there = slot),
            Err(at) => self.slots.insert(at, slot),
        }
        self.sum(model, self.layout.blocked());
    }

    /// Keeps these columns from being used, whatever lies there.
    pub fn block(&mut self, model: &Model, span: Columns) {
        self.sum(model, self.layout.blocked() | span);
    }

    /// Keeps one placement from being chosen: the driver would not make it.
    pub fn bar(&mut self, placed: Placed) {
        if let Err(at) = self.barred.binary_search(&placed) {
            self.barred.insert(at, placed);
        }
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

    pub(super) fn put(&mut self, model: &Model, placed: Placed, action: &Action) {
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
        if span.overlaps(self.held())
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

    /// Whether an instance could be had there, beside what is held.
    pub fn can_have(&self, model: &Model, placed: Placed) -> bool {
        self.effort_for(model, placed).is_some()
    }

    /// What [`Self::action_for`] would come to: whether an instance has to be made, and how many are destroyed.
    pub(super) fn effort_for(&self, model: &Model, placed: Placed) -> Option<Effort> {
        let profile = model.profile(placed.profile)?;
        let span = profile.span_at(placed.start)?;
        if span.overlaps(self.held()) {
            return None;
        }
        let rest = || self.slots.iter().filter(|slot| !slot.span.overlaps(span));
        let of_kind = rest().filter(|slot| slot.placed.profile == placed.profile).count();
        let resources = |slot: &Slot| model.profile(slot.placed.profile).map_or(Resources::NONE, |p| p.resources);
        let all = rest().fold(profile.resources, |sum, slot| sum.plus(resources(slot)));
        let scarce = of_kind >= profile.max_instances as usize || !all.within(model.capacity);
        if scarce || self.barred.contains(&placed) {
            return self.action_for(model, placed).map(|action| action.effort());
        }
        let whole = |slot: &Slot| slot.placed == placed && slot.state == SlotState::Idle { reusable: true };
        if span.overlaps(self.idle) && self.slots.iter().any(whole) {
            return Some(Effort { made: false, destroyed: 0 });
        }
        let begins_before = self.slots.iter().any(|slot| slot.placed.start < placed.start && slot.span.overlaps(span));
        let destroyed = (self.idle_starts & span).count() + u32::from(begins_before);
        Some(Effort { made: true, destroyed })
    }

    fn sum(&mut self, model: &Model, blocked: Columns) {
        let held = self.slots.iter().filter(|slot| slot.state == SlotState::Held);
        self.layout.reset(blocked, held.clone().map(|slot| (slot.placed, slot.span)));
        let resources = |slot: &Slot| model.profile(slot.placed.profile).map_or(Resources::NONE, |p| p.resources);
        self.used = held.fold(Resources::NONE, |used, slot| used.plus(resources(slot)));
        (self.idle, self.idle_starts) = (Columns::NONE, Columns::NONE);
        for slot in self.slots.iter().filter(|slot| slot.state != SlotState::Held) {
            self.idle |= slot.span;
            self.idle_starts |= Columns::span(slot.placed.start, 1).unwrap_or_default();
        }
    }
}

/// How much work a placement is; less is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Effort {
    /// Whether an instance has to be made.
    pub(super) made: bool,
    /// How many are destroyed for it.
    pub(super) destroyed: u32,
}
