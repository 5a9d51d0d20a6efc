//! What a workspace counts for.

use super::{Bench, ready, wish};
use crate::workspace::{Wish, WorkspaceError};
use mlad::api::NewProject;

async fn with_vision() -> Bench {
    let bench = Bench::new(2).await;
    let alice = bench.user("alice").await;
    bench.store.add_project(&NewProject { name: "vision".into(), parent: None }).await.unwrap();
    bench.store.add_member("vision", alice.id).await.unwrap();
    bench
}

fn wish_of(project: &str) -> Wish {
    Wish { project: Some(project.into()), ..wish("default") }
}

#[tokio::test]
async fn it_counts_for_the_project_it_was_started_with_and_for_it_again_until_another_is_named() {
    let bench = with_vision().await;
    let attached = ready(bench.enter("alice", wish_of("vision")).await.unwrap()).await.unwrap();
    assert_eq!(attached.workspace().project.as_deref(), Some("vision"));
    assert_eq!(bench.world.lock().leases["w-1-1"].project.as_deref(), Some("vision"));
    assert_eq!(bench.world.lock().containers["w-1-1"].spec.agent.environment["MLAD_PROJECT"], "vision");
    // While it runs it counts for nothing else.
    let other = bench.enter("alice", wish_of("none")).await.err().unwrap();
    assert!(matches!(other, WorkspaceError::Differs { what: "the project", .. }), "{other}");
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    drop(attached);
    assert_eq!(bench.attach("alice").await.workspace().project.as_deref(), Some("vision"));
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    let none = ready(bench.enter("alice", wish_of("none")).await.unwrap()).await.unwrap();
    assert_eq!(none.workspace().project, None);
    bench.assert_lawful();
}

#[tokio::test]
async fn only_members_charge_a_project_and_one_that_they_left_is_not_charged_again() {
    let bench = with_vision().await;
    for (user, project) in [("bob", "vision"), ("alice", "nothing")] {
        let refused = bench.enter(user, wish_of(project)).await.err().unwrap();
        assert!(matches!(refused, WorkspaceError::Project(_)), "{refused}");
    }
    let alice = bench.user("alice").await;
    bench.store.set_default_project(alice.id, Some("vision")).await.unwrap();
    assert_eq!(bench.attach("alice").await.workspace().project.as_deref(), Some("vision"));
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    bench.store.remove_member("vision", alice.id).await.unwrap();
    assert_eq!(bench.attach("alice").await.workspace().project, None);
}
