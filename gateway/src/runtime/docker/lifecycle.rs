//! The life of one container: made, started, reached, ended, removed.

use super::{
    super::{
        Ended, Found, FoundState, RuntimeError, StartProgress, WorkloadSpec, check_name,
        workload::{LABEL_FENCE, LABEL_INSTANCE, LABEL_WORKLOAD, agent_config},
    },
    Docker,
    agent::Arrival,
    container::{self, Place},
    engine::{CHANGE, EngineError, QUESTION},
    network,
    run_folder::RunFolder,
};
use crate::config::GpuBinding;
use bollard::{
    errors::Error,
    models::{ContainerInspectResponse, ContainerState, ContainerStateStatusEnum as Status},
    query_parameters::{
        CreateContainerOptionsBuilder, InspectContainerOptions, KillContainerOptionsBuilder, LogsOptionsBuilder,
        RemoveContainerOptionsBuilder, StartContainerOptions, StopContainerOptionsBuilder, WaitContainerOptionsBuilder,
    },
};
use futures::StreamExt as _;
use std::{collections::HashMap, io, sync::Arc, time::Duration};

/// Longest wait for an agent from the start of its container.
const ARRIVAL: Duration = Duration::from_secs(120);
/// Longest wait for a removal that somebody else began.
const REMOVAL: Duration = Duration::from_secs(60);
/// How much of a dead container's output an error quotes: lines, and characters.
const LAST_WORDS: (&str, usize) = ("20", 1024);

/// What stands at a name.
#[derive(Debug)]
enum Standing {
    Nothing,
    /// A container that does not bear our labels.
    Foreign,
    Ours(Found),
}

/// What a start has to do.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Make,
    /// Remove what is there, then make.
    Replace,
    /// It was made and never started.
    Start,
    /// It runs.
    Reach,
    /// It is a job that had its run.
    Nothing,
    Refuse(String),
}

/// What came of waiting for an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reached {
    Listens,
    /// A job whose container ended after its agent was there: it is not started again.
    HadItsRun,
    /// Its container ended before.
    Died,
}

impl Step {
    fn of(standing: &Standing, spec: &WorkloadSpec) -> Self {
        let found = match standing {
            Standing::Nothing => return Self::Make,
            Standing::Foreign => return Self::Refuse("a container that is not ours has its name".to_owned()),
            Standing::Ours(found) => found,
        };
        let is_job = spec.agent.job.is_some();
        if found.fence > spec.fence {
            return Self::Refuse(format!("its name belongs to a newer lease (fence {})", found.fence));
        }
        match &found.state {
            FoundState::Created if found.fence == spec.fence => Self::Start,
            FoundState::Created => Self::Replace,
            FoundState::Ended(_) if is_job => Self::Nothing,
            FoundState::Ended(_) => Self::Replace,
            FoundState::Running if found.fence == spec.fence => Self::Reach,
            FoundState::Running if is_job => {
                Self::Refuse(format!("this job's attempt runs under an older lease (fence {})", found.fence))
            }
            FoundState::Running => Self::Replace,
        }
    }
}

impl Docker {
    pub(super) async fn start_workload(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        check_name(&spec.name)?;
        let _turn = self.turns.take(&spec.name).await;
        // What a start that was given up has asked of the engine comes to its end first.
        drop(self.changes.take(&spec.name).await);
        progress(StartProgress::Creating);
        let step = Step::of(&self.standing(&spec.name).await?, spec);
        if let Step::Refuse(reason) = step {
            return Err(RuntimeError::Start { name: spec.name.clone(), reason });
        }
        let result = self.take(step, spec, progress).await;
        match result {
            Ok(()) | Err(RuntimeError::Unavailable(_)) => result,
            Err(error) => {
                self.remove_workload(&spec.name, Duration::ZERO).await?;
                Err(error)
            }
        }
    }

