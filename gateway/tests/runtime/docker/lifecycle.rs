//! Starting, adopting, ending.

use crate::stage::{self, IMAGE, Stage, quiet};
use futures::StreamExt as _;
use mlad::channel::Exit;
use mlad_gateway::runtime::{
    Ended, Found, FoundState, Mount, Runtime as _, RuntimeError, RuntimeEvent, StartProgress, WorkloadSpec,
};
use std::{sync::Mutex, time::Duration};

async fn state(stage: &Stage, name: &str) -> Option<FoundState> {
    stage.docker.inspect(name).await.unwrap().map(|found| found.state)
}

/// Waits for the news that a workload ended.
async fn ended(stage: &Stage, name: &str) -> Ended {
    let mut events = stage.docker.events();
    loop {
        events.next().await.unwrap();
        if let Some(FoundState::Ended(ended)) = state(stage, name).await {
            return ended;
        }
    }
}

/// Waits for the news that a workload ended, and ended like this: engines learn of used up memory apart from the
/// end, and may do so later.
async fn ended_as(stage: &Stage, name: &str, wanted: Ended) {
    let mut last = None;
    let look = async {
        let mut events = stage.docker.events();
        while last != Some(FoundState::Ended(wanted.clone())) {
            events.next().await.unwrap();
            last = state(stage, name).await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), look).await;
    assert!(in_time.is_ok(), "{name} did not end as {wanted:?}: {last:?}");
}

fn with_conduct(mut spec: WorkloadSpec, conduct: &str) -> WorkloadSpec {
    spec.agent.environment.insert("MLAD_TEST_CONDUCT".into(), conduct.into());
    spec
}

#[tokio::test]
async fn a_start_can_be_repeated_also_after_the_gateway_was_killed() {
    let Some(engine) = stage::engine() else { return };
    let mut stage = Stage::new(&engine, |_| {}).await;
    let spec = stage.spec("w-1-1").await;
    let seen = Mutex::new(Vec::new());
    stage.docker.start(&spec, &|progress| seen.lock().unwrap().push(progress)).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [StartProgress::Creating, StartProgress::Connecting]);
    let identity =
        |stage: &Stage| stage.cli(&["inspect", "-f", "{{.Id}} {{.State.StartedAt}}", &stage.container("w-1-1")]);
    let first = identity(&stage);
    stage.start(&spec).await;
    stage.connect_again().await;
    let found = Found { name: "w-1-1".into(), fence: 1, state: FoundState::Running };
    assert_eq!(stage.docker.list().await.unwrap(), [found]);
    stage.start(&spec).await;
    assert_eq!(identity(&stage), first);
    assert_eq!(stage.tell("w-1-1", "environment MLAD_TEST_OF_IMAGE").await, "kept");

    stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
    stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
    assert_eq!(state(&stage, "w-1-1").await, None);
    assert!(matches!(stage.docker.connect("w-1-1").await, Err(RuntimeError::Gone(_))));
    assert_eq!(std::fs::read_dir(stage.config.run_directory.join("workloads")).unwrap().count(), 0);
}

#[tokio::test]
async fn two_starts_at_once_make_one_container() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let spec = stage.spec("w-1-1").await;
    let starts = (0..4).map(|_| stage.docker.start(&spec, &quiet));
    for result in futures::future::join_all(starts).await {
        result.unwrap();
    }
    assert_eq!(stage.docker.list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn forty_starts_at_once_are_forty_containers() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let begun = std::time::Instant::now();
    let starts = (0..40).map(|number| {
        let stage = &stage;
        async move {
            let spec = stage.spec(&format!("w-{number}-1")).await;
            stage.docker.start(&spec, &quiet).await
        }
    });
    for result in futures::future::join_all(starts).await {
        result.unwrap();
    }
    eprintln!("forty starts: {:?}", begun.elapsed());
    let found = stage.docker.list().await.unwrap();
    assert_eq!(found.len(), 40);
    assert!(found.iter().all(|found| found.state == FoundState::Running));
}

