//! From what is asked for to the profile that serves it on each model.

use super::{Model, Profile, ProfileName};
use mlad::api::Need;
use std::{borrow::Cow, sync::Arc};

/// What a need comes to: on each model the profile that serves it, if one does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    /// Name of the profile (of the smallest, where models differ); `cpu` for none.
    pub profile: String,
    /// Its memory in MiB; 0 for `cpu`.
    pub memory_mib: u64,
    by_model: Vec<Option<usize>>,
}

impl Resolution {
    /// The index of the profile that serves on the model with this index.
    pub fn on(&self, model: usize) -> Option<usize> {
        self.by_model.get(model).copied().flatten()
    }

    /// For each model the index of the profile that serves there.
    pub fn by_model(&self) -> &[Option<usize>] {
        &self.by_model
    }

    /// The same on the models that `allowed` lets through, and nothing on others.
    pub fn only(&self, allowed: impl Fn(usize) -> bool) -> Cow<'_, Self> {
        let by_model = || self.by_model.iter().enumerate();
        if by_model().all(|(model, at)| at.is_none() || allowed(model)) {
            return Cow::Borrowed(self);
        }
        let by_model = by_model().map(|(model, at)| at.filter(|_| allowed(model))).collect();
        Cow::Owned(Self { by_model, ..self.clone() })
    }

    /// Whether GPUs are needed at all.
    pub fn needs_gpu(&self) -> bool {
        self.by_model.iter().any(Option::is_some)
    }
}

/// No GPU here can ever serve the need; the text says so and names what would fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Impossible(pub String);

/// What `need` comes to on each of `models`.
///
/// A profile is found by its name, or by what the name means where drivers spell it differently. Memory is
/// served by the smallest MIG profile with at least as much (then the fewest columns, no extra media
/// engines, the fewest compute slices), and by a whole GPU without MIG only where no MIG profile has enough.
/// `gpu` is served by a GPU without MIG and by the profile that is the whole of a GPU with MIG. Where a model
/// is named, others serve nothing.
///
/// # Errors
/// [`Impossible`] when none of the models can serve it.
pub fn resolve(need: &Need, models: &[Arc<Model>]) -> Result<Resolution, Impossible> {
    let (need, named) = match need {
        Need::On { need, model } => (&**need, Some(model.as_str())),
        need => (need, None),
    };
    let is_named = |model: &Model| named.is_none_or(|part| is_called(model, part));
    if let Some(part) = named.filter(|_| !models.iter().any(|model| is_named(model))) {
        return Err(Impossible(no_such_model(part, models)));
    }
    // Of the models that are not named nothing is taken into account.
    let considered = || models.iter().map(|model| Some(model).filter(|model| is_named(model)));
    let by_model: Vec<Option<usize>> = match need {
        Need::Cpu => {
            let by_model = vec![None; models.len()];
            return Ok(Resolution { profile: "cpu".to_owned(), memory_mib: 0, by_model });
        }
        Need::Gpu => considered().map(|model| model?.whole_gpu()).collect(),
        Need::Profile(name) => considered().map(|model| by_name(model?, name)).collect(),
        Need::MemoryMib(mib) => {
            let sliced = |model: &Arc<Model>| model.sliced.then(|| smallest(model, *mib)).flatten();
            let sliced: Vec<_> = considered().map(|model| sliced(model?)).collect();
            if sliced.iter().any(Option::is_some) {
                sliced
            } else {
                considered().map(|model| smallest(model?, *mib)).collect()
            }
        }
        // One model within another: its text cannot be read.
        Need::On { .. } => vec![None; models.len()],
    };
    let served = std::iter::zip(models, &by_model).filter_map(|(model, at)| model.profile((*at)?));
    match served.min_by_key(|profile| (profile.memory_mib, profile.columns)) {
        Some(profile) => Ok(Resolution { profile: profile.name.clone(), memory_mib: profile.memory_mib, by_model }),
        None => {
            let considered: Vec<&Model> = considered().flatten().map(|model| &**model).collect();
            let which = named.map_or_else(String::new, |part| format!(" of the model {part}"));
            Err(Impossible(why_impossible(need, &which, &considered)))
        }
    }
}

