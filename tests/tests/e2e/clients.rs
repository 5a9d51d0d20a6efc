//! Row A5: clients from packages, each doing what it is used for. (OpenSSH's own, rsync and git are in `tools` and `files`.)

use mlad_tests::{Outcome, Person, RunningClient, Site, eventually};
use std::{
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

const SOON: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(200);

/// A person with a folder of files to be carried: one large, one empty, one in a folder with a name of blanks.
struct Desk {
    site: Site,
    alice: Person,
}

impl Desk {
    fn new() -> Self {
        let site = Site::start();
        let alice = site.person("alice");
        let tree = alice.path("tree");
        fs::create_dir_all(tree.join("a folder")).unwrap();
        let big: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        fs::write(tree.join("big"), big).unwrap();
        fs::write(tree.join("empty"), "").unwrap();
        fs::write(tree.join("a folder/한글"), "inside").unwrap();
        Self { site, alice }
    }

    fn tree(&self) -> PathBuf {
        self.alice.path("tree")
    }

    /// A path in the person's home, as it lies on the server.
    fn home(&self, name: &str) -> PathBuf {
        self.site.data("home/alice").join(name)
    }

    fn run(&self, program: impl Into<OsString>, arguments: &[&str]) -> Outcome {
        let mut command = Command::new(program.into());
        Outcome::within(LONG, command.args(arguments).current_dir(self.alice.path("")))
    }

    /// A program of the person's own, of this script.
    fn script(&self, name: &str, text: &str) -> String {
        let path = self.alice.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    fn port(&self) -> &str {
        &self.alice.address()[1]
    }
}

#[track_caller]
fn same(left: &Path, right: &Path) {
    let outcome = Outcome::of(Command::new("diff").arg("-r").args([left, right]));
    assert_eq!(outcome.code, 0, "{}{}", outcome.text(), outcome.stderr);
}

fn python() -> PathBuf {
    std::env::var_os("MLAD_TEST_PYTHON").expect("MLAD_TEST_PYTHON is not set: run this by scripts/test e2e").into()
}

#[test]
fn dropbear_runs_commands_forwards_and_copies() {
    let desk = Desk::new();
    let key = desk.alice.path("dropbear.key").display().to_string();
    let openssh = desk.alice.path("id_ed25519").display().to_string();
    desk.run("dropbearconvert", &["openssh", "dropbear", &openssh, &key]).success();
    let dbclient = desk.script("dbclient", &format!("exec /usr/bin/dbclient -y -y -i '{key}' \"$@\""));
    let run = |words: &[&str]| desk.run(&dbclient, &[&["-p", desk.port(), "mlad@127.0.0.1"], words].concat());
    let outcome = run(&["echo out; echo err >&2; exit 9"]).exits(9);
    assert_eq!((outcome.text().as_str(), outcome.stderr.contains("err")), ("out", true), "{}", outcome.stderr);
    let line = format!("stty rows 31 cols 91; {dbclient} -t -p {} mlad@127.0.0.1 stty size", desk.port());
    let terminal = desk.run("script", &["-qec", &line, "/dev/null"]).success();
    assert!(terminal.text().contains("31 91"), "{}", terminal.text());
    // Only the program itself: what `scp` adds for OpenSSH's client it warns of.
    let tree = desk.tree().display().to_string();
    let copy = |from: &str, to: &str| {
        desk.run("scp", &["-O", "-r", "-S", &dbclient, "-P", desk.port(), from, to]).success();
    };
    copy(&tree, "mlad@127.0.0.1:by-scp");
    same(&desk.tree(), &desk.home("by-scp"));
    let rsync = format!("{dbclient} -p {}", desk.port());
    desk.run("rsync", &["-a", "-e", &rsync, "mlad@127.0.0.1:by-scp/", "back/"]).success();
    same(&desk.tree(), &desk.alice.path("back"));
}

#[test]
fn putty_runs_commands_and_carries_files() {
    let desk = Desk::new();
    let key = desk.alice.path("key.ppk").display().to_string();
    let openssh = desk.alice.path("id_ed25519").display().to_string();
    desk.run("puttygen", &[&openssh, "-O", "private", "-o", &key]).success();
    // What the person would be asked to believe.
    let host_key = desk.run("ssh-keyscan", &["-t", "ed25519", "-p", desk.port(), "127.0.0.1"]).success();
    let print = Outcome::with_input(Command::new("ssh-keygen").args(["-lf", "-"]), &host_key.stdout).success();
    let print = print.text().split(' ').nth(1).unwrap().to_owned();
    let how = ["-batch", "-P", desk.port(), "-i", &key, "-hostkey", &print];
    let run = |words: &[&str]| desk.run("plink", &[&how[..], &["mlad@127.0.0.1"], words].concat());
    let outcome = run(&["echo out; echo err >&2; exit 9"]).exits(9);
    assert_eq!((outcome.text().as_str(), outcome.stderr.as_str()), ("out", "err\n"));
    let mut piped = Command::new("plink");
    piped.args(how).args(["mlad@127.0.0.1", "sha256sum"]);
    let big = fs::read(desk.tree().join("big")).unwrap();
    let sum = Outcome::with_input(Command::new("sha256sum").arg("-"), &big).text();
    assert_eq!(Outcome::with_input(&mut piped, &big).success().text(), sum);
    fs::write(
        desk.alice.path("batch"),
        "put -r tree by-psftp\nls by-psftp\nget -r by-psftp back\nmv by-psftp/big by-psftp/large\n",
    )
    .unwrap();
    desk.run("psftp", &[&how[..], &["-b", "batch", "mlad@127.0.0.1"]].concat()).success();
    same(&desk.tree(), &desk.alice.path("back"));
    fs::rename(desk.home("by-psftp/large"), desk.home("by-psftp/big")).unwrap();
    same(&desk.tree(), &desk.home("by-psftp"));
}

#[test]
fn lftp_mirrors_both_ways() {
    let desk = Desk::new();
    let connect = format!("ssh -a -x {}", desk.alice.options().join(" "));
    let script = format!(
        "set sftp:connect-program '{connect}'; set net:max-retries 2; set cmd:fail-exit yes; open sftp://mlad:@server; \
         mirror -R tree by-lftp; mirror --parallel=4 by-lftp back; chmod 600 by-lftp/big; cls -l by-lftp"
    );
    let outcome = desk.run("lftp", &["-c", &script]).success();
    assert!(outcome.text().contains("rw-------"), "{}", outcome.text());
    same(&desk.tree(), &desk.home("by-lftp"));
    same(&desk.tree(), &desk.alice.path("back"));
}

#[test]
fn rclone_copies_checks_and_syncs() {
    let desk = Desk::new();
    let key = desk.alice.path("id_ed25519").display().to_string();
    let rclone = |arguments: &[&str]| {
        let how = [
            "--config=/dev/null",
            "--sftp-host=127.0.0.1",
            "--sftp-user=mlad",
            "--sftp-port",
            desk.port(),
            "--sftp-key-file",
            &key,
        ];
        desk.run("rclone", &[&how[..], arguments].concat()).success()
    };
    rclone(&["copy", "tree", ":sftp:by-rclone"]);
    same(&desk.tree(), &desk.home("by-rclone"));
    // Sums are made in the container.
    rclone(&["check", "tree", ":sftp:by-rclone"]);
    fs::remove_file(desk.home("by-rclone/empty")).unwrap();
    rclone(&["sync", ":sftp:by-rclone", "tree"]);
    assert!(!desk.tree().join("empty").exists());
    same(&desk.tree(), &desk.home("by-rclone"));
}

#[test]
fn sshfs_is_a_folder_like_any() {
    let desk = Desk::new();
    let mount = Mount(desk.alice.path("mounted"));
    fs::create_dir(&mount.0).unwrap();
    let options = desk.alice.options();
    desk.run("sshfs", &[options[0].as_str(), &options[1], "server:", mount.0.to_str().unwrap()]).success();
    let copied = mount.0.join("by-sshfs");
    desk.run("cp", &["-r", "tree", copied.to_str().unwrap()]).success();
    same(&desk.tree(), &copied);
    same(&desk.tree(), &desk.home("by-sshfs"));
    fs::rename(copied.join("big"), copied.join("large")).unwrap();
    fs::write(copied.join("large"), "short").unwrap();
    fs::remove_dir_all(copied.join("a folder")).unwrap();
    assert_eq!(fs::read_to_string(desk.home("by-sshfs/large")).unwrap(), "short");
    assert!(!desk.home("by-sshfs/a folder").exists());
}

/// Taken off when dropped.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        Outcome::of(Command::new("umount").arg("-l").arg(&self.0));
    }
}

