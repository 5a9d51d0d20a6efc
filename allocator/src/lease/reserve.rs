//! Reservations: made, moved where a GPU fails, begun and ended in time.

use super::{
    gpu::{Gpu, Key},
    ledger::{Ledger, Waiting},
    line::{held_slots, steady},
    record::{Booked, Ending, LeaseRow, Now, ReservationRow, ReservedSlot, Status, Write},
};
use crate::{
    AllocatorError, LeaseRequest,
    geometry::{Columns, Resolution, resolve},
    is_workload_name,
    placement::{Gang, Pool, Space, plan_all},
    queue::{self, Booking, InTheWay, Reserved, Scene},
};
use jiff::{SignedDuration, Timestamp};
use mlad::api::{Need, NewReservation, Placement, Reservation, ReservedSlice};
use std::{collections::BTreeSet, time::Duration};

/// The most reservations at a time.
const MOST: usize = 1000;
/// The most slices of all of them: every pass through the line looks at each.
const MOST_SLICES: usize = 10_000;
/// The longest name, in bytes.
const LONGEST_NAME: usize = 64;
/// The most users and projects that one is for.
const MOST_PEOPLE: usize = 200;
/// The shortest and the longest, and how far ahead one may end.
const SHORTEST: SignedDuration = SignedDuration::from_secs(60);
const LONGEST: SignedDuration = SignedDuration::from_hours(24 * 90);
const AHEAD: SignedDuration = SignedDuration::from_hours(24 * 400);
/// The wall's clock may be set: what is due by it is looked at this often.
const LOOK: Duration = Duration::from_secs(60);
/// So many leases and reservations that are in the way are named.
const NAMED: usize = 4;

impl Ledger {
    /// Sets space aside. The same reservation again changes nothing.
    pub(super) fn reserve(&mut self, new: &NewReservation, now: Now) -> Result<Reservation, AllocatorError> {
        let new = &NewReservation { from: new.from.map(stored), until: stored(new.until), ..new.clone() };
        if let Some(same) = self.reservations.values().find(|other| *other.name == *new.name) {
            let text = format!("there is a reservation {} already; remove it first, or take another name", new.name);
            return if same.is_of(new) {
                Ok(self.reservation(same, now))
            } else {
                Err(AllocatorError::Reservation(text))
            };
        }
        check(new, self.rules.notice, now)?;
        if self.reservations.len() >= MOST {
            return Err(AllocatorError::TooMany(format!("there are {MOST} reservations already, and no more can be")));
        }
        let taken: usize = self.reservations.values().map(|row| row.slots.len()).sum();
        if taken + new.slices as usize > MOST_SLICES {
            let text = format!("{taken} slices are reserved already, and {MOST_SLICES} are the most");
            return Err(AllocatorError::TooMany(text));
        }
        let wanted = self.resolve(&new.need)?;
        if !wanted.needs_gpu() {
            return Err(AllocatorError::Invalid("a reservation is for GPUs: name a profile, or gpu".to_owned()));
        }
        let from = new.from.unwrap_or(now.wall);
        let booking = Booking { id: self.seq + 1, from, until: new.until };
        let slots = self.places(booking, &wanted, new.slices, self.reserved(), now);
        let slots = slots.ok_or_else(|| self.refusal(new, booking, &wanted, now))?;
        self.seq += 1;
        let row = ReservationRow {
            booking,
            name: new.name.as_str().into(),
            need: new.need.clone(),
            users: new.users.clone(),
            projects: new.projects.clone(),
            made_at: now.wall,
            slots,
        };
        tracing::info!(name = new.name, need = %new.need, slices = new.slices, %from, until = %new.until, "reserved");
        self.effects.writes.push(Write::Reserve(Box::new(row.clone())));
        let told = self.reservation(&row, now);
        self.keep_reservation(row, now);
        self.stir();
        Ok(told)
    }

    /// Sets space aside no longer. What runs in it goes on until the reservation would have ended; what waits for it
    /// is over. None of that name is no error.
    pub(super) fn cancel_reservation(&mut self, name: &str, now: Now) {
        let id = self.reservations.values().find(|row| *row.name == *name).map(|row| row.booking.id);
        if let Some(id) = id {
            self.end_reservation(id, "was removed", now);
        }
    }

    /// Every reservation that is not over, those that begin first first.
    pub(super) fn reservations(&self, now: Now) -> Vec<Reservation> {
        let mut all: Vec<&ReservationRow> = self.reservations.values().collect();
        all.sort_by_key(|row| (row.booking.from, row.booking.id));
        all.into_iter().map(|row| self.reservation(row, now)).collect()
    }

