//! Standard input, output and error of a worker, without buffers of the library in between.

use rustix::io::Errno;
use std::io;

/// Lines on standard error in the life of a worker; whoever needs more of them has understood.
const MAX_COMPLAINTS: usize = 100;

/// Reads what is there, at least a byte; 0 at the end.
pub(super) fn read(buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(rustix::stdio::stdin(), &mut *buffer) {
            Ok(count) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes all of it.
pub(super) fn write(bytes: &[u8]) -> io::Result<()> {
    write_to(rustix::stdio::stdout(), bytes)
}

fn write_to(fd: std::os::fd::BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Tells the person something on standard error. What a terminal could take for a command is replaced; that
/// nobody listens is no error.
pub(super) fn complain(line: &[u8]) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static COMPLAINTS: AtomicUsize = AtomicUsize::new(0);
    if COMPLAINTS.fetch_add(1, Ordering::Relaxed) >= MAX_COMPLAINTS {
        return;
    }
    let mut line: String =
        String::from_utf8_lossy(line).chars().map(|char| if char.is_control() { '?' } else { char }).collect();
    line.push('\n');
    let _ = write_to(rustix::stdio::stderr(), line.as_bytes());
}
