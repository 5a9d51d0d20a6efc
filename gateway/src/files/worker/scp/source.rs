//! Sending.

use super::{super::WorkerError, MAX_DEPTH, Options, ScpError, file_error, wire::Wire};
use rustix::{
    fs::{Advice, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
};
use std::os::fd::OwnedFd;

/// Bytes read at once.
const CHUNK: usize = 256 * 1024;

/// Sends all of `paths`.
pub(super) fn send(wire: &mut Wire, options: Options, paths: &[Vec<u8>]) -> Result<(), WorkerError> {
    wire.answer()?;
    let mut source = Source { wire, options, chunk: vec![0; CHUNK] };
    paths.iter().try_for_each(|path| source.path(path, 0))
}

struct Source<'a> {
    wire: &'a mut Wire,
    options: Options,
    chunk: Vec<u8>,
}

impl Source<'_> {
    fn path(&mut self, path: &[u8], depth: usize) -> Result<(), WorkerError> {
        match self.try_path(path, depth) {
            Ok(()) => Ok(()),
            Err(ScpError::File(text)) => Ok(self.wire.refuse(&text)?),
            Err(ScpError::Fatal(error)) => Err(error),
        }
    }

    fn try_path(&mut self, path: &[u8], depth: usize) -> Result<(), ScpError> {
        let failed = |error| file_error(path, error);
        let name = name_of(path).ok_or_else(|| failed(Errno::INVAL))?;
        // A pipe must not stop the rest.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let status = rustix::fs::fstat(&file).map_err(failed)?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::RegularFile => self.file(path, name, &file, &status),
            FileType::Directory if self.options.recursive => {
                if depth >= MAX_DEPTH {
                    return Err(failed(Errno::LOOP));
                }
                self.folder(path, name, file, &status, depth)
            }
            _ => Err(ScpError::File(format!("{}: not a regular file", String::from_utf8_lossy(path)))),
        }
    }

    fn file(&mut self, path: &[u8], name: &[u8], file: &OwnedFd, status: &Stat) -> Result<(), ScpError> {
        let size = u64::try_from(status.st_size).unwrap_or(0);
        let _ = rustix::fs::fadvise(file, 0, None, Advice::Sequential);
        if !self.announce(b'C', size, name, status)? {
            return Ok(());
        }
        let mut left = size;
        let mut failure = None;
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let chunk = self.chunk.get_mut(..wanted).unwrap_or_default();
            let count = match failure {
                None => match rustix::io::read(file, &mut *chunk) {
                    // It became shorter while it was read.
                    Ok(0) => Err(Errno::IO),
                    result => result,
                },
                // As many bytes as announced have to follow, whatever they are.
                Some(_) => {
                    chunk.fill(0);
                    Ok(wanted)
                }
            };
            match count {
                Ok(count) => {
                    self.wire.put(self.chunk.get(..count).unwrap_or_default())?;
                    left -= count as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            None => self.wire.accept()?,
            Some(error) => {
                if let ScpError::File(text) = file_error(path, error) {
                    self.wire.refuse(&text)?;
                }
            }
        }
        self.wire.answer()?;
        Ok(())
    }

    fn folder(
        &mut self,
        path: &[u8],
        name: &[u8],
        folder: OwnedFd,
        status: &Stat,
        depth: usize,
    ) -> Result<(), ScpError> {
        let entries = Dir::new(folder).map_err(|error| file_error(path, error))?;
        if !self.announce(b'D', 0, name, status)? {
            return Ok(());
        }
        // One after the other: there may be more than memory holds.
        for entry in entries {
            match entry {
                Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
                Ok(entry) => self.path(&[path, b"/", entry.file_name().to_bytes()].concat(), depth + 1)?,
                Err(error) => {
                    if let ScpError::File(text) = file_error(path, error) {
                        self.wire.refuse(&text)?;
                    }
                    break;
                }
            }
        }
        self.wire.put(b"E\n")?;
        self.wire.answer()?;
        Ok(())
    }

    /// The line that opens a file or folder; whether the other side wants it.
    fn announce(&mut self, kind: u8, size: u64, name: &[u8], status: &Stat) -> Result<bool, WorkerError> {
        if self.options.preserve {
            let seconds = |time: i64| time.clamp(0, u32::MAX.into());
            self.wire.put(format!("T{} 0 {} 0\n", seconds(status.st_mtime), seconds(status.st_atime)).as_bytes())?;
            if !self.wire.answer()? {
                return Ok(false);
            }
        }
        let mode = status.st_mode & 0o7777;
        let line = [&[kind][..], format!("{mode:04o} {size} ").as_bytes(), name, b"\n"].concat();
        self.wire.put(&line)?;
        self.wire.answer()
    }
}

/// The last component of a path; none if it cannot stand in a line.
fn name_of(path: &[u8]) -> Option<&[u8]> {
    let end = path.iter().rposition(|byte| *byte != b'/')? + 1;
    let path = path.get(..end)?;
    let name = path.rsplit(|byte| *byte == b'/').next()?;
    (!name.contains(&b'\n')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::name_of;

    #[test]
    fn the_last_component_is_the_name() {
        assert_eq!(name_of(b"/a/b//"), Some(&b"b"[..]));
        assert_eq!(name_of(b"b"), Some(&b"b"[..]));
        assert_eq!(name_of(b"/"), None);
        assert_eq!(name_of(b""), None);
        assert_eq!(name_of(b"a\nb"), None);
    }
}
