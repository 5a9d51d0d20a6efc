//! What a pod's status says, in our words. Pure.

use super::{
    super::{
        Ended, Found, FoundState, RuntimeError,
        workload::{LABEL_FENCE, LABEL_INSTANCE, LABEL_WORKLOAD},
    },
    pod::CONTAINER,
};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use mlad::channel::JobResult;
use std::net::IpAddr;

/// Reasons after which an image will not come by itself.
const NO_IMAGE: [&str; 4] = ["ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError"];
/// Reasons after which a container will not start by itself.
const NO_START: [&str; 4] =
    ["CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"];
/// Exit code of a container that its node ended without telling how.
const KILLED: i64 = 137;

/// How far a pod has come.
#[derive(Debug, Clone)]
pub(super) enum Standing {
    /// No node has it: the scheduler's words, if it has any.
    Unscheduled(Option<String>),
    /// A node makes it.
    Making,
    /// It runs, at this address.
    Running(IpAddr),
    /// It runs, and is told to end.
    Ending,
    /// It had its run.
    Ended(Ended),
    /// It will not come to run.
    Failed(RuntimeError),
}

impl Standing {
    pub(super) fn of(pod: &Pod, workload: &str) -> Self {
        if let Some(ended) = ended(pod) {
            return Self::Ended(ended);
        }
        if pod.metadata.deletion_timestamp.is_some() {
            return Self::Ending;
        }
        if let Some(error) = failed(pod, workload) {
            return Self::Failed(error);
        }
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.as_ref()?.parse().ok());
        let runs = container(pod).and_then(|container| container.state.as_ref()?.running.as_ref()).is_some();
        match address.filter(|_| runs) {
            Some(address) => Self::Running(address),
            None if node(pod).is_some() => Self::Making,
            None => Self::Unscheduled(unschedulable(pod)),
        }
    }
}

/// The workload of a pod, as the runtime's callers know it; none if it is not of this instance.
pub(super) fn found(pod: &Pod, instance: &str) -> Option<Found> {
    let name = workload(pod, instance)?;
    let fence = pod.metadata.labels.as_ref()?.get(LABEL_FENCE)?.parse().ok()?;
    let state = match Standing::of(pod, &name) {
        Standing::Ended(ended) => FoundState::Ended(ended),
        Standing::Running(_) | Standing::Ending => FoundState::Running,
        Standing::Unscheduled(_) | Standing::Making | Standing::Failed(_) => FoundState::Created,
    };
    Some(Found { name, fence, state })
}

/// The name of a pod's workload; none if it is not of this instance.
pub(super) fn workload(pod: &Pod, instance: &str) -> Option<String> {
    let labels = pod.metadata.labels.as_ref()?;
    let name =
        labels.get(LABEL_WORKLOAD).filter(|_| labels.get(LABEL_INSTANCE).is_some_and(|label| label == instance))?;
    (pod.metadata.name.as_deref() == Some(&super::pod::name(instance, name))).then(|| name.clone())
}

/// What an agent said of its job, through the kubelet.
pub(super) fn result(pod: &Pod) -> Option<JobResult> {
    let state = container(pod)?.state.as_ref()?;
    serde_json::from_str(state.terminated.as_ref()?.message.as_deref()?).ok()
}

/// The node that has it.
pub(super) fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|status| status.name == CONTAINER)
}

fn ended(pod: &Pod) -> Option<Ended> {
    if let Some(end) = container(pod).and_then(|container| container.state.as_ref()?.terminated.as_ref()) {
        let out_of_memory = end.reason.as_deref() == Some("OOMKilled");
        return Some(Ended { exit_code: i64::from(end.exit_code), out_of_memory, taken_away: taken_away(pod) });
    }
    // Evicted, or its node went: there may be no word of its container.
    let phase = pod.status.as_ref()?.phase.as_deref()?;
    let over = matches!(phase, "Failed" | "Succeeded") && init_failure(pod).is_none();
    let exit_code = if phase == "Failed" { KILLED } else { 0 };
    over.then(|| Ended { exit_code, out_of_memory: false, taken_away: taken_away(pod) })
}

/// Why a pod was ended that did not end by itself: the cluster's words; or that it was deleted, as when a node is
/// emptied. (What a gateway deletes, it does not look at any more.)
fn taken_away(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let deleted = pod.metadata.deletion_timestamp.is_some();
    let Some(reason) = &status.reason else { return deleted.then(|| "its pod was deleted".to_owned()) };
    Some(match &status.message {
        Some(message) => format!("{reason}: {}", message.trim_end_matches([' ', '.'])),
        None => reason.clone(),
    })
}

fn failed(pod: &Pod, workload: &str) -> Option<RuntimeError> {
    let start = |reason: String| RuntimeError::Start { name: workload.to_owned(), reason };
    if let Some((name, message)) = init_failure(pod) {
        return Some(start(format!("its preparation ({name}) failed: {message}")));
    }
    let status = pod.status.as_ref()?;
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    containers
        .filter_map(|container| {
            let waiting = container.state.as_ref()?.waiting.as_ref()?;
            let (reason, message) = (waiting.reason.as_deref()?, waiting.message.clone().unwrap_or_default());
            if NO_IMAGE.contains(&reason) {
                let reason = format!("{reason}: {message}");
                return Some(RuntimeError::Image { image: container.image.clone(), reason });
            }
            NO_START.contains(&reason).then(|| start(format!("{reason}: {message}")))
        })
        .next()
}

