//! Somebody with a key and OpenSSH's client.

use super::soon;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};

/// What a program did.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Outcome {
    /// Standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }

    /// Itself, if it ended with this exit code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        let shown: String = String::from_utf8_lossy(&self.stdout).chars().take(1000).collect();
        assert_eq!(self.code, code, "stdout: {shown}\nstderr: {}", self.stderr);
        self
    }

    /// Itself, if the exit code is 0.
    #[track_caller]
    pub fn success(self) -> Self {
        self.exits(0)
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt as _;
        Self {
            code: output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The person.
#[derive(Debug, Clone)]
pub struct Person {
    folder: PathBuf,
}

impl Person {
    pub(super) fn new(folder: &Path, address: SocketAddr) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let config = format!(
            "Host server\n  HostName {}\n  Port {}\n  User mlad\n  IdentityFile {key}\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {hosts}\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n  BatchMode yes\n",
            address.ip(),
            address.port(),
            key = folder.join("id_ed25519").display(),
            hosts = folder.join("known_hosts").display(),
        );
        std::fs::write(folder.join("config"), config).unwrap();
        let person = Self { folder: folder.into() };
        person.make_key("id_ed25519");
        person
    }

    /// Makes one more key; its path.
    pub fn make_key(&self, name: &str) -> PathBuf {
        let path = self.folder.join(name);
        let made = std::process::Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "a key", "-f"])
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
        path
    }

    /// The public key, a line.
    pub fn public_key(&self) -> String {
        std::fs::read_to_string(self.folder.join("id_ed25519.pub")).unwrap()
    }

    /// A file of theirs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// `PROGRAM -F config …`
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(self.folder.join("config")).env_remove("SSH_AUTH_SOCK").env("LC_ALL", "C");
        command.kill_on_drop(true);
        command
    }

    /// `ssh OPTIONS server WORDS`, with pipes.
    pub fn ssh_command(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = self.command("ssh");
        command.args(options).arg("server").args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts `ssh`.
    pub fn start(&self, options: &[&str], words: &[&str]) -> Child {
        self.ssh_command(options, words).spawn().unwrap()
    }

    /// Runs a command to its end, with no input.
    pub async fn ssh(&self, command: &str) -> Outcome {
        self.ssh_with(&[], &[command]).await
    }

    /// Runs a command to its end with options for `ssh`.
    pub async fn ssh_with(&self, options: &[&str], words: &[&str]) -> Outcome {
        let mut command = self.ssh_command(options, words);
        soon("the end of ssh", command.stdin(Stdio::null()).output()).await.unwrap().into()
    }

    /// Runs a command to its end with this input.
    pub async fn ssh_input(&self, options: &[&str], words: &[&str], input: &[u8]) -> Outcome {
        let mut child = self.start(options, words);
        let mut stdin = child.stdin.take().unwrap();
        let feed = async {
            // A command may end before it has read everything.
            let _ = stdin.write_all(input).await;
            drop(stdin);
        };
        soon("the end of ssh", async { tokio::join!(feed, child.wait_with_output()).1 }).await.unwrap().into()
    }
}

/// A port that nobody listens on now.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
