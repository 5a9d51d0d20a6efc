//! What is known of the GPU models that can be divided: `mig-profiles.json`, read into types.
//!
//! A fact that file does not know is not made up: a profile without an id, a size or placements is not
//! offered at all, as if the driver did not support it.

use std::sync::OnceLock;

use serde::Deserialize;

/// The facts, as the allocator uses them too.
const FACTS: &str = include_str!("../../mig-profiles.json");

/// Where a GPU instance lies: memory slices `start .. start + size` of its GPU. Also used for compute
/// instances, in compute slices of their GPU instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Placement {
    /// The first slice.
    pub start: u32,
    /// How many slices.
    pub size: u32,
}

impl Placement {
    /// One past the last slice.
    #[must_use]
    pub fn end(self) -> u32 {
        self.start.saturating_add(self.size)
    }

    /// Whether the two share a slice.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Engines for video and images, which profiles share out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Media {
    /// NVDEC.
    pub decoders: u32,
    /// NVENC.
    pub encoders: u32,
    /// NVJPG.
    pub jpeg: u32,
    /// Optical flow.
    pub ofa: u32,
}

/// A kind of GPU instance a model can be divided into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// `1g.5gb`.
    pub name: String,
    /// `NVML_GPU_INSTANCE_PROFILE_*`: what `nvmlDeviceGetGpuInstanceProfileInfo` is asked with.
    pub index: u32,
    /// What every other call names the profile by, and `nvidia-smi` prints.
    pub id: u32,
    /// Compute slices.
    pub compute_slices: u32,
    /// Memory slices.
    pub memory_slices: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Multiprocessors; none where no source tells.
    pub multiprocessors: Option<u32>,
    /// Copy engines; none where no source tells.
    pub copy_engines: Option<u32>,
    /// Media engines.
    pub media: Media,
    /// How many one GPU can hold.
    pub max_instances: u32,
    /// Everywhere it can lie, in rising order.
    pub placements: Vec<Placement>,
    /// The first driver branch (`525`) that has it; 0 for all.
    pub since_driver: u32,
}

impl Profile {
    /// Whether it brings the engines of which there is one set per GPU (`+me`, `+me.all`).
    #[must_use]
    pub fn takes_media_extension(&self) -> bool {
        self.name.contains("+me")
    }
}

/// The generation a model belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// A30, A100: MIG mode changes with the next GPU reset.
    Ampere,
    /// H100, H200, GH200.
    Hopper,
    /// B200, GB200, RTX PRO.
    Blackwell,
}

/// A GPU model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// What a machine file calls it (`A100-40GB`).
    pub key: String,
    /// What NVML calls it (`NVIDIA A100-SXM4-40GB`).
    pub name: String,
    /// PCI device and vendor id; none where no source tells.
    pub pci_device_id: Option<u32>,
    /// Memory in MiB; none where no source tells.
    pub memory_mib: Option<u64>,
    /// Length of the axis placements lie on, in memory slices; 0 where it cannot be divided.
    pub axis: u32,
    /// How many GPU instances it can hold, of any profile.
    pub max_instances: u32,
    /// Media engines of the whole GPU; none where no source tells.
    pub media: Option<Media>,
    /// Its generation.
    pub generation: Generation,
    /// CUDA compute capability.
    pub compute_capability: (i32, i32),
    /// Professional graphics (RTX PRO) and not a data centre card.
    pub workstation: bool,
    /// What it can be divided into; empty where the facts do not suffice.
    pub profiles: Vec<Profile>,
}

impl Model {
    /// The profile with NVML's id `id`.
    #[must_use]
    pub fn profile(&self, id: u32) -> Option<&Profile> {
        self.profiles.iter().find(|profile| profile.id == id)
    }
}

/// Every model of the facts.
///
/// # Errors
/// What is wrong with the facts file, which is compiled in: a fault of the build.
pub fn models() -> Result<&'static [Model], &'static str> {
    static MODELS: OnceLock<Result<Vec<Model>, String>> = OnceLock::new();
    match MODELS.get_or_init(parse) {
        Ok(models) => Ok(models),
        Err(reason) => Err(reason),
    }
}

