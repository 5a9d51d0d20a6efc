//! What breaks, who is told, and that nothing is lost by it.

use super::{Bench, eventually, place, ready, wish, wish_for};
use crate::{
    runtime::RuntimeError,
    workspace::{Progress, WorkspaceError},
};
use mlad::api::{ErrorCode, WorkspaceState};
use std::time::Duration;

#[tokio::test]
async fn an_image_that_cannot_be_had_is_told_to_all_and_no_slice_is_asked_for() {
    let bench = Bench::new(1).await;
    bench.world.close("pull");
    let first = bench.enter("alice", wish_for("default", "lost", "1g.5gb")).await.unwrap();
    let second = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.open("pull");
    for entering in [first, second] {
        let error = ready(entering).await.err().unwrap();
        assert_eq!(error.to_string(), "the image registry.example/lost:1 cannot be had: no registry has it");
    }
    let stopped = bench.until_state("alice", WorkspaceState::Stopped).await;
    assert!(stopped.detail.unwrap().contains("cannot be had"));
    assert_eq!(bench.world.calls("request"), 0);
    // With another image it works.
    ready(bench.enter("alice", wish_for("default", "base", "1g.5gb")).await.unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_releases_the_slice_and_can_be_tried_again() {
    let bench = Bench::new(1).await;
    let failure = RuntimeError::Start { name: "w-1-1".into(), reason: "no space left on device".into() };
    bench.world.lock().failing_starts.push(failure);
    bench.world.close("create");
    let first = bench.enter("alice", wish("default")).await.unwrap();
    let second = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.open("create");
    for entering in [first, second] {
        let error = ready(entering).await.err().unwrap();
        assert_eq!(error.to_string(), "the container w-1-1 cannot be started: no space left on device");
    }
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
    assert_eq!(bench.attach("alice").await.workload(), "w-1-2");
}

#[tokio::test]
async fn a_home_that_cannot_be_made_is_told() {
    let bench = Bench::new(1).await;
    let homes = bench.config.home_of("alice");
    std::fs::create_dir_all(homes.parent().unwrap()).unwrap();
    std::fs::write(&homes, "in the way").unwrap();
    let error = ready(bench.enter("alice", wish("default")).await.unwrap()).await.err().unwrap();
    assert!(matches!(&error, WorkspaceError::Home(text) if text.contains("in the place of a home")), "{error}");
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
}

#[tokio::test]
async fn without_an_engine_a_login_is_told_and_later_gets_in() {
    let bench = Bench::new(1).await;
    bench.world.set_engine(false);
    let error = ready(bench.enter("alice", wish("default")).await.unwrap()).await.err().unwrap();
    assert_eq!(error.to_string(), "the container engine does not answer: connection refused");
    assert_eq!((error.code(), error.hint().as_deref()), (ErrorCode::Unavailable, Some("try again in a moment")));
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.world.set_engine(true);
    bench.attach("alice").await;
}

#[tokio::test]
async fn an_engine_that_goes_away_during_a_start_delays_the_release_not_the_answer() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let entering = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.called("start", 1).await;
    bench.world.set_engine(false);
    bench.world.open("start");
    let error = ready(entering).await.err().unwrap();
    assert!(matches!(error, WorkspaceError::Runtime(RuntimeError::Unavailable(_))), "{error}");
    // The container may still be there, so the slice stays with it.
    assert_eq!(bench.until_state("alice", WorkspaceState::Stopping).await.state, WorkspaceState::Stopping);
    let again = ready(bench.enter("alice", wish("default")).await.unwrap()).await.err().unwrap();
    assert!(matches!(again, WorkspaceError::Runtime(RuntimeError::Unavailable(_))), "{again}");
    assert_eq!(bench.world.lock().leases.len(), 1);
    bench.world.set_engine(true);
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
    bench.attach("alice").await;
    bench.assert_lawful();
}

#[tokio::test]
async fn an_engine_that_comes_back_finds_who_runs_and_who_does_not() {
    let bench = Bench::new(2).await;
    let alice = bench.attach("alice").await;
    let bob = bench.attach("bob").await;
    bench.world.set_engine(false);
    bench.world.lock().containers.remove(bob.workload());
    bench.world.set_engine(true);
    assert_eq!(bob.ended().await, "its container is gone");
    bench.until_state("bob", WorkspaceState::Stopped).await;
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    alice.connect().await.unwrap();
    bench.assert_lawful();
}

#[tokio::test]
async fn without_an_allocator_a_login_is_told_and_a_place_in_the_queue_is_kept() {
    let bench = Bench::new(1).await;
    let alice = bench.attach("alice").await;
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    place(&mut bob).await;
    bench.world.set_allocator(false);
    let error = bench.enter("carol", wish("default")).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert_eq!(bench.get("bob").await.state, WorkspaceState::Waiting);
    bench.world.set_allocator(true);
    drop(alice);
    // Whoever asks for news of the allocator tries again after a while.
    bench.world.clock().advance(Duration::from_secs(31));
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    bench.world.clock().advance(Duration::from_secs(31));
    ready(bob).await.unwrap();
    bench.assert_lawful();
}

#[tokio::test]
async fn a_place_that_is_taken_away_is_told_with_its_reason() {
    let bench = Bench::new(1).await;
    let _alice = bench.attach("alice").await;
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    place(&mut bob).await;
    bench.world.revoke("w-2-1", "an administrator emptied the queue");
    let error = ready(bob).await.err().unwrap();
    assert_eq!(error.to_string(), "the slice cannot be had: an administrator emptied the queue");
    bench.until_state("bob", WorkspaceState::Stopped).await;
}

#[tokio::test]
async fn a_panic_is_one_workspaces_alone() {
    let bench = Bench::new(2).await;
    let alice = bench.attach("alice").await;
    bench.world.lock().panics = 1;
    let error = ready(bench.enter("bob", wish("default")).await.unwrap()).await.err().unwrap();
    assert!(matches!(error, WorkspaceError::Internal), "{error}");
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    alice.connect().await.unwrap();
    // It begins again from what the database says.
    bench.world.clock().advance(Duration::from_secs(1));
    bench.attach("bob").await.connect().await.unwrap();
    bench.assert_lawful();
}

#[tokio::test]
async fn a_slice_is_kept_alive_through_a_long_start() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let entering = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.called("start", 1).await;
    bench.pass_time(5).await;
    bench.world.open("start");
    ready(entering).await.unwrap();
    bench.assert_lawful();
}

