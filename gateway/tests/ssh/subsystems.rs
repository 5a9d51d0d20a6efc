//! Subsystems: the gateway's own, and those an image has.

use super::common::{Outcome, Scripted, Site, scripted::until_closed, soon, until};
use mlad::channel::{Frame, Open, Request};
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::Notify;

/// An executable where images have their subsystems. (The agent of these tests runs on this host.)
struct Subsystem(PathBuf);

impl Subsystem {
    fn new(name: &str, script: &str) -> Self {
        let path = Path::new("/usr/lib/mlad/subsystems").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }
}

impl Drop for Subsystem {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
        // Only if it is empty.
        let _ = std::fs::remove_dir(self.0.parent().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_images_own_subsystem_is_started_where_a_workspace_runs() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let name = format!("test-{}", std::process::id());
    let _subsystem = Subsystem::new(&name, "echo ready >&2; cat; exit 4");
    // None is started for it.
    for asked in [&name, "nonsense"] {
        let refused = alice.ssh_with(&["-s"], &[asked]).await.exits(255);
        assert!(refused.stderr.contains("subsystem request failed"), "{}", refused.stderr);
    }
    assert!(site.backend.wishes.lock().unwrap().is_empty());
    alice.ssh("true").await.success();
    let served = alice.ssh_input(&["-s"], &[&name], b"some input").await.exits(4);
    assert_eq!((served.text().as_str(), served.stderr.as_str()), ("some input", "ready\n"));
    // The truth comes from the agent.
    let refused = alice.ssh_with(&["-s"], &["nonsense"]).await.exits(255);
    assert!(refused.stderr.contains("subsystem request failed"), "{}", refused.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subsystem_is_answered_when_its_agent_has_answered() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let answer = Arc::new(Notify::new());
    let answered = answer.clone();
    let agent = Scripted::start(&site.path("scripted.sock"), move |open, mut connection| {
        let answered = answered.clone();
        async move {
            assert_eq!(open, Open::Session);
            connection.writer.write(&Frame::Opened { port: 0 }).await.unwrap();
            while let Ok(Some(Frame::Request(request))) = connection.reader.read().await {
                let Request::Subsystem { name } = request else {
                    connection.writer.write(&Frame::Success).await.unwrap();
                    continue;
                };
                assert_eq!(name, "late");
                answered.notified().await;
                connection.writer.write(&Frame::Failure { message: "no".into() }).await.unwrap();
                return until_closed(connection).await;
            }
        }
    });
    site.agent_is(&agent);
    site.backend.runs.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut waiting = alice.start(&["-s"], &["late"]);
    until("the session", || !agent.opened.lock().unwrap().is_empty()).await;
    assert!(waiting.try_wait().unwrap().is_none());
    answer.notify_one();
    let refused = Outcome::from(soon("the end of ssh", waiting.wait_with_output()).await.unwrap()).exits(255);
    assert!(refused.stderr.contains("subsystem request failed"), "{}", refused.stderr);
}
