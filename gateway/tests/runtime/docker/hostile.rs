//! A container whose root is not our friend.

use crate::stage::{self, Stage};
use mlad_gateway::runtime::{Runtime as _, RuntimeError};
use std::time::Duration;
use tokio::net::UnixListener;

#[tokio::test]
async fn a_link_in_the_sockets_place_leads_nowhere() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    stage.start(&stage.spec("w-1-1").await).await;
    let secret = stage.folder().join("admin.sock");
    let admin = UnixListener::bind(&secret).unwrap();
    for target in [secret.to_str().unwrap(), engine.to_str().unwrap(), "../../../admin.sock", "/proc/1/root"] {
        // The link hides the socket: the next order goes through a connection made before.
        let stream = stage.docker.connect("w-1-1").await.unwrap();
        let folder = "/run/mlad/agent";
        assert_eq!(stage.tell("w-1-1", &format!("link {target} {folder}/agent.sock")).await, "done");
        let error = stage.docker.connect("w-1-1").await.unwrap_err();
        assert!(matches!(error, RuntimeError::Agent { .. }), "{error}");
        assert_eq!(stage::tell(stream, &format!("link {target} {folder}/result.json")).await, "done");
        assert_eq!(stage.docker.result("w-1-1").await.unwrap(), None);
        // Put it back for the next round.
        stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
        stage.start(&stage.spec("w-1-1").await).await;
    }
    assert!(futures::FutureExt::now_or_never(admin.accept()).is_none());
}

#[tokio::test]
async fn what_it_leaves_in_its_folder_does_not_outlive_it() {
    let Some(engine) = stage::engine() else { return };
    let stage = Stage::new(&engine, |_| {}).await;
    stage.start(&stage.spec("w-1-1").await).await;
    assert_eq!(stage.tell("w-1-1", "write /run/mlad/agent/result.json {\"status\":0}").await, "done");
    let folder = stage.config.run_directory.join("workloads/w-1-1");
    assert_eq!(std::fs::metadata(folder.join("result.json")).unwrap().len(), 12);
    // A workspace that ended is made anew under the same name; nothing of the old one is in it.
    stage.tell("w-1-1", "exit 0").await;
    stage.start(&stage.spec("w-1-1").await).await;
    assert_eq!(stage.docker.result("w-1-1").await.unwrap(), None);
    stage.docker.remove("w-1-1", Duration::ZERO).await.unwrap();
    assert!(!folder.exists());
}