    /// Takes a reservation into memory.
    pub(super) fn keep_reservation(&mut self, row: ReservationRow, now: Now) {
        self.due.set(row.booking.id, self.next_look(row.booking, now));
        self.reservations.insert(row.booking.id, row);
    }

    /// A lease ends with its reservation: when it is told so.
    pub(super) fn keep_booked(&mut self, lease: &LeaseRow, now: Now) {
        if let Some(booked) = &lease.request.booked {
            let told = booked.booking.until.checked_sub(self.rules.notice).unwrap_or(now.wall);
            self.booked.set(lease.fence, look_at(told, now));
        }
    }

    /// The reservation that a request names, if it may use it.
    pub(super) fn booked_for(
        &self,
        request: &LeaseRequest,
        wanted: &Resolution,
    ) -> Result<Option<Booked>, AllocatorError> {
        let Some(name) = &request.reservation else { return Ok(None) };
        let refused = |text: String| Err(AllocatorError::Reservation(text));
        let Some(row) = self.reservations.values().find(|row| *row.name == **name) else {
            return refused(format!("there is no reservation {} (any more)", name.escape_debug()));
        };
        let of_project = request.project.as_ref().is_some_and(|project| row.projects.contains(project));
        if !row.users.contains(&request.user) && !of_project {
            let whose = row.users.iter().chain(&row.projects).take(NAMED).cloned().collect::<Vec<_>>().join(", ");
            return refused(format!("the reservation {name} is not for {}, but for {whose}", request.user));
        }
        if !wanted.needs_gpu() {
            return refused(format!("what needs no GPU cannot use the reservation {name}"));
        }
        if !self.fits_within(row, request, wanted) {
            let (need, slices, of) = (&request.need, row.slots.len(), &row.need);
            let times = if request.slices == 1 { need.to_string() } else { format!("{} times {need}", request.slices) };
            return Err(AllocatorError::Impossible(format!(
                "{times} has no room in the reservation {name}, which has {slices} of {of}; ask for less"
            )));
        }
        Ok(Some(Booked { booking: row.booking, name: row.name.clone() }))
    }

    /// Every reserved slot that lies on a known GPU.
    pub(super) fn reserved(&self) -> Vec<Reserved> {
        let slots = self.reservations.values().flat_map(|row| row.slots.iter().map(|slot| (row.booking, slot)));
        let found = slots.filter_map(|(booking, slot)| {
            let gpu = self.gpus.iter().position(|gpu| gpu.uuid == slot.gpu)?;
            Some(Reserved { booking, gpu, placed: self.gpus.get(gpu)?.placed(slot.key())? })
        });
        found.collect()
    }

    /// Whether the places of a waiting request are set aside for others before it would be over: making them has
    /// taken longer than was foreseen.
    pub(super) fn is_too_late(&self, waiting: &Waiting, now: Now) -> bool {
        let (own, end) = (waiting.entry.reservation(), waiting.entry.end(now.wall));
        let rows = self.reservations.values().filter(|row| {
            Some(row.booking.id) != own && row.booking.until > now.wall && end.is_none_or(|end| end > row.booking.from)
        });
        let mut slots = rows.flat_map(|row| &row.slots);
        slots.any(|slot| {
            let gpu = self.gpus.iter().find(|gpu| gpu.uuid == slot.gpu);
            let over = |key: Key| gpu.is_none_or(|gpu| slot.whole || columns_of(gpu, key).overlaps(slot.columns()));
            waiting.places.iter().any(|(uuid, key)| *uuid == slot.gpu && over(*key))
        })
    }

