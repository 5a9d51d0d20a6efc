//! What only process 1 of a PID namespace can show, and the agent's end.

use crate::harness::{Agent, is_root, process_exists, until};
use mlad::channel::Exit;
use rustix::process::Signal;
use std::time::Instant;

#[tokio::test]
async fn orphans_are_reaped_and_nobodys_exit_status_is_stolen() {
    if !is_root() {
        return;
    }
    let agent = Agent::builder().in_own_namespace().start().await;
    for _ in 0..20 {
        let outcome = agent.run("for i in 1 2 3 4 5; do (sleep 0.01 &); done; exit 7").await;
        assert_eq!(outcome.exit, Exit::Status(7));
    }
    let mut left = String::from("?");
    let start = Instant::now();
    while !left.is_empty() && start.elapsed().as_secs() < 10 {
        left = agent.run("ps -e -o stat=,comm= | grep -E '^Z|sleep' || true").await.text().to_owned();
    }
    assert_eq!(left, "", "zombies or sleepers");
}

#[tokio::test]
async fn when_a_job_ends_so_does_all_it_left_behind() {
    if !is_root() {
        return;
    }
    let script = "setsid sh -c 'trap \"\" TERM HUP; touch background; while :; do sleep 0.01; echo late; done' & \
                  while ! [ -e background ]; do sleep 0.01; done; exit 6";
    let mut agent = Agent::builder().job(&["sh", "-c", script]).in_own_namespace().spawn();
    assert_eq!(agent.ended().await, Some(6));
    assert_eq!(agent.result(), Some(Exit::Status(6)));
    let log = agent.home("jobs/1/log");
    let length = std::fs::metadata(&log).unwrap().len();
    let folder = agent.path("").to_str().unwrap().to_owned();
    until("the end of the background", || !any_process_in(&folder)).await;
    assert_eq!(std::fs::metadata(&log).unwrap().len(), length, "nothing is written after the result");
}

fn any_process_in(folder: &str) -> bool {
    let works_there = |entry: std::fs::DirEntry| {
        std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
    };
    std::fs::read_dir("/proc").unwrap().flatten().any(works_there)
}

/// Docker's stop: everybody hears of it, has time, and the gateway learns how sessions ended.
#[tokio::test]
async fn sigterm_hangs_sessions_up() {
    for own_namespace in [false, true] {
        if own_namespace && !is_root() {
            continue;
        }
        let builder = Agent::builder();
        let builder = if own_namespace { builder.in_own_namespace() } else { builder };
        let mut agent = builder.start().await;
        let mut polite = agent.session().await;
        polite.exec("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done").await;
        polite.expect("ready").await;
        let mut shell = agent.session().await;
        shell.pty().await;
        shell.request(mlad::channel::Request::Shell).await.unwrap();
        shell.input(b"echo re''ady\n").await;
        shell.expect("ready").await;
        agent.signal(Signal::TERM);
        let outcome = polite.outcome().await;
        assert!(outcome.text().ends_with("bye\n"), "{outcome:?}");
        assert_eq!(outcome.exit, Exit::Status(3));
        let ended = shell.outcome().await.exit;
        assert!(matches!(&ended, Exit::Signal { name, .. } if name == "HUP"), "{ended:?}");
        assert_eq!(agent.ended().await, Some(0));
    }
}

#[tokio::test]
async fn what_ignores_sigterm_is_killed_and_the_gateway_hears_of_it() {
    let mut agent = Agent::start().await;
    let mut stubborn = agent.session().await;
    stubborn.exec("trap '' TERM HUP; echo $$; while :; do sleep 0.01; done").await;
    let pid = stubborn.expect("\n").await;
    agent.signal(Signal::TERM);
    let exit = stubborn.outcome().await.exit;
    assert!(matches!(&exit, Exit::Signal { name, .. } if name == "KILL"), "{exit:?}");
    assert_eq!(agent.ended().await, Some(0));
    assert!(!process_exists(&pid));
}

#[tokio::test]
async fn an_agent_without_a_configuration_says_what_is_missing() {
    let mut agent = Agent::builder().spawn();
    agent.signal(Signal::TERM);
    agent.ended().await;
    for (config, complaint) in [("{\"workload\": 7}", "expected a string"), ("", "EOF")] {
        std::fs::write(agent.path("run/agent/config.json"), config).unwrap();
        agent.restart();
        assert_eq!(agent.ended().await, Some(1));
        let log = std::fs::read_to_string(agent.path("agent.log")).unwrap();
        assert!(log.contains("config.json: ") && log.contains(complaint), "{log}");
    }
}

#[tokio::test]
async fn a_restarted_agent_takes_the_place_of_its_sockets() {
    let mut agent = Agent::start().await;
    agent.signal(Signal::KILL);
    agent.ended().await;
    until("the end of what process 1 started", || std::os::unix::net::UnixStream::connect(agent.socket()).is_err())
        .await;
    agent.restart();
    until("the agent's socket", || std::os::unix::net::UnixStream::connect(agent.socket()).is_ok()).await;
    assert_eq!(agent.run("echo again").await.text(), "again\n");
}

/// Where an engine sends no signals, the gateway's word does the same.
#[tokio::test]
async fn a_gateway_can_tell_it_to_end() {
    let mut agent = Agent::start().await;
    let mut polite = agent.session().await;
    polite.exec("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.01; done").await;
    polite.expect("ready").await;
    agent.open(mlad::channel::Open::Terminate).await;
    let outcome = polite.outcome().await;
    assert!(outcome.text().ends_with("bye\n"), "{outcome:?}");
    assert_eq!(agent.ended().await, Some(0));
}
