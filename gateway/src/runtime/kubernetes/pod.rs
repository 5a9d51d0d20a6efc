//! What a pod is to be, in the cluster's words. Pure.

use super::super::{
    Mount, WorkloadSpec,
    workload::{
        CAPABILITIES, LABEL_FENCE, LABEL_INSTANCE, LABEL_USER, LABEL_WORKLOAD, PROGRAM, gpu_environment, hostname,
    },
};
use crate::config::{Config, Kubernetes as Settings, PodSecurity, Volume};
use k8s_openapi::api::core::v1::{Pod, Secret};
use serde_json::{Value, json};
use std::path::Path;

/// The container that the user is in.
pub(super) const CONTAINER: &str = "workload";

/// Where `mlad` is brought to.
const PROGRAM_FOLDER: &str = "/opt/mlad";
/// The agent's configuration.
const CONFIG_FOLDER: &str = "/etc/mlad-agent";
const CONFIG: &str = "/etc/mlad-agent/config.json";
const CONFIG_KEY: &str = "config.json";
/// Tables of accounts with the user in them.
const ACCOUNTS: &str = "/opt/mlad-accounts";
/// What the kubelet reads when the container has ended.
const TERMINATION_LOG: &str = "/dev/termination-log";
/// Longest time that a pod takes to end, in seconds.
const MAX_GRACE: u64 = 300;

/// The pod's name.
pub(super) fn name(instance: &str, workload: &str) -> String {
    format!("{instance}-{workload}")
}

/// Why a pod cannot be described.
#[derive(Debug, thiserror::Error)]
pub(super) enum PodError {
    #[error("kubernetes.volumes names no folder that {0} is in")]
    NoVolume(String),
    #[error("it cannot be written down: {0}")]
    Words(#[from] serde_json::Error),
}

/// The secret with what the agent is to be.
pub(super) fn secret(config: &Config, spec: &WorkloadSpec) -> Result<Secret, PodError> {
    let agent = serde_json::to_string(&spec.agent)?;
    Ok(serde_json::from_value(json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": { "name": name(&config.instance, &spec.name), "labels": labels(config, spec) },
        "stringData": { CONFIG_KEY: agent },
    }))?)
}

/// The pod of a workload.
pub(super) fn pod(config: &Config, settings: &Settings, spec: &WorkloadSpec) -> Result<Pod, PodError> {
    Ok(serde_json::from_value(value(config, settings, spec)?)?)
}

fn value(config: &Config, settings: &Settings, spec: &WorkloadSpec) -> Result<Value, PodError> {
    let restricted = settings.pod_security == PodSecurity::Restricted;
    let folders = Folders::of(settings, &spec.mounts)?;
    let mut selector = settings.node_selector.clone();
    selector.extend(spec.node.iter().map(|node| ("kubernetes.io/hostname".to_owned(), node.clone())));
    let mut inner = json!({
        "restartPolicy": "Never",
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "hostname": hostname(&spec.hostname),
        "terminationGracePeriodSeconds": grace(spec),
        "securityContext": pod_security(spec, restricted),
        "initContainers": init_containers(settings, spec, restricted),
        "containers": [container(config, settings, spec, restricted, &folders)],
        "volumes": volumes(config, spec, restricted, &folders),
        "imagePullSecrets": settings.image_pull_secrets.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>(),
        "tolerations": settings.tolerations,
        "nodeSelector": selector,
    });
    let class = settings.gpu_runtime_class.as_ref().filter(|_| !spec.gpu_uuids.is_empty());
    set(&mut inner, "runtimeClassName", class);
    set(&mut inner, "priorityClassName", settings.priority_class.as_ref());
    if settings.user_namespaces
        && let Some(inner) = inner.as_object_mut()
    {
        inner.insert("hostUsers".to_owned(), json!(false));
    }
    Ok(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name(&config.instance, &spec.name),
            "labels": labels(config, spec),
            // A login name need not be a label's value. And an autoscaler must not move somebody's terminal.
            "annotations": { LABEL_USER: spec.agent.user, "cluster-autoscaler.kubernetes.io/safe-to-evict": "false" },
        },
        "spec": inner,
    }))
}

