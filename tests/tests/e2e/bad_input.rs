//! What comes in wrong gets a clear answer and harms nobody. Case 9 of the first issue.

use mlad_tests::{Outcome, Programs, Site, ends_with_this_test, eventually};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

const LONG: Duration = Duration::from_secs(90);

#[test]
fn strangers_and_disabled_people_stay_outside() {
    let site = Site::start();
    let (alice, mallory) = (site.person("alice"), site.stranger("mallory"));
    let outcome = mallory.ssh("echo in");
    assert_eq!((outcome.code, outcome.text().as_str()), (255, ""), "{}", outcome.stderr);
    let as_alice = Outcome::of(&mut mallory.ssh_command(&["-l", "alice"], &["echo in"]));
    assert_eq!((as_alice.code, as_alice.text().as_str()), (255, ""));
    let nobody = Outcome::of(&mut alice.ssh_command(&["-l", "nobody"], &["echo in"]));
    assert_eq!(nobody.code, 255);
    let own_name = Outcome::of(&mut alice.ssh_command(&["-l", "alice"], &["echo in"])).success();
    assert_eq!(own_name.text(), "in");
    site.admin(&["user", "disable", "alice"]).success();
    let outcome = alice.ssh("echo in");
    assert_eq!((outcome.code, outcome.text().as_str()), (255, ""));
    site.admin(&["user", "enable", "alice"]).success();
    alice.ssh("true").success();
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let site = Site::start();
    let alice = site.person("alice");
    alice.ssh("true").success();
    let address = ("127.0.0.1", site.ssh_port());
    let mut streams: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut noise = vec![0; 100_000];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    for (number, stream) in streams.iter_mut().enumerate() {
        match number % 4 {
            0 => drop(stream.write_all(&noise)),
            1 => drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n")),
            2 => drop(stream.write_all(&[b"SSH-2.0-x\r\n".as_slice(), &noise].concat())),
            _ => {}
        }
    }
    assert_eq!(alice.ssh("echo fine").success().text(), "fine");
}

#[test]
fn unknown_images_and_workspace_names_are_refused_clearly() {
    let site = Site::start();
    let alice = site.person("alice");
    let outcome = Outcome::of(&mut alice.ssh_command(&["-o", "SetEnv=MLAD_IMAGE=bass"], &["true"]));
    assert_ne!(outcome.code, 0);
    assert!(
        outcome.stderr.contains("bass") && outcome.stderr.contains("base"),
        "names what exists: {}",
        outcome.stderr
    );
    let not_built = Outcome::of(&mut alice.ssh_command(&["-o", "SetEnv=MLAD_IMAGE=pytorch"], &["true"]));
    assert_ne!(not_built.code, 0);
    assert!(not_built.stderr.starts_with("mlad: "), "{}", not_built.stderr);
    let outcome = Outcome::of(&mut alice.ssh_command(&["-l", "mlad+../../etc"], &["true"]));
    assert_ne!(outcome.code, 0);
    let job = alice.ssh("mlad submit --image nonsense -- true");
    assert!(job.code != 0 && job.stderr.contains("nonsense"), "{}", job.stderr);
    let job = alice.ssh("mlad submit --gpu 9g.90gb -- true");
    assert_eq!(job.code, 2, "{}", job.stderr);
    assert!(site.containers().is_empty(), "nothing was started for any of it");
}

#[test]
fn a_full_home_is_told_to_whoever_writes() {
    let site = Site::start();
    let alice = site.person("alice");
    let home = site.data("home/alice");
    fs::create_dir_all(&home).unwrap();
    alice.sftp("ls").success();
    let small = Mounted::tmpfs(&home, "size=2m,mode=700");
    let uid = site.mlad_json(&["admin", "user", "ls"])["users"][0]["uid"].as_u64().unwrap();
    Outcome::of(Command::new("chown").arg(format!("{uid}:{uid}")).arg(&home)).success();
    let big = alice.path("big");
    fs::write(&big, vec![7; 5_000_000]).unwrap();
    let outcome = alice.sftp(&format!("put {} big\n", big.display()));
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("No space left on device"), "{}", outcome.stderr);
    alice.sftp("rm big\n").success();
    // The first word makes room in the log for the last.
    let job = alice.ssh("mlad run --gpu cpu -- sh -c 'echo begun; head -c 5000000 /dev/zero > more'").exits(1);
    assert!(job.text().contains("No space left on device"), "{}", job.text());
    let job = &alice.ssh("mlad ps --all --json").success().json()["jobs"][0];
    assert_eq!((job["state"].as_str(), job["exit_code"].as_i64()), (Some("failed"), Some(1)));
    alice.sftp("rm more\n").success();
    alice.sftp("mkdir works-again\n").success();
    drop(small);
}

