use super::*;
use crate::{
    Account, AccountName, Limits,
    geometry::{Placed, facts, resolve},
    placement::{ExpectedLoss, Shortage, Space},
};
use mlad::api::WaitReason;
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Whose slots, where, and until when.
type Running = (u64, LeafId, Charge, Vec<(usize, Placed)>, Option<Timestamp>);

/// Who waits and what runs on some GPUs, with a clock of its own.
struct World {
    pool: Pool,
    accounts: Accounts,
    waiting: BTreeMap<u64, Entry>,
    line: Line,
    running: Vec<Running>,
    rules: Rules,
    now: Timestamp,
    seq: u64,
    reserved: Vec<Reserved>,
    /// For which reservation requests are.
    booked: BTreeMap<u64, u64>,
}

fn time(seconds: u64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + i64::try_from(seconds).unwrap()).unwrap()
}

/// A request of a test: by whom, for what, how many.
fn ask(user: &str, need: &str, seconds: Option<u64>) -> Asked {
    Asked { user: user.into(), project: None, need: need.into(), slices: 1, priority: 0, seconds }
}

#[derive(Debug, Clone)]
struct Asked {
    user: String,
    project: Option<String>,
    need: String,
    slices: u32,
    priority: i32,
    seconds: Option<u64>,
}

impl World {
    fn new(keys: &[&str], backfill: Backfill) -> Self {
        let models: Vec<_> = keys.iter().map(|key| Arc::new(facts::model(key))).collect();
        let spaces = (0..keys.len()).map(Space::empty).collect();
        let day = SignedDuration::from_hours(24);
        Self {
            pool: Pool::new(models, spaces),
            accounts: Accounts::new(Duration::from_secs(7 * 86_400)),
            waiting: BTreeMap::new(),
            line: Line::default(),
            running: Vec::new(),
            rules: Rules { backfill, patience: day, notice: SignedDuration::from_secs(60) },
            now: time(0),
            seq: 0,
            reserved: Vec::new(),
            booked: BTreeMap::new(),
        }
    }

    /// GPUs of one model.
    fn a100s(gpus: usize, backfill: Backfill) -> Self {
        let mut world = Self::new(&["A100-40GB"], backfill);
        world.pool = Pool::new(world.pool.models().to_vec(), vec![Space::empty(0); gpus]);
        world
    }

    fn ask(&mut self, asked: &Asked) -> u64 {
        self.seq += 1;
        let project: Option<Arc<str>> = asked.project.as_deref().map(Into::into);
        let mut entry = Entry {
            seq: self.seq,
            leaf: self.accounts.leaf(&asked.user.as_str().into(), project.as_ref()),
            priority: asked.priority,
            since: self.now,
            wanted: Some(Arc::new(resolve(&asked.need.parse().unwrap(), self.pool.models()).unwrap())),
            gang: Gang { slices: asked.slices, nodes: None },
            only_on: None,
            share: 0,
            preparing: false,
            expected_seconds: asked.seconds,
            booking: None,
        };
        let wanted = (0..self.pool.models().len()).find_map(|model| wanted_on(&self.pool, model, &entry));
        entry.share = wanted.unwrap().share;
        self.line.insert(&entry);
        self.waiting.insert(self.seq, entry);
        self.seq
    }

    fn limit(&mut self, name: AccountName, parent: Option<&str>, limits: Limits) {
        let account = Account { name, parent: parent.map(str::to_owned), shares: 1, limits };
        self.accounts.set(&[account], self.now).unwrap();
    }

    fn slots(running: &[Running]) -> Vec<Held> {
        let slot = |(seq, _, _, places, end): &Running| {
            let held = |(gpu, placed): &(usize, Placed)| Held {
                gpu: *gpu,
                placed: *placed,
                end: *end,
                fence: *seq,
                preemptible: None,
            };
            places.iter().map(held).collect::<Vec<_>>()
        };
        running.iter().flat_map(slot).collect()
    }

    /// Serves who can be served, again after what had to be destroyed for others is gone; gives their numbers.
    fn serve(&mut self) -> Vec<u64> {
        let mut served = Vec::new();
        loop {
            let grants = self.serve_with(&|_| None).grants;
            if grants.is_empty() {
                return served;
            }
            served.extend(grants.into_iter().map(|grant| grant.seq));
        }
    }

