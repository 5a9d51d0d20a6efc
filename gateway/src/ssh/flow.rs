//! How much a peer may send: the one place that knows how russh 0.65.1 handles windows.
//!
//! Stock russh hands a channel's data to a bounded queue and waits for room there, in the loop that serves
//! the whole connection: one channel that is not read freezes all, and `ssh host cat` deadlocks. So the read
//! halves of all channels are dropped, data is taken from the handler's callbacks into an [`Inbox`](super::inbox)
//! per channel, and nothing ever waits there. But then nothing keeps a peer from sending either, for russh
//! refills the window of a channel as data *arrives*. The only lever is the return value of
//! `Handler::adjust_window`: the size, for all channels of the connection, of the next refill.
//!
//! * While the queues of a connection hold less than [`HIGH_WATER`], refills are [`MAX_WINDOW`], or a share of
//!   [`SHARED_WINDOW`] if there are many channels.
//! * Above, they are [`TRICKLE`] bytes. Not 1, and not 0: russh then never refills anything again. The peer goes
//!   on with packets of two bytes, which are paced ([`Meter::pace`]), so that they cost no CPU and add
//!   next to nothing; whatever is on the way reaches the queues, and stays in order.
//!
//! The price: beside a stalled upload, other *uploads* of the same connection crawl. Downloads, terminals and
//! new channels do not notice, nor do other connections.
//!
//! A peer that sends more than its windows is cut off: russh takes what comes. The windows are counted here
//! once more for that ([`Windows`]).

use russh::ChannelId;
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// Window of a new channel, in bytes: what a peer may send before anybody has looked.
pub(super) const INITIAL_WINDOW: u32 = 256 * 1024;
/// Largest window, in bytes: as OpenSSH's.
const MAX_WINDOW: u32 = 2 * 1024 * 1024;
/// What all windows of a connection come to, about, in bytes.
const SHARED_WINDOW: u32 = 8 * 1024 * 1024;
/// Bytes in the queues of a connection above which its peer is throttled.
const HIGH_WATER: usize = 4 * 1024 * 1024;
/// Bytes in the queues of a connection above which it may open no more channels.
const FULL: usize = 16 * 1024 * 1024;
/// Bytes in the queues of a connection that no peer comes to that keeps to its windows.
const TOO_MUCH: usize = 64 * 1024 * 1024;
/// Bytes in the queues of all connections above which every peer that has something queued is throttled.
const ALL_HIGH_WATER: usize = 512 * 1024 * 1024;
/// Bytes a refill brings a throttled peer.
const TRICKLE: u32 = 2;
/// Pause after a throttled packet.
const PACE: Duration = Duration::from_millis(1);
/// Pause after a throttled packet of a connection that is [`FULL`].
const SLOW_PACE: Duration = Duration::from_millis(50);
/// Bytes beyond its windows that are forgiven, as OpenSSH does.
const FORGIVEN: usize = 256 * 1024;

/// The bytes queued on one connection, and on all together.
#[derive(Debug, Default)]
pub(super) struct Meter {
    here: AtomicUsize,
    all: Arc<AtomicUsize>,
    drained: Notify,
}

impl Meter {
    /// A connection's meter; `all` is shared by all.
    pub(super) fn new(all: Arc<AtomicUsize>) -> Arc<Self> {
        Arc::new(Self { all, ..Self::default() })
    }

