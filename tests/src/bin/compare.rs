//! MLAD beside what people use without it, in one run on one machine: OpenSSH's sshd in a container of the same
//! image, and `docker run`; on a cluster, `kubectl`. Started by `scripts/benchmark`, which fetches OpenSSH's server, or
//! starts the cluster.
//!
//! The two sides take turns, so that a slow minute of the machine hits both; what is printed is the ratio of the
//! medians, and how far apart the quarters of each side lie.

use mlad_tests::{OnCluster, Person, Programs, Site, Sshd, eventually};
use std::{
    fs,
    io::{Read as _, Write as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const GIBIBYTE: u64 = 1 << 30;
/// Commands that give and take it.
const ZEROS: &str = "head -c 1073741824 /dev/zero";
const SINK: &str = "cat > /dev/null";

fn main() {
    let rounds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(10);
    if std::env::var_os("MLAD_TEST_CLUSTER").is_some() {
        return on_cluster(rounds);
    }
    let site = Site::start();
    let alice = site.person("alice");
    let sshd = Sshd::start(&site, &alice);
    alice.ssh("true").success();
    sshd.person.ssh("true").success();

    print_head();
    report(
        "connect + `true`, workspace running, against sshd",
        rounds * 3,
        || timed(|| drop(alice.ssh("true").success())),
        || timed(|| drop(sshd.person.ssh("true").success())),
    );
    report("1 GiB down, the client's defaults, against sshd", rounds, || down(&alice, &[]), || down(&sshd.person, &[]));
    report("1 GiB up, the client's defaults, against sshd", rounds, || up(&alice, &[]), || up(&sshd.person, &[]));
    let gcm = ["-c", "aes128-gcm@openssh.com"];
    report("1 GiB down, aes128-gcm on both, against sshd", rounds, || down(&alice, &gcm), || down(&sshd.person, &gcm));
    report("1 GiB up, aes128-gcm on both, against sshd", rounds, || up(&alice, &gcm), || up(&sshd.person, &gcm));
    report("sftp get 1 GiB, against sshd", rounds, || get(&alice), || get(&sshd.person));
    report("sftp put 1 GiB, against sshd", rounds, || put(&alice), || put(&sshd.person));
    report(
        "`ssh` to prompt with no workspace, against `docker run -t`",
        rounds,
        || prompt_by_ssh(&site, &alice),
        || prompt_by_docker(&site),
    );
}

/// Pods, against what `kubectl` does with the same image.
fn on_cluster(rounds: usize) {
    let site = OnCluster::start();
    let alice = site.person("alice");
    alice.ssh("true").success();
    let pod = format!("{}-w-1-1", site.instance());
    let theirs =
        |command: &str| site.kubectl_command(&["exec", "-i", &pod, "-c", "workload", "--", "sh", "-c", command]);
    print_head();
    report(
        "connect + `true`, the pod running, against `kubectl exec`",
        rounds * 3,
        || timed(|| drop(alice.ssh("true").success())),
        || timed(|| assert!(theirs("true").status().unwrap().success())),
    );
    report("1 GiB down, against `kubectl exec`", rounds, || down(&alice, &[]), || down_by(theirs(ZEROS)));
    report("1 GiB up, against `kubectl exec`", rounds, || up(&alice, &[]), || up_by(theirs(SINK)));
    report(
        "`ssh` to prompt with no workspace, against `kubectl run -it`",
        rounds,
        || {
            alice.ssh("mlad workspace stop");
            eventually("no pod", Duration::from_secs(60), || site.pods().is_empty());
            until_prompt(alice.ssh_command(&["-tt"], &[]))
        },
        || {
            let name = format!("{}-prompt", site.instance());
            let image = "--image=registry.invalid/mlad/base:1";
            let shell = ["--image-pull-policy=IfNotPresent", "--restart=Never", "--", "bash", "-l"];
            let arguments = [&["run", "-i", "--tty", &name, image], shell.as_slice()].concat();
            // kubectl asks for a terminal of its own.
            let mut command = Command::new("script");
            command.args(["-qec", &words(&site.kubectl_command(&arguments)), "/dev/null"]);
            let time = until_prompt(command);
            site.kubectl(&["delete", "pod", &name, "--grace-period=1"]).success();
            time
        },
    );
}

/// A command as a shell takes it.
fn words(command: &Command) -> String {
    let all = std::iter::once(command.get_program()).chain(command.get_args());
    all.map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ")
}

fn print_head() {
    println!("| what | MLAD | other | ratio | spread MLAD / other |\n|---|---|---|---|---|");
}

/// Runs both sides in turns and prints a line of the table.
fn report(what: &str, rounds: usize, mut ours: impl FnMut() -> Duration, mut theirs: impl FnMut() -> Duration) {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        left.push(ours());
        right.push(theirs());
    }
    let (left, right) = (Sample::of(left), Sample::of(right));
    println!(
        "| {what} | {:.3} s | {:.3} s | {:.2} | {:.0} % / {:.0} % |",
        left.median,
        right.median,
        left.median / right.median,
        left.spread * 100.0,
        right.spread * 100.0
    );
}

struct Sample {
    median: f64,
    /// Distance of the quarters, as a share of the median.
    spread: f64,
}

impl Sample {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64();
        Self { median: at(0.5), spread: (at(0.75) - at(0.25)) / at(0.5) }
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

fn down(person: &Person, options: &[&str]) -> Duration {
    down_by(person.ssh_command(options, &[ZEROS]))
}

fn down_by(mut command: Command) -> Duration {
    timed(|| {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let got = std::io::copy(&mut child.stdout.take().unwrap(), &mut std::io::sink()).unwrap();
        assert!(child.wait().unwrap().success() && got == GIBIBYTE);
    })
}

fn up(person: &Person, options: &[&str]) -> Duration {
    up_by(person.ssh_command(options, &[SINK]))
}

fn up_by(mut command: Command) -> Duration {
    timed(|| {
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        let piece = vec![0; 1 << 20];
        for _ in 0..GIBIBYTE / piece.len() as u64 {
            input.write_all(&piece).unwrap();
        }
        drop(input);
        assert!(child.wait().unwrap().success());
    })
}

fn get(person: &Person) -> Duration {
    person.ssh("[ -e big ] || head -c 1073741824 /dev/zero > big").success();
    timed(|| drop(person.sftp("get big /dev/null\n").success()))
}

fn put(person: &Person) -> Duration {
    let big = person.path("big");
    if !big.exists() {
        fs::File::create(&big).unwrap().set_len(GIBIBYTE).unwrap();
    }
    timed(|| drop(person.sftp(&format!("put {} put-here\n", big.display())).success()))
}

fn prompt_by_ssh(site: &Site, person: &Person) -> Duration {
    person.ssh("mlad workspace stop");
    eventually("no container", Duration::from_secs(60), || site.containers().is_empty());
    until_prompt(person.ssh_command(&["-tt"], &[]))
}

fn prompt_by_docker(site: &Site) -> Duration {
    let mut command = Command::new("docker");
    command.env("DOCKER_HOST", format!("unix://{}", Programs::from_environment().engine.display()));
    command.args(["run", "--rm", "-t", "--name", &format!("{}-prompt", site.instance())]);
    command.args(["--network", site.instance(), "mlad/base:1", "bash", "-l"]);
    let time = until_prompt(command);
    site.docker(&["rm", "-f", &format!("{}-prompt", site.instance())]);
    time
}

fn until_prompt(mut command: Command) -> Duration {
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
    while !(seen.ends_with(b"$ ") || seen.ends_with(b"# ")) {
        let count = out.read(&mut piece).unwrap();
        assert!(count > 0, "no prompt: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&piece[..count]);
    }
    let time = begun.elapsed();
    drop(child.kill());
    drop(child.wait());
    time
}