/// Whether a part of a model's name is given; spaces in it are written `-`.
fn is_called(model: &Model, part: &str) -> bool {
    model.name.to_ascii_lowercase().replace(' ', "-").contains(part)
}

fn no_such_model(part: &str, models: &[Arc<Model>]) -> String {
    let mut names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    match names.as_slice() {
        [] => format!("no GPU is here, and so none of the model {part}"),
        names => format!("no GPU here is of the model {part}; those here are {}", names.join(", ")),
    }
}

fn by_name(model: &Model, name: &str) -> Option<usize> {
    if !model.sliced {
        return None;
    }
    let exact = model.profiles().iter().position(|profile| profile.name.eq_ignore_ascii_case(name));
    exact.or_else(|| {
        let wanted = ProfileName::parse(name)?;
        model.profiles().iter().position(|p| ProfileName::parse(&p.name).is_some_and(|name| name.same_kind(wanted)))
    })
}

fn smallest(model: &Model, memory_mib: u64) -> Option<usize> {
    let enough = model.profiles().iter().enumerate().filter(|(_, profile)| profile.memory_mib >= memory_mib);
    let order = |p: &Profile| (p.memory_mib, p.columns, !p.is_plain(), p.resources.compute, p.id);
    enough.min_by_key(|(_, profile)| order(profile)).map(|(index, _)| index)
}

fn why_impossible(need: &Need, which: &str, models: &[&Model]) -> String {
    let mut profiles: Vec<&Profile> = models.iter().flat_map(|model| model.profiles()).collect();
    profiles.retain(|profile| profile.is_plain());
    profiles.sort_by_key(|profile| (profile.memory_mib, profile.resources.compute));
    profiles.dedup_by_key(|profile| profile.name.as_str());
    if profiles.is_empty() {
        return format!("no GPU{which} is here to serve {need}; only `cpu` (no GPU) fits");
    }
    match need {
        Need::Profile(name) => {
            let closest = closest(name, profiles);
            format!("no GPU here{which} can be sliced into {name}; the closest that fit are {}", list(&closest))
        }
        Need::MemoryMib(_) => {
            let largest: Vec<_> = profiles.last().into_iter().copied().collect();
            format!("no GPU here{which} has {need} of memory in one piece; the largest that fits is {}", list(&largest))
        }
        Need::Gpu | Need::Cpu | Need::On { .. } => {
            let largest: Vec<_> = profiles.iter().rev().take(3).copied().collect();
            format!("no GPU here{which} is leased as a whole; the largest that fit are {}", list(&largest))
        }
    }
}

/// The three profiles nearest to a name: by memory and compute, each in proportion.
fn closest<'a>(name: &str, mut profiles: Vec<&'a Profile>) -> Vec<&'a Profile> {
    if let Some(wanted) = ProfileName::parse(&name.to_ascii_lowercase()) {
        let apart = |a: u64, b: u64| a.abs_diff(b) * 1000 / a.max(b).max(1);
        profiles.sort_by_key(|profile| {
            apart(profile.memory_mib, u64::from(wanted.gigabytes) * 1024)
                + apart(u64::from(profile.resources.compute), u64::from(wanted.compute))
        });
        profiles.truncate(3);
    }
    profiles
}

