//! Rows A3–A5: what people do over SSH, with the tools they do it with. Case 8 of the first issue.

use mlad_tests::{Outcome, Person, RunningClient, Site, eventually, eventually_some};
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

const SOON: Duration = Duration::from_secs(30);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_gigabyte_goes_both_ways_unchanged() {
    let site = Site::start();
    let alice = site.person("alice");
    // Down: made there, summed on both sides.
    let made = "openssl enc -aes-128-ctr -nosalt -pass pass:mlad -in /dev/zero 2>/dev/null | head -c 1073741824";
    let made = if alice.ssh("command -v openssl").code == 0 { made.into() } else { made_by_python(1 << 30) };
    let there = alice.ssh(&format!("{made} | sha256sum")).success().text();
    let mut down = alice.ssh_command(&[], &[&made]).stdout(Stdio::piped()).spawn().unwrap();
    let here = Outcome::of_piped(Command::new("sha256sum"), down.stdout.take().unwrap()).success().text();
    assert!(down.wait().unwrap().success());
    assert_eq!(here, there);
    // Up.
    let mut source = Command::new("sh")
        .args(["-c", "head -c 1073741824 /dev/zero | tr '\\0' 'm'"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let up = Outcome::of_piped(alice.ssh_command(&[], &["sha256sum"]), source.stdout.take().unwrap()).success().text();
    source.wait().unwrap();
    let wanted =
        Outcome::of(Command::new("sh").args(["-c", "head -c 1073741824 /dev/zero | tr '\\0' 'm' | sha256sum"])).text();
    assert_eq!(up, wanted);
}

fn made_by_python(size: u64) -> String {
    format!(
        "python3 -c 'import random, sys; r = random.Random(7); [sys.stdout.buffer.write(r.randbytes(1 << 20)) for _ in range({})]'",
        size >> 20
    )
}

#[test]
fn local_forwarding_reaches_a_server_in_the_container() {
    let site = Site::start();
    let alice = site.person("alice");
    alice.ssh("mkdir -p www && echo forwarded > www/index.html").success();
    let _server = alice.start(&[], &["cd www && exec python3 -m http.server 8000 --bind 127.0.0.1"]);
    let port = free_port();
    let _forward = alice.start(&["-N", "-L", &format!("127.0.0.1:{port}:localhost:8000")], &[]);
    let url = format!("http://127.0.0.1:{port}/index.html");
    let page = eventually_some("the page comes through", SOON, || {
        let outcome = Outcome::of(Command::new("curl").args(["-sf", &url]));
        (outcome.code == 0).then(|| outcome.text())
    });
    assert_eq!(page, "forwarded");
}

#[test]
fn remote_forwarding_brings_connections_home() {
    let site = Site::start();
    let alice = site.person("alice");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream: TcpStream = stream;
            stream.write_all(b"hello from home\n").unwrap();
        }
    });
    let _forward = alice.start(&["-N", "-o", "ExitOnForwardFailure=yes", "-R", &format!("9000:127.0.0.1:{here}")], &[]);
    let said = eventually_some("the connection comes home", SOON, || {
        let outcome = alice.ssh("nc -N 127.0.0.1 9000 < /dev/null");
        outcome.text().contains("hello").then(|| outcome.text())
    });
    assert_eq!(said, "hello from home");
    let mut dynamic = alice.start(&["-v", "-N", "-R", &format!("0:127.0.0.1:{here}")], &[]);
    let lines = BufReader::new(dynamic.child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let port =
        lines.into_iter().find_map(|line| line.strip_prefix("Allocated port ")?.split(' ').next()?.parse::<u16>().ok());
    assert!(port.unwrap() > 1023);
}

#[test]
fn the_key_agent_is_reached_from_the_container() {
    let site = Site::start();
    let alice = site.person("alice");
    let agent = KeyAgent::start(&alice);
    let mut command = alice.ssh_command(&["-A"], &["ssh-add -l"]);
    let outcome = Outcome::of(command.env("SSH_AUTH_SOCK", &agent.socket)).success();
    assert!(outcome.text().contains("ED25519"), "{}", outcome.text());
    assert_ne!(alice.ssh("ssh-add -l").code, 0, "and only when it is forwarded");
}

/// An `ssh-agent` that holds the person's key; ended when dropped.
struct KeyAgent {
    socket: String,
    process: RunningClient,
}

impl KeyAgent {
    fn start(person: &Person) -> Self {
        let socket = person.path("agent").display().to_string();
        let child = Command::new("ssh-agent").args(["-D", "-a", &socket]).stdout(Stdio::null()).spawn().unwrap();
        let agent = Self { socket, process: RunningClient { child } };
        let key = person.path("id_ed25519");
        eventually("the agent holds the key", SOON, || {
            Outcome::of(Command::new("ssh-add").arg(&key).env("SSH_AUTH_SOCK", &agent.socket)).code == 0
        });
        assert!(agent.process.child.id() > 0);
        agent
    }
}

