//! How much one source or one user may take: connections of a user, tries with enrolment codes.

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
};

/// Sources remembered before those that have been quiet are forgotten.
const MAX_SOURCES: usize = 4096;
/// Bits of an IPv6 address that are one source: what one customer has.
const IPV6_PREFIX: u32 = 56;

/// The connections every user has open.
#[derive(Debug, Clone, Default)]
pub(super) struct UserConnections(Arc<Mutex<HashMap<i64, usize>>>);

/// One open connection of a user; it counts until it is dropped.
#[derive(Debug)]
pub(super) struct UserConnection {
    user: i64,
    all: UserConnections,
}

impl UserConnections {
    /// Counts one more; none if the user has `limit` already.
    pub(super) fn add(&self, user: i64, limit: usize) -> Option<UserConnection> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(user).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(UserConnection { user, all: self.clone() })
    }
}

impl Drop for UserConnection {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.user);
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
fn network_of(source: IpAddr) -> IpAddr {
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
