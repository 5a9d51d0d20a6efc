//! An engine that goes away and comes back: a private one, started by the test.

use super::engine::Engine;
use crate::stage::{self, Stage, quiet};
use futures::StreamExt as _;
use mlad_gateway::runtime::{FoundState, Runtime as _, RuntimeError, RuntimeEvent};
use std::{path::Path, time::Duration};

fn is_unavailable<T: std::fmt::Debug>(result: Result<T, RuntimeError>, socket: &Path) {
    match result {
        Err(error @ RuntimeError::Unavailable(_)) => {
            assert!(error.to_string().contains(socket.to_str().unwrap()), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_engine_that_was_away_is_found_again_by_itself() {
    if stage::engine().is_none() {
        return;
    }
    // In a network namespace of its own: two engines in one would fight over the default bridge.
    let mut engine = Engine::new(&["unshare", "--net"]);
    let socket = engine.socket();

    // The gateway starts before its engine does.
    let folder = tempfile::tempdir().unwrap();
    let config = stage::config(&socket, &stage::stand_in(), folder.path(), |_| {});
    let early = mlad_gateway::runtime::Docker::connect(&config).await.unwrap();
    is_unavailable(early.list().await, &socket);
    let mut events = early.events();
    let waiting = tokio::spawn(async move { events.next().await });
    engine.start();
    assert_eq!(waiting.await.unwrap(), Some(RuntimeEvent::Resync));
    assert!(early.list().await.unwrap().is_empty());
    early.uninstall().await.unwrap();

    let stage = Stage::new(&socket, |_| {}).await;
    let spec = stage.spec("w-1-1").await;
    stage.start(&spec).await;
    let mut events = stage.docker.events();
    assert_eq!(events.next().await, Some(RuntimeEvent::Resync));

    engine.stop();
    is_unavailable(stage.docker.list().await, &socket);
    is_unavailable(stage.docker.inspect("w-1-1").await, &socket);
    is_unavailable(stage.docker.start(&spec, &quiet).await, &socket);
    is_unavailable(stage.docker.remove("w-1-1", Duration::ZERO).await, &socket);
    is_unavailable(stage.docker.terminate("w-1-1").await, &socket);
    is_unavailable(stage.docker.resolve_image("mlad/base:1", &quiet).await, &socket);
    is_unavailable(stage.docker.connect("w-1-1").await, &socket);

    engine.start();
    // News of the end itself may come first.
    while events.next().await != Some(RuntimeEvent::Resync) {}
    let found = stage.docker.inspect("w-1-1").await.unwrap().unwrap();
    assert!(matches!(found.state, FoundState::Ended(_)), "{found:?}");
    stage.start(&spec).await;
    assert_eq!(stage.tell("w-1-1", "environment MLAD_TEST_OF_IMAGE").await, "kept");
    drop(stage);
}
