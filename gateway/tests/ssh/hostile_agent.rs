//! A container whose root has replaced the agent: whatever it says, it harms nobody but itself.

use super::common::{
    Outcome, Person, Scripted, Site,
    scripted::{agree, end_at_once, until_closed},
    until,
};
use bytes::Bytes;
use mlad::channel::{Connection, Exit, Frame, MAX_FRAME, Open, Request};
use std::{process::Stdio, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::{Notify, watch},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(20);

/// A site whose workspaces have this agent.
async fn site_with<F: Future<Output = ()> + Send + 'static>(
    serve: impl Fn(Open, Connection) -> F + Send + 'static,
) -> (Site, Person, Scripted) {
    let site = Site::start().await;
    let person = site.person("alice").await;
    let scripted = Scripted::start(&site.path("scripted.sock"), serve);
    site.agent_is(&scripted);
    (site, person, scripted)
}

async fn send(connection: &mut Connection, frame: Frame) -> bool {
    connection.writer.write(&frame).await.is_ok()
}

/// Bytes as they are, instead of frames.
async fn send_raw(connection: Connection, bytes: &[u8]) {
    let mut stream = connection.into_stream();
    let _ = stream.write_all(bytes).await;
    let _ = stream.read(&mut [0; 1]).await;
}

fn incoming(ticket: u64) -> Frame {
    Frame::Incoming { ticket, originator: "\x1b[2J".into(), originator_port: 1 }
}