    fn serve_with(&mut self, preemptible: &dyn Fn(u64) -> Option<i32>) -> Decision {
        let held = || {
            let mut slots = Self::slots(&self.running);
            slots.iter_mut().for_each(|held| held.preemptible = preemptible(held.fence));
            slots
        };
        let scene = Scene {
            now: self.now,
            policy: &ExpectedLoss::default(),
            rules: self.rules,
            held: &held,
            reserved: &self.reserved,
        };
        let line = self.line.order(&self.waiting, &self.accounts, self.rules.patience, self.now);
        let decision = schedule(line, &self.accounts, &mut self.pool, &scene);
        for Grant { seq, plans } in &decision.grants {
            let entry = self.waiting.remove(seq).unwrap();
            self.line.remove(&entry);
            let model = plans.first().map(|plan| self.pool.gpus()[plan.gpu].model);
            let Some(wanted) = model.and_then(|model| wanted_on(&self.pool, model, &entry)) else { continue };
            let charge = Charge {
                slices: wanted.slices,
                memory_mib: wanted.memory_mib,
                share: wanted.share,
                since: self.now,
                expected_seconds: wanted.expected_seconds,
            };
            self.accounts.add(entry.leaf, &charge, self.now);
            // The driver takes no time here: what had to be destroyed is gone.
            plans.iter().for_each(|plan| self.pool.occupy(plan));
            let places = plans.iter().map(|plan| (plan.gpu, plan.placed)).collect();
            self.running.push((*seq, entry.leaf, charge, places, entry.end(self.now)));
        }
        decision
    }

    fn outlook(&self) -> Outlook {
        let held = || Self::slots(&self.running);
        let scene = Scene {
            now: self.now,
            policy: &ExpectedLoss::default(),
            rules: self.rules,
            held: &held,
            reserved: &self.reserved,
        };
        let line = self.line.order(&self.waiting, &self.accounts, self.rules.patience, self.now);
        Outlook::new(line, &self.accounts, &mut self.pool.clone(), &scene)
    }

    fn block(&self, seq: u64) -> Block {
        self.outlook().block(&self.waiting[&seq], &self.accounts, &self.pool, self.now)
    }

    fn end(&mut self, seq: u64) {
        let at = self.running.iter().position(|running| running.0 == seq).unwrap();
        let (_, leaf, charge, places, _) = self.running.remove(at);
        self.accounts.take(leaf, &charge, self.now);
        places.into_iter().for_each(|(gpu, placed)| self.pool.release(gpu, placed));
    }

    /// Lets time pass until the next known end, which ends, or until a reservation begins or ends. False if there is
    /// nothing more to come.
    fn pass(&mut self) -> bool {
        let next = self.running.iter().filter_map(|running| Some((running.4?, running.0))).min();
        let turns = self.reserved.iter().flat_map(|reserved| [reserved.booking.from, reserved.booking.until]);
        let turn = turns.filter(|at| *at > self.now).min();
        if let Some(turn) = turn.filter(|turn| next.is_none_or(|(end, _)| end > *turn)) {
            self.now = turn;
            self.reserved.retain(|reserved| reserved.booking.until > turn);
            return true;
        }
        let Some((end, seq)) = next else { return false };
        self.now = self.now.max(end);
        self.end(seq);
        true
    }
}

#[test]
fn first_come_is_first_served_and_large_ones_are_not_overtaken() {
    for backfill in [Backfill::None, Backfill::Easy, Backfill::Conservative] {
        let mut world = World::a100s(1, backfill);
        let asked = [ask("a", "1g.5gb", None), ask("b", "7g.40gb", None), ask("c", "1g.5gb", None)];
        for asked in &asked {
            world.ask(asked);
        }
        assert_eq!(world.serve(), [1], "{backfill}");
        assert_eq!((world.block(2), world.block(3)), (Block::Space, Block::Behind(2)), "{backfill}");
    }
}

