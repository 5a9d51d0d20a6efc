//! Whether space is full or only fragmented: would a request fit if all that runs could be rearranged?

use super::{Pool, SlotState};
use crate::geometry::{Columns, Model, Placed, Profile, Resolution, Resources, maximal_layouts};
use std::{cmp::Reverse, collections::HashSet};

/// Why there is no room for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortage {
    /// However what runs were arranged, there would be none.
    Full,
    /// There would be, were what runs arranged otherwise.
    Fragmented,
    /// There may be: trying every arrangement would take too long.
    Unknown,
}

/// Why there is no room for what `wanted` comes to. GPUs with columns that are blocked are left as they are.
pub fn shortage(pool: &Pool, wanted: &Resolution) -> Shortage {
    let mut answer = Shortage::Full;
    for (at, model) in pool.models().iter().enumerate() {
        let Some(profile) = wanted.on(at) else { continue };
        let mut counts = vec![0; model.profiles().len()];
        let mut gpus = 0;
        let movable = |space: &&super::Space| space.model == at && space.usable && space.layout().blocked().is_empty();
        for space in pool.gpus().iter().filter(movable) {
            gpus += 1;
            for placed in space.layout().placed() {
                add(&mut counts, placed.profile);
            }
        }
        add(&mut counts, profile);
        match Repacking::new(model).fits(&counts, gpus) {
            Some(true) => return Shortage::Fragmented,
            Some(false) => {}
            None => answer = Shortage::Unknown,
        }
    }
    answer
}

/// Held slots each of whose ends alone would make room for what `wanted` comes to: GPU and slot.
pub fn single_ends(pool: &Pool, wanted: &Resolution) -> Vec<(usize, Placed)> {
    let mut found = Vec::new();
    for gpus in pool.groups() {
        let Some(space) = gpus.first().and_then(|gpu| pool.gpus().get(*gpu)) else { continue };
        let (Some(model), Some(profile)) = (pool.models().get(space.model), wanted.on(space.model)) else { continue };
        for placed in space.layout().placed() {
            let mut without = space.clone();
            without.set(model, *placed, SlotState::Idle { reusable: true });
            if without.room(model, profile) > 0 {
                found.extend(gpus.iter().map(|gpu| (*gpu, *placed)));
            }
        }
    }
    found
}

fn add(counts: &mut [u32], profile: usize) {
    counts.iter_mut().skip(profile).take(1).for_each(|count| *count += 1);
}

/// Whether numbers of instances fit on a number of GPUs of one model in some arrangement.
#[derive(Debug)]
pub struct Repacking<'a> {
    model: &'a Model,
    /// What each profile is in the closed form, where it is one of its kinds.
    kinds: Vec<Option<Kind>>,
}

/// The kinds of instances of a GPU with seven compute slices and eight columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// All of it.
    Whole,
    /// Four columns, only at the beginning.
    LowHalf,
    /// Four columns, in either half.
    Half,
    /// Two columns, not the last two.
    Pair,
    /// Any two of the four pairs.
    AnyPair,
    /// One column, not the last.
    Single,
}

/// So many states are looked at before a search is given up.
const STATES: usize = 20_000;
/// A search over longer axes, or more places, is not begun.
const LONGEST: u32 = 16;
const PLACES: usize = 40;

impl<'a> Repacking<'a> {
    /// For GPUs of this model.
    pub fn new(model: &'a Model) -> Self {
        let kind = |profile: &Profile| {
            let starts: Vec<u32> = profile.spans().map(|(start, _)| start).collect();
            let kind = match (profile.columns, starts.as_slice()) {
                (8, [0]) => Kind::Whole,
                (4, [0]) => Kind::LowHalf,
                (4, [0, 4]) => Kind::Half,
                (2, [0, 2, 4]) => Kind::Pair,
                (2, [0, 2, 4, 6]) => Kind::AnyPair,
                (1, [0, 1, 2, 3, 4, 5, 6]) => Kind::Single,
                _ => return None,
            };
            // Where engines limit how many there can be, columns are not all that counts.
            let free = profile.max_instances as usize >= starts.len();
            (model.columns == 8 && model.capacity.compute == 7 && profile.is_plain() && free).then_some(kind)
        };
        Self { model, kinds: model.profiles().iter().map(kind).collect() }
    }

    /// Whether `counts` instances of each profile fit on `gpus` GPUs; none if it takes too long to tell.
    pub fn fits(&self, counts: &[u32], gpus: usize) -> Option<bool> {
        self.closed_form(counts, gpus).or_else(|| self.search(counts, gpus))
    }

