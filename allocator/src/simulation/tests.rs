use super::*;
use crate::{
    geometry::{Profile, facts},
    placement::PolicyName::{BestFit, ExpectedRoom, FirstFit},
};

fn experiment(gpus: usize, mix: &str, mode: Mode, seeds: u64) -> Experiment {
    let traffic = Traffic::Random { mix: mix.parse().unwrap(), load: 1.0 };
    Experiment { gpus, traffic, mode, objective: Objective::Slices, seeds }
}

#[test]
fn the_simulated_gpu_is_an_a100_as_its_driver_tells_it() {
    let (model, facts) = (a100(), facts::model("A100-40GB"));
    let same = |a: &Profile, b: &Profile| {
        a.id == b.id
            && (a.columns, a.memory_mib, a.max_instances) == (b.columns, b.memory_mib, b.max_instances)
            && a.resources.compute == b.resources.compute
            && a.spans().eq(b.spans())
    };
    for profile in facts.profiles().iter().filter(|profile| profile.is_plain()) {
        assert!(model.profiles().iter().any(|ours| same(ours, profile)), "{}", profile.name);
    }
    assert_eq!((model.columns, model.profiles().len()), (8, 6));
}

/// What the project promises of the policy that ships, on a part of the seeds: better than best fit in
/// requests and in slices, whatever the mix.
#[test]
fn the_policy_that_ships_beats_best_fit() {
    for (gpus, mix, seeds) in [
        (8, "uniform", 8),
        (8, "bimodal", 8),
        (8, "skew-small", 8),
        (8, "skew-big", 8),
        (100, "skew-small", 2),
        (100, "bimodal", 2),
    ] {
        let experiment = experiment(gpus, mix, Mode::Loss, seeds);
        let [ours, other] = [PolicyName::default(), BestFit].map(|name| experiment.run(Placer::Policy(name)).tally);
        let bound = experiment.run(Placer::Repacking).tally;
        assert!(ours.requests() > other.requests(), "{gpus} {mix}: {} {}", ours.requests(), other.requests());
        assert!(ours.slices() > other.slices(), "{gpus} {mix}: {} {}", ours.slices(), other.slices());
        assert!(bound.slices() > ours.slices(), "{gpus} {mix}: {} {}", bound.slices(), ours.slices());
        assert_eq!(bound.offered, ours.offered);
    }
}

#[test]
fn a_seed_gives_the_same_again() {
    let experiment = experiment(4, "uniform", Mode::Loss, 3);
    let [once, again] = [(); 2].map(|()| experiment.run(Placer::Policy(ExpectedRoom)));
    assert_eq!(once.by_seed, again.by_seed);
    assert_eq!((once.tally.made, once.tally.busy), (again.tally.made, again.tally.busy));
    assert_ne!(once.by_seed[0], once.by_seed[1]);
}

#[test]
fn in_a_queue_nobody_is_lost_and_more_load_waits_longer() {
    let run = |load| {
        let traffic = Traffic::Random { mix: "skew-small".parse().unwrap(), load };
        let experiment = Experiment { traffic, ..experiment(8, "uniform", Mode::Queue, 2) };
        experiment.run(Placer::Policy(ExpectedRoom)).tally
    };
    let (light, heavy) = (run(0.3), run(0.6));
    assert!(light.requests() > 99.0 && light.utilisation() > 25.0 && light.utilisation() < 40.0);
    assert!(light.wait(0, 0.95) < heavy.wait(0, 0.95), "{:?} {:?}", light.wait(0, 0.95), heavy.wait(0, 0.95));
    assert!(light.wait(5, 0.5) <= light.wait(5, 0.95));
}

#[test]
fn a_trace_is_replayed() {
    let text = "name,cpu_milli,num_gpu,gpu_milli,creation_time,deletion_time\n\
        a,1,1,900,0,100\nb,1,1,1000,0,100\nc,1,1,500,10,30\nd,1,0,0,10,30\ne,1,1,100,20,\nf,1,2,500,0,9\n\
        g,1,1,140,40,50\n";
    let arrivals = read_trace(text).unwrap();
    let arrival = |at, profile, life| Arrival { at, profile, life };
    assert_eq!(*arrivals, [arrival(0.0, 0, 100.0), arrival(10.0, 1, 20.0), arrival(40.0, 5, 10.0)]);
    let experiment = |gpus| Experiment {
        traffic: Traffic::Trace { arrivals: arrivals.clone(), load: None },
        ..experiment(gpus, "uniform", Mode::Loss, 1)
    };
    let [one, two] = [1, 2].map(|gpus| experiment(gpus).run(Placer::Policy(FirstFit)).tally);
    assert_eq!((one.accepted, two.accepted, two.offered), (1, 3, 3));
    assert!(read_trace("a,b\n1,2\n").unwrap_err().contains("num_gpu"));
    let wrong = "num_gpu,gpu_milli,creation_time,deletion_time\n1,many,0,1\n";
    assert!(read_trace(wrong).unwrap_err().contains("line 2: `many`"));
}

#[test]
fn a_mix_is_a_name_or_six_shares() {
    assert!("uniform".parse::<Shares>().is_ok());
    assert_eq!("1,1,1,1,1,1".parse::<Shares>().unwrap().name, "custom");
    for text in ["", "1,2", "0,0,0,0,0,0", "1,1,1,1,1,-1", "1,1,1,1,1,nan"] {
        assert!(text.parse::<Shares>().is_err(), "{text}");
    }
}
