//! What a client sends on one channel, between the callbacks of its connection and the task that serves it.
//!
//! The callbacks never wait; how much can be in here is kept in bounds by [`flow`](super::flow). A close, or the
//! loss of the connection, drops the data that waits here, unless the data came to its end first (EOF): then it is
//! whole, and who serves the channel finishes its delivery ([`Inbox::is_whole`]).

use super::flow::Meter;
use bytes::{Bytes, BytesMut};
use mlad::channel::PtySize;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What a terminal sends for Ctrl-C.
pub(super) const INTERRUPT: u8 = 0x03;
/// Packets are gathered into pieces of at most this size, in bytes.
const PIECE: usize = 64 * 1024;
/// Signals that wait; more are dropped.
const MAX_SIGNALS: usize = 16;

/// The queue.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    data: Notify,
    control: Notify,
    over: CancellationToken,
    meter: Arc<Meter>,
}

#[derive(Debug, Default)]
struct State {
    pieces: VecDeque<BytesMut>,
    /// Bytes at the front that were searched for a Ctrl-C, and have none.
    searched: usize,
    eof: bool,
    /// Nobody wants the data.
    discarded: bool,
    size: Option<PtySize>,
    signals: VecDeque<String>,
    end: Option<End>,
}

/// How a channel ended for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It was closed.
    Closed,
    /// The connection is gone.
    Lost,
}

/// What comes beside the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Control {
    /// The terminal's new size; the latest if there were several.
    Resize(PtySize),
    /// A signal for the process, without SIG.
    Signal(String),
}

