//! How long a workspace stays when nobody is connected.

use super::{Bench, eventually};
use crate::workspace::{Clock as _, State, WorkspaceError, later};
use jiff::Timestamp;
use mlad::api::WorkspaceState;
use std::time::Duration;

fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(minutes * 60)
}

/// The deadline as it is in the database.
async fn stored(bench: &Bench) -> Option<Timestamp> {
    let record = bench.store.workspace_by_id(1).await.unwrap().unwrap();
    match record.life.state {
        State::Running { idle_deadline, .. } => idle_deadline,
        _ => None,
    }
}

#[tokio::test]
async fn it_stays_while_somebody_is_connected_and_ends_at_its_deadline() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    bench.pass_time(45).await;
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    drop(attached);
    let deadline = eventually(|| stored(&bench)).await;
    assert_eq!(deadline, later(bench.world.clock().now(), minutes(30)));
    assert_eq!(bench.get("alice").await.idle_deadline, Some(deadline));
    bench.pass_time(29).await;
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    bench.pass_time(1).await;
    let stopped = bench.until_state("alice", WorkspaceState::Stopped).await;
    assert_eq!(stopped.detail.as_deref(), Some("nobody was connected for 30 minutes"));
    bench.assert_clean().await;
}

#[tokio::test]
async fn who_comes_back_in_time_finds_it() {
    let bench = Bench::new(1).await;
    drop(bench.attach("alice").await);
    eventually(|| stored(&bench)).await;
    bench.pass_time(29).await;
    let back = bench.attach("alice").await;
    assert_eq!(back.workload(), "w-1-1");
    eventually(|| async { stored(&bench).await.is_none().then_some(()) }).await;
    bench.pass_time(10).await;
    drop(back);
    let deadline = eventually(|| stored(&bench)).await;
    assert_eq!(deadline, later(bench.world.clock().now(), minutes(30)));
    bench.assert_lawful();
}

#[tokio::test]
async fn the_lease_is_given_back_only_when_the_container_is_gone() {
    let bench = Bench::new(1).await;
    drop(bench.attach("alice").await);
    eventually(|| stored(&bench)).await;
    bench.world.close("remove");
    bench.pass_time(29).await;
    bench.world.clock().advance(minutes(1));
    bench.world.called("remove", 1).await;
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Stopping);
    assert_eq!(bench.world.lock().leases.len(), 1);
    bench.world.open("remove");
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
}

#[tokio::test]
async fn it_can_be_kept_longer_but_not_for_ever() {
    let bench = Bench::new(1).await;
    let not_running = bench.workspaces.extend("alice", "default", 60).await.err().unwrap();
    assert!(matches!(not_running, WorkspaceError::Store(_)), "alice is not known yet: {not_running}");
    let attached = bench.attach("alice").await;
    bench.workspaces.extend("alice", "default", 120).await.unwrap();
    drop(attached);
    let deadline = eventually(|| stored(&bench)).await;
    assert_eq!(deadline, later(bench.world.clock().now(), minutes(120)));
    // A shorter wish does not take back what was promised.
    let workspace = bench.workspaces.extend("alice", "default", 1).await.unwrap();
    assert_eq!(workspace.idle_deadline, Some(deadline));
    let workspace = bench.workspaces.extend("alice", "default", u64::MAX).await.unwrap();
    assert_eq!(workspace.idle_deadline, Some(later(bench.world.clock().now(), minutes(24 * 60))));
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    let stopped = bench.workspaces.extend("alice", "default", 1).await.err().unwrap();
    assert!(matches!(stopped, WorkspaceError::NotRunning(_)), "{stopped}");
}

#[tokio::test]
async fn with_no_idle_time_it_ends_with_the_last_connection() {
    let bench = Bench::with(1, "idle_minutes = 0\ndefault_image = 'base'\ndefault_need = 'cpu'").await;
    let attached = bench.attach("alice").await;
    let copy = attached.clone();
    drop(attached);
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    drop(copy);
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
}
