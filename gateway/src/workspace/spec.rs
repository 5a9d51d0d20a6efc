//! What the container of a workspace is made of. Pure.

use crate::{
    config::Config,
    runtime::{Mount, WorkloadSpec},
    store::{UserRecord, WorkspaceRecord},
};
use mlad::{api::Lease, channel::AgentConfig};
use std::{collections::BTreeMap, path::Path};

/// Where the shared datasets are in the container.
const DATASETS: &str = "/datasets";

/// The container of `record`, which holds `lease`, made of the pinned `image`.
pub(super) fn workload_spec(
    config: &Config,
    record: &WorkspaceRecord,
    user: &UserRecord,
    lease: &Lease,
    image: &str,
) -> WorkloadSpec {
    let name = record.workload();
    let home = Path::new("/home").join(&user.name);
    let mut environment = slice_environment(lease);
    environment.insert("MLAD_WORKSPACE".into(), record.name.clone());
    environment.insert("MLAD_WORKLOAD".into(), name.clone());
    environment.insert("MLAD_IMAGE".into(), record.image.clone());
    WorkloadSpec {
        hostname: record.name.replace('_', "-").trim_matches('-').to_owned(),
        fence: lease.fence,
        image: image.to_owned(),
        agent: AgentConfig {
            workload: name.clone(),
            user: user.name.clone(),
            uid: user.uid,
            gid: user.uid,
            home: home.clone(),
            environment,
            job: None,
            network: None,
        },
        mounts: vec![
            Mount { source: config.home_of(&user.name), target: home, read_only: false },
            Mount { source: config.datasets(), target: DATASETS.into(), read_only: true },
        ],
        gpu_uuids: lease.uuids.clone(),
        node: (!lease.uuids.is_empty()).then(|| lease.node.clone()),
        memory_mib: config.container.memory_mib,
        cpu_milli: config.container.cpu_milli,
        name,
    }
}

/// What a process is told of the slice it runs on. Without one, NVIDIA's own runtime and CUDA are told that
/// there is none, so that an image that asks for all does not get them.
pub fn slice_environment(lease: &Lease) -> BTreeMap<String, String> {
    let mut environment = BTreeMap::from([("MLAD_SLICE".to_owned(), lease.profile.clone())]);
    if lease.uuids.is_empty() {
        environment.insert("NVIDIA_VISIBLE_DEVICES".into(), "void".into());
        environment.insert("CUDA_VISIBLE_DEVICES".into(), String::new());
    } else {
        environment.insert("NVIDIA_VISIBLE_DEVICES".into(), lease.uuids.join(","));
        environment.insert("MLAD_SLICES".into(), lease.uuids.len().to_string());
        environment.insert("MLAD_GPU_MEMORY_MIB".into(), lease.memory_mib.to_string());
    }
    if let Some(project) = &lease.project {
        environment.insert("MLAD_PROJECT".into(), project.clone());
    }
    environment
}