#[test]
fn who_ends_in_time_is_served_beside_who_waits() {
    let mut world = World::a100s(1, Backfill::Easy);
    let asked = [ask("a", "4g.20gb", Some(1000)), ask("b", "7g.40gb", Some(1000))];
    for asked in &asked {
        world.ask(asked);
    }
    assert_eq!(world.serve(), [1]);
    let (short, long) = (world.ask(&ask("c", "1g.5gb", Some(1000))), world.ask(&ask("d", "1g.5gb", Some(1001))));
    assert_eq!(world.serve(), [short], "the longer one would delay b");
    assert_eq!(world.outlook().estimate(2), Some(time(1000)));
    assert_eq!(world.block(long), Block::Behind(2));
    world.rules.backfill = Backfill::None;
    let short = world.ask(&ask("e", "1g.5gb", Some(10)));
    assert_eq!(world.serve(), [0; 0]);
    assert_eq!(world.block(short), Block::Behind(2));
}

#[test]
fn one_gpu_is_left_to_run_empty_and_the_others_are_used() {
    let mut world = World::a100s(2, Backfill::Easy);
    for _ in 0..2 {
        world.ask(&ask("a", "4g.20gb", None));
    }
    assert_eq!(world.serve(), [1, 2]);
    let whole = world.ask(&ask("b", "7g.40gb", None));
    let small: Vec<u64> = (0..6).map(|_| world.ask(&ask("c", "1g.5gb", None))).collect();
    assert_eq!(world.serve(), small[..3], "three columns of one GPU");
    assert_eq!(world.block(whole), Block::Space);
    let kept: Vec<usize> = world.running.iter().skip(2).map(|running| running.3[0].0).collect();
    assert!(kept.iter().all(|gpu| *gpu == kept[0]), "{kept:?}");
    let other = world.running.iter().find(|running| running.3[0].0 != kept[0]).unwrap().0;
    world.end(other);
    assert_eq!(world.serve()[0], whole);
}

#[test]
fn one_that_only_its_own_quota_holds_back_keeps_nobody_waiting() {
    let mut world = World::a100s(1, Backfill::Easy);
    let limits = Limits { slices: Some(1), ..Limits::default() };
    world.limit(AccountName::User("a".into()), None, limits);
    for user in ["a", "a", "b"] {
        world.ask(&ask(user, "1g.5gb", None));
    }
    assert_eq!(world.serve(), [1, 3]);
    let Block::Quota(account) = world.block(2) else { panic!("{:?}", world.block(2)) };
    let need = "1g.5gb".parse().unwrap();
    let state = world.accounts.state(account, world.now).unwrap();
    let facts = Facts { account: Some(&state), ..facts_of(&need) };
    let (reason, text) = explain(world.block(2), &facts);
    assert_eq!(reason, WaitReason::Quota);
    assert!(text.contains("a holds 1 of 1 slices"), "{text}");
}

fn facts_of(need: &mlad::api::Need) -> Facts<'_> {
    Facts {
        need,
        slices: 1,
        account: None,
        ahead: None,
        free: &[],
        reservation: None,
        shortage: None,
        blocker: None,
        faults: &[],
        troubles: &[],
    }
}

#[test]
fn a_wait_for_space_names_the_one_lease_in_the_way() {
    let need = "4g.20gb@a100".parse().unwrap();
    let told = |shortage, blocker| explain(Block::Space, &Facts { shortage, blocker, ..facts_of(&need) }).1;
    let lease = Some("w-1 of bob (1g.5gb on GPU 0)");
    assert_eq!(
        told(Some(Shortage::Fragmented), lease),
        "no 4g.20gb on a GPU of the model a100 is free; every slice is taken; enough is free in all but not in one \
         piece: w-1 of bob (1g.5gb on GPU 0) alone is in the way"
    );
    assert!(told(Some(Shortage::Full), lease).ends_with("it fits as soon as w-1 of bob (1g.5gb on GPU 0) ends"));
    assert!(told(Some(Shortage::Full), None).ends_with("it fits when more than one lease has ended"));
    assert!(told(None, None).ends_with("every slice is taken"));
}

#[test]
fn a_wait_on_one_model_does_not_hold_up_another() {
    let mut world = World::new(&["A100-40GB", "A30-24GB"], Backfill::None);
    for (user, need) in [("a", "7g.40gb"), ("b", "7g.40gb"), ("c", "2g.10gb"), ("d", "2g.12gb")] {
        world.ask(&ask(user, need, None));
    }
    assert_eq!(world.serve(), [1, 4]);
}

