//! What keeps the front door open: penalties, chance, load balancers, settings that change.

use super::common::{Outcome, Person, Site, until};
use std::{net::Ipv4Addr, time::Duration};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(60);

/// What the server says first to somebody who connects from this address, and begins with these bytes.
async fn greeting(site: &Site, from: Ipv4Addr, begin: &[u8]) -> String {
    let mut guest = guest(site, from).await;
    guest.write_all(begin).await.unwrap();
    let mut line = String::new();
    let mut guest = BufReader::new(guest);
    let read = guest.read_line(&mut line);
    // Ended by a reset if there was more to read.
    let _ = timeout(SOON, read).await.expect("the server says something or ends");
    line
}

async fn guest(site: &Site, from: Ipv4Addr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    socket.connect(site.address).await.unwrap()
}

/// `ssh` through a program that begins with these bytes.
async fn ssh_after(site: &Site, person: &Person, begin: &str, command: &str) -> Outcome {
    let script = person.path("balancer.py");
    std::fs::write(&script, BALANCER).unwrap();
    let (host, port) = (site.address.ip(), site.address.port());
    let program = format!("ProxyCommand=python3 {} {host} {port} {begin}", script.display());
    person.ssh_with(&["-o", &program], &[command]).await
}

/// Connects, sends the bytes of its last argument (in hexadecimal digits), then copies both ways.
const BALANCER: &str = "
import os, socket, sys, threading
server = socket.create_connection((sys.argv[1], int(sys.argv[2])))
server.sendall(bytes.fromhex(sys.argv[3]))
def up():
    while data := os.read(0, 65536):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := server.recv(65536):
    while data:
        data = data[os.write(1, data):]
