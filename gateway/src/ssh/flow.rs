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
//!   [`SHARED_WINDOW`] if there are many channels, or of [`USER_WINDOW`] if the user has many on all connections.
//! * Above, they are [`TRICKLE`] bytes. Not 1, and not 0: russh then never refills anything again. The peer goes
//!   on with packets of two bytes, which are paced ([`Meter::pace`]), so that they cost no CPU and add
//!   next to nothing; whatever is on the way reaches the queues, and stays in order.
//!
//! The price: beside a stalled upload, other *uploads* of the same connection crawl. Downloads, terminals and
//! new channels do not notice, nor do other connections.
//!
//! The same holds, a size larger, for all connections of one user together ([`USER_HIGH_WATER`], [`USER_FULL`],
//! [`USER_TOO_MUCH`]), so that who opens many connections throttles nobody but themselves; and for everybody
//! together, in an emergency ([`ALL_HIGH_WATER`]).
//!
//! A peer that sends more than its windows is cut off: russh takes what comes. The windows are counted here
//! once more for that ([`Windows`]).

use super::limits::UserShare;
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
/// What all windows of a user come to, about, in bytes, however many connections they are on.
const USER_WINDOW: u32 = 32 * 1024 * 1024;
/// Bytes in the queues of a user above which those of their peers that have something queued are throttled.
const USER_HIGH_WATER: usize = 64 * 1024 * 1024;
/// Bytes in the queues of a user above which they may open no more channels.
const USER_FULL: usize = 128 * 1024 * 1024;
/// Bytes in the queues of a user that nobody comes to who keeps to their windows: these are filled when the high
/// water is reached, at the most.
const USER_TOO_MUCH: usize = 256 * 1024 * 1024;
/// Bytes in the queues of a connection that is not cut off for what the user's others hold.
const INNOCENT: usize = 1024 * 1024;
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

/// The bytes queued on one connection, on all of its user's, and on all together.
#[derive(Debug, Default)]
pub(super) struct Meter {
    here: AtomicUsize,
    user: Arc<UserShare>,
    all: Arc<AtomicUsize>,
    drained: Notify,
}

impl Meter {
    /// A connection's meter; `user` is shared by all of a user, `all` by everybody's.
    pub(super) fn new(user: Arc<UserShare>, all: Arc<AtomicUsize>) -> Arc<Self> {
        Arc::new(Self { user, all, ..Self::default() })
    }