#[test]
fn a_projects_limits_hold_for_all_its_members_and_those_it_lies_in() {
    let mut world = World::a100s(2, Backfill::Easy);
    let limits = |slices| Limits { slices: Some(slices), ..Limits::default() };
    world.limit(AccountName::Project("lab".into()), None, limits(3));
    world.limit(AccountName::Project("vision".into()), Some("lab"), limits(2));
    let of = |user: &str, project: &str| Asked { project: Some(project.into()), ..ask(user, "1g.5gb", None) };
    for (user, project) in [("a", "vision"), ("b", "vision"), ("a", "vision"), ("a", "lab"), ("b", "lab")] {
        world.ask(&of(user, project));
    }
    world.ask(&ask("a", "1g.5gb", None));
    let served = world.serve();
    assert_eq!(served.len(), 4, "three of the lab's: {served:?}");
    assert!(served.contains(&6), "outside of projects a is free");
    let left: Vec<u64> = world.waiting.keys().copied().collect();
    assert!(left.iter().all(|seq| matches!(world.block(*seq), Block::Quota(_))));
    let circle = Account {
        name: AccountName::Project("lab".into()),
        parent: Some("vision".into()),
        shares: 1,
        limits: limits(9),
    };
    assert!(world.accounts.set(&[circle], world.now).unwrap_err().contains("lies within itself"));
}

#[test]
fn gpu_hours_are_never_promised_twice() {
    let mut world = World::a100s(1, Backfill::Easy);
    let limits = Limits { gpu_seconds: Some(1000), ..Limits::default() };
    world.limit(AccountName::User("a".into()), None, limits);
    // A seventh of the compute, an eighth of the memory: the larger counts.
    for seconds in [3500, 3500, 3500] {
        world.ask(&ask("a", "1g.5gb", Some(seconds)));
    }
    assert_eq!(world.serve(), [1, 2], "two are 1,000 s of a GPU");
    assert!(matches!(world.block(3), Block::Quota(_)));
}

#[test]
fn users_of_equal_standing_take_turns_and_who_had_less_is_first() {
    let mut world = World::a100s(1, Backfill::Easy);
    for user in ["a", "a", "a", "b", "b"] {
        world.ask(&ask(user, "1g.5gb", None));
    }
    assert_eq!(world.serve(), [1, 4, 2, 5, 3]);
    let (more, less) = (world.ask(&ask("a", "7g.40gb", None)), world.ask(&ask("b", "7g.40gb", None)));
    let order: Vec<u64> =
        world.line.order(&world.waiting, &world.accounts, world.rules.patience, world.now).map(|e| e.seq).collect();
    assert_eq!(order, [less, more], "a holds three, b two");
    let urgent = world.ask(&Asked { priority: 5, ..ask("a", "7g.40gb", None) });
    let first = |world: &World| {
        let mut line = world.line.order(&world.waiting, &world.accounts, world.rules.patience, world.now);
        line.next().unwrap().seq
    };
    assert_eq!(first(&world), urgent);
    world.now = time(86_400);
    let late = world.ask(&Asked { priority: 100, ..ask("c", "7g.40gb", None) });
    assert_eq!((first(&world), late), (more, urgent + 1), "patience is over");
}

#[test]
fn those_of_less_priority_give_way_as_few_as_can_be() {
    let mut world = World::a100s(2, Backfill::Easy);
    for need in ["4g.20gb", "3g.20gb", "4g.20gb", "2g.10gb", "1g.5gb"] {
        world.ask(&ask("a", need, None));
    }
    assert_eq!(world.serve().len(), 5);
    let urgent = world.ask(&Asked { priority: 1, ..ask("b", "4g.20gb", None) });
    let all = world.serve_with(&|_| Some(0)).preempt.unwrap();
    assert_eq!((all.seq, all.fences.len()), (urgent, 1));
    let one = world.serve_with(&|fence| (fence == 1).then_some(0)).preempt.unwrap();
    assert_eq!(one.fences.into_iter().collect::<Vec<_>>(), [1]);
    assert_eq!(world.serve_with(&|_| Some(1)).preempt, None, "equal priority gives no way");
    world.running.iter_mut().for_each(|running| running.4 = Some(time(60)));
    assert_eq!(world.serve_with(&|_| Some(0)).preempt, None, "it has its space within the notice");
}

