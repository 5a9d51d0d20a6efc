//! A private engine.

use crate::stage;
use futures::StreamExt as _;
use mlad_gateway::{
    config::Firewall,
    runtime::{Docker, Runtime as _, RuntimeEvent},
};
use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

/// Longest wait for an engine to answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A `dockerd` with everything in one folder.
pub(super) struct Engine {
    folder: tempfile::TempDir,
    process: Option<Child>,
    within: Vec<String>,
}

impl Engine {
    /// One that is started by `within`, a program and arguments that put it into a network namespace.
    pub(super) fn new(within: &[&str]) -> Self {
        // Short: containerd's socket is deep inside, and socket paths are bounded.
        let folder = tempfile::Builder::new().prefix("dk").tempdir_in("/tmp").unwrap();
        Self { folder, process: None, within: within.iter().map(|word| (*word).to_owned()).collect() }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("d.sock")
    }

    /// Starts it; it says itself when it is ready, by answering.
    pub(super) fn start(&mut self) {
        let path = |name: &str| self.folder.path().join(name);
        let log = std::fs::File::options().create(true).append(true).open(path("log")).unwrap();
        let process = Command::new(&self.within[0])
            .args(&self.within[1..])
            .args(["dockerd", "--data-root"])
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

    /// Returns when it answers.
    pub(super) async fn answers(&self) {
        let folder = tempfile::tempdir().unwrap();
        let no_rules = |config: &mut mlad_gateway::config::Config| config.docker.firewall = Firewall::None;
        let config = stage::config(&self.socket(), &stage::stand_in(), folder.path(), no_rules);
        let docker = Docker::connect(&config).await.unwrap();
        let first = tokio::time::timeout(PATIENCE, docker.events().next()).await;
        assert_eq!(first.expect("the engine does not answer"), Some(RuntimeEvent::Resync));
        docker.uninstall().await.unwrap();
    }

    pub(super) fn stop(&mut self) {
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
