//! People and their programs: `ssh`, `sftp`, `scp`, `rsync`, `git` with a key of their own.

use crate::eventually_some;
use serde_json::Value;
use std::{
    fs,
    io::{BufRead as _, BufReader, Read, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

/// Longest time a command may take that is given no other: more than the longest wait of a test.
const LIMIT: Duration = Duration::from_secs(600);
/// Lines that are read ahead of whoever asks for them.
const LINES_AHEAD: usize = 1024;

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
    /// Runs a command to its end, without standard input.
    ///
    /// # Panics
    /// When it cannot be started, or takes longer than any should.
    pub fn of(command: &mut Command) -> Self {
        Self::within(LIMIT, command)
    }

    /// The same with a limit of its own.
    ///
    /// # Panics
    /// When it cannot be started, or takes longer.
    pub fn within(limit: Duration, command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let text = format!("{command:?}");
        let child = child.unwrap_or_else(|error| panic!("{text}: {error}"));
        Self::finish(text, child, limit)
    }

    /// Runs a command with these bytes as standard input.
    ///
    /// # Panics
    /// When it cannot be started, or takes longer than any should.
    pub fn with_input(command: &mut Command, input: &[u8]) -> Self {
        let text = format!("{command:?}");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        thread::scope(|scope| {
            // A program may end before it has read everything; its outcome tells.
            scope.spawn(move || drop(stdin.write_all(input)));
            Self::finish(text, child, LIMIT)
        })
    }

    /// Runs a command whose standard input is another's output, or a file.
    ///
    /// # Panics
    /// When it cannot be started, or takes longer than any should.
    pub fn of_piped(mut command: Command, input: impl Into<Stdio>) -> Self {
        let child = command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self::finish(format!("{command:?}"), child, LIMIT)
    }

    fn finish(command: String, child: Child, limit: Duration) -> Self {
        let id = rustix::process::Pid::from_child(&child);
        let (ended, watched) = mpsc::channel::<()>();
        // Killed when its time is over: its pipes close then, and it is waited for no longer.
        let watch = thread::spawn(move || {
            let late = watched.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            late && rustix::process::kill_process(id, rustix::process::Signal::KILL).is_ok()
        });
        let output = child.wait_with_output().unwrap();
        drop(ended);
        let late = watch.join().unwrap();
        let outcome = Self::from_output(command, output);
        assert!(!late, "not within {limit:?}: {}\nstderr: {}", outcome.command, outcome.stderr);
        outcome
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
    /// Host, port and user name.
    address: [String; 3],
}

impl Person {
    pub(crate) fn new(folder: &Path, port: u16) -> Self {
        fs::create_dir_all(folder).unwrap();
        let key = folder.join("id_ed25519");
        Outcome::of(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key)).success();
        let mut person = Self { folder: folder.into(), address: Default::default() };
        person.configure("127.0.0.1", port, "mlad");
        person
    }

    /// The same person with the same key at another server.
    ///
    /// # Panics
    /// When the folder cannot be made.
    #[must_use]
    pub fn elsewhere(&self, name: &str, address: &str, port: u16, user: &str) -> Self {
        let mut person = Self { folder: self.path(name), address: Default::default() };
        fs::create_dir_all(&person.folder).unwrap();
        for file in ["id_ed25519", "id_ed25519.pub"] {
            fs::copy(self.path(file), person.path(file)).unwrap();
        }
        person.configure(address, port, user);
        person
    }

    fn configure(&mut self, address: &str, port: u16, user: &str) {
        self.address = [address.into(), port.to_string(), user.into()];
        let config = format!(
            "Host server\n  HostName {address}\n  Port {port}\n  User {user}\n  IdentityFile {key}\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {hosts}\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n",
            key = self.path("id_ed25519").display(),
            hosts = self.path("known_hosts").display()
        );
        fs::write(self.path("ssh_config"), config).unwrap();
    }

    /// Where they log in: host, port and user name.
    pub fn address(&self) -> &[String; 3] {
        &self.address
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

    /// `ssh mlad@server COMMAND`, in the container whatever it is: a plain `mlad …` the gateway answers itself.
    pub fn ssh_inside(&self, command: &str) -> Outcome {
        self.ssh(&inside(command))
    }

    /// Logs in on a terminal with `expect`, which goes through `script` and then waits for the end. The exit code
    /// is the session's, unless the script has an `exit` of its own.
    ///
    /// # Panics
    /// When the script cannot be written.
    pub fn at_a_terminal(&self, script: &str) -> Outcome {
        let script = format!(
            "set timeout 60\nspawn ssh {options} -tt server\n{script}\n\
             expect eof {{}} timeout {{ exit 99 }}\ncatch wait result\nexit [lindex $result 3]\n",
            options = self.options().join(" ")
        );
        let file = self.path("terminal.exp");
        fs::write(&file, script).unwrap();
        Outcome::of(Command::new("expect").arg(&file).env("TERM", "xterm"))
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

/// A command line that the workspace's shell runs, not the gateway: more than one plain command.
pub fn inside(command: &str) -> String {
    format!("cd; {command}")
}

/// A client that runs; killed when dropped.
#[derive(Debug)]
pub struct RunningClient {
    /// The process and its pipes.
    pub child: Child,
}

impl RunningClient {
    /// The lines of its standard output, from here on.
    ///
    /// # Panics
    /// When somebody has taken it already.
    pub fn lines(&mut self) -> Lines {
        Lines::of(self.child.stdout.take().unwrap())
    }

    /// Its exit code, once it has ended; none if a signal ended it.
    ///
    /// # Panics
    /// When it does not end within `limit`.
    pub fn ends(&mut self, limit: Duration) -> Option<i32> {
        eventually_some("the client ends", limit, || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for RunningClient {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The lines of a pipe, as they come, with a deadline for each.
#[derive(Debug)]
pub struct Lines {
    lines: Receiver<String>,
}

impl Lines {
    /// Those of this pipe.
    pub fn of(pipe: impl Read + Send + 'static) -> Self {
        let (send, lines) = mpsc::sync_channel(LINES_AHEAD);
        // Ends with the pipe, or when nobody listens.
        thread::spawn(move || {
            let mut pieces = BufReader::new(pipe).split(b'\n').map_while(Result::ok);
            pieces.all(|line| send.send(String::from_utf8_lossy(&line).into_owned()).is_ok())
        });
        Self { lines }
    }

    /// The next one.
    ///
    /// # Panics
    /// When there is none within `limit`.
    pub fn next(&self, limit: Duration) -> String {
        self.lines.recv_timeout(limit).unwrap_or_else(|error| panic!("no line within {limit:?}: {error}"))
    }

    /// What `find` finds in the first line in which it finds something.
    ///
    /// # Panics
    /// When there is no such line within `limit`.
    pub fn find<T>(&self, limit: Duration, mut find: impl FnMut(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + limit;
        loop {
            let line = self.next(deadline.saturating_duration_since(Instant::now()));
            if let Some(found) = find(&line) {
                return found;
            }
        }
    }
}