/// What the libraries do: each runs a command, feeds another, and carries a file both ways.
const LIBRARIES: &str = r#"
import asyncio, hashlib, sys
library, host, port, user, key = sys.argv[1:]
data = open("tree/big", "rb").read()
digest = hashlib.sha256(data).hexdigest()

def by_paramiko():
    import paramiko
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
    client.connect(host, int(port), user, key_filename=key, allow_agent=False, look_for_keys=False)
    _, out, err = client.exec_command("echo out; echo err >&2; exit 9")
    assert (out.read(), err.read(), out.channel.recv_exit_status()) == (b"out\n", b"err\n", 9)
    put, out, _ = client.exec_command("sha256sum")
    put.write(data)
    put.channel.shutdown_write()
    assert out.read().decode().split()[0] == digest
    sftp = client.open_sftp()
    sftp.put("tree/big", "by-paramiko")
    assert sftp.stat("by-paramiko").st_size == len(data)
    sftp.get("by-paramiko", "back")
    shell = client.invoke_shell("xterm", 90, 30)
    shell.send(b"stty size; exit 4\n")
    said = b"".join(iter(lambda: shell.recv(4096), b""))
    assert b"30 90" in said and shell.recv_exit_status() == 4, said
    client.close()

async def by_asyncssh():
    import asyncssh
    async with asyncssh.connect(host, int(port), username=user, client_keys=[key], known_hosts=None, config=None) as connection:
        done = await connection.run("echo out; echo err >&2; exit 9")
        assert (done.stdout, done.stderr, done.exit_status) == ("out\n", "err\n", 9)
        done = await connection.run("sha256sum", input=data, encoding=None)
        assert done.stdout.decode().split()[0] == digest
        async with connection.start_sftp_client() as sftp:
            await sftp.put("tree/big", "by-asyncssh")
            await sftp.get("by-asyncssh", "back")
            assert "by-asyncssh" in await sftp.listdir(".")
        many = await asyncio.gather(*(connection.run(f"echo {n}; exit {n}") for n in range(8)))
        assert [(one.stdout, one.exit_status) for one in many] == [(f"{n}\n", n) for n in range(8)]

