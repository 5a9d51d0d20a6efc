//! What the tests stand on: an engine, an image, an instance of its own that leaves nothing behind.

use mlad::channel::{AgentConfig, JobRun};
use mlad_gateway::{
    config::Config,
    runtime::{Docker, Runtime as _, StartProgress, WorkloadSpec},
};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
};

/// The image of the tests: a busybox and nothing else.
pub(crate) const IMAGE: &str = "mlad-test/tiny:1";

/// Socket of the engine that is lent to the tests.
pub(crate) fn engine() -> Option<PathBuf> {
    lent("MLAD_TEST_DOCKER_SOCKET")
}

/// The static `mlad`.
pub(crate) fn agent() -> Option<PathBuf> {
    lent("MLAD_TEST_MLAD")
}

fn lent(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        eprintln!("skipped: {variable} is not set (scripts/test unit sets it)");
    }
    path
}

/// The static program that does as it is told instead of an agent.
pub(crate) fn stand_in() -> PathBuf {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("standin");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/runtime/standin.rs");
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        run(Command::new(rustc)
            .args(["--edition=2024", "-Copt-level=1", "-Ctarget-feature=+crt-static", "-o"])
            .arg(&path)
            .arg(source));
        (folder, path)
    });
    path.clone()
}

/// An instance of its own: configuration, runtime, image. Everything of it goes when it is dropped.
pub(crate) struct Stage {
    pub(crate) config: Config,
    pub(crate) docker: Docker,
    folder: tempfile::TempDir,
}

impl Stage {
    /// With the stand-in for an agent.
    pub(crate) async fn new(engine: &Path, change: impl FnOnce(&mut Config)) -> Self {
        Self::with_agent(engine, &stand_in(), change).await
    }

    pub(crate) async fn with_agent(engine: &Path, agent: &Path, change: impl FnOnce(&mut Config)) -> Self {
        import_image(engine);
        let folder = tempfile::tempdir().unwrap();
        let config = config(engine, agent, folder.path(), change);
        let docker = Docker::connect(&config).await.unwrap();
        Self { config, docker, folder }
    }

    /// What a gateway that was killed and started again has.
    pub(crate) async fn connect_again(&mut self) {
        self.docker = Docker::connect(&self.config).await.unwrap();
    }

    /// A workload of the tests' image.
    pub(crate) async fn spec(&self, name: &str) -> WorkloadSpec {
        let image = self.docker.image_present(IMAGE).await.unwrap().unwrap();
        alices(name, image)
    }

    pub(crate) async fn start(&self, spec: &WorkloadSpec) {
        self.docker.start(spec, &quiet).await.unwrap();
    }

    /// Tells the stand-in something; returns its answer, empty if it ended over it.
    pub(crate) async fn tell(&self, name: &str, command: &str) -> String {
        let stream = self.docker.connect(name).await.unwrap();
        tell(stream, command).await
    }

    /// What `docker` prints.
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        run(Command::new("docker").arg("-H").arg(host(&self.config.docker.socket)).args(arguments))
    }

    pub(crate) fn container(&self, name: &str) -> String {
        format!("{}-{name}", self.config.instance)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let config = &self.config;
        // A test that failed is not to leave containers either; a runtime of its own, since this one may be
        // on its way out.
        let done = std::thread::scope(|scope| {
            let clean = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let docker = Docker::connect(config).await?;
                    // Docker 20.10 may show the endpoint of a container a moment after that is gone.
                    let begun = std::time::Instant::now();
                    loop {
                        match docker.uninstall().await {
                            Err(_) if begun.elapsed() < std::time::Duration::from_secs(20) => {
                                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                            }
                            done => return done,
                        }
                    }
                })
            };
            scope.spawn(clean).join()
        });
        if !matches!(done, Ok(Ok(()))) {
            eprintln!("instance {} was not cleaned up: {done:?}", config.instance);
        }
    }
}

pub(crate) fn config(engine: &Path, agent: &Path, folder: &Path, change: impl FnOnce(&mut Config)) -> Config {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let text = format!(
        "data_directory = '{0}/data'\nrun_directory = '{0}/run'\ncatalog = '{0}/catalog.toml'\n\
         instance = 't{1}x{2}'\nagent_binary = '{3}'\n\
         [container]\npids = 64\nshared_memory_mib = 8\ngpu_binding = 'environment'\n[docker]\nsocket = '{4}'\n",
        folder.display(),
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed),
        agent.display(),
        engine.display(),
    );
    let path = folder.join("gateway.toml");
    std::fs::write(&path, text).unwrap();
    let mut config = Config::read(&path).unwrap();
    change(&mut config);
    config
}

/// Makes the tests' image of the busybox of this machine.
pub(crate) fn import_image(engine: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let script = "mkdir -p \"$1/bin\" \"$1/tmp\" \"$1/etc\" && chmod 1777 \"$1/tmp\" && cp \"$(command -v busybox)\" \"$1/bin/busybox\" && \
                  ln -s busybox \"$1/bin/sh\" && tar -C \"$1\" -c . | docker -H \"$2\" import \
                  --change 'ENV MLAD_TEST_OF_IMAGE=kept NVIDIA_VISIBLE_DEVICES=all' \
                  --change 'ENTRYPOINT [\"/bin/false\"]' --change 'USER 1:1' \
                  --change 'HEALTHCHECK CMD /bin/false' - \"$3\"";
    run(Command::new("sh").args(["-c", script, "sh"]).arg(folder.path()).arg(host(engine)).arg(IMAGE));
}

pub(crate) async fn tell(stream: UnixStream, command: &str) -> String {
    let (read, mut write) = stream.into_split();
    write.write_all(format!("{command}\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    BufReader::new(read).read_line(&mut answer).await.unwrap_or(0);
    answer.trim_end().to_owned()
}

/// A workspace of alice, of an image by its pinned reference.
pub(crate) fn alices(name: &str, image: String) -> WorkloadSpec {
    WorkloadSpec {
        name: name.into(),
        fence: 1,
        image,
        hostname: "stage".into(),
        agent: AgentConfig {
            workload: name.into(),
            user: "alice".into(),
            uid: 20000,
            gid: 20000,
            home: "/home/alice".into(),
            environment: Default::default(),
            job: None,
            network: None,
        },
        mounts: vec![],
        gpu_uuids: vec![],
        node: None,
        memory_mib: 64,
        cpu_milli: 1000,
    }
}

/// A job in a specification.
pub(crate) fn job(command: &[&str]) -> JobRun {
    JobRun {
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        working_directory: "/home/alice".into(),
        log: "/home/alice/log".into(),
        artifacts: "/home/alice/artifacts".into(),
        grace_seconds: 2,
    }
}

pub(crate) fn quiet(_: StartProgress) {}

/// Runs a program to its end; returns what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn host(engine: &Path) -> String {
    format!("unix://{}", engine.display())
}