#[test]
fn a_gang_waits_for_all_of_it_and_those_behind_do_not_take_it_apart() {
    let mut world = World::a100s(2, Backfill::Easy);
    world.ask(&ask("a", "7g.40gb", Some(100)));
    assert_eq!(world.serve(), [1]);
    let gang = world.ask(&Asked { slices: 2, ..ask("b", "7g.40gb", Some(100)) });
    let long = world.ask(&ask("c", "1g.5gb", Some(101)));
    let short = world.ask(&ask("c", "1g.5gb", Some(100)));
    assert_eq!(world.serve(), [short]);
    assert_eq!(world.outlook().estimate(gang), Some(time(100)));
    assert_eq!(world.block(long), Block::Behind(gang));
    world.pass();
    world.pass();
    assert_eq!(world.serve(), [gang]);
}

fn any_asked() -> impl Strategy<Value = Asked> {
    let needs = ["1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"];
    let who = (0usize..4, prop::option::of(0usize..2));
    (who, 0usize..6, 1u32..3, -1i32..2, 1u64..2000).prop_map(
        move |((user, project), need, slices, priority, seconds)| Asked {
            user: ["a", "b", "c", "d"][user].into(),
            project: project.map(|project| ["p", "q"][project].into()),
            need: needs[need].into(),
            slices,
            priority,
            seconds: Some(seconds),
        },
    )
}

fn any_backfill() -> impl Strategy<Value = Backfill> {
    prop::sample::select(vec![Backfill::None, Backfill::Easy, Backfill::Conservative])
}

impl World {
    /// Reserves what was asked, if it can be.
    fn reserve(&mut self, id: u64, need: &str, from: u64, until: u64) -> bool {
        let booking = Booking { id, from: time(from), until: time(until) };
        let wanted = resolve(&need.parse().unwrap(), self.pool.models()).unwrap();
        let held = || Self::slots(&self.running);
        let scene = Scene {
            now: self.now,
            policy: &ExpectedLoss::default(),
            rules: self.rules,
            held: &held,
            reserved: &self.reserved,
        };
        let Some(places) = places_for(booking, &wanted, 1, &self.pool, &scene) else { return false };
        self.reserved.extend(places.into_iter().map(|(gpu, placed)| Reserved { booking, gpu, placed }));
        true
    }

    fn span(&self, gpu: usize, placed: Placed) -> crate::geometry::Columns {
        let model = &self.pool.models()[self.pool.gpus()[gpu].model];
        model.profile(placed.profile).unwrap().span_at(placed.start).unwrap()
    }

    /// Who runs, or would go on to run, in space that is reserved for others while it is.
    fn intruders(&self) -> Vec<u64> {
        let meets = |running: &Running, reserved: &Reserved| {
            let over = |(gpu, placed): &(usize, Placed)| {
                *gpu == reserved.gpu && self.span(*gpu, *placed).overlaps(self.span(*gpu, reserved.placed))
            };
            running.3.iter().any(over)
                && running.4.is_none_or(|end| end > reserved.booking.from)
                && reserved.booking.until > self.now
        };
        let own = |seq: u64, id: u64| self.booked.get(&seq) == Some(&id);
        let running = self.running.iter().filter(|running| {
            self.reserved.iter().any(|reserved| meets(running, reserved) && !own(running.0, reserved.booking.id))
        });
        running.map(|running| running.0).collect()
    }

    fn ask_within(&mut self, asked: &Asked, booking: Booking) -> u64 {
        let seq = self.ask(asked);
        self.waiting.get_mut(&seq).unwrap().booking = Some(booking);
        self.booked.insert(seq, booking.id);
        seq
    }
}

