//! Channels that stall, stall alone, and take next to no memory. A program of its own, since it measures its
//! own memory: the server runs in it, the clients are other processes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic is how tests say no"
)]

mod common;

use common::{Person, Site};
use std::{
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

/// Most memory this process may take, in KiB.
const MEMORY: u64 = 64 * 1024;
/// Bytes that are sent to a session that does not read them: far more than lies between.
const INPUT: usize = 100_000_000;
/// Longest time until something comes that is not held up. What is, comes never.
const LONG: Duration = Duration::from_secs(60);

fn memory_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A connection that several sessions share.
struct Master {
    person: Person,
    control: String,
    _process: Child,
}

impl Master {
    async fn open(person: &Person) -> Self {
        let control = format!("ControlPath={}", person.path("control").display());
        let mut process = person.start(&["-o", &control, "-M"], &["echo up; sleep 1000"]);
        process.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).await.unwrap();
        Self { person: person.clone(), control, _process: process }
    }

    fn session(&self, options: &[&str], command: &str) -> Command {
        self.person.ssh_command(&[&["-o", &self.control], options].concat(), &[command])
    }

    /// A session that says when it beats, ten times a second.
    async fn ticker(&self) -> (Child, Lines<BufReader<ChildStdout>>) {
        let mut ticker = self.session(&[], "while :; do echo beat; sleep 0.1; done").spawn().unwrap();
        let mut beats = BufReader::new(ticker.stdout.take().unwrap()).lines();
        beats.next_line().await.unwrap();
        (ticker, beats)
    }
}

/// How long so many beats take.
async fn beating(beats: &mut Lines<BufReader<ChildStdout>>, count: usize) -> Duration {
    let begin = Instant::now();
    for _ in 0..count {
        timeout(LONG, beats.next_line()).await.expect("a beat").unwrap().unwrap();
    }
    begin.elapsed()
}

/// How long another session takes from its start to its end.
async fn opening(master: &Master) -> Duration {
    let begin = Instant::now();
    let another = master.session(&[], "echo another").stdin(Stdio::null()).output();
    assert_eq!(timeout(LONG, another).await.expect("another session").unwrap().stdout, b"another\n");
    begin.elapsed()
}

/// Whether something took about as long beside a stall as before: a busy machine makes both slow.
fn as_before(now: Duration, before: Duration) -> bool {
    now < before * 10 + Duration::from_secs(5)
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_channels_stall_alone() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let master = Master::open(&alice).await;
    let (_ticker, mut beats) = master.ticker().await;
    let (beating_before, opening_before) = (beating(&mut beats, 60).await, opening(&master).await);

    // Two sessions that do not read what they are sent, one of them on a terminal, and one whose output
    // nobody reads.
    let wake = site.backend.agent.home().join("wake");
    alice.ssh(&format!("mkfifo {}", wake.display())).await.success();
    let mut feed = Command::new("head");
    let mut feed = feed.args(["-c", &INPUT.to_string(), "/dev/zero"]).stdout(Stdio::piped()).spawn().unwrap();
    let input: Stdio = feed.stdout.take().unwrap().try_into().unwrap();
    let mut sleeper = master.session(&[], &format!("read go < {}; wc -c", wake.display()));
    let mut sleeper = sleeper.stdin(input).spawn().unwrap();
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let mut deaf = master.session(&["-tt"], "stty raw -echo; sleep 1000");
    let mut deaf = deaf.stdin(zeros).stdout(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    let mut flood = master.session(&[], "yes").spawn().unwrap();

    let beating = beating(&mut beats, 60).await;
    assert!(as_before(beating, beating_before), "60 beats took {beating:?}, before {beating_before:?}");
    let opening = opening(&master).await;
    assert!(as_before(opening, opening_before), "a session took {opening:?} to open, before {opening_before:?}");
    assert!(feed.try_wait().unwrap().is_none(), "the sleeper took it all: nothing stalled");
    let peak = memory_kib("VmHWM");
    assert!(peak < MEMORY, "{peak} KiB");

    // The flood waited where it is made, and is whole.
    let mut some = vec![0; 4_000_000];
    timeout(LONG, flood.stdout.take().unwrap().read_exact(&mut some)).await.unwrap().unwrap();
    assert!(some.chunks(2).all(|line| line == b"y\n"));
    flood.kill().await.unwrap();

    // The sleeper wakes and gets every byte. (Beside another that stalls, it would get them slowly.)
    deaf.kill().await.unwrap();
    let begin = Instant::now();
    alice.ssh(&format!("echo go > {}", wake.display())).await.success();
    let mut count = String::new();
    let read = sleeper.stdout.as_mut().unwrap().read_to_string(&mut count);
    timeout(Duration::from_secs(120), read).await.unwrap().unwrap();
    assert_eq!(count.trim(), INPUT.to_string());
    println!("{INPUT} bytes in {:?}", begin.elapsed());
    assert!(sleeper.wait().await.unwrap().success());
    let peak = memory_kib("VmHWM");
    assert!(peak < MEMORY, "{peak} KiB");
}
