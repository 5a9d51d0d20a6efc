//! The description of a simulated machine: a TOML file that people write.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::SimError;
use crate::facts::{self, Model};
use crate::state::Fault;

/// Where the description lies, unless one lies beside the library.
pub const MACHINE_VARIABLE: &str = "MLAD_NVML_SIM";
/// GPUs of one machine.
const MAX_GPUS: usize = 64;
/// Bytes of a description.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A machine: its driver and its GPUs.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// `535.104.05`.
    pub driver_version: String,
    /// As NVML counts: 12020 for CUDA 12.2.
    pub cuda_version: i32,
    /// In NVML's order.
    pub gpus: Vec<GpuDescription>,
    /// Faults there are from the first start.
    pub faults: Vec<Fault>,
    /// Where the state is kept.
    pub state: PathBuf,
}

/// One GPU of a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuDescription {
    /// What it is.
    pub model: &'static Model,
    /// Its name, where the description gives another than the facts.
    pub name: Option<String>,
    /// Whether MIG mode is on at the first start.
    pub mig: bool,
    /// Power drawn, in milliwatts.
    pub power_milliwatts: u32,
    /// Power limit, in milliwatts, if it is to have one.
    pub power_limit_milliwatts: Option<u32>,
    /// Temperature of the GPU, in degrees Celsius.
    pub temperature_celsius: u32,
}

impl Machine {
    /// Reads the description at `path`.
    ///
    /// # Errors
    /// [`SimError::Machine`] when it cannot be read or does not describe a machine.
    pub fn load(path: &Path) -> Result<Self, SimError> {
        let wrong = |reason: String| SimError::Machine { path: path.to_owned(), reason };
        // One description is one machine, by whatever link it was reached, and wherever who loaded the
        // library goes later.
        let path = &path.canonicalize().map_err(|error| wrong(error.to_string()))?;
        let length = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?.len();
        if length > MAX_FILE_BYTES {
            return Err(wrong(format!("it has {length} bytes; at most {MAX_FILE_BYTES} are read")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        Self::parse(&text, path).map_err(wrong)
    }

    /// The description `text` that lies at `path`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
        let cuda_version = parse_cuda(&file.cuda_version)
            .ok_or_else(|| format!("cuda_version = \"{}\": say \"12.2\"", file.cuda_version))?;
        if driver_branch(&file.driver_version).is_none() {
            return Err(format!("driver_version = \"{}\": say \"535.104.05\"", file.driver_version));
        }
        let mut gpus = Vec::new();
        for group in &file.gpu {
            let description = group.describe()?;
            if gpus.len().saturating_add(group.count) > MAX_GPUS {
                return Err(format!("more than {MAX_GPUS} GPUs"));
            }
            gpus.extend(std::iter::repeat_n(description, group.count));
        }
        for fault in &file.fault {
            fault.check(gpus.len())?;
        }
        let state = file.state.unwrap_or_else(|| path.with_extension("state.json"));
        let state = path.parent().map_or_else(|| state.clone(), |folder| folder.join(&state));
        Ok(Self { driver_version: file.driver_version, cuda_version, gpus, faults: file.fault, state })
    }

    /// The driver's branch: 535 of 535.104.05.
    #[must_use]
    pub fn driver_branch(&self) -> u32 {
        driver_branch(&self.driver_version).unwrap_or(0)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default = "default_driver")]
    driver_version: String,
    #[serde(default = "default_cuda")]
    cuda_version: String,
    state: Option<PathBuf>,
    gpu: Vec<Group>,
    #[serde(default)]
    fault: Vec<Fault>,
}

/// Equal GPUs.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    model: String,
    #[serde(default = "one")]
    count: usize,
    name: Option<String>,
    #[serde(default)]
    mig: bool,
    #[serde(default = "default_power")]
    power_watts: u32,
    power_limit_watts: Option<u32>,
    #[serde(default = "default_temperature")]
    temperature_celsius: u32,
}

impl Group {
    fn describe(&self) -> Result<GpuDescription, String> {
        let model = facts::model(&self.model).ok_or_else(|| {
            let known: Vec<&str> = facts::models().unwrap_or_default().iter().map(|model| model.key.as_str()).collect();
            format!("there is no GPU model \"{}\"; known are {}", self.model, known.join(", "))
        })?;
        if self.mig && model.profiles.is_empty() {
            return Err(format!(
                "too little is known of {}'s MIG profiles to simulate them: say mig = false",
                model.key
            ));
        }
        let milliwatts = |watts: u32| watts.checked_mul(1000).ok_or_else(|| format!("{watts} W is too much"));
        Ok(GpuDescription {
            model,
            name: self.name.clone(),
            mig: self.mig,
            power_milliwatts: milliwatts(self.power_watts)?,
            power_limit_milliwatts: self.power_limit_watts.map(milliwatts).transpose()?,
            temperature_celsius: self.temperature_celsius,
        })
    }
}

fn default_driver() -> String {
    "535.104.05".to_owned()
}

fn default_cuda() -> String {
    "12.2".to_owned()
}

fn one() -> usize {
    1
}

fn default_power() -> u32 {
    55
}

fn default_temperature() -> u32 {
    32
}

fn driver_branch(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

/// 12020 of `12.2`.
fn parse_cuda(version: &str) -> Option<i32> {
    let (major, minor) = version.split_once('.')?;
    let (major, minor): (i32, i32) = (major.parse().ok()?, minor.parse().ok()?);
    major.checked_mul(1000)?.checked_add(minor.checked_mul(10)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Machine, String> {
        Machine::parse(text, Path::new("/etc/mlad/dgx.toml"))
    }

    #[test]
    fn a_short_description_is_enough() {
        let machine = parse("[[gpu]]\nmodel = \"A100-40GB\"\ncount = 8\nmig = true\n").unwrap();
        assert_eq!(machine.gpus.len(), 8);
        assert!(machine.gpus.iter().all(|gpu| gpu.mig && gpu.model.key == "A100-40GB"));
        assert_eq!((machine.driver_branch(), machine.cuda_version), (535, 12020));
        assert_eq!(machine.state, Path::new("/etc/mlad/dgx.state.json"));
    }

    #[test]
    fn a_relative_state_lies_beside_the_description() {
        let machine = parse("state = \"run/gpus.json\"\n[[gpu]]\nmodel = \"A30-24GB\"\n").unwrap();
        assert_eq!(machine.state, Path::new("/etc/mlad/run/gpus.json"));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("[[gpu]]\nmodel = \"A100\"", "A100-40GB"),
            ("[[gpu]]\nmodel = \"B300\"\nmig = true", "mig = false"),
            ("[[gpu]]\nmodel = \"A30-24GB\"\ncolour = 1", "colour"),
            ("driver_version = \"new\"\n[[gpu]]\nmodel = \"A30-24GB\"", "535.104.05"),
            ("cuda_version = \"12\"\n[[gpu]]\nmodel = \"A30-24GB\"", "12.2"),
            ("[[gpu]]\nmodel = \"A30-24GB\"\ncount = 65", "64"),
            ("[[gpu]]\nmodel = \"A30-24GB\"\n[[fault]]\nkind = \"lost\"\ngpu = 1", "GPU 1"),
        ] {
            let reason = parse(text).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
    }
}
