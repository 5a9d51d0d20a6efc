//! Standard input on its way to a process: what the window admits, and no more.

use super::Terminal;
use crate::channel::{Frame, WINDOW};
use bytes::{Buf as _, Bytes, BytesMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::{
    io::AsyncWriteExt as _,
    process::ChildStdin,
    sync::{Notify, mpsc},
};

/// The window is opened again when this much of it has been used up.
const ADJUST_AT: usize = WINDOW / 4;

/// A queue of bytes between one reader of frames and one writer to the process.
#[derive(Debug, Default)]
pub(super) struct InputQueue {
    state: Mutex<State>,
    arrived: Notify,
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: BytesMut,
    /// Taken by the writer and not yet written.
    taken: usize,
    ended: bool,
    unwanted: bool,
}

impl InputQueue {
    /// Appends bytes if there is room for them; there always is for a gateway that keeps to its window.
    pub(super) fn try_push(&self, bytes: &Bytes) -> bool {
        let mut state = self.state();
        let held = state.waiting.len() + state.taken;
        if !state.unwanted {
            if held > 0 && held + bytes.len() > WINDOW {
                return false;
            }
            state.waiting.extend_from_slice(bytes);
            self.arrived.notify_one();
        }
        true
    }

    /// Appends bytes as soon as there is room for them. Cancel-safe.
    pub(super) async fn push(&self, bytes: &Bytes) {
        while !self.try_push(bytes) {
            self.drained.notified().await;
        }
    }

    /// No more bytes will come.
    pub(super) fn end(&self) {
        self.state().ended = true;
        self.arrived.notify_one();
    }

    /// Nobody will take input any more: what waits and what comes is thrown away.
    pub(super) fn discard(&self) {
        let mut state = self.state();
        state.unwanted = true;
        state.waiting.clear();
        self.drained.notify_one();
    }

    /// All bytes that wait, at least one; `None` at the end. Cancel-safe.
    async fn take(&self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.state();
                if !state.waiting.is_empty() {
                    let bytes = state.waiting.split().freeze();
                    state.taken = bytes.len();
                    return Some(bytes);
                }
                if state.ended {
                    return None;
                }
            }
            self.arrived.notified().await;
        }
    }

    fn written(&self, count: usize) {
        let mut state = self.state();
        state.taken = state.taken.saturating_sub(count);
        self.drained.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Feeds the process until the end, and grants the gateway what was taken; the sink is closed then. When the
    /// process takes no more (it closed its input), the rest is thrown away, as sshd does.
    pub(super) async fn feed(&self, mut sink: Sink<'_>, frames: &mpsc::Sender<Frame>) {
        let mut owed = 0;
        while let Some(mut bytes) = self.take().await {
            while !bytes.is_empty() {
                let count = match sink.write(&bytes).await {
                    Ok(count @ 1..) => count,
                    _ => {
                        sink = Sink::Nowhere;
                        bytes.len()
                    }
                };
                bytes.advance(count);
                self.written(count);
                owed += count;
                if owed >= ADJUST_AT {
                    let bytes = u32::try_from(std::mem::take(&mut owed)).unwrap_or(u32::MAX);
                    if frames.send(Frame::WindowAdjust { bytes }).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// What takes a process's input.
#[derive(Debug)]
pub(super) enum Sink<'a> {
    /// A terminal; closing this changes nothing about it.
    Terminal(&'a Terminal),
    /// A pipe.
    Pipe(ChildStdin),
    /// Nothing: input is thrown away.
    Nowhere,
}

impl Sink<'_> {
    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Terminal(terminal) => terminal.write(bytes).await,
            Self::Pipe(pipe) => pipe.write(bytes).await,
            Self::Nowhere => Ok(bytes.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt as _, poll};

    #[tokio::test]
    async fn a_push_beyond_the_window_waits_and_order_is_kept() {
        let queue = InputQueue::default();
        let full = Bytes::from(vec![1; WINDOW]);
        let more = Bytes::from_static(&[2]);
        queue.push(&full).await;
        let mut push = std::pin::pin!(queue.push(&more));
        assert!(poll!(push.as_mut()).is_pending());
        let taken = queue.take().await.unwrap();
        assert_eq!(taken.len(), WINDOW);
        assert!(poll!(push.as_mut()).is_pending(), "taken is not written");
        queue.written(1);
        assert!(push.now_or_never().is_some());
        assert_eq!(queue.take().await.unwrap(), more);
    }

    #[tokio::test]
    async fn a_push_that_waits_is_freed_when_nobody_wants_input_any_more() {
        let queue = InputQueue::default();
        let full = Bytes::from(vec![1; WINDOW]);
        queue.push(&full).await;
        let mut push = std::pin::pin!(queue.push(&full));
        assert!(poll!(push.as_mut()).is_pending());
        queue.discard();
        assert!(push.now_or_never().is_some());
    }

    #[tokio::test]
    async fn what_was_taken_is_granted_again() {
        let queue = InputQueue::default();
        let (sender, mut frames) = mpsc::channel(16);
        queue.push(&Bytes::from(vec![7; WINDOW])).await;
        queue.end();
        queue.feed(Sink::Nowhere, &sender).await;
        assert_eq!(frames.recv().await, Some(Frame::WindowAdjust { bytes: WINDOW as u32 }));
    }
}