    /// Exact where all instances are of the known kinds: each kind goes where it is least in the way of those
    /// that come after it, and by exchange nothing is lost by that.
    fn closed_form(&self, counts: &[u32], gpus: usize) -> Option<bool> {
        let mut sums = [0i64; 6];
        for (count, kind) in counts.iter().zip(&self.kinds).filter(|(count, _)| **count > 0) {
            let kind = (*kind)? as usize;
            sums.iter_mut().skip(kind).take(1).for_each(|sum| *sum += i64::from(*count));
        }
        let [whole, low_half, half, pair, any_pair, single] = sums;
        let gpus = i64::try_from(gpus).ok()? - whole;
        // The upper half has one pair that is whole, and one of which a single or an any-pair takes all.
        let upper = gpus - half.min(gpus);
        let lower = gpus - low_half - (half - half.min(gpus));
        let last = any_pair.min(upper);
        let pairs = 2 * lower + upper - pair - (any_pair - last);
        let singles = 2 * pairs + (upper - last);
        Some(gpus >= 0 && lower >= 0 && pairs >= 0 && single <= singles)
    }

    fn search(&self, counts: &[u32], gpus: usize) -> Option<bool> {
        let each = || self.model.profiles().iter().zip(counts.iter().copied()).filter(|(_, count)| *count > 0);
        let columns: u64 = each().map(|(profile, count)| u64::from(profile.columns) * u64::from(count)).sum();
        if columns > u64::from(self.model.columns) * gpus as u64 {
            return Some(false);
        }
        if self.greedy(counts, gpus) {
            return Some(true);
        }
        let places: usize = each().map(|(profile, _)| profile.spans().count()).sum();
        if self.model.columns > LONGEST || places > PLACES {
            return None;
        }
        let asked = |index: usize| counts.get(index).is_some_and(|count| *count > 0);
        let mut fillings: Vec<Vec<u32>> =
            maximal_layouts(self.model, asked).iter().map(|layout| self.count(layout)).collect();
        fillings.sort_unstable_by_key(|filling| Reverse(filling.clone()));
        fillings.dedup();
        let mut search = Search { fillings: &fillings, seen: HashSet::new() };
        search.fits(counts, gpus, 0)
    }

    fn count(&self, layout: &[Placed]) -> Vec<u32> {
        let mut counts = vec![0; self.model.profiles().len()];
        layout.iter().for_each(|placed| add(&mut counts, placed.profile));
        counts
    }

    /// Fills GPU after GPU with the largest that fits, where it leaves most room: proof that it can be done,
    /// if it comes out.
    fn greedy(&self, counts: &[u32], gpus: usize) -> bool {
        let mut left = counts.to_vec();
        let mut order: Vec<(usize, &Profile)> = self.model.profiles().iter().enumerate().collect();
        order.sort_by_key(|(_, profile)| Reverse((profile.columns, profile.resources.compute)));
        for _ in 0..gpus {
            if left.iter().all(|count| *count == 0) {
                return true;
            }
            let (mut taken, mut used) = (Columns::NONE, Resources::NONE);
            for (index, profile) in &order {
                let mut of_kind = 0;
                while left.get(*index).is_some_and(|count| *count > 0) && of_kind < profile.max_instances {
                    let more = used.plus(profile.resources);
                    let room = |span: Columns| {
                        let each = self.model.profiles().iter().enumerate();
                        each.map(|(at, p)| self.model.room(at, taken | span) * p.columns).sum::<u32>()
                    };
                    let free = profile.spans().map(|(_, span)| span).filter(|span| !span.overlaps(taken));
                    let Some(span) = free.max_by_key(|span| room(*span)).filter(|_| more.within(self.model.capacity))
                    else {
                        break;
                    };
                    (taken, used, of_kind) = (taken | span, more, of_kind + 1);
                    left.iter_mut().skip(*index).take(1).for_each(|count| *count -= 1);
                }
            }
        }
        left.iter().all(|count| *count == 0)
    }
}

struct Search<'a> {
    /// What a full GPU can hold, each once.
    fillings: &'a [Vec<u32>],
    /// States from which nothing came: what is left, GPUs and the first filling to try.
    seen: HashSet<(Vec<u32>, usize, usize)>,
}

