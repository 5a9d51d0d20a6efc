//! Jobs without a GPU: how many run, and who is next.

use super::*;

#[tokio::test]
async fn jobs_without_a_gpu_are_bounded_and_run_in_their_order() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let most = gateway.jobs.0.config.job.max_without_gpu;
    for _ in 0..most + 3 {
        gateway.submit(CPU).await;
    }
    place.world.until("the machine is full", |world| world.running().len() == most as usize).await;
    all_wait(&gateway, JobId::from(most), 3).await;
    let last = JobId::from(most) + 3;
    let gateway = {
        gateway.jobs.shutdown().await;
        place.gateway().await
    };
    all_wait(&gateway, JobId::from(most), 3).await;
    place.world.end("j-5-1", Exit::Status(0), false);
    gateway.until_state(JobId::from(most) + 1, JobState::Running).await;
    gateway.jobs.cancel(last - 1, "alice").await.unwrap();
    place.world.end("j-6-1", Exit::Status(0), false);
    gateway.until_state(last, JobState::Running).await;
    assert_eq!(place.world.running().len(), most as usize);
}

#[tokio::test]
async fn places_that_become_free_at_once_wake_as_many_as_wait() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let most = JobId::from(gateway.jobs.0.config.job.max_without_gpu);
    for _ in 0..most + 3 {
        gateway.submit(CPU).await;
    }
    all_wait(&gateway, most, 3).await;
    // Before the first of those who wait is looked at: nothing is awaited between these.
    for id in 1..=3 {
        gateway.jobs.0.job_changed(id, JobState::Succeeded);
    }
    for id in most + 1..=most + 3 {
        gateway.until_state(id, JobState::Running).await;
    }
}

/// Until so many jobs behind `last` wait and each knows its place.
async fn all_wait(gateway: &Gateway, last: JobId, many: JobId) {
    for before in 0..many {
        let wanted = format!("{before} more wait before it");
        let waits = |job: &Job| job.detail.as_ref().is_some_and(|detail| detail.contains(&wanted));
        // In this order: what is told of one depends on those before, who are known by then.
        gateway.until(last + 1 + before, waits).await;
    }
}
