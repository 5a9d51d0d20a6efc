//! What a container is to be, in the engine's words. Pure.

use super::super::{
    Mount, WorkloadSpec,
    workload::{
        CAPABILITIES, LABEL_FENCE, LABEL_INSTANCE, LABEL_USER, LABEL_WORKLOAD, PROGRAM, gpu_environment, hostname,
    },
};
use crate::config::{Container as Settings, GpuBinding};
use bollard::models::{
    ContainerCreateBody, DeviceRequest, HealthConfig, HostConfig, HostConfigLogConfig, Mount as EngineMount,
    MountBindOptions, MountBindOptionsPropagationEnum, MountTmpfsOptions, MountType, ResourcesUlimits, RestartPolicy,
    RestartPolicyNameEnum,
};
use std::{collections::HashMap, net::IpAddr, path::Path};

/// Where the run folder is, inside.
const RUN_FOLDER: &str = "/run/mlad/agent";
/// Open files of a process. Not above what an engine without CAP_SYS_RESOURCE commonly has itself.
const OPEN_FILES: i64 = 16_384;
/// Bytes of `/run/mlad`: sockets and little else.
const RUN_BYTES: i64 = 1 << 20;
const MIB: u64 = 1 << 20;

/// The world a container comes into.
#[derive(Debug, Clone)]
pub(super) struct Place<'a> {
    pub(super) instance: &'a str,
    pub(super) settings: &'a Settings,
    /// The `mlad` binary on the host.
    pub(super) agent_binary: &'a Path,
    /// The run folder on the host.
    pub(super) run_folder: &'a Path,
    pub(super) network: &'a str,
    /// Name servers; the engine's choice if empty.
    pub(super) dns: &'a [IpAddr],
}

/// The container of a workload.
pub(super) fn body(spec: &WorkloadSpec, place: &Place<'_>) -> ContainerCreateBody {
    ContainerCreateBody {
        hostname: Some(hostname(&spec.hostname)),
        user: Some("0:0".to_owned()),
        image: Some(spec.image.clone()),
        entrypoint: Some(vec![PROGRAM.to_owned(), "agent".to_owned()]),
        cmd: Some(Vec::new()),
        working_dir: Some("/".to_owned()),
        env: Some(
            gpu_environment(&spec.gpu_uuids, place.settings.gpu_binding)
                .into_iter()
                .map(|(name, value)| format!("{name}={value}"))
                .collect(),
        ),
        // The image's own would run as root.
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
        stop_signal: Some("SIGTERM".to_owned()),
        tty: Some(false),
        open_stdin: Some(false),
        labels: Some(HashMap::from([
            (LABEL_INSTANCE.to_owned(), place.instance.to_owned()),
            (LABEL_WORKLOAD.to_owned(), spec.name.clone()),
            (LABEL_FENCE.to_owned(), spec.fence.to_string()),
            (LABEL_USER.to_owned(), spec.agent.user.clone()),
        ])),
        host_config: Some(host_config(spec, place)),
        ..ContainerCreateBody::default()
    }
}

fn host_config(spec: &WorkloadSpec, place: &Place<'_>) -> HostConfig {
    let settings = place.settings;
    let memory = bytes(spec.memory_mib);
    HostConfig {
        mounts: Some(mounts(spec, place)),
        memory: Some(memory),
        // Memory and swap together: no swap.
        memory_swap: Some(memory),
        nano_cpus: Some(i64::try_from(spec.cpu_milli).unwrap_or(i64::MAX).saturating_mul(1_000_000)),
        pids_limit: Some(i64::from(settings.pids)),
        shm_size: Some(bytes(settings.shared_memory_mib)),
        ulimits: Some(vec![ResourcesUlimits {
            name: Some("nofile".to_owned()),
            soft: Some(OPEN_FILES),
            hard: Some(OPEN_FILES),
        }]),
        cap_drop: Some(vec!["ALL".to_owned()]),
        cap_add: Some(CAPABILITIES.map(str::to_owned).to_vec()),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        privileged: Some(false),
        init: Some(false),
        ipc_mode: Some("private".to_owned()),
        network_mode: Some(place.network.to_owned()),
        publish_all_ports: Some(false),
        dns: dns(place),
        device_requests: device_request(&spec.gpu_uuids, settings.gpu_binding).map(|request| vec![request]),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), ..RestartPolicy::default() }),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(HashMap::from([
                ("max-size".to_owned(), "10m".to_owned()),
                ("max-file".to_owned(), "2".to_owned()),
            ])),
        }),
        ..HostConfig::default()
    }
}