#[test]
fn what_is_reserved_serves_only_who_ends_before_and_who_it_is_for() {
    let mut world = World::a100s(1, Backfill::Easy);
    assert!(world.reserve(7, "4g.20gb", 1000, 2000));
    let booking = world.reserved[0].booking;
    let own = world.ask_within(&ask("a", "2g.10gb", Some(5000)), booking);
    let (open, long) = (world.ask(&ask("b", "4g.20gb", None)), world.ask(&ask("b", "4g.20gb", Some(1001))));
    let short = world.ask(&ask("c", "4g.20gb", Some(1000)));
    let beside = world.ask(&ask("d", "3g.20gb", None));
    assert_eq!(world.serve(), [short, beside]);
    assert_eq!(world.block(own), Block::NotYet);
    assert_eq!(world.outlook().estimate(own), Some(time(1000)));
    assert_eq!(world.outlook().estimate(open), Some(time(2000)), "when the reservation is over");
    world.end(short);
    assert_eq!(world.block(long), Block::Reserved(7));
    world.now = time(1000);
    assert_eq!(world.serve(), [own]);
    assert_eq!(world.running.last().unwrap().4, Some(time(2000)), "it ends with its reservation");
    let more = world.ask_within(&ask("a", "3g.20gb", Some(10)), booking);
    assert_eq!((world.serve(), world.block(more)), (Vec::new(), Block::Full));
}

#[test]
fn what_is_in_the_way_of_a_reservation_is_told_apart() {
    let mut world = World::a100s(1, Backfill::Easy);
    world.ask(&ask("a", "4g.20gb", None));
    world.serve();
    assert!(world.reserve(7, "3g.20gb", 1000, 2000));
    assert!(!world.reserve(8, "3g.20gb", 1999, 3000));
    let wanted = |need: &str| resolve(&need.parse().unwrap(), world.pool.models()).unwrap();
    let held = || World::slots(&world.running);
    let scene = Scene {
        now: world.now,
        policy: &ExpectedLoss::default(),
        rules: world.rules,
        held: &held,
        reserved: &world.reserved,
    };
    let told = |need: &str, slices, from, until| {
        let booking = Booking { id: 9, from: time(from), until: time(until) };
        in_the_way(booking, &wanted(need), slices, &world.pool, &scene)
    };
    let (lease, other) = (BTreeSet::from([1]), BTreeSet::from([7]));
    assert_eq!(told("4g.20gb", 1, 2000, 3000), InTheWay::Leases(lease.clone()));
    assert_eq!(told("3g.20gb", 1, 1999, 3000), InTheWay::Either(lease.clone(), other.clone()));
    assert_eq!(told("7g.40gb", 1, 1999, 3000), InTheWay::Both(lease, other));
    assert_eq!(told("7g.40gb", 2, 2000, 3000), InTheWay::Nothing);
}

fn any_reserved() -> impl Strategy<Value = Vec<(usize, u64, u64)>> {
    prop::collection::vec((0usize..6, 0u64..6000, 121u64..3000), 0..5)
}

const NEEDS: [&str; 6] = ["1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"];

proptest! {
    /// Nobody is ever where they could be in the way of a reservation, one that was accepted has its space when it
    /// begins, and everybody is served in the end.
    #[test]
    fn what_is_reserved_is_kept_and_nobody_starves(
        asked in prop::collection::vec(any_asked(), 1..25),
        reserved in any_reserved(),
        backfill in any_backfill(),
    ) {
        let mut world = World::a100s(2, backfill);
        let mut accepted = BTreeMap::new();
        let mut reserved = (100u64..).zip(reserved);
        let mut served = 0;
        for asked in &asked {
            if let Some((id, (need, from, length))) = reserved.next()
                && world.reserve(id, NEEDS[need], from, from + length)
            {
                accepted.insert(id, (NEEDS[need], time(from)));
            }
            world.ask(asked);
            served += world.serve().len();
            prop_assert_eq!(world.intruders(), Vec::<u64>::new());
        }
        let mut own = 0;
        loop {
            let begins: Vec<u64> =
                accepted.iter().filter(|(_, (_, from))| *from <= world.now).map(|(id, _)| *id).collect();
            for id in begins {
                let (need, _) = accepted.remove(&id).unwrap();
                let Some(booking) = world.reserved.iter().map(|r| r.booking).find(|b| b.id == id) else { continue };
                let seq = world.ask_within(&ask("e", need, None), booking);
                let at_once = world.serve();
                prop_assert!(at_once.contains(&seq), "{} has not its space: {:?}", id, world.running);
                own += 1;
                served += at_once.len();
            }
            served += world.serve().len();
            prop_assert_eq!(world.intruders(), Vec::<u64>::new());
            if !world.pass() {
                break;
            }
        }
        prop_assert_eq!(served, asked.len() + own, "left waiting: {:?}", world.waiting.keys());
    }
}