    async fn take(
        &self,
        step: Step,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        match step {
            Step::Nothing | Step::Refuse(_) => return Ok(()),
            Step::Reach => {
                let folder = self.folders.find(&spec.name).map_err(|error| no_agent(&spec.name, &error))?;
                let arrival = Arrival::watch(&folder).map_err(|error| no_agent(&spec.name, &error))?;
                progress(StartProgress::Connecting);
                match self.reach(spec, &folder, &arrival).await? {
                    Reached::Listens | Reached::HadItsRun => return Ok(()),
                    // It was on its way out when it was found: as good as ended.
                    Reached::Died => self.remove_workload(&spec.name, Duration::ZERO).await?,
                }
            }
            Step::Replace => self.remove_workload(&spec.name, Duration::ZERO).await?,
            Step::Make | Step::Start => {}
        }
        let servers = network::name_servers(&self.config);
        tokio::try_join!(self.firewall.apply(&servers), self.network.ensure(&self.engine))?;
        self.firewall.check_bridge().await?;
        self.ensure_devices(spec).await?;
        let folder = self.make_folder(spec).await?;
        if step != Step::Start {
            self.create(spec, &folder, &servers).await?;
        }
        let arrival = Arrival::watch(&folder).map_err(|error| no_agent(&spec.name, &error))?;
        self.run(&spec.name).await?;
        progress(StartProgress::Connecting);
        match self.reach(spec, &folder, &arrival).await? {
            Reached::Listens | Reached::HadItsRun => Ok(()),
            Reached::Died => {
                Err(RuntimeError::Start { name: spec.name.clone(), reason: self.post_mortem(&spec.name).await })
            }
        }
    }

    async fn make_folder(&self, spec: &WorkloadSpec) -> Result<RunFolder, RuntimeError> {
        let (folders, name) = (self.folders.clone(), spec.name.clone());
        let config = agent_config(spec, self.config.container.gpu_binding);
        blocking(move || folders.make(&name, &config)).await.map_err(|error| RuntimeError::Start {
            name: spec.name.clone(),
            reason: format!("its run folder cannot be made: {error}"),
        })
    }

    /// Makes sure that the engine can give the container its slices.
    async fn ensure_devices(&self, spec: &WorkloadSpec) -> Result<(), RuntimeError> {
        if spec.gpu_uuids.is_empty() || self.config.container.gpu_binding != GpuBinding::Cdi {
            return Ok(());
        }
        if !self.engine.knows_cdi().await? {
            return Err(RuntimeError::Host(
                "container.gpu_binding is \"cdi\", and this engine's API is older than 1.44 (Docker 25), the first \
                 that knows CDI devices: update it, or set \"device-request\""
                    .to_owned(),
            ));
        }
        self.cdi.ensure(&spec.gpu_uuids).await
    }

    async fn create(
        &self,
        spec: &WorkloadSpec,
        folder: &RunFolder,
        servers: &[std::net::IpAddr],
    ) -> Result<(), RuntimeError> {
        let place = Place {
            instance: &self.config.instance,
            settings: &self.config.container,
            agent_binary: &self.config.agent_binary,
            run_folder: folder.path(),
            network: self.network.name(),
            dns: servers,
        };
        let body = container::body(spec, &place);
        let options = CreateContainerOptionsBuilder::default().name(&self.container_name(&spec.name)).build();
        let create = |client: bollard::Docker| async move { client.create_container(Some(options), body).await };
        match self.change(&spec.name, create).await {
            Ok(_) => Ok(()),
            Err(EngineError::Refused { status: 404, message }) => {
                Err(RuntimeError::Image { image: spec.image.clone(), reason: message })
            }
            Err(error) => Err(error.in_start(&spec.name)),
        }
    }

    async fn run(&self, name: &str) -> Result<(), RuntimeError> {
        let container = self.container_name(name);
        let start = |client: bollard::Docker| async move {
            client.start_container(&container, None::<StartContainerOptions>).await
        };
        self.change(name, start).await.map_err(|error| error.in_start(name))
    }

