//! Receiving.

use super::{
    super::{WorkerError, confine::MASK, output},
    MAX_DEPTH, Options, ScpError, file_error,
    wire::{Wire, lost},
};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps},
    io::Errno,
};

/// Receives into the one target of `paths`.
pub(super) fn receive(wire: &mut Wire, options: Options, paths: &[Vec<u8>]) -> Result<(), WorkerError> {
    let [target] = paths else {
        return Err(WorkerError::Usage("there must be exactly one target".into()));
    };
    let target = if target.is_empty() { b"." } else { target.as_slice() };
    if options.folder && !is_folder(target) {
        return Err(WorkerError::Usage(format!("{}: Not a directory", String::from_utf8_lossy(target))));
    }
    Sink { wire, options }.folder(target, 0)
}

struct Sink<'a> {
    wire: &'a mut Wire,
    options: Options,
}

/// A line of the protocol.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// `T`: times of the next file or folder: last change and last access.
    Times(i64, i64),
    /// `C`: a file.
    File(Entry),
    /// `D`: a folder; what is in it follows.
    Folder(Entry),
    /// `E`: its end.
    End,
    /// The other side could not read something.
    Failure { fatal: bool },
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    mode: u32,
    size: u64,
    name: Vec<u8>,
}

impl Sink<'_> {
    /// What comes up to the end of a folder, or of the connection.
    fn folder(&mut self, target: &[u8], depth: usize) -> Result<(), WorkerError> {
        self.wire.accept()?;
        let mut times = None;
        while let Some(line) = self.wire.line()? {
            let result = match parse(&line).map_err(|reason| WorkerError::Protocol(reason.into()))? {
                Line::Failure { fatal: true } => return Err(WorkerError::Protocol("the sender gave up".into())),
                Line::Failure { fatal: false } => {
                    self.wire.failures += 1;
                    continue;
                }
                Line::End if depth == 0 => return Err(WorkerError::Protocol("the end of no folder".into())),
                Line::End => return Ok(self.wire.accept()?),
                Line::Times(change, access) => {
                    times = Some(timestamps(change, access));
                    self.wire.accept()?;
                    continue;
                }
                Line::Folder(_) if !self.options.recursive => {
                    return Err(WorkerError::Protocol("a folder without -r".into()));
                }
                Line::Folder(entry) => self.receive_folder(&place(target, &entry.name), &entry, times.take(), depth),
                Line::File(entry) => self.receive_file(&place(target, &entry.name), &entry, times.take()),
            };
            match result {
                Ok(()) => {}
                Err(ScpError::File(text)) => self.wire.refuse(&text)?,
                Err(ScpError::Fatal(error)) => return Err(error),
            }
        }
        if depth == 0 { Ok(()) } else { Err(lost()) }
    }

    fn receive_folder(
        &mut self,
        path: &[u8],
        entry: &Entry,
        times: Option<Timestamps>,
        depth: usize,
    ) -> Result<(), ScpError> {
        if depth >= MAX_DEPTH {
            return Err(WorkerError::Protocol(format!("more than {MAX_DEPTH} folders inside one another")).into());
        }
        let made = match rustix::fs::stat(path) {
            Ok(status) if !FileType::from_raw_mode(status.st_mode).is_dir() => {
                return Err(file_error(path, Errno::NOTDIR));
            }
            Ok(_) => false,
            // The owner may write until it is complete.
            Err(_) => {
                rustix::fs::mkdir(path, Mode::from_raw_mode(entry.mode | 0o700))
                    .map_err(|error| file_error(path, error))?;
                true
            }
        };
        self.folder(path, depth + 1)?;
        let finished = if made || self.options.preserve {
            rustix::fs::chmod(path, Mode::from_raw_mode(self.mode(entry)))
        } else {
            Ok(())
        };
        let times = times.map_or(Ok(()), |times| rustix::fs::utimensat(CWD, path, &times, AtFlags::empty()));
        if let Err(ScpError::File(text)) = finished.and(times).map_err(|error| file_error(path, error)) {
            // The folder's end has been answered already, and another answer would be taken for the next one's.
            self.wire.failures += 1;
            output::complain(format!("scp: {text}").as_bytes());
        }
        Ok(())
    }

    /// An existing file is overwritten in place and keeps its mode unless `-p` says otherwise, as with OpenSSH. What
    /// comes is read to its end even if it
    /// cannot be written, so that the next file is understood.
    fn receive_file(&mut self, path: &[u8], entry: &Entry, times: Option<Timestamps>) -> Result<(), ScpError> {
        let made = rustix::fs::stat(path).is_err();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::from_raw_mode(entry.mode | 0o200))
            .map_err(|error| file_error(path, error))?;
        let status = rustix::fs::fstat(&file).map_err(|error| file_error(path, error))?;
        if !FileType::from_raw_mode(status.st_mode).is_file() {
            return Err(file_error(path, Errno::NXIO));
        }
        self.wire.accept()?;
        let mut written = Ok(());
        let mut left = entry.size;
        while left > 0 {
            let mut bytes = self.wire.some(left)?;
            if bytes.is_empty() {
                return Err(lost().into());
            }
            left -= bytes.len() as u64;
            while written.is_ok() && !bytes.is_empty() {
                match rustix::io::write(&file, bytes) {
                    Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                    Err(Errno::INTR) => {}
                    Err(error) => written = Err(error),
                }
            }
        }
        let finished = written.and_then(|()| {
            rustix::fs::ftruncate(&file, entry.size)?;
            if made || self.options.preserve {
                rustix::fs::fchmod(&file, Mode::from_raw_mode(self.mode(entry)))?;
            }
            if let Some(times) = &times {
                rustix::fs::futimens(&file, times)?;
            }
            // On network file systems this is where a write may fail.
            nix::unistd::close(file).map_err(|error| Errno::from_raw_os_error(error as i32))
        });
        // Whether the sender could read all of it.
        self.wire.answer()?;
        finished.map_err(|error| file_error(path, error))?;
        Ok(self.wire.accept()?)
    }

    /// The mode that is asked for: only `-p` means it to the letter.
    fn mode(&self, entry: &Entry) -> u32 {
        if self.options.preserve { entry.mode } else { entry.mode & !MASK }
    }
}

