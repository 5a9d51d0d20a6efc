//! Where, and when, a request finds space at the earliest.

use super::{Entry, Scene, pass::is_on, timeline::Timeline};
use crate::{
    geometry::{Columns, Model, Placed, Resolution},
    placement::{Pool, SlotState, Space, plan_all},
};
use jiff::Timestamp;
use std::collections::{BTreeSet, HashMap};

/// So many ends are looked at, one after the other; what comes later is not foretold.
const ENDS: usize = 20_000;
/// For a gang so many times are tried.
const TRIES: usize = 512;

/// Where a request is going to have its space, and when; at any moment, if there is no time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) from: Option<Timestamp>,
    pub(super) places: Vec<(usize, Placed)>,
}

/// The earliest space for a request: at the first time at which known ends make room beside what is kept for
/// those ahead. Where the known ends never do, the place that the fewest leases of unknown end are in the way of:
/// it is left to run empty. None if there is no place at all.
pub(super) fn earliest(
    entry: &Entry,
    open: &Resolution,
    pool: &mut Pool,
    timeline: &Timeline<'_>,
    scene: &Scene<'_>,
) -> Option<Kept> {
    let found = match entry.gang.slices {
        1 => first_end(entry, open, pool, timeline, scene),
        _ => first_end_of_all(entry, open, pool, timeline, scene),
    };
    found.or_else(|| to_run_empty(entry, open, pool, timeline))
}

/// For one slice: only a GPU on which something ends can have room that it did not have before.
fn first_end(
    entry: &Entry,
    open: &Resolution,
    pool: &Pool,
    timeline: &Timeline<'_>,
    scene: &Scene<'_>,
) -> Option<Kept> {
    let mut held: HashMap<usize, Columns> = HashMap::new();
    for (time, gpu, ended) in timeline.events().into_iter().take(ENDS) {
        let Some((model, space)) = model_of(pool, gpu) else { continue };
        let columns = held.entry(gpu).or_insert_with(|| space.held());
        let span = ended.and_then(|placed| model.profile(placed.profile)?.span_at(placed.start));
        *columns = *columns & !span.unwrap_or_default();
        let Some(profile) = open.on(space.model).filter(|_| space.usable && is_on(pool, gpu, entry)) else { continue };
        let spans = model.profile(profile).into_iter().flat_map(|profile| profile.spans());
        let free = spans.filter(|(_, span)| !span.overlaps(*columns));
        let fits = free
            .map(|(start, span)| (Placed { profile, start }, span))
            .filter(|(placed, _)| timeline.fits(pool, (gpu, *placed), time, entry.end(time), entry).is_ok());
        let layout = timeline.space_at(pool, gpu, time, Some(entry))?;
        let cost = |(placed, span): &(Placed, Columns)| scene.policy.cost(model, layout.layout(), *placed, *span);
        if let Some((placed, _)) = fits.min_by_key(cost) {
            return Some(Kept { from: Some(time), places: vec![(gpu, placed)] });
        }
    }
    None
}

/// For several slices: all of them at the same time.
fn first_end_of_all(
    entry: &Entry,
    open: &Resolution,
    pool: &Pool,
    timeline: &Timeline<'_>,
    scene: &Scene<'_>,
) -> Option<Kept> {
    let mut future = pool.clone();
    let mut events = timeline.events().into_iter().take(ENDS).peekable();
    let mut tries = 0;
    while let Some((time, gpu, ended)) = events.next() {
        ended.into_iter().for_each(|placed| future.release(gpu, placed));
        // All that ends at the same time ends together.
        if events.peek().is_some_and(|(next, ..)| *next == time) || tries >= TRIES {
            continue;
        }
        tries += 1;
        let until = entry.end(time);
        let allowed = |_: &Pool, gpu: usize, placed: Placed| {
            is_on(pool, gpu, entry) && timeline.fits(pool, (gpu, placed), time, until, entry).is_ok()
        };
        if let Some(plans) = plan_all(&mut future, open, entry.gang, scene.policy, &allowed) {
            let places = plans.into_iter().map(|plan| (plan.gpu, plan.placed)).collect();
            return Some(Kept { from: Some(time), places });
        }
    }
    None
}

/// Places that are left to run empty.
fn to_run_empty(entry: &Entry, open: &Resolution, pool: &Pool, timeline: &Timeline<'_>) -> Option<Kept> {
    let mut taken: HashMap<usize, Columns> = HashMap::new();
    if entry.booking.is_some() {
        // Nothing of others is in its space.
        return None;
    }
    let on_models = (0..pool.models().len()).filter(|model| open.on(*model).is_some());
    let places = on_models.filter_map(|model| match entry.gang.nodes {
        None => drain(entry, open, pool, timeline, model, None, entry.gang.slices, &mut taken),
        Some(nodes) => drain_nodes(entry, open, pool, timeline, model, nodes, &mut taken),
    });
    let best = places.min_by_key(|(ways, _)| *ways)?;
    // What is reserved is left for the time after.
    let span = |gpu: usize, placed: Placed| {
        let (model, _) = model_of(pool, gpu)?;
        model.profile(placed.profile)?.span_at(placed.start)
    };
    let reserved = |(gpu, placed): &(usize, Placed)| timeline.reserved_until(pool, *gpu, span(*gpu, *placed)?);
    let from = best.1.iter().filter_map(reserved).max();
    Some(Kept { from, places: best.1 })
}

