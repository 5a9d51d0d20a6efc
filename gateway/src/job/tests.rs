use super::*;
use crate::{
    runtime::RuntimeError,
    testing::{self, CrashPoint, FakeAllocator, FakeRuntime, Observed, World},
};
use futures::StreamExt as _;
use mlad::{
    api::NewUser,
    channel::{AgentConfig, Exit, JobResult},
};
use std::path::PathBuf;
use tempfile::TempDir;

mod ending;
mod giving_way;
mod log;
mod projects;
mod reserved;
mod without_gpu;

const PATIENCE: Duration = Duration::from_secs(30);

/// One gateway over a world and a folder that outlive it.
struct Gateway {
    jobs: Jobs,
    store: Store,
    user: UserRecord,
    observed: Arc<Observed>,
}

struct Place {
    world: World,
    folder: TempDir,
}

impl Place {
    fn new(slices: usize) -> Self {
        Self { world: World::new(slices), folder: tempfile::tempdir().unwrap() }
    }

    async fn gateway(&self) -> Gateway {
        self.gateway_that_dies(&CrashPoint::never()).await
    }

    async fn gateway_that_dies(&self, crash: &CrashPoint) -> Gateway {
        let config = Arc::new(testing::config(self.folder.path()));
        let store = testing::store(self.folder.path()).await;
        let user = match store.user_by_name("alice").await {
            Ok(user) => user,
            Err(_) => {
                // A uid of ours, so that homes can be made by whoever runs the tests.
                store.add_user(&NewUser { name: "alice".into(), role: None, uid: None }).await.unwrap()
            }
        };
        let catalog = Arc::new(Catalog::load(&config, store.clone()).unwrap());
        let observed = Observed::new();
        let jobs = Jobs::start(
            config,
            store.clone(),
            Arc::new(FakeAllocator::new(&self.world, crash)),
            Arc::new(FakeRuntime::new(&self.world, crash)),
            catalog,
            observed.clone(),
        )
        .await
        .unwrap();
        Gateway { jobs, store, user, observed }
    }

    fn home(&self) -> PathBuf {
        self.folder.path().join("home/alice")
    }
}

impl Gateway {
    async fn submit(&self, json: &str) -> JobId {
        self.try_submit(json).await.unwrap()
    }

    async fn try_submit(&self, json: &str) -> Result<JobId, JobError> {
        self.jobs.submit(&self.user, serde_json::from_str(json).unwrap(), Origin::default()).await
    }

    async fn until(&self, id: JobId, wanted: impl Fn(&Job) -> bool) -> Job {
        self.jobs.until(id, wanted).await
    }

    async fn until_state(&self, id: JobId, state: JobState) -> Job {
        self.until(id, |job| job.state == state).await
    }
}

impl Jobs {
    /// The job as soon as it is as wanted.
    pub(crate) async fn until(&self, id: JobId, wanted: impl Fn(&Job) -> bool) -> Job {
        let look = async {
            loop {
                // News of the job itself, and of its place.
                let (mut news, mut waits) = (self.0.watch(id), self.0.waits.subscribe());
                let job = self.view(self.record(id).await.unwrap()).await.unwrap();
                if wanted(&job) {
                    return job;
                }
                tokio::select! {
                    _ = news.changed() => {}
                    _ = waits.changed() => {}
                }
            }
        };
        match tokio::time::timeout(PATIENCE, look).await {
            Ok(job) => job,
            Err(_) => panic!("job {id} stays {:?}", self.view(self.record(id).await.unwrap()).await.unwrap()),
        }
    }
}

fn killed() -> Exit {
    Exit::Signal { name: "KILL".into(), core_dumped: false, message: String::new() }
}

const GPU: &str = r#"{"command": ["train"], "need": "1g.5gb"}"#;
const CPU: &str = r#"{"command": ["count"], "need": "cpu"}"#;

