use super::*;
use crate::{
    geometry::{facts, resolve},
    placement::{ExpectedLoss, Shortage, Space},
};
use jiff::Timestamp;
use mlad::api::WaitReason;
use proptest::prelude::*;
use std::collections::VecDeque;

fn pool(gpus: usize) -> Pool {
    Pool::new(vec![Arc::new(facts::model("A100-40GB"))], vec![Space::empty(0); gpus])
}

fn entry(pool: &Pool, seq: u64, user: &str, need: &str) -> Entry {
    let wanted = resolve(&need.parse().unwrap(), pool.models()).unwrap();
    Entry {
        seq,
        user: user.into(),
        limits: Limits::default(),
        wanted: Some(Arc::new(wanted)),
        preparing: false,
        expected_seconds: None,
    }
}

fn blocks(entries: &[Entry], holdings: &Holdings, pool: &Pool, policy: &dyn Policy) -> Vec<Block> {
    let outlook = Outlook::new(entries, holdings, pool, policy);
    entries.iter().map(|entry| outlook.block(entry, holdings, pool, policy)).collect()
}

fn granted(entries: &[Entry], holdings: &mut Holdings, pool: &mut Pool) -> Vec<u64> {
    schedule(entries, holdings, pool, &ExpectedLoss::default()).into_iter().map(|(seq, _)| seq).collect()
}

#[test]
fn first_come_is_first_served_and_large_ones_are_not_overtaken() {
    let mut pool = pool(1);
    let mut holdings = Holdings::default();
    let entries = [entry(&pool, 1, "a", "1g.5gb"), entry(&pool, 2, "b", "7g.40gb"), entry(&pool, 3, "c", "1g.5gb")];
    assert_eq!(granted(&entries, &mut holdings, &mut pool), [1]);
    let blocks = blocks(&entries[1..3], &holdings, &pool, &ExpectedLoss::default());
    assert_eq!(blocks, [Block::Space, Block::Behind(2)]);
}

#[test]
fn one_that_only_its_own_quota_holds_back_keeps_nobody_waiting() {
    let mut pool = pool(1);
    let mut holdings = Holdings::default();
    let limits = Limits { slices: Some(1), gpu_memory_mib: None, gpu_seconds: None };
    let entries: Vec<Entry> =
        [(1, "a"), (2, "a"), (3, "b")].map(|(seq, user)| Entry { limits, ..entry(&pool, seq, user, "1g.5gb") }).into();
    assert_eq!(granted(&entries, &mut holdings, &mut pool), [1, 3]);
    let blocks = blocks(&entries[1..2], &holdings, &pool, &ExpectedLoss::default());
    assert_eq!(blocks, [Block::Quota]);
    let need = "1g.5gb".parse().unwrap();
    let facts =
        Facts { need: &need, ahead: None, free: &[], shortage: None, blocker: None, faults: &[], troubles: &[] };
    let (reason, text) = explain(&entries[1], blocks[0], &holdings, &facts);
    assert_eq!(reason, WaitReason::Quota);
    assert!(text.contains("a holds 1 of 1 slices"), "{text}");
}

#[test]
fn a_wait_for_space_names_the_one_lease_in_the_way() {
    let pool = pool(1);
    let (entry, need) = (entry(&pool, 1, "a", "4g.20gb"), "4g.20gb@a100".parse().unwrap());
    let told = |shortage, blocker| {
        let facts = Facts { need: &need, ahead: None, free: &[], shortage, blocker, faults: &[], troubles: &[] };
        explain(&entry, Block::Space, &Holdings::default(), &facts).1
    };
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
    let mut pool = two_models();
    let mut holdings = Holdings::default();
    let entries = [
        entry(&pool, 1, "a", "7g.40gb"),
        entry(&pool, 2, "b", "7g.40gb"),
        entry(&pool, 3, "c", "2g.10gb"),
        entry(&pool, 4, "d", "2g.12gb"),
    ];
    assert_eq!(granted(&entries, &mut holdings, &mut pool), [1, 4]);
}

#[test]
fn estimates_follow_the_known_ends() {
    let mut pool = pool(1);
    let mut holdings = Holdings::default();
    let policy = ExpectedLoss::default();
    let first = [entry(&pool, 1, "a", "4g.20gb"), entry(&pool, 2, "b", "3g.20gb")];
    let grants = schedule(&first, &mut holdings, &mut pool, &policy);
    let time = |seconds| Timestamp::from_second(seconds).unwrap();
    let end = |nth: usize, seconds| {
        let plan = grants[nth].1.clone().unwrap();
        (time(seconds), plan.gpu, plan.placed)
    };
    let ends = [end(0, 500), end(1, 300)];
    let mut entries =
        vec![entry(&pool, 3, "c", "3g.20gb"), entry(&pool, 4, "d", "2g.10gb"), entry(&pool, 5, "e", "7g.40gb")];
    entries[0].expected_seconds = Some(400);
    let blocks = blocks(&entries, &holdings, &pool, &policy);
    let near: Vec<(&Entry, Block)> = entries.iter().zip(blocks).collect();
    let told = estimates(&near, &ends, &pool, &policy, time(100));
    assert_eq!(told, [Some(time(300)), Some(time(500)), None], "nobody knows when d ends");
}

/// An A100 and an A30.
fn two_models() -> Pool {
    let models = ["A100-40GB", "A30-24GB"].map(|key| Arc::new(facts::model(key)));
    Pool::new(models.into(), vec![Space::empty(0), Space::empty(1)])
}

