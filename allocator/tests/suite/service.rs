//! What only the program has: tokens, sockets, settings.

use crate::{
    get,
    host::{Host, Running},
    machine::Machine,
    rules,
};
use mlad_allocator::{
    Allocate, AllocatorError,
    service::{HttpAllocator, Token},
};
use std::{fs, process::Command};

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_only_with_the_token() {
    rules::repeats(Host::Tcp).await;
    let machine = Machine::new("A30-24GB", 1);
    let running = Host::Tcp.start(&machine).await;
    get(running.allocator(), "w-1-1", "1g.6gb").await;
    let Running::Program(program) = &running else { unreachable!() };
    let other = machine.path().join("other");
    fs::write(&other, "another-token-of-some-length").unwrap();
    for token in [None, Some(Token::read(&other).unwrap())] {
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
