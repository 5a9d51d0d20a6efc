//! A job's container: one command, its log, its result.

use crate::harness::{Agent, is_root, process_exists, until, user_id};
use mlad::channel::Exit;
use rustix::process::Signal;
use std::os::unix::fs::{MetadataExt as _, symlink};

#[tokio::test]
async fn a_job_runs_as_the_user_and_leaves_log_artifacts_and_result() {
    let script = "id -u; pwd; echo err >&2; echo $MLAD_WORKLOAD > $MLAD_ARTIFACTS/kept; exit 3";
    let mut agent = Agent::builder().job(&["/bin/sh", "-c", script]).spawn();
    assert_eq!(agent.ended().await, Some(3));
    assert_eq!(agent.result(), Some(Exit::Status(3)));
    let log = agent.home("jobs/1/log");
    let expected = format!("{}\n{}\nerr\n", user_id(), agent.path("home").display());
    assert_eq!(std::fs::read_to_string(&log).unwrap(), expected);
    for made in [log, agent.home("jobs/1"), agent.home("jobs/1/artifacts/kept")] {
        assert_eq!(std::fs::metadata(&made).unwrap().uid(), user_id(), "{}", made.display());
    }
    assert_eq!(std::fs::read_to_string(agent.home("jobs/1/artifacts/kept")).unwrap(), "w-test\n");
}

#[tokio::test]
async fn arguments_reach_the_command_as_they_are() {
    let arguments = ["printf", "[%s]", "--", "-n", "a b", "$HOME", "*", "", "'"];
    let mut agent = Agent::builder().job(&arguments).spawn();
    assert_eq!(agent.ended().await, Some(0));
    assert_eq!(
        std::fs::read_to_string(agent.home("jobs/1/log")).unwrap(),
        "[--][-n][a b][$HOME][*][]][']".replace("[]]", "[]")
    );
}

#[tokio::test]
async fn a_command_that_cannot_start_says_so_in_the_log() {
    let missing = |_: &mut mlad::channel::AgentConfig| {};
    let gone = |config: &mut mlad::channel::AgentConfig| {
        config.job.as_mut().unwrap().working_directory = "/no/such/folder".into();
    };
    type Change = fn(&mut mlad::channel::AgentConfig);
    let cases: [(&[&str], Change, u32, &str); 4] = [
        (&["no-such-command"], missing, 127, "no-such-command: command not found"),
        (&["./no/such/file"], missing, 127, "./no/such/file: no such file"),
        (&["/etc/passwd"], missing, 126, "cannot start /etc/passwd: Permission denied"),
        (&["true"], gone, 126, "cannot start in /no/such/folder"),
    ];
    for (command, change, code, line) in cases {
        let mut agent = Agent::builder().job(command).change(change).spawn();
        assert_eq!(agent.ended().await, Some(code as i32), "{command:?}");
        assert_eq!(agent.result(), Some(Exit::Status(code)));
        let log = std::fs::read_to_string(agent.home("jobs/1/log")).unwrap();
        assert!(log.contains(line), "{line} in {log}");
    }
}

#[tokio::test]
async fn a_signal_is_told_and_its_exit_code_is_a_shells() {
    let mut agent = Agent::builder().job(&["sh", "-c", "kill -SEGV $$"]).spawn();
    assert_eq!(agent.ended().await, Some(139));
    assert!(matches!(agent.result(), Some(Exit::Signal { name, .. }) if name == "SEGV"));
}

#[tokio::test]
async fn sigterm_warns_the_job_and_gives_it_time() {
    let script = "trap 'echo saving; sleep 0.2; echo saved; exit 5' TERM; echo ready; while :; do sleep 0.01; done";
    let mut agent = Agent::builder().job(&["sh", "-c", script]).start().await;
    let log = agent.home("jobs/1/log");
    until("the start", || std::fs::read_to_string(&log).is_ok_and(|log| log.contains("ready"))).await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended().await, Some(5));
    assert_eq!(agent.result(), Some(Exit::Status(5)));
    assert!(std::fs::read_to_string(&log).unwrap().ends_with("saving\nsaved\n"));
}

