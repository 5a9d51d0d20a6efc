//! Waiting for events of GPUs, in whichever process they are caused.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings as nvml;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use crate::driver::Driver;
use crate::refusal::Refusal;
use crate::state::Event;

/// The kinds of events the simulation knows.
pub const KINDS: u64 = (nvml::nvmlEventTypeXidCriticalError
    | nvml::nvmlEventTypeDoubleBitEccError
    | nvml::nvmlEventMigConfigChange) as u64;

/// What a caller of NVML waits for.
#[derive(Debug)]
pub struct EventSet {
    driver: Arc<Driver>,
    /// Tells of every rename in the state's folder.
    watch: OwnedFd,
    waits: Mutex<Waits>,
}

#[derive(Debug, Default)]
struct Waits {
    /// By GPU, what kinds of events and after which number.
    registered: BTreeMap<u32, Registration>,
}

#[derive(Debug, Clone, Copy)]
struct Registration {
    kinds: u64,
    seen: u64,
}

impl EventSet {
    /// An empty set.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] when the state's folder cannot be watched.
    pub fn new(driver: Arc<Driver>) -> Result<Self, Refusal> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(unknown)?;
        inotify::add_watch(&watch, driver.store().folder(), WatchFlags::MOVED_TO).map_err(unknown)?;
        Ok(Self { driver, watch, waits: Mutex::default() })
    }

    /// Also waits for `kinds` of GPU `gpu`, from now on.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when there is no such GPU, [`Refusal::NotSupported`] for other kinds than
    /// [`KINDS`], [`Refusal::GpuIsLost`].
    pub fn register(&self, gpu: u32, kinds: u64) -> Result<(), Refusal> {
        let state = self.driver.state()?;
        state.gpu(gpu)?;
        if kinds & !KINDS != 0 {
            return Err(Refusal::NotSupported);
        }
        let new = Registration { kinds: 0, seen: state.newest_event() };
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).registered.entry(gpu).or_insert(new).kinds |= kinds;
        Ok(())
    }

    /// The next event; waits for it `time` long.
    ///
    /// # Errors
    /// [`Refusal::Timeout`], [`Refusal::Unknown`].
    pub fn wait(&self, time: Duration) -> Result<Event, Refusal> {
        let deadline = Instant::now().checked_add(time);
        loop {
            // First what was told so far, then the state: what happens in between is told again.
            self.forget_what_was_told()?;
            if let Some(event) = self.next()? {
                return Ok(event);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(Refusal::Timeout);
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.watch, PollFlags::IN)], timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(unknown(error)),
            }
        }
    }

    fn next(&self) -> Result<Option<Event>, Refusal> {
        let state = self.driver.state()?;
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        for registration in waits.registered.values_mut() {
            // Numbers that fall: the state file was removed and began anew.
            registration.seen = registration.seen.min(state.newest_event());
        }
        let oldest = waits.registered.values().map(|one| one.seen).min().unwrap_or(u64::MAX);
        for event in state.events_after(oldest) {
            if let Some(registration) = waits.registered.get_mut(&event.gpu)
                && event.number > registration.seen
            {
                registration.seen = event.number;
                if event.kind & registration.kinds != 0 {
                    return Ok(Some(*event));
                }
            }
        }
        Ok(None)
    }

    fn forget_what_was_told(&self) -> Result<(), Refusal> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut told = inotify::Reader::new(&self.watch, &mut buffer);
        loop {
            match told.next() {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) => return Ok(()),
                Err(error) => return Err(unknown(error)),
            }
        }
    }
}

fn unknown(error: Errno) -> Refusal {
    eprintln!("nvml-sim: waiting for events: {error}");
    Refusal::Unknown
}
