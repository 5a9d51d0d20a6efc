//! How long one decision takes, from 8 to 10,000 GPUs that are as full as they get under load.
//!
//! `cargo bench -p mlad-allocator`. The project promises under 1 µs at 8 GPUs and under 2 µs at 10,000.

// `criterion_group!` makes a public function, which nobody sees.
#![allow(missing_docs, unreachable_pub)]

use criterion::{Criterion, criterion_group, criterion_main};
use mlad_allocator::{
    geometry::{Placed, Resolution, resolve},
    placement::{Objective, Policy, PolicyName, Pool, Space, plan},
    simulation::{Mode, Traffic, a100},
};
use std::{cmp::Reverse, collections::BinaryHeap, hint::black_box};

/// A pool after some lives at load 1, what can be asked for, and the policy with what it learned.
struct Loaded {
    pool: Pool,
    wanted: Vec<Resolution>,
    policy: Box<dyn Policy>,
    held: Vec<(usize, Placed)>,
}

fn loaded(gpus: usize) -> Loaded {
    let models = [a100()];
    let need = |profile: &mlad_allocator::geometry::Profile| {
        let need = mlad::api::Need::Profile(profile.name.clone());
        resolve(&need, &models).ok()
    };
    let wanted: Vec<Resolution> = models.iter().flat_map(|model| model.profiles()).filter_map(need).collect();
    let mut pool = Pool::new(models.to_vec(), vec![Space::empty(0); gpus]);
    let mut policy = PolicyName::default().policy(Objective::default());
    let mix = "uniform".parse().unwrap_or_else(|error| unreachable!("{error}"));
    let traffic = Traffic::Random { mix, load: 1.0 };
    let mut running = BinaryHeap::new();
    for arrival in traffic.arrivals(gpus, Mode::Loss, 1) {
        while let Some(Reverse((end, gpu, placed))) = running.peek().copied()
            && end <= arrival.at.to_bits()
        {
            running.pop();
            pool.release(gpu, placed);
        }
        let Some(wanted) = wanted.get(arrival.profile) else { continue };
        policy.see(&wanted.profile);
        pool.price(&policy);
        if let Some(plan) = plan(&pool, wanted, &policy, |_, _| true) {
            pool.occupy(&plan);
            running.push(Reverse(((arrival.at + arrival.life).to_bits(), plan.gpu, plan.placed)));
        }
    }
    pool.price(&policy);
    let held = running.into_iter().map(|Reverse((_, gpu, placed))| (gpu, placed)).collect();
    Loaded { pool, wanted, policy, held }
}

fn decisions(criterion: &mut Criterion) {
    for gpus in [8, 100, 10_000] {
        let Loaded { mut pool, wanted, policy, mut held } = loaded(gpus);
        let mut nth = 0;
        criterion.bench_function(&format!("decision/{gpus}"), |bencher| {
            bencher.iter(|| {
                nth = (nth + 1) % wanted.len();
                wanted.get(nth).and_then(|wanted| plan(black_box(&pool), wanted, &policy, |_, _| true))
            });
        });
        let mut at = 0;
        criterion.bench_function(&format!("end, decision and start/{gpus}"), |bencher| {
            bencher.iter(|| {
                at = (at + 1) % held.len();
                let Some(slot) = held.get_mut(at) else { return };
                let (gpu, placed) = *slot;
                // What ends makes room for the same again, so that the pool stays as full as it is.
                pool.release(gpu, placed);
                pool.price(&policy);
                let again = wanted.get(placed.profile).and_then(|wanted| plan(&pool, wanted, &policy, |_, _| true));
                if let Some(plan) = again {
                    pool.occupy(&plan);
                    *slot = (plan.gpu, plan.placed);
                }
            });
        });
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
