//! How good policies are: simulated GPUs under simulated or recorded requests.
//!
//! The real [`Pool`](crate::placement::Pool) and [`plan`](crate::placement::plan) place every request; only
//! arrivals, lives and the driver are made up. Nothing here touches a GPU.
//!
//! * [`Traffic`] — what is asked for, and when: [`Shares`] of profiles at a load, or a recorded trace.
//! * [`Experiment`] — the same traffic for one policy after another; [`Outcome`] is what came of it.

mod bound;
mod engine;
mod traffic;

pub use engine::{Durations, Mode, Tally};
pub use traffic::{Arrival, Shares, Traffic, a100, read_trace};

use crate::placement::{Objective, PolicyName};
use std::{
    fmt,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

/// Who places: a policy, or the bound that none can beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placer {
    /// A policy.
    Policy(PolicyName),
    /// No placement at all: a request is accepted whenever all that is held could be rearranged to make room.
    /// No policy that may not move what runs can be expected to do better.
    Repacking,
}

impl Placer {
    /// Every policy, and the bound.
    pub fn all() -> Vec<Self> {
        PolicyName::ALL.into_iter().map(Self::Policy).chain([Self::Repacking]).collect()
    }
}

impl fmt::Display for Placer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(name) => name.fmt(f),
            Self::Repacking => f.write_str("repacking-bound"),
        }
    }
}

impl FromStr for Placer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "repacking-bound" => Ok(Self::Repacking),
            name => name.parse().map(Self::Policy).map_err(|error| format!("{error}, repacking-bound")),
        }
    }
}

/// The same requests for one policy after another.
#[derive(Debug, Clone)]
pub struct Experiment {
    /// How many A100-40GB there are.
    pub gpus: usize,
    /// What is asked for.
    pub traffic: Traffic,
    /// What happens to a request for which there is no room.
    pub mode: Mode,
    /// What is to be as many as possible.
    pub objective: Objective,
    /// Seeds 1 to this number; a trace is the same for each.
    pub seeds: u64,
}

/// What came of an experiment with one policy.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// All seeds together.
    pub tally: Tally,
    /// Accepted requests and slices of each seed, in percent.
    pub by_seed: Vec<(f64, f64)>,
}

impl Experiment {
    /// Runs every seed with one policy; on all processors, with a result that does not depend on them.
    pub fn run(&self, placer: Placer) -> Outcome {
        let next = AtomicU64::new(1);
        let workers =
            thread::available_parallelism().map_or(1, |n| n.get()).min(usize::try_from(self.seeds).unwrap_or(1));
        let work = || {
            let mut done = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed > self.seeds {
                    return done;
                }
                done.push((seed, self.run_seed(placer, seed)));
            }
        };
        let mut done: Vec<(u64, Tally)> = thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            // A worker does not panic; if one did, what the others found would still be told.
            workers.into_iter().filter_map(|worker| worker.join().ok()).flatten().collect()
        });
        done.sort_by_key(|(seed, _)| *seed);
        let mut outcome = Outcome::default();
        for (_, tally) in done {
            outcome.by_seed.push((tally.requests(), tally.slices()));
            outcome.tally.add(tally);
        }
        outcome
    }

    fn run_seed(&self, placer: Placer, seed: u64) -> Tally {
        let arrivals = self.traffic.arrivals(self.gpus, self.mode, seed);
        let warm_up = self.traffic.warm_up(self.gpus);
        match placer {
            Placer::Repacking => bound::run(self.gpus, arrivals, warm_up),
            Placer::Policy(name) => engine::run(name.policy(self.objective), self.gpus, self.mode, arrivals, warm_up),
        }
    }
}

#[cfg(test)]
mod tests;