fn set(object: &mut Value, key: &str, value: Option<&String>) {
    if let (Some(object), Some(value)) = (object.as_object_mut(), value) {
        object.insert(key.to_owned(), json!(value));
    }
}

fn labels(config: &Config, spec: &WorkloadSpec) -> Value {
    json!({ LABEL_INSTANCE: config.instance, LABEL_WORKLOAD: spec.name, LABEL_FENCE: spec.fence.to_string() })
}

/// Seconds between SIGTERM and SIGKILL when nobody says otherwise. Nobody who empties a node waits for longer, though a
/// job that has notice of its end may have a day.
fn grace(spec: &WorkloadSpec) -> u64 {
    spec.agent.job.as_ref().map_or(10, |job| job.grace_seconds.saturating_add(5).min(MAX_GRACE))
}

fn pod_security(spec: &WorkloadSpec, restricted: bool) -> Value {
    // No fsGroup: it would change the group of everybody's files in the shared volumes.
    if restricted {
        json!({
            "runAsNonRoot": true,
            "runAsUser": spec.agent.uid,
            "runAsGroup": spec.agent.gid,
            "seccompProfile": { "type": "RuntimeDefault" },
        })
    } else {
        json!({ "runAsUser": 0, "runAsGroup": 0, "seccompProfile": { "type": "RuntimeDefault" } })
    }
}

fn container_security(restricted: bool) -> Value {
    let add: &[&str] = if restricted { &[] } else { &CAPABILITIES };
    json!({ "allowPrivilegeEscalation": false, "privileged": false, "capabilities": { "drop": ["ALL"], "add": add } })
}

/// `mlad` is brought in; and an agent that is not root has the tables of accounts written for it, out of the image's.
fn init_containers(settings: &Settings, spec: &WorkloadSpec, restricted: bool) -> Value {
    let little =
        json!({ "limits": { "cpu": "500m", "memory": "64Mi" }, "requests": { "cpu": "10m", "memory": "16Mi" } });
    let program = json!({ "name": "program", "mountPath": PROGRAM_FOLDER });
    let mut containers = vec![json!({
        "name": "program",
        "image": settings.agent_image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/mlad", "agent", "install", PROGRAM_FOLDER],
        "resources": little,
        "securityContext": container_security(true),
        "volumeMounts": [program],
    })];
    if restricted {
        containers.push(json!({
            "name": "accounts",
            "image": spec.image,
            "imagePullPolicy": "IfNotPresent",
            "command": [format!("{PROGRAM_FOLDER}/mlad"), "agent", "accounts", CONFIG, ACCOUNTS],
            "resources": little,
            "securityContext": container_security(true),
            "volumeMounts": [
                program,
                { "name": "agent", "mountPath": CONFIG_FOLDER, "readOnly": true },
                { "name": "accounts", "mountPath": ACCOUNTS },
            ],
        }));
    }
    json!(containers)
}

fn container(config: &Config, settings: &Settings, spec: &WorkloadSpec, restricted: bool, folders: &Folders) -> Value {
    let environment = gpu_environment(&spec.gpu_uuids, config.container.gpu_binding);
    let environment: Vec<Value> =
        environment.into_iter().map(|(name, value)| json!({ "name": name, "value": value })).collect();
    json!({
        "name": CONTAINER,
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "command": [PROGRAM, "agent", "--config", CONFIG, "--result-copy", TERMINATION_LOG],
        "workingDir": "/",
        "env": environment,
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "ports": [{ "name": "agent", "containerPort": settings.agent_port, "protocol": "TCP" }],
        "resources": resources(settings, spec),
        "securityContext": container_security(restricted),
        "volumeMounts": mounts(restricted, folders),
    })
}

