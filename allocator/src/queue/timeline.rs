//! What is known of the time ahead: which held slots end when, and which space is kept for whom.

use super::{Entry, Reserved};
use crate::{
    geometry::{Columns, Placed},
    placement::{Pool, SlotState, Space},
};
use jiff::{SignedDuration, Timestamp};
use std::{
    cell::OnceCell,
    collections::{BTreeSet, HashMap},
};

/// A slot that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Index of its GPU in the pool.
    pub gpu: usize,
    /// Which profile, and where.
    pub placed: Placed,
    /// When it ends at the latest, if that is known.
    pub end: Option<Timestamp>,
    /// Whose it is: the fence of the lease.
    pub fence: u64,
    /// The priority of a lease that may be preempted and has had no notice yet.
    pub preemptible: Option<i32>,
}

/// For whom space is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// A waiting request.
    Request(u64),
    /// The requests of a reservation.
    Reservation(u64),
}

/// Space on a GPU that is kept.
#[derive(Debug, Clone)]
struct Window {
    owner: Owner,
    /// The reservation in whose space it is.
    within: Option<u64>,
    placed: Placed,
    /// From when; none for any moment from now.
    from: Option<Timestamp>,
    /// Until when; none for good.
    until: Option<Timestamp>,
}

impl Window {
    fn is_active(&self, at: Timestamp) -> bool {
        self.from.is_none_or(|from| from <= at) && self.until.is_none_or(|until| at < until)
    }

    /// Whether it keeps out a request; none stands for a reservation that is being made.
    fn keeps_out(&self, who: Option<&Entry>) -> bool {
        match (self.owner, who) {
            (Owner::Reservation(id), who) => who.and_then(Entry::reservation) != Some(id),
            (Owner::Request(_), None) => false,
            // What is kept for requests of everybody never lies in what is reserved, while it is.
            (Owner::Request(seq), Some(who)) => {
                seq != who.seq && (who.booking.is_none() || who.reservation() == self.within)
            }
        }
    }
}

/// The time ahead.
pub(super) struct Timeline<'a> {
    now: Timestamp,
    /// Worked out when it is first needed: where nobody has to wait, it is not.
    held: &'a dyn Fn() -> Vec<Held>,
    known: OnceCell<Known>,
    /// What was granted while the line was gone through.
    granted: Vec<Held>,
    windows: HashMap<usize, Vec<Window>>,
}

struct Known {
    all: Vec<Held>,
    /// Known ends, by GPU.
    ends: HashMap<usize, Vec<(Timestamp, Placed)>>,
    /// Known ends, the earliest first.
    events: Vec<(Timestamp, usize, Placed)>,
}

impl<'a> Timeline<'a> {
    pub(super) fn new(now: Timestamp, held: &'a dyn Fn() -> Vec<Held>, reserved: &[Reserved]) -> Self {
        let mut windows: HashMap<usize, Vec<Window>> = HashMap::new();
        for Reserved { booking, gpu, placed } in reserved {
            let (owner, within) = (Owner::Reservation(booking.id), Some(booking.id));
            let window =
                Window { owner, within, placed: *placed, from: Some(booking.from), until: Some(booking.until) };
            windows.entry(*gpu).or_default().push(window);
        }
        Self { now, held, known: OnceCell::new(), granted: Vec::new(), windows }
    }

    /// Keeps space for a waiting request.
    pub(super) fn keep(
        &mut self,
        entry: &Entry,
        places: &[(usize, Placed)],
        from: Option<Timestamp>,
        until: Option<Timestamp>,
    ) {
        for (gpu, placed) in places {
            let (owner, within) = (Owner::Request(entry.seq), entry.reservation());
            let window = Window { owner, within, placed: *placed, from, until };
            self.windows.entry(*gpu).or_default().push(window);
        }
    }

    /// A slot has just been granted.
    pub(super) fn grant(&mut self, held: Held) {
        self.granted.push(held);
    }

    /// Everything that is held.
    pub(super) fn held(&self) -> impl Iterator<Item = &Held> {
        self.known().all.iter().chain(&self.granted)
    }

