//! Rows B1, B2: sftp and scp without a container, and nothing else to be seen. Case 4 of the first issue.

use mlad_tests::{Outcome, Person, Site};
use sha2::{Digest as _, Sha256};
use std::{
    fs,
    io::Read as _,
    os::unix::fs::{MetadataExt as _, symlink},
    path::Path,
    process::Command,
};

fn random_file(path: &Path, size: u64) -> String {
    let mut source = fs::File::open("/dev/urandom").unwrap().take(size);
    std::io::copy(&mut source, &mut fs::File::create(path).unwrap()).unwrap();
    sha256(path)
}

fn sha256(path: &Path) -> String {
    let mut file = fs::File::open(path).unwrap();
    let (mut hash, mut piece) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece).unwrap() {
            0 => break hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
            count => hash.update(&piece[..count]),
        }
    }
}

#[test]
fn datasets_arrive_without_a_container_and_belong_to_their_owner_everywhere() {
    let site = Site::start();
    let alice = site.person("alice");
    let uid = site.mlad_json(&["admin", "user", "ls"])["users"][0]["uid"].as_u64().unwrap();
    let sum = random_file(&alice.path("big"), 200_000_000);
    let many = alice.path("many");
    fs::create_dir(&many).unwrap();
    for number in 0..2000 {
        fs::write(many.join(format!("file-{number}")), format!("content {number}\n")).unwrap();
    }
    let batch = format!("put {} big\nput -r {} many\n", alice.path("big").display(), many.display());
    alice.sftp(&batch).success();
    assert!(site.containers().is_empty(), "no container was started for the upload");
    for name in ["big", "many/file-1999"] {
        assert_eq!(u64::from(fs::metadata(site.data(&format!("home/alice/{name}"))).unwrap().uid()), uid);
    }

    let seen =
        alice.ssh("sha256sum big; ls many | wc -l; cat many/file-1234; stat -c %u big; touch made; id -u").success();
    assert_eq!(seen.text(), format!("{sum}  big\n2000\ncontent 1234\n{uid}\n{uid}"));
    let job = alice.ssh("mlad run --gpu cpu -- sh -c 'sha256sum big; stat -c %u big many/file-7'").success();
    assert_eq!(job.text(), format!("{sum}  big\n{uid}\n{uid}"));
    assert_eq!(u64::from(fs::metadata(site.data("home/alice/made")).unwrap().uid()), uid);

    alice.sftp(&format!("get big {}", alice.path("back").display())).success();
    assert_eq!(sha256(&alice.path("back")), sum);
}

#[test]
fn scp_works_both_ways_in_both_modes() {
    let site = Site::start();
    let alice = site.person("alice");
    let folder = alice.path("tree");
    fs::create_dir_all(folder.join("a/b")).unwrap();
    let sum = random_file(&folder.join("a/b/c"), 3_000_000);
    for mode in ["-s", "-O"] {
        let back = alice.path(&format!("back{mode}"));
        scp(&alice, &[mode, "-q", "-r", "-p", folder.to_str().unwrap(), "server:copy"]).success();
        scp(&alice, &[mode, "-q", "-r", "-p", "server:copy", back.to_str().unwrap()]).success();
        assert_eq!(sha256(&back.join("a/b/c")), sum, "scp {mode}");
        alice.sftp("rm copy/a/b/c\nrmdir copy/a/b\nrmdir copy/a\nrmdir copy").success();
    }
    assert!(site.containers().is_empty());
}

fn scp(person: &Person, arguments: &[&str]) -> Outcome {
    Outcome::of(Command::new("scp").args(person.options()).args(arguments))
}

#[test]
fn nothing_but_ones_own_exists() {
    let site = Site::start();
    let (alice, bob) = (site.person("alice"), site.person("bob"));
    bob.sftp("mkdir secret").success();
    let home = site.data("home/alice");
    alice.sftp("mkdir d").success();
    // What somebody's container could leave in their home.
    for (name, target) in [
        ("absolute", "/etc"),
        ("relative", "../../../../../../etc"),
        ("other", "../bob"),
        ("chain", "absolute"),
        ("d/up", "../../bob"),
    ] {
        symlink(target, home.join(name)).unwrap();
    }
    for path in [
        "/etc/passwd",
        "../../etc/passwd",
        "../../../../etc/passwd",
        "/home/bob/secret",
        "/home/bob",
        "../bob/secret",
        "absolute/passwd",
        "relative/passwd",
        "other/secret",
        "chain/passwd",
        "d/up/secret",
        "/proc/1/root/etc/passwd",
        "/proc/self/cwd",
        "/home/alice/../bob",
        "/datasets/../../etc/passwd",
    ] {
        for command in [format!("ls -l {path}\n"), format!("get {path} {}\n", alice.path("stolen").display())] {
            let outcome = alice.sftp(&command);
            assert_ne!(outcome.code, 0, "{command}: {}", outcome.text());
            let said = outcome.stderr.to_lowercase();
            assert!(said.contains("no such file") || said.contains("not found"), "{command}: {said}");
        }
        assert!(!alice.path("stolen").exists(), "{path}");
    }
    let top = alice.sftp("ls -1 /\nls -1 /home\n").success().text();
    for name in top.lines().filter(|line| !line.starts_with("sftp>")) {
        assert!(
            ["/datasets", "/home", "/projects", "/home/alice", "datasets", "home", "projects", "alice"]
                .contains(&name.trim()),
            "{top}"
        );
    }
}

#[test]
fn datasets_can_be_read_but_not_changed() {
    let site = Site::start();
    let alice = site.person("alice");
    fs::create_dir_all(site.data("datasets/mnist")).unwrap();
    fs::write(site.data("datasets/mnist/train"), "data").unwrap();
    alice.sftp(&format!("get /datasets/mnist/train {}\n", alice.path("train").display())).success();
    assert_eq!(fs::read_to_string(alice.path("train")).unwrap(), "data");
    assert_ne!(alice.sftp(&format!("put {} /datasets/mnist/train\n", alice.path("train").display())).code, 0);
    assert_eq!(alice.ssh("cat /datasets/mnist/train").success().text(), "data");
    assert_ne!(alice.ssh("echo x > /datasets/mnist/train").code, 0);
}
