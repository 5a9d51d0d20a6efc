//! The GPUs of this machine: what is on them, and changing it.
//!
//! [`Driver`] is what a driver can do, [`NvmlDriver`] the one there is. [`Node`] owns it: one thread for each
//! GPU does all calls for that GPU in order, so that a slow one keeps no other waiting, and one thread
//! watches for events and GPUs that come and go. Who may hold what is not decided here.

mod clear;
mod driver;
mod nvml;
mod supervisor;
mod thread;
mod worker;
mod xid;

pub use driver::NvmlDriver;
pub use worker::{Change, Failure, Node, Order, Report, Stage};
pub(crate) use xid::trouble;

use crate::geometry::Model;
use mlad::api::Placement;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How often everything is read anew though no event came: GPUs and nodes come and go without one.
pub const REFRESH: Duration = Duration::from_secs(60);

/// What a driver can do. Calls block; those of one GPU never overlap.
pub trait Driver: Send + Sync + 'static {
    /// The GPUs there are.
    ///
    /// # Errors
    /// When the driver does not answer at all.
    fn list(&self) -> Result<Vec<Listed>, DriverError>;

    /// What one GPU is and what is on it.
    ///
    /// # Errors
    /// [`DriverError::Lost`] when it fell off the bus.
    fn read(&self, gpu: &str) -> Result<Reading, DriverError>;

    /// The processes that use it or anything on it.
    ///
    /// # Errors
    /// [`DriverError::Lost`] when it fell off the bus.
    fn users(&self, gpu: &str) -> Result<Vec<u32>, DriverError>;

    /// Makes an instance at a place, whole: GPU instance and the compute instance that fills it. What was
    /// made half is taken back.
    ///
    /// # Errors
    /// [`DriverError::NoRoom`] when something lies there.
    fn create(&self, gpu: &str, profile: u32, placement: Placement) -> Result<(), DriverError>;

    /// Gives a GPU instance the compute instance it lacks.
    ///
    /// # Errors
    /// [`DriverError::NoRoom`] when it has one.
    fn complete(&self, gpu: &str, instance: u32) -> Result<(), DriverError>;

    /// Destroys an instance, compute instances first. Can be repeated where it stopped half-way.
    ///
    /// # Errors
    /// [`DriverError::InUse`] when a process uses it.
    fn destroy(&self, gpu: &str, instance: u32) -> Result<(), DriverError>;

    /// Waits for events until `deadline` or until `stopped`, and hands each to `event`: first, once nothing can
    /// be missed any more, [`Event::Watching`].
    ///
    /// # Errors
    /// When the driver has no events, or has none any more; the caller waits in another way.
    fn watch(
        &self,
        deadline: Instant,
        stopped: &dyn Fn() -> bool,
        event: &mut dyn FnMut(Event),
    ) -> Result<(), DriverError>;
}

/// A GPU in the driver's list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// The driver's index.
    pub index: u32,
    /// Its UUID, or why it cannot be told.
    pub uuid: Result<String, DriverError>,
}

/// What one GPU is and what is on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The driver's index.
    pub index: u32,
    /// Its UUID.
    pub uuid: String,
    /// What it can be cut into now.
    pub model: Model,
    /// The instances on it. One without MIG has itself as its only one, for good.
    pub instances: Vec<Instance>,
}

/// An instance that exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The driver's number of the GPU instance.
    pub id: u32,
    /// The driver's number of its profile.
    pub profile: u32,
    /// Where it lies.
    pub placement: Placement,
    /// What of it a container can be given.
    pub device: Device,
    /// Processes that use it.
    pub processes: u32,
}

/// What of an instance a container can be given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// All of it, under this UUID.
    Whole(String),
    /// Nothing: it has no compute instance.
    Missing,
    /// Somebody cut it into several compute instances by hand.
    Split,
}

/// Something that happened to a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// From here on everything that happens is told; what was before has to be read now.
    Watching,
    /// Its MIG instances or its mode changed.
    Changed(String),
    /// A fatal error with this XID.
    Xid {
        /// The GPU's UUID.
        gpu: String,
        /// NVIDIA's number of the error, if it is known.
        xid: Option<u64>,
    },
}

/// Why a driver did not do a thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum DriverError {
    /// There is no driver, or it does not run.
    #[error("no NVIDIA driver answers: {0}")]
    Absent(String),
    /// The GPU fell off the bus or needs a reset.
    #[error("the GPU does not answer: {0}")]
    Lost(String),
    /// A process uses it.
    #[error("a process still uses it")]
    InUse,
    /// Something lies there already, or the GPU has not enough left.
    #[error("the driver has no room for it there")]
    NoRoom,
    /// We may not.
    #[error("the driver does not allow it (MLAD has to run as root)")]
    Denied,
    /// There is no such thing any more.
    #[error("it is not there any more")]
    NotFound,
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
pub(crate) mod puppet;

#[cfg(test)]
mod tests;