/// The model called `key`, if the facts know it.
#[must_use]
pub fn model(key: &str) -> Option<&'static Model> {
    models().ok()?.iter().find(|model| model.key == key)
}

#[derive(Deserialize)]
struct File {
    gpus: Vec<Gpu>,
    geometries: std::collections::BTreeMap<String, Geometry>,
}

#[derive(Deserialize)]
struct Geometry {
    #[serde(default)]
    assumed_same_by_counts: Vec<String>,
    profiles: std::collections::BTreeMap<String, Vec<(u32, u32)>>,
}

#[derive(Deserialize)]
struct Gpu {
    key: String,
    names: Vec<String>,
    pci_device_ids: Option<Vec<String>>,
    memory_total_gb: Option<u64>,
    placement_axis_units: Option<u32>,
    memory_slices: Option<u32>,
    max_instances: u32,
    total_media: Option<MediaFacts>,
    profiles: Vec<ProfileFacts>,
}

#[derive(Deserialize)]
struct MediaFacts {
    decoders: Option<u32>,
    encoders: Option<u32>,
    jpeg: Option<u32>,
    ofa: Option<u32>,
}

#[derive(Deserialize)]
struct ProfileFacts {
    name: String,
    nvml_profile_enum: Option<String>,
    nvml_profile_id: Option<u32>,
    compute_slices: u32,
    memory_slices: Option<u32>,
    memory_mib: Option<u64>,
    memory_gib_nvidia_smi: Option<f64>,
    multiprocessors: Option<u32>,
    max_instances: Option<u32>,
    placements: Option<Vec<(u32, u32)>>,
    decoders: Option<u32>,
    encoders: Option<u32>,
    jpeg: Option<u32>,
    ofa: Option<u32>,
    copy_engines: Option<u32>,
    note: Option<String>,
}

fn parse() -> Result<Vec<Model>, String> {
    let file: File = serde_json::from_str(FACTS).map_err(|error| error.to_string())?;
    Ok(file.gpus.iter().map(|gpu| to_model(gpu, &file)).collect())
}

fn to_model(gpu: &Gpu, file: &File) -> Model {
    let assumed = file.geometries.values().find(|geometry| geometry.assumed_same_by_counts.contains(&gpu.key));
    let axis = gpu.placement_axis_units.or(gpu.memory_slices).unwrap_or(0);
    let (generation, compute_capability) = generation(&gpu.key);
    Model {
        key: gpu.key.clone(),
        name: format!("NVIDIA {}", gpu.names.first().unwrap_or(&gpu.key)),
        pci_device_id: gpu.pci_device_ids.as_ref().and_then(|ids| parse_hex(ids.first()?)),
        memory_mib: gpu.memory_total_gb.map(|gb| gb.saturating_mul(1024)),
        axis,
        max_instances: gpu.max_instances,
        media: gpu.total_media.as_ref().map(|media| Media {
            decoders: media.decoders.unwrap_or(0),
            encoders: media.encoders.unwrap_or(0),
            jpeg: media.jpeg.unwrap_or(0),
            ofa: media.ofa.unwrap_or(0),
        }),
        generation,
        compute_capability,
        workstation: gpu.key.starts_with("RTX"),
        profiles: gpu.profiles.iter().filter_map(|facts| to_profile(facts, assumed)).collect(),
    }
}

