//! Logs and artifacts.

use super::*;
use mlad::client::Digest;
use sha2::{Digest as _, Sha256};
use std::os::unix::fs::symlink;

#[tokio::test]
async fn no_path_leads_out_of_the_artifacts() {
    let site = Site::start().await;
    let alice = site.person("alice");
    let id = alice.submit(&spec(r#"{"command": ["x"], "hold": true}"#)).await.unwrap().id;
    let secret = site.put("bob", "secret", b"bob's").await;
    let kept = site.put("alice", &format!(".mlad/jobs/{id}/artifacts/good"), b"0123456789").await;
    let folder = kept.parent().unwrap();
    symlink(&secret, folder.join("link")).unwrap();
    symlink("/etc", folder.join("etc")).unwrap();
    for path in ["link", "etc/passwd", "../../../../../bob/secret", "%2e%2e/x", "/etc/passwd", "..", "", "good/x"] {
        assert_eq!(code(alice.artifact(id, path).await), ErrorCode::NotFound, "{path}");
    }
    let listed = alice.artifacts(id).await.unwrap().artifacts;
    assert_eq!(listed.iter().map(|artifact| artifact.path.as_str()).collect::<Vec<_>>(), ["good"]);
    // A log that is a link to somebody else's file is none.
    symlink(&secret, folder.parent().unwrap().join("log")).unwrap();
    assert_eq!(code(alice.log(id, 0, false).await), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_range_of_an_artifact_is_answered_as_http_says() {
    let site = Site::start().await;
    let alice = site.person("alice");
    let id = alice.submit(&spec(r#"{"command": ["x"], "hold": true}"#)).await.unwrap().id;
    site.put("alice", &format!(".mlad/jobs/{id}/artifacts/a b"), b"0123456789").await;
    let socket = site.socket(Identity { user: "alice".into(), role: Role::User, workload: None });
    let get = |range: &str| {
        format!(
            "GET /v1/jobs/{id}/artifacts/a%20b HTTP/1.1\r\nHost: mlad\r\nConnection: close\r\nRange: {range}\r\n\r\n"
        )
    };
    let part = raw(&socket, &get("bytes=2-4")).await;
    assert!(part.starts_with("HTTP/1.1 206") && part.contains("content-range: bytes 2-4/10"), "{part}");
    assert!(part.ends_with("\r\n\r\n234"), "{part}");
    let beyond = raw(&socket, &get("bytes=10-")).await;
    assert!(beyond.starts_with("HTTP/1.1 416") && beyond.contains("content-range: bytes */10"), "{beyond}");
    assert!(raw(&socket, &get("bytes=a-b")).await.ends_with("\r\n\r\n0123456789"));
}

#[tokio::test]
async fn a_file_comes_with_its_checksum_and_without_one_if_it_changed_on_the_way() {
    let site = Site::start().await;
    let alice = site.person("alice");
    let id = alice.submit(&spec(r#"{"command": ["x"], "hold": true}"#)).await.unwrap().id;
    // More than all the buffers on its way take.
    let content: Vec<u8> = (0..32 * 1024 * 1024_u32).map(|at| (at % 251) as u8).collect();
    let path = site.put("alice", &format!(".mlad/jobs/{id}/artifacts/large"), &content).await;
    let mut answer = alice.artifact(id, "large").await.unwrap();
    assert_eq!(answer.digest(), &Digest::Missing, "not yet");
    let mut got = Vec::new();
    while let Some(piece) = answer.next().await.unwrap() {
        got.extend_from_slice(&piece);
    }
    assert!(got == content);
    assert_eq!(answer.digest(), &Digest::Sum(Sha256::digest(&content).to_vec()));

    for shorter in [false, true] {
        let mut answer = alice.artifact(id, "large").await.unwrap();
        answer.next().await.unwrap().unwrap();
        if shorter {
            fs::File::options().write(true).open(&path).unwrap().set_len(1_000_000).unwrap();
        } else {
            fs::write(&path, &content).unwrap();
        }
        while answer.next().await.unwrap().is_some() {}
        assert_eq!(answer.digest(), &Digest::Missing, "shorter: {shorter}");
    }

    site.put("alice", &format!(".mlad/jobs/{id}/artifacts/empty"), b"").await;
    let mut answer = alice.artifact(id, "empty").await.unwrap();
    assert_eq!(answer.next().await.unwrap(), None);
    assert_eq!(answer.digest(), &Digest::Sum(Sha256::digest(b"").to_vec()));
}

#[tokio::test]
async fn a_list_of_files_reads_none_of_them() {
    let site = Site::start().await;
    let alice = site.person("alice");
    let id = alice.submit(&spec(r#"{"command": ["x"], "hold": true}"#)).await.unwrap().id;
    let path = site.put("alice", &format!(".mlad/jobs/{id}/artifacts/huge"), b"").await;
    // Nothing on the disk, and days to read.
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 43).unwrap();
    let listed = tokio::time::timeout(PATIENCE, alice.artifacts(id)).await.unwrap().unwrap().artifacts;
    assert_eq!((listed.len(), listed[0].size), (1, 1 << 43));
}

#[tokio::test]
async fn a_followed_log_that_cannot_be_read_is_an_error_and_no_broken_answer() {
    let site = Site::start().await;
    let alice = site.person("alice");
    let id = alice.submit(&spec(r#"{"command": ["x"], "hold": true}"#)).await.unwrap().id;
    site.put("alice", &format!(".mlad/jobs/{id}/log"), b"0123456789").await;
    let last = i64::MAX.unsigned_abs();
    assert_eq!(whole(alice.log(id, last, false).await.unwrap()).await, b"");
    for follow in [false, true] {
        assert_eq!(code(alice.log(id, last + 1, follow).await), ErrorCode::BadRequest);
    }
    let home = site.folder.path().join("home/alice");
    fs::rename(home.join(".mlad"), home.join("elsewhere")).unwrap();
    symlink("elsewhere", home.join(".mlad")).unwrap();
    for follow in [false, true] {
        let Err(ClientError::Api(error)) = alice.log(id, 0, follow).await else { panic!("it was answered") };
        assert!(error.message.contains("symbolic link") && error.hint.is_some(), "{error:?}");
    }
}