#[test]
fn a_terminal_is_a_terminal() {
    let site = Site::start();
    let alice = site.person("alice");
    let script = format!(
        "set timeout 30\n\
         spawn ssh {options} -tt server\n\
         stty rows 30 columns 100 < $spawn_out(slave,name)\n\
         expect -re {{\\$ $}}\n\
         send \"stty size; tty\\r\"\n\
         expect \"30 100\" {{}} timeout {{ exit 10 }}\n\
         expect \"/dev/pts/\" {{}} timeout {{ exit 11 }}\n\
         stty rows 40 columns 120 < $spawn_out(slave,name)\n\
         send \"stty size\\r\"\n\
         expect \"40 120\" {{}} timeout {{ exit 12 }}\n\
         send \"vim -u NONE note.txt\\r\"\n\
         expect \"New File\" {{}} timeout {{ exit 13 }}\n\
         send \"iwritten in vim\\033:wq\\r\"\n\
         expect \"bytes written\" {{}} timeout {{ exit 14 }}\n\
         expect -re {{\\$ $}}\n\
         send \"sh -c 'echo begun; sleep 100'\\r\"\n\
         expect -re {{begun[^;]}} {{}} timeout {{ exit 15 }}\n\
         send \"\\003\"\n\
         expect -re {{\\$ $}} {{}} timeout {{ exit 16 }}\n\
         send \"echo int=\\$?\\r\"\n\
         expect \"int=130\" {{}} timeout {{ exit 17 }}\n\
         expect -re {{\\$ $}}\n\
         send \"exit 9\\r\"\n\
         expect eof\n\
         catch wait result\n\
         exit [lindex $result 3]\n",
        options = alice.options().join(" ")
    );
    let file = alice.path("terminal.exp");
    fs::write(&file, script).unwrap();
    let outcome = Outcome::of(Command::new("expect").arg(&file).env("TERM", "xterm"));
    assert_eq!(outcome.code, 9, "{}", outcome.text());
    assert_eq!(fs::read_to_string(site.data("home/alice/note.txt")).unwrap(), "written in vim\n");
    let lines = outcome.text();
    let greeting = lines.lines().skip(1).take_while(|line| !line.contains("$ ")).count();
    assert!((1..=12).contains(&greeting), "a greeting of at most 12 lines:\n{lines}");
}

#[test]
fn rsync_and_git_work_unchanged() {
    let site = Site::start();
    let alice = site.person("alice");
    let tree = alice.path("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "content").unwrap();
    let rsync =
        |from: &str, to: &str| Outcome::of(Command::new("rsync").args(["-a", "-e", &alice.ssh_words(), from, to]));
    rsync(&format!("{}/", tree.display()), "server:tree/").success();
    let back = alice.path("back");
    rsync("server:tree/", &format!("{}/", back.display())).success();
    assert_eq!(fs::read_to_string(back.join("sub/file")).unwrap(), "content");

    alice.ssh("git init -q --bare project.git").success();
    let git = |arguments: &[&str]| {
        let identity = ["-c", "user.name=Alice", "-c", "user.email=alice@example.org"];
        Outcome::of(
            Command::new("git")
                .args(identity)
                .args(arguments)
                .current_dir(&tree)
                .env("GIT_SSH_COMMAND", alice.ssh_words()),
        )
        .success()
    };
    git(&["init", "-q", "-b", "main"]);
    git(&["add", "-A"]);
    git(&["commit", "-q", "-m", "first"]);
    git(&["push", "-q", "server:project.git", "main"]);
    git(&["clone", "-q", "-b", "main", "server:project.git", alice.path("clone").to_str().unwrap()]);
    assert_eq!(fs::read_to_string(alice.path("clone/sub/file")).unwrap(), "content");
}

#[test]
fn standard_input_ends_and_environment_arrives() {
    let site = Site::start();
    let alice = site.person("alice");
    assert_eq!(alice.ssh_with_input("wc -c; echo after", b"12345").success().text(), "5\nafter");
    let outcome = Outcome::of(
        &mut alice.ssh_command(&["-o", "SetEnv=LC_ALL=C.UTF-8"], &["printf '%s' \"$LC_ALL\"; printf ' %s' 안녕"]),
    );
    assert_eq!(outcome.success().text(), "C.UTF-8 안녕");
    let mut early = alice.start(&[], &["exec 0<&-; sleep 0.1; echo closed"]);
    let mut text = String::new();
    early.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "closed\n");
}
