//! Whole connections: many sessions on one, much data both ways, new keys all the time, clients in the background.

use super::{Both, SOON, Seen, seen, ssh, started};
use mlad_tests::{Outcome, Person, Site, eventually};
use std::{
    fs,
    io::{Read as _, Write as _},
    process::Command,
    thread,
};

#[test]
fn connections_behave_as_with_sshd() {
    let site = Site::start();
    let both = Both::new(&site);
    let mut noise = vec![0; 50_000_000];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    let copied = |person: &Person, options: &[&str], bytes: &[u8]| {
        let outcome = Outcome::with_input(&mut ssh(person, options, &["cat; exit 7"]), bytes);
        (outcome.code, outcome.stdout == bytes, outcome.stdout.len(), outcome.stderr)
    };
    let whole = both.case("50 MB through cat", |person| copied(person, &[], &noise));
    assert_eq!((whole.0, whole.1), (7, true));
    let few = &noise[..3_000_000];
    both.case("new keys every 64 kB", |person| copied(person, &["-o", "RekeyLimit=64K"], few));
    both.case("AES in counter mode", |person| copied(person, &["-c", "aes128-ctr"], few));
    both.case("one byte at a time", |person| {
        let mut client = started(ssh(person, &[], &["cat; exit 3"]));
        let mut input = client.child.stdin.take().unwrap();
        let writer = thread::spawn(move || (0..3000u32).for_each(|n| input.write_all(&[(n % 256) as u8]).unwrap()));
        let mut out = Vec::new();
        client.child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
        writer.join().unwrap();
        (out, client.ends(SOON))
    });
    both.case("ten sessions of one connection", ten_sessions);
    both.case("exit codes of one connection", |person| {
        let master = Master::open(person);
        (0..=255).step_by(15).map(|code| master.run(&format!("exit {code}")).code).collect::<Vec<_>>()
    });
    both.case("-N ends with its client", |person| {
        let mut client = started(ssh(person, &["-N"], &[]));
        drop(client.child.stdin.take());
        // Another connection comes and goes meanwhile.
        person.ssh("true").success();
        client.child.try_wait().unwrap().is_none()
    });
    both.case("-f with a command", |person| {
        let seen = Seen::from(Outcome::of(&mut ssh(person, &["-f"], &["touch in-the-background; exit 3"])));
        eventually("it has run", SOON, || person.ssh("test -e in-the-background").code == 0);
        seen
    });
    both.case("a real terminal", |person| {
        // Its modes are those of the client's terminal.
        let line = format!("stty cols 91 rows 37 -echo; {} -t server 'stty -a; exit 9'", person.ssh_words());
        Seen::from(Outcome::of(Command::new("script").args(["-qec", &line, "/dev/null"]).env("TERM", "vt220")))
    });
    both.case("a shell on a terminal ends by its key", |person| {
        let outcome = person.at_a_terminal(
            // The prompt, not what is typed: then the shell reads keys itself.
            "expect -re {\\$ $}\nsend \"PS1=ready:\\r\"\nexpect -re {[^=]ready:}\nsend \"\\004\"\nexpect \"logout\"",
        );
        outcome.code
    });
    both.case("the escape of the client ends it", |person| {
        person.at_a_terminal("expect -re {\\$ $}\nsend \"\\r\"\nexpect -re {\\$ $}\nsend \"~.\"").code
    });
    both.agree();
}

/// A connection that several sessions share.
struct Master<'a> {
    person: &'a Person,
    path: String,
}

impl<'a> Master<'a> {
    fn open(person: &'a Person) -> Self {
        let path = format!("ControlPath={}", person.path("control").display());
        let options = ["-o", &path, "-o", "ControlMaster=yes", "-o", "ControlPersist=600", "-N", "-f"];
        Outcome::of(&mut person.ssh_command(&options, &[])).success();
        Self { person, path }
    }

    fn run(&self, command: &str) -> Seen {
        seen(ssh(self.person, &["-o", &self.path], &[command]), b"input\n")
    }
}

impl Drop for Master<'_> {
    fn drop(&mut self) {
        Outcome::of(&mut self.person.ssh_command(&["-o", &self.path, "-O", "exit"], &[]));
    }
}

fn ten_sessions(person: &Person) -> Vec<Seen> {
    let master = Master::open(person);
    // None of them ends before all have begun.
    let command = |number| {
        format!("touch begun-{number}; until [ $(ls begun-* | wc -l) = 10 ]; do sleep 0.1; done; cat; exit {number}")
    };
    thread::scope(|scope| {
        let master = &master;
        let running: Vec<_> = (0..10).map(|number| scope.spawn(move || master.run(&command(number)))).collect();
        running.into_iter().map(|session| session.join().unwrap()).collect()
    })
}
