//! A real agent process in a folder of its own, and the gateway's side of its connections.

use bytes::Bytes;
use mlad::channel::{AgentConfig, Connection, Exit, Frame, JobResult, JobRun, Open, PtySize, Request, WINDOW};
use rustix::process::{Pid, Signal};
use std::{
    collections::BTreeMap,
    future::Future,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::net::UnixStream;

/// No test waits longer for one thing.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ids of the session's user: another than root where the tests run as root.
pub(crate) fn user_id() -> u32 {
    let own = rustix::process::geteuid();
    if own.is_root() { 12345 } else { own.as_raw() }
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Waits for something that must come.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("this takes too long")
}

/// Waits for a condition of the file system or the process table.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) struct Agent {
    process: Child,
    builder: Builder,
}

pub(crate) struct Builder {
    folder: tempfile::TempDir,
    config: AgentConfig,
    environment: Vec<(String, String)>,
    own_namespace: bool,
}

impl Agent {
    pub(crate) async fn start() -> Self {
        Self::builder().start().await
    }

    pub(crate) fn builder() -> Builder {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["run", "run/agent", "etc", "etc/profile.d", "home"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        std::fs::set_permissions(path("run/agent"), PermissionsExt::from_mode(0o700)).unwrap();
        std::fs::write(path("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        chown(path("home"), Some(user_id()), Some(user_id())).unwrap();
        let config = AgentConfig {
            workload: "w-test".into(),
            user: "kim".into(),
            uid: user_id(),
            gid: user_id(),
            home: path("home"),
            environment: BTreeMap::from([("MLAD_WORKLOAD".into(), "w-test".into())]),
            job: None,
            network: None,
        };
        Builder { folder, config, environment: Vec::new(), own_namespace: false }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.builder.path(name)
    }

    pub(crate) fn home(&self, name: &str) -> PathBuf {
        self.path("home").join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/agent/agent.sock")
    }

    pub(crate) async fn connect(&self) -> Connection {
        Connection::new(UnixStream::connect(self.socket()).await.unwrap(), false)
    }

    /// A connection with its first frame answered.
    pub(crate) async fn try_open(&self, open: Open) -> (Connection, Frame) {
        let mut connection = self.connect().await;
        connection.writer.write(&Frame::Open(open)).await.unwrap();
        let answer = soon(connection.reader.read()).await.unwrap().unwrap();
        (connection, answer)
    }

    pub(crate) async fn open(&self, open: Open) -> (Connection, u32) {
        match self.try_open(open).await {
            (connection, Frame::Opened { port }) => (connection, port),
            (_, other) => panic!("not opened: {other:?}"),
        }
    }

    pub(crate) async fn session(&self) -> Session {
        let (connection, _) = self.open(Open::Session).await;
        Session { connection, window: WINDOW }
    }

    /// Runs a command with framed pipes to its end.
    pub(crate) async fn run(&self, command: &str) -> Outcome {
        let mut session = self.session().await;
        session.exec(command).await;
        session.send(&Frame::Eof).await;
        session.outcome().await
    }

    /// Signals process 1.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.process_1(), signal).unwrap();
    }

    fn process_1(&self) -> Pid {
        let started = self.process.id();
        let process_1 = if self.builder.own_namespace {
            let children = std::fs::read_to_string(format!("/proc/{started}/task/{started}/children")).unwrap();
            children.trim().parse().unwrap()
        } else {
            started
        };
        Pid::from_raw(process_1 as i32).unwrap()
    }

    /// Hundredths of a second that the agent proper has used.
    pub(crate) fn cpu_time(&self) -> u64 {
        let process_1 = self.process_1().as_raw_nonzero();
        let children = std::fs::read_to_string(format!("/proc/{process_1}/task/{process_1}/children")).unwrap();
        let agent = children.split_whitespace().next().unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{agent}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Starts it once more in the same place, as the runtime does with a container.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.try_wait().unwrap().is_some(), "it still runs");
        self.process = self.builder.process();
    }

    /// Waits until the agent has ended.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "the agent does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn result(&self) -> Option<Exit> {
        let text = std::fs::read(self.path("run/agent/result.json")).ok()?;
        Some(serde_json::from_slice::<JobResult>(&text).unwrap().exit)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.process.try_wait().ok().flatten().is_none() {
            let _ = rustix::process::kill_process(self.process_1(), Signal::TERM);
            let start = Instant::now();
            while self.process.try_wait().ok().flatten().is_none() {
                if start.elapsed() > Duration::from_secs(10) {
                    let _ = self.process.kill();
                    let _ = self.process.wait();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Builder {
    /// A job instead of a workspace; its files lie in the home.
    pub(crate) fn job(mut self, command: &[&str]) -> Self {
        let home = self.config.home.clone();
        self.config.job = Some(JobRun {
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            working_directory: home.clone(),
            log: home.join("jobs/1/log"),
            artifacts: home.join("jobs/1/artifacts"),
            // Longer than a busy machine may keep a command from ending; who tests the grace says so.
            grace_seconds: 30,
        });
        self
    }

    pub(crate) fn change(mut self, change: impl FnOnce(&mut AgentConfig)) -> Self {
        change(&mut self.config);
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A variable of the image.
    pub(crate) fn image_variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// As process 1 of a PID namespace.
    pub(crate) fn in_own_namespace(mut self) -> Self {
        self.own_namespace = true;
        self
    }

    /// Starts it without waiting for its socket.
    pub(crate) fn spawn(self) -> Agent {
        let config = serde_json::to_vec(&self.config).unwrap();
        std::fs::write(self.path("run/agent/config.json"), config).unwrap();
        Agent { process: self.process(), builder: self }
    }

    fn process(&self) -> Child {
        let binary = env!("CARGO_BIN_EXE_mlad");
        let mut command = if self.own_namespace {
            let mut command = Command::new("unshare");
            command.args(["--pid", "--fork", "--kill-child", "--mount-proc", binary]);
            command
        } else {
            Command::new(binary)
        };
        command
            .args(["agent", "--folder"])
            .arg(self.path("run"))
            .arg("--etc")
            .arg(self.path("etc"))
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .envs(self.environment.clone())
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(self.path("agent.log")).unwrap())
            .spawn()
            .unwrap()
    }

    pub(crate) async fn start(self) -> Agent {
        let agent = self.spawn();
        until("the agent's socket", || std::os::unix::net::UnixStream::connect(agent.socket()).is_ok()).await;
        agent
    }
}

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Exit,
}

impl Outcome {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub(crate) fn error(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }
}

pub(crate) struct Session {
    pub(crate) connection: Connection,
    /// What may still be sent.
    pub(crate) window: usize,
}

impl Session {
    pub(crate) async fn send(&mut self, frame: &Frame) {
        soon(self.connection.writer.write(frame)).await.unwrap();
    }

    pub(crate) async fn read(&mut self) -> Frame {
        match soon(self.connection.reader.read()).await.unwrap().expect("the agent closed") {
            Frame::WindowAdjust { bytes } => {
                self.window += bytes as usize;
                Box::pin(self.read()).await
            }
            frame => frame,
        }
    }

    pub(crate) async fn request(&mut self, request: Request) -> Result<(), String> {
        self.request_with(request, &[]).await
    }

    pub(crate) async fn request_with(&mut self, request: Request, descriptors: &[OwnedFd]) -> Result<(), String> {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.connection.writer.write_with_descriptors(&Frame::Request(request), &borrowed).await.unwrap();
        match self.read().await {
            Frame::Success => Ok(()),
            Frame::Failure { message } => Err(message),
            other => panic!("no answer: {other:?}"),
        }
    }

    pub(crate) async fn exec(&mut self, command: &str) {
        self.request(exec(command)).await.unwrap();
    }

    pub(crate) async fn pty(&mut self) {
        let size = PtySize { columns: 80, rows: 24, width: 0, height: 0 };
        self.request(Request::Pty { term: "xterm".into(), size, modes: Bytes::new() }).await.unwrap();
    }

    pub(crate) async fn env(&mut self, name: &str, value: &str) {
        let value = Bytes::copy_from_slice(value.as_bytes());
        self.request(Request::Env { name: name.into(), value }).await.unwrap();
    }

    /// Reads to the end.
    pub(crate) async fn outcome(&mut self) -> Outcome {
        let (mut stdout, mut stderr, mut ended) = (Vec::new(), Vec::new(), false);
        loop {
            match self.read().await {
                Frame::Data(bytes) if !ended => stdout.extend_from_slice(&bytes),
                Frame::ExtendedData(bytes) if !ended => stderr.extend_from_slice(&bytes),
                Frame::Eof => ended = true,
                Frame::Exit(exit) => return Outcome { stdout, stderr, exit },
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    /// Reads output until it contains this; returns all of it.
    pub(crate) async fn expect(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.read().await {
                Frame::Data(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} before {text:?} in {seen:?}"),
            }
        }
        seen
    }

    pub(crate) async fn input(&mut self, bytes: &[u8]) {
        self.send(&Frame::Data(Bytes::copy_from_slice(bytes))).await;
    }
}

pub(crate) fn exec(command: &str) -> Request {
    Request::Exec { command: Bytes::copy_from_slice(command.as_bytes()) }
}

pub(crate) fn process_exists(pid: &str) -> bool {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.trim()).join("status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}