def by_libssh():
    from pylibsshext.session import Session
    session = Session()
    session.connect(host=host, port=int(port), user=user, private_key=open(key, "rb").read(), host_key_checking=False)
    done = session.new_channel().exec_command("echo out; echo err >&2; exit 9")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 9), done
    sftp = session.sftp()
    sftp.put("tree/big", "by-libssh")
    sftp.get("by-libssh", "back")
    sftp.close()
    session.close()

{"paramiko": by_paramiko, "asyncssh": lambda: asyncio.run(by_asyncssh()), "libssh": by_libssh}[library]()
assert open("back", "rb").read() == data
"#;

#[test]
fn libraries_run_commands_and_carry_files() {
    let desk = Desk::new();
    let key = desk.alice.path("id_ed25519").display().to_string();
    let [host, port, user] = desk.alice.address();
    for library in ["paramiko", "asyncssh", "libssh"] {
        desk.run(python(), &["-c", LIBRARIES, library, host, port, user, &key]).success();
        same(&desk.tree().join("big"), &desk.home(&format!("by-{library}")));
        fs::remove_file(desk.alice.path("back")).unwrap();
    }
}

#[test]
fn ansible_pings_copies_and_runs_a_shell() {
    let desk = Desk::new();
    let ansible = python().with_file_name("ansible");
    fs::write(desk.alice.path("inventory"), "server\n").unwrap();
    let run = |module: &str, arguments: &str| {
        let mut command = Command::new(&ansible);
        command.args(["-i", "inventory", "server", "-m", module, "-a", arguments]).current_dir(desk.alice.path(""));
        command.env("ANSIBLE_HOME", desk.alice.path("ansible")).env("LC_ALL", "C.UTF-8");
        command.env("ANSIBLE_SSH_ARGS", format!("{} -o ControlMaster=no", desk.alice.options().join(" ")));
        // Under whatever name, the Python that Debian has.
        command.env("ANSIBLE_PYTHON_INTERPRETER", "/usr/bin/python3").env("ANSIBLE_NOCOWS", "1");
        Outcome::within(LONG, &mut command).success().text()
    };
    assert!(run("ping", "").contains("\"pong\""));
    let changed = run("copy", "src=tree/big dest=by-ansible mode=0640");
    assert!(changed.contains("CHANGED"), "{changed}");
    assert_eq!(fs::metadata(desk.home("by-ansible")).unwrap().permissions().mode() & 0o777, 0o640);
    same(&desk.tree().join("big"), &desk.home("by-ansible"));
    let again = run("copy", "src=tree/big dest=by-ansible mode=0640");
    assert!(!again.contains("CHANGED"), "a second time nothing changes: {again}");
    let said = run("shell", "echo $((40 + 2)) | cat; pwd");
    assert!(said.contains("42") && said.contains("/home/alice"), "{said}");
}

