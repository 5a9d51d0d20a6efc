//! What one kind of GPU can be cut into.

use super::{Columns, ProfileName};
use serde::{Deserialize, Serialize};
use std::iter;

/// What one kind of GPU can be cut into. GPUs that can be cut alike share one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "ModelForm", into = "ModelForm")]
pub struct Model {
    /// The driver's name of the model.
    pub name: String,
    /// Memory of the whole GPU, in MiB.
    pub memory_mib: u64,
    /// Whether it is cut into MIG instances. If not, its only profile is `gpu`, the whole of it.
    pub sliced: bool,
    /// Length of the placement axis; 1 for a GPU that is not sliced.
    pub columns: u32,
    /// What the whole GPU has to share out, besides columns.
    pub capacity: Resources,
    profiles: Vec<Profile>,
}

impl Model {
    /// A GPU in MIG mode with the profiles the driver offers. Profiles that lie nowhere are left out.
    pub fn sliced(name: impl Into<String>, memory_mib: u64, profiles: Vec<Profile>) -> Self {
        let profiles: Vec<Profile> = profiles.into_iter().filter(|profile| !profile.spans.is_empty()).collect();
        let columns = profiles.iter().flat_map(Profile::spans).map(|(start, span)| start + span.count()).max();
        let capacity = profiles.iter().fold(Resources::NONE, |most, profile| most.max(profile.resources));
        Self { name: name.into(), memory_mib, sliced: true, columns: columns.unwrap_or(0), capacity, profiles }
    }

    /// A GPU without MIG: one column, which only the whole GPU fills.
    pub fn whole(name: impl Into<String>, memory_mib: u64) -> Self {
        let resources = Resources { compute: 1, ..Resources::NONE };
        let profile = Profile::new(0, "gpu", 1, memory_mib, 1, resources, [0]);
        Self {
            name: name.into(),
            memory_mib,
            sliced: false,
            columns: 1,
            capacity: resources,
            profiles: profile.into_iter().collect(),
        }
    }

    /// Every profile, in the driver's order.
    pub fn profiles(&self) -> &[Profile] {
        &self.profiles
    }

    /// The profile with this index.
    pub fn profile(&self, index: usize) -> Option<&Profile> {
        self.profiles.get(index)
    }

    /// The index of the profile with the driver's number `id`.
    pub fn by_id(&self, id: u32) -> Option<usize> {
        self.profiles.iter().position(|profile| profile.id == id)
    }

    /// The profile that is the whole GPU: all columns and the most compute.
    pub fn whole_gpu(&self) -> Option<usize> {
        let whole = |profile: &Profile| profile.columns == self.columns && profile.is_plain();
        self.profiles.iter().position(|profile| whole(profile) && profile.resources.compute == self.capacity.compute)
    }

    /// What of the whole GPU one instance of the profile at `index` is.
    pub fn share(&self, index: usize) -> Share {
        let Some(profile) = self.profile(index) else { return Share::NONE };
        let millionths = |part: u32, whole: u32| {
            let exact = u64::from(part) * 1_000_000 / u64::from(whole.max(1));
            u32::try_from(exact.min(1_000_000)).unwrap_or(1_000_000)
        };
        Share {
            compute: millionths(profile.resources.compute, self.capacity.compute),
            memory: millionths(profile.columns, self.columns),
        }
    }

    /// How many instances of the profile at `index` still fit beside `held`, whatever lies elsewhere.
    pub fn room(&self, index: usize, held: Columns) -> u32 {
        let Some(profile) = self.profile(index) else { return 0 };
        let mut taken = held;
        let mut count = 0;
        // Equal lengths, sorted by start: the earliest first is the most that fit.
        for (_, span) in profile.spans() {
            if !span.overlaps(taken) && count < profile.max_instances {
                taken |= span;
                count += 1;
            }
        }
        count
    }
}

/// One kind of instance: a MIG profile, or the whole GPU where there is no MIG.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Profile {
    /// The driver's number of the profile (19 for `1g.5gb` on an A100).
    pub id: u32,
    /// The name the driver gives it, or that NVIDIA's tools would; `gpu` for a whole GPU without MIG.
    pub name: String,
    /// Length on the placement axis.
    pub columns: u32,
    /// Memory of one instance, in MiB.
    pub memory_mib: u64,
    /// The most instances one GPU can have.
    pub max_instances: u32,
    /// What one instance takes besides columns.
    pub resources: Resources,
    spans: Vec<(u32, Columns)>,
}

impl Profile {
    /// A profile that may start at `starts`. None if one of them leaves the axis.
    pub fn new(
        id: u32,
        name: impl Into<String>,
        columns: u32,
        memory_mib: u64,
        max_instances: u32,
        resources: Resources,
        starts: impl IntoIterator<Item = u32>,
    ) -> Option<Self> {
        let spans = starts.into_iter().map(|start| Columns::span(start, columns).map(|span| (start, span)));
        let mut spans = spans.collect::<Option<Vec<_>>>()?;
        spans.sort_unstable();
        spans.dedup();
        Some(Self { id, name: name.into(), columns, memory_mib, max_instances, resources, spans })
    }

