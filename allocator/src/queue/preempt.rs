//! What would have to end for who is first in line.

use super::{Entry, Held, Scene, ahead::Kept, pass::is_on, timeline::Timeline};
use crate::{
    geometry::{Columns, Placed},
    placement::{Pool, plan_all},
};
use std::collections::{BTreeMap, BTreeSet};

/// Leases that are to end, with notice, for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preemption {
    /// The request that they give way to.
    pub seq: u64,
    /// Their fences.
    pub fences: BTreeSet<u64>,
}

/// The leases that have to give way to a request: of less priority, and willing. As few as can be, those of the
/// least priority first, then those that have run the least. None if the request has its space within the notice
/// all the same, or if that does not help.
pub(super) fn preemption(
    entry: &Entry,
    kept: Option<Kept>,
    pool: &Pool,
    timeline: &Timeline<'_>,
    scene: &Scene<'_>,
) -> Option<Preemption> {
    let told = scene.now.checked_add(scene.rules.notice).ok()?;
    let soon = kept.and_then(|kept| kept.from).is_some_and(|from| from <= told);
    let willing: Vec<&Held> =
        timeline.held().filter(|held| held.preemptible.is_some_and(|priority| priority < entry.priority)).collect();
    if soon || willing.is_empty() {
        return None;
    }
    let fences = match entry.gang.slices {
        1 => for_one(entry, pool, timeline, scene, &willing),
        _ => for_all(entry, pool, timeline, scene, &willing),
    }?;
    // Nothing is in the way: it is not space that it waits for.
    (!fences.is_empty()).then_some(Preemption { seq: entry.seq, fences })
}

fn for_one(
    entry: &Entry,
    pool: &Pool,
    timeline: &Timeline<'_>,
    scene: &Scene<'_>,
    willing: &[&Held],
) -> Option<BTreeSet<u64>> {
    let future = without(pool, willing);
    let mut by_gpu: BTreeMap<usize, Vec<&Held>> = BTreeMap::new();
    willing.iter().for_each(|held| by_gpu.entry(held.gpu).or_default().push(held));
    let mut best = None;
    for (gpu, held) in by_gpu.into_iter().filter(|(gpu, _)| is_on(pool, *gpu, entry)) {
        let Some(space) = future.gpus().get(gpu).filter(|space| space.usable) else { continue };
        let Some(model) = future.models().get(space.model) else { continue };
        let Some(profile) = entry.wanted.as_ref().and_then(|wanted| wanted.on(space.model)) else { continue };
        for (start, span) in model.profile(profile).into_iter().flat_map(|profile| profile.spans()) {
            let placed = Placed { profile, start };
            let free = timeline.fits(&future, (gpu, placed), scene.now, entry.end(scene.now), entry);
            if !space.can_have(model, placed) || free.is_err() {
                continue;
            }
            let victims = held.iter().filter(|held| {
                let own = model.profile(held.placed.profile).and_then(|p| p.span_at(held.placed.start));
                own.is_some_and(|own| own.overlaps(span))
            });
            let greatest = victims.clone().filter_map(|held| held.preemptible).max();
            let fences: BTreeSet<u64> = victims.map(|held| held.fence).collect();
            // A greater fence has run less long.
            let rank = (greatest, fences.len(), std::cmp::Reverse(fences.first().copied()));
            if !fences.is_empty() && best.as_ref().is_none_or(|(least, _)| rank < *least) {
                best = Some((rank, fences));
            }
        }
    }
    best.map(|(_, fences)| fences)
}

fn for_all(
    entry: &Entry,
    pool: &Pool,
    timeline: &Timeline<'_>,
    scene: &Scene<'_>,
    willing: &[&Held],
) -> Option<BTreeSet<u64>> {
    let mut future = without(pool, willing);
    let before = future.clone();
    let allowed = |_: &Pool, gpu: usize, placed: Placed| {
        let until = entry.end(scene.now);
        is_on(pool, gpu, entry) && timeline.fits(&before, (gpu, placed), scene.now, until, entry).is_ok()
    };
    let plans = plan_all(&mut future, entry.wanted.as_ref()?, entry.gang, scene.policy, &allowed)?;
    let in_the_way =
        |held: &&&Held| plans.iter().any(|plan| plan.gpu == held.gpu && span(pool, held).overlaps(plan.span));
    Some(willing.iter().filter(in_the_way).map(|held| held.fence).collect())
}

fn without(pool: &Pool, willing: &[&Held]) -> Pool {
    let mut future = pool.clone();
    willing.iter().for_each(|held| future.release(held.gpu, held.placed));
    future
}

fn span(pool: &Pool, held: &Held) -> Columns {
    let model = pool.gpus().get(held.gpu).and_then(|space| pool.models().get(space.model));
    let profile = model.and_then(|model| model.profile(held.placed.profile));
    profile.and_then(|profile| profile.span_at(held.placed.start)).unwrap_or_default()
}
