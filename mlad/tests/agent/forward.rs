//! Forwarding into the container and out of it, the API socket, and what the agent refuses.

use crate::harness::{Agent, Session, is_root, soon, until, user_id};
use mlad::channel::{Connection, Frame, Open, Request, Stream};
use std::{os::unix::fs::MetadataExt as _, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
};

async fn stream(agent: &Agent, open: Open) -> Stream {
    agent.open(open).await.0.into_stream()
}

async fn refusal(agent: &Agent, open: Open) -> (u32, String) {
    match agent.try_open(open).await.1 {
        Frame::OpenFailure { reason, message } => (reason, message),
        other => panic!("not refused: {other:?}"),
    }
}

async fn incoming(connection: &mut Connection) -> (u64, String, u32) {
    match soon(connection.reader.read()).await.unwrap().unwrap() {
        Frame::Incoming { ticket, originator, originator_port } => (ticket, originator, originator_port),
        other => panic!("nobody comes: {other:?}"),
    }
}

async fn read_all(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut text = String::new();
    soon(from.read_to_string(&mut text)).await.unwrap();
    text
}

#[tokio::test]
async fn a_tcp_port_is_reached_by_address_and_by_name() {
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    for host in ["127.0.0.1", "localhost", "LOCALHOST."] {
        let mut near = stream(&agent, Open::DirectTcpip { host: host.into(), port }).await;
        let (mut far, _) = soon(listener.accept()).await.unwrap();
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        assert_eq!(read_all(&mut far).await, "question");
        far.write_all(b"answer").await.unwrap();
        drop(far);
        assert_eq!(read_all(&mut near).await, "answer");
    }
}

#[tokio::test]
async fn a_connection_that_cannot_be_is_refused_with_the_reason() {
    let agent = Agent::start().await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port().into();
    let (reason, message) = refusal(&agent, Open::DirectTcpip { host: "127.0.0.1".into(), port: free }).await;
    assert_eq!(reason, 2);
    assert!(message.contains("refused"), "{message}");
    for port in [0, 70_000] {
        let (_, message) = refusal(&agent, Open::DirectTcpip { host: "localhost".into(), port }).await;
        assert!(message.contains("no port"), "{message}");
    }
    let (reason, message) = refusal(&agent, Open::DirectStreamlocal { path: "/nowhere".into() }).await;
    assert_eq!(reason, 2);
    assert!(message.contains("/nowhere"), "{message}");
    let long = "x".repeat(200);
    refusal(&agent, Open::DirectStreamlocal { path: long.clone() }).await;
    refusal(&agent, Open::StreamlocalForward { path: long }).await;
    let (_, message) = refusal(&agent, Open::DirectTcpip { host: "no such\0name".into(), port: 80 }).await;
    assert!(message.contains("resolve"), "{message}");
}

