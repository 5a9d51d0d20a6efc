//! Jobs whose lease is going to end.

use super::*;
use jiff::SignedDuration;

const PREEMPTIBLE: &str = r#"{"command": ["train"], "need": "1g.5gb", "preemptible": true, "priority": -1}"#;
const LONG: SignedDuration = SignedDuration::from_hours(1);
const SHORT: SignedDuration = SignedDuration::from_millis(300);

#[tokio::test]
async fn a_job_with_notice_is_told_at_once_and_waits_again_as_often_as_that_happens() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let id = gateway.submit(PREEMPTIBLE).await;
    // Oftener than there may be attempts that fail.
    for attempt in 1..=5 {
        let name = format!("j-{id}-{attempt}");
        gateway.until(id, |job| job.state == JobState::Running && job.attempts.len() == attempt).await;
        place.world.notice(&name, Some(LONG));
        place.world.until("it is gone", |world| !world.containers().contains_key(&name)).await;
    }
    let job = gateway.until(id, |job| job.state == JobState::Running && job.attempts.len() == 6).await;
    assert_eq!(job.attempts.iter().filter(|attempt| attempt.preempted).count(), 5);
    place.world.end(&format!("j-{id}-6"), Exit::Status(0), false);
    gateway.until_state(id, JobState::Succeeded).await;
    assert_eq!(place.world.violations(), [""; 0]);
}

#[tokio::test]
async fn what_does_not_end_by_itself_is_ended_with_its_notice() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    place.world.set_stubborn(true);
    let id = gateway.submit(PREEMPTIBLE).await;
    gateway.until_state(id, JobState::Running).await;
    place.world.notice("j-1-1", Some(LONG));
    let noticed = gateway.until(id, |job| job.reason == Some(JobReason::Preempted)).await;
    assert!(noticed.detail.unwrap().contains("greater priority"));
    place.world.until("it is told", |world| world.containers()["j-1-1"].terminated == 1).await;
    assert_eq!(gateway.jobs.record(id).await.unwrap().life.state, JobState::Running);

    place.world.notice("j-1-1", Some(SHORT));
    place.world.until("it runs anew", |world| world.running() == ["j-1-2"]).await;
    assert_eq!(place.world.violations(), [""; 0]);
}

#[tokio::test]
async fn a_job_that_ends_well_within_its_notice_has_succeeded() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    place.world.set_stubborn(true);
    let id = gateway.submit(PREEMPTIBLE).await;
    gateway.until_state(id, JobState::Running).await;
    place.world.notice("j-1-1", Some(LONG));
    place.world.until("it is told", |world| world.containers()["j-1-1"].terminated == 1).await;
    place.world.end("j-1-1", Exit::Status(0), false);
    let job = gateway.until_state(id, JobState::Succeeded).await;
    assert_eq!((job.attempts.len(), job.attempts[0].preempted, job.exit_code), (1, false, Some(0)));
}

#[tokio::test]
async fn a_notice_that_is_taken_back_ends_nothing_and_one_from_before_a_restart_is_kept() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    place.world.set_stubborn(true);
    let id = gateway.submit(PREEMPTIBLE).await;
    gateway.until_state(id, JobState::Running).await;
    place.world.notice("j-1-1", Some(LONG));
    place.world.until("it is told", |world| world.containers()["j-1-1"].terminated == 1).await;
    gateway.jobs.shutdown().await;

    let gateway = place.gateway().await;
    place.world.until("it is told again", |world| world.containers()["j-1-1"].terminated == 2).await;
    place.world.notice("j-1-1", None);
    assert_eq!(gateway.jobs.record(id).await.unwrap().life.state, JobState::Running);
    // What ends it now is that somebody ends it.
    gateway.jobs.cancel(id, "alice").await.unwrap();
    place.world.set_stubborn(false);
    place.world.end("j-1-1", killed(), false);
    gateway.until_state(id, JobState::Cancelled).await;
    assert_eq!(place.world.violations(), [""; 0]);
}

/// The first attempt has notice as soon as it runs, the second ends well.
async fn story(gateway: &Gateway, world: &World) {
    let world = world.clone();
    let fate = tokio::spawn(async move {
        let mut events = world.events.subscribe();
        loop {
            for name in world.running() {
                match name.as_str() {
                    "j-1-1" => world.notice(&name, Some(LONG)),
                    _ => world.end(&name, Exit::Status(0), false),
                }
            }
            let _ = events.recv().await;
        }
    });
    gateway.until(1, |job| job.state.has_ended()).await;
    fate.abort();
}

#[test]
fn a_gateway_that_dies_between_any_two_calls_forgets_no_notice_and_counts_it_as_no_fault() {
    let mut passing = 0;
    loop {
        let place = Arc::new(Place::new(1));
        incarnation(&place, CrashPoint::never(), async |gateway: &Gateway| {
            let spec = serde_json::from_str::<JobSpec>(PREEMPTIBLE).unwrap();
            let spec = JobSpec { image: Some("base".into()), ..spec };
            gateway.store.submit_job(gateway.user.id, &spec, 10).await.unwrap();
        });
        let world = place.world.clone();
        let lived = incarnation(&place, CrashPoint::at(passing), async move |gateway: &Gateway| {
            story(gateway, &world).await;
        });
        let world = place.world.clone();
        let job = incarnation(&place, CrashPoint::never(), async move |gateway: &Gateway| {
            story(gateway, &world).await;
            let nothing = |world: &World| world.containers().is_empty() && world.leases().is_empty();
            world.until("nothing is left over", nothing).await;
            gateway.jobs.view(gateway.jobs.record(1).await.unwrap()).await.unwrap()
        });
        let job = job.unwrap();
        let preempted: Vec<bool> = job.attempts.iter().map(|attempt| attempt.preempted).collect();
        assert_eq!((job.state, preempted), (JobState::Succeeded, vec![true, false]), "died at {passing}");
        assert_eq!(place.world.violations(), [""; 0], "died at {passing}");
        if lived.is_some() {
            assert!(passing > 30, "the story has few calls: {passing}");
            return;
        }
        passing += 1;
    }
}
