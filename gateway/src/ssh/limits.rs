//! How much one source or one user may take: connections, channels and queued bytes of a user, connections of a
//! source that have not logged in, tries with enrolment codes.

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Sources remembered before those that have been quiet are forgotten.
const MAX_SOURCES: usize = 4096;
/// Bits of an IPv6 address that are one source: what one customer has.
const IPV6_PREFIX: u32 = 56;
/// What part of the unauthenticated connections one source may have.
const SOURCE_PART: usize = 4;
/// What one source may have of them however few there are: several people behind one address.
const SOURCE_LEAST: usize = 10;

/// The connections every user has open.
#[derive(Debug, Clone, Default)]
pub(super) struct UserConnections(Arc<Mutex<HashMap<i64, Arc<UserShare>>>>);

/// What all connections of one user take together.
#[derive(Debug, Default)]
pub(super) struct UserShare {
    connections: AtomicUsize,
    /// Whatever holds descriptors: channels until they are served to their end, and listeners.
    channels: AtomicUsize,
    /// Bytes in the queues of their channels.
    pub(super) queued: AtomicUsize,
    /// Channels that russh remembers until their connections end.
    pub(super) remembered: AtomicUsize,
}

/// One open connection of a user; it counts until it is dropped.
#[derive(Debug)]
pub(super) struct UserConnection {
    user: i64,
    share: Arc<UserShare>,
    all: UserConnections,
}

/// A channel or listener of a user; it counts until it is dropped.
#[derive(Debug)]
pub(super) struct UserChannel(Arc<UserShare>);

impl UserConnections {
    /// Counts one more; none if the user has `limit` already.
    pub(super) fn add(&self, user: i64, limit: usize) -> Option<UserConnection> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let share = all.entry(user).or_default();
        let share = count_up_to(&share.connections, limit).then(|| Arc::clone(share))?;
        Some(UserConnection { user, share, all: self.clone() })
    }
}

impl UserConnection {
    /// What the user takes with all their connections.
    pub(super) fn share(&self) -> &Arc<UserShare> {
        &self.share
    }
}

impl Drop for UserConnection {
    fn drop(&mut self) {
        let mut all = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if self.share.connections.fetch_sub(1, Ordering::Relaxed) == 1 {
            all.remove(&self.user);
        }
    }
}

impl UserShare {
    /// Counts a channel or listener more; none if the user has `limit` already.
    pub(super) fn channel(self: &Arc<Self>, limit: usize) -> Option<UserChannel> {
        count_up_to(&self.channels, limit).then(|| UserChannel(Arc::clone(self)))
    }

    /// How many channels and listeners there are.
    pub(super) fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }
}

impl Drop for UserChannel {
    fn drop(&mut self) {
        self.0.channels.fetch_sub(1, Ordering::Relaxed);
    }
}

fn count_up_to(count: &AtomicUsize, limit: usize) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < limit).then_some(count + 1)).is_ok()
}

/// How many there are of something.
#[derive(Debug, Clone, Default)]
pub(super) struct Counter(Arc<AtomicUsize>);

/// One of them; it counts until it is dropped.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counter {
    /// Counts one more; none if there are `limit` already.
    pub(super) fn add(&self, limit: usize) -> Option<Counted> {
        count_up_to(&self.0, limit).then(|| Counted(Arc::clone(&self.0)))
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many of a hundred new connections are to be dropped when `count` others have not logged in: none below `from`,
/// all at `full`, and in between from `percent` on in proportion.
pub(super) fn early_drop_percent(count: usize, from: usize, percent: u32, full: usize) -> u32 {
    if count >= full {
        return 100;
    }
    if count < from {
        return 0;
    }
    let (steps, step) = (full - from, count - from);
    let rest = 100_u32.saturating_sub(percent);
    let more = u64::from(rest) * u64::try_from(step).unwrap_or(u64::MAX) / u64::try_from(steps).unwrap_or(u64::MAX);
    percent.saturating_add(u32::try_from(more).unwrap_or(rest)).min(100)
}

/// Connections that have not logged in, by source address: so that one source cannot keep all others out.
#[derive(Debug, Clone, Default)]
pub(super) struct Sources(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them; it counts until it is dropped.
#[derive(Debug)]
pub(super) struct SourceSlot {
    source: IpAddr,
    all: Sources,
}

impl Sources {
    /// Counts one more; none if this source has its part of `max_unauthenticated` already.
    pub(super) fn add(&self, source: IpAddr, max_unauthenticated: usize) -> Option<SourceSlot> {
        let limit = (max_unauthenticated / SOURCE_PART).max(SOURCE_LEAST);
        let source = network_of(source);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(source).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(SourceSlot { source, all: self.clone() })
    }
}

impl Drop for SourceSlot {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.source);
            }
        }
    }
}

