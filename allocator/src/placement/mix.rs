//! What is asked for, learned from what was asked.

use crate::geometry::Profile;
use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

/// How often each profile is asked for: seen requests, fading, over a prior that expects every base profile
/// equally and variants not at all.
///
/// Weights stand still while a sixteenth of what was seen comes in, so that what is worked out from them can
/// be kept meanwhile.
#[derive(Debug, Clone, Default)]
pub struct Mix {
    seen: BTreeMap<String, u64>,
    total: u64,
    /// What [`Self::weight`] tells: `seen` as it was when it last settled.
    settled: BTreeMap<String, u64>,
    /// Requests until it settles again.
    pause: u64,
    /// Of `settled`.
    fingerprint: u64,
}

impl Mix {
    /// One request weighs this much, so that halving keeps a fraction.
    const ONE: u64 = 1024;
    /// The prior of each base profile, in requests.
    const PRIOR: u64 = 16 * Self::ONE;
    /// When this much has been seen, all of it counts half from then on.
    const HORIZON: u64 = 2048 * Self::ONE;
    /// The most different names counted.
    const NAMES: usize = 256;

    /// Counts a request for a profile. True if weights changed.
    pub fn see(&mut self, profile: &str) -> bool {
        let names = self.seen.len();
        match self.seen.get_mut(profile) {
            Some(count) => *count += Self::ONE,
            None if names >= Self::NAMES => return false,
            None => {
                self.seen.insert(profile.to_owned(), Self::ONE);
            }
        }
        self.total += Self::ONE;
        if self.total > Self::HORIZON {
            self.seen.retain(|_, count| {
                *count /= 2;
                *count > 0
            });
            self.total = self.seen.values().sum();
        }
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        self.settled.clone_from(&self.seen);
        let mut hasher = DefaultHasher::new();
        self.settled.hash(&mut hasher);
        self.fingerprint = hasher.finish();
        self.pause = self.total / Self::ONE / 16;
        true
    }

    /// The weight of a profile.
    pub fn weight(&self, profile: &Profile) -> u64 {
        let prior = if profile.is_plain() { Self::PRIOR } else { 0 };
        prior + self.settled.get(&profile.name).copied().unwrap_or(0)
    }

    /// Equal for mixes whose weights are equal.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}
