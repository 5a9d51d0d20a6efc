//! What a placement costs.

use super::{Layout, Mix};
use crate::geometry::{Columns, Model, Placed, Profile};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    str::FromStr,
};

/// What a placement costs: the one thing policies differ in.
pub trait Policy: Send + Sync + fmt::Debug {
    /// The cost of putting an instance at `placed`, where it takes `span`, on a GPU of `model` on which
    /// `layout` is held. Less is better; only costs of one decision are compared.
    fn cost(&self, model: &Model, layout: &Layout, placed: Placed, span: Columns) -> i64;

    /// What decides among equal costs.
    fn ties(&self) -> Ties {
        Ties::Warm
    }

    /// Learns that a profile was asked for. True if costs are others from now on.
    fn see(&mut self, _profile: &str) -> bool {
        false
    }

    /// Equal only for policies of equal costs, so that costs need not be worked out again and again.
    fn fingerprint(&self) -> u64;
}

impl<P: Policy + ?Sized> Policy for Box<P> {
    fn cost(&self, model: &Model, layout: &Layout, placed: Placed, span: Columns) -> i64 {
        (**self).cost(model, layout, placed, span)
    }

    fn ties(&self) -> Ties {
        (**self).ties()
    }

    fn see(&mut self, profile: &str) -> bool {
        (**self).see(profile)
    }

    fn fingerprint(&self) -> u64 {
        (**self).fingerprint()
    }
}

/// What decides among placements of equal cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// An idle instance that is there already, then the fewest instances destroyed, then the fullest GPU, then
    /// the lowest index and start.
    Warm,
    /// The lowest index and start: as policies are published, which know nothing of idle instances.
    Index,
}

/// The policies there are, by the names that settings and commands have for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// [`FirstFit`].
    FirstFit,
    /// [`BestFit`].
    BestFit,
    /// [`LeastFragmentation`].
    LeastFragmentation,
    /// [`ExpectedLoss`].
    ExpectedLoss,
    /// [`ExpectedRoom`], the default.
    #[default]
    ExpectedRoom,
}

impl PolicyName {
    /// Every policy, the published ones first.
    pub const ALL: [Self; 5] =
        [Self::FirstFit, Self::BestFit, Self::LeastFragmentation, Self::ExpectedLoss, Self::ExpectedRoom];

    /// A policy of this name that has learned nothing yet.
    pub fn policy(self, objective: Objective) -> Box<dyn Policy> {
        match self {
            Self::FirstFit => Box::new(FirstFit),
            Self::BestFit => Box::new(BestFit),
            Self::LeastFragmentation => Box::new(LeastFragmentation),
            Self::ExpectedLoss => Box::<ExpectedLoss>::default(),
            Self::ExpectedRoom => Box::new(ExpectedRoom { mix: Mix::default(), objective }),
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FirstFit => "first-fit",
            Self::BestFit => "best-fit",
            Self::LeastFragmentation => "least-fragmentation",
            Self::ExpectedLoss => "expected-loss",
            Self::ExpectedRoom => "expected-room",
        })
    }
}

impl FromStr for PolicyName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|name| name.to_string() == text);
        found.ok_or_else(|| format!("the policies are {}", Self::ALL.map(|name| name.to_string()).join(", ")))
    }
}

/// What is to be as many as possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Requests that are granted, small ones as well as large ones.
    Requests,
    /// Slices' columns that are in use, so that large requests count for what they are.
    #[default]
    Slices,
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Requests => "requests",
            Self::Slices => "slices",
        })
    }
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = [Self::Requests, Self::Slices].into_iter().find(|name| name.to_string() == text);
        found.ok_or_else(|| "the objectives are requests, slices".to_owned())
    }
}

/// First fit: the first GPU with room, at its first start.
#[derive(Debug, Clone, Copy, Default)]
pub struct FirstFit;

impl Policy for FirstFit {
    fn cost(&self, _: &Model, _: &Layout, _: Placed, _: Columns) -> i64 {
        0
    }

    fn ties(&self) -> Ties {
        Ties::Index
    }

    fn fingerprint(&self) -> u64 {
        1
    }
}

/// Best fit: the GPU that has the fewest columns free afterwards.
#[derive(Debug, Clone, Copy, Default)]
pub struct BestFit;

impl Policy for BestFit {
    fn cost(&self, model: &Model, layout: &Layout, _: Placed, span: Columns) -> i64 {
        i64::from(model.columns) - i64::from((layout.columns() | span).count())
    }

    fn ties(&self) -> Ties {
        Ties::Index
    }

    fn fingerprint(&self) -> u64 {
        2
    }
}