    /// Where instances may lie, by start.
    pub fn spans(&self) -> impl Iterator<Item = (u32, Columns)> + '_ {
        self.spans.iter().copied()
    }

    /// The columns of an instance at `start`, if one may lie there.
    pub fn span_at(&self, start: u32) -> Option<Columns> {
        self.spans.binary_search_by_key(&start, |(start, _)| *start).ok().and_then(|at| self.spans.get(at)).map(|s| s.1)
    }

    /// Whether it is one of the base profiles, not a variant with other media engines (`+me`, `+gfx`, …).
    pub fn is_plain(&self) -> bool {
        ProfileName::parse(&self.name).is_none_or(|name| name.variant.is_empty())
    }
}

/// What of a whole GPU an instance is, in millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// Of its compute slices.
    pub compute: u32,
    /// Of its columns, which are its memory.
    pub memory: u32,
}

impl Share {
    /// Nothing.
    pub const NONE: Self = Self { compute: 0, memory: 0 };

    /// The larger of both: what of the GPU nobody else can use, roughly.
    pub fn greater(self) -> u32 {
        self.compute.max(self.memory)
    }
}

/// What instances of a GPU share besides columns: compute slices and media engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Resources {
    /// Compute slices.
    pub compute: u32,
    /// Video decoders.
    pub decoders: u32,
    /// Video encoders.
    pub encoders: u32,
    /// JPEG engines.
    pub jpeg: u32,
    /// Optical-flow engines.
    pub ofa: u32,
}

impl Resources {
    /// Nothing.
    pub const NONE: Self = Self { compute: 0, decoders: 0, encoders: 0, jpeg: 0, ofa: 0 };

    /// Whether these are all within `capacity`.
    pub fn within(self, capacity: Self) -> bool {
        iter::zip(self.array(), capacity.array()).all(|(used, there)| used <= there)
    }

    /// Whether giving these up lessens what `used` has over `capacity`.
    pub fn shares_excess(self, used: Self, capacity: Self) -> bool {
        let over = iter::zip(used.array(), capacity.array()).map(|(used, there)| used > there);
        iter::zip(self.array(), over).any(|(own, over)| over && own > 0)
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.each(other, u32::saturating_add)
    }

    /// The greater of each.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        self.each(other, u32::max)
    }

    fn each(self, other: Self, f: fn(u32, u32) -> u32) -> Self {
        Self {
            compute: f(self.compute, other.compute),
            decoders: f(self.decoders, other.decoders),
            encoders: f(self.encoders, other.encoders),
            jpeg: f(self.jpeg, other.jpeg),
            ofa: f(self.ofa, other.ofa),
        }
    }

    fn array(self) -> [u32; 5] {
        [self.compute, self.decoders, self.encoders, self.jpeg, self.ofa]
    }
}

/// The form in which a model travels: what the driver told of it, and nothing that follows from that.
#[derive(Serialize, Deserialize)]
struct ModelForm {
    name: String,
    memory_mib: u64,
    /// None for a GPU without MIG.
    profiles: Option<Vec<ProfileForm>>,
}

#[derive(Serialize, Deserialize)]
struct ProfileForm {
    id: u32,
    name: String,
    columns: u32,
    memory_mib: u64,
    max_instances: u32,
    resources: Resources,
    starts: Vec<u32>,
}

impl From<Model> for ModelForm {
    fn from(model: Model) -> Self {
        let Model { name, memory_mib, sliced, profiles, .. } = model;
        let form = |profile: Profile| ProfileForm {
            starts: profile.spans().map(|(start, _)| start).collect(),
            id: profile.id,
            name: profile.name,
            columns: profile.columns,
            memory_mib: profile.memory_mib,
            max_instances: profile.max_instances,
            resources: profile.resources,
        };
        Self { name, memory_mib, profiles: sliced.then(|| profiles.into_iter().map(form).collect()) }
    }
}

impl TryFrom<ModelForm> for Model {
    type Error = &'static str;

    fn try_from(form: ModelForm) -> Result<Self, Self::Error> {
        let ModelForm { name, memory_mib, profiles } = form;
        let Some(profiles) = profiles else { return Ok(Self::whole(name, memory_mib)) };
        let profile = |form: ProfileForm| {
            let ProfileForm { id, name, columns, memory_mib, max_instances, resources, starts } = form;
            Profile::new(id, name, columns, memory_mib, max_instances, resources, starts)
        };
        let profiles: Option<Vec<Profile>> = profiles.into_iter().map(profile).collect();
        Ok(Self::sliced(name, memory_mib, profiles.ok_or("a profile leaves the longest axis there is room for")?))
    }
}
