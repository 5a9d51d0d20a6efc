//! The life of one pod: made, reached, ended, removed.

use super::{
    super::{FoundState, RuntimeError, StartProgress, WorkloadSpec, check_name, workload::agent_config},
    ApiError, Kubernetes, answered, pod,
    standing::{self, Standing},
};
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::{
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::{WatchStreamExt as _, watcher},
};
use mlad::channel::{Connection, Frame, Line, Open, relay};
use serde_json::json;
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    net::{TcpStream, UnixStream},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_rustls::rustls::pki_types::ServerName;

/// Who writes our fields of an object.
const MANAGER: &str = "mlad-gateway";
/// For an agent to answer.
const CONNECT: Duration = Duration::from_secs(10);
/// Pauses between tries to reach an agent that has just been started.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// From the end of a pod's grace until its node has confirmed that it is gone.
const REMOVAL: Duration = Duration::from_secs(90);

/// How waiting for an agent came out.
#[derive(Debug)]
enum Reached {
    Listens,
    /// The container ended before.
    Ended,
}

impl Kubernetes {
    /// The pod of a workload.
    pub(super) async fn pod(&self, workload: &str) -> Result<Option<Pod>, RuntimeError> {
        check_name(workload)?;
        Ok(answered(self.pods.get_opt(&self.name(workload))).await?)
    }

    fn name(&self, workload: &str) -> String {
        pod::name(&self.config.instance, workload)
    }

    /// News of one pod, without end.
    fn watch(&self, name: &str) -> impl Stream<Item = watcher::Result<watcher::Event<Pod>>> + use<> {
        let settings = watcher::Config::default().fields(&format!("metadata.name={name}"));
        watcher(self.pods.clone(), settings).default_backoff()
    }