fn list(profiles: &[&Profile]) -> String {
    let each = |p: &&Profile| format!("{} ({:.1} GiB)", p.name, p.memory_mib as f64 / 1024.0);
    profiles.iter().map(each).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::facts;
    use proptest::prelude::*;

    fn profile(need: &str, models: &[Arc<Model>]) -> Result<String, String> {
        resolve(&need.parse().unwrap(), models).map(|found| found.profile).map_err(|error| error.0)
    }

    #[test]
    fn needs_come_to_the_smallest_that_serves() {
        let a100 = [Arc::new(facts::model("A100-40GB"))];
        for (need, name) in [
            ("2g.10gb", "2g.10gb"),
            ("1g.5gb+me", "1g.5gb+me"),
            ("4GiB", "1g.5gb"),
            ("5G", "1g.5gb"),
            ("10G", "1g.10gb"),
            ("10GiB", "3g.20gb"),
            ("20G", "3g.20gb"),
            ("30G", "7g.40gb"),
            ("7g.39gb", "7g.40gb"),
            ("gpu", "7g.40gb"),
            ("cpu", "cpu"),
        ] {
            assert_eq!(profile(need, &a100).as_deref(), Ok(name), "{need}");
        }
    }

    #[test]
    fn the_impossible_is_refused_with_what_would_fit() {
        let a100 = [Arc::new(facts::model("A100-40GB"))];
        let refused = profile("5g.40gb", &a100).unwrap_err();
        assert!(refused.contains("5g.40gb") && refused.contains("7g.40gb"), "{refused}");
        let refused = profile("2g.20gb", &a100).unwrap_err();
        assert!(refused.contains("3g.20gb"), "{refused}");
        let refused = profile("100G", &a100).unwrap_err();
        assert!(refused.contains("7g.40gb (39.2 GiB)"), "{refused}");
        assert!(profile("gpu", &[]).unwrap_err().contains("cpu"));
    }

    #[test]
    fn models_in_one_pool_each_serve_with_their_own_profile() {
        let pool = [
            Arc::new(facts::model("A100-40GB")),
            Arc::new(facts::model("A100-80GB")),
            Arc::new(Model::whole("NVIDIA L40S", 46068)),
        ];
        let found = resolve(&Need::Profile("1g.10gb".into()), &pool).unwrap();
        assert_eq!(pool[0].profiles()[found.on(0).unwrap()].columns, 2);
        assert_eq!(pool[1].profiles()[found.on(1).unwrap()].columns, 1);
        assert_eq!(found.on(2), None);
        let memory = resolve(&Need::MemoryMib(30_000), &pool).unwrap();
        assert_eq!((memory.on(0).is_some(), memory.on(1).is_some(), memory.on(2)), (true, true, None));
        let whole = resolve(&Need::Gpu, &pool).unwrap();
        assert!(whole.on(0).is_some() && whole.on(1).is_some() && whole.on(2).is_some());
        let plain = [Arc::new(Model::whole("NVIDIA L40S", 46068))];
        assert_eq!(profile("10G", &plain).as_deref(), Ok("gpu"));
        assert!(profile("1g.5gb", &plain).is_err());
    }

    #[test]
    fn a_model_can_be_named() {
        let pool =
            [("A100-40GB", "NVIDIA A100-SXM4-40GB"), ("H100-80GB", "NVIDIA H100 80GB HBM3")].map(|(key, name)| {
                let mut model = facts::model(key);
                model.name = name.to_owned();
                Arc::new(model)
            });
        let on = |need: &str| {
            let found = resolve(&need.parse().unwrap(), &pool).map_err(|error| error.0)?;
            Ok::<_, String>([0, 1].map(|at| found.on(at).is_some()))
        };
        assert_eq!(on("10G"), Ok([true, true]));
        assert_eq!(on("10G@A100"), Ok([true, false]));
        assert_eq!(on("gpu@h100-80gb"), Ok([false, true]));
        assert_eq!(on("1g.10gb@nvidia"), Ok([true, true]));
        let refused = on("1g.5gb@h100").unwrap_err();
        assert!(refused.contains("of the model h100") && refused.contains("1g.10gb"), "{refused}");
        let refused = on("gpu@b200").unwrap_err();
        assert!(refused.contains("b200") && refused.contains("NVIDIA H100 80GB HBM3"), "{refused}");
    }

    proptest! {
        #[test]
        fn memory_is_never_less_than_asked(mib in 1u64..200_000) {
            for key in ["A100-40GB", "A100-80GB", "A30-24GB"] {
                let pool = [Arc::new(facts::model(key))];
                match resolve(&Need::MemoryMib(mib), &pool) {
                    Ok(found) => {
                        prop_assert!(found.memory_mib >= mib);
                        let smaller = pool[0].profiles().iter().filter(|p| p.memory_mib >= mib);
                        prop_assert!(smaller.into_iter().all(|p| p.memory_mib >= found.memory_mib));
                    }
                    Err(_) => prop_assert!(pool[0].profiles().iter().all(|p| p.memory_mib < mib)),
                }
            }
        }
    }
}
