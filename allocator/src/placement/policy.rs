//! What a placement costs.

use crate::geometry::{Columns, Model, Profile};
use std::collections::HashMap;

/// What a placement costs: the one thing policies differ in.
pub trait Policy: Send + Sync {
    /// The cost of taking `span` on a GPU of `model` whose `held` columns are taken already. Less is better;
    /// only costs of one decision are compared.
    fn cost(&self, model: &Model, held: Columns, span: Columns) -> u64;
}

/// Expected lost capacity: how many columns' worth of instances of what is asked for next no longer fit,
/// each profile weighed by how often it is asked for. (Columns rather than plain counts: measured, equal in
/// requests accepted and better in slices.)
#[derive(Debug, Clone, Default)]
pub struct ExpectedLoss {
    /// What is asked for.
    pub mix: Mix,
}

impl Policy for ExpectedLoss {
    fn cost(&self, model: &Model, held: Columns, span: Columns) -> u64 {
        let lost = |index: usize, profile: &Profile| {
            let room = model.room(index, held) - model.room(index, held | span);
            u64::from(room) * u64::from(profile.columns) * self.mix.weight(profile)
        };
        model.profiles().iter().enumerate().map(|(index, profile)| lost(index, profile)).sum()
    }
}

/// How often each profile is asked for: seen requests, fading, over a prior that expects every base profile
/// equally and variants not at all.
#[derive(Debug, Clone, Default)]
pub struct Mix {
    seen: HashMap<String, u64>,
    total: u64,
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

    /// Counts a request for a profile.
    pub fn see(&mut self, profile: &str) {
        if self.seen.len() >= Self::NAMES && !self.seen.contains_key(profile) {
            return;
        }
        *self.seen.entry(profile.to_owned()).or_default() += Self::ONE;
        self.total += Self::ONE;
        if self.total > Self::HORIZON {
            self.seen.retain(|_, count| {
                *count /= 2;
                *count > 0
            });
            self.total = self.seen.values().sum();
        }
    }

    /// The weight of a profile.
    pub fn weight(&self, profile: &Profile) -> u64 {
        let prior = if profile.is_plain() { Self::PRIOR } else { 0 };
        prior + self.seen.get(&profile.name).copied().unwrap_or(0)
    }
}