#[tokio::test]
async fn a_job_runs_in_its_container_and_leaves_nothing_but_its_result() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let json = r#"{"command": ["train", "-n"], "need": "1g.5gb", "environment": {"SEED": "1"}, "memory_mib": 512}"#;
    let id = gateway.submit(json).await;
    gateway.until_state(id, JobState::Running).await;
    gateway.observed.some().await;
    assert_eq!(gateway.observed.now().get("j-1-1").map(String::as_str), Some("alice"));

    let spec = place.world.containers().remove("j-1-1").unwrap().spec;
    assert_eq!((spec.image.as_str(), spec.memory_mib, spec.gpu_uuids.len()), ("sha256:mlad/base:1", 512, 1));
    assert_eq!(spec.hostname, "job-1");
    let AgentConfig { environment, job, uid, .. } = spec.agent;
    assert_eq!((environment["SEED"].as_str(), environment["MLAD_JOB_ID"].as_str()), ("1", "1"));
    assert_eq!((environment["MLAD_JOB_ATTEMPT"].as_str(), uid), ("1", gateway.user.uid));
    let run = job.unwrap();
    assert_eq!(run.log, PathBuf::from("/home/alice/.mlad/jobs/1/log"));
    assert_eq!((run.working_directory, run.grace_seconds), (PathBuf::from("/home/alice"), 1));

    place.world.end("j-1-1", Exit::Status(0), false);
    let job = gateway.until_state(id, JobState::Succeeded).await;
    assert_eq!((job.exit_code, job.own_exit_code(), job.reason), (Some(0), 0, Some(JobReason::Exit)));
    assert!(job.ended_at.is_some() && job.attempts.len() == 1 && job.attempts[0].ended_at.is_some());
    assert!(place.world.containers().is_empty() && place.world.leases().is_empty());
    assert!(gateway.observed.now().is_empty());
    assert_eq!(place.world.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn how_a_command_ends_is_told() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let cases = [
        (Exit::Status(3), false, JobReason::Exit, 3),
        (killed(), true, JobReason::OutOfMemory, 137),
        (killed(), false, JobReason::Exit, 137),
    ];
    for (exit, out_of_memory, reason, code) in cases {
        let id = gateway.submit(CPU).await;
        gateway.until_state(id, JobState::Running).await;
        place.world.end(&format!("j-{id}-1"), exit, out_of_memory);
        let job = gateway.until_state(id, JobState::Failed).await;
        assert_eq!((job.reason, job.own_exit_code()), (Some(reason), code));
        assert_eq!(job.detail.is_some_and(|detail| detail.contains("16384 MiB")), out_of_memory);
    }
}

#[tokio::test]
async fn an_engine_that_learns_of_used_up_memory_too_late_does_not_hide_it() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let id = gateway.submit(CPU).await;
    gateway.until_state(id, JobState::Running).await;
    place.world.end_as_told("j-1-1", JobResult { exit: killed(), out_of_memory: true }, false);
    let job = gateway.until_state(id, JobState::Failed).await;
    assert_eq!((job.reason, job.own_exit_code()), (Some(JobReason::OutOfMemory), 137));
}