    /// What is told of a reservation to those who wait.
    pub(super) fn told_of(&self, id: u64) -> Option<queue::Told<'_>> {
        let row = self.reservations.get(&id)?;
        Some(queue::Told { name: &row.name, from: row.booking.from, until: row.booking.until })
    }

    /// Begins and ends reservations in time, and gives notice before.
    pub(super) fn tick_reservations(&mut self, now: Now) {
        while let Some(fence) = self.booked.pop(now.steady) {
            self.end_with_reservation(fence, now);
        }
        while let Some(id) = self.due.pop(now.steady) {
            let Some(row) = self.reservations.get(&id) else { continue };
            let (booking, name) = (row.booking, row.name.clone());
            if booking.until <= now.wall {
                self.end_reservation(id, "is over", now);
                continue;
            }
            let told = booking.from.checked_sub(self.rules.notice).unwrap_or(now.wall);
            if told <= now.wall {
                self.make_room(id, &name, booking.from, now);
            }
            if booking.from <= now.wall {
                self.stir();
            }
            self.due.set(id, self.next_look(booking, now));
        }
    }

    /// When [`Self::tick_reservations`] has something to do next.
    pub(super) fn next_reservation(&self) -> Option<Duration> {
        self.due.next().into_iter().chain(self.booked.next()).min()
    }

    /// Finds other places for reserved slices whose GPU cannot be used.
    pub(super) fn move_reservations(&mut self, now: Now) {
        let bad = |row: &ReservationRow| row.slots.iter().any(|slot| self.is_lost(slot));
        let ids: Vec<u64> = self.reservations.values().filter(|row| bad(row)).map(|row| row.booking.id).collect();
        for id in ids {
            let Some(row) = self.reservations.get(&id).cloned() else { continue };
            let Ok(wanted) = resolve(&row.need, self.pool.models()) else { continue };
            for (position, slot) in row.slots.iter().enumerate() {
                if !self.is_lost(slot) {
                    continue;
                }
                let others = self.reserved_without(id, position);
                let Some(new) = self.places(row.booking, &wanted, 1, others, now).and_then(|mut found| found.pop())
                else {
                    continue;
                };
                tracing::warn!(name = %row.name, from_gpu = slot.gpu_index, to_gpu = new.gpu_index,
                    "a reserved slice is moved: its GPU cannot be used");
                self.effects.writes.push(Write::Move { id, position, slot: new.clone(), at: now.wall });
                if let Some(there) = self.reservations.get_mut(&id).and_then(|row| row.slots.get_mut(position)) {
                    *there = new;
                }
                self.effects.changed = true;
            }
        }
    }

    fn reserved_without(&self, id: u64, position: usize) -> Vec<Reserved> {
        let slot = self.reservations.get(&id).and_then(|row| row.slots.get(position));
        let at = slot.and_then(|slot| Some((self.gpus.iter().position(|gpu| gpu.uuid == slot.gpu)?, slot.key())));
        let is_it = |reserved: &Reserved| {
            let key = self.gpus.get(reserved.gpu).and_then(|gpu| gpu.key(reserved.placed));
            reserved.booking.id == id && at.is_some_and(|(gpu, own)| reserved.gpu == gpu && key == Some(own))
        };
        self.reserved().into_iter().filter(|reserved| !is_it(reserved)).collect()
    }

    /// Whether nothing can be granted at a reserved place, and nobody is there.
    fn is_lost(&self, slot: &ReservedSlot) -> bool {
        let Some(gpu) = self.gpus.iter().find(|gpu| gpu.uuid == slot.gpu) else { return true };
        self.trouble(gpu, slot).is_some() && self.holders_in(slot).is_empty()
    }

    fn trouble(&self, gpu: &Gpu, slot: &ReservedSlot) -> Option<String> {
        if let Some(fault) = &gpu.fault {
            return Some(format!("GPU {}: {}", gpu.index, fault.reason));
        }
        if let Some(reason) = self.in_quarantine(&gpu.uuid) {
            return Some(format!("GPU {}: {reason}", gpu.index));
        }
        if gpu.placed(slot.key()).is_none() {
            return Some(format!("GPU {} cannot be cut like that any more", gpu.index));
        }
        let over = |key: &Key| columns_of(gpu, *key).overlaps(slot.columns());
        let doubt = gpu.doubts.iter().find(|(key, _)| over(key)).map(|(_, doubt)| &doubt.reason)?;
        Some(format!("GPU {}: an instance there is not used: {doubt}", gpu.index))
    }

    /// The leases that hold something in a reserved place.
    fn holders_in(&self, slot: &ReservedSlot) -> BTreeSet<u64> {
        let Some(gpu) = self.gpus.iter().find(|gpu| gpu.uuid == slot.gpu) else { return BTreeSet::new() };
        let from = (slot.gpu.clone(), (0, 0));
        let there = self.holders.range(from..).take_while(|((uuid, _), _)| *uuid == slot.gpu);
        let over = |key: Key| slot.whole || columns_of(gpu, key).overlaps(slot.columns());
        there.filter(|((_, key), _)| over(*key)).map(|(_, fence)| *fence).collect()
    }

    fn places(
        &self,
        booking: Booking,
        wanted: &Resolution,
        slices: u32,
        reserved: Vec<Reserved>,
        now: Now,
    ) -> Option<Vec<ReservedSlot>> {
        let held = || held_slots(&self.leases, &self.waiting, &self.gpus, now);
        let scene = Scene { now: now.wall, policy: &self.policy, rules: self.rules, held: &held, reserved: &reserved };
        let places = queue::places_for(booking, wanted, slices, &self.pool, &scene)?;
        let slot = |(gpu, placed): (usize, _)| {
            let gpu = self.gpus.get(gpu)?;
            let (profile, start) = gpu.key(placed)?;
            let size = gpu.model.profile(placed.profile)?.columns;
            Some(ReservedSlot {
                node: gpu.node.to_string(),
                gpu: gpu.uuid.clone(),
                gpu_index: gpu.index,
                profile,
                placement: Placement { start, size },
                whole: !gpu.model.sliced,
                chosen_at: now.wall,
            })
        };
        places.into_iter().map(slot).collect()
    }

    /// Why there is no place for a reservation.
    fn refusal(&self, new: &NewReservation, booking: Booking, wanted: &Resolution, now: Now) -> AllocatorError {
        let held = || held_slots(&self.leases, &self.waiting, &self.gpus, now);
        let reserved = self.reserved();
        let scene = Scene { now: now.wall, policy: &self.policy, rules: self.rules, held: &held, reserved: &reserved };
        let leases = |fences: &BTreeSet<u64>| {
            let named = |lease: &LeaseRow| {
                let LeaseRow { request, .. } = lease;
                match lease.known_end() {
                    Some(end) => format!("{} of {} (until {end:.0})", request.workload, request.user),
                    None => format!("{} of {} (no known end)", request.workload, request.user),
                }
            };
            let found: Vec<String> = fences.iter().filter_map(|fence| self.leases.get(fence)).map(named).collect();
            let more = if found.len() > NAMED { format!(" and {} more", found.len() - NAMED) } else { String::new() };
            let named = found.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
            format!("leases that may last into that time: {named}{more}; stop them, or begin later")
        };
        let others = |ids: &BTreeSet<u64>| {
            let named = ids.iter().filter_map(|id| self.reservations.get(id)).take(NAMED);
            let named = named.map(|row| row.name.to_string()).collect::<Vec<_>>().join(", ");
            format!("other reservations have the space then: {named}")
        };
        let what = format!("{} times {} cannot be reserved", new.slices, new.need);
        match queue::in_the_way(booking, wanted, new.slices, &self.pool, &scene) {
            InTheWay::Leases(fences) => AllocatorError::Reservation(format!("{what}: {}", leases(&fences))),
            InTheWay::Reservations(ids) => AllocatorError::Reservation(format!("{what}: {}", others(&ids))),
            InTheWay::Either(fences, ids) => {
                AllocatorError::Reservation(format!("{what}: {}; or {}", leases(&fences), others(&ids)))
            }
            InTheWay::Both(fences, ids) => {
                AllocatorError::Reservation(format!("{what}: {}; and {}", leases(&fences), others(&ids)))
            }
            InTheWay::Nothing if !self.changes.is_empty() => AllocatorError::Reservation(format!(
                "{what}: space for it is being repartitioned just now; try again in a moment"
            )),
            InTheWay::Nothing => AllocatorError::Impossible(format!(
                "{what}: it is more than the GPUs that can be used have room for, however empty they are"
            )),
        }
    }

    /// Whether all slices of a request fit into a reservation, were it empty.
    fn fits_within(&self, row: &ReservationRow, request: &LeaseRequest, wanted: &Resolution) -> bool {
        let gpus = self.pool.gpus().iter().map(|space| Space::empty(space.model)).collect();
        let nodes = (0..self.pool.gpus().len()).map(|gpu| self.pool.node(gpu)).collect();
        let mut empty = Pool::new(self.pool.models().to_vec(), gpus).on_nodes(nodes);
        let only_on = self.only_on(request.node.as_deref());
        let own: Vec<Reserved> =
            self.reserved().into_iter().filter(|reserved| reserved.booking.id == row.booking.id).collect();
        let span = |pool: &Pool, gpu: usize, placed: crate::geometry::Placed| {
            let model = pool.gpus().get(gpu).and_then(|space| pool.models().get(space.model));
            model.and_then(|model| model.profile(placed.profile)?.span_at(placed.start)).unwrap_or_default()
        };
        let allowed = |pool: &Pool, gpu: usize, placed| {
            let asked = span(pool, gpu, placed);
            let mut here = own.iter().filter(|reserved| reserved.gpu == gpu);
            if only_on.as_ref().is_some_and(|nodes| !nodes.contains(&pool.node(gpu))) {
                return false;
            }
            here.any(|reserved| !asked.is_empty() && (asked & !span(pool, gpu, reserved.placed)).is_empty())
        };
        let gang = Gang { slices: request.slices, nodes: request.nodes };
        plan_all(&mut empty, wanted, gang, &self.policy, &allowed).is_some()
    }

    /// Others than those of the reservation end when it begins.
    fn make_room(&mut self, id: u64, name: &str, from: Timestamp, now: Now) {
        let Some(row) = self.reservations.get(&id) else { return };
        let there: BTreeSet<u64> = row.slots.iter().flat_map(|slot| self.holders_in(slot)).collect();
        let others = there.into_iter().filter_map(|fence| self.leases.get(&fence)).filter(|lease| {
            let own = lease.request.booked.as_ref().is_some_and(|booked| booked.booking.id == id);
            !own && !matches!(lease.status, Status::Over(_))
        });
        let others: Vec<(u64, Option<Timestamp>)> = others.map(|lease| (lease.fence, lease.known_end())).collect();
        for (fence, end) in others {
            let reason = format!("its slice is reserved ({name}) from {from:.0} on");
            if from <= now.wall {
                self.end(fence, &reason, now);
            } else if end.is_none_or(|end| end > from) {
                self.give_notice(fence, Ending { at: from, reason }, now);
            }
        }
    }

    /// A lease within a reservation is told that it ends with it, and then does.
    fn end_with_reservation(&mut self, fence: u64, now: Now) {
        let Some(lease) = self.leases.get(&fence) else { return };
        let Some(Booked { booking, name }) = lease.request.booked.clone() else { return };
        let reason = format!("its reservation {name} ends at {:.0}", booking.until);
        if booking.until <= now.wall {
            return self.end(fence, &reason, now);
        }
        let told = booking.until.checked_sub(self.rules.notice).unwrap_or(now.wall);
        if told <= now.wall {
            self.give_notice(fence, Ending { at: booking.until, reason }, now);
            self.booked.set(fence, look_at(booking.until, now));
        } else {
            self.booked.set(fence, look_at(told, now));
        }
    }

    fn end_reservation(&mut self, id: u64, how: &str, now: Now) {
        let Some(row) = self.reservations.remove(&id) else { return };
        self.due.remove(id);
        tracing::info!(name = %row.name, how, "a reservation has ended");
        self.effects.writes.push(Write::Unreserve { id, at: now.wall });
        let waits = self.waiting.iter().filter(|(_, waiting)| waiting.entry.reservation() == Some(id));
        for seq in waits.map(|(seq, _)| *seq).collect::<Vec<_>>() {
            self.give_up(seq, &format!("its reservation {} {how}", row.name), now);
        }
        self.stir();
    }

    fn next_look(&self, booking: Booking, now: Now) -> Duration {
        let told = booking.from.checked_sub(self.rules.notice).unwrap_or(now.wall);
        let next = [told, booking.from, booking.until].into_iter().find(|at| *at > now.wall);
        look_at(next.unwrap_or(booking.until), now)
    }

    fn reservation(&self, row: &ReservationRow, now: Now) -> Reservation {
        let gpu = |slot: &ReservedSlot| self.gpus.iter().find(|gpu| gpu.uuid == slot.gpu);
        let name = |slot: &ReservedSlot| {
            let gpu = gpu(slot)?;
            Some(gpu.model.profile(gpu.model.by_id(slot.profile)?)?.name.clone())
        };
        let place = |slot: &ReservedSlot| ReservedSlice {
            node: slot.node.clone(),
            gpu: slot.gpu.clone(),
            gpu_index: slot.gpu_index,
            profile: name(slot).unwrap_or_else(|| row.need.to_string()),
            placement: (!slot.whole).then_some(slot.placement),
        };
        let trouble = |slot: &ReservedSlot| match gpu(slot) {
            None => Some(format!("GPU {} is not there any more", slot.gpu_index)),
            Some(gpu) => self.trouble(gpu, slot),
        };
        let late = || {
            let others = row.slots.iter().flat_map(|slot| self.holders_in(slot));
            let lease = others
                .filter_map(|fence| self.leases.get(&fence))
                .find(|lease| lease.request.booked.as_ref().is_none_or(|booked| booked.booking.id != row.booking.id))?;
            let late = row.booking.from <= now.wall;
            late.then(|| format!("{} of {} still runs there", lease.request.workload, lease.request.user))
        };
        let own =
            |lease: &&LeaseRow| lease.request.booked.as_ref().is_some_and(|booked| booked.booking.id == row.booking.id);
        let in_use: BTreeSet<u64> = row.slots.iter().flat_map(|slot| self.holders_in(slot)).collect();
        let in_use = in_use.iter().filter_map(|fence| self.leases.get(fence)).filter(own).count();
        Reservation {
            name: row.name.to_string(),
            need: row.need.clone(),
            slices: u32::try_from(row.slots.len()).unwrap_or(u32::MAX),
            from: row.booking.from,
            until: row.booking.until,
            users: row.users.clone(),
            projects: row.projects.clone(),
            places: row.slots.iter().map(place).collect(),
            active: row.booking.is_open(now.wall),
            in_use: u32::try_from(in_use).unwrap_or(u32::MAX),
            trouble: row.slots.iter().find_map(trouble).or_else(late),
            made_at: row.made_at,
        }
    }
}