#[tokio::test]
async fn a_start_given_up_at_any_point_is_cleared_by_remove() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let spec = stage.spec("w-1-1").await;
    for milliseconds in (0..600).step_by(120) {
        let given_up = tokio::time::timeout(Duration::from_millis(milliseconds), stage.docker.start(&spec, &quiet));
        let done = given_up.await.is_ok();
        stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
        assert_eq!(state(&stage, "w-1-1").await, None, "given up after {milliseconds} ms: {done}");
    }
    stage.start(&spec).await;
}

#[tokio::test]
async fn what_was_made_and_not_started_is_started() {
    let Some(engine) = stage::engine() else { return };
    let mut stage = Stage::new(&engine, |_| {}).await;
    let spec = stage.spec("w-1-1").await;
    stage.start(&spec).await;
    stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
    // As a gateway leaves it that is killed between making and starting: no folder survives a reboot either.
    let workload = stage.config.run_directory.join("workloads/w-1-1");
    std::fs::create_dir(&workload).unwrap();
    let labels = ["mlad.workload=w-1-1", "mlad.fence=1", "mlad.user=alice"];
    let labels: Vec<String> = labels
        .iter()
        .map(|label| format!("--label={label}"))
        .chain([format!("--label=mlad.instance={}", stage.config.instance)])
        .collect();
    let agent = format!("--mount=type=bind,source={},target=/usr/local/bin/mlad", stage.config.agent_binary.display());
    let folder = format!("--mount=type=bind,source={},target=/run/mlad/agent", workload.display());
    let name = stage.container("w-1-1");
    let mut arguments =
        vec!["create", "--name", &name, "--user=0", "--entrypoint=/usr/local/bin/mlad", &agent, &folder];
    arguments.extend(labels.iter().map(String::as_str));
    arguments.push(IMAGE);
    stage.cli(&arguments);
    std::fs::remove_dir(&workload).unwrap();
    stage.connect_again().await;
    assert_eq!(state(&stage, "w-1-1").await, Some(FoundState::Created));
    stage.start(&spec).await;
    assert_eq!(state(&stage, "w-1-1").await, Some(FoundState::Running));
    assert!(matches!(
        stage.docker.start(&WorkloadSpec { fence: 0, ..spec }, &quiet).await,
        Err(RuntimeError::Start { .. })
    ));
    assert_eq!(state(&stage, "w-1-1").await, Some(FoundState::Running));
}

#[tokio::test]
async fn a_workspace_that_ends_while_it_is_reached_is_made_anew() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let spec = stage.spec("w-1-1").await;
    stage.start(&spec).await;
    let identity = |stage: &Stage| stage.cli(&["inspect", "-f", "{{.Id}}", &stage.container("w-1-1")]);
    let first = identity(&stage);
    // Out of reach, but running; its last order goes through a connection made before, once it was found so.
    let connection = Mutex::new(Some(stage.docker.connect("w-1-1").await.unwrap()));
    assert_eq!(stage.tell("w-1-1", "unlink /run/mlad/agent/agent.sock").await, "done");
    let end_it_once = |progress| {
        if progress == StartProgress::Connecting
            && let Some(connection) = connection.lock().unwrap().take()
        {
            tokio::spawn(async { stage::tell(connection, "exit 0").await });
        }
    };
    stage.docker.start(&spec, &end_it_once).await.unwrap();
    assert_ne!(identity(&stage), first);
    assert_eq!(stage.tell("w-1-1", "environment MLAD_TEST_OF_IMAGE").await, "kept");
}

#[tokio::test]
async fn a_jobs_container_has_one_run_whatever_is_asked() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let mut spec = with_conduct(stage.spec("j-1-1").await, "finish");
    spec.agent.job = Some(stage::job(&["true"]));
    stage.start(&spec).await;
    assert_eq!(ended(&stage, "j-1-1").await, Ended { exit_code: 0, out_of_memory: false, taken_away: None });
    assert_eq!(stage.docker.result("j-1-1").await.unwrap().unwrap().exit, Exit::Status(4));
    let started = |stage: &Stage| stage.cli(&["inspect", "-f", "{{.State.StartedAt}}", &stage.container("j-1-1")]);
    let first = started(&stage);
    stage.start(&spec).await;
    assert_eq!(started(&stage), first);
    assert_eq!(stage.docker.result("j-1-1").await.unwrap().unwrap().exit, Exit::Status(4));
    stage.docker.remove("j-1-1", Duration::ZERO).await.unwrap();
    assert_eq!(stage.docker.result("j-1-1").await.unwrap(), None);
}

