//! What every runtime must do, said in its contract's words and nothing else's, with the real agent in the
//! container.
//!
//! A runtime passes by giving [`Ground`] to [`conforms`]; the tests below do so for Docker.

use crate::stage::{self, IMAGE, Stage, quiet};
use bytes::Bytes;
use futures::StreamExt as _;
use mlad::channel::{Connection, Exit, Frame, JobResult, JobRun, Open, Request};
use mlad_gateway::runtime::{
    Docker, Ended, FoundState, Mount, Runtime, RuntimeError, RuntimeEvent, StartProgress, WorkloadSpec,
};
use std::{os::unix::fs::chown, path::Path, sync::Mutex, time::Duration};

/// What a runtime is tried on.
pub(crate) struct Ground<'a> {
    pub(crate) runtime: &'a dyn Runtime,
    /// A workspace of alice (20000:20000) with a shell in its image and its home at `home`.
    pub(crate) spec: WorkloadSpec,
    /// Her home, seen from here.
    pub(crate) home: &'a Path,
    /// The reference of its image, and one that is nowhere.
    pub(crate) image: &'a str,
    pub(crate) no_image: &'a str,
    /// Whether the agent has more rights than its user.
    pub(crate) guarded: bool,
}

impl Ground<'_> {
    fn workspace(&self, name: &str) -> WorkloadSpec {
        let mut spec = WorkloadSpec { name: name.into(), ..self.spec.clone() };
        spec.agent.workload = name.into();
        spec
    }

    fn job(&self, name: &str, script: &str) -> WorkloadSpec {
        let mut spec = self.workspace(name);
        let folder = spec.agent.home.join(name);
        spec.agent.job = Some(JobRun {
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            working_directory: spec.agent.home.clone(),
            log: folder.join("log"),
            artifacts: folder.join("artifacts"),
            grace_seconds: 5,
        });
        spec
    }

    async fn start(&self, spec: &WorkloadSpec) {
        self.runtime.start(spec, &quiet).await.unwrap();
    }

    async fn state(&self, name: &str) -> Option<FoundState> {
        self.runtime.inspect(name).await.unwrap().map(|found| found.state)
    }

    async fn ended(&self, name: &str) -> Ended {
        let mut events = self.runtime.events();
        loop {
            events.next().await.unwrap();
            if let Some(FoundState::Ended(ended)) = self.state(name).await {
                return ended;
            }
        }
    }

    /// Runs a command in a session of its own; returns its output and how it ended.
    async fn exec(&self, name: &str, command: &str) -> (String, Exit) {
        let mut agent = Connection::new(self.runtime.connect(name).await.unwrap(), false);
        agent.writer.write(&Frame::Open(Open::Session)).await.unwrap();
        agent.writer.write(&Frame::Request(Request::Exec { command: Bytes::from(command.to_owned()) })).await.unwrap();
        agent.writer.write(&Frame::Eof).await.unwrap();
        let mut output = Vec::new();
        loop {
            match agent.reader.read().await.unwrap() {
                Some(Frame::Data(bytes) | Frame::ExtendedData(bytes)) => output.extend_from_slice(&bytes),
                Some(Frame::Exit(exit)) => return (String::from_utf8(output).unwrap(), exit),
                Some(Frame::Opened { .. } | Frame::Success | Frame::Eof | Frame::WindowAdjust { .. }) => {}
                other => panic!("{command}: {other:?}"),
            }
        }
    }
}

/// The whole contract.
pub(crate) async fn conforms(ground: &Ground<'_>) {
    images(ground).await;
    a_workspace(ground).await;
    names_and_fences(ground).await;
    a_job(ground).await;
    a_job_that_is_told_to_end(ground).await;
    a_job_that_uses_its_memory_up(ground).await;
    assert!(ground.runtime.list().await.unwrap().is_empty());
}

