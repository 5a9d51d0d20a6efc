//! Who gets in, how, and who is refused.

use super::{Bench, eventually, place, ready, wish, wish_for};
use crate::{
    runtime::Mount,
    workspace::{Progress, WorkspaceError},
};
use mlad::api::WorkspaceState;
use std::collections::BTreeSet;

#[tokio::test]
async fn many_logins_make_one_container() {
    let bench = Bench::new(4).await;
    let mut entering = Vec::new();
    for _ in 0..10 {
        entering.push(bench.enter("alice", wish("default")).await.unwrap());
    }
    let mut attached = Vec::new();
    for entering in entering {
        attached.push(ready(entering).await.unwrap());
    }
    assert_eq!(bench.world.calls("create"), 1);
    assert_eq!(bench.world.lock().leases.len(), 1);
    assert_eq!(bench.get("alice").await.connections, 10);
    {
        let state = bench.world.lock();
        let spec = &state.containers["w-1-1"].spec;
        assert_eq!((spec.hostname.as_str(), spec.image.as_str()), ("default", "sha256:mlad/base:1"));
        assert_eq!((spec.agent.user.as_str(), spec.agent.uid, spec.agent.gid), ("alice", 20_000, 20_000));
        assert_eq!(spec.agent.environment["NVIDIA_VISIBLE_DEVICES"], spec.gpu_uuids[0]);
        assert_eq!(spec.agent.environment["MLAD_SLICE"], "1g.5gb");
        assert_eq!(spec.agent.environment["MLAD_WORKSPACE"], "default");
        let home = bench.config.home_of("alice");
        assert!(home.join(".profile").exists());
        assert_eq!(
            spec.mounts,
            [
                Mount { source: home, target: "/home/alice".into(), read_only: false },
                Mount { source: bench.config.datasets(), target: "/datasets".into(), read_only: true },
            ]
        );
        assert_eq!(state.observed["w-1-1"], "alice");
        assert_eq!(state.violations, Vec::<String>::new());
    }
    assert_eq!(attached[0].workload(), "w-1-1");
    attached[0].connect().await.unwrap();
}

#[tokio::test]
async fn a_clone_of_a_connection_counts() {
    let bench = Bench::new(1).await;
    let attached = bench.attach("alice").await;
    let copies = vec![attached.clone(); 3];
    assert_eq!(bench.get("alice").await.connections, 4);
    drop(attached);
    assert_eq!(bench.get("alice").await.connections, 3);
    assert_eq!(bench.get("alice").await.idle_deadline, None);
    drop(copies);
    assert_eq!(bench.get("alice").await.connections, 0);
    eventually(|| async { bench.get("alice").await.idle_deadline }).await;
}

#[tokio::test]
async fn the_last_who_leaves_gives_the_place_back() {
    let bench = Bench::new(1).await;
    let alice = bench.attach("alice").await;
    let mut first = bench.enter("bob", wish("default")).await.unwrap();
    let second = bench.enter("bob", wish("default")).await.unwrap();
    assert_eq!(place(&mut first).await, (1, 1));
    drop(first);
    assert_eq!(bench.get("bob").await.state, WorkspaceState::Waiting);
    assert_eq!(bench.world.lock().queue.len(), 1);
    drop(second);
    let stopped = bench.until_state("bob", WorkspaceState::Stopped).await;
    assert_eq!(stopped.detail.as_deref(), Some("nobody waits for it any more"));
    assert!(bench.world.lock().queue.is_empty());
    assert_eq!(alice.workload(), "w-1-1");
    bench.assert_lawful();
}

#[tokio::test]
async fn who_gives_up_while_the_container_starts_leaves_nothing_behind() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let entering = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.called("start", 1).await;
    drop(entering);
    bench.world.open("start");
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.assert_clean().await;
}

#[tokio::test]
async fn who_comes_while_the_last_one_gives_up_during_a_start_gets_in() {
    let bench = Bench::new(1).await;
    bench.world.close("start");
    let first = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.called("start", 1).await;
    drop(first);
    let second = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.open("start");
    assert_eq!(ready(second).await.unwrap().workload(), "w-1-1");
    assert_eq!(bench.world.calls("create"), 1);
    bench.assert_lawful();
}

