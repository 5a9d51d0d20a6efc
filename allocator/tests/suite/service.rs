//! What only the program has: tokens, sockets, settings.

use crate::{
    get,
    host::{Host, Running, token},
    machine::Machine,
    rules,
};
use mlad_allocator::{
    Allocate, AllocatorError,
    service::{HttpAllocator, Token},
};
use std::{fs, os::unix::fs::PermissionsExt, process::Command, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_only_with_the_token() {
    rules::repeats(Host::Tcp).await;
    let machine = Machine::new("A30-24GB", 1);
    let running = Host::Tcp.start(&machine).await;
    get(running.allocator(), "w-1-1", "1g.6gb").await;
    let Running::Program(program) = &running else { unreachable!() };
    for token in [None, Some(token(&machine, "other", "another-token-of-some-length"))] {
        let client = HttpAllocator::new(&program.url, token.as_ref()).unwrap();
        let error = client.leases().await.unwrap_err();
        assert!(matches!(&error, AllocatorError::Unreachable { reason, .. } if reason.contains("token")), "{error}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_finds_a_server_that_came_back() {
    let machine = Machine::new("A30-24GB", 1);
    let running = Host::Unix.start(&machine).await;
    let Running::Program(program) = &running else { unreachable!() };
    let client = HttpAllocator::new(&program.url, None).unwrap();
    get(&client, "w-1-1", "1g.6gb").await;
    running.stop().await;
    let error = client.leases().await.unwrap_err();
    assert!(matches!(error, AllocatorError::Unreachable { .. }), "{error}");
    let running = Host::Unix.start(&machine).await;
    assert_eq!(client.leases().await.unwrap().len(), 1);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_allocators_do_not_share_a_database() {
    let machine = Machine::new("A30-24GB", 1);
    let running = Host::Unix.start(&machine).await;
    let error = mlad_allocator::Embedded::start(machine.settings()).await.map(drop).unwrap_err();
    assert!(matches!(&error, AllocatorError::Settings(text) if text.contains("another allocator")), "{error}");
    running.stop().await;
}

/// One call by hand: its status, and its body as JSON.
async fn call(url: &str, head: &str, body: &str) -> (String, serde_json::Value) {
    let talk = async {
        let mut stream = TcpStream::connect(url.strip_prefix("http://").unwrap()).await.unwrap();
        let length = body.len();
        let text = format!("{head}\r\nHost: mlad\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = timeout(Duration::from_secs(60), talk).await.expect("no answer");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().to_owned();
    (status, serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}")))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_told_in_json() {
    let machine = Machine::new("A30-24GB", 1);
    let running = Host::Tcp.start(&machine).await;
    let Running::Program(program) = &running else { unreachable!() };
    let token = "Authorization: Bearer a-token-of-some-length\r\nContent-Type: application/json";
    for (line, head, body, status, kind) in [
        ("GET /v1/leases", "X: y", "", "401", "no-token"),
        ("GET /v1/nothing", token, "", "404", "no-such-call"),
        ("PUT /v1/leases", token, "", "405", "no-such-call"),
        ("GET /v1/requests/w-1-1", token, "", "404", "unknown"),
        ("GET /v1/requests/%ff", token, "", "400", "invalid"),
        ("GET /v1/changed?seen=x", token, "", "400", "invalid"),
        ("POST /v1/resolve", token, "{", "400", "invalid"),
        ("POST /v1/resolve", token, "{\"need\": \"9g.99gb\"}", "422", "impossible"),
        ("POST /v1/requests/w-1-1/renew", token, "{\"fence\": 1, \"more\": 1}", "400", "invalid"),
    ] {
        let (told, json) = call(&program.url, &format!("{line} HTTP/1.1\r\n{head}"), body).await;
        assert_eq!((told.as_str(), json["kind"].as_str()), (status, Some(kind)), "{line}: {json}");
        assert!(json["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{line}: {json}");
    }
    running.stop().await;
}

#[test]
fn a_token_that_others_can_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    fs::write(&file, "a-token-of-some-length\n").unwrap();
    for (mode, fine) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false), (0o644, false)] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        match Token::read(&file) {
            Ok(_) => assert!(fine, "{mode:o}"),
            Err(AllocatorError::Settings(text)) => {
                assert!(!fine && text.contains(&format!("mode {mode:04o}")) && text.contains("chmod 600"), "{text}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn wrong_settings_are_told_with_key_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let serve = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mlad-allocator")).arg("serve").args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let file = folder.path().join("allocator.toml");
    fs::write(&file, "listen = \"unix:/tmp/x\"\nlease_second = 5\n").unwrap();
    let (code, text) = serve(&["--config", file.to_str().unwrap()]);
    assert_eq!(code, Some(2));
    assert!(text.contains("lease_second") && text.contains("line 2"), "{text}");
    let (code, text) = serve(&["--listen", "127.0.0.1:0"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("token_file"), "{text}");
    let (code, text) = serve(&["--listen", "somewhere"]);
    assert_eq!((code, text.contains("unix:PATH")), (Some(2), true), "{text}");
}