    /// Makes a request whose effect does not go away with whoever made it: it is seen through to its end (or
    /// its deadline) also if nobody waits any more, and [`Self::remove_workload`] waits for it. Else a
    /// container could appear after it was proven gone.
    async fn change<T, F>(
        &self,
        name: &str,
        request: impl FnOnce(bollard::Docker) -> F + Send + 'static,
    ) -> Result<T, EngineError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let turn = self.changes.take(name).await;
        let engine = Arc::clone(&self.engine);
        let request = tokio::spawn(async move {
            let _turn = turn;
            engine.call(CHANGE, request).await
        });
        request.await.unwrap_or_else(|error| Err(EngineError::Unavailable(error.to_string())))
    }

    /// Returns when the agent listens, or its container ended before.
    async fn reach(&self, spec: &WorkloadSpec, folder: &RunFolder, arrival: &Arrival) -> Result<Reached, RuntimeError> {
        let name = &spec.name;
        tokio::select! {
            result = arrival.listens(folder) => {
                result.map(|()| Reached::Listens).map_err(|error| no_agent(name, &error))
            }
            result = self.ended(name) => {
                result?;
                let had_its_run = spec.agent.job.is_some() && folder.was_used();
                Ok(if had_its_run { Reached::HadItsRun } else { Reached::Died })
            }
            () = tokio::time::sleep(ARRIVAL) => Err(RuntimeError::Agent {
                name: name.clone(),
                reason: format!("it did not listen within {} s", ARRIVAL.as_secs()),
            }),
        }
    }

    /// Returns when the container does not run any more, or is not there.
    async fn ended(&self, name: &str) -> Result<(), RuntimeError> {
        self.wait(name, "not-running").await
    }

    async fn wait(&self, name: &str, condition: &str) -> Result<(), RuntimeError> {
        let options = WaitContainerOptionsBuilder::default().condition(condition).build();
        let mut news = self.engine.client().await?.wait_container(&self.container_name(name), Some(options));
        match news.next().await {
            Some(Ok(_) | Err(Error::DockerContainerWaitError { .. })) => Ok(()),
            Some(Err(error)) => match self.engine.failed(error) {
                error if error.is_absent() => Ok(()),
                error => Err(error.into()),
            },
            None => Err(RuntimeError::Unavailable("the engine broke off a wait".to_owned())),
        }
    }

    /// Why a container ended at once, for a person.
    async fn post_mortem(&self, name: &str) -> String {
        let how = match self.look(name).await {
            Ok(Some(Found { state: FoundState::Ended(Ended { out_of_memory: true, .. }), .. })) => {
                "its agent ended because the memory was used up".to_owned()
            }
            Ok(Some(Found { state: FoundState::Ended(Ended { exit_code, .. }), .. })) => {
                format!("its agent ended at once with exit code {exit_code}")
            }
            _ => "it ended at once".to_owned(),
        };
        let words = self.last_words(name).await;
        if words.is_empty() { how } else { format!("{how}: {words}") }
    }

    async fn last_words(&self, name: &str) -> String {
        let container = self.container_name(name);
        let options = LogsOptionsBuilder::default().stdout(true).stderr(true).tail(LAST_WORDS.0).build();
        let read = |client: bollard::Docker| async move {
            let mut words = Vec::new();
            let mut logs = client.logs(&container, Some(options));
            while let Some(Ok(line)) = logs.next().await {
                words.extend_from_slice(&line.into_bytes());
            }
            let start = words.len().saturating_sub(LAST_WORDS.1);
            Ok(words.split_off(start))
        };
        let words = self.engine.call(QUESTION, read).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&words).replace('\n', " | ");
        text.chars().filter(|letter| !letter.is_control()).collect::<String>().trim_matches([' ', '|']).to_owned()
    }

    pub(super) async fn remove_workload(&self, name: &str, grace: Duration) -> Result<(), RuntimeError> {
        check_name(name)?;
        let _turn = self.changes.take(name).await;
        if let Standing::Ours(found) = self.standing(name).await? {
            if found.state == FoundState::Running {
                self.stop(name, grace).await?;
            }
            self.retire_folder(name);
            self.delete(name).await?;
        }
        let (folders, owned) = (self.folders.clone(), name.to_owned());
        if let Err(error) = blocking(move || folders.remove(&owned)).await {
            // The container is gone, and that is what was asked.
            tracing::warn!(workload = %name, %error, "the run folder cannot be deleted; it is tried again at the next start of the gateway");
        }
        Ok(())
    }

    fn retire_folder(&self, name: &str) {
        if let Err(error) = self.folders.retire(name) {
            tracing::warn!(workload = %name, %error, "the run folder cannot be taken away");
        }
    }

    async fn stop(&self, name: &str, grace: Duration) -> Result<(), RuntimeError> {
        let container = self.container_name(name);
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        let stop = |client: bollard::Docker| async move { client.stop_container(&container, Some(options)).await };
        let stop = async { self.engine.call(grace.saturating_add(CHANGE), stop).await };
        match stop.await {
            Ok(()) => Ok(()),
            // Removal by force, which follows, is the stronger word.
            Err(EngineError::Refused { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes the container whatever it does, and makes sure.
    async fn delete(&self, name: &str) -> Result<(), RuntimeError> {
        let container = self.container_name(name);
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let remove = |client: bollard::Docker| async move { client.remove_container(&container, Some(options)).await };
        let reason = match self.engine.call(CHANGE, remove).await {
            Ok(()) => None,
            Err(error) if error.is_absent() => return Ok(()),
            Err(error) if error.is_conflict() => {
                // Somebody removes it already.
                tokio::time::timeout(REMOVAL, self.wait(name, "removed")).await.ok().transpose()?;
                None
            }
            Err(EngineError::Refused { message, .. }) => Some(message),
            Err(error) => return Err(error.into()),
        };
        match self.standing(name).await? {
            Standing::Ours(_) => Err(RuntimeError::Unavailable(format!(
                "the container {name} cannot be removed: {}",
                reason.unwrap_or_else(|| "its removal does not end".to_owned())
            ))),
            Standing::Nothing | Standing::Foreign => Ok(()),
        }
    }

    pub(super) async fn terminate_workload(&self, name: &str) -> Result<(), RuntimeError> {
        if self.look(name).await?.is_none_or(|found| found.state != FoundState::Running) {
            return Ok(());
        }
        let container = self.container_name(name);
        let options = KillContainerOptionsBuilder::default().signal("SIGTERM").build();
        let kill = |client: bollard::Docker| async move { client.kill_container(&container, Some(options)).await };
        match self.engine.call(QUESTION, kill).await {
            Err(error) if !error.is_absent() && !error.is_conflict() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Our container of that name.
    pub(super) async fn look(&self, name: &str) -> Result<Option<Found>, RuntimeError> {
        check_name(name)?;
        Ok(match self.standing(name).await? {
            Standing::Ours(found) => Some(found),
            Standing::Nothing | Standing::Foreign => None,
        })
    }

    async fn standing(&self, name: &str) -> Result<Standing, RuntimeError> {
        let container = self.container_name(name);
        let question = |client: bollard::Docker| async move {
            client.inspect_container(&container, None::<InspectContainerOptions>).await
        };
        match self.engine.call(QUESTION, question).await {
            Ok(inspected) => Ok(self.found(name, &inspected).map_or(Standing::Foreign, Standing::Ours)),
            Err(error) if error.is_absent() => Ok(Standing::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    fn found(&self, name: &str, inspected: &ContainerInspectResponse) -> Option<Found> {
        let labels = inspected.config.as_ref()?.labels.as_ref()?;
        let fence = self.fence(name, labels)?;
        let state = state(inspected.state.as_ref()?);
        Some(Found { name: name.to_owned(), fence, state })
    }

    /// The fence on a container's labels, if they are ours. A label alone proves nothing: images have some.
    pub(super) fn fence(&self, name: &str, labels: &HashMap<String, String>) -> Option<u64> {
        let ours = labels.get(LABEL_INSTANCE) == Some(&self.config.instance)
            && labels.get(LABEL_WORKLOAD).is_some_and(|label| label == name);
        if ours { labels.get(LABEL_FENCE)?.parse().ok() } else { None }
    }

    pub(super) fn container_name(&self, workload: &str) -> String {
        format!("{}-{workload}", self.config.instance)
    }
}

fn state(state: &ContainerState) -> FoundState {
    match state.status {
        Some(Status::CREATED) => FoundState::Created,
        Some(Status::RUNNING | Status::PAUSED | Status::RESTARTING | Status::STOPPING) => FoundState::Running,
        _ => FoundState::Ended(Ended {
            exit_code: state.exit_code.unwrap_or(-1),
            out_of_memory: state.oom_killed.unwrap_or(false),
            taken_away: None,
        }),
    }
}

pub(super) fn no_agent(name: &str, error: &io::Error) -> RuntimeError {
    RuntimeError::Agent { name: name.to_owned(), reason: error.to_string() }
}

/// Runs file system work that may take long beside the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::channel::{AgentConfig, JobRun};

    fn spec(fence: u64, is_job: bool) -> WorkloadSpec {
        let job = JobRun {
            command: vec!["true".into()],
            working_directory: "/".into(),
            log: "/home/alice/log".into(),
            artifacts: "/home/alice/artifacts".into(),
            grace_seconds: 1,
        };
        WorkloadSpec {
            name: "j-1-1".into(),
            fence,
            image: "sha256:abc".into(),
            hostname: "job-1".into(),
            agent: AgentConfig {
                workload: "j-1-1".into(),
                user: "alice".into(),
                uid: 20000,
                gid: 20000,
                home: "/home/alice".into(),
                environment: Default::default(),
                job: is_job.then_some(job),
                network: None,
            },
            mounts: vec![],
            gpu_uuids: vec![],
            node: None,
            memory_mib: 64,
            cpu_milli: 100,
        }
    }

    fn ours(fence: u64, state: FoundState) -> Standing {
        Standing::Ours(Found { name: "j-1-1".into(), fence, state })
    }

    fn ended() -> FoundState {
        FoundState::Ended(Ended { exit_code: 1, out_of_memory: false, taken_away: None })
    }

    #[test]
    fn a_job_never_gets_a_second_run() {
        let job = spec(5, true);
        assert_eq!(Step::of(&Standing::Nothing, &job), Step::Make);
        assert_eq!(Step::of(&ours(5, FoundState::Created), &job), Step::Start);
        assert_eq!(Step::of(&ours(4, FoundState::Created), &job), Step::Replace);
        assert_eq!(Step::of(&ours(5, FoundState::Running), &job), Step::Reach);
        assert_eq!(Step::of(&ours(5, ended()), &job), Step::Nothing);
        assert_eq!(Step::of(&ours(4, ended()), &job), Step::Nothing);
        assert!(matches!(Step::of(&ours(4, FoundState::Running), &job), Step::Refuse(_)));
    }

    #[test]
    fn a_workspace_is_made_anew_but_a_newer_lease_is_never_disturbed() {
        let workspace = spec(5, false);
        assert_eq!(Step::of(&ours(5, FoundState::Running), &workspace), Step::Reach);
        assert_eq!(Step::of(&ours(4, FoundState::Running), &workspace), Step::Replace);
        assert_eq!(Step::of(&ours(5, ended()), &workspace), Step::Replace);
        for state in [FoundState::Created, FoundState::Running, ended()] {
            assert!(matches!(Step::of(&ours(6, state), &workspace), Step::Refuse(_)));
        }
        assert!(matches!(Step::of(&Standing::Foreign, &workspace), Step::Refuse(_)));
    }

    #[test]
    fn names_cannot_lead_elsewhere() {
        for good in ["w-1-1", "j-12-3"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "-x", "w/1", "w 1", "W-1", "1-w", "w\n", &"w".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
