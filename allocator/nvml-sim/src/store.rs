//! The state file: one machine, seen by every process that loads the library.
//!
//! Written whole beside itself and renamed into place, so that a process killed at any point leaves the old
//! state or the new one. Writers take turns by a lock on a file beside it; readers need none.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::SimError;
use crate::machine::Machine;
use crate::state::State;

/// Bytes of a state file; a whole one has less than 64 KiB.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The state of one machine, on disk.
#[derive(Debug)]
pub struct Store {
    machine: Machine,
    path: PathBuf,
    /// The file last read, kept open: as long as it is, no other file can have its inode number, so that
    /// equal numbers mean an equal file.
    cache: Mutex<Option<Cached>>,
}

#[derive(Debug)]
struct Cached {
    file: File,
    state: Arc<State>,
}

impl Store {
    /// The state of `machine`: made if there is none yet, and brought to agree with the description.
    ///
    /// # Errors
    /// [`SimError::State`] when the file cannot be read or written, or is not a state.
    pub fn open(machine: Machine) -> Result<Self, SimError> {
        let path = machine.state.clone();
        let store = Self { machine, path, cache: Mutex::new(None) };
        store.change(|state| state.agree_with(&store.machine))?;
        Ok(store)
    }

    /// The machine's description.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The folder in which a new state appears by a rename.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        match self.path.parent() {
            Some(folder) if folder != Path::new("") => folder.to_owned(),
            _ => PathBuf::from("."),
        }
    }

    /// The state now.
    ///
    /// # Errors
    /// [`SimError::State`].
    pub fn read(&self) -> Result<Arc<State>, SimError> {
        match self.read_if_there()? {
            Some(state) => Ok(state),
            // Somebody removed it: the machine starts for the first time again.
            None => self.change(|_| ()).and_then(|()| self.read_if_there()?.ok_or_else(|| self.vanished())),
        }
    }

    /// Changes the state; nobody else does meanwhile. Saved before it returns, if it changed.
    ///
    /// # Errors
    /// [`SimError::State`]; then nothing has changed.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, SimError> {
        let _turn = self.lock().map_err(|error| self.wrong(&error))?;
        let before = self.read_if_there()?;
        let mut state = before.as_deref().cloned().unwrap_or_else(|| State::first_start(&self.machine));
        let answer = change(&mut state);
        if before.as_deref() != Some(&state) {
            self.write(&state).map_err(|error| self.wrong(&error))?;
        }
        Ok(answer)
    }

    fn read_if_there(&self) -> Result<Option<Arc<State>>, SimError> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let now = match fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.wrong(&error)),
        };
        if let Some(Cached { file, state }) = cache.as_ref() {
            let read = file.metadata().map_err(|error| self.wrong(&error))?;
            if (read.dev(), read.ino()) == (now.dev(), now.ino()) {
                return Ok(Some(Arc::clone(state)));
            }
        }
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.wrong(&error)),
        };
        let state = Arc::new(self.parse(&file)?);
        *cache = Some(Cached { file, state: Arc::clone(&state) });
        Ok(Some(state))
    }

    fn parse(&self, file: &File) -> Result<State, SimError> {
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(file, MAX_FILE_BYTES), &mut text)
            .map_err(|error| self.wrong(&error))?;
        let state: State = serde_json::from_str(&text).map_err(|error| self.wrong(&error))?;
        state.check().map_err(|reason| self.wrong(&reason))?;
        Ok(state)
    }

    fn lock(&self) -> io::Result<File> {
        let file = File::options().create(true).truncate(false).write(true).open(self.beside(".lock"))?;
        file.lock()?;
        Ok(file)
    }

    /// To be called with the lock held.
    fn write(&self, state: &State) -> io::Result<()> {
        let new = self.beside(".new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(state)?)?;
        // Without this a crash of the host could leave the new name with no content.
        file.sync_all()?;
        fs::rename(&new, &self.path)
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(ending);
        path.into()
    }

    fn wrong(&self, reason: &dyn std::fmt::Display) -> SimError {
        SimError::State { path: self.path.clone(), reason: reason.to_string() }
    }

    fn vanished(&self) -> SimError {
        self.wrong(&"it is removed again and again")
    }
}
