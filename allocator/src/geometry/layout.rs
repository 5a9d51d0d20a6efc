//! Which sets of instances one GPU can hold at once.

use super::{Columns, Model, Resources};

/// An instance on a GPU: which profile, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Placed {
    /// Index of the profile in its model.
    pub profile: usize,
    /// First column.
    pub start: u32,
}

/// Whether a GPU of `model` can hold all of `instances` at once: each where its profile may lie, no column
/// twice, and no more instances, compute slices and media engines than there are.
pub fn is_legal(model: &Model, instances: &[Placed]) -> bool {
    let mut taken = Columns::NONE;
    let mut used = Resources::NONE;
    for instance in instances {
        let Some(profile) = model.profile(instance.profile) else { return false };
        let Some(span) = profile.span_at(instance.start) else { return false };
        let same = instances.iter().filter(|other| other.profile == instance.profile).count();
        if span.overlaps(taken) || same > profile.max_instances as usize {
            return false;
        }
        taken |= span;
        used = used.plus(profile.resources);
    }
    used.within(model.capacity)
}

/// Every legal set of instances of the profiles that `wanted` picks, the empty one included.
///
/// Their number grows fast with the axis and the profiles: 723 for an A100 with all base profiles.
pub fn legal_layouts(model: &Model, wanted: impl Fn(usize) -> bool) -> Vec<Vec<Placed>> {
    let places = places(model, wanted);
    let mut layouts = Vec::new();
    extend(model, &places, &mut Vec::new(), &mut layouts);
    layouts
}

/// The legal sets to which no instance of the profiles that `wanted` picks can be added.
pub fn maximal_layouts(model: &Model, wanted: impl Fn(usize) -> bool) -> Vec<Vec<Placed>> {
    let places = places(model, &wanted);
    let mut layouts = legal_layouts(model, &wanted);
    layouts.retain(|layout| {
        let mut more = layout.clone();
        !places.iter().any(|place| {
            more.push(*place);
            let fits = is_legal(model, &more);
            more.pop();
            fits
        })
    });
    layouts
}

fn places(model: &Model, wanted: impl Fn(usize) -> bool) -> Vec<Placed> {
    let profiles = model.profiles().iter().enumerate().filter(|(index, _)| wanted(*index));
    profiles.flat_map(|(profile, p)| p.spans().map(move |(start, _)| Placed { profile, start })).collect()
}

fn extend(model: &Model, places: &[Placed], layout: &mut Vec<Placed>, all: &mut Vec<Vec<Placed>>) {
    let Some((first, rest)) = places.split_first() else {
        all.push(layout.clone());
        return;
    };
    extend(model, rest, layout, all);
    layout.push(*first);
    if is_legal(model, layout) {
        extend(model, rest, layout, all);
    }
    layout.pop();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::facts;
    use proptest::prelude::*;

    fn base(model: &Model, but: &'static [&'static str]) -> impl Fn(usize) -> bool + use<> {
        let names: Vec<_> = model.profiles().iter().map(|p| (p.name.clone(), p.is_plain())).collect();
        move |index| names[index].1 && !but.contains(&names[index].0.as_str())
    }

    #[test]
    fn an_a100_has_the_layouts_nvidia_prints() {
        for (key, double) in [("A100-40GB", "1g.10gb"), ("A100-80GB", "1g.20gb")] {
            let model = facts::model(key);
            let but: &'static [&'static str] = if double == "1g.10gb" { &["1g.10gb"] } else { &["1g.20gb"] };
            let maximal = maximal_layouts(&model, base(&model, but));
            assert_eq!(maximal.len(), 19, "{key}");
            let kinds = |layout: &[Placed]| -> Vec<u32> {
                layout.iter().map(|placed| model.profiles()[placed.profile].resources.compute).collect()
            };
            let both = |layout: &&Vec<Placed>| kinds(layout).contains(&4) && kinds(layout).contains(&3);
            assert_eq!(maximal.iter().filter(both).count(), 1, "18 without 4g + 3g");
            assert_eq!(legal_layouts(&model, base(&model, but)).len(), 298, "{key}");
            assert_eq!(maximal_layouts(&model, base(&model, &[])).len(), 78, "{key}");
            assert_eq!(legal_layouts(&model, base(&model, &[])).len(), 723, "{key}");
        }
    }

    #[test]
    fn an_a30_and_an_rtx_pro_6000_have_theirs() {
        let a30 = facts::model("A30-24GB");
        assert_eq!(maximal_layouts(&a30, base(&a30, &[])).len(), 5);
        assert_eq!(legal_layouts(&a30, base(&a30, &[])).len(), 26);
        let rtx = facts::model("RTX-PRO-6000-Blackwell-96GB");
        assert_eq!(rtx.columns, 12);
        assert_eq!(maximal_layouts(&rtx, base(&rtx, &[])).len(), 5);
    }

    #[test]
    fn only_one_instance_has_the_media_engines() {
        let a30 = facts::model("A30-24GB");
        let small = a30.profiles().iter().position(|p| p.name == "1g.6gb+me").unwrap();
        let large = a30.profiles().iter().position(|p| p.name == "2g.12gb+me").unwrap();
        assert!(is_legal(&a30, &[Placed { profile: small, start: 0 }]));
        assert!(!is_legal(&a30, &[Placed { profile: small, start: 0 }, Placed { profile: small, start: 1 }]));
        assert!(!is_legal(&a30, &[Placed { profile: small, start: 0 }, Placed { profile: large, start: 2 }]));
    }

    proptest! {
        #[test]
        fn what_is_legal_stays_legal_with_less(picks in prop::collection::vec(0usize..64, 0..8), drop in 0usize..8) {
            let model = facts::model("A100-40GB");
            let places = places(&model, |_| true);
            let mut layout: Vec<_> = picks.iter().map(|at| places[at % places.len()]).collect();
            if is_legal(&model, &layout) && !layout.is_empty() {
                layout.remove(drop % layout.len());
                prop_assert!(is_legal(&model, &layout));
            }
        }
    }
}
