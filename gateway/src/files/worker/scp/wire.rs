//! The two ends of the connection of an `scp`.

use super::super::{WorkerError, output};
use std::io;

/// Bytes read at once.
const BUFFER: usize = 512 * 1024;
/// Bytes of a line: a name, and some numbers.
const MAX_LINE: usize = 8 * 1024;

/// Standard input, buffered, and output.
pub(super) struct Wire {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Files that could not be copied.
    pub(super) failures: usize,
}

impl Wire {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; BUFFER], start: 0, end: 0, failures: 0 }
    }

    /// At most `limit` bytes; none at the end.
    pub(super) fn some(&mut self, limit: u64) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.start = 0;
            self.end = output::read(&mut self.buffer)?;
        }
        let count = usize::try_from(limit).unwrap_or(usize::MAX).min(self.end - self.start);
        let start = self.start;
        self.start += count;
        Ok(self.buffer.get(start..start + count).unwrap_or_default())
    }

    /// The next line without its end, or `None` at the end of the connection.
    pub(super) fn line(&mut self) -> Result<Option<Vec<u8>>, WorkerError> {
        let mut line = Vec::new();
        loop {
            match *self.some(1)? {
                [] if line.is_empty() => return Ok(None),
                [] => return Err(lost()),
                [b'\n', ..] => return Ok(Some(line)),
                [byte, ..] if line.len() < MAX_LINE => line.push(byte),
                _ => return Err(WorkerError::Protocol(format!("a line of more than {MAX_LINE} bytes"))),
            }
        }
    }

    /// The other side's answer: whether it goes on with this file.
    pub(super) fn answer(&mut self) -> Result<bool, WorkerError> {
        match *self.some(1)? {
            [] => Err(lost()),
            [0, ..] => Ok(true),
            [kind, ..] => {
                let text = self.line()?.unwrap_or_default();
                self.failures += 1;
                // The person sees it at the other side.
                if kind == 1 { Ok(false) } else { Err(WorkerError::Protocol(String::from_utf8_lossy(&text).into())) }
            }
        }
    }

    pub(super) fn put(&self, bytes: &[u8]) -> io::Result<()> {
        output::write(bytes)
    }

    /// Says yes.
    pub(super) fn accept(&self) -> io::Result<()> {
        self.put(&[0])
    }

    /// Says why not; the rest can go on.
    pub(super) fn refuse(&mut self, text: &str) -> io::Result<()> {
        self.failures += 1;
        self.complain(1, text)
    }

    /// Says why nothing can go on.
    pub(super) fn fatal(&mut self, text: &str) -> io::Result<()> {
        self.complain(2, text)
    }

    fn complain(&self, kind: u8, text: &str) -> io::Result<()> {
        let text: String = text.chars().map(|char| if char.is_control() { '?' } else { char }).collect();
        self.put(&[&[kind][..], b"scp: ", text.as_bytes(), b"\n"].concat())
    }
}

pub(super) fn lost() -> WorkerError {
    WorkerError::Connection(io::Error::new(io::ErrorKind::UnexpectedEof, "closed in the middle of a file"))
}