";

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_whose_connections_come_to_nothing_is_shut_out() {
    let site = Site::with_settings("penalty_exempt = [\"127.0.0.3/32\"]").await;
    let alice = site.person("alice").await;
    let stranger = site.stranger("stranger");
    let fail = async |address: &str| stranger.ssh_with(&["-b", address], &["true"]).await.exits(255);
    // Four times five seconds are more than fifteen; a penalty is counted when its connection has ended.
    let shut = async {
        while !greeting(&site, Ipv4Addr::new(127, 0, 0, 2), b"").await.starts_with("Too many failed connections") {
            fail("127.0.0.2").await;
            fail("127.0.0.3").await;
        }
    };
    timeout(SOON, shut).await.expect("who fails again and again is shut out");
    // With it everybody from there, but nobody else, and nobody who is exempt.
    let shut = async {
        while alice.ssh_with(&["-b", "127.0.0.2"], &["true"]).await.code == 0 {
            fail("127.0.0.2").await;
        }
    };
    timeout(SOON, shut).await.expect("it is the address that is shut out");
    alice.ssh("true").await.success();
    alice.ssh_with(&["-b", "127.0.0.3"], &["true"]).await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_in_is_not_punished_for_the_keys_before_the_right_one() {
    let site = Site::with_settings("penalty_exempt = []").await;
    let alice = site.person("alice").await;
    let others: Vec<_> = (0..5).map(|number| alice.make_key(&format!("other{number}"))).collect();
    let mut options: Vec<String> = others.iter().flat_map(|key| ["-i".into(), key.display().to_string()]).collect();
    options.extend(["-i".into(), alice.path("id_ed25519").display().to_string()]);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    for _ in 0..6 {
        alice.ssh_with(&options, &["true"]).await.success();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_door_that_fills_drops_by_chance() {
    let site = Site::with_settings("max_unauthenticated = 1000\nearly_drop_from = 1\nearly_drop_percent = 50").await;
    let mut guests = Vec::new();
    let (mut dropped, mut taken) = (0, 0);
    // Nobody is in yet when the first comes. Of forty more each is dropped with every second toss of a coin.
    for _ in 0..41 {
        let mut lines = BufReader::new(guest(&site, Ipv4Addr::LOCALHOST).await).lines();
        let line = timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
        if line.starts_with("SSH-2.0-MLAD_") {
            taken += 1;
            guests.push(lines);
        } else {
            assert_eq!(line, "Too many connections; try again in a moment");
            dropped += 1;
        }
    }
    assert!(dropped > 0 && taken > 1, "{dropped} dropped, {taken} taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_balancer_says_who_comes_and_nobody_else_does() {
    let site = Site::with_settings("proxy_protocol_from = [\"127.0.0.1/32\"]").await;
    let alice = site.person("alice").await;
    let command = "echo $SSH_CONNECTION";
    let line = hexadecimal(b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 22\r\n");
    let seen = ssh_after(&site, &alice, &line, command).await.success();
    assert_eq!(seen.text(), "192.0.2.7 56324 198.51.100.1 22");
    let user = site.store.user_by_name("alice").await.unwrap();
    let noted = async {
        while site.store.keys_of(user.id).await.unwrap()[0].last_used_from.as_deref() != Some("192.0.2.7") {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, noted).await.expect("the key was used from the client's address");
    let mut binary = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24".to_vec();
    binary.extend("2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap().octets());
    binary.extend("2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
    binary.extend([0xdc, 0x04, 0, 22]);
    let seen = ssh_after(&site, &alice, &hexadecimal(&binary), command).await.success();
    assert_eq!(seen.text(), "2001:db8::7 56324 2001:db8::1 22");
    // Its own connections are its own.
    let own = ssh_after(&site, &alice, &hexadecimal(b"PROXY UNKNOWN\r\n"), command).await.success();
    assert!(own.text().starts_with("127.0.0.1 "), "{own:?}");
    // It has to say so; and from another address it is garbage.
    assert_eq!(greeting(&site, Ipv4Addr::LOCALHOST, b"SSH-2.0-OpenSSH_9.2\r\n").await, "");
    assert_eq!(greeting(&site, Ipv4Addr::LOCALHOST, &[b'P'; 200]).await, "");
    let mut liar = guest(&site, Ipv4Addr::new(127, 0, 0, 2)).await;
    liar.write_all(b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 22\r\n").await.unwrap();
    let mut said = String::new();
    let _ = timeout(SOON, liar.read_to_string(&mut said)).await.unwrap();
    assert!(said.contains("Invalid SSH identification string."), "{said}");
    alice.ssh_with(&["-b", "127.0.0.2"], &["true"]).await.success();
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_behind_a_load_balancer_are_told_apart() {
    let site = Site::with_settings("proxy_protocol_from = [\"127.0.0.1/32\"]").await;
    let header = |host: u8| format!("PROXY TCP4 192.0.2.{host} 198.51.100.1 56324 22\r\n");
    let shut = async {
        while !greeting(&site, Ipv4Addr::LOCALHOST, format!("{}GARBAGE\r\n", header(7)).as_bytes())
            .await
            .starts_with("Too many failed connections")
        {}
    };
    timeout(SOON, shut).await.expect("the source is shut out, and not its load balancer");
    let other = greeting(&site, Ipv4Addr::LOCALHOST, header(8).as_bytes()).await;
    assert!(other.starts_with("SSH-2.0-MLAD_"), "{other}");
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_settings_hold_for_connections_to_come_and_nobody_is_dropped() {
    let site = Site::start().await;
    let alice = site.person("alice").await;
    let mut session = alice.start(&[], &["echo up; cat"]);
    let mut lines = BufReader::new(session.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("up"));
    site.change(|config| config.ssh.max_connections_per_user = 1);
    let refused = async { while alice.ssh("true").await.code == 0 {} };
    timeout(SOON, refused).await.expect("the new limit holds");
    session.stdin.as_mut().unwrap().write_all(b"still here\n").await.unwrap();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("still here"));
    // New host keys are shown to those who come; a key that cannot be read changes nothing.
    let key = site.path("data/ssh/ssh_host_ed25519_key");
    let old = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    for path in [key.clone(), key.with_extension("pub")] {
        std::fs::remove_file(path).unwrap();
    }
    site.change(|config| config.ssh.max_connections_per_user = 100);
    until("the new host key", || key.with_extension("pub").exists()).await;
    let known = format!("UserKnownHostsFile={}", alice.path("new_hosts").display());
    let fresh = ["-o", &known, "-o", "HostKeyAlgorithms=ssh-ed25519"];
    let new = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    assert_ne!(old, new);
    let shown = async {
        loop {
            let _ = std::fs::remove_file(alice.path("new_hosts"));
            alice.ssh_with(&fresh, &["true"]).await.success();
            let seen = std::fs::read_to_string(alice.path("new_hosts")).unwrap();
            if seen.contains(new.split(' ').nth(1).unwrap().trim()) {
                return;
            }
        }
    };
    timeout(SOON, shown).await.expect("the new key is shown");
    std::fs::write(&key, "no key").unwrap();
    site.change(|config| config.ssh.max_connections_per_user = 1);
    alice.ssh_with(&fresh, &["true"]).await.success();
    assert!(session.try_wait().unwrap().is_none());
}
