use super::*;
use crate::{
    geometry::{facts, resolve},
    placement::{ExpectedLoss, Space},
};
use jiff::Timestamp;
use mlad::api::WaitReason;
use proptest::prelude::*;

fn pool(gpus: usize) -> Pool {
    Pool { models: vec![Arc::new(facts::model("A100-40GB"))], gpus: (0..gpus).map(|_| Space::empty(0)).collect() }
}

fn entry(pool: &Pool, seq: u64, user: &str, need: &str) -> Entry {
    let wanted = resolve(&need.parse().unwrap(), &pool.models).unwrap();
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
    let limits = Limits { slices: Some(1), gpu_memory_mib: None };
    let entries: Vec<Entry> =
        [(1, "a"), (2, "a"), (3, "b")].map(|(seq, user)| Entry { limits, ..entry(&pool, seq, user, "1g.5gb") }).into();
    assert_eq!(granted(&entries, &mut holdings, &mut pool), [1, 3]);
    let blocks = blocks(&entries[1..2], &holdings, &pool, &ExpectedLoss::default());
    assert_eq!(blocks, [Block::Quota]);
    let need = "1g.5gb".parse().unwrap();
    let facts = Facts { need: &need, ahead: None, free: &[], faults: &[], troubles: &[] };
    let (reason, text) = explain(&entries[1], blocks[0], &holdings, &facts);
    assert_eq!(reason, WaitReason::Quota);
    assert!(text.contains("a holds 1 of 1 slices"), "{text}");
}

#[test]
fn a_wait_on_one_model_does_not_hold_up_another() {
    let mut pool = pool(1);
    pool.models.push(Arc::new(facts::model("A30-24GB")));
    pool.gpus.push(Space::empty(1));
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

proptest! {
    /// Any waiting requests on any pool: no user over the limits, nobody behind is served from a GPU that
    /// somebody ahead waits for, and what is scheduled leaves nothing schedulable.
    #[test]
    fn the_line_is_fair(
        asked in prop::collection::vec((0usize..4, 0usize..7, prop::option::of(0u32..4)), 1..40),
    ) {
        let mut pool = pool(2);
        let names: Vec<String> = pool.models[0].profiles().iter().map(|p| p.name.clone()).collect();
        let entries: Vec<Entry> = asked.iter().enumerate().map(|(seq, (user, which, most))| Entry {
            limits: Limits { slices: *most, gpu_memory_mib: None },
            ..entry(&pool, seq as u64, ["a", "b", "c", "d"][*user], &names[which % names.len()])
        }).collect();
        let mut holdings = Holdings::default();
        let policy = ExpectedLoss::default();
        let grants: Vec<u64> = granted(&entries, &mut holdings, &mut pool);
        for entry in entries.iter().filter(|entry| grants.contains(&entry.seq)) {
            if let Some(most) = entry.limits.slices {
                let before = entries.iter().filter(|e| e.seq <= entry.seq && e.user == entry.user);
                let held = before.filter(|e| grants.contains(&e.seq)).count();
                prop_assert!(held <= most as usize);
            }
        }
        let waiting: Vec<Entry> = entries.into_iter().filter(|entry| !grants.contains(&entry.seq)).collect();
        let blocks = blocks(&waiting, &holdings, &pool, &policy);
        prop_assert!(!blocks.contains(&Block::Preparing), "something could still be granted");
        if let Some(at) = blocks.iter().position(|block| *block == Block::Space) {
            let overtook = grants.iter().any(|seq| *seq > waiting[at].seq);
            prop_assert!(!overtook, "overtaken although it waits for space");
        }
    }
}
