//! Replies: gathered in one buffer and sent together.

use super::super::output;
use rustix::io::Errno;
use std::io;

/// Bytes gathered before they are sent at the latest.
const BUFFER: usize = 1 << 20;
/// Bytes of the largest reply, with some room: data of a read.
const MAX_REPLY: usize = super::packet::MAX_PACKET + 1024;

const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED_REPLY: u8 = 201;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    Eof = 1,
    NoSuchFile = 2,
    PermissionDenied = 3,
    Failure = 4,
    BadMessage = 5,
    OpUnsupported = 8,
}

impl Status {
    /// That of an error of the system, as OpenSSH maps them (a read-only file system is a denial here).
    pub(super) fn of(error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::NOTDIR | Errno::BADF | Errno::LOOP => Self::NoSuchFile,
            Errno::PERM | Errno::ACCESS | Errno::FAULT | Errno::ROFS => Self::PermissionDenied,
            Errno::NAMETOOLONG | Errno::INVAL => Self::BadMessage,
            Errno::NOSYS => Self::OpUnsupported,
            _ => Self::Failure,
        }
    }
}

/// The text of an error of the system: `No space left on device`.
pub(super) fn text_of(error: Errno) -> String {
    let text = io::Error::from(error).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// Replies that have not been sent yet.
pub(super) struct Replies {
    /// Of constant length, so that what is read from files needs no clearing first.
    buffer: Vec<u8>,
    end: usize,
}

impl Replies {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; BUFFER], end: 0 }
    }

    /// Sends all.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let end = std::mem::take(&mut self.end);
        output::write(self.buffer.get(..end).unwrap_or_default())
    }

    /// Sends all if there is no room for another reply.
    pub(super) fn make_room(&mut self) -> io::Result<()> {
        if self.buffer.len().saturating_sub(self.end) < MAX_REPLY { self.flush() } else { Ok(()) }
    }

    pub(super) fn version(&mut self) {
        self.packet(2, super::packet::VERSION, |reply| {
            for (name, version) in super::packet::EXTENSIONS {
                reply.string(name);
                reply.string(version);
            }
        });
    }

    pub(super) fn status(&mut self, id: u32, status: Status, text: &str) {
        self.packet(STATUS, id, |reply| {
            reply.put(&(status as u32).to_be_bytes());
            reply.string(text.as_bytes());
            reply.string(b"");
        });
    }

    pub(super) fn ok(&mut self, id: u32) {
        self.status(id, Status::Ok, "Success");
    }

    pub(super) fn error(&mut self, id: u32, error: Errno) {
        self.status(id, Status::of(error), &text_of(error));
    }

    pub(super) fn result(&mut self, id: u32, result: Result<(), Errno>) {
        match result {
            Ok(()) => self.ok(id),
            Err(error) => self.error(id, error),
        }
    }

    pub(super) fn handle(&mut self, id: u32, handle: &[u8]) {
        self.packet(HANDLE, id, |reply| reply.string(handle));
    }

    pub(super) fn attributes(&mut self, id: u32, attributes: &[u8]) {
        self.packet(ATTRS, id, |reply| reply.put(attributes));
    }

    /// A single name, as for `realpath`.
    pub(super) fn name(&mut self, id: u32, name: &[u8]) {
        self.packet(NAME, id, |reply| {
            reply.put(&1_u32.to_be_bytes());
            reply.string(name);
            reply.string(name);
            reply.put(&0_u32.to_be_bytes());
        });
    }

    /// `count` names, each with its long name and attributes, encoded already.
    pub(super) fn names(&mut self, id: u32, count: u32, encoded: &[u8]) {
        self.packet(NAME, id, |reply| {
            reply.put(&count.to_be_bytes());
            reply.put(encoded);
        });
    }

    pub(super) fn extended(&mut self, id: u32, fill: impl FnOnce(&mut Self)) {
        self.packet(EXTENDED_REPLY, id, fill);
    }

    /// At most `length` bytes that `read` puts in place; no reply if it fails.
    pub(super) fn data(
        &mut self,
        id: u32,
        length: usize,
        read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        /// Length, kind, number, length of the data.
        const HEADER: usize = 13;
        let start = self.end;
        self.grow_to(start + HEADER + length);
        let place = self.buffer.get_mut(start + HEADER..start + HEADER + length).unwrap_or_default();
        let count = read(place)?;
        let size = u32::try_from(count).unwrap_or(u32::MAX);
        self.put(&(size + 9).to_be_bytes());
        self.put(&[DATA]);
        self.put(&id.to_be_bytes());
        self.put(&size.to_be_bytes());
        self.end += count;
        Ok(())
    }

    fn packet(&mut self, kind: u8, number: u32, fill: impl FnOnce(&mut Self)) {
        let start = self.end;
        self.put(&[0; 4]);
        self.put(&[kind]);
        self.put(&number.to_be_bytes());
        fill(self);
        let length = u32::try_from(self.end - start - 4).unwrap_or(u32::MAX);
        if let Some(place) = self.buffer.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_be_bytes());
        }
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        let end = self.end + bytes.len();
        self.grow_to(end);
        if let Some(place) = self.buffer.get_mut(self.end..end) {
            place.copy_from_slice(bytes);
        }
        self.end = end;
    }

    pub(super) fn string(&mut self, bytes: &[u8]) {
        self.put(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.put(bytes);
    }

    fn grow_to(&mut self, length: usize) {
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_so() {
        assert_eq!(text_of(Errno::NOSPC), "No space left on device");
        assert_eq!(Status::of(Errno::NOSPC), Status::Failure);
    }

    #[test]
    fn replies_follow_one_another() {
        let mut replies = Replies::new();
        replies
            .data(7, 100, |place| {
                place[..3].copy_from_slice(b"abc");
                Ok(3)
            })
            .unwrap();
        assert_eq!(replies.data(8, 100, |_| Err(Errno::IO)), Err(Errno::IO));
        replies.handle(9, b"h");
        let expected = [
            &[0, 0, 0, 12, 103, 0, 0, 0, 7, 0, 0, 0, 3][..],
            b"abc",
            &[0, 0, 0, 10, 102, 0, 0, 0, 9, 0, 0, 0, 1],
            b"h",
        ];
        assert_eq!(replies.buffer[..replies.end], expected.concat());
    }
}
