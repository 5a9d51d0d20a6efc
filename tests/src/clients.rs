//! People and their programs: `ssh`, `sftp`, `scp`, `rsync`, `git` with a key of their own.

use serde_json::Value;
use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

/// What a program did.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; 128 + the signal's number if one ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
    command: String,
}

impl Outcome {
    /// Runs a command to its end, without standard input unless that is set.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn of(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let text = format!("{command:?}");
        let child = child.unwrap_or_else(|error| panic!("{text}: {error}"));
        Self::from_output(text, child.wait_with_output().unwrap())
    }

    /// Runs a command with these bytes as standard input.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn with_input(command: &mut Command, input: &[u8]) -> Self {
        let text = format!("{command:?}");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            // A program may end before it has read everything; its outcome tells.
            scope.spawn(move || drop(stdin.write_all(input)));
            Self::from_output(text, child.wait_with_output().unwrap())
        })
    }

    /// Runs a command whose standard input is another's output.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn of_piped(mut command: Command, input: impl Into<Stdio>) -> Self {
        let child = command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self::from_output(format!("{command:?}"), child.wait_with_output().unwrap())
    }

    fn from_output(command: String, output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt as _;
        Self {
            code: output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            command,
        }
    }

    /// Itself, if the exit code is 0.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn success(self) -> Self {
        self.exits(0)
    }

    /// Itself, if it ended with this exit code.
    ///
    /// # Panics
    /// When it ended with another.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        let out = String::from_utf8_lossy(&self.stdout);
        let shown: String = out.chars().take(2000).collect();
        assert_eq!(self.code, code, "{}\nstdout: {shown}\nstderr: {}", self.command, self.stderr);
        self
    }

    /// Standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end_matches('\n').to_owned()
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

/// Somebody with a key.
#[derive(Debug, Clone)]
pub struct Person {
    folder: PathBuf,
}

impl Person {
    pub(crate) fn new(folder: &Path, port: u16) -> Self {
        fs::create_dir_all(folder).unwrap();
        let key = folder.join("id_ed25519");
        Outcome::of(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key)).success();
        let person = Self { folder: folder.into() };
        person.configure("127.0.0.1", port, "mlad");
        person
    }

    /// The same person with the same key at another server.
    ///
    /// # Panics
    /// When the folder cannot be made.
    #[must_use]
    pub fn elsewhere(&self, name: &str, address: &str, port: u16, user: &str) -> Self {
        let person = Self { folder: self.path(name) };
        fs::create_dir_all(&person.folder).unwrap();
        for file in ["id_ed25519", "id_ed25519.pub"] {
            fs::copy(self.path(file), person.path(file)).unwrap();
        }
        person.configure(address, port, user);
        person
    }

    fn configure(&self, address: &str, port: u16, user: &str) {
        let config = format!(
            "Host server\n  HostName {address}\n  Port {port}\n  User {user}\n  IdentityFile {key}\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {hosts}\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n",
            key = self.path("id_ed25519").display(),
            hosts = self.path("known_hosts").display()
        );
        fs::write(self.path("ssh_config"), config).unwrap();
    }

    /// Their public key's file.
    pub fn public_key(&self) -> PathBuf {
        self.folder.join("id_ed25519.pub")
    }

    /// A path in their own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The options of their OpenSSH programs.
    pub fn options(&self) -> Vec<String> {
        vec!["-F".into(), self.path("ssh_config").display().to_string()]
    }

    /// `ssh [options] mlad@server [words]`, to be run.
    pub fn ssh_command(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.options()).args(["-o", "BatchMode=yes"]).args(options).arg("server").args(words);
        command
    }

    /// `ssh mlad@server COMMAND`.
    pub fn ssh(&self, command: &str) -> Outcome {
        Outcome::of(&mut self.ssh_command(&[], &[command]))
    }

    /// `ssh mlad@server COMMAND < input`.
    pub fn ssh_with_input(&self, command: &str, input: &[u8]) -> Outcome {
        Outcome::with_input(&mut self.ssh_command(&[], &[command]), input)
    }

    /// `sftp -b - mlad@server` with these commands.
    pub fn sftp(&self, commands: &str) -> Outcome {
        let mut sftp = Command::new("sftp");
        sftp.args(["-q", "-b", "-"]).args(self.options()).arg("server");
        Outcome::with_input(&mut sftp, commands.as_bytes())
    }

    /// What rsync's `-e` and git's `GIT_SSH_COMMAND` want.
    pub fn ssh_words(&self) -> String {
        format!("ssh {} -o BatchMode=yes", self.options().join(" "))
    }

    /// `ssh [options] mlad@server [words]`, left running with its pipes held here.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&self, options: &[&str], words: &[&str]) -> RunningClient {
        let mut command = self.ssh_command(options, words);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        RunningClient { child }
    }
}

/// A client that runs; killed when dropped.
#[derive(Debug)]
pub struct RunningClient {
    /// The process and its pipes.
    pub child: Child,
}

impl Drop for RunningClient {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
