//! Row L2: the commands of the manuals work as written.

use mlad_tests::{Outcome, Programs, Site, eventually};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

#[test]
fn the_user_manual_works() {
    let site = Site::start();
    let alice = site.person("alice");
    let laptop = Desk::new(&site, "laptop");
    for name in ["ssh", "scp", "sftp"] {
        laptop.program(name, &format!("/usr/bin/{name} {}", alice.options().join(" ")));
    }
    for (place, command) in commands("user-manual.md") {
        let outcome = match place {
            Place::Laptop => laptop.run(&command),
            Place::Container => alice.ssh_inside(&command),
            Place::Server => panic!("people have no business there: {command}"),
        };
        assert_eq!(outcome.code, 0, "{command}\n{}\n{}", outcome.text(), outcome.stderr);
    }
    assert!(site.containers().contains(&"w-1-1".into()), "what is typed in the container ran there");
}

#[test]
fn both_user_manuals_have_the_same_commands() {
    assert_eq!(commands("user-manual.md"), commands("user-manual.ko.md"));
}

#[test]
fn what_the_administrator_manual_types_into_a_running_server_works() {
    let site = Site::start();
    // What the manual ends by force: a workspace and a job, the first of their kind.
    let carol = site.person("carol");
    carol.ssh("true").success();
    carol.ssh("mlad submit --gpu 1g.5gb -- sleep 1000").success();
    eventually("the job runs", Duration::from_secs(60), || site.containers() == ["j-1-1", "w-1-1"]);
    let server = Desk::new(&site, "server");
    let api = format!("unix:{}", site.path("run/admin.sock").display());
    server.program("mlad", &format!("{} --api {api}", Programs::from_environment().mlad.display()));
    // Keys that somebody sent, and those of authorities.
    for name in ["bob", "lent", "campus_ca", "partner_ca"] {
        fs::copy(site.stranger(name).public_key(), server.folder.join(format!("{name}.pub"))).unwrap();
    }
    let typed = commands("administrator-manual.md").into_iter().map(|(_, command)| command);
    for command in typed.filter(|command| command.starts_with("mlad ")) {
        let outcome = server.run(&command);
        assert_eq!(outcome.code, 0, "{command}\n{}\n{}", outcome.text(), outcome.stderr);
    }
    let gone = || !site.containers().iter().any(|name| name == "j-1-1" || name == "w-1-1");
    eventually("what was ended is gone", Duration::from_secs(60), gone);
}

/// In a mount namespace, over a copy of `/usr` and `/etc` that is written instead of them.
#[test]
fn what_the_administrator_manual_installs_fits_its_settings() {
    let site = Site::start();
    let typed = commands("administrator-manual.md").into_iter().map(|(_, command)| command);
    // The programs are built, and the image too.
    let other =
        |command: &str| ["cargo ", "RUSTFLAGS=", "images/build ", "mlad "].iter().any(|it| command.starts_with(it));
    let typed: Vec<String> = typed.filter(|command| !other(command)).collect();
    assert!(typed.len() >= 6 && typed.iter().any(|command| command.contains("check-config")), "{typed:?}");
    let script = format!(
        "set -e\nmount --make-rprivate /\nmount -t tmpfs tmpfs \"$1\"\n\
         for name in usr etc; do\n\
         mkdir \"$1/$name\" \"$1/$name.work\"\n\
         mount -t overlay overlay -o \"lowerdir=/$name,upperdir=$1/$name,workdir=$1/$name.work\" \"/$name\"\n\
         done\n{}\n\
         for key in agent_binary catalog; do\n\
         file=$(sed -n \"s/^$key = \\\"\\(.*\\)\\\"/\\1/p\" /etc/mlad/gateway.toml)\n\
         test -f \"$file\" || {{ echo \"$key names $file, which is not there\" >&2; exit 1; }}\n\
         done\nmlad --version",
        typed.join("\n")
    );
    let over = site.path("over");
    fs::create_dir(&over).unwrap();
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "sh", "-c", &script, "sh"]).arg(over).current_dir(repository());
    let outcome = Outcome::of(&mut shell).success();
    assert!(outcome.text().contains("mlad "), "{}", outcome.text());
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().into()
}

/// Where a command of a manual is typed.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Laptop,
    Container,
    Server,
}

/// The `laptop$`, `container$` and `server#` lines of the manual's console blocks.
fn commands(manual: &str) -> Vec<(Place, String)> {
    let text = fs::read_to_string(repository().join("docs").join(manual)).unwrap();
    let blocks = text.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let typed = |line: &str| {
        let (place, command) = line.split_once(' ')?;
        let place = match place {
            "laptop$" => Place::Laptop,
            "container$" => Place::Container,
            "server#" => Place::Server,
            _ => return None,
        };
        // What is said of it beside it is in the manual's language.
        let command = command.split("  # ").next().unwrap().trim_end();
        Some((place, command.to_owned()))
    };
    let lines: Vec<&str> = blocks.flat_map(str::lines).collect();
    let found: Vec<_> = lines.iter().filter_map(|line| typed(line)).collect();
    assert_eq!(found.len(), lines.len(), "every line of the blocks of {manual} is a command: {lines:?}");
    assert!(found.len() >= 15, "{manual} has {} commands", found.len());
    found
}

/// A folder to type in, with programs that come before the system's.
struct Desk {
    folder: PathBuf,
    programs: PathBuf,
}

impl Desk {
    fn new(site: &Site, name: &str) -> Self {
        let desk = Self { folder: site.path(name), programs: site.path(&format!("{name}-programs")) };
        for made in [&desk.folder, &desk.programs] {
            fs::create_dir_all(made).unwrap();
        }
        desk
    }

    /// Under this name, another command with what is typed after it.
    fn program(&self, name: &str, command: &str) {
        let script = self.programs.join(name);
        fs::write(&script, format!("#!/bin/sh\nexec {command} \"$@\"\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn run(&self, command: &str) -> Outcome {
        let path = format!("{}:{}", self.programs.display(), std::env::var("PATH").unwrap());
        Outcome::of(Command::new("sh").args(["-c", command]).current_dir(&self.folder).env("PATH", path))
    }
}
