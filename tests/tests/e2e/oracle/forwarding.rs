//! Forwarding in all directions, and the key agents of two clients at once.

use super::{Both, SOON, seen, ssh, started};
use mlad_tests::{Lines, Outcome, Person, RunningClient, Site, eventually, eventually_some};
use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    process::{Command, Stdio},
    thread,
};

/// A server in the container on a TCP port and a Unix socket: says its name first, then sends back what it gets, and
/// says how much that was when the client has ended its side.
const SERVER: &str = "
import socket, sys, threading, os
def serve(listener):
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=answer, args=(peer,), daemon=True).start()
def answer(peer):
    peer.sendall(b'hello\\n')
    count = 0
    while True:
        piece = peer.recv(65536)
        if not piece: break
        count += len(piece)
        peer.sendall(piece)
    peer.sendall(b'\\n%d bytes\\n' % count)
    peer.close()
tcp = socket.create_server(('127.0.0.1', 7007), family=socket.AF_INET)
unix = socket.socket(socket.AF_UNIX)
unix.bind('server.sock')
unix.listen()
threading.Thread(target=serve, args=(unix,), daemon=True).start()
print('ready', flush=True)
serve(tcp)
";

fn server(person: &Person) -> RunningClient {
    person.ssh_with_input("cat > server.py", SERVER.as_bytes()).success();
    let mut server = started(ssh(person, &[], &["exec python3 server.py"]));
    assert_eq!(server.lines().next(SOON), "ready");
    server
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Listens for the first word before it says anything itself; then a megabyte goes both ways.
fn talk<S: Sync>(stream: S, end: impl Fn(&S) + Send) -> (Vec<u8>, String)
where
    for<'a> &'a S: Read + Write,
{
    let mut greeting = [0; 6];
    (&stream).read_exact(&mut greeting).unwrap();
    let mut rest = Vec::new();
    let stream = &stream;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut writer = stream;
            (0..16).for_each(|_| writer.write_all(&[b'x'; 65536]).unwrap());
            end(stream);
        });
        let mut reader = stream;
        reader.read_to_end(&mut rest).unwrap();
    });
    let tail = rest.split_off(rest.len().saturating_sub(15));
    (greeting.to_vec(), format!("{} {}", rest.len(), String::from_utf8_lossy(&tail)))
}

fn tcp(port: u16) -> (Vec<u8>, String) {
    let stream = eventually_some("the port answers", SOON, || TcpStream::connect(("127.0.0.1", port)).ok());
    talk(stream, |stream| stream.shutdown(Shutdown::Write).unwrap())
}

