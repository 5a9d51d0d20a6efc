//! Faults on demand.

use nvml_wrapper_sys::bindings as nvml;
use serde::{Deserialize, Serialize};

use super::{State, XID_FALLEN_OFF_THE_BUS};

/// How long a slow destroy takes unless the fault says otherwise.
const SLOW_DESTROY_MILLISECONDS: u64 = 1000;
/// No destroy takes longer.
const MAX_MILLISECONDS: u64 = 60_000;

/// Something that is to go wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What.
    pub kind: FaultKind,
    /// On which GPU; none for whichever comes first.
    pub gpu: Option<u32>,
    /// To which kind of instance; none for both.
    pub on: Option<InstanceKind>,
    /// How often; none for once, or for [`FaultKind::SlowDestroy`] until it is cleared.
    pub times: Option<u32>,
    /// How long a slow destroy takes; none for a second.
    pub milliseconds: Option<u64>,
}

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// An instance that could be destroyed is "in use" and stays.
    DestroyInUse,
    /// A destroy stops half-way: the compute instance goes, its GPU instance is "in use" and stays.
    GpuInstanceLeft,
    /// An instance that could be created is refused.
    InsufficientResources,
    /// A destroy takes its time. Only its caller waits.
    SlowDestroy,
    /// The GPU falls off the bus until it is reset.
    Lost,
}

/// What a fault befalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceKind {
    /// GPU instances.
    GpuInstance,
    /// Compute instances.
    ComputeInstance,
}

impl Fault {
    /// Whether it makes sense on a machine of `gpus` GPUs.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, gpus: usize) -> Result<(), String> {
        let Self { kind, gpu, on, times, milliseconds } = self;
        if let Some(gpu) = gpu.filter(|&gpu| usize::try_from(gpu).is_ok_and(|gpu| gpu >= gpus)) {
            return Err(format!("a fault on GPU {gpu}: the machine has {gpus} GPUs"));
        }
        if *times == Some(0) {
            return Err("a fault that happens 0 times: leave it out".to_owned());
        }
        if milliseconds.is_some_and(|time| *kind != FaultKind::SlowDestroy || time > MAX_MILLISECONDS) {
            return Err(format!("milliseconds are for slow-destroy, and at most {MAX_MILLISECONDS}"));
        }
        match kind {
            FaultKind::Lost if gpu.is_none() => Err("lost: say which gpu".to_owned()),
            FaultKind::Lost if on.is_some() || times.is_some() => {
                Err("lost befalls a gpu, until it is reset: no on, no times".to_owned())
            }
            FaultKind::GpuInstanceLeft if on.is_some() => {
                Err("gpu-instance-left befalls GPU instances: no on".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn befalls(&self, kind: FaultKind, gpu: u32, on: InstanceKind) -> bool {
        self.kind == kind && self.gpu.is_none_or(|its| its == gpu) && self.on.is_none_or(|its| its == on)
    }
}

impl State {
    /// Lays a fault (which was checked) for later; a GPU is lost at once.
    pub fn lay(&mut self, mut fault: Fault) {
        match (fault.kind, fault.gpu) {
            (FaultKind::Lost, Some(gpu)) => self.lose(gpu),
            (FaultKind::Lost, None) => {}
            (FaultKind::SlowDestroy, _) => self.faults.push(fault),
            _ => {
                fault.times = fault.times.or(Some(1));
                self.faults.push(fault);
            }
        }
    }

    /// Clears the faults laid, of one GPU or of all. A lost GPU needs a reset.
    pub fn clear_faults(&mut self, gpu: Option<u32>) {
        self.faults.retain(|fault| gpu.is_some() && fault.gpu != gpu);
    }

    /// Uses up one fault of this kind, if one is laid.
    pub(super) fn take_fault(&mut self, kind: FaultKind, gpu: u32, on: InstanceKind) -> bool {
        self.take(kind, gpu, on).is_some()
    }

    /// Uses up one slow destroy, if one is laid. How long it takes.
    pub(super) fn take_delay(&mut self, gpu: u32, on: InstanceKind) -> Option<std::time::Duration> {
        let fault = self.take(FaultKind::SlowDestroy, gpu, on)?;
        Some(std::time::Duration::from_millis(fault.milliseconds.unwrap_or(SLOW_DESTROY_MILLISECONDS)))
    }

    fn take(&mut self, kind: FaultKind, gpu: u32, on: InstanceKind) -> Option<Fault> {
        let at = self.faults.iter().position(|fault| fault.befalls(kind, gpu, on))?;
        let fault = self.faults.get_mut(at)?;
        let taken = fault.clone();
        if let Some(times) = &mut fault.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                self.faults.remove(at);
            }
        }
        Some(taken)
    }

    fn lose(&mut self, index: u32) {
        if let Ok(gpu) = self.gpu_mut(index)
            && !gpu.lost
        {
            gpu.lost = true;
            self.tell(index, nvml::nvmlEventTypeXidCriticalError, XID_FALLEN_OFF_THE_BUS, None);
        }
    }
}
