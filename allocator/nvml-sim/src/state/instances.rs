//! The life of GPU instances and compute instances.
//!
//! ```text
//! GPU ── create ──▶ GPU instance ── create ──▶ compute instance = MIG device ──▶ processes
//!     ◀── destroy ──             ◀── destroy ──                              ◀──
//! ```
//! Nothing is destroyed while something is in it.

use std::time::Duration;

use super::{
    ComputeInstance, FaultKind, FoundComputeInstance, FoundGpuInstance, GpuInstance, InstanceKind, State, uuid,
};
use crate::facts::{Placement, Profile};
use crate::geometry::{ComputeProfile, Rules, Slot, compute_profiles};
use crate::refusal::Refusal;

/// Whether a destroy is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destroy {
    /// It is gone.
    Done,
    /// It will be: ask to finish after this time.
    After(Duration),
}

impl State {
    /// Creates a GPU instance: at `placement`, or where the driver likes. Answers its handle.
    ///
    /// # Errors
    /// [`Refusal::NotSupported`] without MIG mode or for a profile the GPU does not have,
    /// [`Refusal::InvalidArgument`] for a placement that is none of the profile's,
    /// [`Refusal::InsufficientResources`] where it does not fit now.
    pub fn create_gpu_instance(
        &mut self,
        gpu: u32,
        driver_branch: u32,
        profile: u32,
        placement: Option<Placement>,
    ) -> Result<u64, Refusal> {
        let (rules, profile) = self.divisible(gpu, driver_branch, profile)?;
        let present = self.gpu(gpu)?.slots()?;
        let placement = match placement {
            Some(placement) if !profile.placements.contains(&placement) => return Err(Refusal::InvalidArgument),
            Some(placement) => placement,
            None => rules.first_choice(&present, profile).ok_or(Refusal::InsufficientResources)?,
        };
        if !rules.allows(&present, Slot { profile, placement })
            || self.take_fault(FaultKind::InsufficientResources, gpu, InstanceKind::GpuInstance)
        {
            return Err(Refusal::InsufficientResources);
        }
        let id = rules.instance_id(placement).ok_or(Refusal::Unknown)?;
        let key = self.new_key();
        let Placement { start, size } = placement;
        let instance = GpuInstance { key, id, profile: profile.id, start, size, compute: Vec::new() };
        self.gpu_mut(gpu)?.instances.push(instance);
        self.tell_of_mig_change(gpu);
        Ok(key)
    }

    /// Begins to destroy a GPU instance: checks, uses up faults, and does it, unless it is to take time.
    ///
    /// # Errors
    /// [`Refusal::InUse`] while compute instances are in it, or by a fault; [`Refusal::InvalidArgument`] when
    /// it is gone.
    pub fn begin_destroy_gpu_instance(&mut self, key: u64) -> Result<Destroy, Refusal> {
        let gpu = empty_gpu_instance(self, key)?.gpu_index;
        let on = InstanceKind::GpuInstance;
        if self.take_fault(FaultKind::DestroyInUse, gpu, on) || self.take_fault(FaultKind::GpuInstanceLeft, gpu, on) {
            return Err(Refusal::InUse);
        }
        if let Some(time) = self.take_delay(gpu, on) {
            return Ok(Destroy::After(time));
        }
        self.finish_destroy_gpu_instance(key)?;
        Ok(Destroy::Done)
    }

    /// Destroys a GPU instance.
    ///
    /// # Errors
    /// As [`State::begin_destroy_gpu_instance`], but for faults.
    pub fn finish_destroy_gpu_instance(&mut self, key: u64) -> Result<(), Refusal> {
        let gpu = empty_gpu_instance(self, key)?.gpu_index;
        self.gpu_mut(gpu)?.instances.retain(|instance| instance.key != key);
        self.tell_of_mig_change(gpu);
        Ok(())
    }