    /// Counts bytes that were queued.
    pub(super) fn add(&self, bytes: usize) {
        self.here.fetch_add(bytes, Ordering::Relaxed);
        self.all.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that were taken out, or dropped.
    pub(super) fn subtract(&self, bytes: usize) {
        let before = self.here.fetch_sub(bytes, Ordering::Relaxed);
        self.all.fetch_sub(bytes, Ordering::Relaxed);
        if before > HIGH_WATER && before.saturating_sub(bytes) <= HIGH_WATER {
            self.drained.notify_one();
        }
    }

    /// Whether no more channels may be opened until something was taken out.
    pub(super) fn is_full(&self) -> bool {
        self.here.load(Ordering::Relaxed) > FULL
    }

    /// Waits a moment if the peer is being throttled, or until it need not be any more.
    pub(super) async fn pace(&self) {
        if self.is_high() {
            let pause = if self.is_full() { SLOW_PACE } else { PACE };
            _ = tokio::time::timeout(pause, self.drained.notified()).await;
        }
    }

    /// What the next refill is to be, with so many channels open.
    fn window(&self, channels: usize) -> u32 {
        if self.is_high() {
            return TRICKLE;
        }
        let share = SHARED_WINDOW / u32::try_from(channels.max(1)).unwrap_or(u32::MAX);
        share.clamp(INITIAL_WINDOW, MAX_WINDOW)
    }

    fn is_high(&self) -> bool {
        let here = self.here.load(Ordering::Relaxed);
        here > HIGH_WATER || (here > 0 && self.all.load(Ordering::Relaxed) > ALL_HIGH_WATER)
    }
}

/// What the peer may still send on each channel, as russh counts it.
#[derive(Debug, Default)]
pub(super) struct Windows {
    left: HashMap<ChannelId, u32>,
    /// The refill that russh has just told the peer of; it comes before the data that caused it.
    refilled: Option<u32>,
    exceeded: usize,
}

impl Windows {
    /// A channel is open.
    pub(super) fn open(&mut self, channel: ChannelId) {
        self.left.insert(channel, INITIAL_WINDOW);
    }

    /// Forgets the channels that are gone.
    pub(super) fn keep(&mut self, is_open: impl Fn(ChannelId) -> bool) {
        self.left.retain(|channel, _| is_open(*channel));
    }

    /// A channel is gone.
    pub(super) fn close(&mut self, channel: ChannelId) {
        self.left.remove(&channel);
    }

    /// russh has filled a channel's window up to `size`, and asks what the next refill is to be.
    pub(super) fn refill(&mut self, size: u32, meter: &Meter) -> u32 {
        self.refilled = Some(size);
        meter.window(self.left.len())
    }

    /// Data has come; false if this peer does not keep to its windows and is to be cut off.
    pub(super) fn receive(&mut self, channel: ChannelId, bytes: usize, meter: &Meter) -> bool {
        let refilled = self.refilled.take();
        if let Some(left) = self.left.get_mut(&channel) {
            match u32::try_from(bytes).ok().and_then(|bytes| left.checked_sub(bytes)) {
                Some(rest) => *left = rest,
                None => self.exceeded = self.exceeded.saturating_add(bytes),
            }
            if let Some(size) = refilled {
                *left = size;
            }
        }
        self.exceeded <= FORGIVEN && meter.here.load(Ordering::Relaxed) <= TOO_MUCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meter() -> Arc<Meter> {
        Meter::new(Arc::default())
    }

    #[test]
    fn a_peer_is_throttled_by_what_all_its_channels_hold() {
        let meter = meter();
        assert_eq!(meter.window(1), MAX_WINDOW);
        assert_eq!(meter.window(8), SHARED_WINDOW / 8);
        assert_eq!(meter.window(1000), INITIAL_WINDOW);
        meter.add(HIGH_WATER + 1);
        assert_eq!(meter.window(1), TRICKLE);
        meter.subtract(1);
        assert_eq!(meter.window(1), MAX_WINDOW);
    }

    #[test]
    fn everybody_is_throttled_when_all_together_hold_too_much() {
        let all = Arc::new(AtomicUsize::new(0));
        let (greedy, modest, idle) = (Meter::new(all.clone()), Meter::new(all.clone()), Meter::new(all.clone()));
        greedy.add(ALL_HIGH_WATER);
        modest.add(1);
        assert_eq!((modest.window(1), idle.window(1)), (TRICKLE, MAX_WINDOW));
    }

    #[tokio::test]
    async fn the_pause_ends_when_the_queue_was_drained() {
        let meter = meter();
        meter.add(FULL + 1);
        let start = tokio::time::Instant::now();
        meter.pace().await;
        assert!(start.elapsed() >= SLOW_PACE);
        meter.subtract(FULL);
        let start = tokio::time::Instant::now();
        meter.pace().await;
        assert!(start.elapsed() < SLOW_PACE);
    }
}