impl ReservationRow {
    /// Whether it is what is asked for.
    fn is_of(&self, new: &NewReservation) -> bool {
        let from = new.from.is_none_or(|from| from == self.booking.from);
        let people = self.users == new.users && self.projects == new.projects;
        let slices = usize::try_from(new.slices).is_ok_and(|slices| slices == self.slots.len());
        from && people && slices && self.need == new.need && self.booking.until == new.until
    }
}

impl ReservedSlot {
    pub(super) fn key(&self) -> Key {
        (self.profile, self.placement.start)
    }

    fn columns(&self) -> Columns {
        Columns::span(self.placement.start, self.placement.size).unwrap_or(!Columns::NONE)
    }
}

/// The columns of a slot; all of them if it is none of the model's.
fn columns_of(gpu: &Gpu, key: Key) -> Columns {
    let profile = gpu.model.by_id(key.0).and_then(|profile| gpu.model.profile(profile));
    profile.and_then(|profile| profile.span_at(key.1)).unwrap_or(!Columns::NONE)
}

fn look_at(at: Timestamp, now: Now) -> Duration {
    steady(at, now).min(now.steady + LOOK)
}

/// A time as it is stored, in microseconds: what is told before and after a restart is the same.
fn stored(at: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(at.as_microsecond()).unwrap_or(at)
}

