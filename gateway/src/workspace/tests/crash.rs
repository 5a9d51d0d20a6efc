//! The gateway ends as by `kill -9`, at every place where it can, and another takes over.

use super::{Bench, eventually, place, ready, wish};
use crate::workspace::WorkspaceError;
use mlad::api::WorkspaceState;
use std::time::Duration;

#[tokio::test]
async fn connected_users_find_their_containers_again() {
    let bench = Bench::new(10).await;
    let mut attached = Vec::new();
    for at in 0..10 {
        attached.push(bench.attach(&format!("user{at}")).await);
    }
    let before: Vec<String> = attached.iter().map(|attached| attached.workload().to_owned()).collect();
    let bench = bench.crash().await;
    drop(attached);
    for (at, workload) in before.iter().enumerate() {
        let user = format!("user{at}");
        // They were connected, so the deadline begins now.
        let workspace = eventually(|| async {
            let workspace = bench.get(&user).await;
            workspace.idle_deadline.is_some().then_some(workspace)
        })
        .await;
        assert_eq!(workspace.state, WorkspaceState::Running);
        assert_eq!(bench.attach(&user).await.workload(), workload);
        assert!(bench.world.lock().observed.contains_key(workload));
    }
    assert_eq!(bench.world.calls("create"), 10);
    bench.assert_lawful();
}

#[tokio::test]
async fn a_place_in_the_queue_is_kept_for_a_minute() {
    let bench = Bench::new(1).await;
    let _alice = bench.attach("alice").await;
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    let mut carol = bench.enter("carol", wish("default")).await.unwrap();
    place(&mut bob).await;
    place(&mut carol).await;
    let bench = bench.crash().await;
    assert!(matches!(ready(bob).await.err(), Some(WorkspaceError::ShuttingDown)));
    let mut bob = bench.enter("bob", wish("default")).await.unwrap();
    assert_eq!(place(&mut bob).await, (1, 2));
    bench.pass_time(1).await;
    bench.until_state("carol", WorkspaceState::Stopped).await;
    assert_eq!(bench.world.lock().queue.len(), 1);
    bench.assert_lawful();
}

#[tokio::test]
async fn a_half_done_start_and_a_half_done_stop_are_finished() {
    let bench = Bench::new(2).await;
    bench.attach("bob").await;
    bench.world.close("start");
    let alice = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.called("start", 2).await;
    bench.world.close("remove");
    let workspaces = bench.workspaces.clone();
    let stop = tokio::spawn(async move { workspaces.stop("bob", "default", "root").await });
    bench.world.called("remove", 1).await;
    let bench = bench.crash().await;
    assert!(stop.await.unwrap().is_err());
    drop(alice);
    bench.world.open("start");
    bench.world.open("remove");
    let alice = bench.until_state("alice", WorkspaceState::Running).await;
    assert_eq!(alice.lease.unwrap().workload, "w-2-1");
    let bob = bench.until_state("bob", WorkspaceState::Stopped).await;
    assert_eq!(bob.detail.as_deref(), Some("stopped by root"));
    bench.assert_lawful();
}

#[tokio::test]
async fn a_container_that_ended_meanwhile_and_a_lease_that_did_are_noticed() {
    let bench = Bench::new(3).await;
    for user in ["alice", "bob", "carol"] {
        bench.attach(user).await;
    }
    bench.view.crash();
    bench.world.end_container("w-1-1", 137, true);
    bench.world.revoke("w-2-1", "revoked");
    let bench = bench.crash().await;
    let alice = bench.until_state("alice", WorkspaceState::Stopped).await;
    assert_eq!(alice.detail.as_deref(), Some("its container ran out of memory (exit code 137)"));
    let bob = bench.until_state("bob", WorkspaceState::Stopped).await;
    assert_eq!(bob.detail.as_deref(), Some("its lease was over when the gateway came back"));
    assert_eq!(bench.get("carol").await.state, WorkspaceState::Running);
    assert_eq!(bench.world.lock().containers.keys().collect::<Vec<_>>(), ["w-3-1"]);
    bench.assert_lawful();
}

#[tokio::test]
async fn a_gateway_that_starts_without_an_engine_takes_over_when_it_is_back() {
    let bench = Bench::new(1).await;
    drop(bench.attach("alice").await);
    bench.world.set_engine(false);
    let bench = bench.crash().await;
    let error = ready(bench.enter("alice", wish("default")).await.unwrap()).await.err().unwrap();
    assert_eq!(error.to_string(), "the container engine does not answer: connection refused");
    assert_eq!(bench.get("alice").await.state, WorkspaceState::Running);
    bench.world.set_engine(true);
    let back = eventually(|| async {
        let entering = bench.enter("alice", wish("default")).await.unwrap();
        ready(entering).await.ok()
    })
    .await;
    assert_eq!(back.workload(), "w-1-1");
    assert_eq!(bench.world.calls("create"), 1);
    bench.assert_lawful();
}

/// A life with everything in it: two users on one slice, a wait, a start, a visit, a stop.
async fn live_through(bench: &Bench) {
    let life = async {
        let alice = bench.enter("alice", wish("default")).await?;
        let alice = ready(alice).await?;
        let mut bob = bench.enter("bob", wish("default")).await?;
        place(&mut bob).await;
        drop(alice);
        bench.workspaces.stop("alice", "default", "alice").await?;
        let bob = ready(bob).await?;
        bench.workspaces.extend("bob", "default", 60).await?;
        drop(bob);
        bench.workspaces.stop("bob", "default", "bob").await?;
        Ok::<(), WorkspaceError>(())
    };
    tokio::select! {
        result = life => result.unwrap(),
        () = bench.view.crashed() => {}
    }
}

#[tokio::test]
async fn it_may_end_between_any_two_of_its_calls() {
    for crash_after in 1.. {
        let bench = Bench::new(1).await.crash_to(crash_after).await;
        live_through(&bench).await;
        let crashed = tokio::time::timeout(Duration::ZERO, bench.view.crashed()).await.is_ok();
        let bench = bench.crash().await;
        bench.assert_lawful();
        // Whatever was left is taken over or cleared away, can be stopped, and everybody gets in again.
        for workspace in bench.workspaces.list(None).await.unwrap() {
            let stopped = bench.workspaces.stop(&workspace.user, "default", "root").await.unwrap();
            assert_eq!(stopped.state, WorkspaceState::Stopped, "after a crash at call {crash_after}");
        }
        live_through(&bench).await;
        bench.assert_clean().await;
        for workspace in bench.workspaces.list(None).await.unwrap() {
            assert_eq!(workspace.state, WorkspaceState::Stopped, "after a crash at call {crash_after}");
        }
        if !crashed {
            assert!(crash_after > 40, "the life has more calls than {crash_after}");
            return;
        }
    }
}
