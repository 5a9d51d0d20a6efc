//! The front door: limits, bad guests, the end.

use super::common::{Outcome, Site};
use std::time::Duration;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::{Instant, timeout},
};

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_silence_end_and_harm_nobody() {
    let site = Site::with_settings("login_grace_seconds = 3").await;
    let alice = site.person("alice").await;
    let long = vec![b'A'; 100_000];
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\n",
        b"\xff\xfe\x00",
        b"SSH-1.5-old\r\n",
        &long,
        b"SSH-2.0-x\r\n\xff\xff\xff\xff",
    ] {
        let mut guest = TcpStream::connect(site.address).await.unwrap();
        let _ = guest.write_all(garbage).await;
        let mut answer = Vec::new();
        // Ended by a reset if there was more to read.
        let _ = timeout(SOON, guest.read_to_end(&mut answer)).await.expect("the guest was shown out");
        assert!(answer.is_empty() || answer.starts_with(b"SSH-2.0-MLAD_"), "{answer:?}");
    }
    let begin = Instant::now();
    let mut silent = TcpStream::connect(site.address).await.unwrap();
    let mut dribbling = TcpStream::connect(site.address).await.unwrap();
    dribbling.write_all(b"SSH-2.0-").await.unwrap();
    let mut stuck = TcpStream::connect(site.address).await.unwrap();
    stuck.write_all(b"SSH-2.0-OpenSSH_9.0\r\n").await.unwrap();
    for guest in [&mut silent, &mut dribbling, &mut stuck] {
        let _ = timeout(SOON, guest.read_to_end(&mut Vec::new())).await.expect("the grace time ended it");
    }
    assert!(begin.elapsed() >= Duration::from_millis(2900));
    // One who has logged in is not ended by it.
    assert_eq!(alice.ssh("sleep 4; echo still").await.success().text(), "still");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_too_many_is_turned_away_until_another_leaves() {
    let site = Site::with_settings("max_unauthenticated = 2").await;
    let alice = site.person("alice").await;
    let first = TcpStream::connect(site.address).await.unwrap();
    let mut lines =
        [BufReader::new(first).lines(), BufReader::new(TcpStream::connect(site.address).await.unwrap()).lines()];
    for guest in &mut lines {
        assert!(guest.next_line().await.unwrap().unwrap().starts_with("SSH-2.0-MLAD_"));
    }
    alice.ssh("true").await.exits(255);
    drop(lines);
    let in_again = async { while alice.ssh("true").await.code != 0 {} };
    timeout(SOON, in_again).await.unwrap();
}

