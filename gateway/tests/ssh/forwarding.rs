//! Forwarding both ways, and the key agent.

use super::common::{Person, Site, free_port};
use std::{process::Stdio, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    process::Child,
    time::timeout,
};

pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A service that sends back what it gets, in capitals, and half-closes after the client.
async fn shout<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut stream: S) {
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await.unwrap();
    stream.write_all(&heard.to_ascii_uppercase()).await.unwrap();
    let _ = stream.shutdown().await;
}

pub(crate) async fn tcp_service() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(shout(stream));
        }
    });
    port
}

fn socket_service(path: &std::path::Path) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(shout(stream));
        }
    });
}

pub(crate) async fn talk<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut stream: S) -> String {
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

/// Connects as soon as somebody listens.
pub(crate) async fn dial(port: u16) -> TcpStream {
    let dialled = async {
        loop {
            match TcpStream::connect(("127.0.0.1", port)).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    timeout(SOON, dialled).await.unwrap()
}

/// Returns when a listener is gone.
pub(crate) async fn nobody_listens(port: u16) {
    let closed = async {
        while TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, closed).await.expect("the listener ended");
}

fn forwarder(person: &Person, options: &[&str]) -> Child {
    let mut command = person.ssh_command(&[&["-N", "-o", "ExitOnForwardFailure=yes"], options].concat(), &[]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn local_forwarding_reaches_into_the_workspace() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let (service, here, dynamic) = (tcp_service().await, free_port(), free_port());
    let socket = site.path("service.sock");
    socket_service(&socket);
    std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let mine = alice.path("mine.sock");
    let _ssh = forwarder(
        &alice,
        &[
            "-L",
            &format!("{here}:localhost:{service}"),
            "-L",
            &format!("{}:{}", mine.display(), socket.display()),
            "-D",
            &dynamic.to_string(),
        ],
    );
    let all = futures::future::join_all((0..10).map(|_| async { talk(dial(here).await).await })).await;
    assert!(all.iter().all(|answer| answer == "HELLO"), "{all:?}");
    assert_eq!(talk(UnixStream::connect(&mine).await.unwrap()).await, "HELLO");
    let mut socks = dial(dynamic).await;
    socks.write_all(&[5, 1, 0]).await.unwrap();
    socks.read_exact(&mut [0; 2]).await.unwrap();
    let port = service.to_be_bytes();
    socks.write_all(&[5, 1, 0, 1, 127, 0, 0, 1, port[0], port[1]]).await.unwrap();
    socks.read_exact(&mut [0; 10]).await.unwrap();
    assert_eq!(talk(socks).await, "HELLO");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_refuses_is_refused() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let refused = alice.ssh_with(&["-o", "LogLevel=INFO", "-W", &format!("127.0.0.1:{}", free_port())], &[]).await;
    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("open failed"), "{}", refused.stderr);
    let service = tcp_service().await;
    let through = alice.ssh_input(&["-W", &format!("127.0.0.1:{service}")], &[], b"word").await.success();
    assert_eq!(through.text(), "WORD");
}

/// The client says no more and hears no more: it learns of the reset all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_reset_ends_the_connection() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let rude = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = rude.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = rude.accept().await {
            stream.read_exact(&mut [0; 5]).await.unwrap();
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        }
    });
    let here = free_port();
    let _ssh = forwarder(&alice, &["-L", &format!("{here}:localhost:{port}")]);
    let mut stream = dial(here).await;
    stream.write_all(b"hello").await.unwrap();
    let heard = timeout(SOON, stream.read(&mut [0; 1])).await.expect("the end is heard");
    assert!(matches!(heard, Ok(0) | Err(_)), "{heard:?}");
    // And nobody takes what is said after that.
    let refused = async {
        while stream.write_all(b"x").await.is_ok() {
            tokio::task::yield_now().await
        }
    };
    timeout(SOON, refused).await.expect("the connection is over");
}

#[tokio::test(flavor = "multi_thread")]
async fn remote_forwarding_brings_connections_home() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let (service, there) = (tcp_service().await, free_port());
    let _ssh = forwarder(&alice, &["-R", &format!("{there}:localhost:{service}")]);
    let all = futures::future::join_all((0..10).map(|_| async { talk(dial(there).await).await })).await;
    assert!(all.iter().all(|answer| answer == "HELLO"), "{all:?}");
    // With a session, the listener is there before its command runs.
    let (port, path) = (free_port(), site.backend.agent.home().join("there.sock"));
    let mine = alice.path("mine.sock");
    socket_service(&mine);
    let command = format!(
        "python3 -c \"import socket as s; c=s.create_connection(('127.0.0.1',{port})); c.sendall(b'tcp'); c.shutdown(1); print(c.recv(9).decode())\nc=s.socket(s.AF_UNIX); c.connect('{}'); c.sendall(b'unix'); c.shutdown(1); print(c.recv(9).decode())\"",
        path.display()
    );
    let (remote, socket) = (format!("{port}:localhost:{service}"), format!("{}:{}", path.display(), mine.display()));
    let said = alice.ssh_with(&["-R", &remote, "-R", &socket], &[&command]).await.success();
    assert_eq!(said.text(), "TCP\nUNIX");
    nobody_listens(port).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_the_servers_choice_is_told_and_can_be_cancelled() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let service = tcp_service().await;
    let control = format!("ControlPath={}", alice.path("control").display());
    let mut master = alice.start(&["-o", &control, "-M"], &["echo up; sleep 1000"]);
    master.stdout.take().unwrap().read_exact(&mut [0; 3]).await.unwrap();
    let target = format!("0:localhost:{service}");
    let told = alice.ssh_with(&["-o", &control, "-O", "forward", "-R", &target], &[]).await.success();
    let port: u16 = told.text().trim().parse().unwrap();
    assert_eq!(talk(dial(port).await).await, "HELLO");
    let port = free_port();
    let target = format!("{port}:localhost:{service}");
    alice.ssh_with(&["-o", &control, "-O", "forward", "-R", &target], &[]).await.success();
    assert_eq!(talk(dial(port).await).await, "HELLO");
    alice.ssh_with(&["-o", &control, "-O", "cancel", "-R", &target], &[]).await.success();
    nobody_listens(port).await;
    // A port that is taken cannot be had.
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let _holder = TcpListener::bind(("127.0.0.1", taken)).await.unwrap();
    let target = format!("127.0.0.1:{taken}:localhost:{service}");
    let refused = alice.ssh_with(&["-o", &control, "-O", "forward", "-R", &target], &[]).await;
    assert_ne!(refused.code, 0, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_agent_comes_along_only_when_it_is_asked_for() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let socket = alice.path("agent.sock");
    let mut agent =
        std::process::Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn().unwrap();
    while UnixStream::connect(&socket).await.is_err() {
        tokio::task::yield_now().await;
    }
    let added = std::process::Command::new("ssh-add")
        .arg("-q")
        .arg(alice.path("id_ed25519"))
        .env("SSH_AUTH_SOCK", &socket)
        .status();
    assert!(added.unwrap().success());
    let listed = alice
        .ssh_command(&["-A"], &["ssh-add -l; ssh-add -l"])
        .env("SSH_AUTH_SOCK", &socket)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert_eq!(listed.matches("a key (ED25519)").count(), 2, "{listed}");
    assert_eq!(alice.ssh("echo ${SSH_AUTH_SOCK-none}").await.success().text(), "none");
    agent.kill().unwrap();
    agent.wait().unwrap();
}