fn is_folder(path: &[u8]) -> bool {
    rustix::fs::stat(path).is_ok_and(|status| FileType::from_raw_mode(status.st_mode).is_dir())
}

/// Where a thing of this name goes: into the target if that is a folder.
fn place(target: &[u8], name: &[u8]) -> Vec<u8> {
    if is_folder(target) { [target, b"/", name].concat() } else { target.to_vec() }
}

fn timestamps(change: i64, access: i64) -> Timestamps {
    let at = |seconds| Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: at(access), last_modification: at(change) }
}

fn parse(line: &[u8]) -> Result<Line, &'static str> {
    let (kind, rest) = line.split_first().ok_or("an empty line")?;
    match kind {
        1 | 2 => Ok(Line::Failure { fatal: *kind == 2 }),
        b'E' if rest.is_empty() => Ok(Line::End),
        b'T' => parse_times(rest).ok_or("times that are no numbers"),
        b'C' => parse_entry(rest).map(Line::File),
        b'D' => parse_entry(rest).map(Line::Folder),
        _ => Err("a line of an unknown kind"),
    }
}

fn parse_times(rest: &[u8]) -> Option<Line> {
    let mut numbers = std::str::from_utf8(rest).ok()?.split(' ').map(|number| number.parse::<u32>().ok());
    let (change, _, access, _) = (numbers.next()??, numbers.next()??, numbers.next()??, numbers.next()??);
    numbers.next().is_none().then_some(Line::Times(change.into(), access.into()))
}

fn parse_entry(rest: &[u8]) -> Result<Entry, &'static str> {
    let mut fields = rest.splitn(3, |byte| *byte == b' ');
    let mut next = || fields.next().unwrap_or_default();
    let (mode, size, name) = (next(), next(), next());
    let digits = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit());
    let mode = std::str::from_utf8(mode).ok().filter(|mode| mode.len() == 4).filter(digits);
    let mode = mode.and_then(|mode| u32::from_str_radix(mode, 8).ok()).ok_or("a mode that is not four octal digits")?;
    let size = std::str::from_utf8(size).ok().filter(digits);
    let size = size
        .and_then(|size| size.parse().ok())
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or("a size that is no number")?;
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err("a name that is not that of a file");
    }
    Ok(Entry { mode, size, name: name.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_understood() {
        let entry = |mode, size, name: &[u8]| Entry { mode, size, name: name.to_vec() };
        assert_eq!(parse(b"C0644 12 a b"), Ok(Line::File(entry(0o644, 12, b"a b"))));
        assert_eq!(parse(b"D0755 0 \xff"), Ok(Line::Folder(entry(0o755, 0, b"\xff"))));
        assert_eq!(parse(b"T1700000000 0 1700000001 0"), Ok(Line::Times(1_700_000_000, 1_700_000_001)));
        assert_eq!(parse(b"E"), Ok(Line::End));
        assert_eq!(parse(b"\x01scp: no"), Ok(Line::Failure { fatal: false }));
    }

    #[test]
    fn names_and_numbers_are_checked() {
        for bad in [
            &b""[..],
            b"C0644 12",
            b"C0644 12 ",
            b"C0644 12 ..",
            b"C0644 12 .",
            b"C0644 12 a/b",
            b"C0644 12 /etc/passwd",
            b"C644 12 a",
            b"C06444 12 a",
            b"C0844 12 a",
            b"C+644 12 a",
            b"C0644 -1 a",
            b"C0644 +1 a",
            b"C0644  a",
            b"C0644 18446744073709551615 a",
            b"C0644 1 a\0b",
            b"Ex",
            b"T1 2 3",
            b"T1 2 3 4 5",
            b"T-1 0 0 0",
            b"X",
        ] {
            assert!(parse(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    proptest! {
        #[test]
        fn no_name_leaves_its_folder(line in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(Line::File(entry) | Line::Folder(entry)) = parse(&[b"C0644 1 ", line.as_slice()].concat()) {
                prop_assert!(!entry.name.contains(&b'/') && entry.name != b".." && entry.name != b".");
            }
            let _ = parse(&line);
        }
    }
}
