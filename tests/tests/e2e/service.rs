//! The allocator as a service of its own, which the gateway reaches by URL: the same logins and jobs, through a crash.

use mlad_tests::{Lines, Programs, RunningClient, Site, ends_with_this_test, eventually};
use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    net::TcpListener,
    os::unix::fs::OpenOptionsExt as _,
    process::{Command, Stdio},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(60);

/// `mlad-allocator serve` for a site; killed when dropped.
struct Service {
    process: RunningClient,
    _output: Lines,
}

impl Service {
    fn start(site: &Site, listen: &str) -> Self {
        Self::start_with(site, listen, &["--nvml", &site.path("nvml.so").display().to_string()])
    }

    fn start_with(site: &Site, listen: &str, more: &[&str]) -> Self {
        let log = OpenOptions::new().create(true).append(true).open(site.path("allocator.log")).unwrap();
        let mut command = ends_with_this_test(&Programs::from_environment().folder.join("mlad-allocator"), "KILL");
        command.args(["serve", "--node", "elsewhere", "--listen", listen, "--token-file"]).arg(site.path("token"));
        command.arg("--database").arg(site.path("elsewhere.db")).args(more);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let output = Lines::of(child.stdout.take().unwrap());
        let process = RunningClient { child };
        let said = output.next(SOON);
        assert!(said.starts_with("serving http://"), "{said}\n{}", log_of(site));
        Self { process, _output: output }
    }

    /// As a crash would.
    fn kill(mut self) {
        self.process.child.kill().unwrap();
        self.process.child.wait().unwrap();
    }
}

fn log_of(site: &Site) -> String {
    fs::read_to_string(site.path("allocator.log")).unwrap_or_default()
}

#[test]
fn the_gateway_works_with_an_allocator_elsewhere_and_outlives_its_crash() {
    let listen = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut site = Site::builder()
        .without("allocator", "nvml_library")
        .setting("allocator", &format!("url = \"http://{listen}\""))
        .setting("allocator", "token_file = \"token\"")
        .prepare();
    let mut token = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(site.path("token"));
    token.as_mut().unwrap().write_all(b"a-secret-of-the-two-alone-0123456789\n").unwrap();
    let service = Service::start(&site, &listen);
    site.start_gateway();
    let (alice, bob) = (site.person("alice"), site.person("bob"));

    let hers = alice.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text();
    assert!(hers.starts_with("MIG-"), "{hers}");
    let job = "mlad run --gpu 2g.10gb -- sh -c 'echo $NVIDIA_VISIBLE_DEVICES; exit 5'";
    let slice_of_the_job = alice.ssh_inside(job).exits(5).text();
    assert!(slice_of_the_job.starts_with("MIG-") && slice_of_the_job != hers, "{slice_of_the_job}");
    assert!(!site.log().contains("a-secret-of-the-two-alone"), "no secret is logged");

    // Who is in does not notice; who comes next is served by the next one, which knows who holds what.
    assert_eq!(site.mlad_json(&["gpu"]).get("late"), None);
    service.kill();
    let map = site.mlad_json(&["gpu"]);
    assert!(map["late"].is_string() && !map["gpus"].as_array().unwrap().is_empty(), "{map}");
    assert!(site.mlad(&["gpu"]).success().text().contains("NOT CURRENT"));
    assert_eq!(alice.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text(), hers);
    let _service = Service::start(&site, &listen);
    let mut his = String::new();
    eventually("the next one serves", SOON, || {
        let outcome = bob.ssh("echo $NVIDIA_VISIBLE_DEVICES");
        his = outcome.text();
        outcome.code == 0
    });
    assert!(his.starts_with("MIG-") && his != hers, "{his} beside {hers}");
    let who = site.mlad_json(&["who"]);
    let mut holders: Vec<&str> =
        who["leases"].as_array().unwrap().iter().map(|lease| lease["user"].as_str().unwrap()).collect();
    holders.sort_unstable();
    assert_eq!(holders, ["alice", "bob"]);
}

/// Runs a program of ours to its end.
fn done(command: &mut Command) {
    let outcome = command.output().unwrap();
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
}

#[test]
fn slices_of_a_node_with_a_daemon_serve_logins_and_jobs() {
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (listen, nodes) = (free(), free());
    let mut site = Site::builder()
        .without("allocator", "nvml_library")
        .setting("allocator", &format!("url = \"http://{listen}\""))
        .setting("allocator", "token_file = \"token\"")
        .setting("allocator", "node = \"dgx-1\"")
        .prepare();
    let mut token = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(site.path("token"));
    token.as_mut().unwrap().write_all(b"a-secret-of-the-two-alone-0123456789\n").unwrap();
    let program = Programs::from_environment().folder.join("mlad-allocator");
    let folder = site.path("certificates").display().to_string();
    done(Command::new(&program).args(["certificate", "authority", "--folder", &folder]));
    for name in ["allocator", "dgx-1"] {
        done(Command::new(&program).args(["certificate", "issue", name, "--authority", &folder, "--folder", &folder]));
    }
    let at = |name: &str| format!("{folder}/{name}");
    let (authority, pem, key) = (at("authority.pem"), at("allocator.pem"), at("allocator.key"));
    let _service = Service::start_with(
        &site,
        &listen,
        &[
            "--nvml",
            "none",
            "--nodes-listen",
            &nodes,
            "--nodes-certificate",
            &pem,
            "--nodes-key",
            &key,
            "--nodes-authority",
            &authority,
        ],
    );
    let mut daemon = ends_with_this_test(&program, "KILL");
    daemon.args(["node", "--allocator", &nodes, "--server-name", "allocator", "--node", "dgx-1"]);
    daemon.args(["--certificate", &at("dgx-1.pem"), "--key", &at("dgx-1.key"), "--authority", &authority]);
    daemon.arg("--nvml").arg(site.path("nvml.so")).arg("--state").arg(site.path("node-state"));
    let log = OpenOptions::new().create(true).append(true).open(site.path("node.log")).unwrap();
    let _daemon = RunningClient { child: daemon.stdin(Stdio::null()).stderr(log).spawn().unwrap() };
    site.start_gateway();
    let alice = site.person("alice");
    eventually("the node is there", SOON, || {
        let list = site.mlad_json(&["admin", "node", "ls"]);
        let nodes = list["nodes"].as_array().unwrap();
        nodes.iter().any(|node| node["name"] == "dgx-1" && node["state"] == "ready" && node["gpus"] != 0)
    });
    let hers = alice.ssh("echo $NVIDIA_VISIBLE_DEVICES").success().text();
    assert!(hers.starts_with("MIG-"), "{hers}");
    let his = alice.ssh("mlad run --gpu 2g.10gb -- sh -c 'echo $NVIDIA_VISIBLE_DEVICES; exit 5'").exits(5).text();
    assert!(his.starts_with("MIG-") && his != hers, "{his}");
    let who = site.mlad_json(&["who"]);
    assert_eq!(who["leases"][0]["node"], "dgx-1", "{who}");
    let refused = site.admin(&["node", "rm", "dgx-1"]);
    assert!(refused.code != 0 && refused.stderr.contains("answers"), "{refused:?}");
}
