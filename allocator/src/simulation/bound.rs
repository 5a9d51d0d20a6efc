//! What no policy beats: everything that runs may be rearranged at any time.

use super::{Arrival, Tally, a100, engine::Ends};
use crate::placement::Repacking;
use std::collections::BinaryHeap;

/// Accepts a request whenever all that is held and it fit on so many GPUs in some way.
pub(super) fn run(gpus: usize, arrivals: impl Iterator<Item = Arrival>, warm_up: usize) -> Tally {
    let model = a100();
    let mut held = vec![0; model.profiles().len()];
    let mut running: BinaryHeap<Ends<usize>> = BinaryHeap::new();
    let mut tally = Tally::default();
    let repacking = Repacking::new(&model);
    for (number, arrival) in arrivals.enumerate() {
        if number == warm_up {
            tally = Tally::default();
        }
        while let Some(Ends { what, .. }) = running.peek().copied().filter(|end| end.at <= arrival.at) {
            running.pop();
            held.iter_mut().skip(what).take(1).for_each(|count| *count -= 1);
        }
        let columns = model.profile(arrival.profile).map_or(0, |profile| profile.columns);
        tally.offer(columns);
        let mut more = held.clone();
        more.iter_mut().skip(arrival.profile).take(1).for_each(|count| *count += 1);
        if repacking.fits(&more, gpus) == Some(true) {
            held = more;
            running.push(Ends { at: arrival.at + arrival.life, what: arrival.profile });
            tally.accept(columns);
        }
    }
    tally
}
