//! Listeners in the workspace (`-R`) that are asked for before anybody is in it.

use super::{
    common::{Outcome, Person, Site, free_port, until},
    forwarding::{SOON, dial, nobody_listens, talk, tcp_service},
};
use mlad_gateway::ssh::Refusal;
use std::{process::Stdio, sync::atomic::Ordering};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpListener,
    process::{Child, ChildStderr},
    time::timeout,
};

/// Ports that agents are given by their systems end before those the gateway chooses.
const FIRST_CHOSEN: u16 = 61_000;

fn talkative(person: &Person, options: &[&str], words: &[&str]) -> Child {
    person.start(&[&["-o", "LogLevel=INFO"], options].concat(), words)
}

/// The port that the client says it was given.
async fn allocated_port(stderr: &mut ChildStderr) -> u16 {
    let mut lines = BufReader::new(stderr).lines();
    let port = async {
        loop {
            let line = lines.next_line().await.unwrap().expect("the client says which port it has");
            if let Some(rest) = line.strip_prefix("Allocated port ") {
                return rest.split(' ').next().unwrap().parse().unwrap();
            }
        }
    };
    timeout(SOON, port).await.unwrap()
}

/// A port that somebody has.
async fn taken_port() -> (TcpListener, u16) {
    let holder = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = holder.local_addr().unwrap().port();
    (holder, port)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_of_the_servers_choice_waits_for_the_session_to_say_which_workspace() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let target = format!("0:localhost:{}", tcp_service().await);
    let options = ["-R", &target, "-o", "SetEnv=MLAD_GPU=1g.5gb"];
    let mut session = talkative(&alice, &options, &["echo up; sleep 1000"]);
    let port = allocated_port(session.stderr.as_mut().unwrap()).await;
    assert!(port >= FIRST_CHOSEN, "{port}: no agent could be asked");
    session.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).await.unwrap();
    // It was there before the command.
    assert_eq!(talk(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap()).await, "HELLO");
    let wishes = site.backend.wishes.lock().unwrap().clone();
    assert_eq!(wishes.len(), 1, "{wishes:?}");
    assert_eq!(wishes[0].need, Some("1g.5gb".parse().unwrap()));
    session.kill().await.unwrap();
    nobody_listens(port).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_session_a_port_of_the_servers_choice_comes_all_the_same() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let target = format!("0:localhost:{}", tcp_service().await);
    let mut ssh = talkative(&alice, &["-N", "-R", &target], &[]);
    let port = allocated_port(ssh.stderr.as_mut().unwrap()).await;
    assert_eq!(talk(dial(port).await).await, "HELLO");
    assert_eq!(site.backend.wishes.lock().unwrap().len(), 1);
    ssh.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_session_a_promise_that_cannot_be_kept_ends_the_connection() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let (_holder, port) = taken_port().await;
    let target = format!("127.0.0.1:{port}:localhost:1");
    let told = timeout(SOON, alice.ssh_with(&["-N", "-R", &target], &[])).await.expect("it ends").exits(255);
    let words = format!("remote port forwarding failed for listen port {port}: cannot listen on port {port}");
    assert!(told.stderr.contains(&words), "{}", told.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_workspace_a_promise_that_cannot_be_kept_ends_the_connection() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let refusal = Refusal { lines: vec!["no slice is free".into(), "try again later".into()], exit_status: 75 };
    *site.backend.refusal.lock().unwrap() = Some(refusal);
    let target = format!("{}:localhost:1", free_port());
    let told = timeout(SOON, alice.ssh_with(&["-N", "-R", &target], &[])).await.expect("it ends").exits(255);
    assert!(told.stderr.contains("no slice is free; try again later"), "{}", told.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_told_of_a_promise_that_cannot_be_kept() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let (_holder, port) = taken_port().await;
    let target = format!("127.0.0.1:{port}:localhost:1");
    let told = alice.ssh_with(&["-R", &target], &["echo runs"]).await.success();
    assert_eq!(told.text(), "runs");
    let lines: Vec<_> = told.stderr.lines().collect();
    assert_eq!(lines[0], format!("Warning: remote port forwarding failed for listen port {port}"));
    let reason = format!("mlad: nothing listens on 127.0.0.1:{port} in the workspace: cannot listen on port {port}");
    assert!(lines[1].starts_with(&reason) && lines.len() == 2, "{}", told.stderr);
}

/// Like `sftp`: there is a session, but none that is in a workspace.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_without_a_workspace_is_not_ended_and_the_next_one_is_told() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let (_holder, port) = taken_port().await;
    let control = format!("ControlPath={}", alice.path("control").display());
    let target = format!("127.0.0.1:{port}:localhost:1");
    let mut worker = alice.start(&["-o", &control, "-M", "-R", &target], &["mlad wait"]);
    // No session comes, so it is tried without.
    until("somebody in the workspace", || !site.backend.wishes.lock().unwrap().is_empty()).await;
    let over = ["-o", &control, "-o", "ProxyCommand=false"];
    let told = alice.ssh_with(&over, &["true"]).await.success();
    let words = format!("Warning: remote port forwarding failed for listen port {port}\n");
    assert!(told.stderr.starts_with(&words), "{}", told.stderr);
    assert_eq!(alice.ssh_with(&over, &["true"]).await.success().stderr, "", "once is enough");
    worker.stdin.take().unwrap().write_all(b"still here").await.unwrap();
    let worker = Outcome::from(timeout(SOON, worker.wait_with_output()).await.unwrap().unwrap()).exits(3);
    assert!(worker.text().ends_with("still here"), "{}", worker.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_workspace_runs_its_agent_is_asked() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    alice.ssh("true").await.success();
    // Another connection: it has not been in the workspace yet.
    let (_holder, port) = taken_port().await;
    let target = format!("127.0.0.1:{port}:localhost:1");
    let options = ["-N", "-o", "ExitOnForwardFailure=yes", "-R", &target];
    let refused = timeout(SOON, alice.ssh_with(&options, &[])).await.unwrap().exits(255);
    let words = format!("Error: remote port forwarding failed for listen port {port}");
    assert!(refused.stderr.contains(&words), "{}", refused.stderr);
    let target = format!("0:localhost:{}", tcp_service().await);
    let mut ssh = talkative(&alice, &["-N", "-R", &target], &[]);
    let port = allocated_port(ssh.stderr.as_mut().unwrap()).await;
    assert!(port < FIRST_CHOSEN, "{port}: the agent had a say");
    assert_eq!(talk(dial(port).await).await, "HELLO");
    assert_eq!(site.backend.wishes.lock().unwrap().len(), 1, "nobody entered it anew");
    ssh.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_so_many_listeners_and_no_more() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let targets: Vec<_> = (0..65)
        .map(|number| format!("{}:localhost:1", site.backend.agent.home().join(number.to_string()).display()))
        .collect();
    let run = |count: usize| {
        let all = targets[..count].iter().flat_map(|target| ["-R", target.as_str()]);
        let options: Vec<_> = ["-o", "ExitOnForwardFailure=yes"].into_iter().chain(all).collect();
        alice.ssh_command(&options, &["ls | wc -l"]).stdin(Stdio::null()).output()
    };
    let home_is_empty = || std::fs::read_dir(site.backend.agent.home()).unwrap().count() == 0;
    // Before anybody is in the workspace, and in one that runs.
    for runs in [false, true] {
        site.backend.runs.store(runs, Ordering::Relaxed);
        let most: Outcome = timeout(SOON, run(64)).await.unwrap().unwrap().into();
        assert_eq!(most.success().text(), "64");
        until("the end of the listeners", home_is_empty).await;
        let more: Outcome = timeout(SOON, run(65)).await.unwrap().unwrap().into();
        assert!(more.exits(255).stderr.contains("remote port forwarding failed"));
        until("the end of the listeners", home_is_empty).await;
    }
}
