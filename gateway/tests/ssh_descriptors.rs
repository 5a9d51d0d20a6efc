//! A server that runs out of file descriptors goes on when there are some again. A program of its own, since
//! the limit is the process's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a panic is how tests say no"
)]

mod common;

use common::Site;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{fs::File, os::unix::fs::FileExt as _, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_descriptors_waits_and_goes_on() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    alice.ssh("true").await.success();

    // Guests in another process hold all that are left.
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let before = getrlimit(Resource::Nofile);
    let stat = File::open("/proc/self/stat").unwrap();
    let script = format!(
        "import socket\nguests = [socket.create_connection(('127.0.0.1', {})) for _ in range(100)]\nprint('in', flush=True)\ninput()",
        site.address.port()
    );
    let mut guests =
        Command::new("python3").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    setrlimit(Resource::Nofile, Rlimit { current: Some(open + 40), ..before }).unwrap();
    let mut lines = BufReader::new(guests.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "in");
    let full = async {
        while (std::fs::read_dir("/proc/self/fd").map_or(u64::MAX, |all| all.count() as u64)) < open + 39 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), full).await.unwrap();

    // It does not spin meanwhile.
    let begin = cpu_ticks(&stat);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = cpu_ticks(&stat) - begin;
    assert!(used < 30, "the accept loop spins: {used} hundredths of a second in one");

    drop(guests.stdin.take());
    guests.wait().await.unwrap();
    setrlimit(Resource::Nofile, before).unwrap();
    let in_again = async { while alice.ssh("true").await.code != 0 {} };
    timeout(Duration::from_secs(20), in_again).await.unwrap();
}

/// What this process has used, in hundredths of a second; needs no new descriptor.
fn cpu_ticks(stat: &File) -> u64 {
    let mut text = [0; 1024];
    let count = stat.read_at(&mut text, 0).unwrap();
    let text = std::str::from_utf8(&text[..count]).unwrap();
    let fields = text.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
    fields.map(|field| field.parse::<u64>().unwrap()).sum()
}
