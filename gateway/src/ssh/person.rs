//! The person at the terminal of a session, while their workspace is being got ready.

use super::{
    inbox::{Control, Inbox},
    outlet::{Gone, Outlet},
    setup::TerminalRequest,
};
use crate::login::{Input, Terminal};
use async_trait::async_trait;
use bytes::Bytes;
use mlad::channel::PtySize;
use std::io;

/// The person.
pub(super) struct Person<'a> {
    outlet: &'a Outlet,
    keyboard: Keyboard,
    begins_shell: bool,
}

impl<'a> Person<'a> {
    pub(super) fn new(outlet: &'a Outlet, request: TerminalRequest, begins_shell: bool) -> Self {
        Self { outlet, keyboard: Keyboard { request, ended: false }, begins_shell }
    }

    /// The terminal as it is now.
    pub(super) fn into_request(self) -> TerminalRequest {
        self.keyboard.request
    }
}

#[async_trait]
impl Terminal for Person<'_> {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.outlet.data(Bytes::copy_from_slice(bytes)).await;
        sent.map_err(|Gone| io::ErrorKind::BrokenPipe.into())
    }

    async fn read(&mut self, room: usize) -> io::Result<Option<Input>> {
        Ok(self.keyboard.read(self.outlet.inbox(), room).await)
    }

    fn size(&self) -> PtySize {
        self.keyboard.request.size
    }

    fn term(&self) -> &str {
        &self.keyboard.request.term
    }

    fn begins_shell(&self) -> bool {
        self.begins_shell
    }
}

/// What the person's terminal sends, and what has become of it meanwhile.
struct Keyboard {
    request: TerminalRequest,
    /// Whether the end of the input was told.
    ended: bool,
}

impl Keyboard {
    async fn read(&mut self, inbox: &Inbox, room: usize) -> Option<Input> {
        loop {
            tokio::select! {
                _ = inbox.ended() => return None,
                control = inbox.next_control() => match control {
                    Control::Resize(size) => {
                        self.request.size = size;
                        return Some(Input::Resize(size));
                    }
                    Control::Signal(name) if name == "INT" => return Some(Input::Interrupt),
                    Control::Signal(_) => {}
                },
                bytes = inbox.next_data_of(room), if room > 0 && !self.ended => {
                    self.ended = bytes.is_none();
                    return Some(bytes.map_or(Input::End, |bytes| Input::Bytes(bytes.into())));
                }
                () = inbox.interrupt(), if room == 0 => return Some(Input::Interrupt),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssh::{
        flow::Meter,
        inbox::{End, INTERRUPT},
    };
    use futures::FutureExt as _;
    use std::sync::Arc;

    fn keyboard() -> (Keyboard, Arc<Inbox>) {
        let request = TerminalRequest { term: "xterm".into(), size: PtySize::default(), modes: Bytes::new() };
        (Keyboard { request, ended: false }, Inbox::new(Meter::new(Arc::default(), Arc::default())))
    }

    fn typed(bytes: &[u8]) -> Option<Option<Input>> {
        Some(Some(Input::Bytes(bytes.into())))
    }

    #[tokio::test]
    async fn what_is_typed_is_taken_as_far_as_there_is_room() {
        let (mut keyboard, inbox) = keyboard();
        inbox.push(b"exit\r");
        assert_eq!(keyboard.read(&inbox, 4).now_or_never(), typed(b"exit"));
        assert_eq!(keyboard.read(&inbox, 0).now_or_never(), None);
        inbox.push(&[b'x', INTERRUPT]);
        assert_eq!(keyboard.read(&inbox, 0).now_or_never(), Some(Some(Input::Interrupt)));
        // Nothing was lost.
        assert_eq!(keyboard.read(&inbox, 9).now_or_never(), typed(&[b'\r', b'x', INTERRUPT]));
    }

    #[tokio::test]
    async fn the_end_of_input_is_told_once_and_after_all_that_came_before() {
        let (mut keyboard, inbox) = keyboard();
        inbox.push(b"y");
        inbox.eof();
        assert_eq!(keyboard.read(&inbox, 0).now_or_never(), None);
        assert_eq!(keyboard.read(&inbox, 9).now_or_never(), typed(b"y"));
        assert_eq!(keyboard.read(&inbox, 9).now_or_never(), Some(Some(Input::End)));
        assert_eq!(keyboard.read(&inbox, 9).now_or_never(), None);
        // Somebody may wait there all the same.
        inbox.resize(PtySize { columns: 7, ..PtySize::default() });
        let size = keyboard.read(&inbox, 9).now_or_never();
        assert!(matches!(size, Some(Some(Input::Resize(size))) if size.columns == 7 && keyboard.request.size == size));
        inbox.end(End::Closed);
        assert_eq!(keyboard.read(&inbox, 9).now_or_never(), Some(None));
    }

    #[tokio::test]
    async fn a_signal_interrupts_and_others_are_for_the_process_to_come() {
        let (mut keyboard, inbox) = keyboard();
        inbox.signal("USR1".into());
        inbox.signal("INT".into());
        assert_eq!(keyboard.read(&inbox, 9).now_or_never(), Some(Some(Input::Interrupt)));
    }
}