fn resources(settings: &Settings, spec: &WorkloadSpec) -> Value {
    let memory = format!("{}Mi", spec.memory_mib);
    let storage = format!("{}Mi", settings.ephemeral_storage_mib);
    let promised = settings.cpu_request_milli.min(spec.cpu_milli);
    json!({
        "limits": { "cpu": format!("{}m", spec.cpu_milli), "memory": memory, "ephemeral-storage": storage },
        "requests": { "cpu": format!("{promised}m"), "memory": memory, "ephemeral-storage": "64Mi" },
    })
}

fn mounts(restricted: bool, folders: &Folders) -> Value {
    let mut mounts = vec![
        json!({ "name": "run", "mountPath": "/run/mlad" }),
        json!({ "name": "shared-memory", "mountPath": "/dev/shm" }),
        json!({ "name": "agent", "mountPath": CONFIG_FOLDER, "readOnly": true }),
        json!({ "name": "program", "mountPath": PROGRAM, "subPath": "mlad", "readOnly": true }),
    ];
    if restricted {
        let table = |path: &str, file: &str| json!({ "name": "accounts", "mountPath": path, "subPath": file, "readOnly": true });
        mounts.push(table("/etc/passwd", "passwd"));
        mounts.push(table("/etc/group", "group"));
        mounts.push(table("/etc/profile.d/00-mlad.sh", "profile"));
    }
    mounts.extend(folders.mounts.iter().cloned());
    json!(mounts)
}

fn volumes(config: &Config, spec: &WorkloadSpec, restricted: bool, folders: &Folders) -> Value {
    let mut volumes = vec![
        json!({ "name": "run", "emptyDir": { "medium": "Memory", "sizeLimit": "4Mi" } }),
        json!({ "name": "program", "emptyDir": { "sizeLimit": "128Mi" } }),
        json!({
            "name": "shared-memory",
            "emptyDir": { "medium": "Memory", "sizeLimit": format!("{}Mi", config.container.shared_memory_mib) },
        }),
        // Readable for an agent that is not root: what is in it concerns this pod alone.
        json!({ "name": "agent", "secret": { "secretName": name(&config.instance, &spec.name), "defaultMode": 0o444 } }),
    ];
    if restricted {
        volumes.push(json!({ "name": "accounts", "emptyDir": { "sizeLimit": "16Mi" } }));
    }
    volumes.extend(folders.volumes.iter().cloned());
    json!(volumes)
}

/// The gateway's folders, as volumes of a pod and their mounts.
#[derive(Debug, Default)]
struct Folders {
    volumes: Vec<Value>,
    mounts: Vec<Value>,
}

impl Folders {
    fn of(settings: &Settings, wanted: &[Mount]) -> Result<Self, PodError> {
        let mut folders = Self::default();
        let mut used = Vec::new();
        for mount in wanted {
            let (index, volume, below) = find(&settings.volumes, &mount.source)
                .ok_or_else(|| PodError::NoVolume(mount.source.display().to_string()))?;
            let name = format!("folder-{index}");
            if !used.contains(&index) {
                used.push(index);
                folders.volumes.push(volume_source(&name, volume));
            }
            let mut entry = json!({ "name": name, "mountPath": mount.target, "readOnly": mount.read_only });
            set(&mut entry, "subPath", Some(&below.to_string_lossy().into_owned()).filter(|path| !path.is_empty()));
            folders.mounts.push(entry);
        }
        Ok(folders)
    }
}

/// The volume that holds a folder, and the folder's path in it; of several the innermost.
fn find<'a>(volumes: &'a [Volume], folder: &'a Path) -> Option<(usize, &'a Volume, &'a Path)> {
    let holding = volumes
        .iter()
        .enumerate()
        .filter_map(|(index, volume)| Some((index, volume, folder.strip_prefix(&volume.folder).ok()?)));
    holding.min_by_key(|(_, _, below)| below.components().count())
}

