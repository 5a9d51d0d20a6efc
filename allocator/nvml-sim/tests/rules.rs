//! The simulated machine holds to the facts: layouts are counted by making them, one instance at a time.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;

use nvidia_ml_sim::facts::{self, Media, Placement, Profile};
use nvidia_ml_sim::machine::Machine;
use nvidia_ml_sim::refusal::Refusal;
use nvidia_ml_sim::state::{Device, Process, State};
use proptest::prelude::*;

/// One GPU of this model under this driver, nothing on it.
fn one_gpu(model: &str, driver: u32) -> State {
    let text = format!("driver_version = \"{driver}.1\"\n[[gpu]]\nmodel = \"{model}\"\nmig = true\n");
    State::first_start(&Machine::parse(&text, Path::new("/machine.toml")).unwrap())
}

/// Everything that can be laid out with the named profiles.
struct Layouts {
    legal: usize,
    maximal: usize,
}

fn layouts(model: &str, driver: u32, names: &[&str]) -> Layouts {
    let profiles = facts::model(model).unwrap().profiles.iter();
    let named: Vec<&Profile> = profiles.filter(|profile| names.contains(&profile.name.as_str())).collect();
    assert_eq!(named.len(), names.len(), "{model} has all of {names:?}");
    let places: Vec<(u32, Placement)> =
        named.iter().flat_map(|profile| profile.placements.iter().map(|&placement| (profile.id, placement))).collect();
    let mut count = Layouts { legal: 0, maximal: 0 };
    walk(&one_gpu(model, driver), driver, &places, 0, &mut count);
    count
}

/// Counts the layout of `state` and all that come of it by instances made at `places[from..]`. Whatever the
/// rules allow they allow in any order, which the properties below hold them to.
fn walk(state: &State, driver: u32, places: &[(u32, Placement)], from: usize, count: &mut Layouts) {
    count.legal += 1;
    let mut full = true;
    for (at, &(profile, placement)) in places.iter().enumerate() {
        let mut next = state.clone();
        if next.create_gpu_instance(0, driver, profile, Some(placement)).is_ok() {
            full = false;
            if at >= from {
                walk(&next, driver, places, at + 1, count);
            }
        }
    }
    count.maximal += usize::from(full);
}

const A100_BASE: [&str; 5] = ["1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"];

#[test]
fn seven_compute_eight_memory_base_profiles() {
    let count = layouts("A100-40GB", 535, &A100_BASE);
    assert_eq!((count.maximal, count.legal), (19, 298));
}

#[test]
fn before_r510_4g_and_3g_do_not_go_together() {
    assert_eq!(layouts("A100-40GB", 470, &A100_BASE).maximal, 18);
}

#[test]
fn with_the_slice_of_twice_the_memory() {
    let names = [&A100_BASE[..], &["1g.10gb"]].concat();
    let count = layouts("A100-40GB", 535, &names);
    assert_eq!((count.maximal, count.legal), (78, 723));
}