    /// Counts bytes that were queued.
    pub(super) fn add(&self, bytes: usize) {
        self.here.fetch_add(bytes, Ordering::Relaxed);
        self.user.queued.fetch_add(bytes, Ordering::Relaxed);
        self.all.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that were taken out, or dropped.
    pub(super) fn subtract(&self, bytes: usize) {
        let before = self.here.fetch_sub(bytes, Ordering::Relaxed);
        self.user.queued.fetch_sub(bytes, Ordering::Relaxed);
        self.all.fetch_sub(bytes, Ordering::Relaxed);
        if before > HIGH_WATER && before.saturating_sub(bytes) <= HIGH_WATER {
            self.drained.notify_one();
        }
    }

    /// Whether no more channels may be opened until something was taken out.
    pub(super) fn is_full(&self) -> bool {
        self.here() > FULL || self.user() > USER_FULL
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
        let part = |whole: u32, channels: usize| whole / u32::try_from(channels.max(1)).unwrap_or(u32::MAX);
        let share = part(SHARED_WINDOW, channels).min(part(USER_WINDOW, self.user.channels()));
        share.clamp(INITIAL_WINDOW, MAX_WINDOW)
    }

    fn is_high(&self) -> bool {
        let here = self.here();
        let together = || self.user() > USER_HIGH_WATER || self.all.load(Ordering::Relaxed) > ALL_HIGH_WATER;
        here > HIGH_WATER || (here > 0 && together())
    }

    /// Whether more is queued than a peer can have sent that keeps to its windows.
    fn is_too_much(&self) -> bool {
        let here = self.here();
        here > TOO_MUCH || (here > INNOCENT && self.user() > USER_TOO_MUCH)
    }

    fn here(&self) -> usize {
        self.here.load(Ordering::Relaxed)
    }

    fn user(&self) -> usize {
        self.user.queued.load(Ordering::Relaxed)
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
    /// A channel is open; false if it was already, for then its window is what it was: russh passes on a peer's
    /// confirmations however often they come.
    pub(super) fn open(&mut self, channel: ChannelId) -> bool {
        let mut new = false;
        self.left.entry(channel).or_insert_with(|| {
            new = true;
            INITIAL_WINDOW
        });
        new
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
        self.exceeded <= FORGIVEN && !meter.is_too_much()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use russh::keys::ssh_key::encoding::Decode as _;

    fn meter() -> Arc<Meter> {
        Meter::new(Arc::default(), Arc::default())
    }

    /// russh's own type, which it alone makes.
    fn channel() -> ChannelId {
        ChannelId::decode(&mut &[0, 0, 0, 1][..]).unwrap()
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
    fn a_heavy_user_throttles_only_themselves() {
        let (heavy, other, all) = (Arc::default(), Arc::default(), Arc::default());
        let connection = |user: &Arc<UserShare>| Meter::new(Arc::clone(user), Arc::clone(&all));
        // None of these connections holds much.
        let many: Vec<_> = (0..64).map(|_| connection(&heavy)).collect();
        many.iter().for_each(|meter| meter.add(USER_HIGH_WATER / 64));
        let (typing, idle, neighbour) = (connection(&heavy), connection(&heavy), connection(&other));
        typing.add(1);
        neighbour.add(1);
        assert_eq!([&typing, &idle, &neighbour].map(|meter| meter.window(1)), [TRICKLE, MAX_WINDOW, MAX_WINDOW]);
        assert!(!typing.is_full());
        many.iter().for_each(|meter| meter.add(USER_FULL / 64));
        assert_eq!([&typing, &idle, &neighbour].map(|meter| meter.is_full()), [true, true, false]);
        assert!(!many[0].is_too_much());
        many.iter().for_each(|meter| meter.add(USER_TOO_MUCH / 64));
        // Who goes on is cut off; a connection that only types is not, nor is anybody else.
        assert!(many[0].is_too_much() && !typing.is_too_much() && !neighbour.is_too_much());
        many.iter().for_each(|meter| meter.subtract((USER_HIGH_WATER + USER_FULL + USER_TOO_MUCH) / 64));
        typing.subtract(1);
        assert_eq!((heavy.queued.load(Ordering::Relaxed), typing.is_full()), (0, false));
    }

    #[test]
    fn many_channels_of_a_user_share_a_window_over_all_their_connections() {
        let user = Arc::new(UserShare::default());
        let meter = Meter::new(Arc::clone(&user), Arc::default());
        let channels: Vec<_> = (0..32).map(|_| user.channel(32).unwrap()).collect();
        assert_eq!(meter.window(1), USER_WINDOW / 32);
        drop(channels);
        assert_eq!(meter.window(1), MAX_WINDOW);
    }

    #[test]
    fn everybody_is_throttled_when_all_together_hold_too_much() {
        let all = Arc::new(AtomicUsize::new(0));
        let meter = || Meter::new(Arc::default(), Arc::clone(&all));
        let (greedy, modest, idle) = (meter(), meter(), meter());
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

    #[test]
    fn who_sends_beyond_the_windows_is_cut_off() {
        let (mut windows, meter, channel) = (Windows::default(), meter(), channel());
        assert!(windows.open(channel));
        assert!(windows.receive(channel, INITIAL_WINDOW as usize, &meter));
        // So much is forgiven, once.
        assert!(windows.receive(channel, FORGIVEN, &meter));
        assert!(!windows.receive(channel, 1, &meter));
    }

    #[test]
    fn a_refill_counts_from_the_data_that_caused_it() {
        let (mut windows, meter, channel) = (Windows::default(), meter(), channel());
        windows.open(channel);
        for _ in 0..100 {
            // As russh does: the refill is told, then comes the data, then what the refill allows.
            assert_eq!(windows.refill(MAX_WINDOW, &meter), MAX_WINDOW);
            assert!(windows.receive(channel, 1, &meter));
            assert!(windows.receive(channel, MAX_WINDOW as usize - 1, &meter));
        }
        assert!(windows.receive(channel, 1, &meter));
        assert!(windows.receive(channel, FORGIVEN, &meter));
        assert!(!windows.receive(channel, 1, &meter));
    }

    #[test]
    fn a_confirmation_that_is_repeated_fills_no_window() {
        let (mut windows, meter, channel) = (Windows::default(), meter(), channel());
        assert!(windows.open(channel));
        let mut sent = 0;
        while sent <= 10 * INITIAL_WINDOW as usize && windows.receive(channel, 32 * 1024, &meter) {
            sent += 32 * 1024;
            assert!(!windows.open(channel));
        }
        assert!(sent <= INITIAL_WINDOW as usize + FORGIVEN, "{sent} bytes were taken");
    }

    #[test]
    fn what_is_queued_cuts_off_whoever_adds_to_it() {
        let (mut windows, meter, channel) = (Windows::default(), meter(), channel());
        windows.open(channel);
        meter.add(TOO_MUCH + 1);
        assert!(!windows.receive(channel, 1, &meter));
        meter.subtract(TOO_MUCH + 1);
        assert!(windows.receive(channel, 1, &meter));
    }
}
