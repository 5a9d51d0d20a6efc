//! Row A3 and A4: OpenSSH's sshd is the oracle. Every case runs once against sshd in a container of the same image, as
//! the same user, and once through the gateway; what the client saw and what was left behind must be the same.
//!
//! What differs on purpose stands in [`INTENDED`], with the reason, and must differ.

mod commands;
mod connections;
mod forwarding;
mod protocol;

use mlad_tests::{Outcome, Person, Site, Sshd};
use std::{
    fmt::Debug,
    process::{Command, Stdio},
    sync::Mutex,
    thread,
    time::Duration,
};

const SOON: Duration = Duration::from_secs(60);

/// Cases in which the gateway does otherwise than sshd, and why it is to.
const INTENDED: &[(&str, &str)] = &[
    ("no new privileges", "a container's user can gain none, whatever the image holds (sudo, setuid programs)"),
    ("a command of 190 kB", "no system starts it; MLAD says so in its own words, with the same exit code"),
    ("AES in counter mode", "OpenSSH's client is offered AES-GCM alone: its own order would begin with what is slow"),
    ("a client that has closed its output", "the SSH library passes on no eow@openssh.com: the rest is thrown away"),
];

/// One person, at the gateway and at sshd.
struct Both<'a> {
    gateway: Person,
    oracle: Sshd<'a>,
    differences: Mutex<Vec<String>>,
}

impl<'a> Both<'a> {
    fn new(site: &'a Site) -> Self {
        let gateway = site.person("alice");
        let oracle = Sshd::start(site, &gateway);
        Self { gateway, oracle, differences: Mutex::default() }
    }

    /// Runs a case on both sides, at the same time, and notes whether they differ. Returns the gateway's.
    fn case<T: PartialEq + Debug + Send>(&self, name: &str, run: impl Fn(&Person) -> T + Sync) -> T {
        let (ours, theirs) = thread::scope(|scope| {
            let theirs = scope.spawn(|| run(&self.oracle.person));
            let ours = run(&self.gateway);
            (ours, theirs.join().unwrap())
        });
        self.note(name, &ours, &theirs);
        ours
    }

    /// Notes whether the two sides of a case differ.
    fn note<T: PartialEq + Debug>(&self, name: &str, ours: &T, theirs: &T) {
        let intended = INTENDED.iter().any(|(case, _)| *case == name);
        if (ours == theirs) == intended {
            let what = if intended { "the same, though it is in INTENDED" } else { "different" };
            let note = format!("{name}: {what}\n  gateway: {}\n  sshd:    {}", short(ours), short(theirs));
            self.differences.lock().unwrap().push(note);
        }
    }

    /// Says what differed.
    fn agree(self) {
        let differences = self.differences.lock().unwrap();
        assert!(differences.is_empty(), "{} cases differ:\n{}", differences.len(), differences.join("\n"));
    }
}

fn short(value: &impl Debug) -> String {
    let text = format!("{value:?}");
    if text.chars().count() > 1500 {
        let start: String = text.chars().take(1500).collect();
        return format!("{start}… ({} bytes)", text.len());
    }
    text
}

/// What a client saw.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    code: i32,
    stdout: String,
    stderr: String,
}

impl From<Outcome> for Seen {
    fn from(outcome: Outcome) -> Self {
        // Bytes that are no text stay apart from each other.
        let stdout = outcome.stdout.iter().map(|byte| char::from(*byte)).collect();
        Self { code: outcome.code, stdout, stderr: outcome.stderr }
    }
}

/// `ssh [options] server [words]` with the image's `LANG`, which sshd does not know of.
fn ssh(person: &Person, options: &[&str], words: &[&str]) -> Command {
    person.ssh_command(&[options, &["-o", "SetEnv=LANG=C.UTF-8"]].concat(), words)
}

/// Runs it to its end.
fn seen(mut command: Command, input: &[u8]) -> Seen {
    Outcome::with_input(&mut command, input).into()
}

/// Starts it with its pipes held here.
fn started(mut command: Command) -> mlad_tests::RunningClient {
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    mlad_tests::RunningClient { child }
}
