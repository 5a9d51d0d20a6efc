//! `scp -O`, both ways, with a stand-in for `ssh` that starts the worker as the gateway does.

use crate::harness::{ALICE, Site, SmallDisk, noise, shown};
use mlad_gateway::files::spawn_scp;
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::PathBuf,
    process::{Command, Output},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A program that takes the arguments of `ssh` and runs the command, its last, with the worker. (The words
/// need no shell here; how they are split is tested where it is done.)
fn ssh(site: &Site) -> PathBuf {
    let path = site.path("ssh");
    let worker = site.worker_script();
    fs::write(
        &path,
        format!("#!/bin/bash\nread -r -a words <<< \"${{!#}}\"\nexec '{}' \"${{words[@]}}\"\n", worker.display()),
    )
    .unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

pub fn scp(site: &Site, arguments: &[&str]) -> Output {
    Command::new("scp")
        .args(["-O", "-S"])
        .arg(ssh(site))
        .args(arguments)
        .current_dir(site.folder.path())
        .output()
        .unwrap()
}

#[test]
fn folders_go_and_come_back_with_times_and_modes() {
    let site = Site::new();
    fs::create_dir_all(site.path("tree/a/b")).unwrap();
    fs::write(site.path("tree/large"), noise(5_000_000)).unwrap();
    fs::write(site.path("tree/a/empty"), "").unwrap();
    fs::write(site.path("tree/a/b/small"), "small").unwrap();
    fs::set_permissions(site.path("tree/a/b"), fs::Permissions::from_mode(0o550)).unwrap();
    fs::set_permissions(site.path("tree/large"), fs::Permissions::from_mode(0o754)).unwrap();
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_400_000_000);
    fs::File::options().write(true).open(site.path("tree/a/b/small")).unwrap().set_modified(old).unwrap();

    let output = scp(&site, &["-r", "-p", "tree", "server:"]);
    assert!(output.status.success(), "{}", shown(&output));
    let status = fs::metadata(site.home("tree/a/b/small")).unwrap();
    assert_eq!((status.uid(), status.gid(), status.mtime()), (ALICE, ALICE, 1_400_000_000));
    let mode = |path: &str| fs::metadata(site.home(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("tree/a/b"), mode("tree/large")), (0o550, 0o754));

    let output = scp(&site, &["-rp", "server:tree", "back"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert!(fs::read(site.path("back/large")).unwrap() == noise(5_000_000));
    assert_eq!(fs::read(site.path("back/a/empty")).unwrap(), b"");
    assert_eq!(fs::metadata(site.path("back/a/b/small")).unwrap().mtime(), 1_400_000_000);

    let output = scp(&site, &["server:tree/a/*", "server:/datasets/images/one", "."]);
    assert!(!output.status.success(), "a folder without -r is an error, the rest is copied");
    assert!(site.path("empty").exists());
    assert_eq!(fs::read_to_string(site.path("one")).unwrap(), "dataset");
}

#[test]
fn an_existing_file_is_replaced_whole() {
    let site = Site::new();
    site.write("f", &noise(1000));
    fs::write(site.path("f"), "short").unwrap();
    let output = scp(&site, &["f", "server:f"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(fs::read_to_string(site.home("f")).unwrap(), "short");
}

/// As with OpenSSH: a secret that is replaced stays one.
#[test]
fn only_a_new_file_gets_the_mode_of_its_source_unless_asked() {
    let site = Site::new();
    site.write("secret", b"old");
    fs::set_permissions(site.home("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(site.path("secret"), "new").unwrap();
    fs::set_permissions(site.path("secret"), fs::Permissions::from_mode(0o775)).unwrap();
    let mode = |name: &str| fs::metadata(site.home(name)).unwrap().permissions().mode() & 0o7777;
    let output = scp(&site, &["secret", "server:secret"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!((fs::read_to_string(site.home("secret")).unwrap().as_str(), mode("secret")), ("new", 0o600));
    assert!(scp(&site, &["secret", "server:made"]).status.success());
    assert_eq!(mode("made"), 0o755, "less what the mask takes");
    assert!(scp(&site, &["-p", "secret", "server:secret"]).status.success());
    assert_eq!(mode("secret"), 0o775);
}

/// By pattern and as a folder. What the other side answers is known beforehand.
#[tokio::test]
async fn a_hundred_thousand_files_are_sent() {
    let site = Site::new();
    site.write("many/first", b"");
    for number in 1..100_000 {
        fs::File::create(site.home(&format!("many/entry-{number:06}"))).unwrap();
    }
    for (line, folders) in [(&b"scp -f many/*"[..], 0), (b"scp -r -f many", 1)] {
        let mut worker = spawn_scp(&site.config, &site.alice, line).unwrap().unwrap();
        let mut stdin = worker.stdin;
        let answers = tokio::spawn(async move { stdin.write_all(&vec![0; 1 + 2 * 100_000 + 2 * folders]).await });
        let mut said = Vec::new();
        worker.stdout.read_to_end(&mut said).await.unwrap();
        answers.await.unwrap().unwrap();
        assert_eq!(worker.child.wait().await.unwrap().code(), Some(0));
        let said = String::from_utf8(said).unwrap();
        let names = said.lines().filter_map(|line| Some(line.split_once(" 0 ")?.1));
        let mut names: Vec<_> = names.filter(|name| *name != "many").collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 100_000);
    }
}

#[test]
fn what_cannot_be_copied_is_named_and_the_rest_goes_on() {
    let site = Site::new();
    site.write("d/good", b"good");
    site.write("d/after", b"after");
    fs::write(site.home("d/roots"), "no").unwrap();
    fs::set_permissions(site.home("d/roots"), fs::Permissions::from_mode(0o600)).unwrap();
    symlink("/etc/passwd", site.home("d/passwd")).unwrap();
    symlink(".", site.home("d/loop")).unwrap();
    let output = scp(&site, &["-r", "server:d/good", "server:d/roots", "server:d/passwd", "server:d/after", "."]);
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("d/roots: Permission denied"), "{error}");
    assert!(error.contains("d/passwd: No such file or directory"), "{error}");
    assert_eq!(fs::read_to_string(site.path("good")).unwrap(), "good");
    assert_eq!(fs::read_to_string(site.path("after")).unwrap(), "after");
    assert!(!site.path("passwd").exists());

    for (target, reason) in [
        ("server:/datasets/x", ""),
        ("server:/etc/x", "No such file or directory"),
        ("server:/home/bob/x", "No such file or directory"),
        ("server:d/passwd", "No such file or directory"),
    ] {
        let output = scp(&site, &["good", target]);
        assert_eq!(output.status.code(), Some(1), "{target}: {}", shown(&output));
        assert!(String::from_utf8_lossy(&output.stderr).contains(reason), "{target}: {}", shown(&output));
    }
    let output = scp(&site, &["good", "after", "server:d/good"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Not a directory"), "{}", shown(&output));
}

#[test]
fn a_full_disk_is_named_and_the_next_file_is_understood() {
    let site = Site::new();
    let disk = SmallDisk::mount(&site.home(""), 1 << 20);
    fs::write(site.path("large"), noise(4 << 20)).unwrap();
    fs::write(site.path("small"), "").unwrap();
    let output = scp(&site, &["large", "small", "server:"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("No space left on device"), "{}", shown(&output));
    assert!(site.home("small").exists());
    drop(disk);
}

/// What a hostile sender says; how it ends.
async fn sink(site: &Site, line: &[u8], said: &[u8]) -> (Vec<u8>, i32) {
    let mut worker = spawn_scp(&site.config, &site.alice, line).unwrap().unwrap();
    // It may be gone before it has read all of it.
    let _ = worker.stdin.write_all(said).await;
    drop(worker.stdin);
    let mut answer = Vec::new();
    worker.stdout.read_to_end(&mut answer).await.unwrap();
    (answer, worker.child.wait().await.unwrap().code().unwrap())
}

#[tokio::test]
async fn a_hostile_sender_stays_in_its_folder() {
    let site = Site::new();
    for name in ["../evil", "/etc/evil", "..", ".", "", "a/b"] {
        let said = format!("C0644 4 {name}\nevil\0");
        let (answer, status) = sink(&site, b"scp -t .", said.as_bytes()).await;
        assert_ne!(status, 0, "{name}");
        assert!(String::from_utf8_lossy(&answer).contains("a name that is not that of a file"), "{name}");
        let said = format!("D0755 0 {name}\nC0644 4 evil\nevil\0E\n");
        assert_ne!(sink(&site, b"scp -r -t .", said.as_bytes()).await.1, 0, "{name}");
    }
    let deep = "D0755 0 d\n".repeat(1000);
    assert_ne!(sink(&site, b"scp -r -t .", deep.as_bytes()).await.1, 0);
    for said in [
        &b"D0755 0 d\n"[..],
        b"E\n",
        b"X\n",
        b"\n",
        b"C0644 99999999999999999999 x\n",
        b"C0644 4 x\nab",
        b"\x02gone\n",
        &[b'C'; 100_000],
        &[0xff; 1000],
    ] {
        assert_ne!(sink(&site, b"scp -t .", said).await.1, 0, "{:?}", String::from_utf8_lossy(said));
    }
    assert_eq!(sink(&site, b"scp -t .", b"").await, (vec![0], 0));
    assert_eq!(sink(&site, b"scp -t 'with space'", b"C0600 4 x\nfine\0").await, (vec![0; 3], 0));
    assert_eq!(fs::read_to_string(site.home("with space")).unwrap(), "fine");
    assert_eq!(fs::read_dir(site.path("data/home")).unwrap().count(), 2);
    assert!(!site.path("data/evil").exists() && !site.home("evil").exists());
}

#[tokio::test]
async fn other_commands_are_not_ours() {
    let site = Site::new();
    for line in ["scp a b", "ls", "scp -t x; ls", "scp -t $(id)"] {
        assert!(spawn_scp(&site.config, &site.alice, line.as_bytes()).unwrap().is_none(), "{line}");
    }
}
