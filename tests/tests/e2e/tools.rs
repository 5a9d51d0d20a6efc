//! Rows A3–A5: what people do over SSH, with the tools they do it with. Case 8 of the first issue.

use mlad_tests::{Lines, Outcome, Person, RunningClient, Site, eventually, eventually_some};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, SystemTime},
};

const SOON: Duration = Duration::from_secs(30);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_gigabyte_goes_both_ways_unchanged() {
    let site = Site::start();
    let alice = site.person("alice");
    // Random all the way, so that no piece could stand for another.
    let big = alice.path("big");
    let mut source = fs::File::open("/dev/urandom").unwrap().take(1 << 30);
    std::io::copy(&mut source, &mut fs::File::create(&big).unwrap()).unwrap();
    let sum = Outcome::of_piped(Command::new("sha256sum"), fs::File::open(&big).unwrap()).success().text();
    let up = alice.ssh_command(&[], &["tee big | sha256sum"]);
    assert_eq!(Outcome::of_piped(up, fs::File::open(&big).unwrap()).success().text(), sum);
    let mut down = alice.ssh_command(&[], &["cat big"]).stdout(Stdio::piped()).spawn().unwrap();
    let here = Outcome::of_piped(Command::new("sha256sum"), down.stdout.take().unwrap()).success().text();
    assert_eq!(RunningClient { child: down }.ends(SOON), Some(0));
    assert_eq!(here, sum);
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
    let said = Lines::of(dynamic.child.stderr.take().unwrap());
    let port = said.find(SOON, |line| line.strip_prefix("Allocated port ")?.split(' ').next()?.parse::<u16>().ok());
    assert!(port > 1023);
}

#[test]
fn the_key_agent_is_reached_from_the_container() {
    let site = Site::start();
    let alice = site.person("alice");
    let agent = KeyAgent::start(&alice);
    let mut command = alice.ssh_command(&["-A"], &["ssh-add -l"]);
    let outcome = Outcome::of(command.env("SSH_AUTH_SOCK", &agent.socket)).success();
    assert!(outcome.text().contains("ED25519"), "{}", outcome.text());
    // 2 is its own word for "no agent": the connection works.
    alice.ssh("ssh-add -l").exits(2);
}

/// An `ssh-agent` that holds the person's key; ended when dropped.
struct KeyAgent {
    socket: String,
    _process: RunningClient,
}

impl KeyAgent {
    fn start(person: &Person) -> Self {
        let socket = person.path("agent").display().to_string();
        let child = Command::new("ssh-agent").args(["-D", "-a", &socket]).stdout(Stdio::null()).spawn().unwrap();
        let agent = Self { socket, _process: RunningClient { child } };
        let key = person.path("id_ed25519");
        eventually("the agent holds the key", SOON, || {
            Outcome::of(Command::new("ssh-add").arg(&key).env("SSH_AUTH_SOCK", &agent.socket)).code == 0
        });
        agent
    }
}

#[test]
fn a_terminal_is_a_terminal() {
    let site = Site::start();
    let alice = site.person("alice");
    // What is interrupted is `cat` once it has answered: dash loses an interrupt that comes while it starts a program.
    let outcome = alice.at_a_terminal(
        "stty rows 30 columns 100 < $spawn_out(slave,name)\n\
         expect -re {\\$ $}\n\
         send \"stty size; tty\\r\"\n\
         expect \"30 100\" {} timeout { exit 10 }\n\
         expect \"/dev/pts/\" {} timeout { exit 11 }\n\
         stty rows 40 columns 120 < $spawn_out(slave,name)\n\
         send \"stty size\\r\"\n\
         expect \"40 120\" {} timeout { exit 12 }\n\
         send \"vim -u NONE note.txt\\r\"\n\
         expect \"New File\" {} timeout { exit 13 }\n\
         send \"iwritten in vim\\033:wq\\r\"\n\
         expect \"bytes written\" {} timeout { exit 14 }\n\
         expect -re {\\$ $}\n\
         send \"echo begun; cat\\r\"\n\
         expect -re {begun[^;]} {} timeout { exit 15 }\n\
         send \"here\\r\"\n\
         expect \"here\\r\\nhere\" {} timeout { exit 15 }\n\
         send \"\\003\"\n\
         expect -re {\\$ $} {} timeout { exit 16 }\n\
         send \"echo int=\\$?\\r\"\n\
         expect \"int=130\" {} timeout { exit 17 }\n\
         expect -re {\\$ $}\n\
         send \"exit 9\\r\"",
    );
    assert_eq!(outcome.code, 9, "{}", outcome.text());
    assert_eq!(fs::read_to_string(site.data("home/alice/note.txt")).unwrap(), "written in vim\n");
    let lines = outcome.text();
    let greeting = lines.lines().skip(1).take_while(|line| !line.contains("$ ")).count();
    assert!((1..=12).contains(&greeting), "a greeting of at most 12 lines:\n{lines}");
}

#[test]
fn a_command_on_a_terminal_is_not_greeted() {
    let site = Site::start();
    let alice = site.person("alice");
    alice.ssh("true").success();
    let outcome = Outcome::of(&mut alice.ssh_command(&["-tt"], &["echo only this"])).success();
    assert_eq!(outcome.text(), "only this\r");
}

#[test]
fn rsync_and_git_work_unchanged() {
    let site = Site::start();
    let alice = site.person("alice");
    let tree = alice.path("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "content").unwrap();
    fs::set_permissions(tree.join("sub/file"), fs::Permissions::from_mode(0o751)).unwrap();
    symlink("sub/file", tree.join("link")).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    fs::File::options().write(true).open(tree.join("sub/file")).unwrap().set_modified(long_ago).unwrap();
    let rsync =
        |from: &str, to: &str| Outcome::of(Command::new("rsync").args(["-a", "-e", &alice.ssh_words(), from, to]));
    rsync(&format!("{}/", tree.display()), "server:tree/").success();
    let back = alice.path("back");
    rsync("server:tree/", &format!("{}/", back.display())).success();
    let all_is_kept = |tree: &Path| {
        let file = fs::metadata(tree.join("sub/file")).unwrap();
        assert_eq!((file.permissions().mode() & 0o7777, file.modified().unwrap()), (0o751, long_ago), "{tree:?}");
        assert_eq!(fs::read_link(tree.join("link")).unwrap(), Path::new("sub/file"), "{tree:?}");
        assert_eq!(fs::read_to_string(tree.join("sub/file")).unwrap(), "content");
    };
    all_is_kept(&site.data("home/alice/tree"));
    all_is_kept(&back);

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
    assert_eq!(early.lines().next(SOON), "closed");
}
