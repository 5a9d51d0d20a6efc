use super::*;
use crate::geometry::{Columns, Model, facts, is_legal, resolve};
use proptest::prelude::*;
use std::sync::Arc;

fn pool(keys: &[&str], gpus: usize) -> Pool {
    let models: Vec<Arc<Model>> = keys.iter().map(|key| Arc::new(facts::model(key))).collect();
    let gpus = (0..gpus).map(|at| Space::empty(at % models.len())).collect();
    Pool::new(models, gpus)
}

fn wanted(pool: &Pool, need: &str) -> Resolution {
    resolve(&need.parse().unwrap(), pool.models()).unwrap()
}

fn place(pool: &mut Pool, need: &str) -> Option<Plan> {
    let plan = plan(pool, &wanted(pool, need), &ExpectedLoss::default(), |_, _| true)?;
    pool.occupy(&plan);
    Some(plan)
}

/// The index of a profile on the first model.
fn at(pool: &Pool, name: &str, start: u32) -> Placed {
    Placed { profile: pool.models()[0].profiles().iter().position(|p| p.name == name).unwrap(), start }
}

#[test]
fn three_pairs_fit_each_gpu_in_any_number() {
    let mut pool = pool(&["A100-40GB"], 8);
    for nth in 0..24 {
        assert!(place(&mut pool, "2g.10gb").is_some(), "the {nth}th");
    }
    assert_eq!(place(&mut pool, "2g.10gb"), None);
    assert!(place(&mut pool, "1g.5gb").is_some());
}

#[test]
fn small_ones_leave_room_for_large_ones() {
    let mut pool = pool(&["A100-40GB"], 2);
    let first = place(&mut pool, "1g.5gb").unwrap();
    assert_eq!(first.placed.start, 6, "column 6 and 7 are of least use to others");
    assert_eq!(place(&mut pool, "2g.10gb").unwrap().gpu, first.gpu);
    assert!(place(&mut pool, "4g.20gb").is_some());
    assert!(place(&mut pool, "7g.40gb").is_some());
}

#[test]
fn an_idle_instance_is_used_rather_than_made() {
    let mut pool = pool(&["A100-40GB"], 2);
    let idle = at(&pool, "2g.10gb", 4);
    pool.change(1, |model, space| space.set(model, idle, SlotState::Idle { reusable: true }));
    let plan = plan(&pool, &wanted(&pool, "2g.10gb"), &ExpectedLoss::default(), |_, _| true).unwrap();
    assert_eq!((plan.gpu, plan.placed, plan.action), (1, idle, Action::Reuse));
}

#[test]
fn only_what_is_in_the_way_is_destroyed() {
    let mut pool = pool(&["A100-40GB"], 1);
    for start in 0..7 {
        let state = if start == 5 { SlotState::Held } else { SlotState::Idle { reusable: true } };
        let one = at(&pool, "1g.5gb", start);
        pool.change(0, |model, space| space.set(model, one, state));
    }
    let plan = place(&mut pool, "3g.20gb").unwrap();
    assert_eq!(plan.placed.start, 0);
    let destroyed = (0..4).map(|start| at(&pool, "1g.5gb", start)).collect();
    assert_eq!(plan.action, Action::Make { destroy: destroyed });
}

#[test]
fn an_idle_holder_of_the_media_engines_gives_way() {
    let mut pool = pool(&["A30-24GB"], 1);
    let idle = at(&pool, "1g.6gb+me", 0);
    pool.change(0, |model, space| space.set(model, idle, SlotState::Idle { reusable: true }));
    let other = at(&pool, "1g.6gb", 1);
    pool.change(0, |model, space| space.set(model, other, SlotState::Held));
    let plan = place(&mut pool, "2g.12gb+me").unwrap();
    assert_eq!(plan.placed.start, 2);
    assert_eq!(plan.action, Action::Make { destroy: vec![idle] });
}

#[test]
fn a_barred_placement_and_a_faulty_gpu_are_passed_over() {
    let mut pool = pool(&["A100-40GB"], 2);
    let first = plan(&pool, &wanted(&pool, "1g.5gb"), &ExpectedLoss::default(), |_, _| true).unwrap();
    pool.change(first.gpu, |_, space| space.bar(first.placed));
    let second = plan(&pool, &wanted(&pool, "1g.5gb"), &ExpectedLoss::default(), |_, _| true).unwrap();
    assert_ne!((first.gpu, first.placed), (second.gpu, second.placed));
    for gpu in 0..2 {
        pool.change(gpu, |_, space| space.usable = false);
    }
    assert_eq!(plan(&pool, &wanted(&pool, "1g.5gb"), &ExpectedLoss::default(), |_, _| true), None);
}

