//! How processes learn which slices are theirs, whatever runs them. Pure.

use crate::config::GpuBinding;
use std::collections::BTreeMap;

/// Variables that say which slices are to be seen. They are always set: an image of NVIDIA's says `all`.
pub(super) fn environment(uuids: &[String], binding: GpuBinding) -> BTreeMap<&'static str, String> {
    let list = uuids.join(",");
    let visible = match binding {
        // The device is given by CDI; the older hook must add none.
        _ if uuids.is_empty() => "void".to_owned(),
        GpuBinding::Cdi => "void".to_owned(),
        GpuBinding::DeviceRequest | GpuBinding::Environment => list.clone(),
    };
    BTreeMap::from([("NVIDIA_VISIBLE_DEVICES", visible), ("CUDA_VISIBLE_DEVICES", list)])
}