/// How much is in the way: reservations, leases of unknown end, then all, then columns.
type Ways = (u32, u32, u32, u32);
/// How much is in the way of places, and where they are.
type Drained = (Ways, Vec<(usize, Placed)>);

/// So many places on GPUs of a model, of one node if one is named.
#[expect(clippy::too_many_arguments, reason = "what is asked, where, and what is taken already")]
fn drain(
    entry: &Entry,
    open: &Resolution,
    pool: &Pool,
    timeline: &Timeline<'_>,
    model: usize,
    node: Option<u32>,
    slices: u32,
    taken: &mut HashMap<usize, Columns>,
) -> Option<Drained> {
    let profile = open.on(model)?;
    let kind = pool.models().get(model)?;
    let candidates = candidates(pool, timeline, model);
    let (mut sum, mut places): Drained = ((0, 0, 0, 0), Vec::new());
    for _ in 0..slices {
        let mut best: Option<(Ways, usize, Placed, Columns)> = None;
        for gpu in candidates.iter().copied().filter(|gpu| node.is_none_or(|node| pool.node(*gpu) == node)) {
            let Some(space) = pool.gpus().get(gpu).filter(|_| is_on(pool, gpu, entry)) else { continue };
            let there = taken.get(&gpu).copied().unwrap_or_default() | space.layout().blocked();
            for (start, span) in kind.profile(profile)?.spans().filter(|(_, span)| !span.overlaps(there)) {
                let placed = Placed { profile, start };
                if timeline.is_window(pool, gpu, span) || !is_possible(kind, space, placed, span) {
                    continue;
                }
                let reserved = timeline.reserved_until(pool, gpu, span).is_some();
                let ways = in_the_way(timeline, gpu, kind, space, span);
                let ways = (u32::from(reserved), ways.0, ways.1, ways.2);
                if best.is_none_or(|(least, ..)| ways < least) {
                    best = Some((ways, gpu, placed, span));
                }
            }
        }
        let (ways, gpu, placed, span) = best?;
        *taken.entry(gpu).or_default() |= span;
        sum = add(sum, ways);
        places.push((gpu, placed));
    }
    Some((sum, places))
}

fn drain_nodes(
    entry: &Entry,
    open: &Resolution,
    pool: &Pool,
    timeline: &Timeline<'_>,
    model: usize,
    nodes: u32,
    taken: &mut HashMap<usize, Columns>,
) -> Option<Drained> {
    let each = entry.gang.slices / nodes.max(1);
    let one = |node| drain(entry, open, pool, timeline, model, Some(node), each, taken);
    let mut all: Vec<Drained> = pool.nodes().into_iter().filter_map(one).collect();
    all.sort_by_key(|(ways, _)| *ways);
    all.truncate(nodes as usize);
    if all.len() < nodes as usize {
        return None;
    }
    let sum = all.iter().fold((0, 0, 0, 0), |sum, (ways, _)| add(sum, *ways));
    Some((sum, all.into_iter().flat_map(|(_, places)| places).collect()))
}

fn add(a: Ways, b: Ways) -> Ways {
    (a.0 + b.0, a.1 + b.1, a.2 + b.2, a.3 + b.3)
}

/// GPUs of a model to look at: of those that are alike, and on which nothing is kept, a few.
fn candidates(pool: &Pool, timeline: &Timeline<'_>, model: usize) -> BTreeSet<usize> {
    /// A gang may need several of a kind.
    const ALIKE: usize = 64;
    let of_model = |gpu: &usize| pool.gpus().get(*gpu).is_some_and(|space| space.model == model && space.usable);
    let alike = pool.groups().flat_map(|gpus| gpus.iter().copied().filter(|gpu| !timeline.is_kept(*gpu)).take(ALIKE));
    alike.chain(timeline.kept_gpus()).filter(of_model).collect()
}

/// Whether an instance can lie there once what is in its columns has ended.
fn is_possible(model: &Model, space: &Space, placed: Placed, span: Columns) -> bool {
    let mut empty = space.clone();
    for held in space.layout().placed() {
        let own = model.profile(held.profile).and_then(|profile| profile.span_at(held.start));
        if own.is_some_and(|own| own.overlaps(span)) {
            empty.set(model, *held, SlotState::Idle { reusable: true });
        }
    }
    empty.can_have(model, placed)
}

fn in_the_way(timeline: &Timeline<'_>, gpu: usize, model: &Model, space: &Space, span: Columns) -> (u32, u32, u32) {
    let overlaps = |placed: &&Placed| {
        let own = model.profile(placed.profile).and_then(|profile| profile.span_at(placed.start));
        own.is_some_and(|own| own.overlaps(span))
    };
    let (mut unknown, mut all) = (0, 0);
    for placed in space.layout().placed().iter().filter(overlaps) {
        all += 1;
        unknown += u32::from(!timeline.ends(gpu, *placed));
    }
    (unknown, all, (space.held() & span).count())
}

fn model_of(pool: &Pool, gpu: usize) -> Option<(&Model, &Space)> {
    let space = pool.gpus().get(gpu)?;
    Some((pool.models().get(space.model)?, space))
}
