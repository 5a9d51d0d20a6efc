//! Slices, leases and what is waited for: the allocator's half of the API.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use utoipa::ToSchema;

/// What is asked of the GPUs: a profile by name, enough memory, a whole GPU, or none.
///
/// Text form (CLI, `MLAD_GPU`, TOML, JSON): `1g.5gb`, `3g.20gb`, … for a profile; `10G` (10⁹ bytes each, as
/// NVIDIA names its profiles and Kubernetes counts), `10GiB`, `9000M` or `9000MiB` for memory; `gpu` for a
/// whole one; `cpu` or `none` for none. `3g.20gb@a100` is the same on a GPU of that model only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Need {
    /// One MIG device of this profile, by the name the driver gives it.
    Profile(String),
    /// The smallest MIG device with at least this much memory, in MiB.
    MemoryMib(u64),
    /// A whole GPU.
    Gpu,
    /// No GPU at all.
    Cpu,
    /// One of the above, but not [`Self::Cpu`], on a GPU of one model.
    On {
        /// What of it.
        need: Box<Self>,
        /// The model: a part of the driver's name for it, in lower case and with `-` for spaces (`a100`,
        /// `h100-80gb`).
        model: String,
    },
}

impl utoipa::PartialSchema for Need {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        String::schema()
    }
}

impl ToSchema for Need {}

/// Why a text is not a [`Need`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is neither a profile (1g.5gb), an amount of memory (10G), `gpu` nor `cpu` (all but `cpu` may name a model: gpu@a100)"
)]
pub struct NeedError(pub String);

impl FromStr for Need {
    type Err = NeedError;

    fn from_str(text: &str) -> Result<Self, NeedError> {
        let error = || NeedError(text.chars().take(64).collect());
        let lower = text.trim().to_ascii_lowercase();
        if let Some((need, model)) = lower.split_once('@') {
            return match need.parse().map_err(|_| error())? {
                Self::Cpu | Self::On { .. } => Err(error()),
                need if is_model_name(model) => Ok(Self::On { need: Box::new(need), model: model.to_owned() }),
                _ => Err(error()),
            };
        }
        match lower.as_str() {
            "gpu" => return Ok(Self::Gpu),
            "cpu" | "none" => return Ok(Self::Cpu),
            _ => {}
        }
        if is_profile_name(&lower) {
            return Ok(Self::Profile(lower));
        }
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = lower.strip_prefix(digits).unwrap_or_default();
        let amount: u64 = digits.parse().map_err(|_| error())?;
        // A 1g.10gb of an A100 has 9856 MiB: it serves 10 GB and not 10 GiB, so the two must differ here.
        let mib = match unit {
            "g" | "gb" => amount.checked_mul(GIGABYTE).map(|bytes| bytes.div_ceil(MEBIBYTE)),
            "m" | "mb" => amount.checked_mul(MEGABYTE).map(|bytes| bytes.div_ceil(MEBIBYTE)),
            "gi" | "gib" => amount.checked_mul(1024),
            "mi" | "mib" => Some(amount),
            _ => None,
        };
        match mib {
            Some(mib) if mib > 0 => Ok(Self::MemoryMib(mib)),
            _ => Err(error()),
        }
    }
}

const MEBIBYTE: u64 = 1 << 20;
const MEGABYTE: u64 = 1_000_000;
const GIGABYTE: u64 = 1_000_000_000;

/// `<digits>g.<digits>gb` with an optional `+suffix` or `-suffix` of letters, digits, dots or pluses.
fn is_profile_name(text: &str) -> bool {
    let (base, suffix) = text.split_once(['+', '-']).map_or((text, None), |(base, suffix)| (base, Some(suffix)));
    let digits = |s: &str| !s.is_empty() && s.len() <= 4 && s.bytes().all(|b| b.is_ascii_digit());
    let Some((compute, memory)) = base.split_once('.') else { return false };
    compute.strip_suffix('g').is_some_and(digits)
        && memory.strip_suffix("gb").is_some_and(digits)
        && suffix.is_none_or(|s| {
            !s.is_empty() && s.len() <= 16 && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'+')
        })
}