/// Minimum fragmentation increment (published as MFI): a GPU's fragmentation is the columns of every place
/// that is not free although as many columns are.
#[derive(Debug, Clone, Copy, Default)]
pub struct LeastFragmentation;

impl Policy for LeastFragmentation {
    fn cost(&self, model: &Model, layout: &Layout, _: Placed, span: Columns) -> i64 {
        let fragmentation = |taken: Columns| {
            let free = model.columns.saturating_sub(taken.count());
            let plain = model.profiles().iter().filter(|profile| profile.is_plain() && profile.columns <= free);
            let lost = |profile: &Profile| {
                let places = profile.spans().filter(|(_, span)| span.overlaps(taken)).count();
                i64::try_from(places).unwrap_or(i64::MAX) * i64::from(profile.columns)
            };
            plain.map(lost).sum::<i64>()
        };
        fragmentation(layout.columns() | span) - fragmentation(layout.columns())
    }

    fn ties(&self) -> Ties {
        Ties::Index
    }

    fn fingerprint(&self) -> u64 {
        3
    }
}

/// Expected lost capacity: how many columns' worth of instances of what is asked for next no longer fit,
/// each profile weighed by how often it is asked for.
#[derive(Debug, Clone, Default)]
pub struct ExpectedLoss {
    /// What is asked for.
    pub mix: Mix,
}

impl Policy for ExpectedLoss {
    fn cost(&self, model: &Model, layout: &Layout, _: Placed, span: Columns) -> i64 {
        let lost = |index: usize, profile: &Profile| {
            let room = model.room(index, layout.columns()) - model.room(index, layout.columns() | span);
            i64::from(room) * i64::from(profile.columns) * signed(self.mix.weight(profile))
        };
        model.profiles().iter().enumerate().map(|(index, profile)| lost(index, profile)).sum()
    }

    fn see(&mut self, profile: &str) -> bool {
        self.mix.see(profile)
    }

    fn fingerprint(&self) -> u64 {
        fingerprint(&(4, self.mix.fingerprint()))
    }
}

/// Expected room shortly afterwards: the room that is lost now, and how much of the GPU's room the ends of
/// its leases give back, a small share of each; for every profile, weighed by demand and worth.
///
/// To first order this is the room expected a small part of a lease's life from now. The small part decides
/// where the present does not: a request goes beside leases whose ends alone would give little back, and stays
/// away from a GPU that one end would empty.
#[derive(Debug, Clone, Default)]
pub struct ExpectedRoom {
    /// What is asked for.
    pub mix: Mix,
    /// What is to be as many as possible.
    pub objective: Objective,
}

impl ExpectedRoom {
    /// How far ahead it looks: one part in so many of a lease's expected life.
    const PARTS: i64 = 12;

    /// What room for one instance is worth. The columns are counted once for what is lost with it, and again
    /// for how rare it is: of larger instances a GPU has fewer places.
    fn worth(&self, profile: &Profile) -> i64 {
        let columns = u64::from(profile.columns);
        let worth = match self.objective {
            Objective::Slices => columns * columns,
            // Between the two: with the columns alone large requests find no empty GPU any more.
            Objective::Requests => (columns * columns * columns).isqrt(),
        };
        signed(worth * self.mix.weight(profile))
    }

    /// The worth of the room beside `taken`, now and shortly afterwards. `spans` are the leases in it.
    fn room(&self, model: &Model, taken: Columns, spans: impl Iterator<Item = Columns> + Clone) -> i64 {
        let worth = |(index, profile): (usize, &Profile)| {
            let worth = self.worth(profile);
            if worth == 0 {
                return 0;
            }
            let now = i64::from(model.room(index, taken));
            let back = |span: Columns| i64::from(model.room(index, taken & !span)) - now;
            worth * (now * Self::PARTS + spans.clone().map(back).sum::<i64>())
        };
        model.profiles().iter().enumerate().map(worth).sum()
    }
}

impl Policy for ExpectedRoom {
    fn cost(&self, model: &Model, layout: &Layout, _: Placed, span: Columns) -> i64 {
        let before = self.room(model, layout.columns(), layout.spans(model));
        let spans = layout.spans(model).chain([span]);
        before - self.room(model, layout.columns() | span, spans)
    }

    fn see(&mut self, profile: &str) -> bool {
        self.mix.see(profile)
    }

    fn fingerprint(&self) -> u64 {
        fingerprint(&(5, self.mix.fingerprint(), self.objective))
    }
}

fn fingerprint(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Weights stay far below the limit: a mix has at most a few million.
fn signed(weight: u64) -> i64 {
    i64::try_from(weight).unwrap_or(i64::MAX / (1 << 32))
}