    /// Whether something on a GPU is kept for somebody.
    pub(super) fn is_kept(&self, gpu: usize) -> bool {
        self.windows.contains_key(&gpu)
    }

    /// The GPUs on which something is kept for somebody.
    pub(super) fn kept_gpus(&self) -> impl Iterator<Item = usize> {
        self.windows.keys().copied()
    }

    /// Whether space on a GPU is kept for a waiting request, from whatever time on.
    pub(super) fn is_window(&self, pool: &Pool, gpu: usize, span: Columns) -> bool {
        let mut kept = self.windows.get(&gpu).into_iter().flatten();
        kept.any(|window| matches!(window.owner, Owner::Request(_)) && overlaps(pool, gpu, window.placed, span))
    }

    /// Until when columns of a GPU are reserved; none if they are not.
    pub(super) fn reserved_until(&self, pool: &Pool, gpu: usize, span: Columns) -> Option<Timestamp> {
        let windows = self.windows.get(&gpu).into_iter().flatten();
        let reserved = windows.filter(|window| matches!(window.owner, Owner::Reservation(_)));
        reserved.filter(|window| overlaps(pool, gpu, window.placed, span)).filter_map(|window| window.until).max()
    }

    /// Whether a place lies in the space of a reservation, at a time at which it has it.
    fn is_within(&self, pool: &Pool, (gpu, placed): (usize, Placed), id: u64, at: Timestamp) -> bool {
        let span = span_of(pool, gpu, placed);
        let mut windows = self.windows.get(&gpu).into_iter().flatten();
        windows.any(|window| {
            let own = window.owner == Owner::Reservation(id) && window.is_active(at);
            own && !span.is_empty() && (span & !span_of(pool, gpu, window.placed)).is_empty()
        })
    }

    /// Whether the end of what is held in a slot is known.
    pub(super) fn ends(&self, gpu: usize, placed: Placed) -> bool {
        let known = self.known().ends.get(&gpu).is_some_and(|ends| ends.iter().any(|(_, slot)| *slot == placed));
        let granted = |held: &Held| held.gpu == gpu && held.placed == placed && held.end.is_some();
        known || self.granted.iter().any(granted)
    }

    /// Known ends, the earliest first, and when what is kept for a time is free again; what is overdue may end the next
    /// moment.
    pub(super) fn events(&self) -> Vec<(Timestamp, usize, Option<Placed>)> {
        let known = self.known().events.iter().map(|(end, gpu, placed)| (*end, *gpu, Some(*placed)));
        let granted = self.granted.iter().filter_map(|held| Some((held.end?, held.gpu, Some(held.placed))));
        let windows = self
            .windows
            .iter()
            .flat_map(|(gpu, windows)| windows.iter().filter_map(|window| Some((window.until?, *gpu, None))));
        let mut later: Vec<_> = granted.chain(windows).collect();
        later.sort_unstable_by_key(|(end, gpu, _)| (*end, *gpu));
        let mut later = later.into_iter().peekable();
        let mut events = Vec::new();
        for event in known {
            while let Some(between) = later.next_if(|other| other.0 < event.0) {
                events.push(between);
            }
            events.push(event);
        }
        events.extend(later);
        let soon = self.soon();
        events.into_iter().map(|(end, gpu, placed)| (end.max(soon), gpu, placed)).collect()
    }

    /// The next moment.
    fn soon(&self) -> Timestamp {
        self.now.checked_add(SignedDuration::from_micros(1)).unwrap_or(self.now)
    }

    /// Whether a request can lie at a place from a time until another (for good, if there is none), beside what
    /// is held and kept for others; one of a reservation only in the space of that.
    ///
    /// # Errors
    /// For whom the space is kept that it would take; none if it is held.
    pub(super) fn fits(
        &self,
        pool: &Pool,
        place: (usize, Placed),
        from: Timestamp,
        until: Option<Timestamp>,
        who: &Entry,
    ) -> Result<(), Option<Owner>> {
        if who.reservation().is_some_and(|id| !self.is_within(pool, place, id, from)) {
            return Err(None);
        }
        self.room(pool, place, from, until, Some(who))
    }