#[tokio::test]
async fn ten_megabytes_go_both_ways_at_once() {
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let near = stream(&agent, Open::DirectTcpip { host: "127.0.0.1".into(), port }).await;
    let (mut far, _) = soon(listener.accept()).await.unwrap();
    let echo = tokio::spawn(async move {
        let (mut read, mut write) = far.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let sent: Vec<u8> = (0..10_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut read, mut write) = tokio::io::split(near);
    let mut back = Vec::new();
    soon(async {
        tokio::join!(
            async {
                write.write_all(&sent).await.unwrap();
                write.shutdown().await.unwrap();
            },
            async { read.read_to_end(&mut back).await.unwrap() },
        )
    })
    .await;
    assert!(back == sent);
    echo.await.unwrap();
}

#[tokio::test]
async fn a_remote_forward_announces_and_its_tickets_are_good_once() {
    let agent = Agent::start().await;
    let (mut listening, port) = agent.open(Open::TcpipForward { address: "localhost".into(), port: 0 }).await;
    let port = u16::try_from(port).unwrap();
    assert!(port >= 1024);
    let mut user = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let (ticket, originator, from) = incoming(&mut listening).await;
    assert_eq!((&*originator, from), ("127.0.0.1", user.local_addr().unwrap().port().into()));
    let mut taken = stream(&agent, Open::Accept { ticket }).await;
    user.write_all(b"in").await.unwrap();
    user.shutdown().await.unwrap();
    assert_eq!(read_all(&mut taken).await, "in");
    taken.write_all(b"out").await.unwrap();
    taken.shutdown().await.unwrap();
    assert_eq!(read_all(&mut user).await, "out");
    refusal(&agent, Open::Accept { ticket }).await;
    refusal(&agent, Open::Accept { ticket: ticket + 1 }).await;
    if let Ok(mut user) = TcpStream::connect(("::1", port)).await {
        let (ticket, originator, _) = incoming(&mut listening).await;
        assert_eq!(originator, "::1");
        drop(listening);
        assert_eq!(read_all(&mut user).await, "", "what was not taken ends with the listener");
        refusal(&agent, Open::Accept { ticket }).await;
    } else {
        drop(listening);
    }
    until("the listener's end", || std::net::TcpStream::connect(("127.0.0.1", port)).is_err()).await;
}

#[tokio::test]
async fn listeners_are_refused_where_they_may_not_be() {
    let agent = Agent::start().await;
    let (reason, message) = refusal(&agent, Open::TcpipForward { address: String::new(), port: 80 }).await;
    assert_eq!(reason, 1);
    assert!(message.contains("privileged"), "{message}");
    let (_, port) = agent.open(Open::TcpipForward { address: "0.0.0.0".into(), port: 0 }).await;
    let held = agent.open(Open::TcpipForward { address: "127.0.0.1".into(), port: 0 }).await;
    let (_, message) = refusal(&agent, Open::TcpipForward { address: "127.0.0.1".into(), port: held.1 }).await;
    assert!(message.contains("in use"), "{message}");
    refusal(&agent, Open::TcpipForward { address: "192.0.2.1".into(), port }).await;
    refusal(&agent, Open::TcpipForward { address: String::new(), port: 1 << 20 }).await;
}

#[tokio::test]
async fn announcements_are_bounded_and_nobody_is_lost() {
    let agent = Agent::start().await;
    let (mut listening, port) = agent.open(Open::TcpipForward { address: "127.0.0.1".into(), port: 0 }).await;
    let address = ("127.0.0.1", u16::try_from(port).unwrap());
    let mut users = Vec::new();
    for _ in 0..60 {
        users.push(TcpStream::connect(address).await.unwrap());
    }
    let mut tickets = Vec::new();
    for _ in 0..32 {
        tickets.push(incoming(&mut listening).await.0);
    }
    let more = tokio::time::timeout(Duration::from_millis(200), listening.reader.read()).await;
    assert!(more.is_err(), "32 are out: {more:?}");
    for _ in 0..28 {
        let _taken = agent.open(Open::Accept { ticket: tickets.remove(0) }).await;
        tickets.push(incoming(&mut listening).await.0);
    }
}

#[tokio::test]
async fn a_unix_socket_is_reached_with_the_users_rights_only() {
    let agent = Agent::start().await;
    let own = UnixListener::bind(agent.home("own.sock")).unwrap();
    std::os::unix::fs::chown(agent.home("own.sock"), Some(user_id()), None).unwrap();
    let mut near = stream(&agent, Open::DirectStreamlocal { path: "own.sock".into() }).await;
    let (mut far, _) = soon(own.accept()).await.unwrap();
    assert_eq!(far.peer_cred().unwrap().uid(), user_id(), "the user connects, not root");
    near.write_all(b"hello").await.unwrap();
    near.shutdown().await.unwrap();
    assert_eq!(read_all(&mut far).await, "hello");
    if !is_root() {
        return;
    }
    let _private = UnixListener::bind(agent.path("root.sock")).unwrap();
    let path = agent.path("root.sock").to_str().unwrap().to_owned();
    let (_, message) = refusal(&agent, Open::DirectStreamlocal { path }).await;
    assert!(message.contains("denied"), "{message}");
    let path = agent.socket().to_str().unwrap().to_owned();
    let (_, message) = refusal(&agent, Open::DirectStreamlocal { path }).await;
    assert!(message.contains("denied"), "the agent's own socket: {message}");
    let path = agent.path("run/new.sock").to_str().unwrap().to_owned();
    let (_, message) = refusal(&agent, Open::StreamlocalForward { path }).await;
    assert!(message.contains("denied"), "{message}");
}

#[tokio::test]
async fn a_unix_socket_is_forwarded_and_removed() {
    let agent = Agent::start().await;
    let (mut listening, _) = agent.open(Open::StreamlocalForward { path: "forward.sock".into() }).await;
    let path = agent.home("forward.sock");
    let metadata = std::fs::symlink_metadata(&path).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o777), (user_id(), 0o600));
    let mut user = UnixStream::connect(&path).await.unwrap();
    let (ticket, _, port) = incoming(&mut listening).await;
    assert_eq!(port, 0);
    let mut taken = stream(&agent, Open::Accept { ticket }).await;
    taken.write_all(b"through").await.unwrap();
    drop(taken);
    assert_eq!(read_all(&mut user).await, "through");
    refusal(&agent, Open::StreamlocalForward { path: "forward.sock".into() }).await;
    drop(listening);
    until("the socket's removal", || !path.exists()).await;
    let (listening, _) = agent.open(Open::StreamlocalForward { path: "forward.sock".into() }).await;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "somebody else's").unwrap();
    drop(listening);
    agent.open(Open::StreamlocalForward { path: "other.sock".into() }).await;
    until("the other socket's removal", || !agent.home("other.sock").exists()).await;
    assert!(path.exists(), "only what was made is removed");
}