proptest! {
    /// Random takes, releases and leftovers: no plan touches what is held, what comes out is always legal,
    /// and there is a plan whenever some start is free.
    #[test]
    fn plans_are_sound_and_complete(
        keys in prop::sample::select(vec![
            vec!["A100-40GB"], vec!["A30-24GB"], vec!["A100-40GB", "A100-80GB"], vec!["RTX-PRO-6000-Blackwell-96GB"],
        ]),
        steps in prop::collection::vec((any::<bool>(), 0usize..64, 0usize..64), 1..80),
    ) {
        let mut pool = pool(&keys, 3);
        let mut held: Vec<(usize, Placed)> = Vec::new();
        for (take, which, pick) in steps {
            if !take && !held.is_empty() {
                let (gpu, placed) = held.swap_remove(pick % held.len());
                pool.release(gpu, placed);
                continue;
            }
            let profiles: Vec<_> = pool.models().iter().flat_map(|m| m.profiles()).map(|p| p.name.clone()).collect();
            let need = wanted(&pool, &profiles[which % profiles.len()]);
            let fits = |gpu: usize| {
                let space = &pool.gpus()[gpu];
                let model = &pool.models()[space.model];
                let Some(profile) = need.on(space.model) else { return false };
                let mut beside: Vec<Placed> = held.iter().filter(|(g, _)| *g == gpu).map(|(_, p)| *p).collect();
                model.profiles()[profile].spans().any(|(start, _)| {
                    beside.push(Placed { profile, start });
                    let legal = is_legal(model, &beside);
                    beside.pop();
                    legal
                })
            };
            let possible = (0..pool.gpus().len()).any(fits);
            let plan = plan(&pool, &need, &ExpectedLoss::default(), |_, _| true);
            prop_assert_eq!(plan.is_some(), possible);
            let Some(plan) = plan else { continue };
            if let Action::Make { destroy } = &plan.action {
                prop_assert!(destroy.iter().all(|placed| !held.contains(&(plan.gpu, *placed))));
            }
            pool.occupy(&plan);
            held.push((plan.gpu, plan.placed));
            let space = &pool.gpus()[plan.gpu];
            let there: Vec<Placed> = space.slots().iter().map(|slot| slot.placed).collect();
            prop_assert!(is_legal(&pool.models()[space.model], &there), "{there:?}");
        }
    }

    /// The same answer from the groups as from every GPU looked at, whatever the policy, whatever was taken,
    /// released, left over, blocked, barred or out of order, and whatever is allowed.
    #[test]
    fn groups_answer_as_every_gpu_looked_at(
        keys in prop::sample::select(vec![
            vec!["A100-40GB"], vec!["A30-24GB"], vec!["A100-40GB", "A30-24GB", "A100-80GB"],
            vec!["RTX-PRO-6000-Blackwell-96GB"],
        ]),
        name in prop::sample::select(PolicyName::ALL.to_vec()),
        steps in prop::collection::vec((0u32..12, any::<usize>(), any::<usize>()), 1..100),
    ) {
        let mut pool = pool(&keys, 6);
        let mut policy = name.policy(Objective::default());
        let names: Vec<_> = pool.models().iter().flat_map(|m| m.profiles()).map(|p| p.name.clone()).collect();
        let mut held: Vec<(usize, Placed)> = Vec::new();
        for (what, which, pick) in steps {
            let gpu = pick % pool.gpus().len();
            let model = Arc::clone(&pool.models()[pool.gpus()[gpu].model]);
            let profile = which % model.profiles().len();
            let starts: Vec<u32> = model.profiles()[profile].spans().map(|(start, _)| start).collect();
            let placed = Placed { profile, start: starts[pick % starts.len()] };
            match what {
                0..3 if !held.is_empty() => {
                    let (gpu, placed) = held.swap_remove(pick % held.len());
                    pool.release(gpu, placed);
                }
                3 => pool.change(gpu, |_, space| space.bar(placed)),
                4 => pool.change(gpu, |_, space| space.usable = !space.usable),
                5 if pick % 8 == 0 => pool.change(gpu, |model, space| {
                    space.block(model, Columns::span(placed.start, 1).unwrap());
                }),
                _ => {
                    let need = wanted(&pool, &names[which % names.len()]);
                    policy.see(&need.profile);
                    let allowed = |gpu: usize, _: Placed| pick % 3 > 0 || gpu.is_multiple_of(2);
                    let slow = {
                        let unpriced = Pool::new(pool.models().to_vec(), pool.gpus().to_vec());
                        plan(&unpriced, &need, &policy, allowed)
                    };
                    pool.price(&policy);
                    prop_assert!(pool.priced_by(&policy).is_some());
                    let fast = plan(&pool, &need, &policy, allowed);
                    prop_assert_eq!(&fast, &slow);
                    let Some(plan) = fast else { continue };
                    held.push((plan.gpu, plan.placed));
                    if what % 2 == 0 { pool.occupy(&plan) } else { pool.reserve(&plan) }
                }
            }
            let usable = |model| pool.gpus().iter().filter(|space| space.usable && space.model == model).count();
            prop_assert!((0..pool.models().len()).all(|model| pool.usable(model) == usable(model)));
        }
    }

    #[test]
    fn the_mix_learns_and_forgets(names in prop::collection::vec("[a-c]", 0..10_000)) {
        let mut mix = Mix::default();
        for name in &names {
            mix.see(name);
        }
        let model = facts::model("A100-40GB");
        prop_assert!(model.profiles().iter().all(|p| (mix.weight(p) > 0) == p.is_plain()));
    }
}