    fn addresses(&self) -> MutexGuard<'_, HashMap<String, SocketAddr>> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn start_workload(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        let _turn = self.turns.take(&spec.name).await;
        let job = spec.agent.job.is_some();
        let mut there = false;
        if let Some(pod) = self.pod(&spec.name).await? {
            match standing::found(&pod, &self.config.instance) {
                None => return Err(foreign(&spec.name)),
                Some(found) if found.fence > spec.fence => {
                    let reason = format!("a pod of a later lease (fence {}) has its name", found.fence);
                    return Err(RuntimeError::Start { name: spec.name.clone(), reason });
                }
                Some(found) if job && matches!(found.state, FoundState::Ended(_)) => return Ok(()),
                Some(found) if found.fence == spec.fence && !matches!(found.state, FoundState::Ended(_)) => {
                    there = true
                }
                Some(_) => self.remove_workload(&spec.name, Duration::ZERO).await?,
            }
        }
        let made = if there { Ok(()) } else { self.make(spec, progress).await };
        let reached = match made {
            Ok(()) => self.reach(spec, progress).await,
            Err(error) => Err(error),
        };
        match reached {
            Ok(Reached::Listens) => Ok(()),
            Ok(Reached::Ended) if job => Ok(()),
            Ok(Reached::Ended) => {
                let reason = "its container ended before its agent answered".to_owned();
                self.undo(spec, RuntimeError::Start { name: spec.name.clone(), reason }).await
            }
            Err(error @ RuntimeError::Unavailable(_)) => Err(error),
            Err(error) => self.undo(spec, error).await,
        }
    }

    /// Nothing is left running after an error that says so.
    async fn undo(&self, spec: &WorkloadSpec, error: RuntimeError) -> Result<(), RuntimeError> {
        self.remove_workload(&spec.name, Duration::ZERO).await?;
        Err(error)
    }

    /// Makes secret and pod.
    async fn make(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        let refused = |reason: String| RuntimeError::Start { name: spec.name.clone(), reason };
        progress(StartProgress::Creating);
        let secret = self.secret(spec).map_err(|error| refused(error.to_string()))?;
        let wanted = pod::pod(&self.config, &self.settings, spec).map_err(|error| refused(error.to_string()))?;
        let name = self.name(&spec.name);
        let wrong = |error: ApiError| {
            // A quota, a policy, a class that is not there, more than it keeps: the cluster's words say which.
            if error.is_final() { refused(format!("the cluster refuses its pod: {error}")) } else { error.into() }
        };
        let ours = PatchParams::apply(MANAGER).force();
        answered(self.secrets.patch(&name, &ours, &Patch::Apply(&secret))).await.map_err(wrong)?;
        let made = match answered(self.pods.create(&PostParams::default(), &wanted)).await {
            Ok(made) => made,
            Err(error) if error.is_conflict() => return Ok(()),
            Err(error) => return Err(wrong(error)),
        };
        self.tie(&name, &made).await;
        Ok(())
    }

    fn secret(&self, spec: &WorkloadSpec) -> Result<Secret, Box<dyn std::error::Error + Send + Sync>> {
        let mut spec = WorkloadSpec { agent: agent_config(spec, self.config.container.gpu_binding), ..spec.clone() };
        let listen = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), self.settings.agent_port);
        spec.agent.network = Some(self.authority.network(&spec.name, listen)?);
        Ok(pod::secret(&self.config, &spec)?)
    }

    /// The secret goes with its pod, whoever deletes that.
    async fn tie(&self, name: &str, made: &Pod) {
        let Some(uid) = &made.metadata.uid else { return };
        let owner = json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid });
        let patch = json!({ "metadata": { "ownerReferences": [owner] } });
        let tied = answered(self.secrets.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await;
        if let Err(error) = tied {
            // It is deleted with the workload; only a pod that somebody else deletes would leave it behind.
            tracing::warn!(%error, secret = name, "a secret could not be tied to its pod");
        }
    }

    /// Waits until the agent answers.
    async fn reach(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<Reached, RuntimeError> {
        let name = self.name(&spec.name);
        let mut events = std::pin::pin!(self.watch(&name));
        let mut deadline = Instant::now() + Duration::from_secs(self.settings.schedule_seconds);
        let mut standing = Standing::Unscheduled(None);
        let mut address = None;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = self.answers(&spec.name, address), if address.is_some() => return Ok(Reached::Listens),
                () = sleep_until(deadline) => return Err(self.too_slow(spec, &standing).await),
            };
            let pod = match event {
                Some(Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod))) => pod,
                Some(Ok(watcher::Event::Delete(_))) | None => {
                    let reason = "its pod was deleted while it started".to_owned();
                    return Err(RuntimeError::Start { name: spec.name.clone(), reason });
                }
                Some(Ok(_)) => continue,
                Some(Err(error)) => {
                    tracing::debug!(%error, pod = name, "the watch on a pod broke; it is made anew");
                    continue;
                }
            };
            let now = Standing::of(&pod, &spec.name);
            if matches!((&standing, &now), (Standing::Unscheduled(_), Standing::Making | Standing::Running(_))) {
                deadline = Instant::now() + Duration::from_secs(self.settings.start_seconds);
            }
            match &now {
                Standing::Unscheduled(_) | Standing::Making => {}
                Standing::Running(ip) => {
                    if address.is_none() {
                        progress(StartProgress::Connecting);
                    }
                    address = Some(SocketAddr::new(*ip, self.settings.agent_port));
                }
                Standing::Ended(_) | Standing::Ending => return Ok(Reached::Ended),
                Standing::Failed(error) => return Err(error.clone()),
            }
            standing = now;
        }
    }

    /// Returns when the agent has answered at an address, which is kept.
    async fn answers(&self, workload: &str, address: Option<SocketAddr>) {
        let Some(address) = address else { return std::future::pending().await };
        let (mut pause, longest) = PAUSES;
        while self.dial(workload, address).await.is_err() {
            sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
        self.addresses().insert(workload.to_owned(), address);
    }

    async fn too_slow(&self, spec: &WorkloadSpec, standing: &Standing) -> RuntimeError {
        let name = spec.name.clone();
        let said = self.warning(&spec.name).await.map(|warning| format!(" ({warning})")).unwrap_or_default();
        let reason = match standing {
            Standing::Unscheduled(why) => format!(
                "no node of the cluster had room for {} s: {}{said}",
                self.settings.schedule_seconds,
                why.as_deref().unwrap_or("the scheduler has not said why")
            ),
            Standing::Running(_) => return RuntimeError::Agent { name, reason: "it does not answer".to_owned() },
            _ => format!("its node has not made it in {} s{said}", self.settings.start_seconds),
        };
        RuntimeError::Start { name, reason }
    }

    /// The last warning that the cluster gave about a pod: a secret or volume that is not there, say.
    async fn warning(&self, workload: &str) -> Option<String> {
        let of_pod = format!("involvedObject.name={},type=Warning", self.name(workload));
        let events = answered(self.events.list(&ListParams::default().fields(&of_pod).limit(100))).await.ok()?;
        events.items.into_iter().next_back()?.message
    }

    pub(super) async fn remove_workload(&self, workload: &str, grace: Duration) -> Result<(), RuntimeError> {
        let name = self.name(workload);
        self.addresses().remove(workload);
        if let Some(pod) = self.pod(workload).await? {
            if standing::workload(&pod, &self.config.instance).is_none() {
                return Err(foreign(workload));
            }
            self.delete(&name, &pod, grace).await?;
        }
        match answered(self.secrets.delete(&name, &DeleteParams::default())).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Deletes a pod and waits until it is proven gone.
    async fn delete(&self, name: &str, pod: &Pod, grace: Duration) -> Result<(), RuntimeError> {
        // No seconds at all would delete the object at once, whether its containers have ended or not.
        let seconds = u32::try_from(grace.as_secs()).unwrap_or(u32::MAX).max(1);
        let only_it = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
        let how = DeleteParams {
            grace_period_seconds: Some(seconds),
            preconditions: Some(only_it),
            ..DeleteParams::default()
        };
        let mut events = std::pin::pin!(self.watch(name));
        match answered(self.pods.delete(name, &how)).await {
            Err(error) if error.is_not_found() || error.is_conflict() => return Ok(()),
            result => result.map(drop)?,
        }
        let deadline = Instant::now() + Duration::from_secs(u64::from(seconds)) + REMOVAL;
        let uid = pod.metadata.uid.as_ref();
        let mut there = false;
        loop {
            match timeout_at(deadline, events.next()).await {
                Ok(Some(Ok(watcher::Event::Delete(_)))) => return Ok(()),
                Ok(Some(Ok(watcher::Event::Init))) => there = false,
                Ok(Some(Ok(watcher::Event::InitApply(pod) | watcher::Event::Apply(pod)))) => {
                    there = pod.metadata.uid.as_ref() == uid;
                    if !there {
                        return Ok(());
                    }
                }
                Ok(Some(Ok(watcher::Event::InitDone))) if !there => return Ok(()),
                Ok(Some(Ok(watcher::Event::InitDone) | Err(_))) => {}
                Ok(None) | Err(_) => {
                    let node = standing::node(pod).unwrap_or("its node");
                    return Err(RuntimeError::Unavailable(format!(
                        "{node} has not confirmed the end of the pod {name}"
                    )));
                }
            }
        }
    }

    pub(super) async fn terminate_workload(&self, workload: &str) -> Result<(), RuntimeError> {
        let telling = async {
            let mut connection = Connection::new(self.connect_workload(workload).await?, false);
            let told = connection.writer.write(&Frame::Open(Open::Terminate)).await;
            if told.is_ok() {
                // The answer says that it was heard; an agent that gives none is ended by force in time.
                _ = connection.reader.read().await;
            }
            Ok(())
        };
        match timeout(CONNECT, telling).await {
            Ok(Err(RuntimeError::Gone(_))) | Err(_) => Ok(()),
            Ok(result) => result,
        }
    }

    pub(super) async fn connect_workload(&self, workload: &str) -> Result<UnixStream, RuntimeError> {
        let known = self.addresses().get(workload).copied();
        if let Some(address) = known
            && let Ok(stream) = self.dial(workload, address).await
        {
            return Ok(stream);
        }
        let pod = self.pod(workload).await?;
        let standing = pod.map(|pod| Standing::of(&pod, workload));
        let Some(Standing::Running(ip)) = standing else { return Err(RuntimeError::Gone(workload.to_owned())) };
        let address = SocketAddr::new(ip, self.settings.agent_port);
        let stream = self.dial(workload, address).await;
        let stream =
            stream.map_err(|error| RuntimeError::Agent { name: workload.to_owned(), reason: error.to_string() })?;
        self.addresses().insert(workload.to_owned(), address);
        Ok(stream)
    }

    /// One connection to an agent, as a local socket.
    async fn dial(&self, workload: &str, address: SocketAddr) -> io::Result<UnixStream> {
        let name = ServerName::try_from(workload.to_owned()).map_err(io::Error::other)?;
        let connecting = async {
            let stream = TcpStream::connect(address).await?;
            let line = Line::of(&stream)?;
            Ok::<_, io::Error>((self.authority.connector().connect(name, stream).await?, line))
        };
        let (far, line) =
            timeout(CONNECT, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let (ours, theirs) = UnixStream::pair()?;
        let workload = workload.to_owned();
        // Ends with either side: the local one is in the hands of whoever asked.
        tokio::spawn(async move {
            if let Err(error) = relay(theirs, far, line).await {
                tracing::debug!(%error, workload, "a connection to an agent broke");
            }
        });
        Ok(ours)
    }
}

fn foreign(workload: &str) -> RuntimeError {
    RuntimeError::Start { name: workload.to_owned(), reason: "a pod that is not ours has its name".to_owned() }
}