#[tokio::test]
async fn a_job_that_will_not_end_is_killed_after_its_grace() {
    let script = "trap '' TERM HUP; echo $$; while :; do sleep 0.01; done";
    let hasty = |config: &mut mlad::channel::AgentConfig| config.job.as_mut().unwrap().grace_seconds = 1;
    let mut agent = Agent::builder().job(&["sh", "-c", script]).change(hasty).start().await;
    let log = agent.home("jobs/1/log");
    until("the start", || std::fs::read_to_string(&log).is_ok_and(|log| log.ends_with('\n'))).await;
    agent.signal(Signal::TERM);
    assert_eq!(agent.ended().await, Some(137));
    assert!(matches!(agent.result(), Some(Exit::Signal { name, .. }) if name == "KILL"));
    assert!(!process_exists(&std::fs::read_to_string(&log).unwrap()));
}

#[tokio::test]
async fn a_container_that_is_started_again_does_not_run_the_job_again() {
    let mut agent = Agent::builder().job(&["sh", "-c", "echo once; exit 4"]).spawn();
    assert_eq!(agent.ended().await, Some(4));
    agent.restart();
    assert_eq!(agent.ended().await, Some(4));
    assert_eq!(std::fs::read_to_string(agent.home("jobs/1/log")).unwrap(), "once\n");
    std::fs::remove_file(agent.path("run/agent/result.json")).unwrap();
    agent.restart();
    assert_eq!(agent.ended().await, Some(137), "started and without a result: it was killed");
    assert!(matches!(agent.result(), Some(Exit::Signal { message, .. }) if message.contains("before")));
    assert_eq!(std::fs::read_to_string(agent.home("jobs/1/log")).unwrap(), "once\n");
}

/// The user owns the folder of the log, and may put anything there before the agent comes.
#[tokio::test]
async fn a_log_that_is_a_trap_is_no_way_to_write_as_root() {
    if !is_root() {
        return;
    }
    let traps: [fn(&std::path::Path, &std::path::Path); 3] = [
        |log, target| symlink(target, log).unwrap(),
        |log, target| std::fs::hard_link(target, log).unwrap(),
        |log, _| rustix::fs::mknodat(rustix::fs::CWD, log, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap(),
    ];
    for trap in traps {
        let builder = Agent::builder().job(&["echo", "in"]);
        let target = builder.path("target");
        std::fs::write(&target, "root's").unwrap();
        std::fs::create_dir_all(builder.path("home/jobs/1")).unwrap();
        std::os::unix::fs::chown(builder.path("home/jobs/1"), Some(user_id()), Some(user_id())).unwrap();
        trap(&builder.path("home/jobs/1/log"), &target);
        let mut agent = builder.spawn();
        assert_eq!(agent.ended().await, Some(126));
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "root's");
    }
    let builder = Agent::builder().job(&["echo", "in"]);
    let elsewhere = builder.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, builder.path("home/jobs")).unwrap();
    let mut agent = builder.spawn();
    assert_eq!(agent.ended().await, Some(126));
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
}

#[tokio::test]
async fn sessions_are_possible_while_a_job_runs() {
    let agent = Agent::builder().job(&["sleep", "1000"]).start().await;
    assert_eq!(agent.run("echo beside").await.text(), "beside\n");
}

#[tokio::test]
async fn what_a_job_wrote_is_all_in_the_log() {
    let mut agent = Agent::builder().job(&["sh", "-c", "seq 1 2000000; seq 1 100000 >&2"]).spawn();
    assert_eq!(agent.ended().await, Some(0));
    let log = std::fs::read_to_string(agent.home("jobs/1/log")).unwrap();
    assert_eq!(log.lines().count(), 2_100_000);
    assert!(log.ends_with("99999\n100000\n"));
}