/// A profile, if everything that identifies and places it is known.
fn to_profile(facts: &ProfileFacts, assumed: Option<&Geometry>) -> Option<Profile> {
    let memory_slices = facts.memory_slices?;
    let known = facts.placements.clone().or_else(|| {
        let kind = geometry_name(facts.compute_slices, memory_slices);
        assumed.and_then(|geometry| geometry.profiles.get(&kind)).cloned()
    })?;
    let mut placements: Vec<Placement> = known.iter().map(|&(start, size)| Placement { start, size }).collect();
    placements.sort_unstable();
    Some(Profile {
        name: facts.name.clone(),
        index: number_in_parentheses(facts.nvml_profile_enum.as_deref()?)?,
        id: facts.nvml_profile_id?,
        compute_slices: facts.compute_slices,
        memory_slices,
        memory_mib: facts.memory_mib.or_else(|| facts.memory_gib_nvidia_smi.map(gib_to_mib))?,
        multiprocessors: facts.multiprocessors,
        copy_engines: facts.copy_engines,
        media: Media {
            decoders: facts.decoders.unwrap_or(0),
            encoders: facts.encoders.unwrap_or(0),
            jpeg: facts.jpeg.unwrap_or(0),
            ofa: facts.ofa.unwrap_or(0),
        },
        max_instances: facts.max_instances?,
        placements,
        since_driver: facts.note.as_deref().and_then(driver_branch).unwrap_or(0),
    })
}

/// How the geometries of the facts call a profile of the 7-compute, 8-memory lattice.
fn geometry_name(compute: u32, memory: u32) -> String {
    if compute == 1 && memory == 2 { "1g.2mem".to_owned() } else { format!("{compute}g") }
}

/// Architecture and CUDA compute capability, which NVIDIA publishes per product line.
fn generation(key: &str) -> (Generation, (i32, i32)) {
    match key {
        _ if key.starts_with("A30") || key.starts_with("A100") => (Generation::Ampere, (8, 0)),
        _ if key.starts_with("B300") || key.starts_with("GB300") => (Generation::Blackwell, (10, 3)),
        _ if key.starts_with('B') || key.starts_with("GB") => (Generation::Blackwell, (10, 0)),
        _ if key.starts_with("RTX") => (Generation::Blackwell, (12, 0)),
        _ => (Generation::Hopper, (9, 0)),
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn gib_to_mib(gib: f64) -> u64 {
    (gib * 1024.0).round() as u64
}

/// `0x20B010DE`.
fn parse_hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// The 9 of `1_SLICE_REV2(9)`.
fn number_in_parentheses(text: &str) -> Option<u32> {
    text.split_once('(')?.1.strip_suffix(')')?.parse().ok()
}

/// The 525 of a note that begins `R525+`.
fn driver_branch(note: &str) -> Option<u32> {
    note.strip_prefix('R')?.split_once('+')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_a100_is_whole() {
        let model = model("A100-40GB").unwrap();
        assert_eq!((model.axis, model.max_instances, model.memory_mib), (8, 7, Some(40960)));
        assert_eq!(model.pci_device_id, Some(0x20B0_10DE));
        let names: Vec<&str> = model.profiles.iter().map(|profile| profile.name.as_str()).collect();
        assert_eq!(names, ["1g.5gb", "1g.5gb+me", "1g.10gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"]);
        let double = model.profile(15).unwrap();
        assert_eq!((double.index, double.since_driver, double.memory_mib), (9, 525, 9856));
    }

    #[test]
    fn what_no_source_tells_is_not_offered() {
        // Placements by the geometry assumed, memory from nvidia-smi's figure.
        let h200 = model("H200-141GB").unwrap();
        assert_eq!(h200.profiles.len(), 7);
        assert_eq!(h200.profile(14).unwrap().memory_mib, 33024);
        // The ids of 3g, 4g and 7g were not found in any source.
        assert_eq!(model("B200-180GB").unwrap().profiles.len(), 4);
        assert!(model("B300").unwrap().profiles.is_empty());
        assert!(model("H20-96GB").unwrap().profiles.is_empty());
    }

    #[test]
    fn profiles_fit_their_axis_and_have_ids_of_their_own() {
        for model in models().unwrap() {
            for (at, profile) in model.profiles.iter().enumerate() {
                assert!(profile.placements.iter().all(|placement| placement.end() <= model.axis));
                assert!(profile.placements.iter().all(|placement| placement.size == profile.memory_slices));
                let others = model.profiles.iter().skip(at + 1);
                assert!(others.clone().all(|other| other.id != profile.id && other.index != profile.index));
            }
        }
    }
}