/// All of one address are one source, also loopback's.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_from_one_address_does_not_keep_others_out() {
    let site = Site::with_settings("max_unauthenticated = 40").await;
    let alice = site.person("alice").await;
    // A quarter, and all of them are in when they are greeted.
    let mut crowd = Vec::new();
    for _ in 0..10 {
        let mut guest = BufReader::new(TcpStream::connect(site.address).await.unwrap()).lines();
        assert!(guest.next_line().await.unwrap().unwrap().starts_with("SSH-2.0-MLAD_"));
        crowd.push(guest);
    }
    let mut surplus = BufReader::new(TcpStream::connect(site.address).await.unwrap()).lines();
    let told = timeout(SOON, surplus.next_line()).await.unwrap().unwrap();
    assert_eq!(told.as_deref(), Some("Too many connections from your address; try again in a moment"));
    alice.ssh("true").await.exits(255);
    alice.ssh_with(&["-b", "127.0.0.2"], &["true"]).await.success();
    crowd.pop();
    let in_again = async { while alice.ssh("true").await.code != 0 {} };
    timeout(SOON, in_again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_of_a_user_are_limited_over_all_their_connections() {
    let site = Site::with_settings("max_channels_per_user = 3").await;
    let (alice, bob) = (site.person("alice").await, site.person("bob").await);
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let mut session = alice.start(&[], &["echo up; sleep 1000"]);
        BufReader::new(session.stdout.as_mut().unwrap()).lines().next_line().await.unwrap().unwrap();
        sessions.push(session);
    }
    let fourth = alice.ssh_with(&["-o", "LogLevel=INFO"], &["true"]).await.exits(255);
    assert!(fourth.stderr.contains("open failed"), "{fourth:?}");
    bob.ssh("true").await.success();
    sessions.pop().unwrap().kill().await.unwrap();
    let in_again = async { while alice.ssh("true").await.code != 0 {} };
    timeout(SOON, in_again).await.unwrap();
    // Listeners count: they hold a connection to the agent each.
    let path = |name: &str| format!("{}:localhost:1", site.backend.agent.home().join(name).display());
    let told = alice.ssh_with(&["-o", "LogLevel=INFO", "-R", &path("one"), "-R", &path("two")], &["true"]).await;
    assert!(told.stderr.contains("remote port forwarding failed"), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_and_channels_of_a_user_are_limited() {
    let site = Site::with_settings("max_connections_per_user = 2\nmax_channels = 3").await;
    let alice = site.person("alice").await;
    let bob = site.person("bob").await;
    let control = format!("ControlPath={}", alice.path("control").display());
    let mut master = alice.start(&["-o", &control, "-M"], &["echo up; sleep 1000"]);
    let mut lines = BufReader::new(master.stdout.take().unwrap()).lines();
    lines.next_line().await.unwrap();
    let mut others = Vec::new();
    for _ in 0..2 {
        let mut other = alice.start(&["-o", &control], &["echo up; sleep 1000"]);
        let mut lines = BufReader::new(other.stdout.take().unwrap()).lines();
        lines.next_line().await.unwrap();
        others.push((other, lines));
    }
    // Over this connection or not at all: the client would make another.
    let fourth = alice.ssh_with(&["-o", &control, "-o", "ProxyCommand=false"], &["echo x"]).await.exits(255);
    assert!(fourth.stdout.is_empty(), "{fourth:?}");
    assert!(fourth.stderr.contains("open failed") || fourth.stderr.contains("refused"), "{fourth:?}");
    let second = alice.start(&[], &["echo up; sleep 1000"]);
    let mut second = second;
    BufReader::new(second.stdout.take().unwrap()).lines().next_line().await.unwrap();
    alice.ssh("true").await.exits(255);
    bob.ssh("true").await.success();
    second.kill().await.unwrap();
    let in_again = async { while alice.ssh("true").await.code != 0 {} };
    timeout(SOON, in_again).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_strong_algorithms_are_offered() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    for option in [
        "Ciphers=aes128-cbc",
        "Ciphers=3des-cbc",
        "KexAlgorithms=diffie-hellman-group14-sha256",
        "KexAlgorithms=diffie-hellman-group1-sha1",
        "HostKeyAlgorithms=ssh-rsa",
        "HostKeyAlgorithms=rsa-sha2-512",
    ] {
        alice.ssh_with(&["-o", option], &["true"]).await.exits(255);
    }
    for option in [
        "Ciphers=aes128-gcm@openssh.com",
        "Ciphers=aes256-gcm@openssh.com",
        "KexAlgorithms=curve25519-sha256",
        "HostKeyAlgorithms=ecdsa-sha2-nistp256",
        "HostKeyAlgorithms=ssh-ed25519",
        "Compression=yes",
    ] {
        alice.ssh_with(&["-o", option, "-o", "UserKnownHostsFile=/dev/null"], &["true"]).await.success();
    }
    let rsa = alice.path("rsa");
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "rsa", "-b", "2048", "-N", "", "-f"])
        .arg(&rsa)
        .status();
    assert!(made.unwrap().success());
    let user = site.store.user_by_name("alice").await.unwrap();
    let line = std::fs::read_to_string(alice.path("rsa.pub")).unwrap();
    let key =
        mlad_gateway::ssh::parse_key(&mlad::api::NewKey { public_key: line, label: None, expires_at: None }).unwrap();
    site.store.add_key(user.id, &key).await.unwrap();
    let only = ["-o", "IdentityFile=none", "-i", rsa.to_str().unwrap()];
    alice.ssh_with(&only, &["true"]).await.success();
    alice.ssh_with(&[&only[..], &["-o", "PubkeyAcceptedAlgorithms=ssh-rsa"]].concat(), &["true"]).await.exits(255);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_stops_when_told_and_says_goodbye() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let mut session = alice.start(&["-o", "LogLevel=INFO"], &["echo up; sleep 1000"]);
    let mut short = alice.start(&[], &["echo up; sleep 2; echo done"]);
    for child in [&mut session, &mut short] {
        let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
        out.next_line().await.unwrap();
        child.stdout = Some(out.into_inner().into_inner());
    }
    site.shutdown.cancel();
    let finished = Outcome::from(timeout(SOON, short.wait_with_output()).await.unwrap().unwrap()).success();
    assert_eq!(finished.text(), "done", "who is quick ends in peace");
    let ended = timeout(SOON * 2, session.wait_with_output()).await.unwrap().unwrap();
    let told = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(told.contains("the server is being restarted"), "{told}");
    assert!(TcpStream::connect(site.address).await.is_err());
    let mut site = site;
    timeout(SOON, &mut site.server).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_leaves_nothing_behind() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let mark = site.backend.agent.home().join("pid");
    let mut session = alice.start(&["-tt"], &[&format!("echo $$ > {}; echo up; sleep 1000", mark.display())]);
    let mut lines = BufReader::new(session.stdout.take().unwrap()).lines();
    while !lines.next_line().await.unwrap().unwrap().contains("up") {}
    let pid = std::fs::read_to_string(&mark).unwrap();
    session.kill().await.unwrap();
    timeout(SOON, process_ends(&pid)).await.expect("the terminal was hung up");
}

async fn process_ends(pid: &str) {
    while std::path::Path::new(&format!("/proc/{}", pid.trim())).exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_gives_no_sign_of_life_is_given_up() {
    let site = Site::with_settings("keepalive_seconds = 3").await;
    let alice = site.person("alice").await;
    let mark = site.backend.agent.home().join("pid");
    let mut session = alice.start(&["-tt"], &[&format!("echo $$ > {}; echo up; sleep 1000", mark.display())]);
    let mut lines = BufReader::new(session.stdout.take().unwrap()).lines();
    while !lines.next_line().await.unwrap().unwrap().contains("up") {}
    let pid = std::fs::read_to_string(&mark).unwrap();
    // One that is merely quiet stays.
    assert_eq!(alice.ssh("sleep 7; echo still").await.success().text(), "still");
    let client = rustix::process::Pid::from_raw(session.id().unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(client, rustix::process::Signal::STOP).unwrap();
    timeout(SOON * 6, process_ends(&pid)).await.expect("the client was given up");
    session.kill().await.unwrap();
}