#[tokio::test]
async fn those_who_wait_know_their_place_and_get_in_one_after_the_other() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(gateway.submit(GPU).await);
    }
    gateway.until_state(ids[0], JobState::Running).await;
    let second = gateway.until(ids[1], |job| job.place == Some(1)).await;
    assert_eq!((second.state, second.reason), (JobState::Queued, Some(JobReason::NoSlice)));
    let third = gateway.until(ids[2], |job| job.place == Some(2)).await;
    assert_eq!((third.reason, third.detail.as_deref()), (Some(JobReason::Priority), Some("1 are before it")));
    place.world.end("j-1-1", Exit::Status(0), false);
    gateway.until_state(ids[1], JobState::Running).await;
    gateway.until(ids[2], |job| job.place == Some(1)).await;
    assert_eq!(place.world.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_held_job_gives_its_place_back_and_gets_a_new_one() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let first = gateway.submit(GPU).await;
    gateway.until_state(first, JobState::Running).await;
    let second = gateway.submit(GPU).await;
    place.world.until("it waits", |world| world.waits() == ["j-2-1"]).await;
    gateway.jobs.hold(second).await.unwrap();
    place.world.until("its place is given back", |world| world.waits().is_empty()).await;
    assert!(matches!(gateway.jobs.hold(first).await, Err(JobError::State { state: JobState::Running, .. })));
    gateway.jobs.release(second).await.unwrap();
    place.world.until("it waits again", |world| world.waits() == ["j-2-2"]).await;

    let held = gateway.submit(r#"{"command": ["x"], "need": "cpu", "hold": true}"#).await;
    assert_eq!(gateway.jobs.record(held).await.unwrap().life.state, JobState::Held);
    gateway.jobs.release(held).await.unwrap();
    gateway.until_state(held, JobState::Running).await;
}

#[tokio::test]
async fn a_job_is_cancelled_wherever_it_is() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let running = gateway.submit(GPU).await;
    gateway.until_state(running, JobState::Running).await;
    let queued = gateway.submit(GPU).await;
    place.world.until("it waits", |world| world.waits().len() == 1).await;
    let held = gateway.submit(r#"{"command": ["x"], "hold": true}"#).await;
    for id in [queued, held, running] {
        gateway.jobs.cancel(id, "bob").await.unwrap();
        let job = gateway.until_state(id, JobState::Cancelled).await;
        assert_eq!((job.reason, job.detail.as_deref()), (Some(JobReason::Cancelled), Some("cancelled by bob")));
        assert_eq!(job.own_exit_code(), 1);
        // Again is no error.
        gateway.jobs.cancel(id, "bob").await.unwrap();
    }
    assert!(place.world.containers().is_empty() && place.world.leases().is_empty() && place.world.waits().is_empty());
    assert_eq!(place.world.violations(), Vec::<String>::new());
    let done = gateway.submit(CPU).await;
    gateway.until_state(done, JobState::Running).await;
    place.world.end(&format!("j-{done}-1"), Exit::Status(0), false);
    gateway.until_state(done, JobState::Succeeded).await;
    assert!(matches!(gateway.jobs.cancel(done, "bob").await, Err(JobError::State { .. })));
}

#[tokio::test]
async fn a_time_limit_ends_a_job_and_also_one_that_does_not_listen() {
    for stubborn in [false, true] {
        let place = Place::new(0);
        place.world.set_stubborn(stubborn);
        let gateway = place.gateway().await;
        let id = gateway.submit(r#"{"command": ["loop"], "need": "cpu", "time_limit_seconds": 1}"#).await;
        let job = gateway.until_state(id, JobState::Failed).await;
        assert_eq!((job.reason, job.own_exit_code()), (Some(JobReason::TimeLimit), if stubborn { 137 } else { 143 }));
        assert!(job.detail.unwrap().contains("1 second"));
        assert!(place.world.containers().is_empty());
        assert_eq!(place.world.violations(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_fault_of_the_machine_makes_another_attempt_and_not_for_ever() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let fault = || RuntimeError::Start { name: "x".into(), reason: "no space left on device".into() };
    place.world.fail_starts([fault()]);
    let id = gateway.submit(GPU).await;
    let job = gateway.until(id, |job| job.state == JobState::Running).await;
    assert_eq!(job.attempts.iter().map(|attempt| attempt.number).collect::<Vec<_>>(), [1, 2]);
    assert!(job.attempts[0].fence < job.attempts[1].fence);
    // It vanishes: another one, the last.
    place.world.vanish("j-1-2");
    gateway.until(id, |job| job.attempts.len() == 3 && job.state == JobState::Running).await;
    place.world.kill("j-1-3", 255, false);
    let job = gateway.until_state(id, JobState::Failed).await;
    assert_eq!(job.reason, Some(JobReason::Infrastructure));
    assert!(job.detail.as_ref().unwrap().contains("3 attempts"), "{:?}", job.detail);
    assert!(place.world.containers().is_empty() && place.world.leases().is_empty());
    assert_eq!(place.world.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_container_killed_for_memory_without_a_word_says_so() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let id = gateway.submit(CPU).await;
    gateway.until_state(id, JobState::Running).await;
    place.world.kill("j-1-1", 137, true);
    let job = gateway.until_state(id, JobState::Failed).await;
    assert_eq!((job.reason, job.own_exit_code()), (Some(JobReason::OutOfMemory), 137));
}

#[tokio::test]
async fn an_image_that_cannot_be_had_fails_the_job_and_an_unknown_one_is_refused() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    place.world.remove_image("mlad/base:1");
    let id = gateway.submit(CPU).await;
    let job = gateway.until_state(id, JobState::Failed).await;
    assert_eq!(job.reason, Some(JobReason::Image));
    assert!(place.world.leases().is_empty());
    let unknown = gateway.try_submit(r#"{"command": ["x"], "image": "bsae"}"#).await.unwrap_err().to_string();
    assert!(unknown.contains("did you mean base"), "{unknown}");
    let small = gateway.try_submit(r#"{"command": ["x"], "image": "torch", "need": "1g.5gb"}"#).await;
    assert!(matches!(small, Err(JobError::Impossible(_))));
    let never = gateway.try_submit(r#"{"command": ["x"], "need": "7g.40gb"}"#).await.unwrap_err().to_string();
    assert!(never.contains("would fit"), "{never}");
}

#[tokio::test]
async fn what_a_user_may_have_is_bounded_and_a_key_gives_the_same_job() {
    let place = Place::new(0);
    let mut gateway = place.gateway().await;
    let keyed = r#"{"command": ["x"], "hold": true, "idempotency_key": "k"}"#;
    let id = gateway.submit(keyed).await;
    assert_eq!(gateway.submit(keyed).await, id);
    let other = gateway.try_submit(r#"{"command": ["y"], "idempotency_key": "k"}"#).await;
    assert!(matches!(other, Err(JobError::KeyUsed(used)) if used == id));
    gateway.user.quota.jobs = Some(1);
    assert!(matches!(gateway.try_submit(CPU).await, Err(JobError::TooMany { have: 1, most: 1 })));
    // The same job is not one more.
    assert_eq!(gateway.submit(keyed).await, id);
    gateway.user.quota.jobs = None;
    gateway.user.quota.slices = Some(0);
    assert!(matches!(gateway.try_submit(GPU).await, Err(JobError::OverQuota(_))));
}

#[tokio::test]
async fn a_lease_that_is_over_ends_its_attempt_and_the_job_begins_anew() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let id = gateway.submit(GPU).await;
    gateway.until_state(id, JobState::Running).await;
    gateway.jobs.shutdown().await;
    // While the gateway is away.
    place.world.expire("j-1-1");
    let gateway = place.gateway().await;
    let job = gateway.until(id, |job| job.state == JobState::Running && job.attempts.len() == 2).await;
    assert_eq!(job.attempts[1].workload, "j-1-2");
    assert_eq!(place.world.running(), ["j-1-2"]);
    assert_eq!(place.world.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_slice_taken_back_leaves_its_job_held() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let id = gateway.submit(GPU).await;
    gateway.until_state(id, JobState::Running).await;
    gateway.jobs.revoke(id, "root").await.unwrap();
    let job = gateway.until_state(id, JobState::Held).await;
    assert_eq!(job.detail.as_deref(), Some("its slice was taken back by root"));
    assert!(place.world.containers().is_empty() && place.world.leases().is_empty());
    gateway.jobs.release(id).await.unwrap();
    gateway.until_state(id, JobState::Running).await;
    assert_eq!(place.world.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn an_engine_or_allocator_that_is_away_is_waited_for() {
    let place = Place::new(1);
    place.world.set_engine(false);
    let gateway = place.gateway().await;
    let first = gateway.submit(GPU).await;
    let starting = |job: &Job| (job.state, job.reason) == (JobState::Starting, Some(JobReason::NodeUnavailable));
    let job = gateway.until(first, starting).await;
    assert!(job.detail.unwrap().contains("does not answer"));
    place.world.set_engine(true);
    gateway.until_state(first, JobState::Running).await;
    assert_eq!(gateway.jobs.record(first).await.unwrap().life.attempt, 1, "no attempt was wasted");

    place.world.set_allocator(false);
    // What can never fit could not be told from what can.
    assert!(matches!(gateway.try_submit(GPU).await, Err(JobError::Allocator(_))));
    place.world.end("j-1-1", Exit::Status(0), false);
    gateway.until_state(first, JobState::Collecting).await;
    place.world.set_allocator(true);
    gateway.until_state(first, JobState::Succeeded).await;
    assert!(place.world.leases().is_empty());
}

#[tokio::test]
async fn what_no_job_wants_is_ended_at_the_start() {
    let place = Place::new(2);
    let gateway = place.gateway().await;
    let id = gateway.submit(GPU).await;
    gateway.until_state(id, JobState::Running).await;
    gateway.jobs.shutdown().await;
    let mut stranger = place.world.containers().remove("j-1-1").unwrap().spec;
    for name in ["j-1-7", "j-99-1", "w-1-1"] {
        stranger.name = name.into();
        place.world.put(stranger.clone());
    }
    let gateway = place.gateway().await;
    place.world.until("only its own are left", |world| world.running() == ["j-1-1", "w-1-1"]).await;
    place.world.end("j-1-1", Exit::Status(0), false);
    gateway.until_state(id, JobState::Succeeded).await;
}

#[tokio::test]
async fn what_no_job_wants_is_looked_for_again_when_that_failed() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let id = gateway.submit(GPU).await;
    gateway.until_state(id, JobState::Running).await;
    gateway.jobs.shutdown().await;
    let mut stranger = place.world.containers().remove("j-1-1").unwrap().spec;
    stranger.name = "j-99-1".into();
    place.world.put(stranger);
    place.world.set_allocator(false);
    let gateway = place.gateway().await;
    place.world.until("the leases were asked for in vain", |world| world.refused_listings() > 0).await;
    assert_eq!(place.world.running(), ["j-1-1", "j-99-1"]);
    place.world.set_allocator(true);
    place.world.until("only its own is left", |world| world.running() == ["j-1-1"]).await;
    drop(gateway);
}

#[tokio::test]
async fn waiting_ends_with_the_job_or_with_a_change_of_state() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let id = gateway.submit(CPU).await;
    gateway.until_state(id, JobState::Running).await;
    let still = gateway.jobs.wait(id, None, Duration::from_millis(1)).await.unwrap();
    assert_eq!(still.life.state, JobState::Running);
    let seen = gateway.jobs.wait(id, Some(JobState::Queued), PATIENCE).await.unwrap();
    assert_eq!(seen.life.state, JobState::Running);
    let jobs = gateway.jobs.clone();
    let waiting = tokio::spawn(async move { jobs.wait(id, None, PATIENCE).await });
    place.world.end("j-1-1", Exit::Status(5), false);
    assert_eq!(waiting.await.unwrap().unwrap().life.exit_code, Some(5));
}

/// Gives a tree to the user, as the agent would.
fn own(path: &std::path::Path, uid: u32) {
    std::os::unix::fs::chown(path, Some(uid), Some(uid)).unwrap();
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            own(&entry.unwrap().path(), uid);
        }
    }
}

#[tokio::test]
async fn hundreds_of_queued_jobs_pass_through_two_slices() {
    let place = Place::new(2);
    let gateway = place.gateway().await;
    let world = place.world.clone();
    let ender = tokio::spawn(async move {
        let mut events = world.events.subscribe();
        loop {
            for name in world.running() {
                world.end(&name, Exit::Status(0), false);
            }
            let _ = events.recv().await;
        }
    });
    let mut last = 0;
    for _ in 0..200 {
        last = gateway.submit(GPU).await;
    }
    for id in 1..=last {
        gateway.until(id, |job| job.state.has_ended()).await;
    }
    ender.abort();
    let failed = JobFilter { states: vec![JobState::Failed, JobState::Cancelled], limit: 10, ..JobFilter::default() };
    assert_eq!(gateway.jobs.list(&failed).await.unwrap(), []);
    assert_eq!(place.world.violations(), Vec::<String>::new());
    assert!((1..=last).all(|id| place.world.starts(&format!("j-{id}-1")) == 1));
}

/// Runs one gateway in a runtime of its own until `work` is done or it dies.
fn incarnation<T: Send + 'static>(
    place: &Arc<Place>,
    crash: CrashPoint,
    work: impl AsyncFnOnce(&Gateway) -> T + Send + 'static,
) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let place = Arc::clone(place);
    let result = runtime.block_on(async {
        let gateway = place.gateway_that_dies(&crash).await;
        tokio::select! {
            result = work(&gateway) => Some(result),
            () = crash.died() => None,
        }
    });
    // Everything it was doing ends here, between two calls, as with kill -9.
    runtime.shutdown_background();
    result
}

/// Three jobs for one slice, and one of them cancelled while it runs: whatever happens, they end.
async fn story(gateway: &Gateway, world: &World) {
    let ids = gateway.store.live_jobs().await.unwrap();
    let ender = {
        let world = world.clone();
        tokio::spawn(async move {
            let mut events = world.events.subscribe();
            loop {
                for name in world.running().into_iter().filter(|name| !name.starts_with("j-3-")) {
                    world.end(&name, Exit::Status(0), false);
                }
                let _ = events.recv().await;
            }
        })
    };
    for id in ids {
        if id == 3 {
            // The gateway before may have come any way with it.
            let cancellable = |job: &Job| matches!(job.state, JobState::Running | JobState::Cancelling);
            gateway.until(id, |job| cancellable(job) || job.state.has_ended()).await;
            gateway.jobs.cancel(id, "alice").await.unwrap();
        }
        gateway.until(id, |job| job.state.has_ended()).await;
    }
    ender.abort();
}

#[test]
fn a_gateway_that_dies_between_any_two_calls_loses_no_job_and_runs_none_twice() {
    let mut passing = 0;
    loop {
        let place = Arc::new(Place::new(1));
        let submitted = incarnation(&place, CrashPoint::never(), async |gateway: &Gateway| {
            // Stored, and the gateway gone before it did anything about them.
            let spec = serde_json::from_str::<JobSpec>(GPU).unwrap();
            let spec = JobSpec { image: Some("base".into()), ..spec };
            for _ in 0..3 {
                gateway.store.submit_job(gateway.user.id, &spec, 10).await.unwrap();
            }
        });
        assert!(submitted.is_some());
        let crash = CrashPoint::at(passing);
        let world = place.world.clone();
        let lived = incarnation(&place, crash, async move |gateway: &Gateway| story(gateway, &world).await);
        let world = place.world.clone();
        incarnation(&place, CrashPoint::never(), async move |gateway: &Gateway| story(gateway, &world).await);
        let world = place.world.clone();
        let jobs = incarnation(&place, CrashPoint::never(), async move |gateway: &Gateway| {
            let nothing =
                |world: &World| world.containers().is_empty() && world.leases().is_empty() && world.waits().is_empty();
            world.until("nothing is left over", nothing).await;
            gateway.jobs.list(&JobFilter { limit: 10, ..JobFilter::default() }).await.unwrap()
        });
        let states: Vec<JobState> = jobs.unwrap().iter().map(|job| job.state).collect();
        let wanted = [JobState::Cancelled, JobState::Succeeded, JobState::Succeeded];
        assert_eq!(states, wanted, "died at {passing}");
        assert_eq!(place.world.violations(), Vec::<String>::new(), "died at {passing}");
        for id in 1..=2 {
            let starts: u32 = (1..10).map(|attempt| place.world.starts(&format!("j-{id}-{attempt}"))).sum();
            assert_eq!(starts, 1, "job {id}, died at {passing}");
        }
        if lived.is_some() {
            assert!(passing > 30, "the story has few calls: {passing}");
            return;
        }
        passing += 1;
    }
}