/// A part of a driver's name of a model, as [`Need::On`] has it.
fn is_model_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.' | b'_');
    (2..=64).contains(&text.len()) && text.bytes().all(inner)
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(name) => f.write_str(name),
            Self::MemoryMib(mib) => match whole_gigabytes(*mib) {
                Some(gigabytes) => write!(f, "{gigabytes}G"),
                None if mib % 1024 == 0 => write!(f, "{}GiB", mib / 1024),
                None => write!(f, "{mib}MiB"),
            },
            Self::Gpu => f.write_str("gpu"),
            Self::Cpu => f.write_str("cpu"),
            Self::On { need, model } => write!(f, "{need}@{model}"),
        }
    }
}

/// The gigabytes that read as this many MiB, if some do.
fn whole_gigabytes(mib: u64) -> Option<u64> {
    let gigabytes = mib.checked_mul(MEBIBYTE)? / GIGABYTE;
    (gigabytes > 0 && (gigabytes * GIGABYTE).div_ceil(MEBIBYTE) == mib).then_some(gigabytes)
}

impl TryFrom<String> for Need {
    type Error = NeedError;

    fn try_from(text: String) -> Result<Self, NeedError> {
        text.parse()
    }
}

impl From<Need> for String {
    fn from(need: Need) -> Self {
        need.to_string()
    }
}

/// Where an instance lies on its GPU's placement axis (memory slices on most models).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    /// First column.
    pub start: u32,
    /// Number of columns.
    pub size: u32,
}

/// Every GPU of every node, and what is on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuMap {
    /// In the order node, then index.
    pub gpus: Vec<Gpu>,
    /// When the driver was last asked.
    pub as_of: Timestamp,
    /// Why it is not as of now, if it is not: the allocator does not answer, and this is what it said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub late: Option<String>,
}

/// One physical GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Gpu {
    /// The node it sits in.
    pub node: String,
    /// Its index at the driver.
    pub index: u32,
    /// The driver's UUID of the whole GPU (`GPU-…`).
    pub uuid: String,
    /// The driver's name of the model.
    pub model: String,
    /// Memory of the whole GPU, in MiB.
    pub memory_mib: u64,
    /// Whether it can be sliced now.
    pub mig: bool,
    /// Length of the placement axis; 0 without MIG.
    pub columns: u32,
    /// The MIG instances that exist, and the whole GPU if it is leased as one.
    pub slices: Vec<Slice>,
    /// What it can be cut into, the smallest first, and how many of each would fit now; empty while it is
    /// out of service. One `gpu` where there is no MIG.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<ProfileRoom>,
    /// When it was last read; none if it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_at: Option<Timestamp>,
    /// Why it is out of service, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// How much room a GPU has for one profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProfileRoom {
    /// The profile's name; `gpu` for a whole one.
    pub profile: String,
    /// Memory of one, in MiB.
    pub memory_mib: u64,
    /// How many could be granted now, if nothing else were: idle instances and room to make more.
    pub free: u32,
    /// How many fit on the empty GPU.
    pub most: u32,
}

/// One MIG instance (or one whole GPU) that exists now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Slice {
    /// The profile's name; `gpu` for a whole one.
    pub profile: String,
    /// UUID a container is given (`MIG-…` or `GPU-…`); it changes when the instance is made again.
    pub uuid: String,
    /// Where it lies; none for a whole GPU without MIG.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Whether it is in use.
    pub state: SliceState,
    /// Who holds it, if somebody does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
}

/// Whether a slice is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SliceState {
    /// Nobody holds it.
    Idle,
    /// A lease holds it.
    Leased,
    /// Its state is in doubt; it is not granted.
    Quarantined,
}

/// Who holds a slice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Holder {
    /// The user.
    pub user: String,
    /// The workload (`w-…` for a workspace, `j-…` for a job's attempt).
    pub workload: String,
    /// Since when.
    pub since: Timestamp,
    /// When it ends at the latest, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

