//! Rows K1, K2: the same login, files and jobs, with pods of a real cluster. `scripts/test kubernetes` runs these.

use mlad_tests::{Outcome, Site, eventually};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

const LONG: Duration = Duration::from_secs(180);

/// An installation whose containers are pods.
struct OnCluster {
    site: Site,
    cluster: PathBuf,
}

impl OnCluster {
    fn start() -> Self {
        let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
        let (cluster, kubeconfig) = (path("MLAD_TEST_CLUSTER"), path("MLAD_TEST_KUBECONFIG"));
        let settings = format!(
            "kubeconfig = '{}'\nagent_image = 'registry.invalid/mlad/agent:1'\ncpu_request_milli = 50\nschedule_seconds = 20\n\
             volumes = [{{ folder = 'data', host_path = 'data' }}]",
            kubeconfig.display()
        );
        let site = Site::builder()
            .setting("kubernetes", &settings)
            .setting("allocator", "node_name = 'localhost'")
            .catalog(
                "[[image]]\nname = 'base'\nreference = 'registry.invalid/mlad/base:1'\ndescription = 'the base'\n\
                 [[image]]\nname = 'none'\nreference = 'registry.invalid/mlad/none:1'\ndescription = 'not there'\n",
            )
            .start();
        Self { site, cluster }
    }

    fn kubectl(&self, arguments: &[&str]) -> Outcome {
        let kubeconfig = self.cluster.join("admin.kubeconfig");
        Outcome::of(Command::new("kubectl").arg("--kubeconfig").arg(kubeconfig).args(["-n", "mlad"]).args(arguments))
    }

    /// Names of its workloads that have a pod, sorted.
    fn pods(&self) -> Vec<String> {
        let of_it = format!("mlad.instance={}", self.instance());
        let names = "jsonpath={range .items[*]}{.metadata.labels.mlad\\.workload}{\"\\n\"}{end}";
        let mut names: Vec<String> = self
            .kubectl(&["get", "pods", "-l", &of_it, "-o", names])
            .success()
            .text()
            .lines()
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }
}

impl Deref for OnCluster {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl Drop for OnCluster {
    fn drop(&mut self) {
        let of_it = format!("mlad.instance={}", self.instance());
        if std::thread::panicking() {
            eprintln!("{}", self.kubectl(&["describe", "pods", "-l", &of_it]).text());
        }
        self.site.kill_gateway();
        self.kubectl(&["delete", "pods,secrets", "-l", &of_it, "--grace-period=1"]);
    }
}

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
    site.site.kill_gateway();
    site.site.start_gateway();
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
    let halted = Halted::new(&site.cluster, "kube-apiserver");
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
