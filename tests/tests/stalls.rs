//! Row A3: channels that stall, stall alone, and nothing is lost. Case 7 of the first issue.

use mlad_tests::{Outcome, Person, Site, eventually};
use sha2::{Digest as _, Sha256};
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Most memory the gateway may take while a peer stalls, in KiB.
const MEMORY: u64 = 64 * 1024;

#[test]
fn a_hundred_megabytes_through_cat_come_back_whole() {
    let site = Site::start();
    let alice = site.person("alice");
    let mut input = vec![0; 100_000_000];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut input).unwrap();
    let outcome = alice.ssh_with_input("cat", &input).success();
    assert!(outcome.stdout == input, "{} bytes came back", outcome.stdout.len());
}

/// A connection that several sessions share.
struct Master {
    person: Person,
    socket: String,
}

impl Master {
    fn open(person: &Person) -> Self {
        let socket = person.path("master").display().to_string();
        let path = format!("ControlPath={socket}");
        Outcome::of(
            &mut person
                .ssh_command(&["-o", &path, "-o", "ControlMaster=yes", "-o", "ControlPersist=600", "-N", "-f"], &[]),
        )
        .success();
        Self { person: person.clone(), socket }
    }

    fn options(&self) -> Vec<String> {
        vec!["-o".into(), format!("ControlPath={}", self.socket), "-o".into(), "ControlMaster=no".into()]
    }

    fn command(&self, words: &str) -> Command {
        let options = self.options();
        self.person.ssh_command(&options.iter().map(String::as_str).collect::<Vec<_>>(), &[words])
    }
}

impl Drop for Master {
    fn drop(&mut self) {
        let options = self.options();
        let options = options.iter().map(String::as_str).chain(["-O", "exit"]).collect::<Vec<_>>();
        Outcome::of(&mut self.person.ssh_command(&options, &[]));
    }
}

#[test]
fn a_session_that_never_reads_its_input_stalls_alone_and_then_gets_every_byte() {
    const SIZE: usize = 500_000_000;
    let site = Site::start();
    let alice = site.person("alice");
    alice.ssh("mkfifo wake").success();
    let master = Master::open(&alice);

    let mut sleeper =
        master.command("read go < wake; sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut ticker = master.command("while :; do date +%s.%N; sleep 0.1; done").stdout(Stdio::piped()).spawn().unwrap();
    let mut beats = BufReader::new(ticker.stdout.take().unwrap()).lines();
    beats.next().unwrap().unwrap();

    let mut input = sleeper.stdin.take().unwrap();
    let writer = thread::spawn(move || {
        let piece: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut hash = Sha256::new();
        for _ in 0..SIZE / piece.len() {
            hash.update(&piece);
            input.write_all(&piece).unwrap();
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    });

    // While it stalls: the ticker does not miss a beat, a third session opens at once.
    let mut last = Instant::now();
    let mut longest = Duration::ZERO;
    for _ in 0..50 {
        beats.next().unwrap().unwrap();
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    assert!(longest < Duration::from_millis(1500), "a beat took {longest:?}");
    assert_eq!(Outcome::of(&mut master.command("echo third")).success().text(), "third");
    assert!(!writer.is_finished(), "the sleeper took it all: nothing stalled");
    let memory = site.gateway_memory_kib();
    assert!(memory < MEMORY, "the gateway takes {memory} KiB");

    alice.ssh("echo go > wake").success();
    let mut sum = String::new();
    sleeper.stdout.take().unwrap().read_to_string(&mut sum).unwrap();
    assert_eq!(sum, format!("{}  -\n", writer.join().unwrap()), "the sleeper got every byte");
    assert!(sleeper.wait().unwrap().success());
    let memory = site.gateway_memory_kib();
    assert!(memory < MEMORY, "the gateway takes {memory} KiB");
    drop(ticker.kill());
    drop(ticker.wait());
}

#[test]
fn output_to_a_client_that_never_reads_waits_where_it_is_made() {
    let site = Site::start();
    let alice = site.person("alice");
    let mut stalled = alice.start(&[], &["yes"]);
    let mut out = stalled.child.stdout.take().unwrap();
    let mut first = [0; 2];
    out.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"y\n");
    // The flood fills what lies between and then stands still; the gateway's memory does not grow.
    let mut sizes = Vec::new();
    eventually("the gateway's memory is steady", Duration::from_secs(30), || {
        sizes.push(site.gateway_memory_kib());
        sizes.len() > 20 && sizes.iter().rev().take(10).all(|size| *size <= sizes[sizes.len() - 11] + 1024)
    });
    assert!(site.gateway_memory_kib() < MEMORY);
    assert_eq!(alice.ssh("echo other").success().text(), "other");
    let mut more = vec![0; 10_000_000];
    out.read_exact(&mut more).unwrap();
    assert!(more.chunks(2).all(|line| line == b"y\n"), "and nothing is lost");
}
