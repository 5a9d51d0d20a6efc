//! How a workspace ends that somebody is in, and what is cleared away that nobody wants.

use super::{Bench, eventually, place, ready, stray, wish};
use crate::{
    runtime::WorkloadSpec,
    workspace::{Clock as _, WorkspaceError},
};
use mlad::api::WorkspaceState;
use std::time::Duration;

#[tokio::test]
async fn who_is_inside_is_told_who_stopped_it() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    let stopped = bench.workspaces.stop("alice", "default", "root").await.unwrap();
    assert_eq!((stopped.state, stopped.detail.as_deref()), (WorkspaceState::Stopped, Some("stopped by root")));
    assert_eq!(attached.ended().await, "stopped by root");
    assert!(attached.connect().await.is_err());
    bench.assert_clean().await;
    // Once more is no error, and neither is it for one that does not exist any more to do.
    bench.workspaces.stop("alice", "default", "root").await.unwrap();
    let unknown = bench.workspaces.stop("alice", "other", "root").await.err().unwrap();
    assert!(matches!(unknown, WorkspaceError::NotFound(_)), "{unknown}");
    // A connection from before does not count for the next container.
    let next = bench.attach("alice").await;
    assert_eq!((next.workload(), bench.get("alice").await.connections), ("w-1-2", 1));
    drop(attached);
    assert_eq!(bench.get("alice").await.connections, 1);
}

#[tokio::test]
async fn who_is_inside_is_told_when_it_has_to_end_and_when_it_has_not() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    let mut notices = attached.notices();
    assert_eq!(notices.borrow_and_update().ending, None);
    let at = bench.world.clock().now() + Duration::from_secs(60);
    bench.world.notice("w-1-1", Some(at));
    notices.changed().await.unwrap();
    assert_eq!(notices.borrow_and_update().ending.as_ref().map(|ending| ending.at), Some(at));
    // Who comes now is told as well, and it is shown.
    let late = bench.attach("alice").await;
    assert!(late.notices().borrow().ending.is_some());
    assert!(bench.get("alice").await.lease.unwrap().ending.is_some());
    bench.world.notice("w-1-1", None);
    notices.wait_for(|notice| notice.ending.is_none()).await.unwrap();
    bench.world.revoke("w-1-1", "its GPU time is used up");
    assert_eq!(attached.ended().await, "its lease is over: its GPU time is used up");
    // Who comes next is told; who stops it themselves knows.
    drop((attached, late));
    bench.until_state("alice", WorkspaceState::Stopped).await;
    let next = bench.attach("alice").await;
    assert_eq!(next.last_end(), Some("its lease is over: its GPU time is used up"));
    assert_eq!(bench.attach("alice").await.last_end(), None, "it runs");
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    assert_eq!(bench.attach("alice").await.last_end(), None);
}

#[tokio::test]
async fn who_waits_is_told_who_stopped_it() {
    let bench = Bench::new(1).await;
    let _alice = bench.attach("alice").await;
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    place(&mut bob).await;
    bench.workspaces.stop("bob", "default", "root").await.unwrap();
    assert_eq!(ready(bob).await.err().unwrap().to_string(), "the workspace was stopped: stopped by root");
    assert!(bench.world.lock().queue.is_empty());
}

#[tokio::test]
async fn who_comes_during_a_stop_gets_a_new_container() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    bench.world.close("remove");
    let workspaces = bench.workspaces.clone();
    let stop = tokio::spawn(async move { workspaces.stop("alice", "default", "root").await });
    bench.world.called("remove", 1).await;
    let next = bench.enter("alice", wish("default")).await.unwrap();
    assert_eq!(attached.ended().await, "stopped by root");
    bench.world.open("remove");
    assert_eq!(ready(next).await.unwrap().workload(), "w-1-2");
    stop.await.unwrap().unwrap();
    bench.assert_lawful();
}

#[tokio::test]
async fn an_administrator_stops_a_workload_and_no_later_one() {
    let bench = Bench::new(1).await;
    bench.attach("alice").await;
    for unknown in ["w-1-2", "w-2-1", "j-1-1", "nonsense"] {
        let error = bench.workspaces.stop_workload(unknown, "root").await.err().unwrap();
        assert!(matches!(error, WorkspaceError::NotFound(_)), "{unknown}: {error}");
    }
    let stopped = bench.workspaces.stop_workload("w-1-1", "root").await.unwrap();
    assert_eq!(stopped.state, WorkspaceState::Stopped);
    assert!(bench.workspaces.stop_workload("w-1-1", "root").await.is_err());
    bench.assert_clean().await;
}

#[tokio::test]
async fn a_container_that_ends_by_itself_says_how() {
    for (exit_code, out_of_memory, reason) in [
        (137, true, "its container ran out of memory (exit code 137)"),
        (1, false, "its container ended (exit code 1)"),
    ] {
        let bench = Bench::new(1).await;
        let attached = bench.attach("alice").await;
        bench.world.end_container("w-1-1", exit_code, out_of_memory);
        assert_eq!(attached.ended().await, reason);
        let stopped = bench.until_state("alice", WorkspaceState::Stopped).await;
        assert_eq!(stopped.detail.as_deref(), Some(reason));
        bench.assert_clean().await;
        bench.attach("alice").await;
    }
}

#[tokio::test]
async fn a_lease_that_is_revoked_ends_the_container_and_says_why() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    bench.world.revoke("w-1-1", "GPU 0 has a fatal XID");
    assert_eq!(attached.ended().await, "its lease is over: GPU 0 has a fatal XID");
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
}

#[tokio::test]
async fn an_allocator_that_is_away_for_long_ends_nothing() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    bench.world.set_allocator(false);
    for _ in 0..8 {
        let tries = bench.world.calls("renew");
        bench.world.clock().advance(Duration::from_secs(30));
        bench.world.called("renew", tries + 1).await;
    }
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    bench.world.set_allocator(true);
    bench.pass_time(1).await;
    let expires = bench.world.lock().leases["w-1-1"].expires_at;
    assert!(expires > bench.world.clock().now());
    attached.connect().await.unwrap();
    bench.assert_lawful();
}

#[tokio::test]
async fn what_nobody_wants_is_cleared_away_and_what_is_not_ours_is_left() {
    let bench = Bench::new(3).await;
    let alice = bench.attach("alice").await;
    for name in ["w-1-7", "w-99-1", "w-", "w-nonsense", "j-1-1"] {
        bench.world.leave_container(name, WorkloadSpec { name: name.into(), ..stray() });
    }
    let bench = {
        drop(alice);
        bench.crash().await
    };
    eventually(|| async {
        let names: Vec<String> = bench.world.lock().containers.keys().cloned().collect();
        (names == ["j-1-1", "w-1-1"]).then_some(())
    })
    .await;
    // And one that appears later.
    bench.world.leave_container("w-98-1", stray());
    bench.world.end_container("w-98-1", 0, false);
    eventually(|| async { (bench.world.lock().containers.len() == 2).then_some(()) }).await;
    assert_eq!(bench.attach("alice").await.workload(), "w-1-1");
    bench.assert_lawful();
}