/// What is no frame, or none that belongs here.
fn nonsense(number: usize) -> Vec<u8> {
    match number {
        0 => vec![0xff; 100_000],
        1 => (MAX_FRAME as u32 + 1).to_be_bytes().into(),
        2 => vec![0, 0, 0, 0],
        3 => vec![0, 0, 0, 1, 99],
        // Cut short, inside a frame.
        4 => vec![0, 0, 0, 9, 2, 0],
        // A text that is none.
        5 => vec![0, 0, 0, 6, 6, 0, 0, 0, 1, 0xff],
        _ => vec![0, 0, 0, 1, 11],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_instead_of_an_answer_is_told_to_the_person() {
    let (number, numbers) = watch::channel(0);
    let (_site, alice, _agent) = site_with(move |_, connection| {
        let bytes = nonsense(*numbers.borrow());
        async move { send_raw(connection, &bytes).await }
    })
    .await;
    for wrong in 0..7 {
        number.send_replace(wrong);
        // One that is cut short waits for the rest, and the gateway no longer than ten seconds: once is enough.
        let all = [&[][..], &["-tt"]];
        for options in if wrong == 4 { &all[..1] } else { &all } {
            let told = timeout(SOON, alice.ssh_with(options, &["true"])).await.unwrap().exits(75);
            let said = format!("{}{}", told.stderr, told.text());
            assert!(said.contains("no proper answer") || said.contains("no answer"), "{wrong}: {said}");
            assert!(said.contains("log in again"), "{wrong}: {said}");
        }
        if wrong == 4 {
            continue;
        }
        let forwarded = alice.ssh_with(&["-o", "LogLevel=INFO", "-W", "localhost:1"], &[]).await.exits(255);
        assert!(forwarded.stderr.contains("proper answer"), "{wrong}: {}", forwarded.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_instead_of_a_yes_is_told_to_the_person() {
    let (number, numbers) = watch::channel(0);
    let (_site, alice, _agent) = site_with(move |_, mut connection| {
        let bytes = nonsense(*numbers.borrow());
        async move {
            if send(&mut connection, Frame::Opened { port: 0 }).await {
                send_raw(connection, &bytes).await;
            }
        }
    })
    .await;
    for wrong in [0, 1, 3, 5, 6] {
        number.send_replace(wrong);
        let told = timeout(SOON, alice.ssh("true")).await.unwrap().exits(75);
        assert!(told.stderr.contains("agent is lost") && told.stderr.ends_with("log in again\n"), "{}", told.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_belong_into_a_session_ends_it() {
    let (number, numbers) = watch::channel(0);
    let (_site, alice, _agent) = site_with(move |_, mut connection| {
        let bytes = nonsense(*numbers.borrow());
        async move {
            // The descriptors are held: the end of the session must not depend on them.
            let _held = agree(&mut connection).await;
            match bytes.as_slice() {
                [0, 0, 0, 1, 11] => {
                    send(&mut connection, Frame::Request(Request::Shell)).await;
                    until_closed(connection).await;
                }
                bytes => send_raw(connection, bytes).await,
            }
        }
    })
    .await;
    for wrong in [0, 3, 6] {
        number.send_replace(wrong);
        let both = futures::future::join(alice.ssh_with(&[], &["true"]), alice.ssh_with(&["-tt"], &["true"]));
        for told in <[Outcome; 2]>::from(timeout(SOON, both).await.unwrap()) {
            let told = told.exits(255);
            let said = format!("{}{}", told.stderr, told.text());
            assert!(said.contains("the connection to your workspace broke; log in again"), "{wrong}: {said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_agent_is_waited_for_and_holds_nobody_else_up() {
    let (site, alice, agent) = site_with(|_, connection| until_closed(connection)).await;
    let bob = site.person("bob").await;
    let mut waiting = alice.start(&[], &["true"]);
    until("the session", || !agent.opened.lock().unwrap().is_empty()).await;
    // Neither other people nor other sessions of the same agent.
    *site.backend.socket() = site.backend.agent.socket();
    bob.ssh("true").await.success();
    alice.ssh("true").await.success();
    assert!(waiting.try_wait().unwrap().is_none(), "it has ten seconds");
    let told = timeout(SOON, waiting.wait_with_output()).await.expect("it was given up").unwrap();
    let told = Outcome::from(told).exits(75);
    assert_eq!(told.stderr, "mlad: no answer from the workspace within 10 s; log in again\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reaches_a_key_agent_that_was_not_forwarded_and_only_so_many_one_that_was() {
    let asked_for = watch::Sender::new(false);
    let (asks, accepted) = (asked_for.subscribe(), watch::Sender::new(0));
    let count = accepted.clone();
    let (_site, alice, _agent) = site_with(move |open, mut connection| {
        let (forwarded, count) = (*asks.borrow(), count.clone());
        async move {
            if matches!(open, Open::Accept { .. }) {
                count.send_modify(|count| *count += 1);
                return until_closed(connection).await;
            }
            let Some(descriptors) = agree(&mut connection).await else { return };
            for ticket in 0..10_000 {
                if !send(&mut connection, incoming(ticket)).await {
                    return;
                }
            }
            if forwarded {
                let _ = count.subscribe().wait_for(|count| *count > 0).await;
            }
            drop(descriptors);
            send(&mut connection, Frame::Exit(Exit::Status(0))).await;
            until_closed(connection).await;
        }
    })
    .await;
    let socket = alice.path("agent.sock");
    let mut keys =
        std::process::Command::new("ssh-agent").arg("-D").arg("-a").arg(&socket).stdout(Stdio::null()).spawn().unwrap();
    until("the key agent", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
    let run = async |options: &[&str]| {
        let mut ssh = alice.ssh_command(options, &["true"]);
        let ended = ssh.env("SSH_AUTH_SOCK", &socket).stdin(Stdio::null()).output();
        Outcome::from(timeout(SOON, ended).await.unwrap().unwrap()).success();
    };
    run(&["-a"]).await;
    run(&["-a", "-tt"]).await;
    assert_eq!(*accepted.borrow(), 0);
    asked_for.send_replace(true);
    run(&["-A"]).await;
    let count = *accepted.borrow();
    assert!((1..=32).contains(&count), "{count}");
    keys.kill().unwrap();
    keys.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_that_are_lies_cost_nothing() {
    let (site, alice, agent) = site_with(|_, mut connection| async move {
        let Some(_held) = agree(&mut connection).await else { return };
        for _ in 0..1000 {
            if !send(&mut connection, Frame::WindowAdjust { bytes: u32::MAX }).await {
                return;
            }
        }
        // Takes some of what comes, and then no more.
        for _ in 0..4 {
            let _ = connection.reader.read().await;
        }
        std::future::pending().await
    })
    .await;
    let bob = site.person("bob").await;
    for (number, options) in [&[][..], &["-tt"]].into_iter().enumerate() {
        let zeros = std::fs::File::open("/dev/zero").unwrap();
        let mut ssh = alice.ssh_command(options, &["true"]);
        let mut liar = ssh.stdin(zeros).stdout(Stdio::null()).spawn().unwrap();
        until("the session", || agent.opened.lock().unwrap().len() > number).await;
        let socket = std::mem::replace(&mut *site.backend.socket(), site.backend.agent.socket());
        timeout(SOON, bob.ssh("true")).await.unwrap().success();
        *site.backend.socket() = socket;
        assert!(liar.try_wait().unwrap().is_none());
        liar.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_while_the_pipes_are_held_leaves_nothing_when_the_client_goes() {
    let gone = std::sync::Arc::new(Notify::new());
    let (tell, exited) = (gone.clone(), std::sync::Arc::new(Notify::new()));
    let said = exited.clone();
    let site = Site::with_settings("max_connections_per_user = 1").await;
    let alice = site.person("alice").await;
    let agent = Scripted::start(&site.path("scripted.sock"), move |_, mut connection| {
        let (tell, said) = (tell.clone(), said.clone());
        async move {
            let _held = agree(&mut connection).await;
            send(&mut connection, Frame::Exit(Exit::Status(0))).await;
            said.notify_one();
            until_closed(connection).await;
            tell.notify_one();
        }
    });
    site.agent_is(&agent);
    let mut session = alice.start(&[], &["true"]);
    timeout(SOON, exited.notified()).await.unwrap();
    // As with sshd: somebody may still write to them.
    assert!(session.try_wait().unwrap().is_none());
    session.kill().await.unwrap();
    timeout(SOON, gone.notified()).await.expect("the gateway let the agent go");
    *site.backend.socket() = site.backend.agent.socket();
    let in_again = async { while alice.ssh("true").await.code != 0 {} };
    timeout(SOON, in_again).await.expect("the connection does not count any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_that_lies_about_its_signal_is_cut_down() {
    let (_site, alice, _agent) = site_with(|_, mut connection| async move {
        drop(agree(&mut connection).await);
        let name = format!("K\x1bILL{}", "x".repeat(100_000));
        let exit = Exit::Signal { name, core_dumped: true, message: "\x1b]0;owned\x07".repeat(1000) };
        send(&mut connection, Frame::Exit(exit)).await;
        until_closed(connection).await;
    })
    .await;
    let told = timeout(SOON, alice.ssh("true")).await.unwrap().exits(255);
    assert!(!told.stderr.contains(['\x1b', '\x07']), "{:?}", told.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_data_is_the_floods_own_affair() {
    let (site, alice, _agent) = site_with(|_, mut connection| async move {
        drop(agree(&mut connection).await);
        let flood = Bytes::from(vec![b'y'; MAX_FRAME - 1]);
        while send(&mut connection, Frame::Data(flood.clone())).await {}
    })
    .await;
    // On a terminal it is the client that takes no more; on pipes nothing of the kind belongs there.
    let mut stalled = alice.start(&["-tt"], &["true"]);
    stalled.stdout.as_mut().unwrap().read_exact(&mut [0; 1000]).await.unwrap();
    let told = timeout(SOON, alice.ssh("true")).await.unwrap().exits(255);
    assert!(told.stderr.contains("broke"), "{}", told.stderr);
    *site.backend.socket() = site.backend.agent.socket();
    timeout(SOON, alice.ssh("true")).await.unwrap().success();
    stalled.kill().await.unwrap();
}

/// A container that has somebody brought to the client, and then lets the gateway wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_speaks_at_once_does_not_stop_its_connection_while_the_agent_is_asked() {
    let gate = watch::Sender::new(false);
    let opening = gate.clone();
    let (_site, alice, agent) = site_with(move |open, mut connection| {
        let gate = opening.clone();
        async move {
            match open {
                Open::TcpipForward { .. } => {
                    send(&mut connection, Frame::Opened { port: 0 }).await;
                    send(&mut connection, incoming(7)).await;
                    until_closed(connection).await;
                }
                Open::Accept { ticket: 7 } => {
                    let _ = gate.subscribe().wait_for(|open| *open).await;
                    send(&mut connection, Frame::Opened { port: 0 }).await;
                    let mut heard = Vec::new();
                    let mut stream = connection.into_stream();
                    let _ = stream.read_to_end(&mut heard).await;
                    let _ = stream.write_all(heard.len().to_string().as_bytes()).await;
                }
                _ => end_at_once(connection).await,
            }
        }
    })
    .await;
    // It says more than fits into whatever waits for the agent, and then listens.
    let service = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = service.local_addr().unwrap().port();
    let speaking = tokio::spawn(async move {
        let (mut stream, _) = service.accept().await.unwrap();
        stream.write_all(&vec![b'x'; 200_000]).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    });
    let control = format!("ControlPath={}", alice.path("control").display());
    let mut master = alice.start(&["-o", &control, "-M", "-N", "-R", &format!("5000:127.0.0.1:{port}")], &[]);
    let accepted = || agent.opened.lock().unwrap().contains(&Open::Accept { ticket: 7 });
    until("somebody who is brought to the client", accepted).await;
    // Every session goes over the connection whose forwarding waits.
    let others = async {
        for _ in 0..5 {
            alice.ssh_with(&["-o", &control, "-o", "ProxyCommand=false"], &["true"]).await.success();
        }
    };
    timeout(Duration::from_secs(8), others).await.expect("the connection stands still");
    gate.send_replace(true);
    assert_eq!(timeout(SOON, speaking).await.unwrap().unwrap(), "200000");
    master.kill().await.unwrap();
}
