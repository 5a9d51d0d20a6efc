//! One run: requests come, are placed by the real planner, and end.

use super::{Arrival, a100};
use crate::{
    geometry::{Model, Placed, Resolution, resolve},
    placement::{Action, Policy, Pool, Space, plan},
};
use mlad::api::Need;
use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

/// What happens to a request for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is lost.
    Loss,
    /// It waits; first come, first served.
    Queue,
}

/// What was counted.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Requests.
    pub offered: u64,
    /// Of them placed.
    pub accepted: u64,
    /// Columns of the requests.
    pub offered_columns: u64,
    /// Columns of those placed.
    pub accepted_columns: u64,
    /// How many decisions took how long.
    pub decisions: Durations,
    /// Instances that were made, rather than found idle.
    pub made: u64,
    /// Instances that were destroyed for that.
    pub destroyed: u64,
    /// Columns held, integrated over time.
    pub busy: f64,
    /// Columns there are, integrated over the same time.
    pub there: f64,
    /// How long requests waited, by profile.
    pub waits: Vec<Vec<f64>>,
}

impl Tally {
    /// Accepted requests in percent.
    pub fn requests(&self) -> f64 {
        100.0 * self.accepted as f64 / self.offered.max(1) as f64
    }

    /// Accepted slices, which is columns, in percent.
    pub fn slices(&self) -> f64 {
        100.0 * self.accepted_columns as f64 / self.offered_columns.max(1) as f64
    }

    /// Columns held, of those there are, in percent.
    pub fn utilisation(&self) -> f64 {
        100.0 * self.busy / self.there.max(f64::MIN_POSITIVE)
    }

    /// How long requests for a profile waited: the wait that this part of them does not exceed.
    pub fn wait(&self, profile: usize, part: f64) -> Option<f64> {
        let mut waits = self.waits.get(profile)?.clone();
        waits.sort_by(f64::total_cmp);
        let at = (part * waits.len() as f64).ceil() as usize;
        waits.get(at.saturating_sub(1)).copied()
    }

    pub(super) fn add(&mut self, other: Self) {
        self.offered += other.offered;
        self.accepted += other.accepted;
        self.offered_columns += other.offered_columns;
        self.accepted_columns += other.accepted_columns;
        self.decisions.add(&other.decisions);
        self.made += other.made;
        self.destroyed += other.destroyed;
        self.busy += other.busy;
        self.there += other.there;
        self.waits.resize(self.waits.len().max(other.waits.len()), Vec::new());
        for (waits, more) in self.waits.iter_mut().zip(other.waits) {
            waits.extend(more);
        }
    }

    /// Counts a request.
    pub(super) fn offer(&mut self, columns: u32) {
        self.offered += 1;
        self.offered_columns += u64::from(columns);
    }

    /// Counts it as placed.
    pub(super) fn accept(&mut self, columns: u32) {
        self.accepted += 1;
        self.accepted_columns += u64::from(columns);
    }
}

/// How long decisions took. The middle one is told: on a busy machine a few are interrupted.
#[derive(Debug, Clone, Default)]
pub struct Durations(Vec<u32>);

impl Durations {
    /// Nanoseconds that are counted as one.
    const STEP: usize = 8;
    /// So many steps are told apart.
    const STEPS: usize = 4096;

    fn count(&mut self, duration: Duration) {
        self.0.resize(Self::STEPS, 0);
        let step = usize::try_from(duration.as_nanos()).unwrap_or(usize::MAX) / Self::STEP;
        self.0.iter_mut().skip(step.min(Self::STEPS - 1)).take(1).for_each(|count| *count += 1);
    }

    fn add(&mut self, other: &Self) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(count, more)| *count += more);
    }

    /// Nanoseconds of the middle one.
    pub fn median(&self) -> u64 {
        let all: u64 = self.0.iter().copied().map(u64::from).sum();
        let mut below = 0;
        let middle = self.0.iter().position(|count| {
            below += u64::from(*count);
            below * 2 >= all
        });
        (middle.unwrap_or(0) * Self::STEP + Self::STEP / 2) as u64
    }
}

/// Something that ends at a time; the earliest is the greatest, as a heap wants it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends<T> {
    pub(super) at: f64,
    pub(super) what: T,
}

impl<T> Ord for Ends<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        Reverse(self.at.to_bits()).cmp(&Reverse(other.at.to_bits()))
    }
}

impl<T> PartialOrd for Ends<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Ends<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<T> Eq for Ends<T> {}

