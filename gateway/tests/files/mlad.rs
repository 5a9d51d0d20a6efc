//! `mlad`, run by the gateway in a user's jail.

use crate::harness::{ALICE, Site};
use mlad_gateway::files::{spawn_mlad, spawn_mlad_on_terminal};
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    process::Command,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Stands in for `mlad`: tells what it sees.
const PROBE: &str = r#"
use std::{io::{IsTerminal, Read, Write}, os::unix::net::UnixStream};
fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    println!("arguments {arguments:?}");
    let mut environment: Vec<String> = std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    environment.sort();
    println!("environment {environment:?}");
    println!("folder {}", std::env::current_dir().unwrap().display());
    let mut names: Vec<_> = std::fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    println!("root {names:?}");
    println!("passwd {}", std::fs::read("/etc/passwd").is_ok());
    println!("binary {}", std::fs::write("/run/mlad/mlad", "x").is_ok());
    println!("network {}", std::net::TcpStream::connect("127.0.0.1:1").unwrap_err().kind());
    println!("terminal {}", std::io::stdin().is_terminal());
    std::fs::write("made", "by mlad").unwrap();
    let mut api = UnixStream::connect("/run/mlad/api.sock").unwrap();
    api.write_all(b"ping").unwrap();
    let mut answer = String::new();
    api.read_to_string(&mut answer).unwrap();
    println!("api {answer}");
    let mut input = String::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().read_to_string(&mut input).unwrap();
        println!("input {input}");
    }
    eprintln!("a warning");
    std::process::exit(7);
}
"#;

fn site_with_probe() -> (Site, UnixListener) {
    let site = Site::new();
    let source = site.path("probe.rs");
    fs::write(&source, PROBE).unwrap();
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let built = Command::new(rustc)
        .args(["--edition=2024", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-o"])
        .args([site.path("mlad"), source])
        .status()
        .unwrap();
    assert!(built.success());
    let listener = UnixListener::bind(site.path("api.sock")).unwrap();
    fs::set_permissions(site.path("api.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    (site, listener)
}

fn answer_once(listener: UnixListener) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut said = [0; 4];
        stream.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"ping");
        stream.write_all(b"pong").unwrap();
    })
}

#[tokio::test]
async fn it_sees_its_socket_the_users_files_and_nothing_else() {
    let (site, listener) = site_with_probe();
    let api = answer_once(listener);
    let environment = [("TERM", "xterm"), ("COLUMNS", "80"), ("LD_PRELOAD", "/x"), ("PATH", "/x"), ("HOME", "/x")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let arguments = ["ps", "--json", "*", "$(id)"].map(String::from);
    let mut worker = spawn_mlad(&site.config, &site.alice, &arguments, &site.path("api.sock"), &environment).unwrap();
    worker.stdin.write_all(b"typed").await.unwrap();
    drop(worker.stdin);
    let (mut output, mut error) = (String::new(), String::new());
    worker.stdout.read_to_string(&mut output).await.unwrap();
    worker.stderr.read_to_string(&mut error).await.unwrap();
    assert_eq!(worker.child.wait().await.unwrap().code(), Some(7), "{error}");
    let expected = "arguments [\"mlad\", \"ps\", \"--json\", \"*\", \"$(id)\"]\n\
        environment [\"COLUMNS=80\", \"HOME=/home/alice\", \"TERM=xterm\", \"USER=alice\"]\n\
        folder /home/alice\n\
        root [\"datasets\", \"home\", \"projects\", \"run\"]\n\
        passwd false\n\
        binary false\n\
        network permission denied\n\
        terminal false\n\
        api pong\n\
        input typed\n";
    assert_eq!((output.as_str(), error.as_str()), (expected, "a warning\n"));
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&fs::metadata(site.home("made")).unwrap()), ALICE);
    api.join().unwrap();
}

#[tokio::test]
async fn it_runs_also_if_the_gateways_umask_is_077() {
    let (mut site, listener) = site_with_probe();
    let api = answer_once(listener);
    let masked = site.path("masked");
    fs::write(&masked, format!("#!/bin/sh\numask 077\nexec '{}' \"$@\"\n", crate::harness::PROGRAM)).unwrap();
    fs::set_permissions(&masked, fs::Permissions::from_mode(0o755)).unwrap();
    site.config.files.worker_binary = Some(masked);
    let mut worker = spawn_mlad(&site.config, &site.alice, &[], &site.path("api.sock"), &[]).unwrap();
    drop(worker.stdin);
    let (mut output, mut error) = (String::new(), String::new());
    worker.stdout.read_to_string(&mut output).await.unwrap();
    worker.stderr.read_to_string(&mut error).await.unwrap();
    assert_eq!(worker.child.wait().await.unwrap().code(), Some(7), "{error}");
    assert!(output.contains("api pong\n"), "{output}");
    api.join().unwrap();
}

#[tokio::test]
async fn it_can_have_a_terminal() {
    let (site, listener) = site_with_probe();
    let api = answer_once(listener);
    let mut worker =
        spawn_mlad_on_terminal(&site.config, &site.alice, &[], &site.path("api.sock"), &[], (80, 24)).unwrap();
    let size = rustix::termios::tcgetwinsize(&worker.terminal).unwrap();
    assert_eq!((size.ws_col, size.ws_row), (80, 24));
    rustix::io::ioctl_fionbio(&worker.terminal, false).unwrap();
    let mut terminal = fs::File::from(worker.terminal);
    let output = tokio::task::spawn_blocking(move || {
        let mut output = Vec::new();
        // Ends with EIO when the last process is gone.
        let _ = terminal.read_to_end(&mut output);
        String::from_utf8(output).unwrap()
    })
    .await
    .unwrap();
    assert!(output.contains("terminal true\r\n") && output.contains("api pong\r\n"), "{output}");
    assert_eq!(worker.child.wait().await.unwrap().code(), Some(7));
    api.join().unwrap();
}

#[tokio::test]
async fn arguments_are_bounded() {
    let site = Site::new();
    let long = ["x".repeat(100_000)];
    assert!(spawn_mlad(&site.config, &site.alice, &long, &site.path("api.sock"), &[]).is_err());
    let zero = ["a\0b".to_owned()];
    assert!(spawn_mlad(&site.config, &site.alice, &zero, &site.path("api.sock"), &[]).is_err());
}
