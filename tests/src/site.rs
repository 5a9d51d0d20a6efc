//! One installation: a gateway process with everything of its own.

use crate::{Outcome, Person, eventually};
use rustix::process::{Pid, Signal};
use std::{
    fs,
    net::TcpListener,
    os::unix::{fs::symlink, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Longest time from a gateway's start to its first answer.
const START: Duration = Duration::from_secs(60);

/// Where the programs under test and the engine are.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Folder of `mlad-gateway`, `mlad-allocator` and `libnvidia_ml_sim.so` (`MLAD_TEST_PROGRAMS`).
    pub folder: PathBuf,
    /// The static `mlad` (`MLAD_TEST_MLAD`).
    pub mlad: PathBuf,
    /// Socket of a Docker engine that has `mlad/base:1` (`MLAD_TEST_DOCKER_SOCKET`).
    pub engine: PathBuf,
}

impl Programs {
    /// Reads the environment that `scripts/test` sets.
    ///
    /// # Panics
    /// When it is not set.
    pub fn from_environment() -> Self {
        let path = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .unwrap_or_else(|| panic!("{name} is not set: run these tests by scripts/test e2e"))
        };
        Self {
            folder: path("MLAD_TEST_PROGRAMS"),
            mlad: path("MLAD_TEST_MLAD"),
            engine: path("MLAD_TEST_DOCKER_SOCKET"),
        }
    }
}

/// An installation to make.
#[derive(Debug)]
pub struct SiteBuilder {
    programs: Programs,
    machine: String,
    sections: Vec<(String, String)>,
    without: Vec<(String, String)>,
    engine: Option<PathBuf>,
    catalog: Option<String>,
}

impl SiteBuilder {
    /// Another machine than 8 × A100-40GB: TOML of `docs/simulated-gpus.md`.
    #[must_use]
    pub fn machine(mut self, toml: &str) -> Self {
        self.machine = toml.into();
        self
    }

    /// Lines for a section of the settings (`workspace`, `idle_minutes = 1`), after those of the site itself.
    #[must_use]
    pub fn setting(mut self, section: &str, line: &str) -> Self {
        self.sections.push((section.into(), line.into()));
        self
    }

    /// Leaves a key out that the site itself sets (`workspace`, `default_need`).
    #[must_use]
    pub fn without(mut self, section: &str, key: &str) -> Self {
        self.without.push((section.into(), key.into()));
        self
    }

    /// Another catalog than that of the repository.
    #[must_use]
    pub fn catalog(mut self, toml: &str) -> Self {
        self.catalog = Some(toml.into());
        self
    }

    /// Another engine than the one all tests share.
    #[must_use]
    pub fn engine(mut self, socket: &Path) -> Self {
        self.engine = Some(socket.into());
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(self) -> Site {
        let mut site = self.prepare();
        site.start_gateway();
        site
    }

    /// Makes its folders and settings, but does not start the gateway.
    ///
    /// # Panics
    /// When the folders cannot be made.
    pub fn prepare(self) -> Site {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let instance = format!("t{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // Where scripts/test wants files: under a short path, since Unix sockets lie below it.
        let folder = tempfile::Builder::new().prefix("site-").tempdir().unwrap();
        let engine = self.engine.unwrap_or_else(|| self.programs.engine.clone());
        let site = Site {
            ssh_port: free_port(),
            api_port: free_port(),
            folder,
            instance,
            engine,
            programs: self.programs,
            gateway: None,
        };
        // The simulated library looks for its machine beside itself, under the name it was loaded by.
        symlink(site.programs.folder.join("libnvidia_ml_sim.so"), site.path("nvml.so")).unwrap();
        fs::write(site.path("nvml.so.toml"), &self.machine).unwrap();
        if let Some(catalog) = &self.catalog {
            fs::write(site.path("catalog.toml"), catalog).unwrap();
        }
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        fs::write(site.path("gateway.toml"), site.settings(repository, &self.sections, &self.without)).unwrap();
        site
    }
}

/// A running installation.
#[derive(Debug)]
pub struct Site {
    folder: TempDir,
    instance: String,
    engine: PathBuf,
    programs: Programs,
    ssh_port: u16,
    api_port: u16,
    gateway: Option<Child>,
}

impl Site {
    /// An installation on a simulated DGX A100: eight A100-40GB in MIG mode, no slices.
    pub fn builder() -> SiteBuilder {
        SiteBuilder {
            programs: Programs::from_environment(),
            machine: "driver_version = \"550.54.15\"\n[[gpu]]\nmodel = \"A100-40GB\"\ncount = 8\nmig = true\n".into(),
            sections: Vec::new(),
            without: Vec::new(),
            engine: None,
            catalog: None,
        }
    }

    /// The same, started.
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path in its data folder, `home/alice/x`.
    pub fn data(&self, name: &str) -> PathBuf {
        self.path("data").join(name)
    }

    /// Port of its SSH server on 127.0.0.1.
    pub fn ssh_port(&self) -> u16 {
        self.ssh_port
    }

    /// Port of its HTTP API on 127.0.0.1.
    pub fn api_port(&self) -> u16 {
        self.api_port
    }

    /// The value of the `mlad.instance` label of its containers.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Process id of its gateway.
    ///
    /// # Panics
    /// When it does not run.
    pub fn gateway_id(&self) -> u32 {
        self.gateway.as_ref().unwrap().id()
    }

    /// What the gateway logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("gateway.log")).unwrap_or_default()
    }

    /// Most memory the gateway process has taken since it was started, in KiB.
    ///
    /// # Panics
    /// When it does not run.
    pub fn gateway_peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.gateway_id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Starts the gateway and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    pub fn start_gateway(&mut self) {
        self.spawn_gateway();
        let log = self.path("gateway.log");
        eventually(&format!("the gateway answers (log: {})", log.display()), START, || {
            if let Some(status) = self.gateway.as_mut().unwrap().try_wait().unwrap() {
                panic!("the gateway ended with {status}:\n{}", self.log());
            }
            self.admin(&["user", "ls"]).code == 0
        });
    }

    fn spawn_gateway(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("gateway.log")).unwrap();
        let child = ends_with_this_test(&self.programs.folder.join("mlad-gateway"), "KILL")
            .args(["serve", "--config"])
            .arg(self.path("gateway.toml"))
            .env("RUST_LOG", std::env::var("MLAD_TEST_LOG").unwrap_or_else(|_| "info".into()))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        self.gateway = Some(child);
    }