fn volume_source(name: &str, volume: &Volume) -> Value {
    match (&volume.claim, &volume.host_path) {
        (Some(claim), _) => json!({ "name": name, "persistentVolumeClaim": { "claimName": claim } }),
        (None, path) => {
            let path = path.as_ref().unwrap_or(&volume.folder);
            json!({ "name": name, "hostPath": { "path": path, "type": "Directory" } })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::channel::{AgentConfig, JobRun};

    fn config(security: &str) -> Config {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gateway.toml");
        let agent = folder.path().join("mlad");
        std::fs::write(&agent, "").unwrap();
        let text = format!(
            "data_directory = '/data'\nrun_directory = '/run/mlad'\ncatalog = '/c'\nagent_binary = '{}'\n\
             [container]\ngpu_binding = 'environment'\n\
             [kubernetes]\nagent_image = 'agent:1'\npod_security = '{security}'\nuser_namespaces = true\ngpu_runtime_class = 'nvidia'\n\
             image_pull_secrets = ['pull']\npriority_class = 'high'\nnode_selector = {{ pool = 'gpu' }}\n\
             tolerations = [{{ key = 'nvidia.com/gpu', operator = 'Exists', effect = 'NoSchedule' }}]\n\
             volumes = [{{ folder = '/data', claim = 'all' }}, {{ folder = '/data/home', host_path = '/nfs/home' }}]\n",
            agent.display()
        );
        std::fs::write(&path, text).unwrap();
        Config::read(&path).unwrap()
    }

    fn spec(gpu_uuids: &[&str]) -> WorkloadSpec {
        let mount =
            |source: &str, target: &str, read_only| Mount { source: source.into(), target: target.into(), read_only };
        WorkloadSpec {
            name: "w-1-1".into(),
            fence: 7,
            image: "base@sha256:12".into(),
            hostname: "My_Space".into(),
            agent: AgentConfig {
                workload: "w-1-1".into(),
                user: "alice".into(),
                uid: 20001,
                gid: 20001,
                home: "/home/alice".into(),
                environment: Default::default(),
                job: None,
                network: None,
            },
            mounts: vec![mount("/data/home/alice", "/home/alice", false), mount("/data/datasets", "/datasets", true)],
            gpu_uuids: gpu_uuids.iter().map(|uuid| (*uuid).to_owned()).collect(),
            node: (!gpu_uuids.is_empty()).then(|| "dgx-1".to_owned()),
            memory_mib: 1024,
            cpu_milli: 300,
        }
    }

    fn described(security: &str, spec: &WorkloadSpec) -> Value {
        let config = config(security);
        value(&config, config.kubernetes.as_ref().unwrap(), spec).unwrap()
    }

    /// What is left of a value without what says nothing.
    fn said(value: Value) -> Value {
        match value {
            Value::Object(fields) => {
                let fields = fields.into_iter().map(|(key, value)| (key, said(value)));
                let empty =
                    |value: &Value| matches!(value, Value::Array(list) if list.is_empty()) || *value == json!({});
                Value::Object(fields.filter(|(_, value)| !empty(value)).collect())
            }
            Value::Array(list) => Value::Array(list.into_iter().map(said).collect()),
            other => other,
        }
    }

    #[test]
    fn every_word_is_one_of_the_clusters() {
        for security in ["restricted", "baseline"] {
            let words = described(security, &spec(&["MIG-1"]));
            let pod: Pod = serde_json::from_value(words.clone()).unwrap();
            assert_eq!(said(serde_json::to_value(pod).unwrap()), said(words), "an unknown key would be lost");
        }
    }

    #[test]
    fn under_the_restricted_standard_nothing_is_root() {
        let pod = described("restricted", &spec(&[]));
        assert_eq!(
            (&pod["spec"]["hostUsers"], &pod["spec"]["securityContext"]["runAsNonRoot"]),
            (&json!(false), &json!(true))
        );
        assert_eq!(pod["spec"]["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let containers = [&pod["spec"]["containers"], &pod["spec"]["initContainers"]];
        let containers: Vec<&Value> = containers.into_iter().flat_map(|list| list.as_array().unwrap()).collect();
        assert_eq!(containers.len(), 3);
        for container in containers {
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["capabilities"], json!({ "drop": ["ALL"], "add": [] }));
        }
        let root = described("baseline", &spec(&[]));
        assert_eq!(root["spec"]["securityContext"]["runAsUser"], 0);
        assert_eq!(root["spec"]["initContainers"].as_array().unwrap().len(), 1, "it writes the accounts itself");
    }

    #[test]
    fn a_folder_is_a_path_in_the_innermost_volume() {
        let pod = described("baseline", &spec(&[]));
        let mounts = pod["spec"]["containers"][0]["volumeMounts"].as_array().unwrap();
        let at = |path: &str| mounts.iter().find(|mount| mount["mountPath"] == path).unwrap();
        assert_eq!((&at("/home/alice")["name"], &at("/home/alice")["subPath"]), (&json!("folder-1"), &json!("alice")));
        assert_eq!((&at("/datasets")["name"], &at("/datasets")["subPath"]), (&json!("folder-0"), &json!("datasets")));
        assert_eq!(at("/datasets")["readOnly"], true);
        let volumes = pod["spec"]["volumes"].as_array().unwrap();
        let source = |name: &str| volumes.iter().find(|volume| volume["name"] == name).unwrap();
        assert_eq!(source("folder-0")["persistentVolumeClaim"]["claimName"], "all");
        assert_eq!(source("folder-1")["hostPath"]["path"], "/nfs/home");
        let elsewhere = WorkloadSpec {
            mounts: vec![Mount { source: "/etc".into(), target: "/x".into(), read_only: true }],
            ..spec(&[])
        };
        let config = config("baseline");
        assert!(matches!(pod_of(&config, &elsewhere), Err(PodError::NoVolume(_))));
    }

    fn pod_of(config: &Config, spec: &WorkloadSpec) -> Result<Pod, PodError> {
        super::pod(config, config.kubernetes.as_ref().unwrap(), spec)
    }

    #[test]
    fn a_slice_decides_the_node_and_no_slice_sees_none() {
        let with = described("restricted", &spec(&["MIG-1"]));
        assert_eq!(with["spec"]["nodeSelector"], json!({ "pool": "gpu", "kubernetes.io/hostname": "dgx-1" }));
        assert_eq!(with["spec"]["runtimeClassName"], "nvidia");
        let without = described("restricted", &spec(&[]));
        assert_eq!(without["spec"]["nodeSelector"], json!({ "pool": "gpu" }));
        assert_eq!(without["spec"].get("runtimeClassName"), None);
        let environment = without["spec"]["containers"][0]["env"].as_array().unwrap();
        assert!(environment.contains(&json!({ "name": "NVIDIA_VISIBLE_DEVICES", "value": "void" })));
        assert_eq!(with["spec"]["containers"][0]["resources"]["requests"]["cpu"], "300m", "no more than it may use");
    }

    #[test]
    fn a_job_has_its_grace() {
        let mut spec = spec(&[]);
        spec.agent.job = Some(JobRun {
            command: vec!["true".into()],
            working_directory: "/".into(),
            log: "/l".into(),
            artifacts: "/a".into(),
            grace_seconds: 30,
        });
        let grace =
            |spec: &WorkloadSpec| described("restricted", spec)["spec"]["terminationGracePeriodSeconds"].clone();
        assert_eq!(grace(&spec), 35);
        spec.agent.job.as_mut().unwrap().grace_seconds = 86_400;
        assert_eq!(grace(&spec), 300, "a node has to be emptied some time");
    }
}