/// The right of one workload to its slices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Lease {
    /// The workload that holds it; also its key.
    pub workload: String,
    /// The user the workload belongs to.
    pub user: String,
    /// A number that only grows; a later lease of the same slice has a greater one.
    pub fence: u64,
    /// The node its slices are on.
    pub node: String,
    /// What was asked for.
    pub need: Need,
    /// The profile granted: a MIG profile's name, `gpu` or `cpu`.
    pub profile: String,
    /// UUIDs the container is to see; empty for `cpu`.
    pub uuids: Vec<String>,
    /// Memory of each slice, in MiB; 0 for `cpu`.
    pub memory_mib: u64,
    /// Where its slices are, in the order of `uuids`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slices: Vec<LeasedSlice>,
    /// The project it counts for, if it counts for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// The priority it was asked for with.
    #[serde(default)]
    pub priority: i32,
    /// Whether it may be ended, with notice, for a request of greater priority.
    #[serde(default)]
    pub preemptible: bool,
    /// When its workload ends at the latest, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_end: Option<Timestamp>,
    /// Notice that it is going to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<Ending>,
    /// What is wrong with a GPU of it, if something is: it goes on, and may fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// When it was granted.
    pub granted_at: Timestamp,
    /// When it ends if it is not renewed.
    pub expires_at: Timestamp,
    /// Why it is over, if it is (it was revoked, its slice vanished): it cannot be renewed any more, and its
    /// slices stay held until its container is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<String>,
}

/// Where one slice of a lease is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeasedSlice {
    /// The node.
    pub node: String,
    /// UUID of the GPU.
    pub gpu: String,
    /// Index of the GPU at the node's driver.
    pub gpu_index: u32,
    /// UUID a container is given.
    pub uuid: String,
    /// Where on the GPU; none for whole GPUs without MIG.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
}

/// Notice that a lease is going to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ending {
    /// When: from then on it cannot be renewed.
    pub at: Timestamp,
    /// Why, in words.
    pub reason: String,
}

/// What a waiting request waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Wait {
    /// The workload that waits.
    pub workload: String,
    /// The user it belongs to.
    pub user: String,
    /// The project it counts for, if it counts for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// What was asked for.
    pub need: Need,
    /// How many slices of that, all at once.
    #[serde(default = "one")]
    pub slices: u32,
    /// On how many nodes, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<u32>,
    /// Who asked with more is ahead.
    #[serde(default)]
    pub priority: i32,
    /// Since when.
    pub since: Timestamp,
    /// Why it is not granted yet.
    pub reason: WaitReason,
    /// The reason in words: what blocks it and what would fit now.
    pub detail: String,
    /// Place in the queue; 1 is the next.
    pub place: u32,
    /// How many wait in all.
    pub waiting: u32,
    /// Earliest time at which known lease ends make room, if any are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Timestamp>,
}

fn one() -> u32 {
    1
}

/// Why a request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum WaitReason {
    /// Others came first.
    Priority,
    /// No space of that size is free.
    NoSlice,
    /// A quota of the user or project is used up.
    Quota,
    /// Space is free and is being repartitioned.
    Repartitioning,
    /// Free space exists, but the driver or node does not answer.
    NodeUnavailable,
    /// What is free is set aside for others, or its own reservation has not begun or is in use.
    Reserved,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn needs_read_from_text() {
        for (text, need) in [
            ("2g.10gb", Need::Profile("2g.10gb".into())),
            ("1g.5gb+me", Need::Profile("1g.5gb+me".into())),
            ("1g.24gb-me", Need::Profile("1g.24gb-me".into())),
            ("10G", Need::MemoryMib(9537)),
            ("10GiB", Need::MemoryMib(10240)),
            ("9000MiB", Need::MemoryMib(9000)),
            ("9000M", Need::MemoryMib(8584)),
            ("gpu", Need::Gpu),
            ("none", Need::Cpu),
            ("3g.20gb@A100", Need::On { need: Box::new(Need::Profile("3g.20gb".into())), model: "a100".into() }),
            ("gpu@h100-80gb", Need::On { need: Box::new(Need::Gpu), model: "h100-80gb".into() }),
        ] {
            assert_eq!(text.parse(), Ok(need), "{text}");
        }
        for text in [
            "",
            "g",
            "0G",
            "-1G",
            "2g.gb",
            "10T",
            "99999999999999999999G",
            "1g.5gb+",
            "cpu@a100",
            "gpu@",
            "gpu@a b",
            "gpu@a100@h100",
        ] {
            assert!(text.parse::<Need>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_need_survives_its_text(text in "([0-9]{1,20}[gmGM]?[iI]?[bB]?(@[a-z0-9-]{1,8})?|.{0,24})") {
            if let Ok(need) = text.parse::<Need>() {
                prop_assert_eq!(need.to_string().parse::<Need>(), Ok(need));
            }
        }
    }
}