async fn images(ground: &Ground<'_>) {
    let pinned = ground.runtime.image_present(ground.image).await.unwrap().unwrap();
    assert!(pinned.contains("sha256:"), "{pinned}");
    assert_eq!(ground.runtime.resolve_image(ground.image, &quiet).await.unwrap(), pinned);
    assert_eq!(ground.runtime.image_present(ground.no_image).await.unwrap(), None);
    // Where the machine that is to run it fetches it, only the start can tell.
    let image = match ground.runtime.resolve_image(ground.no_image, &quiet).await {
        Err(error) => {
            assert!(matches!(error, RuntimeError::Image { .. }), "{error}");
            format!("sha256:{}", "0".repeat(64))
        }
        Ok(image) => image,
    };
    let spec = WorkloadSpec { image, ..ground.workspace("w-9-1") };
    let error = ground.runtime.start(&spec, &quiet).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Image { .. }), "{error}");
    assert_eq!(ground.state("w-9-1").await, None);
}

async fn a_workspace(ground: &Ground<'_>) {
    let mut events = ground.runtime.events();
    assert_eq!(events.next().await, Some(RuntimeEvent::Resync));
    let mut spec = ground.workspace("w-1-1");
    spec.gpu_uuids = vec!["MIG-5fa1".into()];
    spec.agent.environment.insert("OF_THE_WORKSPACE".into(), "a b".into());
    let seen = Mutex::new(Vec::new());
    ground.runtime.start(&spec, &|progress| seen.lock().unwrap().push(progress)).await.unwrap();
    assert_eq!(seen.lock().unwrap().last(), Some(&StartProgress::Connecting));
    assert_eq!(events.next().await, Some(RuntimeEvent::Changed("w-1-1".into())));
    assert_eq!(ground.state("w-1-1").await, Some(FoundState::Running));

    let ids = "echo $(busybox id -u):$(busybox id -g) $HOME $USER $OF_THE_WORKSPACE; exit 3";
    assert_eq!(ground.exec("w-1-1", ids).await, ("20000:20000 /home/alice alice a b\n".into(), Exit::Status(3)));
    let (seen, _) =
        ground.exec("w-1-1", "echo $CUDA_VISIBLE_DEVICES; busybox hostname; echo $MLAD_TEST_OF_IMAGE").await;
    assert_eq!(seen, "MIG-5fa1\nstage\nkept\n");
    // What is made in the home is the user's, on both sides.
    assert_eq!(ground.exec("w-1-1", "echo made > $HOME/made").await.1, Exit::Status(0));
    let made = std::fs::metadata(ground.home.join("made")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 20000);
    // The agent is out of the user's reach, if it is more than they are; its program always is.
    let reach = ["echo > /run/mlad/agent/config.json", "busybox kill -9 1", "echo > /usr/local/bin/mlad"];
    for command in reach.into_iter().filter(|command| ground.guarded || command.ends_with("mlad")) {
        assert_ne!(ground.exec("w-1-1", command).await.1, Exit::Status(0), "{command}");
    }

    // A start is repeatable and disturbs nobody.
    assert_eq!(ground.exec("w-1-1", "echo here > /tmp/mark").await.1, Exit::Status(0));
    ground.start(&spec).await;
    assert_eq!(ground.exec("w-1-1", "read mark < /tmp/mark; echo $mark").await.0, "here\n");

    ground.runtime.terminate("w-1-1").await.unwrap();
    ground.ended("w-1-1").await;
    assert!(matches!(ground.runtime.connect("w-1-1").await, Err(RuntimeError::Gone(_))));
    for _ in 0..2 {
        ground.runtime.remove("w-1-1", Duration::from_secs(1)).await.unwrap();
        ground.runtime.terminate("w-1-1").await.unwrap();
    }
    assert_eq!(ground.state("w-1-1").await, None);
}

