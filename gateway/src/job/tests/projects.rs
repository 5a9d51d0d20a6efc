//! Jobs for projects, their priority and several slices.

use super::*;
use crate::quota::Quotas;
use mlad::api::{NewProject, ProjectLimits, Quota, Role};
use mlad_allocator::{AccountName, Limits};

const FOR_VISION: &str = r#"{"command": ["train"], "need": "1g.5gb", "project": "vision"}"#;

impl Gateway {
    /// The project vision, of which alice is a member.
    async fn vision(&self) {
        self.store.add_project(&NewProject { name: "vision".into(), parent: None }).await.unwrap();
        self.store.add_member("vision", self.user.id).await.unwrap();
    }
}

#[tokio::test]
async fn a_project_whose_slice_is_taken_keeps_its_second_job_waiting_for_the_quota() {
    let place = Place::new(3);
    let gateway = place.gateway().await;
    gateway.vision().await;
    let one = ProjectLimits { slices: Some(1), ..ProjectLimits::default() };
    gateway.store.set_project_limits("vision", &one).await.unwrap();
    let allocator = Arc::new(FakeAllocator::new(&place.world, &CrashPoint::never()));
    let quotas = Quotas::start(gateway.store.clone(), allocator);
    let told = Limits { slices: Some(1), ..Limits::default() };
    let name = AccountName::Project("vision".into());
    place.world.until("the limit is known", |world| world.limits_of(&name) == Some(told)).await;

    let first = gateway.submit(FOR_VISION).await;
    gateway.until_state(first, JobState::Running).await;
    let second = gateway.submit(FOR_VISION).await;
    let waiting = gateway.until(second, |job| job.reason == Some(JobReason::Quota)).await;
    assert_eq!((waiting.state, waiting.spec.project.as_deref()), (JobState::Queued, Some("vision")));
    let environment = &place.world.containers()["j-1-1"].spec.agent.environment;
    assert_eq!((environment["MLAD_PROJECT"].as_str(), environment["MLAD_SLICES"].as_str()), ("vision", "1"));

    // What alone is more than the project may ever hold is refused at once.
    let two = r#"{"command": ["x"], "need": "1g.5gb", "slices": 2, "project": "vision"}"#;
    assert!(matches!(gateway.try_submit(two).await, Err(JobError::OverQuota(text)) if text.contains("vision")));

    place.world.end("j-1-1", Exit::Status(0), false);
    gateway.until_state(second, JobState::Running).await;
    assert_eq!(place.world.violations(), [""; 0]);
    quotas.shutdown().await;
}

#[tokio::test]
async fn only_members_charge_a_project_and_the_default_is_taken_where_none_is_named() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    assert!(matches!(gateway.try_submit(FOR_VISION).await, Err(JobError::Project(_))), "there is none");
    gateway.vision().await;
    gateway.store.set_default_project(gateway.user.id, Some("vision")).await.unwrap();
    let project = async |json: &str| gateway.jobs.record(gateway.submit(json).await).await.unwrap().spec.project;
    assert_eq!(project(CPU).await.as_deref(), Some("vision"));
    assert_eq!(project(r#"{"command": ["x"], "need": "cpu", "project": "none"}"#).await, None);
    let origin = Origin { project: Some("secret".into()), ..Origin::default() };
    let job: JobSpec = serde_json::from_str(CPU).unwrap();
    assert!(matches!(gateway.jobs.submit(&gateway.user, job, origin).await, Err(JobError::Project(_))));
}

#[tokio::test]
async fn a_queued_job_of_somebody_who_is_no_member_any_more_is_held_and_holds_no_place() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    gateway.vision().await;
    let id = gateway.submit(FOR_VISION).await;
    place.world.until("it waits", |world| world.waits() == ["j-1-1"]).await;
    gateway.store.remove_member("vision", gateway.user.id).await.unwrap();
    gateway.jobs.limits_changed(gateway.user.id).await.unwrap();
    let held = gateway.until_state(id, JobState::Held).await;
    assert!(held.detail.unwrap().contains("vision"));
    place.world.until("its place is given back", |world| world.waits().is_empty()).await;
    gateway.store.add_member("vision", gateway.user.id).await.unwrap();
    gateway.jobs.release(id).await.unwrap();
    place.world.until("it waits again", |world| world.waits() == ["j-1-2"]).await;
}

#[tokio::test]
async fn who_may_ask_for_which_priority() {
    let place = Place::new(0);
    let mut gateway = place.gateway().await;
    let with = |priority: i32| format!(r#"{{"command": ["x"], "need": "cpu", "priority": {priority}}}"#);
    for (role, bound, wanted, allowed) in [
        (Role::User, None, 0, true),
        (Role::User, None, -100, true),
        (Role::User, None, 1, false),
        (Role::User, Some(50), 50, true),
        (Role::User, Some(50), 51, false),
        (Role::Admin, None, 100, true),
    ] {
        let quota = Quota { greatest_priority: bound, ..Quota::default() };
        gateway.store.set_user_quota(gateway.user.id, &quota).await.unwrap();
        gateway.user = gateway.store.set_user_role(gateway.user.id, role).await.unwrap();
        let result = gateway.try_submit(&with(wanted)).await;
        assert_eq!(result.is_ok(), allowed, "{role:?} {bound:?} {wanted}: {result:?}");
    }
    assert!(matches!(gateway.try_submit(&with(-101)).await, Err(JobError::Spec(_))));
    let too_great = Quota { greatest_priority: Some(101), ..Quota::default() };
    assert!(gateway.store.set_user_quota(gateway.user.id, &too_great).await.is_err());
}
