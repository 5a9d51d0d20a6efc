//! What the container of an attempt is made of. Pure.

use crate::{
    config::Config,
    runtime::{Mount, WorkloadSpec},
    store::{JobRecord, UserRecord},
    workspace::slice_environment,
};
use mlad::{
    api::Lease,
    channel::{AgentConfig, JobRun},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Seconds the agent itself gives a preemptible job after SIGTERM: its notice may be longer than the grace, and the
/// controller ends either in time.
const WITH_NOTICE: u64 = 24 * 3600;

/// A job's folder as its user sees it.
pub fn job_directory(user: &str, id: mlad::api::JobId) -> PathBuf {
    Path::new("/home").join(user).join(job_folder(id))
}

/// What a job leaves, below its user's home.
pub fn artifacts_folder(id: mlad::api::JobId) -> PathBuf {
    job_folder(id).join("artifacts")
}

/// A job's folder below its user's home.
pub(super) fn job_folder(id: mlad::api::JobId) -> PathBuf {
    Path::new(".mlad/jobs").join(id.to_string())
}

/// The container of the job's current attempt, under this lease, of this pinned image.
pub(super) fn workload(
    config: &Config,
    job: &JobRecord,
    user: &UserRecord,
    lease: &Lease,
    image: String,
) -> WorkloadSpec {
    let home = Path::new("/home").join(&user.name);
    let folder = job_directory(&user.name, job.id);
    WorkloadSpec {
        name: lease.workload.clone(),
        fence: lease.fence,
        image,
        hostname: format!("job-{}", job.id),
        agent: AgentConfig {
            workload: lease.workload.clone(),
            user: user.name.clone(),
            uid: user.uid,
            gid: user.uid,
            home: home.clone(),
            environment: environment(job, lease),
            job: Some(JobRun {
                command: job.spec.command.clone(),
                working_directory: job.spec.working_directory.as_ref().map_or_else(|| home.clone(), PathBuf::from),
                log: folder.join("log"),
                artifacts: folder.join("artifacts"),
                grace_seconds: if job.spec.preemptible { WITH_NOTICE } else { config.job.grace_seconds },
            }),
            network: None,
        },
        mounts: vec![
            Mount { source: config.home_of(&user.name), target: home, read_only: false },
            Mount { source: config.datasets(), target: "/datasets".into(), read_only: true },
        ],
        gpu_uuids: lease.uuids.clone(),
        node: (!lease.uuids.is_empty()).then(|| lease.node.clone()),
        memory_mib: job.spec.memory_mib.unwrap_or(config.container.memory_mib),
        cpu_milli: config.container.cpu_milli,
    }
}

/// The user's own variables, and over them those that say which job and slice this is.
fn environment(job: &JobRecord, lease: &Lease) -> BTreeMap<String, String> {
    let mut environment = job.spec.environment.clone();
    environment.extend(slice_environment(lease));
    environment.insert("MLAD_JOB_ID".into(), job.id.to_string());
    environment.insert("MLAD_JOB_ATTEMPT".into(), job.life.attempt.to_string());
    environment.insert("MLAD_WORKLOAD".into(), lease.workload.clone());
    environment.insert("MLAD_IMAGE".into(), job.spec.image.clone().unwrap_or_default());
    environment
}