/// Refuses what is malformed.
fn check(new: &NewReservation, notice: SignedDuration, now: Now) -> Result<(), AllocatorError> {
    let NewReservation { name, need, slices, from, until, users, projects } = new;
    let wrong = |text: String| Err(AllocatorError::Invalid(text));
    if !is_workload_name(name) || name.len() > LONGEST_NAME {
        let text = "is no name for a reservation: letters, digits, -, _ and ., at most 64, no . first";
        return wrong(format!("`{}` {text}", name.escape_debug()));
    }
    if !(1..=LeaseRequest::MOST_SLICES).contains(slices) {
        return wrong(format!("a reservation has 1 to {} slices, and not {slices}", LeaseRequest::MOST_SLICES));
    }
    if *need == Need::Cpu {
        return wrong("a reservation is for GPUs: name a profile, or gpu".to_owned());
    }
    let begins = from.unwrap_or(now.wall);
    let length = until.duration_since(begins);
    // Who uses it is told of its end before, and has to have some use of it.
    let shortest = SHORTEST.max(notice.saturating_mul(2));
    if length < shortest || *until <= now.wall {
        let seconds = shortest.as_secs();
        return wrong(format!("it would end ({until:.0}) less than {seconds} s after it begins, or in the past"));
    }
    if length > LONGEST || until.duration_since(now.wall) > AHEAD {
        return wrong("a reservation is for 90 days at most, and ends within 400 days from now".to_owned());
    }
    let people = users.iter().chain(projects);
    if users.len() + projects.len() > MOST_PEOPLE {
        return wrong(format!("a reservation is for {MOST_PEOPLE} users and projects at most"));
    }
    if users.is_empty() && projects.is_empty() {
        return wrong("name the users or projects that it is for".to_owned());
    }
    let is_name = |text: &String| (1..=128).contains(&text.len()) && !text.contains(char::is_control);
    match people.into_iter().find(|name| !is_name(name)) {
        Some(name) => wrong(format!("`{}` names no user or project", name.escape_debug())),
        None => Ok(()),
    }
}
