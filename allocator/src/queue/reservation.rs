//! Space that is set aside for some people from a time until another: where it is, and what is in the way of it.
//!
//! Nothing that could still be there when the time begins is placed on it (see `timeline`), and within the time only
//! requests of the reservation are. Who may use one is not decided here.

use super::{Held, Scene, timeline::Timeline};
use crate::{
    geometry::{Placed, Resolution},
    placement::{Gang, Pool, plan_all},
};
use jiff::Timestamp;
use std::collections::BTreeSet;

/// What a request has of its reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Booking {
    /// Which.
    pub id: u64,
    /// When it begins.
    pub from: Timestamp,
    /// When it ends, and with it whatever uses it.
    pub until: Timestamp,
}

impl Booking {
    /// Whether it has begun, and not ended.
    pub fn is_open(&self, at: Timestamp) -> bool {
        self.from <= at && at < self.until
    }
}

/// A slot that is reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// For which reservation, and when.
    pub booking: Booking,
    /// Index of its GPU in the pool.
    pub gpu: usize,
    /// Which profile, and where.
    pub placed: Placed,
}

/// Slots for a new reservation: free, as far as is known, when it begins, and not set aside for anybody else until
/// it ends. None if there are not so many.
pub fn places_for(
    booking: Booking,
    wanted: &Resolution,
    slices: u32,
    pool: &Pool,
    scene: &Scene<'_>,
) -> Option<Vec<(usize, Placed)>> {
    let held = (scene.held)();
    search(booking, wanted, slices, pool, scene, &held)
}

/// What is in the way of a reservation for which there is no place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InTheWay {
    /// Leases that may last into it: their fences.
    Leases(BTreeSet<u64>),
    /// Other reservations.
    Reservations(BTreeSet<u64>),
    /// Leases, and other reservations: without either of them there would be room.
    Either(BTreeSet<u64>, BTreeSet<u64>),
    /// Leases and other reservations together.
    Both(BTreeSet<u64>, BTreeSet<u64>),
    /// There is no such space on the GPUs that can be used.
    Nothing,
}

/// Finds what is in the way of a reservation.
pub fn in_the_way(booking: Booking, wanted: &Resolution, slices: u32, pool: &Pool, scene: &Scene<'_>) -> InTheWay {
    let held = (scene.held)();
    let stays = |held: &&Held| held.end.is_none_or(|end| end > booking.from);
    let serving = |gpu: usize| pool.gpus().get(gpu).is_some_and(|space| wanted.on(space.model).is_some());
    let leases: BTreeSet<u64> =
        held.iter().filter(stays).filter(|held| serving(held.gpu)).map(|held| held.fence).collect();
    let meets = |other: &&Reserved| other.booking.from < booking.until && booking.from < other.booking.until;
    let others: BTreeSet<u64> =
        scene.reserved.iter().filter(meets).filter(|other| serving(other.gpu)).map(|other| other.booking.id).collect();
    let gone: Vec<Held> = held.iter().map(|held| Held { end: Some(scene.now), ..held.clone() }).collect();
    let alone = Scene { reserved: &[], ..*scene };
    let fits = |scene: &Scene<'_>, held: &[Held]| search(booking, wanted, slices, pool, scene, held).is_some();
    match (fits(scene, &gone), fits(&alone, &held)) {
        (true, true) => InTheWay::Either(leases, others),
        (true, false) => InTheWay::Leases(leases),
        (false, true) => InTheWay::Reservations(others),
        (false, false) if fits(&alone, &gone) => InTheWay::Both(leases, others),
        (false, false) => InTheWay::Nothing,
    }
}

fn search(
    booking: Booking,
    wanted: &Resolution,
    slices: u32,
    pool: &Pool,
    scene: &Scene<'_>,
    held: &[Held],
) -> Option<Vec<(usize, Placed)>> {
    let known = || held.to_vec();
    let timeline = Timeline::new(scene.now, &known, scene.reserved);
    let mut future = pool.clone();
    let from = booking.from.max(scene.now);
    for held in held.iter().filter(|held| held.end.is_some_and(|end| end <= from)) {
        future.release(held.gpu, held.placed);
    }
    // With what has been chosen for it already, and beside what others have reserved.
    let allowed =
        |chosen: &Pool, gpu: usize, placed: Placed| timeline.has_room(chosen, (gpu, placed), from, Some(booking.until));
    let plans = plan_all(&mut future, wanted, Gang { slices, nodes: None }, scene.policy, &allowed)?;
    Some(plans.into_iter().map(|plan| (plan.gpu, plan.placed)).collect())
}