#[test]
fn forwarding_reaches_as_with_sshd() {
    let site = Site::start();
    let both = Both::new(&site);
    let _servers = [server(&both.gateway), server(&both.oracle.person)];
    both.case("-L, and the server speaks first", |person| {
        let port = free_port();
        let _client = started(ssh(person, &["-N", "-L", &format!("127.0.0.1:{port}:localhost:7007")], &[]));
        tcp(port)
    });
    both.case("-L to a Unix socket", |person| {
        let here = person.path("here.sock");
        let home = person.ssh("pwd").text();
        let forward = format!("{}:{home}/server.sock", here.display());
        let _client = started(ssh(person, &["-N", "-L", &forward], &[]));
        let stream = eventually_some("the socket answers", SOON, || UnixStream::connect(&here).ok());
        talk(stream, |stream| stream.shutdown(Shutdown::Write).unwrap())
    });
    for (what, target) in [("a closed port", "127.0.0.1:1"), ("no host", "no.such.host.invalid:1")] {
        both.case(&format!("-L to {what}"), |person| {
            let port = free_port();
            let mut client = started(ssh(person, &["-L", &format!("127.0.0.1:{port}:{target}")], &["echo in; cat"]));
            assert_eq!(client.lines().next(SOON), "in");
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let mut said = Vec::new();
            // An end and a reset are the same to the reader: nothing comes.
            let _ = stream.read_to_end(&mut said);
            drop(client.child.stdin.take());
            (said, client.ends(SOON))
        });
        both.case(&format!("-W to {what}"), |person| seen(ssh(person, &["-W", target], &[]), b"").code);
    }
    both.case("-W", |person| seen(ssh(person, &["-W", "127.0.0.1:7007"], &[]), b"some input"));
    both.case("-D", |person| {
        let port = free_port();
        let _client = started(ssh(person, &["-N", "-D", &format!("127.0.0.1:{port}")], &[]));
        eventually("it listens", SOON, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let said = |version: &str| {
            let mut nc = Command::new("nc");
            nc.args(["-N", "-X", version, "-x", &format!("127.0.0.1:{port}"), "127.0.0.1", "7007"]);
            seen(nc, b"by socks")
        };
        (said("4"), said("5"))
    });
    both.case("-R", |person| {
        let here = home_server();
        let forward = format!("0:127.0.0.1:{here}");
        let options = ["-v", "-N", "-o", "ExitOnForwardFailure=yes", "-R", &forward];
        let mut client = started(person.ssh_command(&options, &[]));
        let said = Lines::of(client.child.stderr.take().unwrap());
        let port = said.find(SOON, |line| line.strip_prefix("Allocated port ")?.split(' ').next()?.parse::<u16>().ok());
        let through = seen(ssh(person, &[], &[&format!("nc -N 127.0.0.1 {port}")]), b"from the container");
        let listens = person.ssh(&format!("ss -tln | grep -c 127.0.0.1:{port}")).text();
        drop(client);
        eventually("nobody listens any more", SOON, || {
            person.ssh(&format!("ss -tln | grep :{port}")).text().is_empty()
        });
        (through, listens)
    });
    both.case("-R of a port that is taken", |person| {
        let options = ["-o", "ExitOnForwardFailure=yes", "-R", "7007:127.0.0.1:1"];
        seen(ssh(person, &options, &["echo never"]), b"")
    });
    both.case("-R of a Unix socket", |person| {
        let here = person.path("home.sock");
        let _ = std::fs::remove_file(&here);
        let listener = UnixListener::bind(&here).unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok).take(2) {
                stream.write_all(b"from a socket at home\n").unwrap();
            }
        });
        let home = person.ssh("pwd").text();
        let forward = format!("{home}/back.sock:{}", here.display());
        let client = started(ssh(person, &["-N", "-o", "ExitOnForwardFailure=yes", "-R", &forward], &[]));
        eventually("the socket is there", SOON, || person.ssh("test -S back.sock").code == 0);
        let mode = person.ssh("stat -c '%a %U' back.sock").text();
        let through = seen(ssh(person, &[], &["nc -N -U back.sock"]), b"");
        let again = seen(ssh(person, &["-o", "ExitOnForwardFailure=yes", "-R", &forward], &["echo never"]), b"");
        drop(client);
        (mode, through, again)
    });
    both.case("forwards by a master, and their end", |person| {
        let path = format!("ControlPath={}", person.path("control").display());
        let master = ["-o", &path, "-o", "ControlMaster=yes", "-o", "ControlPersist=600", "-N", "-f"];
        Outcome::of(&mut person.ssh_command(&master, &[])).success();
        let order =
            |order: &str, forward: &str| seen(person.ssh_command(&["-o", &path, "-O", order, "-R", forward], &[]), b"");
        let here = home_server();
        let forward = format!("7008:127.0.0.1:{here}");
        let begun = order("forward", &forward).code;
        let through = seen(ssh(person, &[], &["nc -N 127.0.0.1 7008"]), b"");
        let taken = order("forward", "7007:127.0.0.1:1").code;
        let ended = order("cancel", &forward).code;
        eventually("nobody listens any more", SOON, || person.ssh("ss -tln | grep :7008").text().is_empty());
        order("exit", &forward);
        (begun, through, taken, ended)
    });
    both.case("two key agents at once", two_key_agents);
    both.agree();
}

/// Says hello to everybody at home, on this port, until the test ends.
fn home_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut said = Vec::new();
            let _ = stream.write_all(b"hello from home\n");
            let _ = stream.read_to_end(&mut said);
            let _ = stream.write_all(&said);
        }
    });
    port
}

/// Each of two clients reaches its own agent, with the other connected.
fn two_key_agents(person: &Person) -> Vec<String> {
    let agents: Vec<_> = ["first", "second"].into_iter().map(|name| agent(person, name)).collect();
    let clients: Vec<_> = agents
        .iter()
        .map(|(socket, _)| {
            let mut command =
                ssh(person, &["-A"], &["echo in; read go; ssh-add -l | cut -d' ' -f 3-; ssh-add -l | wc -l"]);
            command.env("SSH_AUTH_SOCK", socket);
            let mut client = started(command);
            let lines = client.lines();
            assert_eq!(lines.next(SOON), "in");
            (client, lines)
        })
        .collect();
    clients
        .into_iter()
        .flat_map(|(mut client, lines)| {
            client.child.stdin.take().unwrap().write_all(b"go\n").unwrap();
            let said = [lines.next(SOON), lines.next(SOON)];
            assert_eq!(client.ends(SOON), Some(0));
            said
        })
        .collect()
}

fn agent(person: &Person, name: &str) -> (String, RunningClient) {
    let key = person.path(name);
    let _ = std::fs::remove_file(&key);
    Outcome::of(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&key))
        .success();
    let socket = person.path(&format!("{name}.agent")).display().to_string();
    let child = Command::new("ssh-agent").args(["-D", "-a", &socket]).stdout(Stdio::null()).spawn().unwrap();
    let agent = (socket.clone(), RunningClient { child });
    eventually("the agent holds the key", SOON, || {
        Outcome::of(Command::new("ssh-add").arg(&key).env("SSH_AUTH_SOCK", &socket)).code == 0
    });
    agent
}
