//! The person at the terminal of a session, while their workspace is being got ready.

use super::{
    inbox::Control,
    outlet::{Gone, Outlet},
    setup::TerminalRequest,
};
use crate::login::{Input, Terminal};
use async_trait::async_trait;
use bytes::Bytes;
use mlad::channel::PtySize;
use std::io;

/// What a terminal sends for Ctrl-C.
const INTERRUPT: u8 = 3;

/// The person.
pub(super) struct Person<'a> {
    outlet: &'a Outlet,
    request: TerminalRequest,
    /// Whether no more will be typed; somebody may wait there all the same.
    silent: bool,
}

impl<'a> Person<'a> {
    pub(super) fn new(outlet: &'a Outlet, request: TerminalRequest) -> Self {
        Self { outlet, request, silent: false }
    }

    /// The terminal as it is now.
    pub(super) fn into_request(self) -> TerminalRequest {
        self.request
    }
}

#[async_trait]
impl Terminal for Person<'_> {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.outlet.data(Bytes::copy_from_slice(bytes)).await;
        sent.map_err(|Gone| io::ErrorKind::BrokenPipe.into())
    }

    async fn read(&mut self) -> io::Result<Option<Input>> {
        let inbox = self.outlet.inbox();
        loop {
            tokio::select! {
                _ = inbox.ended() => return Ok(None),
                control = inbox.next_control() => match control {
                    Control::Resize(size) => {
                        self.request.size = size;
                        return Ok(Some(Input::Resize(size)));
                    }
                    Control::Signal(name) if name == "INT" => return Ok(Some(Input::Bytes(vec![INTERRUPT]))),
                    Control::Signal(_) => {}
                },
                bytes = inbox.next_data(), if !self.silent => match bytes {
                    Some(bytes) => return Ok(Some(Input::Bytes(bytes.into()))),
                    None => self.silent = true,
                },
            }
        }
    }

    fn size(&self) -> PtySize {
        self.request.size
    }

    fn term(&self) -> &str {
        &self.request.term
    }
}