#[tokio::test]
async fn a_lease_that_is_lost_during_a_start_ends_it() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let entering = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.called("start", 1).await;
    bench.world.revoke("w-1-1", "the GPU fell off the bus");
    bench.world.clock().advance(Duration::from_secs(31));
    bench.world.called("renew", 1).await;
    bench.world.called("state", 1).await;
    bench.world.open("start");
    let error = ready(entering).await.err().unwrap();
    assert!(error.to_string().contains("the GPU fell off the bus"), "{error}");
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
}

#[tokio::test]
async fn a_shutdown_tells_those_who_wait_and_leaves_the_containers() {
    let bench = Bench::new(1).await;
    let alice = bench.attach("alice").await;
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    place(&mut bob).await;
    bench.workspaces.shutdown().await;
    assert!(matches!(ready(bob).await.err(), Some(WorkspaceError::ShuttingDown)));
    assert!(matches!(bench.enter("carol", wish("default")).await.err(), Some(WorkspaceError::ShuttingDown)));
    alice.connect().await.unwrap();
    assert_eq!(bench.world.lock().containers.len(), 1);
    // The next gateway goes on with it, and keeps the place for a while.
    drop(alice);
    let bench = bench.crash().await;
    assert_eq!(bench.attach("alice").await.workload(), "w-1-1");
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    assert_eq!(place(&mut bob).await, (1, 1));
    assert_eq!(bench.world.lock().queue[0].0.workload, "w-2-1");
    bench.assert_lawful();
}

#[tokio::test]
async fn the_end_of_the_last_handle_ends_the_tasks() {
    let bench = Bench::new(1).await;
    let mut alice = bench.enter("alice", wish("default")).await.unwrap();
    while !matches!(alice.next().await.unwrap(), Progress::Ready(_)) {}
    let Bench { workspaces, world, .. } = bench;
    let controller = std::sync::Arc::downgrade(&workspaces.controller);
    drop(workspaces);
    eventually(|| async { (controller.strong_count() == 0).then_some(()) }).await;
    assert_eq!(world.lock().containers.len(), 1);
}
