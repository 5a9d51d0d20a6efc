//! Which instances can lie beside which: the rules of MIG, as pure functions.
//!
//! Nothing here knows of processes, faults or files.

use crate::facts::{Media, Model, Placement, Profile};

/// The first driver branch on which 4g and 3g lie together on one GPU.
const DRIVER_FOR_4G_WITH_3G: u32 = 510;

/// A GPU instance as the rules see it.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    /// Its profile.
    pub profile: &'a Profile,
    /// Where it lies.
    pub placement: Placement,
}

/// The rules of one GPU model under one driver.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    model: &'a Model,
    driver_branch: u32,
}

impl<'a> Rules<'a> {
    /// The rules of `model` under driver branch `driver_branch` (535 of 535.104.05).
    #[must_use]
    pub fn new(model: &'a Model, driver_branch: u32) -> Self {
        Self { model, driver_branch }
    }

    /// The model they are of.
    #[must_use]
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// The profiles this driver knows for the model.
    pub fn profiles(&self) -> impl Iterator<Item = &'a Profile> + use<'a> {
        let branch = self.driver_branch;
        self.model.profiles.iter().filter(move |profile| profile.since_driver <= branch)
    }

    /// The profile with NVML's id `id`, if this driver knows it.
    #[must_use]
    pub fn profile(&self, id: u32) -> Option<&'a Profile> {
        self.profiles().find(|profile| profile.id == id)
    }

    /// Whether `new` can be made beside `present` (which is taken to be legal).
    #[must_use]
    pub fn allows(&self, present: &[Slot<'_>], new: Slot<'_>) -> bool {
        let same = present.iter().filter(|slot| slot.profile.id == new.profile.id);
        new.profile.placements.contains(&new.placement)
            && present.iter().all(|slot| !slot.placement.overlaps(new.placement))
            && within(present.len(), self.model.max_instances)
            && within(same.count(), new.profile.max_instances)
            && self.media_suffice(present, new)
            && self.driver_allows(present, new)
    }

    /// Where `profile` could be made now, beside `present`, in rising order.
    #[must_use]
    pub fn free_placements(&self, present: &[Slot<'_>], profile: &Profile) -> Vec<Placement> {
        let fits = |&placement: &Placement| self.allows(present, Slot { profile, placement });
        profile.placements.iter().copied().filter(fits).collect()
    }

    /// Where the driver puts `profile` when it is not told: the highest free start, whatever that costs the
    /// next request. That fails for 1g, 1g, 2g, 3g and works for 3g, 1g, 2g, 1g, as NVIDIA's MIG guide says.
    #[must_use]
    pub fn first_choice(&self, present: &[Slot<'_>], profile: &Profile) -> Option<Placement> {
        self.free_placements(present, profile).pop()
    }

    /// How many more of `profile` can be made beside `present`.
    #[must_use]
    pub fn remaining(&self, present: &[Slot<'_>], profile: &Profile) -> u32 {
        // Placements of one profile are equally long, so that taking the lowest free one each time wastes
        // none.
        let mut slots: Vec<Slot<'_>> = present.to_vec();
        let mut count = 0;
        while let Some(&placement) = self.free_placements(&slots, profile).first() {
            slots.push(Slot { profile, placement });
            count += 1;
        }
        count
    }

    /// NVML's id of the GPU instance at `placement`. As on hardware it belongs to the place, so that what is
    /// made there again gets the same id: 0 for the whole GPU, then halves, quarters, eighths, each with the
    /// upper end of the axis first.
    #[must_use]
    pub fn instance_id(&self, placement: Placement) -> Option<u32> {
        let parts = self.model.axis.checked_div(placement.size)?;
        let at = placement.start.checked_div(placement.size)?;
        let from_the_middle = at.checked_add(parts / 2)?.checked_rem(parts)?;
        parts.checked_sub(1)?.checked_add(from_the_middle)
    }

    /// The media engines that are left for others when `new` is made, and the one set of `+me`.
    fn media_suffice(&self, present: &[Slot<'_>], new: Slot<'_>) -> bool {
        let extended = |slot: &Slot<'_>| slot.profile.takes_media_extension();
        if extended(&new) && present.iter().any(extended) {
            return false;
        }
        let Some(total) = self.model.media else { return true };
        let used = |of: fn(&Media) -> u32| {
            let slots = present.iter().chain(std::iter::once(&new));
            slots.map(|slot| u64::from(of(&slot.profile.media))).sum::<u64>()
        };
        used(|media| media.decoders) <= u64::from(total.decoders)
            && used(|media| media.encoders) <= u64::from(total.encoders)
            && used(|media| media.jpeg) <= u64::from(total.jpeg)
            && used(|media| media.ofa) <= u64::from(total.ofa)
    }

    fn driver_allows(&self, present: &[Slot<'_>], new: Slot<'_>) -> bool {
        if self.driver_branch >= DRIVER_FOR_4G_WITH_3G {
            return true;
        }
        let other = match new.profile.compute_slices {
            3 => 4,
            4 => 3,
            _ => return true,
        };
        present.iter().all(|slot| slot.profile.compute_slices != other)
    }
}

fn within(present: usize, limit: u32) -> bool {
    u32::try_from(present).is_ok_and(|present| present < limit)
}

/// A kind of compute instance within a GPU instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComputeProfile {
    /// `NVML_COMPUTE_INSTANCE_PROFILE_*`, which is its id too.
    pub id: u32,
    /// Compute slices.
    pub slices: u32,
    /// How many an empty GPU instance can hold.
    pub max_instances: u32,
}

impl ComputeProfile {
    /// Everywhere it can lie in a GPU instance, in rising order: `3c` at 0 and 4, the others at multiples of
    /// their size.
    #[must_use]
    pub fn placements(&self) -> Vec<Placement> {
        let stride = if self.slices == 3 { 4 } else { self.slices };
        (0..self.max_instances).map(|at| Placement { start: at.saturating_mul(stride), size: self.slices }).collect()
    }

    /// Where it could be made now, beside `present`, in rising order.
    #[must_use]
    pub fn free_placements(&self, present: &[Placement]) -> Vec<Placement> {
        let free = |placement: &Placement| present.iter().all(|other| !other.overlaps(*placement));
        self.placements().into_iter().filter(free).collect()
    }

    /// `1c.3g.20gb`, or the GPU instance's own name if it takes the whole of it.
    #[must_use]
    pub fn name(&self, within: &Profile) -> String {
        if self.slices == within.compute_slices {
            within.name.clone()
        } else {
            format!("{}c.{}", self.slices, within.name)
        }
    }

    /// Its share of the GPU instance's multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self, within: &Profile) -> Option<u32> {
        within.multiprocessors?.checked_mul(self.slices)?.checked_div(within.compute_slices)
    }
}

/// What a GPU instance of `compute_slices` slices can hold.
#[must_use]
pub fn compute_profiles(compute_slices: u32) -> Vec<ComputeProfile> {
    // (id, slices, how many): as `nvidia-smi mig -lcip` prints them.
    let table: &[(u32, u32, u32)] = match compute_slices {
        1 => &[(0, 1, 1)],
        2 => &[(0, 1, 2), (1, 2, 1)],
        3 => &[(0, 1, 3), (1, 2, 1), (2, 3, 1)],
        4 => &[(0, 1, 4), (1, 2, 2), (3, 4, 1)],
        7 => &[(0, 1, 7), (1, 2, 3), (2, 3, 2), (3, 4, 1), (4, 7, 1)],
        _ => &[],
    };
    table.iter().map(|&(id, slices, max_instances)| ComputeProfile { id, slices, max_instances }).collect()
}
