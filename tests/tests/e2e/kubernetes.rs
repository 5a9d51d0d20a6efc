//! Rows K1, K2: the same login, files and jobs, with pods of a real cluster. `scripts/test kubernetes` runs these.

use mlad_tests::{OnCluster, Outcome, eventually};
use rustix::process::{Pid, Signal, kill_process};
use std::{fs, path::Path, thread, time::Duration};

const LONG: Duration = Duration::from_secs(180);

#[test]
fn a_login_a_file_and_a_job() {
    let site = OnCluster::start();
    let alice = site.person("alice");
    let devices = alice.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text();
    assert!(devices.starts_with("MIG-"), "{devices}");
    assert_eq!(alice.ssh("id -un; id -u; pwd; hostname").success().text(), "alice\n20000\n/home/alice\ndefault");
    assert_eq!(site.pods(), ["w-1-1"]);
    for code in [0, 7, 255] {
        alice.ssh(&format!("exit {code}")).exits(code);
    }
    let streams = alice.ssh("echo out; echo err >&2").success();
    assert_eq!((streams.text().as_str(), streams.stderr.as_str()), ("out", "err\n"));

    // What comes by sftp is there in the pod, and its owner's.
    let file = site.path("weights");
    fs::write(&file, "learned\n").unwrap();
    alice.sftp(&format!("put {} weights", file.display())).success();
    assert_eq!(alice.ssh("cat weights; stat -c %U weights").success().text(), "learned\nalice");

    let job = "sh -c 'echo on $NVIDIA_VISIBLE_DEVICES; echo kept > $MLAD_ARTIFACTS/model; exit 3'";
    let outcome = alice.ssh_inside(&format!("mlad run --gpu 2g.10gb -- {job}")).exits(3);
    assert!(outcome.text().starts_with("on MIG-"), "{}", outcome.text());
    assert_eq!(alice.ssh("cat .mlad/jobs/1/artifacts/model").success().text(), "kept");
    eventually("the job's pod is gone", LONG, || site.pods() == ["w-1-1"]);
    let secrets = site.kubectl(&["get", "secrets", "-l", &format!("mlad.instance={}", site.instance()), "-o", "name"]);
    assert_eq!(secrets.success().text().lines().count(), 2, "the authority's, and the workspace's");
}

#[test]
fn much_data_both_ways_and_a_terminal() {
    let site = OnCluster::start();
    let alice = site.person("alice");
    let sum = alice.ssh("yes mlad | head -c 50000000 > big; sha256sum < big").success().text();
    let down = alice.ssh("cat big").success();
    assert_eq!(down.stdout.len(), 50_000_000);
    assert_eq!(alice.ssh_with_input("sha256sum", &down.stdout).success().text(), sum);
    let shown = Outcome::of(&mut alice.ssh_command(&["-tt"], &["tty; stty size; echo $TERM"])).success().text();
    assert!(shown.contains("/dev/pts/"), "{shown}");
    // A terminal whose client goes is hung up.
    let mut sleeper = alice.start(&["-tt"], &["echo begun; exec sleep 4242"]);
    assert_eq!(sleeper.lines().next(LONG).trim(), "begun");
    drop(sleeper);
    let there = "grep -qa 'sleep.424[2]' /proc/[0-9]*/cmdline";
    eventually("the command has ended", LONG, || alice.ssh(there).code == 1);
}

#[test]
fn a_killed_gateway_finds_its_pods_again() {
    let mut site = OnCluster::start();
    let alice = site.person("alice");
    alice.ssh("touch /tmp/kept").success();
    let command = "sh -c 'echo $MLAD_JOB_ATTEMPT >> runs; while [ ! -e go ]; do sleep 0.2; done'";
    alice.ssh(&format!("mlad submit --gpu 1g.5gb -- {command}")).success();
    let runs = site.data("home/alice/runs");
    eventually("the job runs", LONG, || fs::read_to_string(&runs).is_ok_and(|runs| runs == "1\n"));
    site.site_mut().kill_gateway();
    site.site_mut().start_gateway();
    alice.ssh("ls /tmp/kept").success();
    alice.ssh("touch go").success();
    alice.ssh_inside("mlad wait 1").success();
    assert_eq!(fs::read_to_string(&runs).unwrap(), "1\n", "it ran once");
}

#[test]
fn a_pod_that_goes_is_told_and_what_cannot_start_says_why() {
    let site = OnCluster::start();
    let alice = site.person("alice");
    alice.ssh("true").success();
    let mut session = alice.start(&[], &["echo begun; exec sleep 1000"]);
    assert_eq!(session.lines().next(LONG), "begun");
    site.kubectl(&["delete", "pod", &format!("{}-w-1-1", site.instance()), "--grace-period=1"]).success();
    assert!(session.ends(LONG).is_some_and(|code| code != 0));
    alice.ssh("true").success();
    assert_eq!(site.pods(), ["w-1-2"], "the next login begins anew");

    let bob = site.person("bob");
    let missing = Outcome::of(&mut bob.ssh_command(&["-o", "SetEnv=MLAD_IMAGE=none"], &["true"]));
    assert_ne!(missing.code, 0);
    assert!(missing.stderr.contains("none"), "{}", missing.stderr);
}