#[test]
fn other_gpus_of_the_same_geometry() {
    for (model, base) in [
        ("A100-80GB", ["1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]),
        ("H100-80GB", ["1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]),
        ("H100-94GB", ["1g.12gb", "2g.24gb", "3g.47gb", "4g.47gb", "7g.94gb"]),
        ("H200-141GB", ["1g.18gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb"]),
    ] {
        assert_eq!(layouts(model, 535, &base).maximal, 19, "{model}");
    }
}

#[test]
fn the_a30() {
    let count = layouts("A30-24GB", 535, &["1g.6gb", "2g.12gb", "4g.24gb"]);
    assert_eq!((count.maximal, count.legal), (5, 26));
}

#[test]
fn the_rtx_pro_6000_on_its_axis_of_twelve() {
    let model = "RTX-PRO-6000-Blackwell-96GB";
    assert_eq!(facts::model(model).unwrap().axis, 12);
    let count = layouts(model, 575, &["1g.24gb", "2g.48gb", "4g.96gb"]);
    assert_eq!((count.maximal, count.legal), (5, 26));
}

#[test]
fn whoever_takes_all_media_engines_leaves_room_for_those_without() {
    let mut state = one_gpu("RTX-PRO-6000-Blackwell-96GB", 575);
    let (all, none, plain) = (65, 67, 47);
    state.create_gpu_instance(0, 575, all, None).unwrap();
    assert_eq!(state.create_gpu_instance(0, 575, plain, None), Err(Refusal::InsufficientResources));
    assert_eq!(state.remaining_gpu_instances(0, 575, plain), Ok(0));
    assert_eq!(state.remaining_gpu_instances(0, 575, none), Ok(3));
}

#[test]
fn one_media_extension_per_gpu() {
    let mut state = one_gpu("A30-24GB", 535);
    let (one_me, two_me) = (21, 6);
    state.create_gpu_instance(0, 535, one_me, None).unwrap();
    assert_eq!(state.create_gpu_instance(0, 535, one_me, None), Err(Refusal::InsufficientResources));
    assert_eq!(state.create_gpu_instance(0, 535, two_me, None), Err(Refusal::InsufficientResources));
}

#[test]
fn an_old_driver_does_not_know_newer_profiles() {
    let mut state = one_gpu("A100-40GB", 510);
    assert_eq!(state.create_gpu_instance(0, 510, 15, None), Err(Refusal::NotSupported));
    assert!(state.create_gpu_instance(0, 525, 15, None).is_ok());
}

/// NVIDIA's MIG guide documents both as known: the order decides.
#[test]
fn the_drivers_own_choice_paints_itself_into_a_corner() {
    let in_order = |order: [u32; 4]| {
        let mut state = one_gpu("A100-40GB", 535);
        order.into_iter().try_for_each(|profile| state.create_gpu_instance(0, 535, profile, None).map(drop))
    };
    assert_eq!(in_order([19, 19, 14, 9]), Err(Refusal::InsufficientResources));
    assert_eq!(in_order([9, 19, 14, 19]), Ok(()));
}

#[test]
fn ids_of_gpu_instances_belong_to_places() {
    let mut state = one_gpu("A100-40GB", 535);
    let made = |state: &mut State, profile, start, size| {
        let key = state.create_gpu_instance(0, 535, profile, Some(Placement { start, size })).unwrap();
        (key, state.gpu_instance(key).unwrap().instance.id)
    };
    let (first, id) = made(&mut state, 14, 2, 2);
    state.finish_destroy_gpu_instance(first).unwrap();
    let (again, same) = made(&mut state, 14, 2, 2);
    assert_eq!(id, same);
    assert_ne!(first, again);
}

#[test]
fn compute_instances_share_out_a_gpu_instance() {
    let mut state = one_gpu("A100-40GB", 535);
    let parent = state.create_gpu_instance(0, 535, 0, None).unwrap();
    // 7g: 3c at 0 and at 4, then there is one slice left.
    let first = state.create_compute_instance(parent, 2, None).unwrap();
    state.create_compute_instance(parent, 2, None).unwrap();
    assert_eq!(state.create_compute_instance(parent, 2, None), Err(Refusal::InsufficientResources));
    assert_eq!(state.create_compute_instance(parent, 1, None), Err(Refusal::InsufficientResources));
    state.create_compute_instance(parent, 0, None).unwrap();
    assert_eq!(state.create_compute_instance(parent, 0, None), Err(Refusal::InsufficientResources));
    assert_eq!(state.finish_destroy_gpu_instance(parent), Err(Refusal::InUse));
    let misplaced = Some(Placement { start: 1, size: 3 });
    assert_eq!(state.create_compute_instance(parent, 2, misplaced), Err(Refusal::InvalidArgument));
    assert_eq!(state.create_compute_instance(parent, 6, None), Err(Refusal::NotSupported));
    state.finish_destroy_compute_instance(first).unwrap();
    assert!(state.create_compute_instance(parent, 2, None).is_ok());
}

#[test]
fn processes_keep_what_they_run_on() {
    let mut state = one_gpu("A100-40GB", 535);
    let parent = state.create_gpu_instance(0, 535, 14, None).unwrap();
    let halves = [0, 0].map(|profile| state.create_compute_instance(parent, profile, None).unwrap());
    state.start_process(Device::Mig(halves[0]), Process { pid: 7, memory_mib: 6000 }).unwrap();
    // The halves share the memory of their GPU instance.
    let more = Process { pid: 8, memory_mib: 6000 };
    assert_eq!(state.start_process(Device::Mig(halves[1]), more), Err(Refusal::InsufficientResources));
    assert_eq!(state.finish_destroy_compute_instance(halves[0]), Err(Refusal::InUse));
    assert_eq!(state.reset_gpu(0), Err(Refusal::InUse));
    assert!(state.end_process(7));
    assert!(!state.end_process(7));
    state.finish_destroy_compute_instance(halves[0]).unwrap();
}

#[derive(Debug, Clone)]
enum Step {
    Create { profile: prop::sample::Index, placement: Option<prop::sample::Index> },
    Destroy { instance: prop::sample::Index },
    CreateCompute { instance: prop::sample::Index, profile: u32 },
    DestroyCompute { instance: prop::sample::Index, compute: prop::sample::Index },
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), prop::option::of(index())).prop_map(|(profile, placement)| Step::Create { profile, placement }),
        2 => index().prop_map(|instance| Step::Destroy { instance }),
        2 => (index(), 0..6u32).prop_map(|(instance, profile)| Step::CreateCompute { instance, profile }),
        2 => (index(), index()).prop_map(|(instance, compute)| Step::DestroyCompute { instance, compute }),
    ]
}

/// The rules once more, written as a mask of columns and sums, to hold the simulation to.
fn fits(state: &State, driver: u32, profile: &Profile, placement: Placement) -> bool {
    let mask = |start: u32, size: u32| ((1u32 << size) - 1) << start;
    let (gpu, model) = (&state.gpus[0], facts::model(&state.gpus[0].model).unwrap());
    let taken = gpu.instances.iter().fold(0, |taken, one| taken | mask(one.start, one.size));
    let all: Vec<&Profile> =
        gpu.instances.iter().map(|one| model.profile(one.profile).unwrap()).chain([profile]).collect();
    let has = |compute| all.iter().any(|one| one.compute_slices == compute);
    let engines = |of: fn(&Media) -> u32| {
        model.media.is_none_or(|total| all.iter().map(|one| of(&one.media)).sum::<u32>() <= of(&total))
    };
    taken & mask(placement.start, placement.size) == 0
        && all.len() <= usize::try_from(model.max_instances).unwrap()
        && all.iter().filter(|one| one.id == profile.id).count() <= usize::try_from(profile.max_instances).unwrap()
        && all.iter().filter(|one| one.name.contains("+me")).count() <= 1
        && engines(|media| media.decoders)
        && engines(|media| media.encoders)
        && engines(|media| media.jpeg)
        && engines(|media| media.ofa)
        && (driver >= 510 || !(has(3) && has(4)))
}

fn take(state: &mut State, driver: u32, step: &Step) {
    let model = facts::model(&state.gpus[0].model).unwrap();
    let instances: Vec<u64> = state.gpus[0].instances.iter().map(|instance| instance.key).collect();
    match step {
        Step::Create { profile, placement } => {
            let known: Vec<&Profile> = model.profiles.iter().filter(|one| one.since_driver <= driver).collect();
            let profile = *profile.get(&known);
            let placement = placement.map(|placement| *placement.get(&profile.placements));
            let free = |&&place: &&Placement| fits(state, driver, profile, place);
            let expected = match placement {
                Some(place) => fits(state, driver, profile, place),
                None => profile.placements.iter().any(|place| free(&place)),
            };
            let many = state.remaining_gpu_instances(0, driver, profile.id).unwrap();
            assert_eq!(many > 0, profile.placements.iter().any(|place| free(&place)));
            let made = state.create_gpu_instance(0, driver, profile.id, placement);
            assert_eq!(made.is_ok(), expected, "{} at {placement:?}: {made:?}", profile.name);
        }
        Step::Destroy { instance } if !instances.is_empty() => {
            let key = *instance.get(&instances);
            let empty = state.gpu_instance(key).unwrap().instance.compute.is_empty();
            assert_eq!(state.finish_destroy_gpu_instance(key), if empty { Ok(()) } else { Err(Refusal::InUse) });
        }
        Step::CreateCompute { instance, profile } if !instances.is_empty() => {
            let key = *instance.get(&instances);
            let found = state.gpu_instance(key).unwrap();
            let free =
                found.compute_profile(*profile).map(|one| one.free_placements(&found.instance.compute_placements()));
            let made = state.create_compute_instance(key, *profile, None);
            match free {
                Ok(free) => assert_eq!(made.is_ok(), !free.is_empty()),
                Err(refusal) => assert_eq!(made, Err(refusal)),
            }
        }
        Step::DestroyCompute { instance, compute } if !instances.is_empty() => {
            let key = *instance.get(&instances);
            let all: Vec<u64> = state.gpu_instance(key).unwrap().instance.compute.iter().map(|one| one.key).collect();
            if !all.is_empty() {
                state.finish_destroy_compute_instance(*compute.get(&all)).unwrap();
            }
        }
        _ => {}
    }
}

fn unique<T: Ord>(values: impl Iterator<Item = T>) -> bool {
    let all: Vec<T> = values.collect();
    let length = all.len();
    all.into_iter().collect::<BTreeSet<T>>().len() == length
}

fn disjoint(places: &[Placement]) -> bool {
    places.iter().enumerate().all(|(at, one)| places[at + 1..].iter().all(|other| !one.overlaps(*other)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_is_done_the_rules_hold(
        model in prop::sample::select(vec![
            "A100-40GB", "A100-80GB", "A30-24GB", "H100-80GB", "H200-141GB", "B200-180GB", "RTX-PRO-6000-Blackwell-96GB",
        ]),
        driver in prop::sample::select(vec![470u32, 510, 525, 575]),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut state = one_gpu(model, driver);
        for step in &steps {
            take(&mut state, driver, step);
            let gpu = &state.gpus[0];
            let places: Vec<Placement> = gpu.instances.iter().map(|one| one.placement()).collect();
            prop_assert!(disjoint(&places));
            prop_assert!(places.iter().all(|place| place.end() <= facts::model(model).unwrap().axis));
            prop_assert!(unique(gpu.instances.iter().map(|one| one.id)));
            for instance in &gpu.instances {
                prop_assert!(disjoint(&instance.compute_placements()));
                prop_assert!(unique(instance.compute.iter().map(|one| one.id)));
            }
            let keys = gpu.instances.iter().map(|one| one.key);
            prop_assert!(unique(keys.chain(gpu.mig_devices().map(|(_, compute)| compute.key))));
            prop_assert!(unique(gpu.mig_devices().map(|(_, compute)| compute.uuid.clone())));
            prop_assert!(state.check().is_ok());
        }
        let saved = serde_json::to_string(&state).unwrap();
        prop_assert_eq!(serde_json::from_str::<State>(&saved).unwrap(), state);
    }
}