#[tokio::test]
async fn a_key_agent_is_forwarded_for_as_long_as_the_session_lives() {
    let agent = Agent::start().await;
    let mut session = agent.session().await;
    session.request(Request::AgentForwarding).await.unwrap();
    session.exec("echo $SSH_AUTH_SOCK; cat").await;
    let path = session.expect("\n").await.trim().to_owned();
    let folder = std::path::Path::new(&path).parent().unwrap().to_owned();
    let metadata = std::fs::metadata(&folder).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o777), (user_id(), 0o700));
    let mut user = UnixStream::connect(&path).await.unwrap();
    let Frame::Incoming { ticket, .. } = session.read().await else { panic!("nobody comes") };
    let mut taken = stream(&agent, Open::Accept { ticket }).await;
    user.write_all(b"sign this").await.unwrap();
    user.shutdown().await.unwrap();
    assert_eq!(read_all(&mut taken).await, "sign this");
    taken.write_all(b"signed").await.unwrap();
    drop(taken);
    assert_eq!(read_all(&mut user).await, "signed");
    session.send(&Frame::Eof).await;
    session.outcome().await;
    drop(session);
    until("the folder's removal", || !folder.exists()).await;
}

#[tokio::test]
async fn a_key_agent_of_a_session_that_starts_nothing_is_removed() {
    let agent = Agent::start().await;
    let before = key_agents();
    let mut session = agent.session().await;
    session.request(Request::AgentForwarding).await.unwrap();
    drop(session);
    until("the removal", || key_agents() <= before).await;
}

/// Of the user of this test, all tests together: other tests may run beside this one.
fn key_agents() -> usize {
    let own = |entry: &std::fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with("ssh-")
            && entry.metadata().is_ok_and(|metadata| metadata.uid() == user_id())
    };
    std::fs::read_dir(std::env::temp_dir()).unwrap().flatten().filter(own).count()
}

#[tokio::test]
async fn the_api_socket_is_handed_to_the_newest_control_connection() {
    let agent = Agent::start().await;
    let path = agent.path("run/api.sock");
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
    let (mut old, _) = agent.open(Open::Control).await;
    let (mut new, _) = agent.open(Open::Control).await;
    assert!(soon(old.reader.read()).await.unwrap().is_none(), "the old one ends");
    let mut user = UnixStream::connect(&path).await.unwrap();
    let (ticket, originator, _) = incoming(&mut new).await;
    assert!(originator.starts_with(&format!("uid {} ", rustix::process::geteuid().as_raw())), "{originator}");
    let mut taken = stream(&agent, Open::Accept { ticket }).await;
    user.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    user.shutdown().await.unwrap();
    assert!(read_all(&mut taken).await.starts_with("GET"));
    taken.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    drop(taken);
    assert!(read_all(&mut user).await.starts_with("HTTP/1.1 200"));
}

/// A gateway that dies between the announcement and the taking: the next one is asked.
#[tokio::test]
async fn an_api_connection_waits_for_the_next_gateway() {
    let agent = Agent::start().await;
    let mut user = UnixStream::connect(agent.path("run/api.sock")).await.unwrap();
    let (mut dying, _) = agent.open(Open::Control).await;
    let (void, ..) = incoming(&mut dying).await;
    drop(dying);
    let (mut next, _) = agent.open(Open::Control).await;
    let (ticket, ..) = incoming(&mut next).await;
    refusal(&agent, Open::Accept { ticket: void }).await;
    let mut taken = stream(&agent, Open::Accept { ticket }).await;
    taken.write_all(b"late but there").await.unwrap();
    drop(taken);
    assert_eq!(read_all(&mut user).await, "late but there");
}

#[tokio::test]
async fn without_a_gateway_the_api_says_so_in_http() {
    let agent = Agent::start().await;
    let mut waiting = Vec::new();
    for _ in 0..64 {
        waiting.push(UnixStream::connect(agent.path("run/api.sock")).await.unwrap());
    }
    let mut one_too_many = UnixStream::connect(agent.path("run/api.sock")).await.unwrap();
    one_too_many.write_all(b"GET /v1/jobs HTTP/1.1\r\nhost: mlad\r\n\r\n").await.unwrap();
    assert_unavailable(&read_all(&mut one_too_many).await, "too many");
    let mut first = waiting.swap_remove(0);
    first.write_all(b"GET /v1/jobs HTTP/1.1\r\nhost: mlad\r\n\r\n").await.unwrap();
    assert_unavailable(&read_all(&mut first).await, "being restarted");
}

