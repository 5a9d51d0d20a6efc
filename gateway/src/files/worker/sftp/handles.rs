//! Open files and folders.

use rustix::{fs::Dir, io::Errno};
use std::os::fd::OwnedFd;

/// Open at once.
pub(super) const MAX_HANDLES: usize = 1024;

/// Something open.
pub(super) enum Open {
    File(OpenFile),
    Folder(Dir),
}

/// An open file.
pub(super) struct OpenFile {
    pub(super) file: OwnedFd,
    /// How it was called when it was opened, for messages.
    pub(super) path: Vec<u8>,
    /// Whether the person has been told why writing fails.
    pub(super) complained: bool,
}

/// The table of what is open. A handle is a place in it and how often the place was taken, so that one that
/// was closed is never taken for another.
#[derive(Default)]
pub(super) struct Handles {
    places: Vec<Place>,
    free: Vec<usize>,
}

#[derive(Default)]
struct Place {
    taken: u32,
    open: Option<Open>,
}

impl Handles {
    /// Whether there is room for another.
    pub(super) fn check_room(&self) -> Result<(), Errno> {
        if self.free.is_empty() && self.places.len() >= MAX_HANDLES { Err(Errno::MFILE) } else { Ok(()) }
    }

    pub(super) fn add(&mut self, open: Open) -> Result<[u8; 8], Errno> {
        self.check_room()?;
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::default());
            self.places.len() - 1
        });
        let place = self.places.get_mut(index).ok_or(Errno::MFILE)?;
        place.taken = place.taken.wrapping_add(1);
        place.open = Some(open);
        let (index, taken) = (u32::try_from(index).map_err(|_| Errno::MFILE)?, place.taken);
        Ok(((u64::from(index) << 32) | u64::from(taken)).to_be_bytes())
    }

    pub(super) fn remove(&mut self, handle: &[u8]) -> Option<Open> {
        let index = index_of(handle)?;
        let open = self.place(handle)?.open.take()?;
        self.free.push(index);
        Some(open)
    }

    pub(super) fn file(&mut self, handle: &[u8]) -> Option<&mut OpenFile> {
        match self.place(handle)?.open.as_mut()? {
            Open::File(file) => Some(file),
            Open::Folder(_) => None,
        }
    }

    pub(super) fn folder(&mut self, handle: &[u8]) -> Option<&mut Dir> {
        match self.place(handle)?.open.as_mut()? {
            Open::Folder(folder) => Some(folder),
            Open::File(_) => None,
        }
    }

    pub(super) fn any(&mut self, handle: &[u8]) -> Option<&mut Open> {
        self.place(handle)?.open.as_mut()
    }

    fn place(&mut self, handle: &[u8]) -> Option<&mut Place> {
        let taken = u32::from_be_bytes(*handle.last_chunk()?);
        self.places.get_mut(index_of(handle)?).filter(|place| place.taken == taken)
    }
}

fn index_of(handle: &[u8]) -> Option<usize> {
    let handle: [u8; 8] = handle.try_into().ok()?;
    usize::try_from(u64::from_be_bytes(handle) >> 32).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> Open {
        let folder = rustix::fs::open("/", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        Open::Folder(Dir::new(folder).unwrap())
    }

    #[test]
    fn a_closed_handle_is_never_another_one() {
        let mut handles = Handles::default();
        let first = handles.add(folder()).unwrap();
        assert!(handles.folder(&first).is_some() && handles.file(&first).is_none());
        assert!(handles.remove(&first).is_some());
        let second = handles.add(folder()).unwrap();
        assert_ne!(first, second);
        assert!(handles.remove(&first).is_none() && handles.any(&first).is_none());
        assert!(handles.any(&second).is_some());
        for garbage in [&b""[..], b"12345678", &[0; 8], &[0xff; 8], &[0; 9]] {
            assert!(handles.any(garbage).is_none());
        }
    }

    #[test]
    fn handles_are_bounded() {
        let mut handles = Handles::default();
        let all: Vec<_> = std::iter::from_fn(|| handles.add(folder()).ok()).take(MAX_HANDLES + 1).collect();
        assert_eq!(all.len(), MAX_HANDLES);
        handles.remove(&all[5]).unwrap();
        assert!(handles.add(folder()).is_ok());
    }
}