/// Tries with enrolment codes, by source address.
pub(super) struct CodeTries(DefaultKeyedRateLimiter<IpAddr>);

impl CodeTries {
    pub(super) fn new(per_minute: u32) -> Self {
        Self(RateLimiter::keyed(Quota::per_minute(NonZeroU32::new(per_minute).unwrap_or(NonZeroU32::MIN))))
    }

    /// Counts a try; false if this source has had too many.
    pub(super) fn allow(&self, source: IpAddr) -> bool {
        if self.0.len() > MAX_SOURCES {
            self.0.retain_recent();
        }
        self.0.check_key(&network_of(source)).is_ok()
    }
}

/// Who counts as one source: an IPv4 address, or an IPv6 customer's network.
pub(super) fn network_of(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (u128::BITS - IPV6_PREFIX))))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_count_while_they_live() {
        let users = UserConnections::default();
        let first = users.add(1, 2).unwrap();
        let _second = users.add(1, 2).unwrap();
        assert!(users.add(1, 2).is_none());
        assert!(users.add(2, 2).is_some());
        drop(first);
        assert!(users.add(1, 2).is_some());
    }

    #[test]
    fn channels_count_over_all_connections_of_a_user() {
        let users = UserConnections::default();
        let (first, second) = (users.add(1, 2).unwrap(), users.add(1, 2).unwrap());
        let channel = first.share().channel(2).unwrap();
        let _other = second.share().channel(2).unwrap();
        assert!(first.share().channel(2).is_none() && second.share().channel(2).is_none());
        assert!(users.add(2, 1).unwrap().share().channel(2).is_some());
        // One that outlives its connection still counts.
        drop(first);
        assert_eq!(second.share().channels(), 2);
        drop(channel);
        assert!(second.share().channel(2).is_some());
    }

    #[test]
    fn a_source_has_a_part_of_the_door() {
        let sources = Sources::default();
        let crowd: IpAddr = "192.0.2.1".parse().unwrap();
        let mut slots: Vec<_> = (0..25).map(|_| sources.add(crowd, 100).unwrap()).collect();
        assert!(sources.add(crowd, 100).is_none());
        assert!(sources.add("::ffff:192.0.2.1".parse().unwrap(), 100).is_none());
        assert!(sources.add("192.0.2.2".parse().unwrap(), 100).is_some());
        slots.pop();
        assert!(sources.add(crowd, 100).is_some());
        drop(slots);
        assert!(sources.0.lock().unwrap().is_empty());
        // However small the door is, several people behind one address find room.
        let few = Sources::default();
        let slots: Vec<_> = (0..SOURCE_LEAST).map(|_| few.add(crowd, 8).unwrap()).collect();
        assert!(few.add(crowd, 8).is_none());
        drop(slots);
    }

    #[test]
    fn the_fuller_the_door_the_more_are_dropped() {
        let percent = |count| early_drop_percent(count, 100, 30, 200);
        assert_eq!([0, 99, 100, 150, 199, 200, 5000].map(percent), [0, 0, 30, 65, 99, 100, 100]);
        // Where it would begin beyond the most, nobody is dropped by chance.
        assert_eq!([1, 2].map(|count| early_drop_percent(count, 100, 30, 2)), [0, 100]);
        assert_eq!([99, 100].map(|count| early_drop_percent(count, 100, 30, 100)), [0, 100]);
        assert_eq!(early_drop_percent(150, 100, 100, 200), 100);
    }

    #[test]
    fn what_is_counted_counts_while_it_lives() {
        let counter = Counter::default();
        let (first, _second) = (counter.add(2).unwrap(), counter.add(2).unwrap());
        assert!(counter.add(2).is_none() && counter.count() == 2);
        drop(first);
        // A limit that has become smaller holds for those who come.
        assert!(counter.add(1).is_none() && counter.add(2).is_some());
    }

    #[test]
    fn tries_are_counted_by_source() {
        let tries = CodeTries::new(2);
        let alice: IpAddr = "2001:db8:0:a00::1".parse().unwrap();
        let neighbour: IpAddr = "2001:db8:0:aff::2".parse().unwrap();
        assert!(tries.allow(alice) && tries.allow(neighbour));
        assert!(!tries.allow(alice));
        assert!(tries.allow("2001:db8:0:b00::1".parse().unwrap()));
        assert!(tries.allow("192.0.2.1".parse().unwrap()));
        assert!(tries.allow("::ffff:192.0.2.1".parse().unwrap()));
        assert!(!tries.allow("192.0.2.1".parse().unwrap()));
    }
}