    /// Creates a compute instance in the GPU instance `parent`: at `placement`, or at the first free one.
    /// Answers its handle.
    ///
    /// # Errors
    /// [`Refusal::NotSupported`] for a profile the GPU instance does not have, [`Refusal::InvalidArgument`]
    /// for a placement that is none of the profile's, [`Refusal::InsufficientResources`] where it does not
    /// fit now.
    pub fn create_compute_instance(
        &mut self,
        parent: u64,
        profile: u32,
        placement: Option<Placement>,
    ) -> Result<u64, Refusal> {
        let (gpu, compute_profile) = {
            let found = self.gpu_instance(parent)?;
            (found.gpu_index, found.compute_profile(profile)?)
        };
        let instance = self.gpu_instance(parent)?.instance;
        let free = compute_profile.free_placements(&instance.compute_placements());
        let placement = match placement {
            Some(placement) if !compute_profile.placements().contains(&placement) => {
                return Err(Refusal::InvalidArgument);
            }
            Some(placement) => Some(placement).filter(|placement| free.contains(placement)),
            None => free.first().copied(),
        };
        let id = (0..).find(|&id| instance.compute.iter().all(|compute| compute.id != id)).ok_or(Refusal::Unknown)?;
        let Placement { start, size } = placement.ok_or(Refusal::InsufficientResources)?;
        if self.take_fault(FaultKind::InsufficientResources, gpu, InstanceKind::ComputeInstance) {
            return Err(Refusal::InsufficientResources);
        }
        let key = self.new_key();
        let uuid = format!("MIG-{}", uuid());
        let compute = ComputeInstance { key, id, profile, start, size, uuid, processes: Vec::new() };
        let mut instances = self.gpu_mut(gpu)?.instances.iter_mut();
        let instance = instances.find(|instance| instance.key == parent).ok_or(Refusal::InvalidArgument)?;
        instance.compute.push(compute);
        self.tell_of_mig_change(gpu);
        Ok(key)
    }

    /// Begins to destroy a compute instance: checks, uses up faults, and does it, unless it is to take time.
    ///
    /// # Errors
    /// [`Refusal::InUse`] while processes run on it, or by a fault; [`Refusal::InvalidArgument`] when it is
    /// gone.
    pub fn begin_destroy_compute_instance(&mut self, key: u64) -> Result<Destroy, Refusal> {
        let gpu = idle_compute_instance(self, key)?.parent.gpu_index;
        let on = InstanceKind::ComputeInstance;
        if self.take_fault(FaultKind::DestroyInUse, gpu, on) {
            return Err(Refusal::InUse);
        }
        if let Some(time) = self.take_delay(gpu, on) {
            return Ok(Destroy::After(time));
        }
        self.finish_destroy_compute_instance(key)?;
        Ok(Destroy::Done)
    }

    /// Destroys a compute instance.
    ///
    /// # Errors
    /// As [`State::begin_destroy_compute_instance`], but for faults.
    pub fn finish_destroy_compute_instance(&mut self, key: u64) -> Result<(), Refusal> {
        let gpu = idle_compute_instance(self, key)?.parent.gpu_index;
        for instance in &mut self.gpu_mut(gpu)?.instances {
            instance.compute.retain(|compute| compute.key != key);
        }
        self.tell_of_mig_change(gpu);
        Ok(())
    }

    /// How many more GPU instances of a profile fit now.
    ///
    /// # Errors
    /// [`Refusal::NotSupported`] without MIG mode or for a profile the GPU does not have.
    pub fn remaining_gpu_instances(&self, gpu: u32, driver_branch: u32, profile: u32) -> Result<u32, Refusal> {
        let (rules, profile) = self.divisible(gpu, driver_branch, profile)?;
        Ok(rules.remaining(&self.gpu(gpu)?.slots()?, profile))
    }

    /// The rules and profile of a GPU that is in MIG mode.
    pub fn divisible(
        &self,
        gpu: u32,
        driver_branch: u32,
        profile: u32,
    ) -> Result<(Rules<'static>, &'static Profile), Refusal> {
        let gpu = self.gpu(gpu)?;
        let rules = gpu.rules(driver_branch)?;
        let profile = rules.profile(profile).filter(|_| gpu.mig).ok_or(Refusal::NotSupported)?;
        Ok((rules, profile))
    }
}

impl FoundGpuInstance<'_> {
    /// Its profile.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] when the facts do not have it; a loaded state was checked for that.
    pub fn profile(&self) -> Result<&'static Profile, Refusal> {
        self.gpu.model()?.profile(self.instance.profile).ok_or(Refusal::Unknown)
    }

    /// The compute instance profile with id `id`, if this GPU instance has it.
    ///
    /// # Errors
    /// [`Refusal::NotSupported`] when not.
    pub fn compute_profile(&self, id: u32) -> Result<ComputeProfile, Refusal> {
        let profiles = compute_profiles(self.profile()?.compute_slices);
        profiles.into_iter().find(|profile| profile.id == id).ok_or(Refusal::NotSupported)
    }
}

fn empty_gpu_instance(state: &State, key: u64) -> Result<FoundGpuInstance<'_>, Refusal> {
    let found = state.gpu_instance(key)?;
    if found.instance.compute.is_empty() { Ok(found) } else { Err(Refusal::InUse) }
}

fn idle_compute_instance(state: &State, key: u64) -> Result<FoundComputeInstance<'_>, Refusal> {
    let found = state.compute_instance(key)?;
    if found.compute.processes.is_empty() { Ok(found) } else { Err(Refusal::InUse) }
}
