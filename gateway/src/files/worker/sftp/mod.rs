//! SFTP version 3 with OpenSSH's extensions, on standard input and output.
//!
//! One thread answers request after request, in order. It reads what the pipe holds, answers all of it into
//! one buffer, and sends that: a client with many requests in flight costs two system calls for many answers,
//! and what it may have in flight is what pipe and buffers hold.

mod attributes;
mod extended;
mod handles;
mod listing;
mod packet;
mod paths;
mod reply;
mod requests;

use super::{WorkerError, names::Names, output};
use crate::files::Jail;
use packet::{MAX_PACKET, Malformed, Packet};
use reply::{Replies, Status};

/// Bytes of requests read at once.
const INPUT: usize = 3 * MAX_PACKET;
/// Bytes of a packet's length.
const LENGTH: usize = 4;

/// Serves until the client closes.
pub(super) fn serve(jail: &Jail, names: &Names) -> Result<(), WorkerError> {
    let mut input = Input::new();
    let mut server = requests::Server::new(jail, names);
    let mut replies = Replies::new();
    let mut begun = false;
    loop {
        while let Some(packet) = input.next_packet()? {
            replies.make_room()?;
            match packet::parse(packet) {
                Ok(Packet::Init(_)) if begun => return Err(WorkerError::Protocol("a second INIT".into())),
                Ok(Packet::Init(_)) => {
                    begun = true;
                    replies.version();
                }
                Ok(_) if !begun => return Err(WorkerError::Protocol("a request before INIT".into())),
                Ok(Packet::Request { id, request }) => server.answer(id, request, &mut replies),
                Err(Malformed { id: Some(id) }) if begun => replies.status(id, Status::BadMessage, "Bad message"),
                Err(Malformed { .. }) => return Err(WorkerError::Protocol("a packet that is too short".into())),
            }
        }
        replies.flush()?;
        if !input.fill()? {
            return Ok(());
        }
    }
}

/// What was read and not answered.
struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self { buffer: vec![0; INPUT], start: 0, end: 0 }
    }

    /// The next packet, without its length, if it is there completely.
    fn next_packet(&mut self) -> Result<Option<&[u8]>, WorkerError> {
        let waiting = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length == 0 || length > MAX_PACKET {
            return Err(WorkerError::Protocol(format!("a packet of {length} bytes; the most is {MAX_PACKET}")));
        }
        let Some(packet) = rest.get(..length) else { return Ok(None) };
        self.start += LENGTH + length;
        Ok(Some(packet))
    }

    /// Reads more; false at the end.
    fn fill(&mut self) -> Result<bool, WorkerError> {
        // What is left is less than a packet.
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let count = output::read(self.buffer.get_mut(self.end..).unwrap_or_default())?;
        self.end += count;
        Ok(count > 0)
    }
}