proptest! {
    /// Whatever is asked, in whatever mode: nobody holds more than their limits, or their projects', all of a gang
    /// is granted or nothing, and in the end everybody is served.
    #[test]
    fn limits_hold_gangs_are_whole_and_nobody_starves(
        asked in prop::collection::vec(any_asked(), 1..30),
        backfill in any_backfill(),
        most in 2u32..5,
    ) {
        let mut world = World::a100s(3, backfill);
        let limits = Limits { slices: Some(most), ..Limits::default() };
        world.limit(AccountName::User("a".into()), None, limits);
        world.limit(AccountName::Project("p".into()), None, limits);
        world.limit(AccountName::Project("q".into()), Some("p"), limits);
        let mut served = 0;
        for asked in &asked {
            world.ask(asked);
            served += world.serve().len();
        }
        loop {
            for state in world.accounts.states(world.now) {
                prop_assert!(state.account.limits.slices.is_none_or(|most| state.slices <= most), "{:?}", state);
            }
            for (seq, _, charge, places, _) in &world.running {
                prop_assert_eq!(places.len(), charge.slices as usize, "{}", seq);
            }
            if !world.pass() {
                break;
            }
            served += world.serve().len();
        }
        prop_assert_eq!(served, asked.len(), "left waiting: {:?}", world.waiting.keys());
    }

    /// While everything lasts as long as it said, who is first in line has its space no later than was foretold,
    /// whoever is served beside it; and nobody has theirs before there is room.
    #[test]
    fn the_first_in_line_is_never_delayed(
        asked in prop::collection::vec(any_asked(), 2..25),
        conservative in any::<bool>(),
        reserved in any_reserved(),
    ) {
        let backfill = if conservative { Backfill::Conservative } else { Backfill::Easy };
        let mut world = World::a100s(2, backfill);
        for (id, (need, from, length)) in (100..).zip(reserved) {
            world.reserve(id, NEEDS[need], from, from + length);
        }
        // Of one priority and one user, so that who is first stays first.
        for asked in &asked {
            world.ask(&Asked { user: "a".into(), project: None, priority: 0, ..asked.clone() });
        }
        let mut foretold: Option<(u64, Timestamp)> = None;
        loop {
            let served = world.serve();
            if let Some((seq, at)) = foretold
                && (served.contains(&seq) || world.now > at)
            {
                prop_assert!(served.contains(&seq) && world.now <= at, "{} was to begin at {}", seq, at);
                foretold = None;
            }
            let first = world.line.order(&world.waiting, &world.accounts, world.rules.patience, world.now).next();
            if let (None, Some(first)) = (foretold, first) {
                let at = world.outlook().estimate(first.seq);
                prop_assert!(at.is_some_and(|at| at >= world.now), "{:?} at {}: {:?} beside {:?}", at, world.now, first, world.running);
                foretold = at.map(|at| (first.seq, at));
            }
            if !world.pass() {
                break;
            }
        }
        prop_assert!(world.waiting.is_empty());
    }

    /// The line has everybody once, whoever they are.
    #[test]
    fn everybody_stands_in_line_once(asked in prop::collection::vec(any_asked(), 0..40), later in 0u64..100_000) {
        let mut world = World::a100s(1, Backfill::Easy);
        for asked in &asked {
            world.ask(asked);
            world.now = world.now.checked_add(SignedDuration::from_secs(3000)).unwrap();
        }
        world.now = world.now.checked_add(SignedDuration::from_secs(i64::try_from(later).unwrap())).unwrap();
        let line = world.line.order(&world.waiting, &world.accounts, world.rules.patience, world.now);
        let order: Vec<&Entry> = line.collect();
        let mut seqs: Vec<u64> = order.iter().map(|entry| entry.seq).collect();
        let old = |entry: &&&Entry| world.now.duration_since(entry.since) >= world.rules.patience;
        let young: Vec<i32> = order.iter().filter(|entry| !old(entry)).map(|entry| entry.priority).collect();
        prop_assert!(young.is_sorted_by(|a, b| a >= b), "{:?}", young);
        seqs.sort_unstable();
        prop_assert_eq!(seqs, world.waiting.keys().copied().collect::<Vec<_>>());
    }
}