#[tokio::test]
async fn forty_users_share_twenty_four_slices() {
    let bench = Bench::new(24).await;
    let mut inside = Vec::new();
    let mut outside = Vec::new();
    for at in 0..40 {
        let entering = bench.enter(&format!("user{at}"), wish_for("default", "base", "2g.10gb")).await.unwrap();
        if at < 24 { inside.push(ready(entering).await.unwrap()) } else { outside.push(entering) }
    }
    let uuids: BTreeSet<String> =
        inside.iter().flat_map(|attached| attached.workspace().lease.clone().unwrap().uuids).collect();
    assert_eq!(uuids.len(), 24);
    for (at, entering) in outside.iter_mut().enumerate() {
        let expected = u32::try_from(at + 1).unwrap();
        while place(entering).await != (expected, 16) {}
    }
    for left in 1..=16 {
        let leaving = inside.remove(0);
        let user = leaving.workspace().user.clone();
        drop(leaving);
        bench.workspaces.stop(&user, "default", &user).await.unwrap();
        inside.push(ready(outside.remove(0)).await.unwrap());
        for (at, entering) in outside.iter_mut().enumerate() {
            let expected = (u32::try_from(at + 1).unwrap(), 16 - left);
            while place(entering).await != expected {}
        }
    }
    assert_eq!(bench.world.lock().containers.len(), 24);
    bench.assert_lawful();
}

#[tokio::test]
async fn what_can_never_be_is_refused_at_once() {
    let bench = Bench::new(1).await;
    let enter = |wish| bench.enter("alice", wish);
    let error = async |wish| enter(wish).await.err().expect("it is refused");
    for name in ["", "Default", "a b", "../x", &"x".repeat(33)] {
        assert!(matches!(error(wish(name)).await, WorkspaceError::Name(_)), "{name}");
    }
    let unknown = error(wish_for("default", "bse", "1g.5gb")).await;
    assert!(matches!(&unknown, WorkspaceError::Image(text) if text.contains("did you mean base")), "{unknown}");
    let impossible = error(wish_for("default", "base", "80G")).await;
    assert!(
        matches!(&impossible, WorkspaceError::Impossible(text) if text.contains("7g.40gb would fit")),
        "{impossible}"
    );
    let small = error(wish_for("default", "torch", "1g.5gb")).await;
    assert_eq!(small.to_string(), "the image torch needs 8000 MiB of GPU memory, 1g.5gb has 4864 MiB");
    assert!(bench.workspaces.list(None).await.unwrap().is_empty());
    assert_eq!(bench.world.calls("request"), 0);
}

#[tokio::test]
async fn what_a_quota_never_allows_is_refused_at_once() {
    let bench = Bench::new(1).await;
    let mut alice = bench.user("alice").await;
    alice.quota.gpu_memory_mib = Some(5000);
    let error = bench.workspaces.enter(&alice, wish_for("default", "base", "2g.10gb")).await.err().unwrap();
    assert_eq!(error.to_string(), "your quota allows 5000 MiB of GPU memory, 2g.10gb has 9856 MiB");
    alice.quota.slices = Some(0);
    let error = bench.workspaces.enter(&alice, wish("default")).await.err().unwrap();
    assert!(matches!(error, WorkspaceError::Quota(_)));
    // Without a GPU it goes.
    let entering = bench.workspaces.enter(&alice, wish_for("default", "base", "cpu")).await.unwrap();
    let attached = ready(entering).await.unwrap();
    assert_eq!(
        bench.world.lock().containers[attached.workload()].spec.agent.environment["NVIDIA_VISIBLE_DEVICES"],
        "void"
    );
}

#[tokio::test]
async fn without_defaults_a_login_must_say_what_it_wants_and_is_remembered() {
    let bench = Bench::with(1, "idle_minutes = 1").await;
    assert!(matches!(bench.enter("alice", wish("default")).await.err(), Some(WorkspaceError::NoImage)));
    let mut image_only = wish("default");
    image_only.image = Some("base".into());
    assert!(matches!(bench.enter("alice", image_only).await.err(), Some(WorkspaceError::NoNeed)));
    drop(ready(bench.enter("alice", wish_for("default", "torch", "10GiB")).await.unwrap()).await.unwrap());
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    let again = bench.attach("alice").await;
    assert_eq!(again.workspace().image, "torch");
    assert_eq!(again.workspace().need.to_string(), "10GiB");
    assert_eq!(again.workload(), "w-1-2");
}