/// The agent's binary, `/run/mlad` with the run folder in it, and what the workload wants.
fn mounts(spec: &WorkloadSpec, place: &Place<'_>) -> Vec<EngineMount> {
    let run = EngineMount {
        typ: Some(MountType::TMPFS),
        target: Some("/run/mlad".to_owned()),
        tmpfs_options: Some(MountTmpfsOptions {
            size_bytes: Some(RUN_BYTES),
            mode: Some(0o755),
            ..MountTmpfsOptions::default()
        }),
        ..EngineMount::default()
    };
    let agent = Mount { source: place.agent_binary.into(), target: PROGRAM.into(), read_only: true };
    let folder = Mount { source: place.run_folder.into(), target: RUN_FOLDER.into(), read_only: false };
    std::iter::once(run).chain([&agent, &folder].into_iter().chain(&spec.mounts).map(bind)).collect()
}

fn bind(mount: &Mount) -> EngineMount {
    EngineMount {
        typ: Some(MountType::BIND),
        source: Some(mount.source.to_string_lossy().into_owned()),
        target: Some(mount.target.to_string_lossy().into_owned()),
        read_only: Some(mount.read_only),
        bind_options: Some(MountBindOptions {
            propagation: Some(MountBindOptionsPropagationEnum::RPRIVATE),
            ..MountBindOptions::default()
        }),
        ..EngineMount::default()
    }
}

/// Name servers. Without the outside there are none: the engine would forward questions from the host, and
/// they can carry data out.
fn dns(place: &Place<'_>) -> Option<Vec<String>> {
    if !place.settings.internet {
        return Some(vec!["127.0.0.1".to_owned()]);
    }
    let servers: Vec<String> = place.dns.iter().map(IpAddr::to_string).collect();
    (!servers.is_empty()).then_some(servers)
}

fn device_request(uuids: &[String], binding: GpuBinding) -> Option<DeviceRequest> {
    if uuids.is_empty() {
        return None;
    }
    match binding {
        GpuBinding::Environment => None,
        GpuBinding::Cdi => Some(DeviceRequest {
            driver: Some("cdi".to_owned()),
            device_ids: Some(uuids.iter().map(|uuid| format!("nvidia.com/gpu={uuid}")).collect()),
            ..DeviceRequest::default()
        }),
        GpuBinding::DeviceRequest => Some(DeviceRequest {
            driver: Some("nvidia".to_owned()),
            device_ids: Some(uuids.to_vec()),
            capabilities: Some(vec![vec!["gpu".to_owned(), "compute".to_owned(), "utility".to_owned()]]),
            ..DeviceRequest::default()
        }),
    }
}

