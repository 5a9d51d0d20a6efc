//! Row A3: channels that stall, stall alone, and nothing is lost. Case 7 of the first issue.

use mlad_tests::{Lines, Outcome, Person, RunningClient, Site, eventually, within};
use sha2::{Digest as _, Sha256};
use std::{
    fs,
    io::{Read as _, Write as _},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Most memory the gateway may take at any time while a peer stalls, in KiB.
const MEMORY: u64 = 64 * 1024;
/// Longest time until something comes that is not held up. What is, comes never.
const LONG: Duration = Duration::from_secs(60);
/// Longest time until hundreds of megabytes are through.
const VERY_LONG: Duration = Duration::from_secs(300);

/// Whether something took about as long beside a stall as before: a busy machine makes both slow.
fn as_before(now: Duration, before: Duration) -> bool {
    now < before * 10 + Duration::from_secs(5)
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    (work(), begun.elapsed())
}

#[test]
fn a_hundred_megabytes_through_cat_come_back_whole() {
    let site = Site::start();
    let alice = site.person("alice");
    let mut input = vec![0; 100_000_000];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut input).unwrap();
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
    let sum = Lines::of(sleeper.stdout.take().unwrap());
    let mut ticker = RunningClient {
        child: master.command("while :; do date +%s.%N; sleep 0.1; done").stdout(Stdio::piped()).spawn().unwrap(),
    };
    let beats = ticker.lines();
    let fifty_beats = || (0..50).for_each(|_| drop(beats.next(LONG)));
    let another = || assert_eq!(Outcome::within(LONG, &mut master.command("echo another")).success().text(), "another");
    beats.next(LONG);
    let ((), beats_before) = timed(fifty_beats);
    let ((), opening_before) = timed(another);

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

    // While it stalls: the ticker does not miss a beat, another session opens at once.
    let ((), beats_beside) = timed(fifty_beats);
    assert!(as_before(beats_beside, beats_before), "50 beats took {beats_beside:?}, before {beats_before:?}");
    let ((), opening) = timed(another);
    assert!(as_before(opening, opening_before), "a session took {opening:?} to open, before {opening_before:?}");
    assert!(!writer.is_finished(), "the sleeper took it all: nothing stalled");

    alice.ssh("echo go > wake").success();
    let sent = within("everything is sent", VERY_LONG, || writer.join().unwrap());
    assert_eq!(sum.next(VERY_LONG), format!("{sent}  -"), "the sleeper got every byte");
    assert_eq!(RunningClient { child: sleeper }.ends(LONG), Some(0));
    let peak = site.gateway_peak_kib();
    assert!(peak < MEMORY, "the gateway took {peak} KiB");
}

#[test]
fn output_to_a_client_that_never_reads_waits_where_it_is_made() {
    let site = Site::start();
    let alice = site.person("alice");
    let mut stalled = alice.start(&[], &["echo $$ > flood; exec yes"]);
    let mut out = stalled.child.stdout.take().unwrap();
    eventually("it has begun", LONG, || fs::read(site.data("home/alice/flood")).is_ok_and(|id| id.ends_with(b"\n")));
    // The flood fills what lies between and then stands still.
    let written = || alice.ssh("grep wchar /proc/$(cat flood)/io").success().text();
    let mut last = Vec::new();
    eventually("the flood stands still", VERY_LONG, || {
        last.push(written());
        last.len() > 10 && last.iter().rev().take(10).all(|count| Some(count) == last.last())
    });
    let more = within("the rest comes", VERY_LONG, move || {
        let mut more = vec![0; 10_000_000];
        out.read_exact(&mut more).unwrap();
        more
    });
    assert!(more.chunks(2).all(|line| line == b"y\n"), "nothing is lost");
    let peak = site.gateway_peak_kib();
    assert!(peak < MEMORY, "the gateway took {peak} KiB");
}
