//! Logs that are followed.

use super::*;
use std::{
    io::Write as _,
    os::unix::fs::{chown, symlink},
};

#[tokio::test]
async fn a_log_is_followed_from_before_it_exists_until_the_job_has_ended() {
    let place = Place::new(1);
    let gateway = place.gateway().await;
    let blocker = gateway.submit(GPU).await;
    gateway.until_state(blocker, JobState::Running).await;
    let id = gateway.submit(GPU).await;
    let record = gateway.jobs.record(id).await.unwrap();
    let log = gateway.jobs.log(gateway.user.clone(), record, 3, true).await.unwrap();
    let following = tokio::spawn(log.collect::<Vec<_>>());
    place.world.end("j-1-1", Exit::Status(0), false);
    gateway.until_state(id, JobState::Running).await;
    let folder = place.home().join(".mlad/jobs").join(id.to_string());
    std::fs::create_dir_all(&folder).unwrap();
    let mut file = std::fs::File::create(folder.join("log")).unwrap();
    own(&place.home(), gateway.user.uid);
    let mut wanted = Vec::new();
    for line in 0..2000 {
        let line = format!("line {line}\n");
        file.write_all(line.as_bytes()).unwrap();
        wanted.extend(line.into_bytes());
        if wanted.len() % 97 == 0 {
            tokio::task::yield_now().await;
        }
    }
    place.world.end(&format!("j-{id}-1"), Exit::Status(0), false);
    let chunks = tokio::time::timeout(PATIENCE, following).await.unwrap().unwrap();
    let got: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.unwrap().to_vec()).collect();
    assert_eq!(got, wanted[3..]);
}

#[tokio::test]
async fn a_log_appears_in_whatever_steps_its_folders_do() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let id = gateway.submit(CPU).await;
    gateway.until_state(id, JobState::Running).await;
    let record = gateway.jobs.record(id).await.unwrap();
    let mut log = Box::pin(gateway.jobs.log(gateway.user.clone(), record, 0, true).await.unwrap());
    let mut next = tokio::spawn(async move { log.next().await });
    let mut folder = place.home();
    for part in [".mlad", "jobs", "1"] {
        folder.push(part);
        std::fs::create_dir(&folder).unwrap();
        chown(&folder, Some(gateway.user.uid), Some(gateway.user.uid)).unwrap();
        // Seen or not by now: both must do.
        tokio::task::yield_now().await;
    }
    // As the agent would: it is the user's from the beginning, and comes in by its name.
    std::fs::write(folder.join("made"), "hello").unwrap();
    own(&folder, gateway.user.uid);
    std::fs::rename(folder.join("made"), folder.join("log")).unwrap();
    let bytes = tokio::time::timeout(PATIENCE, &mut next).await.unwrap().unwrap().unwrap().unwrap();
    assert_eq!(bytes, "hello");
}

#[tokio::test]
async fn a_log_that_cannot_be_read_is_told_before_it_is_followed() {
    let place = Place::new(0);
    let gateway = place.gateway().await;
    let id = gateway.submit(CPU).await;
    gateway.until_state(id, JobState::Running).await;
    let elsewhere = place.home().join("elsewhere");
    std::fs::create_dir_all(elsewhere.join("jobs/1")).unwrap();
    std::fs::write(elsewhere.join("jobs/1/log"), "hello").unwrap();
    own(&place.home(), gateway.user.uid);
    symlink("elsewhere", place.home().join(".mlad")).unwrap();
    for follow in [true, false] {
        let record = gateway.jobs.record(id).await.unwrap();
        let error = gateway.jobs.log(gateway.user.clone(), record, 0, follow).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }
}