    /// Whether something new can be reserved at a place, beside what is held and reserved already.
    pub(super) fn has_room(
        &self,
        pool: &Pool,
        place: (usize, Placed),
        from: Timestamp,
        until: Option<Timestamp>,
    ) -> bool {
        self.room(pool, place, from, until, None).is_ok()
    }

    fn room(
        &self,
        pool: &Pool,
        (gpu, placed): (usize, Placed),
        from: Timestamp,
        until: Option<Timestamp>,
        who: Option<&Entry>,
    ) -> Result<(), Option<Owner>> {
        let Some(windows) = self.windows.get(&gpu) else {
            // Nothing is kept here: what fits at the beginning fits later too.
            return if from <= self.now || self.fits_at(pool, gpu, placed, from, who) { Ok(()) } else { Err(None) };
        };
        let within = |window: &&Window| window.from.is_some_and(|at| at > from && until.is_none_or(|until| at < until));
        let later: BTreeSet<Timestamp> = windows.iter().filter(within).filter_map(|window| window.from).collect();
        let mut times = std::iter::once(from).chain(later);
        let Some(bad) = times.find(|at| !self.fits_at(pool, gpu, placed, *at, who)) else { return Ok(()) };
        let span = span_of(pool, gpu, placed);
        let others = windows.iter().filter(|window| window.keeps_out(who) && window.is_active(bad));
        let in_the_way =
            others.clone().find(|window| overlaps(pool, gpu, window.placed, span)).or(others.clone().next());
        Err(in_the_way.map(|window| window.owner))
    }

    /// The space of a GPU at a time, as far as it is known, for a request.
    pub(super) fn space_at(&self, pool: &Pool, gpu: usize, at: Timestamp, who: Option<&Entry>) -> Option<Space> {
        let mut space = pool.gpus().get(gpu)?.clone();
        let model = pool.models().get(space.model)?;
        if at > self.now || self.is_kept(gpu) {
            let known = self.known().ends.get(&gpu).into_iter().flatten().copied();
            let granted = self.granted.iter().filter(|held| held.gpu == gpu);
            let ends = known.chain(granted.filter_map(|held| Some((held.end?, held.placed))));
            for (_, placed) in ends.filter(|(end, _)| *end <= at && at > self.now) {
                space.set(model, placed, SlotState::Idle { reusable: true });
            }
        }
        for window in self.windows.get(&gpu).into_iter().flatten() {
            if window.keeps_out(who) && window.is_active(at) {
                space.set(model, window.placed, SlotState::Held);
            }
        }
        Some(space)
    }

    fn fits_at(&self, pool: &Pool, gpu: usize, placed: Placed, at: Timestamp, who: Option<&Entry>) -> bool {
        let Some(space) = self.space_at(pool, gpu, at, who).filter(|space| space.usable) else { return false };
        pool.models().get(space.model).is_some_and(|model| space.can_have(model, placed))
    }

    fn known(&self) -> &Known {
        self.known.get_or_init(|| {
            let all = (self.held)();
            let mut ends: HashMap<usize, Vec<(Timestamp, Placed)>> = HashMap::new();
            let mut events = Vec::new();
            for held in &all {
                let Some(end) = held.end else { continue };
                ends.entry(held.gpu).or_default().push((end, held.placed));
                events.push((end, held.gpu, held.placed));
            }
            events.sort_unstable();
            Known { all, ends, events }
        })
    }
}

/// Whether an instance at a place takes columns of a span.
fn overlaps(pool: &Pool, gpu: usize, placed: Placed, span: Columns) -> bool {
    span_of(pool, gpu, placed).overlaps(span)
}

/// The columns of an instance at a place; none if there is no such place.
fn span_of(pool: &Pool, gpu: usize, placed: Placed) -> Columns {
    let model = pool.gpus().get(gpu).and_then(|space| pool.models().get(space.model));
    model.and_then(|model| model.profile(placed.profile)?.span_at(placed.start)).unwrap_or_default()
}