fn bytes(mib: u64) -> i64 {
    i64::try_from(mib.saturating_mul(MIB)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{super::super::workload::agent_config, *};
    use mlad::channel::AgentConfig;
    use std::collections::BTreeMap;

    fn spec(gpu_uuids: &[&str]) -> WorkloadSpec {
        WorkloadSpec {
            name: "w-1-1".into(),
            fence: 7,
            image: "sha256:abc".into(),
            hostname: "default".into(),
            agent: AgentConfig {
                workload: "w-1-1".into(),
                user: "alice".into(),
                uid: 20000,
                gid: 20000,
                home: "/home/alice".into(),
                environment: BTreeMap::from([("CUDA_VISIBLE_DEVICES".into(), "0".into())]),
                job: None,
                network: None,
            },
            mounts: vec![Mount { source: "/data/home/alice".into(), target: "/home/alice".into(), read_only: false }],
            gpu_uuids: gpu_uuids.iter().map(|uuid| (*uuid).to_owned()).collect(),
            node: None,
            memory_mib: 512,
            cpu_milli: 1500,
        }
    }

    fn place(settings: &Settings) -> Place<'_> {
        Place {
            instance: "test",
            settings,
            agent_binary: Path::new("/opt/mlad"),
            run_folder: Path::new("/run/mlad/workloads/w-1-1"),
            network: "test",
            dns: &[],
        }
    }

    #[test]
    fn an_image_cannot_choose_what_runs_or_which_gpus_are_seen() {
        let settings = Settings { gpu_binding: GpuBinding::Environment, ..Settings::default() };
        let body = body(&spec(&[]), &place(&settings));
        assert_eq!(body.entrypoint.unwrap(), ["/usr/local/bin/mlad", "agent"]);
        assert_eq!(body.cmd.unwrap(), Vec::<String>::new());
        assert_eq!(body.user.unwrap(), "0:0");
        assert_eq!(body.healthcheck.unwrap().test.unwrap(), ["NONE"]);
        assert_eq!(body.env.unwrap(), ["CUDA_VISIBLE_DEVICES=", "NVIDIA_VISIBLE_DEVICES=void"]);
    }

    #[test]
    fn every_binding_gives_its_slice_and_no_other() {
        let uuids = ["MIG-1", "MIG-2"];
        let request = |binding| device_request(&uuids.map(str::to_owned), binding);
        let cdi = request(GpuBinding::Cdi).unwrap();
        assert_eq!(cdi.driver.unwrap(), "cdi");
        assert_eq!(cdi.device_ids.unwrap(), ["nvidia.com/gpu=MIG-1", "nvidia.com/gpu=MIG-2"]);
        let nvidia = request(GpuBinding::DeviceRequest).unwrap();
        assert_eq!(nvidia.device_ids.unwrap(), uuids);
        assert_eq!(nvidia.count, None);
        assert_eq!(request(GpuBinding::Environment), None);
        assert_eq!(device_request(&[], GpuBinding::Cdi), None);
        assert_eq!(gpu_environment(&["MIG-1".into()], GpuBinding::Cdi)["NVIDIA_VISIBLE_DEVICES"], "void");
        assert_eq!(gpu_environment(&["MIG-1".into()], GpuBinding::DeviceRequest)["NVIDIA_VISIBLE_DEVICES"], "MIG-1");
        let config = agent_config(&spec(&uuids), GpuBinding::Environment);
        assert_eq!(config.environment["CUDA_VISIBLE_DEVICES"], "MIG-1,MIG-2");
    }

    #[test]
    fn limits_are_in_the_engines_units() {
        let settings = Settings { pids: 100, shared_memory_mib: 64, ..Settings::default() };
        let host = body(&spec(&[]), &place(&settings)).host_config.unwrap();
        assert_eq!((host.memory, host.memory_swap), (Some(512 << 20), Some(512 << 20)));
        assert_eq!(host.nano_cpus, Some(1_500_000_000));
        assert_eq!(host.pids_limit, Some(100));
        assert_eq!(host.shm_size, Some(64 << 20));
    }

    #[test]
    fn without_the_outside_no_question_of_names_leaves_the_container() {
        let servers = [IpAddr::from([9, 9, 9, 9])];
        let settings = Settings { internet: false, ..Settings::default() };
        assert_eq!(dns(&Place { dns: &servers, ..place(&settings) }).unwrap(), ["127.0.0.1"]);
        let settings = Settings { internet: true, ..settings };
        assert_eq!(dns(&Place { dns: &servers, ..place(&settings) }).unwrap(), ["9.9.9.9"]);
        assert_eq!(dns(&place(&settings)), None);
    }

    #[test]
    fn any_wish_becomes_a_host_name() {
        for (wish, name) in
            [("default", "default"), ("My_Work", "my-work"), ("-_-", "workspace"), ("", "workspace"), ("é1", "1")]
        {
            assert_eq!(hostname(wish), name);
        }
        assert_eq!(hostname(&"x".repeat(100)).len(), 63);
    }
}