/// A file system that is unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, options: &str) -> Self {
        Outcome::of(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at)).success();
        Self(at.into())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        Outcome::of(Command::new("umount").arg("-l").arg(&self.0));
    }
}

#[test]
fn a_stopped_engine_is_told_and_recovered_from() {
    let folder = tempfile::Builder::new().prefix("mlad-engine-").tempdir_in("/tmp").unwrap();
    let mut engine = Engine::start(folder.path());
    engine.load_base_image();
    let site = Site::builder().engine(&engine.socket).start();
    let alice = site.person("alice");
    alice.ssh("true").success();
    engine.stop();
    alice.sftp("ls\n").success();
    let bob = site.person("bob");
    let outcome = bob.ssh("true");
    assert_eq!(outcome.code, 75, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("container engine"), "{}", outcome.stderr);
    engine.spawn();
    eventually("logins work again", LONG, || bob.ssh("true").code == 0);
    alice.ssh("true").success();
    drop(site);
    engine.stop();
}

/// A Docker engine of this test's own.
struct Engine {
    folder: PathBuf,
    socket: PathBuf,
    process: Option<Child>,
}

impl Engine {
    fn start(folder: &Path) -> Self {
        let mut engine = Self { folder: folder.into(), socket: folder.join("docker.sock"), process: None };
        engine.spawn();
        engine
    }

    fn spawn(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.join("log")).unwrap();
        // Told to end, not killed: it ends its containers first.
        let child = ends_with_this_test(Path::new("dockerd"), "TERM")
            .arg("--data-root")
            .arg(self.folder.join("data"))
            .arg("--exec-root")
            .arg(self.folder.join("exec"))
            .arg("--pidfile")
            .arg(self.folder.join("pid"))
            .arg("-H")
            .arg(format!("unix://{}", self.socket.display()))
            .args(["--bridge", "none", "--log-level", "warn"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(child);
        eventually("the engine answers", LONG, || self.docker(&["version"]).code == 0);
    }

    fn docker(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(Command::new("docker").arg("-H").arg(format!("unix://{}", self.socket.display())).args(arguments))
    }

    /// The base image, out of the engine that all tests share.
    fn load_base_image(&self) {
        let shared = format!("unix://{}", Programs::from_environment().engine.display());
        let mut saved =
            Command::new("docker").args(["-H", &shared, "save", "mlad/base:1"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut load = Command::new("docker");
        load.arg("-H").arg(format!("unix://{}", self.socket.display())).arg("load");
        Outcome::of_piped(load, saved.stdout.take().unwrap()).success();
        saved.wait().unwrap();
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.process.take() {
            let id = rustix::process::Pid::from_child(&child);
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
            // A test that has failed already is not to fail twice.
            if thread::panicking() {
                drop(child.kill());
                drop(child.wait());
            } else {
                eventually("the engine stops", LONG, || child.try_wait().unwrap().is_some());
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let below = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|at| Path::new(at).starts_with(&self.folder));
        below.for_each(|at| drop(Outcome::of(Command::new("umount").args(["-l", at]))));
    }
}

#[test]
fn broken_settings_are_named_with_key_and_line() {
    let site = Site::builder().prepare();
    let program = Programs::from_environment().folder.join("mlad-gateway");
    let good = fs::read_to_string(site.path("gateway.toml")).unwrap();
    let broken = site.path("broken.toml");
    for (text, named) in [
        (good.replace("[ssh]", "[ssh]\nlisten_adress = 1"), "listen_adress"),
        (good.replace("default_need = \"1g.5gb\"", "default_need = \"fast\""), "default_need"),
        (good.replace("cpu_milli = 2000", "cpu_milli = \"two\""), "cpu_milli"),
        (format!("{good}\n[ssh"), "line"),
    ] {
        fs::write(&broken, text).unwrap();
        let outcome = Outcome::of(Command::new(&program).args(["serve", "--config"]).arg(&broken));
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        assert!(outcome.stderr.contains(named), "names {named}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("broken.toml"), "names the file: {}", outcome.stderr);
    }
}