async fn names_and_fences(ground: &Ground<'_>) {
    let spec = WorkloadSpec { fence: 7, ..ground.workspace("w-2-1") };
    ground.start(&spec).await;
    let listed = ground.runtime.list().await.unwrap();
    assert_eq!(listed.iter().map(|found| (found.name.as_str(), found.fence)).collect::<Vec<_>>(), [("w-2-1", 7)]);
    let older = WorkloadSpec { fence: 6, ..spec.clone() };
    assert!(matches!(ground.runtime.start(&older, &quiet).await, Err(RuntimeError::Start { .. })));
    assert_eq!(ground.state("w-2-1").await, Some(FoundState::Running));
    let newer = WorkloadSpec { fence: 8, ..spec };
    ground.start(&newer).await;
    assert_eq!(ground.runtime.inspect("w-2-1").await.unwrap().unwrap().fence, 8);
    ground.runtime.remove("w-2-1", Duration::ZERO).await.unwrap();
    let bad = ground.workspace("../w");
    assert!(matches!(ground.runtime.start(&bad, &quiet).await, Err(RuntimeError::Start { .. })));
}

async fn a_job(ground: &Ground<'_>) {
    let script = "echo out; echo err >&2; echo kept > $MLAD_ARTIFACTS/file; echo run >> $HOME/runs; exit 7";
    let spec = ground.job("j-1-1", script);
    ground.start(&spec).await;
    let ended = ground.ended("j-1-1").await;
    assert_eq!(ended, Ended { exit_code: 7, out_of_memory: false, taken_away: None });
    let result = Some(JobResult { exit: Exit::Status(7), out_of_memory: false });
    assert_eq!(ground.runtime.result("j-1-1").await.unwrap(), result);
    let read = |path: &str| std::fs::read_to_string(ground.home.join(path)).unwrap();
    assert_eq!(read("j-1-1/log"), "out\nerr\n");
    assert_eq!(read("j-1-1/artifacts/file"), "kept\n");
    // Never twice.
    ground.start(&spec).await;
    assert_eq!(ground.ended("j-1-1").await, ended);
    assert_eq!(read("runs"), "run\n");
    ground.runtime.remove("j-1-1", Duration::ZERO).await.unwrap();
    assert_eq!(ground.runtime.result("j-1-1").await.unwrap(), None);
}

async fn a_job_that_is_told_to_end(ground: &Ground<'_>) {
    let script = "trap 'echo asked; exit 5' TERM; echo ready > $HOME/ready; while :; do busybox sleep 0.1; done";
    ground.start(&ground.job("j-2-1", script)).await;
    // It is asked once it can hear.
    while ground.exec("j-2-1", "while ! [ -e $HOME/ready ]; do busybox sleep 0.1; done").await.1 != Exit::Status(0) {}
    ground.runtime.terminate("j-2-1").await.unwrap();
    ground.ended("j-2-1").await;
    assert_eq!(ground.runtime.result("j-2-1").await.unwrap().unwrap().exit, Exit::Status(5));
    assert!(std::fs::read_to_string(ground.home.join("j-2-1/log")).unwrap().ends_with("asked\n"));
    ground.runtime.remove("j-2-1", Duration::ZERO).await.unwrap();
}

async fn a_job_that_uses_its_memory_up(ground: &Ground<'_>) {
    // Doubles a string until there is no room for it.
    let script = "a=xxxxxxxxxxxxxxxx; while :; do a=$a$a; done";
    ground.start(&ground.job("j-3-1", script)).await;
    ground.ended("j-3-1").await;
    // The agent's word is there with the end; the runtime's own may come after it.
    let result = ground.runtime.result("j-3-1").await.unwrap().unwrap();
    assert!(result.out_of_memory, "{result:?}");
    assert!(matches!(&result.exit, Exit::Signal { name, .. } if name == "KILL"), "{result:?}");
    ground.runtime.remove("j-3-1", Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn docker_conforms() {
    let (Some(engine), Some(agent)) = (stage::engine(), stage::agent()) else { return };
    let stage = Stage::with_agent(&engine, &agent, |_| {}).await;
    let home = stage.folder().join("alice");
    std::fs::create_dir(&home).unwrap();
    chown(&home, Some(20000), Some(20000)).unwrap();
    let mut spec = stage.spec("w-1-1").await;
    spec.mounts = vec![Mount { source: home.clone(), target: "/home/alice".into(), read_only: false }];
    let runtime: &Docker = &stage.docker;
    conforms(&Ground { runtime, spec, home: &home, image: IMAGE, no_image: "mlad-test/none:1", guarded: true }).await;
}