/// A server of an editor: prints the port it has chosen, and answers with its token to who asks for it.
const EDITOR_SERVER: &str = "
import http.server, os, sys
token = open('token').read()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == '/' + token else 403)
        self.end_headers()
        self.wfile.write(b'editor of %s' % os.environ['USER'].encode())
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
with open('port.new', 'w') as port: port.write(str(server.server_port))
os.rename('port.new', 'port')
server.serve_forever()
";

/// The script that an editor sends to `sh`: unpacks its server if it is not there, starts it if it does not run, and
/// says where it listens.
const EDITOR_SCRIPT: &str = "
set -e
echo \"begin $1 $(uname -s) $(id -un)\"
mkdir -p .editor && cd .editor
[ -e server.py ] || { tar -xzf ../editor.tgz; echo unpacked; }
if ! { [ -e pid ] && kill -0 \"$(cat pid)\" 2>/dev/null; }; then
  rm -f port
  printf secret > token
  setsid nohup python3 server.py > log 2>&1 < /dev/null &
  echo $! > pid
  echo started
fi
while ! [ -e port ]; do sleep 0.1; done
echo \"port=$(cat port)\"
echo end
# The connection stays for as long as the editor does.
while read line; do echo \"heard $line\"; done
";

/// VS Code's way: `ssh -T -D PORT server sh`, a script on its standard input, the archive of its server by scp, then
/// connections to 127.0.0.1 in the container through SOCKS; and when the network breaks, all of it again.
#[test]
fn an_editor_installs_its_server_reaches_it_and_comes_back() {
    let desk = Desk::new();
    fs::write(desk.alice.path("server.py"), EDITOR_SERVER).unwrap();
    desk.run("tar", &["-czf", "editor.tgz", "server.py"]).success();
    let options = desk.alice.options();
    let scp = ["-q", &options[0], &options[1], "editor.tgz", "server:"];
    desk.run("scp", &scp).success();
    let mut first = Editor::open(&desk.alice);
    assert_eq!(first.said("begin 1 Linux alice").len(), 0);
    let begun = first.said("end");
    assert_eq!(begun[..2], ["unpacked", "started"]);
    first.reaches(&begun[2]);
    first.client.child.kill().unwrap();
    drop(first);
    let mut second = Editor::open(&desk.alice);
    second.said("begin 1 Linux alice");
    let found = second.said("end");
    assert_eq!(found, begun[2..], "the server went on");
    second.reaches(&found[0]);
    // Besides, what is forwarded by name and to a fixed port.
    let port = found[0].trim_start_matches("port=");
    let forwarded = desk.alice.ssh_command(&["-W", &format!("localhost:{port}")], &[]);
    let mut forwarded = forwarded;
    let answer = Outcome::with_input(&mut forwarded, b"GET /secret HTTP/1.0\r\n\r\n").success().text();
    assert!(answer.ends_with("editor of alice"), "{answer}");
}

struct Editor {
    client: RunningClient,
    lines: mlad_tests::Lines,
    input: std::process::ChildStdin,
    socks: String,
}

impl Editor {
    fn open(person: &Person) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let socks = format!("127.0.0.1:{port}");
        let mut client = person.start(&["-T", "-D", &socks], &["sh -s 1"]);
        let lines = client.lines();
        let mut input = client.child.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, EDITOR_SCRIPT.as_bytes()).unwrap();
        Self { client, lines, input, socks }
    }

    /// The lines up to this one.
    fn said(&mut self, end: &str) -> Vec<String> {
        std::iter::repeat_with(|| self.lines.next(SOON)).take_while(|line| line != end).collect()
    }

    /// The server answers, through SOCKS and by a name that the container resolves; the shell still listens.
    fn reaches(&mut self, port: &str) {
        let port = port.strip_prefix("port=").unwrap();
        for host in ["127.0.0.1", "localhost"] {
            let url = format!("http://{host}:{port}/secret");
            let page = Outcome::of(
                Command::new("curl")
                    .args(["-sf", "--noproxy", "", "--proxy"])
                    .arg(format!("socks5h://{}", self.socks))
                    .arg(&url),
            )
            .success();
            assert_eq!(page.text(), "editor of alice");
        }
        std::io::Write::write_all(&mut self.input, b"ping\n").unwrap();
        assert_eq!(self.lines.next(SOON), "heard ping");
        eventually("the client is there", SOON, || self.client.child.try_wait().unwrap().is_none());
    }
}
