//! Rows E1, E2, L1: jobs from a container. Case 5 of the first issue.

use mlad_tests::{Site, eventually, inside};
use std::{fs, io::Write as _, time::Duration};

const LONG: Duration = Duration::from_secs(120);
/// Longest time from a word in the log to its line on the screen, on a busy machine; the client asks again after 50 s.
const LIVE: Duration = Duration::from_secs(30);

#[test]
fn a_job_goes_from_the_queue_to_its_results() {
    let site = Site::start();
    let alice = site.person("alice");
    let script = "import os, sys\nprint('device', os.environ['NVIDIA_VISIBLE_DEVICES'])\n\
                  open(os.environ['MLAD_ARTIFACTS'] + '/model', 'w').write('weights')\nprint('to stderr', file=sys.stderr)\nsys.exit(3)\n";
    alice.ssh_with_input("cat > train.py", script.as_bytes()).success();
    let outcome = alice.ssh_inside("mlad run --gpu 2g.10gb -- python3 -u train.py").exits(3);
    assert!(outcome.text().starts_with("device MIG-") && outcome.text().ends_with("to stderr"), "{}", outcome.text());
    assert_eq!(alice.ssh_inside("mlad wait 1").exits(3).text(), "");
    alice.ssh_inside("mlad get 1 results").success();
    assert_eq!(alice.ssh("cat results/model .mlad/jobs/1/artifacts/model").success().text(), "weightsweights");
    let job = &alice.ssh_inside("mlad ps --all --json").success().json()["jobs"][0];
    assert_eq!((job["state"].as_str(), job["exit_code"].as_i64()), (Some("failed"), Some(3)));
    assert_eq!(alice.ssh_inside("mlad logs 1").success().text(), outcome.text());
    eventually("its container is gone", LONG, || site.containers() == ["w-1-1"]);
}

/// What comes only with the job's end, or with the next of the client's questions, is not live.
#[test]
fn output_comes_while_the_job_runs() {
    let site = Site::start();
    let alice = site.person("alice");
    let steps = "sh -c 'for step in 1 2 3; do echo step $step; while [ ! -e go$step ]; do sleep 0.1; done; done'";
    let mut client = alice.start(&[], &[&inside(&format!("mlad run --gpu cpu -- {steps}"))]);
    let lines = client.lines();
    let log = site.data("home/alice/.mlad/jobs/1/log");
    for step in 1..=3 {
        let said = format!("step {step}");
        eventually("the job has said it", LONG, || fs::read_to_string(&log).is_ok_and(|log| log.contains(&said)));
        assert_eq!(lines.next(LIVE), said);
        fs::write(site.data(&format!("home/alice/go{step}")), "").unwrap();
    }
    assert_eq!(client.ends(LONG), Some(0));
}

#[test]
fn a_hundred_megabytes_of_output_lose_no_byte() {
    let site = Site::start();
    let alice = site.person("alice");
    let outcome = alice.ssh_inside("mlad run --gpu cpu -- sh -c 'yes 0123456789abcde | head -c 100000000'").success();
    assert_eq!(outcome.stdout.len(), 100_000_000);
    assert!(outcome.stdout.chunks(16).all(|line| line == b"0123456789abcde\n"));
}

#[test]
fn control_c_cancels_the_job() {
    let site = Site::start();
    let alice = site.person("alice");
    let run = "mlad run --gpu cpu -- sh -c 'echo begun; sleep 1000'";
    // In the container's terminal, and where the gateway answers without a container.
    for (number, command) in [inside(run), run.to_owned()].iter().enumerate() {
        let mut client = alice.start(&["-tt"], &[command]);
        client.lines().find(LONG, |line| line.contains("begun").then_some(()));
        client.child.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
        assert_eq!(client.ends(LONG), Some(130), "{command}");
        let jobs = alice.ssh("mlad ps --all --json").success().json();
        let jobs = jobs["jobs"].as_array().unwrap();
        assert_eq!(jobs.len(), number + 1);
        assert!(jobs.iter().all(|job| job["state"] == "cancelled"), "{command}: {jobs:?}");
    }
    eventually("nothing is left", LONG, || site.containers() == ["w-1-1"]);
}

#[test]
fn a_job_killed_for_its_memory_or_its_time_says_so() {
    let site = Site::start();
    let alice = site.person("alice");
    let outcome = alice.ssh_inside("mlad run --gpu cpu --memory 64M -- python3 -c 'x = bytearray(1 << 30)'");
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("OutOfMemory") && outcome.stderr.contains("--memory"), "{}", outcome.stderr);
    let outcome = alice.ssh_inside("mlad run --gpu cpu --time 2s -- sleep 1000");
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("TimeLimit"), "{}", outcome.stderr);
}

#[test]
fn jobs_of_others_are_nobodys_business() {
    let site = Site::start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    let id = alice.ssh("mlad submit --gpu cpu -- true").success().text();
    alice.ssh(&format!("mlad wait {id}")).success();
    for command in ["logs", "cancel", "get", "wait"] {
        let outcome = bob.ssh(&format!("mlad {command} {id}"));
        assert_eq!(outcome.code, 3, "{command}: {}", outcome.stderr);
    }
    assert_eq!(bob.ssh("mlad ps --all --json").success().json()["jobs"].as_array().unwrap().len(), 0);
    let outcome = bob.ssh("mlad admin user ls");
    assert_eq!(outcome.code, 4, "{}", outcome.stderr);
}

#[test]
fn a_held_job_waits_for_its_owner() {
    let site = Site::start();
    let alice = site.person("alice");
    let id = alice.ssh("mlad submit --hold --gpu cpu -- echo released").success().text();
    let job = alice.ssh("mlad why --json").success().json();
    assert_eq!(job["jobs"][0]["state"], "held");
    alice.ssh(&format!("mlad release {id}")).success();
    alice.ssh(&format!("mlad wait {id}")).success();
    assert_eq!(alice.ssh(&format!("mlad logs {id}")).success().text(), "released");
}

#[test]
fn commands_answer_without_a_container() {
    let site = Site::start();
    let alice = site.person("alice");
    assert_eq!(alice.ssh("mlad ps --json").success().json()["jobs"].as_array().unwrap().len(), 0);
    assert_eq!(alice.ssh("mlad run --gpu cpu -- sh -c 'echo out; exit 4'").exits(4).text(), "out");
    let id = alice.ssh("mlad submit --gpu cpu -- sh -c 'echo kept > $MLAD_ARTIFACTS/f'").success().text();
    alice.ssh(&format!("mlad wait {id}")).success();
    alice.ssh(&format!("mlad get {id} from-outside")).success();
    assert_eq!(fs::read_to_string(site.data("home/alice/from-outside/f")).unwrap(), "kept\n");
    assert!(site.containers().iter().all(|name| !name.starts_with("w-")), "no workspace was started");
    assert_eq!(alice.ssh("mlad nonsense").code, 2);
    assert_eq!(alice.ssh("mlad logs 999").code, 3);
}