#[test]
fn a_gpu_that_its_own_limits_forbid_somebody_is_not_kept_for_them() {
    let mut pool = two_models();
    let mut holdings = Holdings::default();
    let limits = Limits { slices: None, gpu_memory_mib: Some(30 << 10), gpu_seconds: None };
    let entries = [
        entry(&pool, 1, "a", "4g.24gb"),
        // A whole A30 is within the limits, a whole A100 is not.
        Entry { limits, ..entry(&pool, 2, "b", "gpu") },
        entry(&pool, 3, "c", "1g.5gb"),
        entry(&pool, 4, "d", "1g.6gb"),
    ];
    assert_eq!(granted(&entries, &mut holdings, &mut pool), [1, 3]);
    let waiting = [entries[1].clone(), entries[3].clone()];
    let blocks = blocks(&waiting, &holdings, &pool, &ExpectedLoss::default());
    assert_eq!(blocks, [Block::Space, Block::Behind(2)]);
}

#[test]
fn what_was_kept_for_one_whose_limits_are_reached_meanwhile_is_granted_to_others() {
    let mut pool = two_models();
    let mut holdings = Holdings::default();
    let limits = Limits { slices: Some(1), gpu_memory_mib: None, gpu_seconds: None };
    let entries = [
        entry(&pool, 1, "a", "3g.20gb"),
        Entry { limits, ..entry(&pool, 2, "b", "7g.40gb") },
        entry(&pool, 3, "c", "1g.5gb"),
        // With this b holds all that b may, and waits for the A100 no longer.
        Entry { limits, ..entry(&pool, 4, "b", "1g.6gb") },
    ];
    assert_eq!(granted(&entries, &mut holdings, &mut pool), [1, 4, 3]);
}

/// User, need, and the user's limits: slices and GiB.
type Asked = (usize, usize, Option<u32>, Option<u64>);

proptest! {
    /// Any waiting requests, by users with any limits, on two models: the line is gone through again slowly,
    /// and at each request what was decided is what had to be. Nobody gets what their limits forbid, nobody is
    /// served from a GPU that somebody ahead waits for, nobody waits who could be served, and no GPU is kept for
    /// somebody whose limits forbid it.
    #[test]
    fn the_line_is_fair(
        asked in prop::collection::vec(
            (0usize..4, 0usize..64, prop::option::of(0u32..4), prop::option::of(0u64..60)),
            1..40,
        ),
    ) {
        let mut pool = two_models();
        pool = Pool::new(pool.models().to_vec(), vec![Space::empty(0), Space::empty(1), Space::empty(0)]);
        let mut needs: Vec<String> =
            pool.models().iter().flat_map(|model| model.profiles()).map(|profile| profile.name.clone()).collect();
        needs.extend(["gpu", "5G", "10G", "20G"].map(str::to_owned));
        let of = |(seq, (user, which, slices, gib)): (usize, &Asked)| Entry {
            limits: Limits { slices: *slices, gpu_memory_mib: gib.map(|gib| gib << 10), gpu_seconds: None },
            ..entry(&pool, seq as u64, ["a", "b", "c", "d"][*user], &needs[which % needs.len()])
        };
        let entries: Vec<Entry> = asked.iter().enumerate().map(of).collect();
        let (mut holdings, policy) = (Holdings::default(), ExpectedLoss::default());
        let (mut space, mut held) = (pool.clone(), Holdings::default());
        let grants = schedule(&entries, &mut holdings, &mut pool, &policy);
        let mut left: VecDeque<_> = grants.iter().cloned().collect();
        let mut served: Vec<u64> = Vec::new();
        loop {
            let before = served.len();
            let mut kept: Vec<Option<u64>> = vec![None; space.gpus().len()];
            for entry in &entries {
                if served.contains(&entry.seq) {
                    continue;
                }
                let wanted = entry.wanted.as_ref().unwrap();
                let (slices, memory) = held.of(&entry.user);
                let may_have = |gpu: usize| {
                    let more = memory_on(&space, space.gpus()[gpu].model, wanted)?;
                    let Limits { slices: most, gpu_memory_mib, .. } = entry.limits;
                    let within = most.is_none_or(|most| slices < most)
                        && gpu_memory_mib.is_none_or(|most| memory + more <= most);
                    within.then_some(gpu)
                };
                let may: Vec<usize> = (0..space.gpus().len()).filter_map(may_have).collect();
                let next = left.front().filter(|(seq, _)| *seq == entry.seq).map(|(_, plan)| plan.clone().unwrap());
                // One that is kept now may be free when the line is gone through again.
                if let Some(plan) = next.filter(|plan| kept[plan.gpu].is_none()) {
                    prop_assert!(may.contains(&plan.gpu), "{entry:?} is over its limits");
                    left.pop_front();
                    held.add(&entry.user, memory_of(&space, &plan));
                    space.reserve(&plan);
                    served.push(entry.seq);
                    continue;
                }
                for gpu in may {
                    let open = kept[gpu].is_none();
                    prop_assert!(!open || plan(&space, wanted, &policy, |at| at == gpu).is_none(), "{entry:?} waits");
                    kept[gpu].get_or_insert(entry.seq);
                }
            }
            if served.len() == before {
                break;
            }
        }
        prop_assert!(left.is_empty(), "overtakes: {left:?}");
        let waiting: Vec<Entry> = entries.into_iter().filter(|entry| !served.contains(&entry.seq)).collect();
        let blocks = blocks(&waiting, &holdings, &pool, &policy);
        prop_assert!(!blocks.contains(&Block::Preparing), "something could still be granted");
    }
}