impl Search<'_> {
    /// Whether what is left fits, using fillings from the `first` on: their order does not matter.
    fn fits(&mut self, left: &[u32], gpus: usize, first: usize) -> Option<bool> {
        if left.iter().all(|count| *count == 0) {
            return Some(true);
        }
        if gpus == 0 || self.seen.contains(&(left.to_vec(), gpus, first)) {
            return Some(false);
        }
        if self.seen.len() >= STATES {
            return None;
        }
        let mut sure = true;
        for (at, filling) in self.fillings.iter().enumerate().skip(first) {
            let rest: Vec<u32> = left.iter().zip(filling).map(|(left, filled)| left.saturating_sub(*filled)).collect();
            if rest == left {
                continue;
            }
            match self.fits(&rest, gpus - 1, at) {
                Some(true) => return Some(true),
                Some(false) => {}
                None => sure = false,
            }
            if !sure {
                return None;
            }
        }
        self.seen.insert((left.to_vec(), gpus, first));
        Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::facts;
    use proptest::prelude::*;

    /// Every multiset that fits on one GPU, and on more by adding them up.
    fn reachable(model: &Model, gpus: usize, but: impl Fn(usize) -> bool) -> HashSet<Vec<u32>> {
        let repacking = Repacking::new(model);
        let one: HashSet<Vec<u32>> =
            crate::geometry::legal_layouts(model, but).iter().map(|layout| repacking.count(layout)).collect();
        let mut all = one.clone();
        for _ in 1..gpus {
            let sum = |a: &Vec<u32>, b: &Vec<u32>| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<u32>>();
            all = all.iter().flat_map(|a| one.iter().map(move |b| sum(a, b))).collect();
        }
        all
    }

    #[test]
    fn the_closed_form_is_what_can_be_laid_out() {
        for key in ["A100-40GB", "A100-80GB", "H100-80GB"] {
            let model = facts::model(key);
            let plain: Vec<bool> = model.profiles().iter().map(Profile::is_plain).collect();
            let repacking = Repacking::new(&model);
            for gpus in [1, 2] {
                let fitting = reachable(&model, gpus, |index| plain[index]);
                let beyond = fitting.iter().flat_map(|counts| {
                    let more = |index: usize| {
                        let mut more = counts.clone();
                        more[index] += 1;
                        more
                    };
                    (0..plain.len()).filter(|index| plain[*index]).map(more)
                });
                for counts in beyond.collect::<HashSet<_>>().iter().chain(&fitting) {
                    let expected = fitting.contains(counts);
                    assert_eq!(repacking.closed_form(counts, gpus), Some(expected), "{key} {counts:?} on {gpus}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_search_is_what_can_be_laid_out(
            key in prop::sample::select(vec!["A30-24GB", "A100-40GB", "RTX-PRO-6000-Blackwell-96GB"]),
            picks in prop::collection::vec(0usize..16, 1..9),
        ) {
            let model = facts::model(key);
            let plain: Vec<usize> = (0..model.profiles().len()).filter(|at| model.profiles()[*at].is_plain()).collect();
            let mut counts = vec![0; model.profiles().len()];
            picks.iter().for_each(|pick| counts[plain[pick % plain.len()]] += 1);
            let found = Repacking::new(&model).search(&counts, 2);
            let fitting = reachable(&model, 2, |index| plain.contains(&index));
            prop_assert_eq!(found, Some(fitting.contains(&counts)));
        }
    }

    #[test]
    fn full_is_told_from_fragmented() {
        let model = std::sync::Arc::new(facts::model("A100-40GB"));
        let at = |name: &str, start| Placed {
            profile: model.profiles().iter().position(|profile| profile.name == name).unwrap(),
            start,
        };
        let wanted = crate::geometry::resolve(&"4g.20gb".parse().unwrap(), std::slice::from_ref(&model)).unwrap();
        let mut pool = Pool::new(vec![model.clone()], vec![super::super::Space::empty(0); 2]);
        for gpu in 0..2 {
            pool.change(gpu, |model, space| space.set(model, at("1g.5gb", 2), SlotState::Held));
        }
        assert_eq!(shortage(&pool, &wanted), Shortage::Fragmented);
        assert_eq!(single_ends(&pool, &wanted), [(0, at("1g.5gb", 2)), (1, at("1g.5gb", 2))]);
        pool.change(0, |model, space| space.set(model, at("1g.5gb", 3), SlotState::Held));
        assert_eq!(single_ends(&pool, &wanted), [(1, at("1g.5gb", 2))]);
        for gpu in 0..2 {
            pool.change(gpu, |model, space| space.set(model, at("3g.20gb", 4), SlotState::Held));
            pool.change(gpu, |model, space| space.set(model, at("2g.10gb", 0), SlotState::Held));
        }
        assert_eq!(shortage(&pool, &wanted), Shortage::Full);
        assert_eq!(single_ends(&pool, &wanted), []);
    }
}