/// Stops a program of the cluster for as long as this lives.
struct Halted(Pid);

impl Halted {
    fn new(cluster: &Path, program: &str) -> Self {
        let id = fs::read_to_string(cluster.join("pid").join(program)).unwrap();
        let id = Pid::from_raw(id.trim().parse().unwrap()).unwrap();
        kill_process(id, Signal::STOP).unwrap();
        Self(id)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

#[test]
fn while_the_api_server_is_away_sessions_go_on_and_logins_wait() {
    let site = OnCluster::start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    let mut session = alice.start(&[], &["echo begun; cat go; while [ ! -e go ]; do sleep 0.1; done; echo gone on"]);
    let lines = session.lines();
    assert_eq!(lines.next(LONG), "begun");
    let halted = Halted::new(site.cluster(), "kube-apiserver");
    assert_eq!(alice.ssh("touch go; echo another session").success().text(), "another session");
    assert_eq!(lines.next(LONG), "gone on");
    assert_eq!(session.ends(LONG), Some(0));
    thread::scope(|scope| {
        let login = scope.spawn(|| bob.ssh("echo in").success().text());
        eventually("bob's login waits for the cluster", LONG, || site.log().contains("user=\"bob\""));
        // Longer than any question of the gateway's lasts.
        eventually("the gateway asks again", LONG, || site.log().contains("trying again"));
        assert!(!login.is_finished(), "it did not wait");
        drop(halted);
        assert_eq!(login.join().unwrap(), "in");
    });
}

#[test]
fn what_the_cluster_takes_away_is_told_and_begins_anew() {
    let site = OnCluster::with("ephemeral_storage_mib = 64");
    let alice = site.person("alice");
    let mut session = alice.start(&[], &["echo begun; head -c 100000000 /dev/zero > /tmp/much; sleep 1000"]);
    assert_eq!(session.lines().next(LONG), "begun");
    let job = "sh -c 'echo $MLAD_JOB_ATTEMPT >> runs; [ $(wc -l < runs) = 2 ] || head -c 100000000 /dev/zero > /tmp/much; while [ ! -e go ]; do sleep 0.2; done'";
    alice.ssh(&format!("mlad submit --gpu 1g.5gb -- {job}")).success();
    // The kubelet looks at its disks every ten seconds.
    assert_ne!(session.ends(LONG), Some(0));
    eventually("the log says why", LONG, || site.log().contains("it was taken away (Evicted: "));
    let runs = site.data("home/alice/runs");
    eventually("the job runs again", LONG, || fs::read_to_string(&runs).is_ok_and(|runs| runs == "1\n2\n"));
    alice.ssh("touch go").success();
    alice.ssh_inside("mlad wait 1").success();
}

#[test]
fn a_node_that_is_cut_off_has_nothing_run_twice() {
    let site = OnCluster::start();
    let alice = site.person("alice");
    let command = "sh -c 'echo $MLAD_JOB_ATTEMPT >> runs; while [ ! -e go ]; do sleep 0.2; done'";
    alice.ssh(&format!("mlad submit --gpu 1g.5gb -- {command}")).success();
    let runs = site.data("home/alice/runs");
    eventually("the job runs", LONG, || fs::read_to_string(&runs).is_ok_and(|runs| runs == "1\n"));
    let halted = Halted::new(site.cluster(), "kubelet");
    // As the cluster does when a node has not been heard of for minutes.
    site.kubectl(&["delete", "pod", &format!("{}-j-1-1", site.instance()), "--grace-period=1", "--wait=false"])
        .success();
    alice.ssh("mlad submit --gpu cpu -- true").success();
    let state =
        |id: usize| site.mlad_json(&["ps", "--user", "*", "--all"])["jobs"][id]["state"].as_str().map(str::to_owned);
    eventually("the second job waits for the node", LONG, || {
        (0..2).any(|job| state(job).as_deref() == Some("starting"))
    });
    assert_eq!(fs::read_to_string(&runs).unwrap(), "1\n", "nobody has said that the first attempt is gone");
    assert_eq!(site.mlad_json(&["who"])["leases"].as_array().unwrap().len(), 2, "its slice is still taken");
    drop(halted);
    eventually("it runs again", LONG, || fs::read_to_string(&runs).is_ok_and(|runs| runs == "1\n2\n"));
    alice.ssh("touch go").success();
    alice.ssh_inside("mlad wait 1").success();
}