fn assert_unavailable(answer: &str, why: &str) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    let error: mlad::api::ApiError = serde_json::from_str(body).unwrap();
    assert_eq!(error.code, mlad::api::ErrorCode::Unavailable);
    assert!(error.message.contains(why) && error.hint.is_some_and(|hint| hint.contains("again")), "{answer}");
}

/// What is no protocol ends its own connection, and nobody else's.
mod garbage {
    use super::*;
    use bytes::{BufMut as _, BytesMut};
    use proptest::prelude::*;

    async fn survives(agent: &Agent, witness: &mut Session, bytes: &[u8]) {
        let mut stream = UnixStream::connect(agent.socket()).await.unwrap();
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = soon(stream.read_to_end(&mut answer)).await;
        witness.input(b"still there\n").await;
        witness.expect("still there\n").await;
    }

    #[test]
    fn any_frames_leave_the_agent_alive() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (agent, witness) = runtime.block_on(async {
            let agent = Agent::start().await;
            let mut witness = agent.session().await;
            witness.exec("cat").await;
            (agent, std::cell::RefCell::new(witness))
        });
        // Frames of every kind with any payload, behind openings of every kind.
        let frame = (0u8..16, proptest::collection::vec(any::<u8>(), 0..64));
        // (But for the one that tells it to end.)
        let open = (prop_oneof![0u8..8, 9u8..12], any::<u16>());
        let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(what in proptest::option::of(open), frames in proptest::collection::vec(frame, 0..12))| {
            let mut bytes = BytesMut::new();
            if let Some((what, value)) = what {
                let mut body = BytesMut::new();
                body.put_u32(1);
                body.put_u8(what);
                match what {
                    2 | 4 => {
                        body.put_u32(9);
                        body.put_slice(b"127.0.0.1");
                        body.put_u32(value.into());
                    }
                    3 | 5 => {
                        body.put_u32(3);
                        body.put_slice(b"x/y");
                    }
                    6 => body.put_u64(value.into()),
                    _ => {}
                }
                bytes.put_u32(body.len() as u32 + 1);
                bytes.put_u8(1);
                bytes.put_slice(&body);
            }
            for (kind, payload) in &frames {
                bytes.put_u32(payload.len() as u32 + 1);
                bytes.put_u8(*kind);
                bytes.put_slice(payload);
            }
            runtime.block_on(survives(&agent, &mut witness.borrow_mut(), &bytes));
        });
        drop(runtime.block_on(async { witness.into_inner() }));
    }

    #[tokio::test]
    async fn requests_without_sense_leave_the_agent_alive() {
        let agent = Agent::start().await;
        let mut witness = agent.session().await;
        witness.exec("cat").await;
        let size = mlad::channel::PtySize { columns: u32::MAX, rows: 0, width: 7, height: u32::MAX };
        let modes = bytes::Bytes::from(vec![0xff; 100_000]);
        let requests = [
            Request::Pty { term: "\0\u{1b}[".into(), size, modes },
            Request::Env { name: "=\0".into(), value: bytes::Bytes::new() },
            Request::WindowChange(size),
            Request::Signal { name: "KILL".into() },
            Request::Subsystem { name: "../../bin/sh".into() },
            Request::Exec { command: bytes::Bytes::from(vec![b'x'; 200_000]) },
            Request::Exec { command: bytes::Bytes::from_static(b"echo\0x") },
            Request::Shell,
            Request::Shell,
        ];
        let mut bytes = BytesMut::new();
        Frame::Open(Open::Session).encode(&mut bytes);
        for request in requests {
            Frame::Request(request).encode(&mut bytes);
        }
        Frame::Opened { port: 1 }.encode(&mut bytes);
        survives(&agent, &mut witness, &bytes).await;
    }

    #[tokio::test]
    async fn a_session_that_never_begins_is_ended() {
        let agent = Agent::start().await;
        let mut silent = UnixStream::connect(agent.socket()).await.unwrap();
        assert_eq!(soon(silent.read(&mut [0])).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn sessions_are_bounded_and_the_bound_is_said() {
        let agent = Agent::start().await;
        let mut sessions = Vec::new();
        for _ in 0..256 {
            sessions.push(agent.session().await);
        }
        let (reason, message) = refusal(&agent, Open::Session).await;
        assert_eq!(reason, 4);
        assert!(message.contains("sessions"), "{message}");
        sessions.clear();
        let mut reason = 4;
        while reason == 4 {
            match agent.try_open(Open::Session).await.1 {
                Frame::OpenFailure { reason: again, .. } => reason = again,
                _ => break,
            }
        }
        assert_eq!(agent.run("echo room again").await.text(), "room again\n");
    }
}