#[tokio::test]
async fn one_that_runs_is_not_silently_something_else() {
    let bench = Bench::new(2).await;
    let inside = bench.attach("alice").await;
    let image = bench.enter("alice", wish_for("default", "torch", "1g.5gb")).await.err().unwrap();
    assert_eq!(image.to_string(), "the workspace default is running with the image base, not torch");
    assert!(image.hint().unwrap().contains("mlad workspace stop default"));
    assert!(image.hint().unwrap().contains("ssh mlad+other@server"));
    let slice = bench.enter("alice", wish_for("default", "base", "2g.10gb")).await.err().unwrap();
    assert_eq!(slice.to_string(), "the workspace default is running with the slice 1g.5gb, not 2g.10gb");
    // Another word for what it has is no contradiction.
    let same = ready(bench.enter("alice", wish_for("default", "base", "4G")).await.unwrap()).await.unwrap();
    assert_eq!(same.workload(), inside.workload());
    // And once it is stopped, the wish is granted.
    bench.workspaces.stop("alice", "default", "alice").await.unwrap();
    let other = ready(bench.enter("alice", wish_for("default", "torch", "2g.10gb")).await.unwrap()).await.unwrap();
    assert_eq!((other.workload(), other.workspace().image.as_str()), ("w-1-2", "torch"));
    bench.assert_lawful();
}

#[tokio::test]
async fn of_two_who_wish_different_things_at_once_one_is_told() {
    let bench = Bench::new(2).await;
    bench.world.close("request");
    let first = bench.enter("alice", wish_for("default", "base", "1g.5gb")).await.unwrap();
    bench.world.called("request", 1).await;
    let second = bench.enter("alice", wish_for("default", "base", "2g.10gb")).await.err().unwrap();
    assert_eq!(second.to_string(), "the workspace default is waiting with the slice 1g.5gb, not 2g.10gb");
    let third = bench.enter("alice", wish("default")).await.unwrap();
    bench.world.open("request");
    assert_eq!(ready(first).await.unwrap().workload(), ready(third).await.unwrap().workload());
}

#[tokio::test]
async fn a_workspace_has_many_names_up_to_a_limit_and_forgets_the_oldest() {
    let bench = Bench::with(9, "max_per_user = 2\ndefault_image = 'base'\ndefault_need = 'cpu'").await;
    let first = ready(bench.enter("alice", wish("first")).await.unwrap()).await.unwrap();
    let second = ready(bench.enter("alice", wish("second")).await.unwrap()).await.unwrap();
    let error = bench.enter("alice", wish("third")).await.err().unwrap();
    assert_eq!(error.to_string(), "you have 2 workspaces in use (first, second); that is the limit");
    assert!(bench.enter("bob", wish("first")).await.is_ok());
    drop((first, second));
    bench.workspaces.stop("alice", "first", "alice").await.unwrap();
    ready(bench.enter("alice", wish("third")).await.unwrap()).await.unwrap();
    let names: Vec<String> =
        bench.workspaces.list(Some("alice")).await.unwrap().into_iter().map(|workspace| workspace.name).collect();
    assert_eq!(names, ["second", "third"]);
}

#[tokio::test]
async fn an_image_that_is_elsewhere_is_fetched_before_a_slice_is_asked_for() {
    let bench = Bench::new(1).await;
    bench.world.close("pull");
    let mut entering = bench.enter("alice", wish_for("default", "far", "1g.5gb")).await.unwrap();
    let Progress::Pulling { done, total } = entering.next().await.unwrap() else { panic!("it is fetched") };
    assert_eq!((done, total), (1 << 20, Some(4 << 20)));
    assert_eq!(bench.world.calls("request"), 0);
    // Whoever does not want to wait for that may go.
    drop(entering);
    bench.until_state("alice", WorkspaceState::Stopped).await;
    bench.world.open("pull");
    let attached = ready(bench.enter("alice", wish_for("default", "far", "1g.5gb")).await.unwrap()).await.unwrap();
    assert_eq!(bench.world.lock().containers[attached.workload()].spec.image, "sha256:registry.example/far:1");
}

#[tokio::test]
async fn stopped_workspaces_cost_nothing() {
    let bench = Bench::with(1, "max_per_user = 100\ndefault_image = 'base'\ndefault_need = 'cpu'").await;
    for at in 0..20 {
        let name = format!("w{at}");
        drop(ready(bench.enter("alice", wish(&name)).await.unwrap()).await.unwrap());
        bench.workspaces.stop("alice", &name, "alice").await.unwrap();
    }
    eventually(|| async { (bench.workspaces.controller.actors() == 0).then_some(()) }).await;
    assert_eq!(bench.workspaces.list(None).await.unwrap().len(), 20);
    bench.assert_clean().await;
}
