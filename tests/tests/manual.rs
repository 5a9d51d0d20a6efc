//! Row L2: the commands of the user manual work as written, in English and in Korean.

use mlad_tests::{Outcome, Person, Site};
use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

#[test]
fn the_english_manual_works() {
    go_through("user-manual.md");
}

#[test]
fn the_korean_manual_works() {
    go_through("user-manual.ko.md");
}

#[test]
fn both_manuals_have_the_same_commands() {
    assert_eq!(commands("user-manual.md"), commands("user-manual.ko.md"));
}

/// Where a command of the manual is typed.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Laptop,
    Container,
}

fn go_through(manual: &str) {
    let site = Site::start();
    let alice = site.person("alice");
    let laptop = Laptop::new(&site, &alice);
    for (place, command) in commands(manual) {
        let outcome = match place {
            Place::Laptop => laptop.run(&command),
            Place::Container => alice.ssh(&command),
        };
        assert_eq!(outcome.code, 0, "{command}\n{}\n{}", outcome.text(), outcome.stderr);
    }
}

/// The `laptop$` and `container$` lines of the manual's console blocks.
fn commands(manual: &str) -> Vec<(Place, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(manual);
    let text = fs::read_to_string(path).unwrap();
    let blocks = text.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let found: Vec<_> = blocks
        .flat_map(str::lines)
        .filter_map(|line| {
            let laptop = line.strip_prefix("laptop$ ").map(|command| (Place::Laptop, command.to_owned()));
            laptop.or_else(|| line.strip_prefix("container$ ").map(|command| (Place::Container, command.to_owned())))
        })
        .collect();
    assert!(found.len() > 20, "{manual} has {} commands", found.len());
    found
}

/// A folder to type in, where `ssh`, `scp` and `sftp` read this person's configuration.
struct Laptop {
    folder: std::path::PathBuf,
    path: String,
}

impl Laptop {
    fn new(site: &Site, person: &Person) -> Self {
        let folder = site.path("laptop");
        let programs = site.path("laptop-programs");
        for made in [&folder, &programs] {
            fs::create_dir_all(made).unwrap();
        }
        for name in ["ssh", "scp", "sftp"] {
            let script = programs.join(name);
            fs::write(&script, format!("#!/bin/sh\nexec /usr/bin/{name} {} \"$@\"\n", person.options().join(" ")))
                .unwrap();
            fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        Self { folder, path }
    }

    fn run(&self, command: &str) -> Outcome {
        Outcome::of(Command::new("sh").args(["-c", command]).current_dir(&self.folder).env("PATH", &self.path))
    }
}
