//! The allocator under test: in this process, or as the real program behind HTTP.

use super::machine::Machine;
use mlad_allocator::{
    Allocate, Embedded,
    proof::{Allowance, check},
    read_records,
    service::{HttpAllocator, Token},
};
use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use tokio::{task::spawn_blocking, time::timeout};

/// How the allocator is run.
#[derive(Clone, Copy)]
pub(crate) enum Host {
    Embedded,
    Unix,
    Tcp,
}

/// An allocator that runs.
pub(crate) enum Running {
    Embedded(Arc<Embedded>, PathBuf),
    Program(Program),
}

/// `mlad-allocator serve`, killed when it is dropped.
pub(crate) struct Program {
    child: Child,
    database: PathBuf,
    pub(crate) url: String,
    client: HttpAllocator,
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Host {
    pub(crate) async fn start(self, machine: &Machine) -> Running {
        match self {
            Self::Embedded => Running::Embedded(Embedded::start(machine.settings()).await.unwrap(), machine.database()),
            Self::Unix => {
                Running::Program(program(machine, &format!("unix:{}/socket", machine.path().display()), None).await)
            }
            Self::Tcp => {
                let token = token(machine, "token", "a-token-of-some-length\n");
                Running::Program(program(machine, "127.0.0.1:0", Some(token)).await)
            }
        }
    }
}

/// A token in a file that nobody else can read.
pub(crate) fn token(machine: &Machine, name: &str, text: &str) -> Token {
    let file = machine.path().join(name);
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    Token::read(&file).unwrap()
}

/// What blocks until the program does something, and is cut short by its death if that takes too long.
async fn bounded<T: Send + 'static>(pid: u32, work: impl FnOnce() -> T + Send + 'static) -> T {
    let mut work = spawn_blocking(work);
    match timeout(Duration::from_secs(90), &mut work).await {
        Ok(done) => done.unwrap(),
        Err(_) => {
            signal("-KILL", pid);
            panic!("the program hangs");
        }
    }
}

fn signal(signal: &str, pid: u32) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

async fn program(machine: &Machine, listen: &str, token: Option<Token>) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlad-allocator"));
    command.args(["serve", "--listen", listen, "--node", "node-1"]).arg("--nvml").arg(machine.library());
    command.arg("--database").arg(machine.database());
    if token.is_some() {
        command.arg("--token-file").arg(machine.path().join("token"));
    }
    let log = fs::File::options().create(true).append(true).open(machine.path().join("log")).unwrap();
    let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let line = bounded(child.id(), move || {
        let mut line = String::new();
        output.read_line(&mut line).map(|_| line)
    });
    let line = line.await.unwrap();
    let log = || fs::read_to_string(machine.path().join("log")).unwrap();
    let url = line.trim().strip_prefix("serving ").unwrap_or_else(|| panic!("it does not serve: {}", log()));
    let database = machine.database();
    Program { child, database, url: url.to_owned(), client: HttpAllocator::new(url, token.as_ref()).unwrap() }
}

/// The ledger in a database is as it must be.
pub(crate) async fn sound(database: &Path) {
    let findings = check(&read_records(database).await.unwrap(), Allowance::default());
    assert!(findings.is_empty(), "{findings:#?}");
}

impl Running {
    pub(crate) fn allocator(&self) -> &dyn Allocate {
        match self {
            Self::Embedded(embedded, _) => &**embedded,
            Self::Program(program) => &program.client,
        }
    }

    /// Ends it orderly. What it leaves is a sound ledger, whatever went wrong before.
    pub(crate) async fn stop(self) {
        let database = match self {
            Self::Embedded(embedded, database) => {
                embedded.stop().await;
                database
            }
            Self::Program(mut program) => {
                let pid = program.child.id();
                signal("-TERM", pid);
                let database = program.database.clone();
                let status = bounded(pid, move || program.child.wait().unwrap()).await;
                assert!(status.success(), "{status}");
                database
            }
        };
        sound(&database).await;
    }
}
