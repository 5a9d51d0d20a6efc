//! An engine that goes away and comes back: a private one, started by the test.

use crate::stage::{self, Stage, quiet};
use futures::StreamExt as _;
use mlad_gateway::runtime::{FoundState, Runtime as _, RuntimeError, RuntimeEvent};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// A `dockerd` with everything in one folder.
struct Engine {
    folder: tempfile::TempDir,
    process: Option<Child>,
}

impl Engine {
    fn new() -> Self {
        // Short: containerd's socket is deep inside, and socket paths are bounded.
        Self { folder: tempfile::Builder::new().prefix("dk").tempdir_in("/tmp").unwrap(), process: None }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("d.sock")
    }

    /// Starts it; it says itself when it is ready, by answering.
    fn start(&mut self) {
        let path = |name: &str| self.folder.path().join(name);
        let log = std::fs::File::options().create(true).append(true).open(path("log")).unwrap();
        // In a network namespace of its own: two engines in one would fight over the default bridge.
        let process = Command::new("unshare")
            .args(["--net", "dockerd", "--data-root"])
            .arg(path("data"))
            .arg("--exec-root")
            .arg(path("x"))
            .arg("--pidfile")
            .arg(path("pid"))
            .arg("-H")
            .arg(format!("unix://{}", self.socket().display()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(process);
    }

    fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = Command::new("kill").arg(process.id().to_string()).status();
            let _ = process.wait();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        let script =
            "awk -v folder=\"$1/\" 'index($2, folder) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount";
        let _ = Command::new("sh").args(["-c", script, "sh"]).arg(self.folder.path()).status();
    }
}

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
    let mut engine = Engine::new();
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