struct Run {
    model: Arc<Model>,
    wanted: Vec<Resolution>,
    policy: Box<dyn Policy>,
    pool: Pool,
    running: BinaryHeap<Ends<(usize, Placed)>>,
    waiting: VecDeque<(usize, Arrival)>,
    now: f64,
    held: u32,
    tally: Tally,
}

/// Places requests by `policy` on so many GPUs; the first `warm_up` are not counted.
pub(super) fn run(
    policy: Box<dyn Policy>,
    gpus: usize,
    mode: Mode,
    arrivals: impl Iterator<Item = Arrival>,
    warm_up: usize,
) -> Tally {
    let model = a100();
    let models = [Arc::clone(&model)];
    let need = |name: &String| resolve(&Need::Profile(name.clone()), &models).ok();
    let wanted = model.profiles().iter().filter_map(|profile| need(&profile.name)).collect();
    let pool = Pool::new(models.to_vec(), vec![Space::empty(0); gpus]);
    let tally = Tally { waits: vec![Vec::new(); model.profiles().len()], ..Tally::default() };
    let (running, waiting) = Default::default();
    let mut run = Run { model, wanted, policy, pool, running, waiting, now: 0.0, held: 0, tally };
    for (number, arrival) in arrivals.enumerate() {
        run.until(arrival.at, warm_up);
        if number == warm_up {
            run.tally = Tally { waits: vec![Vec::new(); run.model.profiles().len()], ..Tally::default() };
        }
        if let Some(wanted) = run.wanted.get(arrival.profile) {
            run.policy.see(&wanted.profile);
        }
        run.tally.offer(run.columns(arrival.profile));
        match mode {
            Mode::Queue => {
                run.waiting.push_back((number, arrival));
                run.serve(warm_up);
            }
            Mode::Loss => {
                if run.place(&arrival) {
                    run.tally.accept(run.columns(arrival.profile));
                }
            }
        }
    }
    run.drain(warm_up);
    run.tally
}

impl Run {
    fn columns(&self, profile: usize) -> u32 {
        self.model.profile(profile).map_or(0, |profile| profile.columns)
    }

    /// Lets time pass: what ends in it ends, and who waits is served.
    fn until(&mut self, time: f64, warm_up: usize) {
        while let Some(Ends { at, what: (gpu, placed) }) = self.running.peek().copied().filter(|end| end.at <= time) {
            self.running.pop();
            self.pass(at);
            self.pool.release(gpu, placed);
            self.held -= self.columns(placed.profile);
            self.serve(warm_up);
        }
        self.pass(time);
    }

    fn pass(&mut self, time: f64) {
        let passed = time - self.now;
        self.tally.busy += passed * f64::from(self.held);
        self.tally.there += passed * self.pool.gpus().len() as f64 * f64::from(self.model.columns);
        self.now = time;
    }

    /// Serves who still waits. No more comes, so that how much is in use tells nothing any more.
    fn drain(&mut self, warm_up: usize) {
        let (busy, there) = (self.tally.busy, self.tally.there);
        while !self.waiting.is_empty()
            && let Some(next) = self.running.peek().map(|end| end.at)
        {
            self.until(next, warm_up);
        }
        (self.tally.busy, self.tally.there) = (busy, there);
    }

    /// Serves who waits, in order, as far as there is room.
    fn serve(&mut self, warm_up: usize) {
        while let Some((number, arrival)) = self.waiting.front().copied() {
            if !self.place(&arrival) {
                return;
            }
            self.waiting.pop_front();
            if number >= warm_up {
                self.tally.accept(self.columns(arrival.profile));
                let waits = self.tally.waits.get_mut(arrival.profile);
                waits.into_iter().for_each(|waits| waits.push(self.now - arrival.at));
            }
        }
    }

    fn place(&mut self, arrival: &Arrival) -> bool {
        let Some(wanted) = self.wanted.get(arrival.profile) else { return false };
        self.pool.price(&self.policy);
        let begun = Instant::now();
        let plan = plan(&self.pool, wanted, &self.policy, |_, _| true);
        self.tally.decisions.count(begun.elapsed());
        let Some(plan) = plan else { return false };
        if let Action::Make { destroy } = &plan.action {
            self.tally.made += 1;
            self.tally.destroyed += destroy.len() as u64;
        }
        self.pool.occupy(&plan);
        self.running.push(Ends { at: self.now + arrival.life, what: (plan.gpu, plan.placed) });
        self.held += self.columns(arrival.profile);
        true
    }
}
