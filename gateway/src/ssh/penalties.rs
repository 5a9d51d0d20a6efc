//! Penalties of sources whose connections come to nothing: each offence shuts them out for longer.
//!
//! Pure but for the lock; the time is an argument. A penalty holds only when several have come together, so that
//! whoever takes the wrong key once is not met by it.

use super::limits::network_of;
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A penalty up to this long is not yet enforced.
const FORGIVEN: Duration = Duration::from_secs(15);
/// Sources remembered; when they are more, those whose penalties end first are forgotten.
const MAX_SOURCES: usize = 65_536;

/// What a connection has done that came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offence {
    /// It tried to log in and could not.
    Failed,
    /// It did not try.
    Silent,
    /// It was still not in at the end of the grace time.
    Slow,
    /// It did not speak SSH.
    Garbage,
}

impl Offence {
    fn penalty(self) -> Duration {
        Duration::from_secs(match self {
            Self::Silent => 1,
            Self::Failed | Self::Garbage => 5,
            Self::Slow => 10,
        })
    }
}

/// Until when sources pay.
#[derive(Debug, Default)]
pub(super) struct Penalties(Mutex<HashMap<IpAddr, Instant>>);

impl Penalties {
    /// Counts an offence of a source. No penalty is longer than `most`; none is counted if that is nothing.
    pub(super) fn add(&self, source: IpAddr, offence: Offence, most: Duration, now: Instant) {
        if most.is_zero() {
            return;
        }
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let source = network_of(source);
        if until.len() >= MAX_SOURCES && !until.contains_key(&source) {
            make_room(&mut until, now);
        }
        let end = until.entry(source).or_insert(now);
        *end = ((*end).max(now) + offence.penalty()).min(now + most);
    }

    /// Whether a source is shut out.
    pub(super) fn holds(&self, source: IpAddr, now: Instant) -> bool {
        let until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.get(&network_of(source)).is_some_and(|end| end.saturating_duration_since(now) > FORGIVEN)
    }
}

/// Forgets those who have paid, or the half that pays least.
fn make_room(until: &mut HashMap<IpAddr, Instant>, now: Instant) {
    until.retain(|_, end| *end > now);
    if until.len() >= MAX_SOURCES {
        let mut ends: Vec<Instant> = until.values().copied().collect();
        let middle = ends.len() / 2;
        let (_, median, _) = ends.select_nth_unstable(middle);
        let median = *median;
        until.retain(|_, end| *end > median);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MOST: Duration = Duration::from_secs(600);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_mistake_is_forgiven_and_a_habit_is_not() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        let scanner = ip("192.0.2.7");
        for _ in 0..3 {
            penalties.add(scanner, Offence::Failed, MOST, now);
            assert!(!penalties.holds(scanner, now));
        }
        penalties.add(scanner, Offence::Silent, MOST, now);
        assert!(penalties.holds(scanner, now) && penalties.holds(ip("::ffff:192.0.2.7"), now));
        assert!(!penalties.holds(ip("192.0.2.8"), now));
        assert!(!penalties.holds(scanner, now + Duration::from_secs(1)), "it ends by itself");
        // And is no longer than it may be.
        for _ in 0..1000 {
            penalties.add(scanner, Offence::Slow, MOST, now);
        }
        assert!(penalties.holds(scanner, now + MOST - FORGIVEN - Duration::from_secs(1)));
        assert!(!penalties.holds(scanner, now + MOST - FORGIVEN));
    }

    #[test]
    fn a_source_of_ipv6_is_a_customer() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        for host in 1..=4 {
            penalties.add(ip(&format!("2001:db8:0:a0{host}::{host}")), Offence::Garbage, MOST, now);
        }
        assert!(penalties.holds(ip("2001:db8:0:aff::1"), now) && !penalties.holds(ip("2001:db8:0:b00::1"), now));
    }

    #[test]
    fn without_a_longest_penalty_there_is_none() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        for _ in 0..100 {
            penalties.add(ip("192.0.2.7"), Offence::Slow, Duration::ZERO, now);
        }
        assert!(!penalties.holds(ip("192.0.2.7"), now) && penalties.0.lock().unwrap().is_empty());
    }

    #[test]
    fn those_who_pay_most_are_remembered_when_there_are_too_many() {
        let (penalties, now) = (Penalties::default(), Instant::now());
        let worst = ip("192.0.2.7");
        for _ in 0..10 {
            penalties.add(worst, Offence::Slow, MOST, now);
        }
        for number in 0..MAX_SOURCES as u32 + 10 {
            penalties.add(IpAddr::from(number.to_be_bytes()), Offence::Silent, MOST, now);
        }
        assert!(penalties.holds(worst, now));
        assert!(penalties.0.lock().unwrap().len() <= MAX_SOURCES);
    }

    proptest! {
        #[test]
        fn a_penalty_never_exceeds_the_longest(offences in proptest::collection::vec((0..4_usize, 0..1000_u64), 1..50)) {
            let (penalties, begin) = (Penalties::default(), Instant::now());
            let all = [Offence::Failed, Offence::Silent, Offence::Slow, Offence::Garbage];
            let mut now = begin;
            for (which, pause) in offences {
                now += Duration::from_secs(pause);
                penalties.add(ip("192.0.2.7"), all[which], MOST, now);
            }
            prop_assert!(!penalties.holds(ip("192.0.2.7"), now + MOST));
        }
    }
}
