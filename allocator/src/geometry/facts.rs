//! Models made from `mig-profiles.json`, for tests: what real drivers answer.

use super::{Model, Profile, Resources};
use serde_json::Value;

/// The model with this key in the facts (`A100-40GB`).
pub(crate) fn model(key: &str) -> Model {
    let facts: Value = serde_json::from_str(include_str!("../../mig-profiles.json")).expect("facts");
    let gpus = facts["gpus"].as_array().expect("gpus");
    let gpu = gpus.iter().find(|gpu| gpu["key"] == key).expect("model");
    let total = gpu["memory_total_gb"].as_u64().expect("memory") * 1024;
    let number = |value: &Value| value.as_u64().unwrap_or(0) as u32;
    let profiles = gpu["profiles"].as_array().expect("profiles").iter().map(|profile| {
        let placements = profile["placements"].as_array().expect("placements");
        let columns = number(&placements[0][1]);
        let memory = profile["memory_mib"].as_u64();
        let resources = Resources {
            compute: number(&profile["compute_slices"]),
            decoders: number(&profile["decoders"]),
            encoders: number(&profile["encoders"]),
            jpeg: number(&profile["jpeg"]),
            ofa: number(&profile["ofa"]),
        };
        Profile::new(
            number(&profile["nvml_profile_id"]),
            profile["name"].as_str().expect("name"),
            columns,
            memory.unwrap_or(total * u64::from(columns) / number(&gpu["placement_axis_units"]) as u64),
            number(&profile["max_instances"]),
            resources,
            placements.iter().map(|placement| number(&placement[0])),
        )
        .expect("profile")
    });
    let name = gpu["names"][0].as_str().expect("name");
    Model::sliced(name, total, profiles.collect())
}