/// The init container that failed, and what is known of why.
fn init_failure(pod: &Pod) -> Option<(&str, String)> {
    let containers = pod.status.as_ref()?.init_container_statuses.as_ref()?;
    containers.iter().find_map(|container| {
        let end = failure(container.state.as_ref()?)?;
        Some((container.name.as_str(), end))
    })
}

fn failure(state: &ContainerState) -> Option<String> {
    let end = state.terminated.as_ref().filter(|end| end.exit_code != 0)?;
    let reason = end.reason.as_deref().unwrap_or("Error");
    Some(format!(
        "{reason}, exit code {}{}",
        end.exit_code,
        end.message.iter().map(|text| format!(": {text}")).collect::<String>()
    ))
}

fn unschedulable(pod: &Pod) -> Option<String> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let scheduled =
        conditions.iter().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")?;
    scheduled.message.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(spec: Value, status: Value) -> Pod {
        let labels = json!({ LABEL_INSTANCE: "mlad", LABEL_WORKLOAD: "j-4-1", LABEL_FENCE: "12" });
        serde_json::from_value(json!({
            "metadata": { "name": "mlad-j-4-1", "labels": labels }, "spec": spec, "status": status
        }))
        .unwrap()
    }

    fn with_state(state: Value) -> Pod {
        let container = json!({ "name": CONTAINER, "state": state, "image": "i", "imageID": "", "ready": false, "restartCount": 0 });
        pod(
            json!({ "nodeName": "n", "containers": [] }),
            json!({ "podIP": "10.1.2.3", "containerStatuses": [container] }),
        )
    }

    #[test]
    fn the_life_of_a_pod() {
        let waiting = pod(
            json!({ "containers": [] }),
            json!({ "phase": "Pending", "conditions": [
            { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available" }] }),
        );
        assert!(matches!(Standing::of(&waiting, "j-4-1"), Standing::Unscheduled(Some(why)) if why.contains("0/3")));
        let making = with_state(json!({ "waiting": { "reason": "ContainerCreating" } }));
        assert!(matches!(Standing::of(&making, "j-4-1"), Standing::Making));
        let mut running = with_state(json!({ "running": {} }));
        assert!(matches!(Standing::of(&running, "j-4-1"), Standing::Running(_)));
        assert_eq!(
            found(&running, "mlad").unwrap(),
            Found { name: "j-4-1".into(), fence: 12, state: FoundState::Running }
        );
        assert_eq!(found(&running, "other"), None);
        running.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert!(matches!(Standing::of(&running, "j-4-1"), Standing::Ending));
    }

    #[test]
    fn an_end_says_how() {
        let end = |terminated: Value| match Standing::of(&with_state(json!({ "terminated": terminated })), "j-4-1") {
            Standing::Ended(ended) => ended,
            other => panic!("{other:?}"),
        };
        assert_eq!(end(json!({ "exitCode": 3 })), Ended { exit_code: 3, out_of_memory: false, taken_away: None });
        assert_eq!(
            end(json!({ "exitCode": 137, "reason": "OOMKilled" })),
            Ended { exit_code: 137, out_of_memory: true, taken_away: None }
        );
        let mut deleted = with_state(json!({ "terminated": { "exitCode": 143 } }));
        deleted.metadata.deletion_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert!(matches!(Standing::of(&deleted, "j-4-1"), Standing::Ended(Ended { taken_away: Some(_), .. })));
        let said = with_state(json!({ "terminated": { "exitCode": 4, "message": "{\"status\":4}" } }));
        assert_eq!(result(&said).unwrap().exit, mlad::channel::Exit::Status(4));
        let evicted =
            pod(json!({ "nodeName": "n", "containers": [] }), json!({ "phase": "Failed", "reason": "Evicted" }));
        assert!(matches!(Standing::of(&evicted, "j-4-1"), Standing::Ended(Ended { exit_code: KILLED, .. })));
        assert_eq!(result(&evicted), None);
        assert!(
            matches!(Standing::of(&evicted, "j-4-1"), Standing::Ended(Ended { taken_away: Some(why), .. }) if why == "Evicted")
        );
    }

    #[test]
    fn what_will_never_start_says_why() {
        let image = with_state(json!({ "waiting": { "reason": "ImagePullBackOff", "message": "no such image" } }));
        assert!(
            matches!(Standing::of(&image, "j-4-1"), Standing::Failed(RuntimeError::Image { reason, .. }) if reason.contains("no such image"))
        );
        let secret = with_state(
            json!({ "waiting": { "reason": "CreateContainerConfigError", "message": "secret \"x\" not found" } }),
        );
        assert!(
            matches!(Standing::of(&secret, "j-4-1"), Standing::Failed(RuntimeError::Start { reason, .. }) if reason.contains("secret"))
        );
        let init = json!({ "name": "accounts", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": { "terminated": { "exitCode": 1, "reason": "Error" } } });
        let init = pod(
            json!({ "nodeName": "n", "containers": [] }),
            json!({ "phase": "Failed", "initContainerStatuses": [init] }),
        );
        assert!(
            matches!(Standing::of(&init, "j-4-1"), Standing::Failed(RuntimeError::Start { reason, .. }) if reason.contains("accounts"))
        );
    }
}
