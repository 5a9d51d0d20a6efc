//! The file `result`.

use super::*;
use mlad::api::JobEnd;
use std::os::unix::fs::{MetadataExt as _, chown, symlink};

fn result(place: &Place, id: JobId) -> JobEnd {
    let path = place.home().join(format!(".mlad/jobs/{id}/result"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[tokio::test]
async fn a_job_that_has_ended_has_its_result_beside_its_log() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    for (exit, code, signal) in [(Exit::Status(3), Some(3), None), (killed(), None, Some("KILL"))] {
        let id = gateway.submit(CPU).await;
        gateway.until_state(id, JobState::Running).await;
        place.world.end(&format!("j-{id}-1"), exit, signal.is_some());
        let job = gateway.until(id, |job| job.state.has_ended()).await;
        let end = result(&place, id);
        assert_eq!((end.id, end.state, end.attempt), (id, JobState::Failed, 1));
        assert_eq!((end.exit_code, end.signal.as_deref()), (code, signal));
        assert_eq!((end.reason, &end.detail), (job.reason, &job.detail));
        assert_eq!((end.started_at, end.ended_at), (job.started_at, job.ended_at));
        let status = std::fs::metadata(place.home().join(format!(".mlad/jobs/{id}/result"))).unwrap();
        assert_eq!((status.uid(), status.gid()), (gateway.user.uid, gateway.user.uid));
    }
    // Also one that never ran.
    let held = gateway.submit(r#"{"command": ["x"], "hold": true}"#).await;
    gateway.jobs.cancel(held, "bob").await.unwrap();
    gateway.until_state(held, JobState::Cancelled).await;
    let end = result(&place, held);
    assert_eq!((end.state, end.reason, end.attempt), (JobState::Cancelled, Some(JobReason::Cancelled), 0));
    assert_eq!(end.detail.as_deref(), Some("cancelled by bob"));
}

#[tokio::test]
async fn a_result_that_cannot_be_written_keeps_no_job_from_ending_and_goes_nowhere_else() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let id = gateway.submit(CPU).await;
    gateway.until_state(id, JobState::Running).await;
    let outside = tempfile::tempdir().unwrap();
    chown(outside.path(), Some(gateway.user.uid), None).unwrap();
    symlink(outside.path(), place.home().join(".mlad")).unwrap();
    place.world.end("j-1-1", Exit::Status(0), false);
    gateway.until_state(id, JobState::Succeeded).await;
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
}