    /// Kills the gateway as a crash would (SIGKILL).
    pub fn kill_gateway(&mut self) {
        if let Some(mut child) = self.gateway.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Ends the gateway as an administrator would (SIGTERM), and waits for it.
    pub fn stop_gateway(&mut self) {
        if let Some(mut child) = self.gateway.take() {
            rustix::process::kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
            eventually("the gateway ends when it is told to", START, || child.try_wait().unwrap().is_some());
        }
    }

    /// Replaces a line of its settings, and has the gateway read them anew (SIGHUP).
    ///
    /// # Panics
    /// When there is no such line, or the gateway does not run.
    pub fn change_setting(&self, old: &str, new: &str) {
        let path = self.path("gateway.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(old), "{old}");
        fs::write(&path, text.replacen(old, new, 1)).unwrap();
        let gateway = Pid::from_child(self.gateway.as_ref().unwrap());
        rustix::process::kill_process(gateway, Signal::HUP).unwrap();
    }

    /// `mlad admin …` on the administration socket.
    pub fn admin(&self, arguments: &[&str]) -> Outcome {
        self.mlad(&[&["admin"], arguments].concat())
    }

    /// `mlad …` on the administration socket.
    pub fn mlad(&self, arguments: &[&str]) -> Outcome {
        let api = format!("unix:{}", self.path("run/admin.sock").display());
        Outcome::of(Command::new(&self.programs.mlad).args(["--api", &api]).args(arguments))
    }

    /// The same with `--json`, parsed.
    ///
    /// # Panics
    /// When it fails or does not print JSON.
    pub fn mlad_json(&self, arguments: &[&str]) -> serde_json::Value {
        self.mlad(&[&["--json"], arguments].concat()).success().json()
    }

    /// Adds a user with a key of their own.
    ///
    /// # Panics
    /// When that fails.
    pub fn person(&self, name: &str) -> Person {
        self.admin(&["user", "add", name]).success();
        let person = self.stranger(name);
        self.admin(&["key", "add", name, person.public_key().to_str().unwrap()]).success();
        person
    }

    /// Somebody with a key that the site does not know.
    pub fn stranger(&self, name: &str) -> Person {
        Person::new(&self.path("people").join(name), self.ssh_port)
    }

    /// Names of its workloads that have a container (`w-1-1`, …), sorted.
    pub fn containers(&self) -> Vec<String> {
        let filter = format!("label=mlad.instance={}", self.instance);
        let outcome = self.docker(&["ps", "-a", "--filter", &filter, "--format", "{{.Label \"mlad.workload\"}}"]);
        let mut names: Vec<String> = outcome.success().text().lines().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// The slices that its containers see, each with its workload: what the engine says, not the gateway.
    /// Containers that exist count, whether they run or not.
    pub fn visible_slices(&self) -> Vec<(String, String)> {
        let filter = format!("label=mlad.instance={}", self.instance);
        let ids = self.docker(&["ps", "-aq", "--filter", &filter]).success().text();
        let ids: Vec<&str> = ids.split_whitespace().collect();
        if ids.is_empty() {
            return Vec::new();
        }
        // Some may be gone by now; of the others it tells all the same.
        let containers = self.docker(&[&["inspect"], ids.as_slice()].concat()).json();
        let of = |container: &serde_json::Value| {
            let workload = container["Config"]["Labels"]["mlad.workload"].as_str().unwrap().to_owned();
            let variables = container["Config"]["Env"].as_array().unwrap().iter().filter_map(serde_json::Value::as_str);
            let devices = variables.filter_map(|line| line.strip_prefix("NVIDIA_VISIBLE_DEVICES=")).next_back();
            let devices = devices.unwrap_or("void").split(',').filter(|device| *device != "void");
            devices.map(|device| (workload.clone(), device.to_owned())).collect::<Vec<_>>()
        };
        containers.as_array().unwrap().iter().flat_map(of).collect()
    }

    /// The `docker` client on its engine.
    pub fn docker(&self, arguments: &[&str]) -> Outcome {
        let host = format!("unix://{}", self.engine.display());
        Outcome::of(Command::new("docker").args(["-H", &host]).args(arguments))
    }

    /// The `nvml-sim` tool on its machine.
    pub fn nvml_sim(&self, arguments: &[&str]) -> Outcome {
        let machine = self.path("nvml.so.toml");
        Outcome::of(Command::new(self.programs.folder.join("nvml-sim")).arg("--machine").arg(machine).args(arguments))
    }

    /// Removes containers and network; whether the network is gone, which it is not before its containers.
    fn nothing_at_engine(&self, filter: &str) -> bool {
        let ids = self.docker(&["ps", "-aq", "--filter", filter]).text();
        let ids: Vec<&str> = ids.split_whitespace().collect();
        if !ids.is_empty() {
            self.docker(&[&["rm", "-f"], ids.as_slice()].concat());
        }
        // An engine that removes a container while it starts can forget to take it off the network.
        let names = "{{range .Containers}}{{.Name}} {{end}}";
        for name in self.docker(&["network", "inspect", "-f", names, &self.instance]).text().split_whitespace() {
            self.docker(&["network", "disconnect", "-f", &self.instance, name]);
        }
        self.docker(&["network", "rm", &self.instance]);
        let left = self.docker(&["network", "ls", "-q", "--filter", &format!("name=^{}$", self.instance)]);
        left.code != 0 || left.text().is_empty()
    }

    fn settings(&self, repository: &Path, sections: &[(String, String)], without: &[(String, String)]) -> String {
        let mut parts = vec![
            ("ssh", format!("listen = [\"127.0.0.1:{}\"]", self.ssh_port)),
            ("api", format!("listen = \"127.0.0.1:{}\"", self.api_port)),
            ("workspace", "default_image = \"base\"\ndefault_need = \"1g.5gb\"".into()),
            (
                "container",
                "cpu_milli = 2000\nmemory_mib = 1024\nmax_memory_mib = 4096\ngpu_binding = \"environment\"".into(),
            ),
            ("docker", format!("socket = \"{}\"", self.engine.display())),
            ("allocator", "nvml_library = \"nvml.so\"".into()),
        ];
        for (section, key) in without {
            if let Some((_, lines)) = parts.iter_mut().find(|(name, _)| name == section) {
                *lines = others(lines, key).join("\n");
            }
        }
        for (section, line) in sections {
            match parts.iter_mut().find(|(name, _)| name == section) {
                Some((_, lines)) => replace(lines, line),
                None => parts.push((section, line.clone())),
            }
        }
        let own = self.path("catalog.toml");
        let catalog = if own.exists() { own } else { repository.join("images/catalog.toml") };
        let mut text = format!(
            "data_directory = \"data\"\nrun_directory = \"run\"\ninstance = \"{}\"\nagent_binary = \"{}\"\ncatalog = \"{}\"\n",
            self.instance,
            self.programs.mlad.display(),
            catalog.display()
        );
        for (section, lines) in parts {
            text += &format!("\n[{section}]\n{lines}\n");
        }
        text
    }
}

/// Puts a `key = value` line among others; an earlier one of the same key goes.
fn replace(lines: &mut String, line: &str) {
    let key = line.split('=').next().unwrap_or_default().trim();
    *lines = [others(lines, key), vec![line]].concat().join("\n");
}

/// The lines that do not set this key.
fn others<'a>(lines: &'a str, key: &str) -> Vec<&'a str> {
    lines.lines().filter(|line| line.split('=').next().unwrap_or_default().trim() != key).collect()
}

/// A program that gets this signal (`KILL`) when the test that starts it is killed (or rather, when its thread is).
pub fn ends_with_this_test(program: &Path, signal: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal, "--"]).arg(program);
    command
}

/// A port nobody listens on now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("last lines of the gateway's log:");
            tail.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
        self.kill_gateway();
        let filter = format!("label=mlad.instance={}", self.instance);
        // The engine may still be at what the gateway last asked of it: again, until nothing is left.
        let deadline = Instant::now() + START;
        while !self.nothing_at_engine(&filter) && Instant::now() < deadline {}
        let table = format!("mlad_{}", self.instance);
        for family in ["inet", "bridge"] {
            Outcome::of(Command::new("nft").args(["delete", "table", family, &table]));
        }
    }
}
