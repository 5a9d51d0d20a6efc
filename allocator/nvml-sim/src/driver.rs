//! The driver: what NVML's calls come to, on the machine in the state file.

use std::sync::{Arc, PoisonError, RwLock};

use crate::SimError;
use crate::machine::Machine;
use crate::refusal::Refusal;
use crate::state::{Destroy, State};
use crate::store::Store;

/// The driver of one machine.
#[derive(Debug)]
pub struct Driver {
    store: Store,
    /// The last trouble that was printed, so that it is not printed with every call.
    printed: RwLock<String>,
}

impl Driver {
    /// Starts the driver of `machine`.
    ///
    /// # Errors
    /// [`SimError::State`].
    pub fn start(machine: Machine) -> Result<Self, SimError> {
        Ok(Self { store: Store::open(machine)?, printed: RwLock::default() })
    }

    /// The machine's description.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        self.store.machine()
    }

    /// Where the state is kept.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The state now.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] when it cannot be read; why is printed.
    pub fn state(&self) -> Result<Arc<State>, Refusal> {
        self.store.read().map_err(|error| self.print(&error))
    }

    /// Changes the state.
    ///
    /// # Errors
    /// Those of `change`; [`Refusal::Unknown`] when the state cannot be read or written; why is printed.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T, Refusal>) -> Result<T, Refusal> {
        self.store.change(change).map_err(|error| self.print(&error))?
    }

    /// Destroys a GPU instance. A slow one holds up nobody else.
    ///
    /// # Errors
    /// As [`State::begin_destroy_gpu_instance`].
    pub fn destroy_gpu_instance(&self, key: u64) -> Result<(), Refusal> {
        match self.change(|state| state.begin_destroy_gpu_instance(key))? {
            Destroy::Done => Ok(()),
            Destroy::After(time) => {
                std::thread::sleep(time);
                self.change(|state| state.finish_destroy_gpu_instance(key))
            }
        }
    }

    /// Destroys a compute instance. A slow one holds up nobody else.
    ///
    /// # Errors
    /// As [`State::begin_destroy_compute_instance`].
    pub fn destroy_compute_instance(&self, key: u64) -> Result<(), Refusal> {
        match self.change(|state| state.begin_destroy_compute_instance(key))? {
            Destroy::Done => Ok(()),
            Destroy::After(time) => {
                std::thread::sleep(time);
                self.change(|state| state.finish_destroy_compute_instance(key))
            }
        }
    }

    /// NVML has only numbers for errors; what lies behind this one goes to standard error.
    fn print(&self, error: &SimError) -> Refusal {
        let text = error.to_string();
        let mut printed = self.printed.write().unwrap_or_else(PoisonError::into_inner);
        if *printed != text {
            eprintln!("nvml-sim: {text}");
            *printed = text;
        }
        Refusal::Unknown
    }
}