impl Inbox {
    pub(super) fn new(meter: Arc<Meter>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            data: Notify::new(),
            control: Notify::new(),
            over: CancellationToken::new(),
            meter,
        })
    }

    /// Takes a packet in.
    pub(super) fn push(&self, packet: &[u8]) {
        let mut state = self.state();
        if state.discarded || state.eof || state.end.is_some() || packet.is_empty() {
            return;
        }
        self.meter.add(packet.len());
        match state.pieces.back_mut() {
            Some(last) if last.len() + packet.len() <= PIECE => last.extend_from_slice(packet),
            _ => state.pieces.push_back(packet.into()),
        }
        drop(state);
        self.data.notify_one();
    }

    /// Puts bytes back before all others.
    pub(super) fn unread(&self, bytes: &[u8]) {
        let mut state = self.state();
        if state.discarded || state.end.is_some() || bytes.is_empty() {
            return;
        }
        self.meter.add(bytes.len());
        state.pieces.push_front(bytes.into());
        state.searched = 0;
        drop(state);
        self.data.notify_one();
    }

    /// No more data will come.
    pub(super) fn eof(&self) {
        self.state().eof = true;
        self.data.notify_one();
    }

    /// The terminal has another size.
    pub(super) fn resize(&self, size: PtySize) {
        self.state().size = Some(size);
        self.control.notify_one();
    }

    /// A signal for the process.
    pub(super) fn signal(&self, name: String) {
        let mut state = self.state();
        if state.signals.len() < MAX_SIGNALS {
            state.signals.push_back(name);
            drop(state);
            self.control.notify_one();
        }
    }

    /// The channel is over. What is in here is dropped unless it is whole.
    pub(super) fn end(&self, end: End) {
        let mut state = self.state();
        state.end.get_or_insert(end);
        if !state.eof {
            self.drop_data(&mut state);
        }
        drop(state);
        self.data.notify_one();
        self.over.cancel();
    }

    /// From now on data is dropped as it comes: the process does not want it.
    pub(super) fn discard(&self) {
        let mut state = self.state();
        state.discarded = true;
        self.drop_data(&mut state);
    }

    /// Whether the channel is over.
    pub(super) fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }

    /// Whether all data has come: what is left of it is to be delivered, also when the channel is over.
    pub(super) fn is_whole(&self) -> bool {
        self.state().eof
    }

    /// The next piece of data; none at its end. One task at a time. Cancel-safe.
    pub(super) async fn next_data(&self) -> Option<Bytes> {
        self.next_data_of(usize::MAX).await
    }

    /// The same, of at most `size` bytes. What is left stays here, where it throttles the client.
    pub(super) async fn next_data_of(&self, size: usize) -> Option<Bytes> {
        self.when(|state| {
            let piece = match state.pieces.front_mut() {
                Some(first) if first.len() > size => Some(first.split_to(size)),
                Some(_) => state.pieces.pop_front(),
                None if state.eof || state.end.is_some() => return Some(None),
                None => None,
            }?;
            state.searched = 0;
            self.meter.subtract(piece.len());
            Some(Some(piece.freeze()))
        })
        .await
    }

    /// Returns when there is a Ctrl-C among what waits here, however far behind. Takes nothing out. One task at a
    /// time, which does not wait for data meanwhile. Cancel-safe.
    pub(super) async fn interrupt(&self) {
        self.when(State::has_interrupt).await;
    }

    /// What `look` finds, as soon as it finds something.
    async fn when<T>(&self, look: impl Fn(&mut State) -> Option<T>) -> T {
        loop {
            if let Some(found) = look(&mut self.state()) {
                return found;
            }
            self.data.notified().await;
        }
    }

    /// The next of what comes beside the data; never returns once the channel is over. One task at a time.
    /// Cancel-safe.
    pub(super) async fn next_control(&self) -> Control {
        loop {
            {
                let mut state = self.state();
                if let Some(size) = state.size.take() {
                    return Control::Resize(size);
                }
                if let Some(name) = state.signals.pop_front() {
                    return Control::Signal(name);
                }
            }
            self.control.notified().await;
        }
    }

    /// Returns when the channel is over.
    pub(super) async fn ended(&self) -> End {
        self.over.cancelled().await;
        self.state().end.unwrap_or(End::Lost)
    }

    fn drop_data(&self, state: &mut State) {
        let bytes = state.pieces.iter().map(BytesMut::len).sum();
        state.pieces = VecDeque::new();
        state.searched = 0;
        self.meter.subtract(bytes);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Every byte is looked at once, however often this is asked.
    fn has_interrupt(&mut self) -> Option<()> {
        let mut before = 0;
        for piece in &self.pieces {
            let new = piece.get(self.searched.saturating_sub(before)..).unwrap_or_default();
            if new.contains(&INTERRUPT) {
                return Some(());
            }
            before += piece.len();
        }
        self.searched = before;
        None
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.drop_data(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use std::sync::atomic::AtomicUsize;

    fn inbox() -> (Arc<Inbox>, Arc<AtomicUsize>) {
        let all = Arc::new(AtomicUsize::new(0));
        (Inbox::new(Meter::new(Arc::default(), Arc::clone(&all))), all)
    }

    fn queued(all: &AtomicUsize) -> usize {
        all.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[tokio::test]
    async fn small_packets_are_gathered_and_come_in_order() {
        let (inbox, all) = inbox();
        for byte in 0..100 {
            inbox.push(&[byte]);
        }
        inbox.push(&vec![0; PIECE]);
        inbox.unread(b"first");
        assert_eq!(queued(&all), 105 + PIECE);
        assert_eq!(inbox.next_data().await.unwrap(), &b"first"[..]);
        assert_eq!(inbox.next_data().await.unwrap(), (0..100).collect::<Vec<u8>>());
        assert_eq!(inbox.next_data().await.unwrap().len(), PIECE);
        assert_eq!(inbox.next_data().now_or_never(), None);
        inbox.push(b"last");
        inbox.eof();
        inbox.push(b"after the end");
        assert_eq!(inbox.next_data().await.unwrap(), &b"last"[..]);
        assert_eq!(inbox.next_data().await, None);
        assert_eq!(queued(&all), 0);
    }

    #[tokio::test]
    async fn a_close_overtakes_data() {
        let (inbox, all) = inbox();
        inbox.push(b"data");
        inbox.end(End::Closed);
        inbox.end(End::Lost);
        assert_eq!((inbox.next_data().await, inbox.ended().await, queued(&all)), (None, End::Closed, 0));
    }

    #[tokio::test]
    async fn a_close_after_the_end_of_the_data_leaves_it_whole() {
        let (inbox, _) = inbox();
        inbox.push(b"data");
        inbox.eof();
        inbox.end(End::Closed);
        assert_eq!(inbox.next_data().await.unwrap(), &b"data"[..]);
        assert_eq!(inbox.next_data().await, None);
    }

    #[tokio::test]
    async fn what_there_is_no_room_for_stays_where_it_is() {
        let (inbox, all) = inbox();
        inbox.push(b"typed ahead");
        assert_eq!(inbox.next_data_of(5).await.unwrap(), &b"typed"[..]);
        assert_eq!(queued(&all), 6);
        assert_eq!(inbox.next_data().await.unwrap(), &b" ahead"[..]);
        assert_eq!(inbox.next_data_of(5).now_or_never(), None);
        inbox.eof();
        assert_eq!(inbox.next_data_of(5).await, None);
    }

    #[tokio::test]
    async fn a_control_c_is_found_behind_whatever_waits() {
        let (inbox, all) = inbox();
        assert!(inbox.interrupt().now_or_never().is_none());
        for _ in 0..10 {
            inbox.push(&vec![b'a'; PIECE - 1]);
            assert!(inbox.interrupt().now_or_never().is_none());
        }
        let (found, ()) = tokio::join!(inbox.interrupt(), async { inbox.push(&[INTERRUPT]) });
        assert_eq!((found, queued(&all)), ((), 10 * PIECE - 9));
        assert!(inbox.interrupt().now_or_never().is_some(), "it is still there");
        // What was searched is forgotten when something is taken out, or put before it.
        while inbox.next_data().now_or_never().is_some() {}
        assert!(inbox.interrupt().now_or_never().is_none());
        inbox.push(b"ab");
        assert!(inbox.interrupt().now_or_never().is_none());
        inbox.unread(&[INTERRUPT]);
        assert!(inbox.interrupt().now_or_never().is_some());
    }

    #[tokio::test]
    async fn data_that_nobody_wants_is_not_kept() {
        let (inbox, all) = inbox();
        inbox.push(b"before");
        inbox.discard();
        inbox.push(b"after");
        assert_eq!(queued(&all), 0);
        let (inbox, all) = self::inbox();
        inbox.push(b"left");
        drop(inbox);
        assert_eq!(queued(&all), 0);
    }

    #[tokio::test]
    async fn of_many_sizes_the_last_counts_and_signals_are_bounded() {
        let (inbox, _) = inbox();
        for columns in 0..1000 {
            inbox.resize(PtySize { columns, ..PtySize::default() });
            inbox.signal("INT".into());
        }
        assert_eq!(inbox.next_control().await, Control::Resize(PtySize { columns: 999, ..PtySize::default() }));
        for _ in 0..MAX_SIGNALS {
            assert_eq!(inbox.next_control().await, Control::Signal("INT".into()));
        }
        assert_eq!(inbox.next_control().now_or_never(), None);
    }
}