#[tokio::test]
async fn an_agent_that_ends_at_once_is_an_error_with_its_last_words() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    for job in [None, Some(stage::job(&["true"]))] {
        let mut spec = with_conduct(stage.spec("w-1-1").await, "fail");
        spec.agent.job = job;
        let error = stage.docker.start(&spec, &quiet).await.unwrap_err().to_string();
        assert!(error.contains("exit code 3: no device for me"), "{error}");
        assert_eq!(state(&stage, "w-1-1").await, None);
    }
}

#[tokio::test]
async fn an_agent_that_binds_before_it_listens_is_waited_for() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let spec = with_conduct(stage.spec("w-1-1").await, "late");
    stage.start(&spec).await;
    assert_eq!(stage.tell("w-1-1", "environment NVIDIA_VISIBLE_DEVICES").await, "void");
}

#[tokio::test]
async fn how_it_ended_is_told_and_memory_has_its_own_word() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    for (name, command, exit_code, out_of_memory) in [("w-1-1", "exit 9", 9, false), ("w-2-1", "eat", 137, true)] {
        stage.start(&stage.spec(name).await).await;
        assert_eq!(stage.tell(name, command).await, "");
        ended_as(&stage, name, Ended { exit_code, out_of_memory, taken_away: None }).await;
        let listed = stage.docker.list().await.unwrap();
        let found = listed.into_iter().find(|found| found.name == name).unwrap();
        assert_eq!(found.state, FoundState::Ended(Ended { exit_code, out_of_memory, taken_away: None }));
        assert!(matches!(stage.docker.connect(name).await, Err(RuntimeError::Gone(_))));
    }
}

#[tokio::test]
async fn news_begin_with_a_resync_and_name_what_changed() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let mut events = stage.docker.events();
    assert_eq!(events.next().await, Some(RuntimeEvent::Resync));
    stage.start(&stage.spec("w-1-1").await).await;
    assert_eq!(events.next().await, Some(RuntimeEvent::Changed("w-1-1".into())));
    stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
    while state(&stage, "w-1-1").await.is_some() {
        assert_eq!(events.next().await, Some(RuntimeEvent::Changed("w-1-1".into())));
    }
}

#[tokio::test]
async fn an_image_that_is_not_there_is_said_to_be() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    assert_eq!(stage.docker.image_present("mlad-test/none:1").await.unwrap(), None);
    let error = stage.docker.resolve_image("mlad-test/none:1", &quiet).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Image { .. }), "{error}");
    assert!(error.to_string().contains("names no registry"), "{error}");
    // Nobody listens there.
    let error = stage.docker.resolve_image("localhost:1/none:1", &quiet).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Image { .. }), "{error}");
    let missing = format!("sha256:{}", "0".repeat(64));
    let spec = WorkloadSpec { image: missing, ..stage.spec("w-1-1").await };
    assert!(matches!(stage.docker.start(&spec, &quiet).await, Err(RuntimeError::Image { .. })));
    assert!(stage.docker.list().await.unwrap().is_empty());
    let pinned = stage.docker.resolve_image(IMAGE, &quiet).await.unwrap();
    assert!(pinned.starts_with("sha256:"), "{pinned}");
}

#[tokio::test]
async fn limits_and_rights_are_those_of_the_settings() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let data = stage.folder().join("data set");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("one"), "1\n").unwrap();
    let mut spec = stage.spec("w-1-1").await;
    spec.gpu_uuids = vec!["MIG-a".into(), "MIG-b".into()];
    spec.mounts = vec![Mount { source: data, target: "/datasets".into(), read_only: true }];
    stage.start(&spec).await;
    let name = stage.container("w-1-1");
    let inspect = |format: &str| stage.cli(&["inspect", "-f", format, &name]).trim().to_owned();
    assert_eq!(inspect("{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}}"), format!("{0} {0}", 64 << 20));
    assert_eq!(inspect("{{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}"), "1000000000 64");
    assert_eq!(inspect("{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.Privileged}}"), "no false");
    assert_eq!(inspect("{{.Config.User}} {{.Config.Hostname}}"), "0:0 stage");

    let tell = async |command: &str| stage.tell("w-1-1", command).await;
    // The kernel's own words: CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID.
    let status = tell("read /proc/self/status").await;
    assert!(status.contains("CapBnd:\t00000000000000eb|") && status.contains("CapEff:\t00000000000000eb|"), "{status}");
    assert!(status.contains("NoNewPrivs:\t1|") && status.contains("Seccomp:\t2|"), "{status}");
    assert_eq!(tell("environment CUDA_VISIBLE_DEVICES").await, "MIG-a,MIG-b");
    assert_eq!(tell("environment NVIDIA_VISIBLE_DEVICES").await, "MIG-a,MIG-b");
    assert_eq!(tell("read /datasets/one").await, "1|");
    assert!(tell("write /datasets/two 2").await.contains("Read-only"));
    assert!(tell("write /usr/local/bin/mlad x").await.contains("Read-only"));
    assert_eq!(tell("write /run/mlad/api.sock x").await, "done");
    let mounts = tell("read /proc/mounts").await;
    assert!(mounts.contains("shm /dev/shm tmpfs") && mounts.contains("size=8192k"), "{mounts}");
    assert!(tell("read /run/mlad/agent/config.json").await.contains("\"CUDA_VISIBLE_DEVICES\":\"MIG-a,MIG-b\""));
}

#[tokio::test]
async fn a_container_that_is_not_ours_is_left_alone() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let name = stage.container("w-1-1");
    stage.cli(&["create", "--name", &name, IMAGE]);
    let error = stage.docker.start(&stage.spec("w-1-1").await, &quiet).await.unwrap_err();
    let removed = stage.docker.remove("w-1-1", Duration::ZERO).await;
    // An image can bear our labels too.
    let label = format!("--label=mlad.instance={}", stage.config.instance);
    let other = format!("{name}-other");
    stage.cli(&["create", "--name", &other, &label, "--label=mlad.workload=w-2-1", "--label=mlad.fence=1", IMAGE]);
    let listed = stage.docker.list().await;
    stage.cli(&["rm", &name, &other]);
    assert!(matches!(error, RuntimeError::Start { .. }), "{error}");
    removed.unwrap();
    assert!(listed.unwrap().is_empty());
}

#[tokio::test]
async fn a_network_that_is_not_ours_is_left_alone() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    let network = stage.config.instance.clone();
    let spec = stage.spec("w-1-1").await;
    let mut answers = Vec::new();
    for label in [&[][..], &["--label=mlad.instance=other"]] {
        stage.cli(&["network", "rm", &network]);
        stage.cli(&[&["network", "create", "--internal"], label, &[network.as_str()]].concat());
        let identity = stage.cli(&["network", "inspect", "-f", "{{.Id}}", &network]);
        answers.extend([stage.docker.start(&spec, &quiet).await, stage.docker.uninstall().await]);
        assert_eq!(stage.cli(&["network", "inspect", "-f", "{{.Id}}", &network]), identity);
    }
    stage.cli(&["network", "rm", &network]);
    for answer in answers {
        match answer {
            Err(RuntimeError::Host(reason)) => assert!(reason.contains(&network), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    stage.start(&spec).await;
    assert_eq!(state(&stage, "w-1-1").await, Some(FoundState::Running));
}

#[tokio::test]
async fn an_engine_without_cdi_is_not_asked_for_a_slice_by_cdi() {
    let Some(engine) = stage::engine() else { return };
    let stage =
        Stage::new(&engine, |config| config.container.gpu_binding = mlad_gateway::config::GpuBinding::Cdi).await;
    let api = stage.cli(&["version", "-f", "{{.Server.APIVersion}}"]);
    let minor: u32 = api.trim().split('.').next_back().unwrap().parse().unwrap();
    let mut spec = stage.spec("w-1-1").await;
    stage.start(&spec).await;
    stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
    spec.gpu_uuids = vec!["MIG-a".into()];
    let error = stage.docker.start(&spec, &quiet).await.unwrap_err();
    assert_eq!(matches!(error, RuntimeError::Host(_)), minor < 44, "{error}");
    assert!(stage.docker.list().await.unwrap().is_empty());
}
